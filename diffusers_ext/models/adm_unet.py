"""Networks of guided-diffusion (Dhariwal & Nichol 2021, arXiv 2105.05233, "ADM") that `UNet2DModel` cannot hold."""

import inspect

from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

# diffusers loads a saved model only if the namespace of its module holds this name.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.upsampling import Upsample2D

_INHERITED = inspect.signature(UNet2DModel.__init__)


def _adm_init(
    self,
    *args,
    num_attention_heads: int | None = None,
    timestep_dim: int | None = None,
    conv_resample: bool = True,
    **kwargs,
):
    # By name, because diffusers takes positional arguments for defaults and then leaves them out of the config.
    UNet2DModel.__init__(**_INHERITED.bind(self, *args, **kwargs).arguments)
    self.register_to_config(
        num_attention_heads=num_attention_heads, timestep_dim=timestep_dim, conv_resample=conv_resample
    )
    if num_attention_heads is not None:
        self._fix_number_of_heads(num_attention_heads)
    if timestep_dim is not None:
        self._fix_timestep_dim(timestep_dim)
    if not conv_resample:
        self._resample_without_convolutions()


class ADMUNet2DModel(UNet2DModel):
    r"""`UNet2DModel` and three things that only some ADM networks have. Off by default, and then it is the parent.

    It takes every parameter of `UNet2DModel`, and those below. The call is the parent's: `forward(sample, timestep,
    class_labels=None, return_dict=True)`, sample (batch, in_channels, height, width), timestep () or (batch,),
    class_labels (batch,).

    Args:
        num_attention_heads: heads of every attention layer, whatever its width C; each has C / num_attention_heads
            channels. None: each head has `attention_head_dim` channels, as in the parent.
        timestep_dim: dimension of the sinusoidal embedding of the timestep, where the first width is another one
            (ADM's 512 x 512 network starts at half of it). None: the first width. `time_embedding_dim`, 4 times the
            first width by default, should then be given too.
        conv_resample: False halves the resolution by averages of 2 x 2 pixels and doubles it by repetition alone,
            without the convolutions of `downsample_type="conv"`, `upsample_type="conv"`.

    Raises:
        ValueError: for a number of heads that does not divide a width, an odd timestep_dim, and conv_resample=False
            with resampling by residual blocks.
    """

    def _fix_number_of_heads(self, heads: int) -> None:
        for name, attention in self.named_modules():
            if not isinstance(attention, Attention):
                continue
            if heads < 1 or attention.inner_dim % heads:
                raise ValueError(
                    f"num_attention_heads={heads} must be at least 1 and divide the {attention.inner_dim} channels of"
                    f" {name}"
                )
            attention.heads = attention.sliceable_head_dim = heads
            attention.scale = (attention.inner_dim // heads) ** -0.5

    def _fix_timestep_dim(self, dim: int) -> None:
        if dim < 2 or dim % 2:
            raise ValueError(f"timestep_dim={dim} must be even and at least 2: half of it are sines, half cosines")
        self.time_proj = Timesteps(dim, self.config.flip_sin_to_cos, self.config.freq_shift)
        self.time_embedding = TimestepEmbedding(dim, self.time_embedding.linear_1.out_features)

    def _resample_without_convolutions(self) -> None:
        kinds = {"downsample_type": self.config.downsample_type, "upsample_type": self.config.upsample_type}
        if set(kinds.values()) != {"conv"}:
            raise ValueError(f'conv_resample=False needs downsample_type and upsample_type "conv", got {kinds}')
        for block in self.down_blocks[:-1]:
            block.downsamplers[0] = Downsample2D(block.downsamplers[0].channels, name="op")
        for block in self.up_blocks[:-1]:
            block.upsamplers[0] = Upsample2D(block.upsamplers[0].channels)


# diffusers reads the config keys off the signature, which must therefore name the parent's parameters too.
_own = [p for p in inspect.signature(_adm_init).parameters.values() if p.kind is p.KEYWORD_ONLY]
_adm_init.__signature__ = _INHERITED.replace(parameters=[*_INHERITED.parameters.values(), *_own])
ADMUNet2DModel.__init__ = register_to_config(_adm_init)
