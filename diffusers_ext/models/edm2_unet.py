r"""The magnitude-preserving U-Net of EDM2: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models" (CVPR 2024, arXiv 2312.02696), configuration G, written from the equations of its appendix B.

Every layer keeps the magnitude (root mean square, RMS) of its activations at 1. Weights are used as

.. math:: \hat w_i = \frac{g}{\sqrt{n}} \frac{w_i}{rms(w_i) + \epsilon}, \quad \epsilon = 10^{-4}

for each output channel i with fan-in n and learned gain g (1 in most layers), at every forward; inside a block of
`EDM2UNet2DModel.constant_weights` once. In training mode w itself is replaced by its normalised value first (forced
weight normalisation). Sums and concatenations are balanced by t so that independent inputs of magnitude 1 give
magnitude 1.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

EPSILON = 1e-4

# What the blocks of `constant_weights` that are open here keep, by layer: None, or what the normalised weight was
# computed from and the weight. A thread or task sees the blocks that it opened itself.
_constant: ContextVar[dict[nn.Module, tuple | None] | None] = ContextVar("_constant", default=None)

_SIZES = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
_SMALL = ("xs", "s")  # trained without dropout

# The networks of the paper's table 2: ImageNet-512 in the 64 x 64 latents of a VAE, and ImageNet-64 in pixels.
EDM2_PRESETS = {
    f"edm2-img{image}-{size}": {
        "img_resolution": 64,
        "img_channels": channels,
        "label_dim": 1000,
        "model_channels": width,
        "dropout": 0.0 if size in _SMALL else 0.1,
    }
    for image, channels, sizes in ((512, 4, tuple(_SIZES)), (64, 3, ("s", "m", "l", "xl")))
    for size, width in _SIZES.items()
    if size in sizes
}


@dataclass
class EDM2UNet2DOutput(BaseOutput):
    """What an `EDM2UNet2DModel` returns.

    Attributes:
        sample: the denoised sample D(x; sigma), (batch, channels, height, width) float32.
        logvar: log variance u(sigma) of the loss, (batch or 1, 1, 1, 1) float32, if it was asked for.
    """

    sample: torch.Tensor
    logvar: torch.Tensor | None = None


def normalize(x: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    """x divided by its RMS over `dim` plus epsilon; the RMS is taken in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)
    rms = norm * math.sqrt(norm.numel() / x.numel())
    return x / (rms + EPSILON).to(x.dtype)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU over 0.596, its RMS on a standard normal input."""
    return F.silu(x) / 0.596


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """(1 - t) a + t b, divided by the magnitude that this has for independent a and b (equation 88)."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Concatenation over channels in which a and b contribute by 1 - t and t, whatever their widths."""
    total = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (total * (1 - t) / math.sqrt(a.shape[1])), b * (total * t / math.sqrt(b.shape[1]))], dim=1)


def resample(x: torch.Tensor, kernel: tuple[float, ...], mode: str) -> torch.Tensor:
    """Halve or double the resolution with a separable filter; the EDM2 networks use the box filter (1, 1).

    kernel: taps of even number, normalised here. mode: "keep", "down" or "up".
    """
    if mode == "keep":
        return x
    if len(set(kernel)) == 1 and len(kernel) == 2:
        return F.avg_pool2d(x, 2) if mode == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
    taps = torch.tensor(kernel, dtype=torch.float32)
    taps = (taps.outer(taps) / taps.sum() ** 2).to(x).expand(x.shape[1], 1, -1, -1)
    padding = len(kernel) // 2 - 1
    if mode == "down":
        return F.conv2d(x, taps, stride=2, padding=padding, groups=x.shape[1])
    return F.conv_transpose2d(x, taps * 4, stride=2, padding=padding, groups=x.shape[1])


