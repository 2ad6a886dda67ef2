"""An oracle for EDM2 networks: a checkpoint's own tensors, evaluated under their own names.

By the equations of appendix B of arXiv 2312.02696 and without the layers of `EDM2UNet2DModel`, so that a tensor in the
wrong place, a wrong order of heads or a wrong balance shows.
"""

import inspect
import math
import re
from collections.abc import Mapping

import torch
from torch.nn import functional as F

from diffusers_ext import EDM2UNet2DModel

_DEFAULTS = {name: p.default for name, p in inspect.signature(EDM2UNet2DModel.__init__).parameters.items()}


class EDM2SourceNetwork:
    """A checkpoint's tensors, evaluated as they are named, in float32. config: the authors' arguments."""

    def __init__(self, state: Mapping[str, torch.Tensor], config: Mapping):
        self.state, self.config = state, {**_DEFAULTS, **config}
        blocks = {name.split(".")[2] for name in state if name.startswith("unet.enc.")}
        self.encoder = sorted(blocks, key=lambda name: (-_size(name), "block" in name, name))
        blocks = {name.split(".")[2] for name in state if name.startswith("unet.dec.")}
        self.decoder = sorted(blocks, key=lambda name: (_size(name), "block" in name, name))

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, sigma: float, classes: torch.Tensor | None = None) -> torch.Tensor:
        """The denoised sample of x (batch, channels, height, width) float32; classes (batch,)."""
        data = self.config["sigma_data"]
        scale = math.sqrt(sigma**2 + data**2)
        embedding = self.embedding(math.log(sigma) / 4, classes)
        h = torch.cat([x / scale, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for name in self.encoder:
            name_ = f"unet.enc.{name}"
            h = self.conv(name_, h) if name.endswith("_conv") else self.block(name_, h, embedding, encoder=True)
            skips.append(h)
        for name in self.decoder:
            if "block" in name:
                h = self.joined(h, skips.pop())
            h = self.block(f"unet.dec.{name}", h, embedding, encoder=False)
        raw = self.conv("unet.out_conv", h, self.state["unet.out_gain"])
        return x * (data / scale) ** 2 + raw * (sigma * data / scale)

    def embedding(self, c_noise: float, classes: torch.Tensor | None) -> torch.Tensor:
        frequencies, phases = (self.state[f"unet.emb_fourier.{name}"].float() for name in ("freqs", "phases"))
        features = math.sqrt(2) * torch.cos(c_noise * frequencies + phases)
        embedding = self.linear("unet.emb_noise", features[None])
        if "unet.emb_label.weight" in self.state:
            count, t = self.config["label_dim"], self.config["label_balance"]
            one_hot = F.one_hot(classes, count).float() * math.sqrt(count)
            embedding = _balanced(embedding, self.linear("unet.emb_label", one_hot), t)
        return F.silu(embedding) / 0.596

    def weight(self, name: str, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        """g / sqrt(n) w / (rms(w) + 1e-4); a float16 gain rounds the first quotient, as in the authors' evaluation."""
        weight = self.state[f"{name}.weight"].float()
        rms = weight.flatten(1).square().mean(1).sqrt().reshape(-1, *[1] * (weight.ndim - 1))
        return weight / (rms + 1e-4) * (gain / math.sqrt(weight[0].numel()))

    def linear(self, name: str, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        return x @ self.weight(name, gain).T

    def conv(self, name: str, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        return F.conv2d(x, self.weight(name, gain), padding="same")

    def joined(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Concatenation in which a and b have parts 1 - t and t of the magnitude (equation 103)."""
        t, widths = self.config["concat_balance"], (a.shape[1], b.shape[1])
        scale = math.sqrt(sum(widths) / ((1 - t) ** 2 + t**2))
        return torch.cat([a * (scale * (1 - t) / widths[0] ** 0.5), b * (scale * t / widths[1] ** 0.5)], dim=1)

    def block(self, name: str, x: torch.Tensor, embedding: torch.Tensor, encoder: bool) -> torch.Tensor:
        if name.endswith("_down"):
            x = self.filtered(x, halve=True)
        elif name.endswith("_up"):
            x = self.filtered(x, halve=False)
        has_skip = f"{name}.conv_skip.weight" in self.state
        if encoder:
            x = self.conv(f"{name}.conv_skip", x) if has_skip else x
            x = x / (x.square().mean(1, keepdim=True).sqrt() + 1e-4)
        y = self.conv(f"{name}.conv_res0", F.silu(x) / 0.596)
        modulation = 1 + self.linear(f"{name}.emb_linear", embedding, self.state[f"{name}.emb_gain"])
        y = self.conv(f"{name}.conv_res1", F.silu(y * modulation[:, :, None, None]) / 0.596)
        if not encoder and has_skip:
            x = self.conv(f"{name}.conv_skip", x)
        x = _balanced(x, y, self.config["res_balance"])
        if f"{name}.attn_qkv.weight" in self.state:
            x = _balanced(x, self.attention(name, x), self.config["attn_balance"])
        limit = self.config["clip_act"]
        return x if limit is None else x.clamp(-limit, limit)

    def filtered(self, x: torch.Tensor, halve: bool) -> torch.Tensor:
        """Half or double the resolution, by a filter along each axis."""
        taps = torch.tensor(self.config["resample_filter"], dtype=torch.float32)
        taps, padding, channels = taps / taps.sum(), len(taps) // 2 - 1, x.shape[1]
        kernel = torch.outer(taps, taps).repeat(channels, 1, 1, 1)
        if halve:
            return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Cosine attention over all pixels; the output channels of attn_qkv are (head, channel, q k v)."""
        batch, channels, height, width = x.shape
        heads = channels // self.config["channels_per_head"]
        qkv = self.conv(f"{name}.attn_qkv", x).reshape(batch, heads, channels // heads, 3, height * width)
        qkv = qkv / (qkv.square().mean(2, keepdim=True).sqrt() + 1e-4)
        q, k, v = qkv.unbind(3)
        weights = torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(channels // heads)
        y = torch.einsum("bhqk,bhck->bhcq", weights.softmax(dim=-1), v)
        return self.conv(f"{name}.attn_proj", y.reshape(batch, channels, height, width))


def _size(block: str) -> int:
    return int(re.match(r"\d+", block).group())


def _balanced(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Sum of two independent signals of magnitude 1, again of magnitude 1 (equation 88)."""
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)
