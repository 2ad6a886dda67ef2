"""A transformer on patches of pixels: diffusers' DiT (arXiv 2212.09748), called like a UNet2DModel."""

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

NETWORK = {"num_layers": 8, "num_attention_heads": 4, "attention_head_dim": 64}  # 10.7 million weights


class PatchTransformer(ModelMixin, ConfigMixin):
    """The velocity of square images, told their class; the last class is the null class.

    Every block and the output begin as zero (adaLN-Zero of the paper, which diffusers' DiT leaves to its checkpoints).

    Args:
        sample_size: height and width, a multiple of patch_size.
        in_channels: of an image.
        patch_size: side of a patch, which is one token.
        num_layers: blocks.
        num_attention_heads: of a block.
        attention_head_dim: channels of a head.
        num_class_embeds: classes, the null class among them.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        patch_size: int = 4,
        num_layers: int = 8,
        num_attention_heads: int = 4,
        attention_head_dim: int = 64,
        num_class_embeds: int = 11,
    ):
        super().__init__()
        self.dit = DiTTransformer2DModel(
            sample_size=sample_size, in_channels=in_channels, patch_size=patch_size, num_layers=num_layers,
            num_attention_heads=num_attention_heads, attention_head_dim=attention_head_dim, attention_bias=True,
            num_embeds_ada_norm=num_class_embeds - 1,
        )  # fmt: skip
        for part in self.modules():
            if isinstance(part, LabelEmbedding):
                part.dropout_prob = 0.0  # each block would drop labels by itself; the training drops them for all
        for layer in (*(block.norm1.linear for block in self.dit.transformer_blocks), self.dit.proj_out_1,
                      self.dit.proj_out_2):  # fmt: skip
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | int, class_labels: torch.Tensor, return_dict: bool = True
    ) -> UNet2DOutput | tuple:
        """Predict the velocity.

        Args:
            sample: (batch, in_channels, sample_size, sample_size).
            timestep: one for all, or (batch,).
            class_labels: (batch,).
            return_dict: whether to return a `UNet2DOutput` or a tuple.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        (velocity,) = self.dit(sample, timestep, class_labels, return_dict=False)
        return UNet2DOutput(sample=velocity) if return_dict else (velocity,)


def build_network() -> PatchTransformer:
    """For 32 x 32 photographs of ten classes."""
    return PatchTransformer(**NETWORK)
