"""Networks that diffusers does not have, one a file."""

from .adm_unet import ADMUNet2DModel
from .classifier_guidance import ClassifierGuidance, classifier_gradient
from .ctmc_sequence_transformer import CTMCSequenceTransformer
from .ctmc_unet import CTMCUNet
from .edm2_unet import EDM2_PRESETS, EDM2UNet2DModel, EDM2UNet2DOutput
from .image_classifier import ImageClassifier, ImageClassifierOutput
from .noise_aware_classifier import NoiseAwareClassifier, NoiseAwareClassifierOutput
from .sedd_transformer import SEDDTransformer

__all__ = [
    "EDM2_PRESETS",
    "ADMUNet2DModel",
    "CTMCSequenceTransformer",
    "CTMCUNet",
    "ClassifierGuidance",
    "EDM2UNet2DModel",
    "EDM2UNet2DOutput",
    "ImageClassifier",
    "ImageClassifierOutput",
    "NoiseAwareClassifier",
    "NoiseAwareClassifierOutput",
    "SEDDTransformer",
    "classifier_gradient",
]
