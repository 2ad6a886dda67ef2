"""What a metric accepts as features: one array or tensor of finite numbers, one row a sample."""

import numpy as np
import torch

LARGEST = 1e150  # whose square float64 still holds, over thousands of dimensions


def as_features(name: str, features: np.ndarray | torch.Tensor) -> np.ndarray:
    """Features as a contiguous float array (n, d) on the CPU.

    Narrower floats become float32, float32 and float64 stay, integers become float64.

    Args:
        name: of the argument, for the message.
        features: (n, d), NumPy or torch, any real dtype, any device.

    Raises:
        ValueError: with name in it, unless features is a non-empty 2-D array of finite real numbers.
    """
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu()
        narrow = features.is_floating_point() and features.dtype != torch.float64
        features = (features.float() if narrow else features).numpy()
    array = np.asarray(features)
    if array.ndim != 2:
        raise ValueError(f"{name} must be 2-D, (samples, dimensions), got shape {array.shape}")
    if 0 in array.shape:
        raise ValueError(f"{name} must have at least one sample and one dimension, got shape {array.shape}")
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be real numbers, got dtype {array.dtype}")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64)
    broken = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(broken):
        raise ValueError(f"{name} must be finite, got NaN or infinity in {len(broken)} rows, the first is {broken[0]}")
    if max(float(array.max()), -float(array.min())) > LARGEST:
        raise ValueError(f"{name} must lie within +-{LARGEST:g}, or squared distances overflow; scale the features")
    return np.ascontiguousarray(array)


def as_feature_pair(
    name: str, features: np.ndarray | torch.Tensor, other_name: str, other: np.ndarray | torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Two feature sets of one space: (n, d) and (m, d).

    Raises:
        ValueError: if they differ in d, or as as_features.
    """
    features, other = as_features(name, features), as_features(other_name, other)
    if features.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} and {other_name} must have the same dimension (the same feature network), "
            f"got {features.shape[1]} and {other.shape[1]}"
        )
    return features, other


def check_k(k: int, available: int, where: str) -> None:
    """Check a number of neighbours.

    Args:
        k: the number.
        available: how many there are.
        where: what they are found in, for the message.

    Raises:
        ValueError: unless k is a whole number in 1..available, the number of neighbours found in `where`.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= available:
        raise ValueError(f"need an integer k with 1 <= k <= {available} ({where}), got k={k!r}")