class MPLayer(nn.Module):
    """Linear layer or convolution with normalised weights and no bias; see the module for the formula.

    kernel_size: None for a linear layer. gain: whether the layer has a learned gain g, which starts at 0.
    full_precision: compute in float32 whatever the dtype of the weights is.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | None = None,
        gain: bool = False,
        full_precision: bool = False,
    ):
        super().__init__()
        kernel = () if kernel_size is None else (kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self.gain = nn.Parameter(torch.zeros([])) if gain else None
        self.full_precision = full_precision
        self._forced_for = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in_channels) or (batch, in_channels, height, width) -> the same with out_channels."""
        if self.full_precision and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.to(torch.float32))
        weight = self.current_weight(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def current_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The normalised weight times gain and 1 / sqrt(fan-in)."""
        if self.training:
            self._force_normalisation()
        differentiable = self.training or (torch.is_grad_enabled() and self.weight.requires_grad)
        # A graph cannot ask which blocks are open where it runs; compiled, weights are normalised in it.
        if differentiable or torch.compiler.is_compiling() or self not in (kept := _constant.get() or {}):
            return self.normalised_weight().to(dtype)
        source = (*self._fingerprint(), dtype)
        if kept[self] is None or kept[self][0] != source:
            with torch.inference_mode(False), torch.no_grad():
                kept[self] = source, self.normalised_weight().to(dtype)
        return kept[self][1]

    def normalised_weight(self) -> torch.Tensor:
        """The weight with rows of unit norm, times gain over the root of the fan-in, in float32 at least."""
        # a copy where a hook narrows the parameter again before the backward pass reads it
        wide, copy = torch.promote_types(self.weight.dtype, torch.float32), hasattr(self, "_diffusers_hook")
        weight = self.weight.to(wide, copy=copy)
        fan_in = weight[0].numel()
        # A float16 gain rounds the quotient to float16, as it did in the network that was evaluated in the paper.
        scale = (1.0 if self.gain is None else self.gain) / math.sqrt(fan_in)
        return normalize(weight, dim=tuple(range(1, weight.ndim))) * scale

    def _force_normalisation(self):
        """Replace w by its normalised value, once for each change, so that gradients of two forwards can be added."""
        compiling = torch.compiler.is_compiling()
        if compiling or self._forced_for != self._fingerprint():
            with torch.no_grad():
                wide = torch.promote_types(self.weight.dtype, torch.float32)
                self.weight.copy_(normalize(self.weight.to(wide), dim=tuple(range(1, self.weight.ndim))))
            self._forced_for = None if compiling else self._fingerprint()

    def _fingerprint(self) -> tuple:
        """Differs after a change of weight or gain, except in place through `.data`, which torch does not count."""
        tensors = [tensor for tensor in (self.weight, self.gain) if tensor is not None]
        return tuple(
            (id(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version) for tensor in tensors
        )

    def train(self, mode: bool = True) -> "MPLayer":
        """As of every module; the weight is forced to unit norm again at the next pass."""
        self._forced_for = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        kept = _constant.get() or {}
        if self in kept:
            kept[self] = None  # where model offloading takes the weights away, a copy would stay behind
        return super()._apply(fn, recurse)


class MPFourier(nn.Module):
    """sqrt(2) cos(f x + p) with fixed random f and p, both times 2 pi: magnitude 1. Always float32.

    (batch,) -> (batch, channels).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch,). Returns (batch, num_channels), float32."""
        return (x.float().outer(self.freqs.float()) + self.phases.float()).cos() * math.sqrt(2)

    def _apply(self, fn, recurse=True):
        """Move, but never cast below float32: in float16 the phase of a high frequency is off by a hundredth."""
        full = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype.itemsize < 4:
                self._buffers[name] = full[name].to(buffer.device)
        return self


class EDM2AttnProcessor:
    """Cosine attention: queries, keys and values normalised per head, through diffusers' attention dispatcher."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "EDM2Attention", x: torch.Tensor) -> torch.Tensor:
        """x: (batch, channels, height, width). Returns the same shape."""
        batch, channels, height, width = x.shape
        # The three projections lie interleaved: the output channels of to_qkv are (heads, channels a head, 3).
        qkv = normalize(attn.to_qkv(x).reshape(batch, attn.heads, -1, 3, height * width), dim=2)
        query, key, value = qkv.permute(3, 0, 4, 1, 2).contiguous().unbind(0)  # (batch, pixels, heads, channels)
        y = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(y.permute(0, 2, 3, 1).reshape(batch, channels, height, width))


