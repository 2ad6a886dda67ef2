"""A small convolutional classifier whose penultimate layer serves as a feature space for measurements."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class ImageClassifierOutput(BaseOutput):
    """What an `ImageClassifier` returns.

    Attributes:
        logits: (batch, num_classes), unnormalised.
        features: (batch, feature_dim), the penultimate activations.
    """

    logits: torch.Tensor
    features: torch.Tensor | None = (
        None  # accelerate rebuilds outputs from one dict, which BaseOutput takes as first field
    )


def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 3x3 convolutions and a halving of the resolution."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


class ImageClassifier(ModelMixin, ConfigMixin):
    """Class logits and penultimate features of an image.

    Stages of two 3x3 convolutions and a 2x2 max-pool, one for each entry of `channels`; global average; one
    hidden layer of `feature_dim` units, whose ReLU activations are the features; a linear read-out.

    Args:
        in_channels: of an image.
        channels: width of each stage.
        feature_dim: number of features.
        num_classes: number of logits.
        dropout: of the features, in training mode.

    Raises:
        ValueError: for no stage, and for numbers below 1.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        channels: tuple[int, ...] = (24, 48, 96),
        feature_dim: int = 64,
        num_classes: int = 10,
        dropout: float = 0.2,
    ):
        super().__init__()
        if not channels or min(in_channels, *channels, feature_dim, num_classes) < 1:
            raise ValueError(
                "in_channels, channels (at least one), feature_dim and num_classes must be >= 1, got"
                f" {in_channels}, {list(channels)}, {feature_dim}, {num_classes}"
            )
        widths = (in_channels, *channels)
        self.stages = nn.Sequential(*(_stage(a, b) for a, b in pairwise(widths)))
        self.to_features = nn.Sequential(nn.Linear(channels[-1], feature_dim), nn.ReLU())
        self.to_logits = nn.Sequential(nn.Dropout(dropout), nn.Linear(feature_dim, num_classes))

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> ImageClassifierOutput | tuple:
        """Classify images.

        Args:
            sample: (batch, in_channels, height, width), pixel values in [-1, 1]. Height and width at least 2 **
                len(channels).
            return_dict: whether to return an `ImageClassifierOutput` or a tuple.

        Raises:
            ValueError: for a tensor of another rank or channel count.
        """
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"sample must have shape (batch, {self.config.in_channels}, height, width), got {tuple(sample.shape)}"
            )
        features = self.to_features(self.stages(sample).mean(dim=(2, 3)))
        logits = self.to_logits(features)
        if not return_dict:
            return (logits, features)
        return ImageClassifierOutput(logits=logits, features=features)
