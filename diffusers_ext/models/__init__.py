"""Networks that diffusers does not have, one a file."""

from .adm_unet import ADMUNet2DModel
from .image_classifier import ImageClassifier, ImageClassifierOutput

__all__ = ["ADMUNet2DModel", "ImageClassifier", "ImageClassifierOutput"]
