"""The k nearest real samples of every generated one: the targets that a postprocessing flow is trained on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from ..checkpoints.tensor_files import read_tensors
from ..metrics import nearest_neighbours
from ..metrics.features import as_feature_pair, check_k
from ..metrics.search import BLOCK, SPARE, distance
from ..pipelines.call_arguments import checked_arguments
from ..runs.files import replacing

METHODS = ("exact", "ivf")
TRAINING_POINTS = 64  # a cell, for faiss' clustering, which wants at least 39


@dataclass(frozen=True)
class Neighbours:
    """The nearest real samples of every generated one, nearest first.

    Attributes:
        indices: (n, k) int64 into the real samples.
        distances: Euclidean, (n, k) float32.
    """

    indices: torch.Tensor
    distances: torch.Tensor

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, which appears whole or not at all.

        Args:
            path: of the file.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(save({"indices": self.indices.contiguous(), "distances": self.distances.contiguous()}))

    @classmethod
    def load(cls, path: str | Path) -> "Neighbours":
        """Read what save wrote.

        Args:
            path: of the file.

        Raises:
            ValueError: for a file that is damaged or holds something else.
        """
        tensors = read_tensors(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        alike = set(shapes) == {"indices", "distances"} and len(set(shapes.values())) == 1
        if not alike or len(shapes["indices"]) != 2 or tensors["indices"].dtype != torch.int64:
            raise ValueError(f"{path} must hold indices and distances of one shape (n, k), got {shapes}; search again")
        return cls(**tensors)


@checked_arguments(but="queries reference query_labels reference_labels")
def find_neighbours(
    queries: np.ndarray | torch.Tensor,
    reference: np.ndarray | torch.Tensor,
    k: int = 20,
    query_labels: np.ndarray | torch.Tensor | Sequence[int] | None = None,
    reference_labels: np.ndarray | torch.Tensor | Sequence[int] | None = None,
    method: str = "exact",
    cells: int | None = None,
    probes: int = 32,
) -> Neighbours:
    """The k nearest reference features of every query, in Euclidean distance.

    Args:
        queries: features of the generated samples (n, d), NumPy or torch.
        reference: those of the real ones (m, d), likewise.
        k: how many neighbours.
        query_labels: class indices (n,); given with reference_labels, neighbours have the query's class.
        reference_labels: class indices (m,).
        method: "exact" searches everything, on faiss' GPU index where faiss has one, on its CPU index, or in NumPy and
            torch where faiss is not installed. "ivf", for large sets, searches the nearest of the cells that faiss
            clusters the reference into, and may miss some neighbours; its distances are exact all the same.
        cells: number of cells, by default 4 sqrt(m).
        probes: how many of the cells are searched.

    Raises:
        ValueError: for wrong features, k larger than the reference or one of its classes, labels of another number or
            of one set alone, and an unknown method.
        ImportError: for "ivf" without faiss.
    """
    queries, reference = as_feature_pair("queries", queries, "reference", reference)
    if method not in METHODS:
        raise ValueError(f'method must be "exact" or "ivf", got {method!r}')
    if not (isinstance(probes, int) and probes >= 1 and (cells is None or (isinstance(cells, int) and cells >= 1))):
        raise ValueError(f"cells and probes must be integers >= 1, got {cells!r} and {probes!r}")
    search = _exact if method == "exact" else partial(_inverted_file, cells=cells, probes=probes)
    if query_labels is None and reference_labels is None:
        check_k(k, len(reference), "size of reference")
        found = search(queries, reference, int(k))
    else:
        labels = (
            _labels("query_labels", query_labels, queries),
            _labels("reference_labels", reference_labels, reference),
        )
        found = _by_class(search, queries, reference, *labels, k)
    distances, indices = found
    return Neighbours(torch.from_numpy(indices), torch.from_numpy(distances.astype(np.float32)))


@checked_arguments
def balanced_weights(indices: torch.Tensor, num_real: int, iterations: int = 20) -> torch.Tensor:
    r"""Probabilities (n, k) of drawing a sample's neighbours that visit real samples as evenly as their lists allow.

    In many dimensions a few points are near to everything (hubs, Radovanović et al., JMLR 2010), and uniform draws
    from the k nearest visit them again and again: the targets lose diversity. Sinkhorn's iteration, on the listed
    pairs alone, scales in turn what each real sample j gets and what each generated sample i gives,

    .. math:: w_{ij} \leftarrow w_{ij} / \textstyle\sum_l w_{lj}, \qquad w_{ij} \leftarrow w_{ij} / \sum_l w_{il}

    from w = 1 / k. Each sample keeps its own neighbours; a real sample in no list stays unvisited.

    Args:
        indices: (n, k) into the num_real real samples, as `find_neighbours` gives them.
        num_real: how many real samples there are.
        iterations: of Sinkhorn's.

    Raises:
        ValueError: for others.
    """
    if indices.ndim != 2 or not indices.numel() or not 0 <= indices.min() <= indices.max() < num_real:
        raise ValueError(f"indices must be (n, k) in [0, {num_real}), got {tuple(indices.shape)}; search again")
    weights = torch.full(indices.shape, 1 / indices.shape[1], dtype=torch.float64)
    for _ in range(iterations):
        visits = torch.bincount(indices.flatten(), weights.flatten(), num_real)
        weights /= visits[indices]
        weights /= weights.sum(dim=1, keepdim=True)
    return weights.float()


def _labels(name: str, labels, features: np.ndarray) -> np.ndarray:
    if labels is None:
        raise ValueError(f"{name} must be given: a search within classes needs the labels of both sets, or of none")
    labels = np.asarray(labels.detach().cpu() if isinstance(labels, torch.Tensor) else labels)
    if labels.shape != (len(features),) or labels.dtype.kind not in "iu":
        raise ValueError(f"{name} must be {len(features)} integers, one a sample, got {labels.dtype} {labels.shape}")
    return labels


def _by_class(search: Callable, queries, reference, query_labels, reference_labels, k: int):
    """The search within each class; indices point into the whole reference."""
    distances, indices = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
    for label in np.unique(query_labels):
        rows, members = np.flatnonzero(query_labels == label), np.flatnonzero(reference_labels == label)
        check_k(k, len(members), f"reference of class {label}")
        distances[rows], found = search(queries[rows], reference[members], int(k))
        indices[rows] = members[found]
    return distances, indices


def _exact(queries: np.ndarray, reference: np.ndarray, k: int):
    if not _gpus():
        return nearest_neighbours(queries, reference, k)
    import faiss

    index = faiss.IndexFlatL2(reference.shape[1])
    index.add(reference.astype(np.float32))
    return _search(faiss.index_cpu_to_all_gpus(index), queries, reference, k)


def _inverted_file(queries: np.ndarray, reference: np.ndarray, k: int, cells: int | None, probes: int):
    try:
        import faiss
    except ImportError as error:
        raise ImportError('method="ivf" needs faiss; pip install faiss-cpu, or use method="exact"') from error
    cells = cells or max(1, min(round(4 * math.sqrt(len(reference))), len(reference) // TRAINING_POINTS))
    check_k(cells, len(reference), "cells within reference")
    points = reference.astype(np.float32)
    quantizer = faiss.IndexFlatL2(points.shape[1])
    index = faiss.IndexIVFFlat(quantizer, points.shape[1], cells)
    chosen = np.random.default_rng(0).permutation(len(points))[: cells * TRAINING_POINTS]
    index.train(points[chosen])
    index.add(points)
    index.nprobe = min(probes, cells)
    return _search(faiss.index_cpu_to_all_gpus(index) if _gpus() else index, queries, reference, k)


def _search(index, queries: np.ndarray, reference: np.ndarray, k: int):
    """Proposals of a float32 index, ranked by exact distance; rows with too few go to the exact search."""
    distances, indices = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
    width = min(k + SPARE, len(reference))
    step = max(1, min(4096, BLOCK // (width * queries.shape[1])))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        proposed = index.search(np.ascontiguousarray(queries[rows], dtype=np.float32), width)[1]
        exact = distance(queries[rows, None], reference[proposed])
        exact[proposed < 0] = np.inf
        order = np.lexsort((proposed, exact))[:, :k]
        indices[rows] = np.take_along_axis(proposed, order, axis=1)
        distances[rows] = np.take_along_axis(exact, order, axis=1)
    short = np.flatnonzero(np.isinf(distances[:, -1]))
    if len(short):
        distances[short], indices[short] = nearest_neighbours(queries[short], reference, k)
    return distances, indices


def _gpus() -> int:
    try:
        import faiss
    except ImportError:
        return 0
    return getattr(faiss, "get_num_gpus", int)()
