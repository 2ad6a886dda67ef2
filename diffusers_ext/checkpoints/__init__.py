"""Readers of the original checkpoints, one family a file."""

from .convert import convert_guided_diffusion
from .guided_diffusion import PRESETS, load_guided_diffusion

__all__ = ["PRESETS", "convert_guided_diffusion", "load_guided_diffusion"]
