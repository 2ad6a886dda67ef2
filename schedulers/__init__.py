"""Schedulers, one file a method; each file also works inside a Hub repository."""

import diffusers as _diffusers

from .scheduling_boost_and_skip import (
    BoostAndSkipDDIMScheduler,
    BoostAndSkipDDPMScheduler,
    BoostAndSkipDPMSolverMultistepScheduler,
    BoostAndSkipEulerDiscreteScheduler,
    boost_and_skip,
)
from .scheduling_ctmc import CTMCScheduler, CTMCSchedulerOutput
from .scheduling_edm_heun import EDMHeunScheduler

__all__ = [
    "BoostAndSkipDDIMScheduler",
    "BoostAndSkipDDPMScheduler",
    "BoostAndSkipDPMSolverMultistepScheduler",
    "BoostAndSkipEulerDiscreteScheduler",
    "CTMCScheduler",
    "CTMCSchedulerOutput",
    "EDMHeunScheduler",
    "boost_and_skip",
]

# Those of diffusers with timestep tables, whose parents are not in every diffusers that is supported
if hasattr(_diffusers, "AmusedScheduler"):
    from .scheduling_amused_table import TableAmusedScheduler

    __all__ += ["TableAmusedScheduler"]
if hasattr(_diffusers, "BlockRefinementScheduler"):
    from .scheduling_block_refinement_table import TableBlockRefinementScheduler

    __all__ += ["TableBlockRefinementScheduler"]
if hasattr(_diffusers, "DiscreteDDIMScheduler"):
    from .scheduling_discrete_ddim_table import TableDiscreteDDIMScheduler

    __all__ += ["TableDiscreteDDIMScheduler"]
