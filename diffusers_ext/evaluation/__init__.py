"""How good images are: sets of them on disk, feature extractors and their cache, the numbers, and pictures of them."""

from .evaluate import (
    METRICS,
    NEIGHBOURS,
    PUBLISHED,
    evaluate_digits,
    evaluate_images,
    measure_features,
    print_evaluation,
    read_statistics,
)
from .extractors import FeatureExtractor, load_extractor
from .images import open_images, read_images

__all__ = [
    "METRICS",
    "NEIGHBOURS",
    "PUBLISHED",
    "FeatureExtractor",
    "evaluate_digits",
    "evaluate_images",
    "load_extractor",
    "measure_features",
    "open_images",
    "print_evaluation",
    "read_images",
    "read_statistics",
]