class EDM2Attention(nn.Module, AttentionModuleMixin):
    """Self-attention over pixels; the residual sum is the block's."""

    _default_processor_cls = EDM2AttnProcessor
    _available_processors = [EDM2AttnProcessor]  # noqa: RUF012  diffusers' name and form
    _supports_qkv_fusion = False

    def __init__(self, channels: int, heads: int, full_precision: bool = False):
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"channels_per_head gives {heads} heads for a block of {channels} channels, which they do not divide:"
                " choose a channels_per_head that divides every block with attention."
            )
        self.heads = heads
        self.to_qkv = MPLayer(channels, 3 * channels, 1, full_precision=full_precision)
        self.to_out = MPLayer(channels, channels, 1, full_precision=full_precision)
        self.processor = EDM2AttnProcessor()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, channels, height, width). Returns the same shape."""
        return self.processor(self, x)


class EDM2Block(nn.Module):
    """Residual block, then attention. An encoder block normalises each pixel of its main path; a decoder block not."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        encoder: bool,
        mode: str = "keep",
        heads: int = 0,
        resample_filter: tuple[float, ...] = (1, 1),
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
        full_precision: bool = False,
    ):
        super().__init__()
        self.encoder, self.mode, self.resample_filter, self.dropout = encoder, mode, tuple(resample_filter), dropout
        self.res_balance, self.attn_balance, self.clip_act = res_balance, attn_balance, clip_act
        inner = out_channels if encoder else in_channels  # where the residual branch starts
        self.conv_res0 = MPLayer(inner, out_channels, 3, full_precision=full_precision)
        self.emb_linear = MPLayer(emb_channels, out_channels, gain=True, full_precision=True)
        self.conv_res1 = MPLayer(out_channels, out_channels, 3, full_precision=full_precision)
        self.conv_skip = None
        if in_channels != out_channels:
            self.conv_skip = MPLayer(in_channels, out_channels, 1, full_precision=full_precision)
        self.attn = EDM2Attention(out_channels, heads, full_precision) if heads else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """x: (batch, in_channels, h, w). emb: (batch, emb_channels) float32. Returns (batch, out_channels, h', w')."""
        x = resample(x, self.resample_filter, self.mode)
        if self.encoder:
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = normalize(x, dim=1)

        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb) + 1
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))

        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.attn is not None:
            x = mp_sum(x, self.attn(x), self.attn_balance)
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)


