"""The image network of tauLDR: a UNet whose output is a discretised logistic law over the levels of each pixel."""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

FLOOR = 1e-6  # of the mass of a bin, relative to what lies on one side of it


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


class PixelAttnProcessor:
    """Self-attention with one head over all pixels, through diffusers' dispatcher."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "PixelAttention", x: torch.Tensor) -> torch.Tensor:
        """x: (batch, channels, height, width). Returns the same shape."""
        pixels = attn.norm(x).flatten(2).transpose(1, 2)
        query, key, value = (layer(pixels).unsqueeze(2) for layer in (attn.to_q, attn.to_k, attn.to_v))
        out = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(out.flatten(2).to(x.dtype)).transpose(1, 2).view_as(x)


class PixelAttention(nn.Module, AttentionModuleMixin):
    """x plus attention over its pixels, (batch, channels, height, width)."""

    _default_processor_cls = PixelAttnProcessor
    _available_processors = [PixelAttnProcessor]  # noqa: RUF012  diffusers' name and form
    _supports_qkv_fusion = False

    def __init__(self, channels: int, residual_scale: float):
        super().__init__()
        self.residual_scale = residual_scale
        self.norm = _norm(channels)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(channels, channels) for _ in range(4))
        self.set_processor(PixelAttnProcessor())

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """x: (batch, channels, height, width). temb is not used. Returns x's shape."""
        return (x + self.processor(self, x)) * self.residual_scale


