"""Fréchet distance between two sets of features, from their means and covariances (arXiv 1706.08500)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from ..pipelines.call_arguments import checked_arguments
from .features import as_features

ROWS = 4096  # rows converted to float64 at a time
ROUND_OFF = 1e-5  # relative; lets covariances pass that were computed or stored in float32


def frechet_distance(
    mu1: np.ndarray | torch.Tensor,
    sigma1: np.ndarray | torch.Tensor,
    mu2: np.ndarray | torch.Tensor,
    sigma2: np.ndarray | torch.Tensor,
) -> float:
    r"""Squared Fréchet distance of two Gaussians: FID with Inception features, FD with any others (arXiv 1706.08500).

    .. math:: d^2 = |\mu_1 - \mu_2|^2 + \mathrm{tr}(\Sigma_1 + \Sigma_2) - 2\,\|\Sigma_1^{1/2} \Sigma_2^{1/2}\|_*

    The nuclear norm (the sum of the singular values) is tr((Sigma1 Sigma2)^(1/2)). It needs symmetric eigenvalues
    and singular values only, so singular covariances (fewer samples than dimensions) lose no accuracy, where a
    matrix square root keeps half of the digits, and the result is real. Eigenvalues below d times the float64
    round-off of the largest count as zero. A result below 0 is round-off of equal sets and is returned as 0.0.

    Args:
        mu1: mean (d,) of the one, NumPy or torch; everything is computed in float64, on the CPU.
        sigma1: covariance (d, d) of the one.
        mu2: mean (d,) of the other.
        sigma2: covariance (d, d) of the other.

    Raises:
        ValueError: for unequal shapes, non-finite numbers and matrices that are no covariance (not symmetric, or with
            a negative eigenvalue, beyond 1e-5 of the largest).
    """
    mu1, root1, trace1 = _moments("mu1", mu1, "sigma1", sigma1)
    mu2, root2, trace2 = _moments("mu2", mu2, "sigma2", sigma2)
    if len(mu1) != len(mu2):
        raise ValueError(f"mu1 and mu2 must have the same dimension, got {len(mu1)} and {len(mu2)}")
    fidelity = np.linalg.svd(root1.T @ root2, compute_uv=False).sum()
    distance = np.square(mu1 - mu2).sum() + trace1 + trace2 - 2 * fidelity
    if not np.isfinite(distance):  # max() would take NaN for 0, the best there is
        raise ValueError(f"the distance is {distance}: mean or covariance are too large for float64")
    return float(max(0.0, distance))


def _moments(mu_name: str, mu, sigma_name: str, sigma) -> tuple[np.ndarray, np.ndarray, float]:
    """The checked mean (d,), a factor R (d, d) with R R^T = sigma, and the trace of sigma, in float64."""
    mu = np.asarray(mu.detach().cpu().double() if isinstance(mu, torch.Tensor) else mu)
    if mu.ndim != 1:
        raise ValueError(f"{mu_name} must be 1-D, (dimensions,), got shape {mu.shape}")
    mu = as_features(mu_name, mu[None])[0].astype(np.float64)
    sigma = as_features(sigma_name, sigma).astype(np.float64)
    if sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{sigma_name} must have shape {(len(mu), len(mu))} as {mu_name} has, got {sigma.shape}")
    asymmetry, largest = np.abs(sigma - sigma.T).max(), np.abs(sigma).max()
    if asymmetry > ROUND_OFF * largest:
        raise ValueError(f"{sigma_name} must be symmetric, got entries that differ by {asymmetry:.3g}")
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    if values[0] < -ROUND_OFF * largest:
        raise ValueError(f"{sigma_name} must have no negative eigenvalue, got {values[0]:.3g}; is it a covariance?")
    values[values < len(mu) * np.finfo(np.float64).eps * values[-1]] = 0
    return mu, vectors * np.sqrt(values), float(np.trace(sigma))


class FeatureStatistics:
    r"""Running count, mean and covariance of features that come in batches, in float64 on the CPU.

    Two sets merge exactly (Chan, Golub, LeVeque 1979); S is the sum of outer products of the centred rows:

    .. math::
        \mu = \mu_a + \delta\, n_b / n, \quad S = S_a + S_b + \delta \delta^T n_a n_b / n, \quad
        \delta = \mu_b - \mu_a, \; n = n_a + n_b

    Nothing is subtracted from a sum of squares, so large means cost no digits. Memory: 2 d^2 numbers.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = None  # (d,)
        self._scatter = None  # (d, d), the S of the docstring

    def update(self, features: np.ndarray | torch.Tensor) -> FeatureStatistics:
        """Add a batch. Returns self.

        Args:
            features: (n, d), NumPy or torch, n >= 1.

        Raises:
            ValueError: for features that are not 2-D, not finite, empty, or of another dimension than before.
        """
        features = as_features("features", features)
        if self.count and features.shape[1] != len(self._mean):
            raise ValueError(f"features must have dimension {len(self._mean)} as before, got {features.shape[1]}")
        for start in range(0, len(features), ROWS):
            self._merge(features[start : start + ROWS].astype(np.float64))
        return self

    def _merge(self, rows: np.ndarray) -> None:
        mean = rows.mean(axis=0)
        rows -= mean
        scatter = rows.T @ rows
        if self.count == 0:
            self.count, self._mean, self._scatter = len(rows), mean, scatter
            return
        total = self.count + len(rows)
        delta = mean - self._mean
        self._mean = self._mean + delta * (len(rows) / total)
        self._scatter += scatter
        self._scatter += np.outer(delta, delta * (self.count * len(rows) / total))
        self.count = total

    @property
    def mean(self) -> np.ndarray:
        """Mean (d,), float64.

        Raises:
            ValueError: before the first sample.
        """
        if self.count == 0:
            raise ValueError("a mean needs at least 1 sample, got none: call update(features) first")
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """Covariance (d, d), float64, divided by count - 1.

        Raises:
            ValueError: for fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self._scatter / (self.count - 1)

    def save(self, path: str | Path) -> None:
        """Write mean, covariance and count to an .npz file.

        Args:
            path: of the file.

        Raises:
            ValueError: for fewer than two samples.
        """
        np.savez(path, mean=self.mean, covariance=self.covariance, count=self.count)

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read what save wrote; more batches can be added to it.

        Args:
            path: of the file.

        Raises:
            ValueError: for a file of something else.
        """
        statistics = cls()
        try:
            with np.load(path, allow_pickle=False) as data:
                count, mean, covariance = int(data["count"]), data["mean"], data["covariance"]
            mean, covariance = as_features("mean", mean[None])[0], as_features("covariance", covariance)
            if count < 2 or covariance.shape != (len(mean), len(mean)):
                raise ValueError(f"count={count}, mean {mean.shape} and covariance {covariance.shape} do not fit")
        except FileNotFoundError:
            raise
        except Exception as error:  # bytes mean anything once they are damaged
            raise ValueError(f"{str(path)!r} holds no feature statistics: {error}") from error
        statistics.count, statistics._mean, statistics._scatter = count, mean, covariance * (count - 1)
        return statistics


@checked_arguments
def feature_statistics(batches: np.ndarray | torch.Tensor | Iterable) -> FeatureStatistics:
    """Mean and covariance of features that need not fit in memory.

    Args:
        batches: one array (n, d), or an iterable (a generator, say) of arrays (n_i, d), read once, one at a time.

    Raises:
        ValueError: for no batch at all, or a batch that FeatureStatistics.update refuses.
    """
    statistics = FeatureStatistics()
    for batch in [batches] if isinstance(batches, (np.ndarray, torch.Tensor)) else batches:
        statistics.update(batch)
    if statistics.count == 0:
        raise ValueError("batches must hold at least one batch of features, got none")
    return statistics
