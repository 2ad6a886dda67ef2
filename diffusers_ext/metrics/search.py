"""The engine of neighbours.py: exact k-nearest neighbours and sphere membership without a distance matrix.

The fast form |x|^2 + |y|^2 - 2xy cancels for close points, so it only proposes. Every distance that is returned or
compared comes from the difference of the two points as given, in float64; the error bound of the fast form decides
whether a proposal can be trusted. Blocks of 64 MB and one copy of the reference are all that is held beside the
features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

SPARE = 8  # proposals beyond k, so that round-off at rank k rarely matters
ROWS, COLUMNS = 4096, 2048  # block of pairwise products, 64 MB; faiss is fast from about 2000 rows of 64 dimensions
BLOCK = 2**23  # numbers in one block of differences
TIE = 1e-10  # squared distances that differ by less, relatively, count as equal: either point may be the k-th


def nearest(
    queries: np.ndarray, reference: np.ndarray, k: int, exclude_self: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (n, k), float64, and indices (n, k) of the k nearest reference points, nearest first.

    faiss proposes in float32 where it is installed; the rows that this leaves in doubt (all, without faiss) go to
    products in float64, and those still in doubt, points that nearly coincide, to plain differences.
    """
    frame = Frame(queries, reference)
    searches = [ProductSearch(frame, reference), DifferenceSearch(frame, reference)]
    with contextlib.suppress(ImportError):
        searches.insert(0, FaissSearch(frame, reference))
    width = min(k + exclude_self + SPARE, len(reference))
    step = max(1, min(ROWS, BLOCK // (width * queries.shape[1])))
    distances, indices = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
    pending = np.arange(len(queries))
    for search in searches:
        doubtful = []
        for rows in np.split(pending, range(step, len(pending), step)):
            points = frame(queries[rows])
            proposed, last = search(points, width)
            exact = distance(queries[rows, None], reference[proposed])
            if exclude_self:
                exact[proposed == rows[:, None]] = np.inf
            order = np.lexsort((proposed, exact))[:, :k]
            indices[rows] = np.take_along_axis(proposed, order, axis=1)
            distances[rows] = np.take_along_axis(exact, order, axis=1)
            if width < len(reference):
                kth = distances[rows, -1] / frame.scale
                doubtful.append(rows[search.may_miss(np.linalg.norm(points, axis=1), kth, last)])
        pending = np.concatenate(doubtful) if doubtful else pending[:0]
        if len(pending) == 0:
            break
    return distances, indices


def smallest_sphere(points: np.ndarray, centres: np.ndarray, k: int) -> np.ndarray:
    """Radius of the smallest k-NN sphere of the centres that holds each point, (n,); nan where none does.

    Spheres are tried from small to large, and a point leaves with the first that holds it.
    """
    radii = nearest(centres, centres, k, exclude_self=True)[0][:, -1]
    order = np.argsort(radii, kind="stable")
    radii, centres = radii[order], centres[order]
    frame = Frame(points, centres)
    slack = 1 - 4 * round_off(centres.shape[1], np.float64)  # (|x| + |y|)^2 <= 2 |x|^2 + 2 |y|^2
    found = np.full(len(points), np.nan)
    for start in range(0, len(centres), COLUMNS):
        block = slice(start, start + COLUMNS)
        y = frame(centres[block])
        power = slack * np.square(y).sum(axis=1) - np.square(radii[block] / frame.scale)
        outside = np.flatnonzero(np.isnan(found))
        for rows in np.split(outside, range(ROWS, len(outside), ROWS)):
            x = frame(points[rows])
            maybe = products(x, y, power).numpy() <= -slack * np.square(x).sum(axis=1, keepdims=True)
            found[rows] = first_inside(points[rows], centres[block], radii[block], maybe)
    return found


def first_inside(points: np.ndarray, centres: np.ndarray, radii: np.ndarray, maybe: np.ndarray) -> np.ndarray:
    """Radius of the first sphere, of those marked in maybe (n, m), that truly holds each point, (n,), or nan."""
    found = np.full(len(points), np.nan)
    rows = np.flatnonzero(maybe.any(axis=1))
    while len(rows):
        first = maybe[rows].argmax(axis=1)
        inside = distance(points[rows], centres[first]) <= radii[first]
        found[rows[inside]] = radii[first[inside]]
        maybe[rows, first] = False
        rows = rows[~inside & maybe[rows].any(axis=1)]
    return found


def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x - y| along the last axis, in float64; the same to the last bit for (y, x)."""
    difference = np.subtract(x, y, dtype=np.float64)
    return np.sqrt(np.einsum("...d,...d->...", difference, difference))


def products(x: np.ndarray, y: np.ndarray, offset: np.ndarray) -> torch.Tensor:
    """offset_j - 2 x_i y_j, (n, m), in one pass."""
    return torch.addmm(torch.from_numpy(offset), torch.from_numpy(x), torch.from_numpy(y).T, alpha=-2)


def round_off(dimension: int, dtype: type) -> float:
    """Bound on the error of |x|^2 + |y|^2 - 2xy computed in dtype, relative to (|x| + |y|)^2."""
    return (dimension + 8) * float(np.finfo(dtype).eps)


class Frame:
    """Points moved to the reference's mean and scaled into the unit ball, float64: the fast form loses least there."""

    def __init__(self, points: np.ndarray, reference: np.ndarray):
        self.centre, self.scale = reference.mean(axis=0, dtype=np.float64), 1.0
        blocks = [x[i : i + COLUMNS] for x in (points, reference) for i in range(0, len(x), COLUMNS)]
        self.scale = max(np.linalg.norm(self(block), axis=1).max() for block in blocks) or 1.0

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Points (n, d) in this frame."""
        return (points - self.centre) / self.scale


class Search:
    """Proposes neighbours by the fast form. Called with points (n, d) of the frame, it returns the indices of `width`
    reference points each, (n, width), and the fast squared distance of the last one, (n,)."""

    dtype: type

    def __init__(self, frame: Frame, reference: np.ndarray):
        self.frame, self.reference = frame, reference

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The reference in the frame, a block at a time."""
        for start in range(0, len(self.reference), COLUMNS):
            yield start, self.frame(self.reference[start : start + COLUMNS])

    def may_miss(self, norm: np.ndarray, kth: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Where a point nearer than the k-th found, at distance kth, may not have been proposed, (n,) bool.

        Such a point has a norm below |x| + kth, so that its fast squared distance is below kth^2 + error, yet not
        below the last proposal's. (A point that is nearer by less than TIE may be missed.)
        """
        limits = np.finfo(self.dtype)
        error = round_off(self.reference.shape[1], self.dtype) * (2 * norm + kth) ** 2 + float(limits.tiny)
        return (last <= (1 - TIE) * kth**2 + error) & (kth > 0)


class FaissSearch(Search):
    """faiss.IndexFlatL2, float32."""

    dtype = np.float32

    def __init__(self, frame: Frame, reference: np.ndarray):
        import faiss

        super().__init__(frame, reference)
        self.index = faiss.IndexFlatL2(reference.shape[1])
        for _, block in self.blocks():
            self.index.add(block.astype(np.float32))

    def __call__(self, points: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Search`."""
        squared, indices = self.index.search(points.astype(np.float32), width)
        return indices, squared[:, -1].astype(np.float64)


class ProductSearch(Search):
    """Blocks of products, float64."""

    dtype = np.float64

    def squared(self, points: np.ndarray, block: np.ndarray) -> torch.Tensor:
        """Squared distances (n, m)."""
        x, y = (np.square(a).sum(axis=1) for a in (points, block))
        return products(points, block, y).add_(torch.from_numpy(x)[:, None])

    def __call__(self, points: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Search`."""
        best = torch.empty(len(points), 0, dtype=torch.float64)
        indices = torch.empty(len(points), 0, dtype=torch.int64)
        for start, block in self.blocks():
            values, columns = self.squared(points, block).topk(min(width, len(block)), largest=False)
            best, indices = torch.cat([best, values], dim=1), torch.cat([indices, columns + start], dim=1)
            best, kept = best.topk(min(width, best.shape[1]), largest=False)
            indices = indices.gather(1, kept)
        return indices.numpy(), best[:, -1].numpy()


class DifferenceSearch(ProductSearch):
    """Blocks of differences, float64: slow, and right to the resolution of the features."""

    def squared(self, points: np.ndarray, block: np.ndarray) -> torch.Tensor:
        """Squared distances of a block."""
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(torch.from_numpy(points), torch.from_numpy(block), compute_mode=exact).square_()
