"""Networks that diffusers does not have, one a file."""

from .image_classifier import ImageClassifier, ImageClassifierOutput

__all__ = ["ImageClassifier", "ImageClassifierOutput"]