class EDM2UNet2DModel(ModelMixin, AttentionMixin, ConfigMixin):
    r"""Denoiser of EDM2: D(x; sigma) with the preconditioning of EDM (arXiv 2206.00364, table 1).

    .. math:: D(x; \sigma) = c_{skip} x + c_{out} F(c_{in} x; c_{noise})

    The arguments have the names and defaults of the authors' configuration; `EDM2_PRESETS` and `from_preset` have
    the networks of the paper.

    Precision: x, sigma, the preconditioning, all embeddings, the normalisation of weights and the output are float32.
    The body computes in the dtype of the parameters (`.to(torch.bfloat16)`, `torch_dtype=`), except that float16
    parameters are computed in float32 on the CPU. Gains are rounded with the other parameters.

    Args:
        img_resolution: height and width of the training samples, which names the blocks; others can be denoised that
            halve as often.
        img_channels: channels of a sample.
        label_dim: number of classes; 0 for an unconditional network.
        use_fp16: False computes in float32 whatever the dtype of the parameters is.
        sigma_data: standard deviation of the training data.
        logvar_channels: width of the uncertainty head.
        model_channels: base width.
        channel_mult: factor on it for each resolution, highest first.
        channel_mult_noise: factor for the width of the noise features; None for the first of the widths.
        channel_mult_emb: factor for the width of the embedding; None for the largest of the widths.
        num_blocks: encoder blocks a resolution; the decoder has one more.
        attn_resolutions: resolutions with attention.
        label_balance: weight t of the label in the embedding.
        concat_balance: weight t of the skip connection.
        resample_filter: taps for down- and upsampling, an even number of them.
        channels_per_head: width of an attention head; a block narrower than that has no attention.
        dropout: of the blocks.
        res_balance: of the blocks, weight t of their residual branch.
        attn_balance: of the blocks, weight t of their attention.
        clip_act: limit of a block's activations, or None.

    Raises:
        ValueError: for a resolution that cannot be halved often enough, and a filter with an odd number of taps.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["EDM2Block"]  # noqa: RUF012  diffusers' names and forms
    _keep_in_fp32_modules = ["emb_fourier", "logvar_fourier"]  # noqa: RUF012
    # all that is computed in float32, and gains, of which a rounded one rescales a whole layer
    _skip_layerwise_casting_patterns = ["^emb_", "emb_linear", "^logvar_", "^out_conv$"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        img_resolution: int = 64,
        img_channels: int = 4,
        label_dim: int = 1000,
        use_fp16: bool = True,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        model_channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        channel_mult_noise: float | None = None,
        channel_mult_emb: float | None = None,
        num_blocks: int = 3,
        attn_resolutions: tuple[int, ...] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        resample_filter: tuple[float, ...] = (1, 1),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ):
        super().__init__()
        if img_resolution % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"img_resolution={img_resolution} must be divisible by {2 ** (len(channel_mult) - 1)}, because"
                f" channel_mult has {len(channel_mult)} resolutions: use fewer, or pad the samples."
            )
        if len(resample_filter) % 2 or sum(resample_filter) == 0:
            raise ValueError(
                f"resample_filter={resample_filter} must have an even number of taps with a sum; try (1, 1)."
            )
        widths = [int(model_channels * factor) for factor in channel_mult]
        noise_width = widths[0] if channel_mult_noise is None else int(model_channels * channel_mult_noise)
        emb_width = max(widths) if channel_mult_emb is None else int(model_channels * channel_mult_emb)

        self.emb_fourier = MPFourier(noise_width)
        self.emb_noise = MPLayer(noise_width, emb_width, full_precision=True)
        self.emb_label = MPLayer(label_dim, emb_width, full_precision=True) if label_dim else None
        self._build_blocks(widths, emb_width)
        self.out_conv = MPLayer(widths[0], img_channels, 3, gain=True, full_precision=not use_fp16)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPLayer(logvar_channels, 1, full_precision=True)
        self.gradient_checkpointing = False

    def _build_blocks(self, widths: list[int], emb_width: int):
        """`enc` and `dec`, in the order in which they run, under the authors' names."""
        config = self.config
        same = ("resample_filter", "dropout", "res_balance", "attn_balance", "clip_act")
        options = {"full_precision": not config.use_fp16, **{name: config[name] for name in same}}

        def block(in_width: int, out_width: int, encoder: bool, mode: str = "keep", attention: bool = False):
            heads = out_width // config.channels_per_head if attention else 0
            return EDM2Block(in_width, out_width, emb_width, encoder, mode, heads, **options)

        resolutions = [config.img_resolution >> level for level in range(len(widths))]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        x, skips = config.img_channels + 1, []  # x: the current width
        for level, (width, size) in enumerate(zip(widths, resolutions, strict=True)):
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = MPLayer(x, width, 3, full_precision=not config.use_fp16)
                x = width
            else:
                self.enc[f"{size}x{size}_down"] = block(x, x, True, "down")
            skips.append(x)
            for i in range(config.num_blocks):
                self.enc[f"{size}x{size}_block{i}"] = block(x, width, True, attention=size in config.attn_resolutions)
                x = width
                skips.append(x)
        for level, (width, size) in reversed([*enumerate(zip(widths, resolutions, strict=True))]):
            if level == len(widths) - 1:
                self.dec[f"{size}x{size}_in0"] = block(x, x, False, attention=True)
                self.dec[f"{size}x{size}_in1"] = block(x, x, False)
            else:
                self.dec[f"{size}x{size}_up"] = block(x, x, False, "up")
            for i in range(config.num_blocks + 1):
                attention = size in config.attn_resolutions
                self.dec[f"{size}x{size}_block{i}"] = block(x + skips.pop(), width, False, attention=attention)
                x = width

    def forward(
        self,
        sample: torch.Tensor,
        sigma: float | torch.Tensor,
        class_labels: int | list[int] | torch.Tensor | None = None,
        return_logvar: bool = False,
        return_dict: bool = True,
    ) -> EDM2UNet2DOutput | tuple:
        """Denoise.

        Args:
            sample: x, (batch, img_channels, height, width), at noise level sigma.
            sigma: noise level > 0, one for all samples or (batch,).
            class_labels: class indices, one for all samples or (batch,); or one-hot or soft labels, (batch or 1,
                label_dim). None: no label, which is a row of zeros.
            return_logvar: also return u(sigma).
            return_dict: `EDM2UNet2DOutput`, or the tuple (sample,) or (sample, logvar).

        Raises:
            ValueError: for shapes that do not fit, and labels that the network cannot have.
        """
        config = self.config
        if sample.ndim != 4 or sample.shape[1] != config.img_channels:
            raise ValueError(
                f"sample must have shape (batch, {config.img_channels}, height, width), got {tuple(sample.shape)}."
            )
        multiple = 2 ** (len(config.channel_mult) - 1)
        if sample.shape[2] % multiple or sample.shape[3] % multiple:
            raise ValueError(
                f"height and width of sample must be multiples of {multiple}, since channel_mult has"
                f" {len(config.channel_mult)} resolutions, got {tuple(sample.shape)}: pad the sample."
            )
        x = sample.to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        if len(sigma) not in (1, len(x)):
            raise ValueError(f"sigma must be one number or one a sample ({len(x)}), got {len(sigma)}.")
        labels = self._label_rows(class_labels, len(x), x.device)

        variance = sigma**2 + config.sigma_data**2
        c_skip, c_out = config.sigma_data**2 / variance, sigma * config.sigma_data / variance.sqrt()
        c_noise = sigma.flatten().log() / 4
        body = self._body(x / variance.sqrt(), self._embedding(c_noise, labels))
        outputs = [c_skip * x + c_out * body.to(torch.float32)]
        if return_logvar:
            outputs.append(self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1))
        return EDM2UNet2DOutput(*outputs) if return_dict else tuple(outputs)

    def _embedding(self, c_noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """(batch or 1, emb_width) float32."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if labels is not None:
            emb = mp_sum(emb, self.emb_label(labels * math.sqrt(self.config.label_dim)), self.config.label_balance)
        return mp_silu(emb)

    def _body(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """F: the network between the preconditioning, in the working dtype."""
        x = x.to(self._working_dtype(x.device))
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # stands for the biases
        skips = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("_conv") else self._run(layer, x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop().to(x.device), self.config.concat_balance)
            x = self._run(layer, x, emb)
        return self.out_conv(x)

    def _run(self, block: EDM2Block, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, x, emb)
        return block(x, emb)

    def _working_dtype(self, device: torch.device) -> torch.dtype:
        """What the body computes in: the dtype of the parameters, but float32 for float16 on the CPU."""
        dtype = self.dtype
        slow = dtype == torch.float16 and device.type == "cpu"
        return dtype if self.config.use_fp16 and not slow else torch.promote_types(dtype, torch.float32)

    def _label_rows(self, class_labels, batch: int, device: torch.device) -> torch.Tensor | None:
        """Labels as (batch or 1, label_dim) float32; None for an unconditional network."""
        classes = self.config.label_dim
        if not classes:
            if class_labels is not None:
                raise ValueError("class_labels: the network is unconditional (label_dim 0); leave them out.")
            return None
        if class_labels is None:
            return torch.zeros(1, classes, device=device)
        if not isinstance(class_labels, torch.Tensor):
            class_labels = torch.tensor(class_labels)
        if class_labels.ndim == 2:
            rows = class_labels.to(device, torch.float32)
        else:
            rows = torch.zeros(class_labels.numel(), classes, device=device)
            rows = rows.scatter(1, self._checked_indices(class_labels).reshape(-1, 1).to(device), 1.0)
        if rows.shape[1] != classes or len(rows) not in (1, batch):
            raise ValueError(
                f"class_labels must be one index or {batch}, or rows of {classes} numbers, one or {batch}; got shape"
                f" {tuple(class_labels.shape)}."
            )
        return rows

    def _checked_indices(self, labels: torch.Tensor) -> torch.Tensor:
        if labels.ndim > 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(
                f"class_labels of {labels.dtype} and shape {tuple(labels.shape)}: indices are integers, one or"
                f" (batch,); rows of labels are (batch, {self.config.label_dim})."
            )
        # On an accelerator the check would wait for it, and its kernel stops at a wrong index by itself.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = [label for label in labels.reshape(-1).tolist() if not 0 <= label < self.config.label_dim]
            if wrong:
                raise ValueError(f"class_labels must be in [0, {self.config.label_dim}), got {wrong}.")
        return labels.long()

    @contextmanager
    def constant_weights(self) -> Iterator["EDM2UNet2DModel"]:
        """A block in which each weight is normalised once, at its first use, and no more: it must not change inside.

        A call of `EDM2Pipeline` opens one. Moves, casts, loading and changes in place that torch counts are seen all
        the same; those through `.data` (`EMAModel.copy_to`) are not before the next block. What is kept, a second copy
        of the weights in memory, is seen by the thread or task that opened the block alone, and dropped at its end; a
        block inside of another starts anew. Nothing is kept in training mode, with gradients enabled for weights that
        require them, in compiled graphs, which normalise for themselves, and of weights that hooks move or cast at
        each call to save memory (sequential and group offloading, layerwise casting).
        """
        # by what they can do: diffusers executes a Hub file anew at each load, old layers keep the old class
        layers = [layer for layer in self.modules() if hasattr(layer, "normalised_weight")]
        if _moved_by_hooks(self):
            layers = []
        token = _constant.set({**(_constant.get() or {}), **dict.fromkeys(layers)})
        try:
            yield self
        finally:
            _constant.reset(token)

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: tuple[str, ...] | None = None,
        skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """diffusers' method, for whose list of classes this network's layers are unknown.

        Casts the weights of the blocks' convolutions; embeddings and gains, which are computed in float32, stay.

        Args:
            storage_dtype: in which weights are kept.
            compute_dtype: in which a layer is computed; by default the dtype of the parameters.
            skip_modules_pattern: regular expressions of names of layers that are left out.
            skip_modules_classes: classes of layers that are left out.
            non_blocking: as of diffusers.
        """
        compute_dtype = self.dtype if compute_dtype is None else compute_dtype
        patterns = (*(skip_modules_pattern or ()), *self._skip_layerwise_casting_patterns)
        for name, layer in self.named_modules():
            skipped = any(re.search(pattern, name) for pattern in patterns)
            if hasattr(layer, "normalised_weight") and not (skipped or isinstance(layer, skip_modules_classes or ())):
                apply_layerwise_casting_hook(layer, storage_dtype, compute_dtype, non_blocking)

    @classmethod
    def from_preset(cls, name: str, **config) -> "EDM2UNet2DModel":
        """A network of the paper with random weights.

        Args:
            name: of `EDM2_PRESETS`, for example "edm2-img512-s".
            **config: values to change.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in EDM2_PRESETS:
            raise ValueError(f"preset {name!r} is unknown; there are {', '.join(EDM2_PRESETS)}.")
        return cls(**{**EDM2_PRESETS[name], **config})

    @classmethod
    def from_edm2_state_dict(cls, state_dict: dict[str, torch.Tensor], **config) -> "EDM2UNet2DModel":
        """Build from the state dict of the authors' network (`Precond`), in evaluation mode.

        Parameters keep their dtype. A float16 state dict gives the network as the authors evaluate it, with gains
        rounded to float16; `.float()` makes the other reading of the same file, which differs by up to 5e-4.

        Args:
            state_dict: names as the authors' ("unet.enc.64x64_conv.weight", ..., "logvar_linear.weight"); copied.
            **config: arguments of this class, which are the authors'.

        Raises:
            ValueError: if names or shapes do not fit the configuration.
        """
        with torch.device("meta"):
            model = cls(**config)
        renamed = {_our_name(name): tensor.detach() for name, tensor in state_dict.items()}
        for name, tensor in renamed.items():
            if name.split(".")[0] in cls._keep_in_fp32_modules:
                renamed[name] = tensor.to(torch.float32)
        try:
            model.load_state_dict(renamed, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(f"The state dict does not fit the configuration {config}: {error}") from error
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # training would change the given tensors
        return model.eval()


def _moved_by_hooks(network: nn.Module) -> bool:
    """Whether hooks inside of the network move or cast its weights at each call; one on the whole moves it at once."""
    inside = [module for module in network.modules() if module is not network]
    registries = [module._diffusers_hook for module in network.modules() if hasattr(module, "_diffusers_hook")]
    return any(hasattr(module, "_hf_hook") for module in inside) or any(
        registry.get_hook(name) for registry in registries for name in ("group_offloading", "layerwise_casting")
    )


# Attention is a module of its own here, and gains belong to their layers.
_RENAMED = {
    "attn_qkv": "attn.to_qkv",
    "attn_proj": "attn.to_out",
    "emb_gain": "emb_linear.gain",
    "out_gain": "out_conv.gain",
}


def _our_name(name: str) -> str:
    """Name here of a parameter of the authors' network."""
    name = name.removeprefix("unet.")
    for theirs, ours in _RENAMED.items():
        name = name.replace(theirs, ours)
    return name
