"""Readers of the authors' own checkpoint files, one a format; none of them executes anything."""

from .convert import convert_guided_diffusion
from .edm2 import load_edm2
from .guided_diffusion import PRESETS, load_guided_diffusion
from .safe_pickle import UnsafePickleError, safe_load

__all__ = [
    "PRESETS",
    "UnsafePickleError",
    "convert_guided_diffusion",
    "load_edm2",
    "load_guided_diffusion",
    "safe_load",
]
