"""A classifier of noisy samples that also sees the timestep, for classifier guidance: linear, or a small MLP."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class NoiseAwareClassifierOutput(BaseOutput):
    """What a `NoiseAwareClassifier` returns.

    Attributes:
        logits: (batch, num_classes), unnormalised.
    """

    logits: torch.Tensor


class NoiseAwareClassifier(ModelMixin, ConfigMixin):
    """Logits of p(c | x_t) from the flattened x_t and t / num_train_timesteps.

    Args:
        in_features: numbers in one sample, channels x height x width.
        num_classes: number of logits.
        hidden: widths of the hidden layers; none is the linear classifier of arXiv 2503.10638, whose gradient points
            one way everywhere but for the softmax.
        num_train_timesteps: by which the timestep is divided.
    """

    @register_to_config
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: tuple[int, ...] = (),
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        widths = (in_features + 1, *hidden)
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float, return_dict: bool = True
    ) -> NoiseAwareClassifierOutput | tuple[torch.Tensor]:
        """Classify noisy samples.

        Args:
            sample: x_t (batch, ...) of in_features numbers each.
            timestep: one, or (batch,).
            return_dict: False gives the tuple (logits,).

        Raises:
            ValueError: for a sample of another size.
        """
        x = sample.flatten(1)
        if x.shape[1] != self.config.in_features:
            raise ValueError(f"sample must hold {self.config.in_features} numbers each, got {tuple(sample.shape)}")
        time = torch.as_tensor(timestep).to(x).expand(len(x))[:, None] / self.config.num_train_timesteps
        logits = self.layers(torch.cat([x, time], dim=1))
        return NoiseAwareClassifierOutput(logits=logits) if return_dict else (logits,)
