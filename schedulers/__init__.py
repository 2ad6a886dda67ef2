"""Schedulers, one file a method; each file also works inside a Hub repository."""

from .scheduling_boost_and_skip import (
    BoostAndSkipDDIMScheduler,
    BoostAndSkipDDPMScheduler,
    BoostAndSkipDPMSolverMultistepScheduler,
    BoostAndSkipEulerDiscreteScheduler,
    boost_and_skip,
)

__all__ = [
    "BoostAndSkipDDIMScheduler",
    "BoostAndSkipDDPMScheduler",
    "BoostAndSkipDPMSolverMultistepScheduler",
    "BoostAndSkipEulerDiscreteScheduler",
    "boost_and_skip",
]