class ResBlock(nn.Module):
    """Two normed convolutions; the time embedding is added between them."""

    def __init__(self, in_channels: int, out_channels: int, temb_dim: int, dropout: float, residual_scale: float):
        super().__init__()
        self.residual_scale = residual_scale
        self.norm1, self.norm2 = _norm(in_channels), _norm(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(temb_dim, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """x: (batch, in channels, height, width). temb: (batch, dim of the time). Returns (batch, out channels, .)."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.skip(x) + h) * self.residual_scale


class Downsample(nn.Module):
    """Halves height and width; padded at the right and at the bottom."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """x: (batch, channels, height, width). temb is not used. Returns half the height and width."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """x: (batch, channels, height, width). temb is not used. Returns twice the height and width."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.ModuleList):
    """Layers one after the other; each takes the time embedding besides."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Each layer after the other; x: (batch, channels, height, width), temb: (batch, dim of the time)."""
        for layer in self:
            x = layer(x, temb)
        return x


class CTMCUNet(ModelMixin, AttentionMixin, ConfigMixin):
    r"""Logits of p(x_0 | x_t) for images of ordered levels (Campbell et al., 2205.14987).

    The UNet gives a mean mu = tanh(x + ...) and a log scale for every pixel and channel; the probability of a level is
    the mass of the logistic law of that mean and scale on the level's bin, [-1, 1] cut into num_levels bins.

    Args:
        shape: (channels, height, width) of the image; tokens are flattened in this order.
        num_levels: size of the vocabulary.
        channels: width of the first level.
        channel_mult: factors of the widths of all levels.
        num_res_blocks: blocks a level.
        attention_level: which level has attention after each block.
        dropout: in training mode.
        time_embed_dim: width of the time embedding, even and at least 4.
        time_scale_factor: factor on the time before it is embedded.
        skip_rescale: residual sums are divided by sqrt 2.
        fix_logistic: whether levels far to the right of the mean become as improbable as those far to the left; else
            the mass of a level is at least 1e-6 times all that lies below it, as in the authors' CIFAR-10 model.

    Raises:
        ValueError: unless time_embed_dim is even and at least 4, height and width can be halved once for each level
            but the first, and attention_level is a level.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 32, 32),
        num_levels: int = 256,
        channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_level: int = 1,
        dropout: float = 0.1,
        time_embed_dim: int = 128,
        time_scale_factor: float = 1000,
        skip_rescale: bool = True,
        fix_logistic: bool = False,
    ):
        super().__init__()
        if time_embed_dim < 4 or time_embed_dim % 2:
            raise ValueError(f"time_embed_dim must be even and at least 4, got {time_embed_dim}")
        multiple = 2 ** (len(channel_mult) - 1)
        if shape[1] % multiple or shape[2] % multiple:
            raise ValueError(
                f"height and width of shape={tuple(shape)} must be multiples of {multiple}, since channel_mult has"
                f" {len(channel_mult)} levels; use fewer, or pad the images"
            )
        if not 0 <= attention_level < len(channel_mult):
            raise ValueError(f"attention_level must be in [0, {len(channel_mult)}), got {attention_level}")
        colours, temb_dim = shape[0], 4 * time_embed_dim
        residual_scale = math.sqrt(0.5) if skip_rescale else 1.0
        widths = [channels * factor for factor in channel_mult]

        def block(in_channels, out_channels):
            return ResBlock(in_channels, out_channels, temb_dim, dropout, residual_scale)

        def stage(in_channels, level):
            layers = [block(in_channels, widths[level])]
            if level == attention_level:
                layers.append(PixelAttention(widths[level], residual_scale))
            return Stage(layers)

        self.time_mlp = nn.Sequential(nn.Linear(time_embed_dim, temb_dim), nn.SiLU(), nn.Linear(temb_dim, temb_dim))
        self.conv_in = nn.Conv2d(colours, channels, 3, padding=1)
        # Every stage of `down` leaves a skip connection, every one of `up` but the upsamplings takes one.
        self.down, skips, width = nn.ModuleList(), [channels], channels
        for level, wide in enumerate(widths):
            for _ in range(num_res_blocks):
                self.down.append(stage(width, level))
                width = wide
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(Stage([Downsample(width)]))
                skips.append(width)
        self.middle = Stage([block(width, width), PixelAttention(width, residual_scale), block(width, width)])
        # flags and no isinstance: diffusers executes a Hub file anew at each load, old layers keep the old classes
        self.up, self._takes_skip = nn.ModuleList(), []
        for level in reversed(range(len(widths))):
            for _ in range(num_res_blocks + 1):
                self.up.append(stage(width + skips.pop(), level))
                self._takes_skip.append(True)
                width = widths[level]
            if level > 0:
                self.up.append(Stage([Upsample(width)]))
                self._takes_skip.append(False)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 2 * colours, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(
        self, tokens: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Logits (batch, channels * height * width, num_levels) float32 of the clean levels, as `.sample`.

        Args:
            tokens: (batch, channels * height * width) int64 levels.
            timestep: t in [0, 1], (batch,).
            return_dict: False gives the tuple (logits,).

        Raises:
            ValueError: for other shapes.
        """
        colours, height, width = self.config.shape
        if tokens.ndim != 2 or tokens.shape[1] != colours * height * width or timestep.shape != tokens.shape[:1]:
            raise ValueError(
                f"tokens must be (batch, {colours * height * width}) and timestep (batch,), got"
                f" {tuple(tokens.shape)}, {tuple(timestep.shape)}"
            )
        x = tokens.view(-1, colours, height, width).to(self.dtype)
        x = x / (self.config.num_levels - 1) * 2 - 1
        mean, log_scale = self._mean_and_log_scale(x, timestep)
        logits = self._logits(mean.flatten(1), log_scale.flatten(1))
        return UNet2DOutput(sample=logits) if return_dict else (logits,)

    def _mean_and_log_scale(self, x: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log scale of each pixel's logistic law, of the shape of x; float32 for any dtype of the model."""
        features = get_timestep_embedding(timestep * self.config.time_scale_factor, self.config.time_embed_dim)
        temb = self.time_mlp(features.to(x.dtype))
        h = self.conv_in(x)
        skips = [h]
        for stage in self.down:
            h = self._run(stage, h, temb)
            skips.append(h)
        h = self._run(self.middle, h, temb)
        for stage, takes_skip in zip(self.up, self._takes_skip, strict=True):
            if takes_skip:
                h = torch.cat([h, skips.pop()], dim=1)
            h = self._run(stage, h, temb)
        mean, log_scale = self.conv_out(F.silu(self.norm_out(h))).chunk(2, dim=1)
        return torch.tanh(x.float() + mean.float()), log_scale.float()

    def _run(self, stage: Stage, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(stage, x, temb)
        return stage(x, temb)

    def _logits(self, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        r"""Log mass of each level's bin (a, b) under a logistic law; mean, log_scale: (batch, n) float32.

        No difference of nearly equal numbers is taken, so that both tails are as exact as the middle:

        .. math:: \log(\sigma(b) - \sigma(a)) = \log \sigma(b) + \log \sigma(-a) + \log(1 - e^{a - b})
        """
        levels = self.config.num_levels
        edges = torch.linspace(-1, 1, levels + 1, device=mean.device)
        # 2: where the scale starts, e^-2 of the range of the pixels. The bounds keep what follows finite.
        steepness = (2 - log_scale).clamp(-80, 80).exp().unsqueeze(-1)
        scaled = (edges - mean.unsqueeze(-1)) * steepness
        below, above = F.logsigmoid(scaled[..., 1:]), F.logsigmoid(-scaled[..., :-1])
        mass = below + above + torch.log(-torch.expm1(-2 / levels * steepness))
        # The authors' floor: a share of all that lies below the bin, or with fix_logistic of its smaller side.
        side = torch.minimum(below, above) if self.config.fix_logistic else below
        return torch.logaddexp(mass, side + math.log(FLOOR))
