"""An oracle for guided-diffusion networks: a checkpoint's own tensors, evaluated under their own names.

By the equations of the paper's appendix and without diffusers' blocks, so that a tensor in the wrong place, a wrong
order of heads or a wrong resampling shows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from diffusers_ext.checkpoints.guided_diffusion import ADMLayout


def timestep_embedding(timestep: torch.Tensor, dim: int) -> torch.Tensor:
    """(batch, dim): cosines, then sines, of timestep (batch,) times frequencies from 1 to 1/10,000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=timestep.device) / (dim // 2))
    angles = timestep[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def halve(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 2)


def double(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


@dataclass(frozen=True)
class SourceNetwork:
    """A checkpoint's tensors, evaluated as they are named. settings: the flags that the tensors do not show."""

    state: Mapping[str, torch.Tensor]
    layout: ADMLayout
    settings: Mapping

    @torch.no_grad()
    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None):
        """sample (batch, in_channels, height, width), timestep (batch,), class_labels (batch,); the raw output."""
        layers, last = self.layout.num_res_blocks, len(self.layout.widths) - 1
        embedding = timestep_embedding(timestep, self.layout.num_channels)
        embedding = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", embedding)))
        if class_labels is not None:
            embedding = embedding + self.state["label_emb.weight"].float()[class_labels]
        embedding = F.silu(embedding)

        x = self.conv("input_blocks.0.0", sample)
        skips, n = [x], 1
        for level in range(last + 1):
            for _ in range(layers):
                x = self.resblock(f"input_blocks.{n}.0", x, embedding)
                x = self.attention(f"input_blocks.{n}.1", x) if self.layout.attention[level] else x
                skips.append(x)
                n += 1
            if level < last:
                x = self.resample(f"input_blocks.{n}.0", x, embedding, halve)
                skips.append(x)
                n += 1
        x = self.resblock("middle_block.0", x, embedding)
        x = self.resblock("middle_block.2", self.attention("middle_block.1", x), embedding)
        for n in range(len(skips)):
            level, attention = last - n // (layers + 1), self.layout.attention[last - n // (layers + 1)]
            x = self.resblock(f"output_blocks.{n}.0", torch.cat([x, skips.pop()], dim=1), embedding)
            x = self.attention(f"output_blocks.{n}.1", x) if attention else x
            if level > 0 and n % (layers + 1) == layers:
                x = self.resample(f"output_blocks.{n}.{1 + attention}", x, embedding, double)
        return self.conv("out.2", F.silu(self.norm("out.0", x)))

    def tensors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.state[f"{name}.weight"].float(), self.state[f"{name}.bias"].float()

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, *self.tensors(name))

    def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight, bias = self.tensors(name)
        return F.conv2d(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, 32, *self.tensors(name), eps=1e-5)

    def resblock(self, name: str, x: torch.Tensor, embedding: torch.Tensor, resize=lambda x: x) -> torch.Tensor:
        """x + h(x), the resolution changed inside where asked, the embedding (batch, dim) added or as scale, shift."""
        h = resize(F.silu(self.norm(f"{name}.in_layers.0", x)))
        h = self.conv(f"{name}.in_layers.2", h)
        shift = self.linear(f"{name}.emb_layers.1", embedding)[:, :, None, None]
        if self.layout.use_scale_shift_norm:
            scale, shift = shift.chunk(2, dim=1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + shift)
        x = resize(x)
        if f"{name}.skip_connection.weight" in self.state:
            x = self.conv(f"{name}.skip_connection", x)
        return x + self.conv(f"{name}.out_layers.3", F.silu(h))

    def resample(self, name: str, x: torch.Tensor, embedding: torch.Tensor, resize) -> torch.Tensor:
        if self.layout.resampling == "resblock":
            return self.resblock(name, x, embedding, resize)
        if self.layout.resampling == "pool":
            return resize(x)
        return self.conv(f"{name}.op", x, stride=2) if resize is halve else self.conv(f"{name}.conv", double(x))

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x + softmax(q k^T / sqrt(d)) v over all pixels, for each head of d channels."""
        batch, channels, height, width = x.shape
        by_width = self.settings["num_head_channels"]
        heads = self.settings["num_heads"] if by_width == -1 else channels // by_width
        qkv = F.conv1d(self.norm(f"{name}.norm", x).flatten(2), *self.tensors(f"{name}.qkv"))
        if self.settings["use_new_attention_order"]:
            q, k, v = qkv.view(batch, 3, heads, channels // heads, -1).unbind(1)
        else:
            q, k, v = qkv.view(batch, heads, 3, channels // heads, -1).unbind(2)
        weights = torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(channels // heads)
        out = torch.einsum("bhts,bhcs->bhct", weights.softmax(dim=-1), v).reshape(batch, channels, -1)
        return x + F.conv1d(out, *self.tensors(f"{name}.proj_out")).view(batch, channels, height, width)
