"""Many images or sequences from one pipeline, each with a seed of its own: drawn, labelled, and put into a folder."""

from .draw import draws_sequences, is_discrete, sample_batches, sample_images, to_uint8
from .folder import MANIFEST, Sampled, sample_to_folder
from .labels import cycled_labels, random_labels

__all__ = [
    "MANIFEST",
    "Sampled",
    "cycled_labels",
    "draws_sequences",
    "is_discrete",
    "random_labels",
    "sample_batches",
    "sample_images",
    "sample_to_folder",
    "to_uint8",
]
