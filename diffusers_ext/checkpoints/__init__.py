"""Readers of the authors' own checkpoint files, one a format; none of them executes anything.

`load_<format>` returns the network in evaluation mode, `<format>_scheduler` the scheduler that belongs to it, and
`convert_<format>` writes both as a pipeline folder and returns what it made of them, `Converted`.
"""

from .convert import Converted, convert_edm2, convert_guided_diffusion
from .convert_discrete import convert_countdown, convert_sedd, convert_tauldr
from .edm2 import load_edm2
from .guided_diffusion import PRESETS, guided_diffusion_scheduler, load_guided_diffusion
from .safe_pickle import UnsafePickleError, safe_load
from .sedd import load_countdown, load_sedd, sedd_scheduler
from .tauldr import load_tauldr, tauldr_scheduler

__all__ = [
    "PRESETS",
    "Converted",
    "UnsafePickleError",
    "convert_countdown",
    "convert_edm2",
    "convert_guided_diffusion",
    "convert_sedd",
    "convert_tauldr",
    "guided_diffusion_scheduler",
    "load_countdown",
    "load_edm2",
    "load_guided_diffusion",
    "load_sedd",
    "load_tauldr",
    "safe_load",
    "sedd_scheduler",
    "tauldr_scheduler",
]
