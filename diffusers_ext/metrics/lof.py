"""Local outlier factor of samples against real data (Breunig et al., SIGMOD 2000)."""

import numpy as np
import torch

from ..pipelines.call_arguments import checked_arguments
from .features import as_feature_pair, check_k

ROWS = 4096  # samples scored at a time


@checked_arguments(but="k features reference")
def local_outlier_factor(
    features: np.ndarray | torch.Tensor, reference: np.ndarray | torch.Tensor, k: int = 20
) -> float:
    r"""Mean local outlier factor of the samples, fitted on the reference: higher = more outlying.

    .. math::
        \mathrm{LOF}(x) = \frac{1}{k} \sum_{y \in N_k(x)} \frac{\mathrm{lrd}(y)}{\mathrm{lrd}(x)}, \quad
        \mathrm{lrd}(x) = \Big[\frac{1}{k} \sum_{y \in N_k(x)} \max(r_k(y), |x - y|)\Big]^{-1}

    N_k are the k nearest reference points and r_k(y) is the distance from y to its k-th. About 1 is as dense as the
    neighbourhood. It is scikit-learn's LocalOutlierFactor(novelty=True): a sample that is itself in the reference
    finds itself there, at distance 0. More than k equal reference points have no finite density: scikit-learn warns,
    and the factor of samples beside them is huge; take a larger k.

    Args:
        features: (n, d), NumPy or torch.
        reference: (m, d), m > k. Both are centred on its mean and computed in float64.
        k: how many neighbours.

    Raises:
        ValueError: for wrong features or k.
        ImportError: without scikit-learn.
    """
    return float(outlier_factors(features, reference, k).mean())


def outlier_factors(features: np.ndarray | torch.Tensor, reference: np.ndarray | torch.Tensor, k: int) -> np.ndarray:
    """The factor of each sample, (n,); see `local_outlier_factor`."""
    try:
        from sklearn.neighbors import LocalOutlierFactor
    except ImportError as error:
        raise ImportError("local_outlier_factor needs scikit-learn: pip install scikit-learn") from error
    features, reference = as_feature_pair("features", features, "reference", reference)
    check_k(k, len(reference) - 1, "neighbours within reference")
    centre = reference.mean(axis=0, dtype=np.float64)
    # algorithm="auto": a k-d tree up to 15 dimensions, blockwise brute force above; neither holds all distances.
    model = LocalOutlierFactor(n_neighbors=int(k), novelty=True, algorithm="auto").fit(reference - centre)
    chunks = (features[start : start + ROWS] - centre for start in range(0, len(features), ROWS))
    return -np.concatenate([model.score_samples(chunk) for chunk in chunks])
