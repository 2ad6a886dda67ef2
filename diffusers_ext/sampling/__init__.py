"""Many images or sequences from one pipeline, each with a seed of its own: drawn, labelled, and put into a folder."""

from .folder import (
    MANIFEST,
    Sampled,
    cycled_labels,
    random_labels,
    sample_batches,
    sample_images,
    sample_to_folder,
    to_uint8,
)

__all__ = [
    "MANIFEST",
    "Sampled",
    "cycled_labels",
    "random_labels",
    "sample_batches",
    "sample_images",
    "sample_to_folder",
    "to_uint8",
]
