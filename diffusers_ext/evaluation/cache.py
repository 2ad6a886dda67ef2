"""Features on disk, so that a set of images passes a network once."""

import hashlib
import json
import os
import warnings
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..runs.files import replacing

FEATURES_VERSION = 1  # raise it when the same images and weights begin to give other features


def default_cache() -> Path:
    """Where features are kept unless told otherwise: below DIFFUSERS_EXT_CACHE, else the user's cache folder."""
    root = os.environ.get("DIFFUSERS_EXT_CACHE")
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(root) if root else Path(user) / "diffusers_ext") / "features"


def cache_path(folder: str | Path, images: str, extractor: str, identity: str) -> Path:
    """The file for the features of one set of images.

    Args:
        folder: of the cache.
        images: content hash of the set.
        extractor: name of the FeatureExtractor.
        identity: identity of the FeatureExtractor.
    """
    key = json.dumps([FEATURES_VERSION, images, extractor, identity])
    return Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def load_features(path: Path, count: int) -> np.ndarray | None:
    """Features (count, dimensions) as they were saved; None if there are none, or the file is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            features, expected = file.get_tensor("features"), (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    whole = features.ndim == 2 and len(features) == count and _digest(features) == expected
    return features if whole else None


def save_features(path: Path, features: np.ndarray) -> None:
    """Write features (count, dimensions); the file appears whole or not at all. A failure is a warning, no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(save({"features": features}, metadata={"sha256": _digest(features)}))
    except (OSError, SafetensorError) as error:
        warnings.warn(f"features are not kept in '{path.parent}': {error}")


def _digest(features: np.ndarray) -> str:
    digest = hashlib.sha256(f"{features.shape} {features.dtype}".encode())
    digest.update(np.ascontiguousarray(features))
    return digest.hexdigest()
