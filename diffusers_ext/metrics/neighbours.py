"""Exact nearest neighbours of large sets, and the three metrics made of them.

No distance matrix is ever held: 50,000 x 50,000 points of 384 dimensions stay below 2 GB (search.py).
"""

from typing import NamedTuple

import numpy as np
import torch

from ..pipelines.call_arguments import checked_arguments
from .features import as_feature_pair, check_k
from .search import nearest, smallest_sphere


class RarityScore(NamedTuple):
    """What `rarity_score` returns.

    Attributes:
        mean: average over the samples inside (nan if none is).
        inside: their share.
        scores: (n,), nan outside.
    """

    mean: float
    inside: float
    scores: np.ndarray


class PrecisionRecall(NamedTuple):
    """What `precision_recall` returns.

    Attributes:
        precision: share of samples inside the real manifold.
        recall: share of real points inside the samples' own.
    """

    precision: float
    recall: float


@checked_arguments(but="k queries reference")
def nearest_neighbours(
    queries: np.ndarray | torch.Tensor, reference: np.ndarray | torch.Tensor, k: int, exclude_self: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest reference points of every query, in Euclidean distance, nearest first.

    The search is exact, through faiss where it is installed and torch elsewhere. Which of several points at one
    distance (to 10 digits) is the k-th is left open.

    Args:
        queries: (n, d), NumPy or torch.
        reference: (m, d), NumPy or torch.
        k: how many neighbours.
        exclude_self: queries are the reference, and a point is not its own neighbour (an equal point at another index
            is).

    Returns:
        Distances (n, k) float64 and indices (n, k) int64.

    Raises:
        ValueError: for wrong features, for k outside 1..m (1..m-1 with exclude_self), and for exclude_self with two
            different sets.
    """
    queries, reference = as_feature_pair("queries", queries, "reference", reference)
    if exclude_self and not (queries is reference or np.array_equal(queries, reference)):
        raise ValueError("exclude_self=True needs queries and reference to be the same points, got two different sets")
    check_k(k, len(reference) - exclude_self, "neighbours within reference" if exclude_self else "size of reference")
    return nearest(queries, reference, int(k), exclude_self)


@checked_arguments(but="k features reference")
def average_knn_distance(
    features: np.ndarray | torch.Tensor, reference: np.ndarray | torch.Tensor, k: int = 5
) -> float:
    r"""AvgkNN: mean distance of the samples to their k nearest real points (arXiv 2203.17260). Higher = more minority.

    .. math:: \frac{1}{n k} \sum_i \sum_{y \in N_k(x_i)} |x_i - y|

    Args:
        features: samples (n, d), NumPy or torch. A sample that is itself in the reference counts itself, at distance
            0.
        reference: real points (m, d), m >= k.
        k: how many neighbours.

    Raises:
        ValueError: for wrong features or k.
    """
    features, reference = as_feature_pair("features", features, "reference", reference)
    check_k(k, len(reference), "size of reference")
    return float(nearest(features, reference, int(k))[0].mean())


@checked_arguments(but="k features reference")
def rarity_score(features: np.ndarray | torch.Tensor, reference: np.ndarray | torch.Tensor, k: int = 3) -> RarityScore:
    r"""Rarity score (Han et al., ICLR 2023, arXiv 2206.08549): higher = in a sparser place of the real data.

    .. math:: \mathrm{rarity}(x) = \min \{ r_k(y) : |x - y| \le r_k(y) \}

    y runs over the real points and r_k(y) is the distance from y to its k-th nearest other real point. A sample in
    no sphere is outside the real manifold and has no score.

    Args:
        features: samples (n, d), NumPy or torch.
        reference: real points (m, d), m > k.
        k: which neighbour's distance is the radius.

    Returns:
        RarityScore: the mean over the samples inside, their share, and each sample's score.

    Raises:
        ValueError: for wrong features or k.
    """
    features, reference = as_feature_pair("features", features, "reference", reference)
    check_k(k, len(reference) - 1, "neighbours within reference")
    scores = smallest_sphere(features, reference, int(k))
    inside = ~np.isnan(scores)
    return RarityScore(float(scores[inside].mean()) if inside.any() else float("nan"), float(inside.mean()), scores)


@checked_arguments(but="k features reference")
def precision_recall(
    features: np.ndarray | torch.Tensor, reference: np.ndarray | torch.Tensor, k: int = 3
) -> PrecisionRecall:
    r"""Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019, arXiv 1904.06991).

    .. math:: \mathrm{precision} = \frac{1}{n} \sum_x 1\{\exists y: |x - y| \le r_k(y)\}

    x runs over the samples and y over the real points; recall is the same with the two sets exchanged. r_k(y) is
    the distance from y to its k-th nearest other point of its own set. Both depend on the sizes: use equal ones.

    Args:
        features: samples (n, d), n > k, NumPy or torch.
        reference: real points (m, d), m > k.
        k: which neighbour's distance is the radius.

    Raises:
        ValueError: for wrong features or k.
    """
    features, reference = as_feature_pair("features", features, "reference", reference)
    check_k(k, len(features) - 1, "neighbours within features")
    check_k(k, len(reference) - 1, "neighbours within reference")
    precision, recall = (
        float(np.isfinite(smallest_sphere(points, centres, int(k))).mean())
        for points, centres in ((features, reference), (reference, features))
    )
    return PrecisionRecall(precision, recall)
