"""Guidance in an interval of noise levels for Modular Diffusers (arXiv 2404.07724).

diffusers' guiders can be limited to fractions of the steps; these are limited to noise levels, as the paper does, or
to steps, and can be used for a second call whatever they did in the last step of the first.
"""

import copy
import functools
import sys
from types import FrameType
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_ext.pipelines.guidance_interval import Interval, StepStart, read_step


class _Limited:
    """What makes a guider a limited one: outside of the interval it counts as disabled, for the step alone.

    A guider asks `_enabled` for everything: how many predictions to make, and how to combine them. Between steps it
    is what the user set, so that the pipeline knows that it needs negative prompts.
    """

    interval: Interval
    scheduler: SchedulerMixin | None = None
    _start_of_step: StepStart | None = None
    _steps_begun = 0
    _guided = True

    @property
    def _enabled(self) -> bool:
        return self.__dict__["_enabled"] and self._guided

    @_enabled.setter
    def _enabled(self, value: bool) -> None:
        self.__dict__["_enabled"] = value

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        """Called at each evaluation; decides at the first one of a step, for all of them.

        step: of the evaluation. Passed on is that of the step, since `start` and `stop` are fractions of
        num_inference_steps, of which there are fewer than evaluations with Heun.
        """
        scheduler = self.scheduler or _scheduler_of(sys._getframe(1))
        if step == 0:
            self._start_of_step, self._steps_begun = None, 0
        start = read_step(scheduler, timestep, self._start_of_step)
        self._steps_begun += start is not self._start_of_step
        self._start_of_step, self._guided = start, start in self.interval
        super().set_state(self._steps_begun - 1, num_inference_steps, timestep)

    def __call__(self, data: list) -> Any:
        combined = super().__call__(data)
        self._guided = True
        # A fraction of the steps is a matter of this step as well: left in place, it would rule the next call.
        self._num_inference_steps = None
        return combined

    def new(self, **kwargs):
        """A copy with the same interval, and changed parameters."""
        other = copy.copy(self) if not kwargs else type(self).from_config(self.config, **kwargs)
        if "interval" in vars(self) and "interval" not in vars(other):
            other.interval = self.interval
        return other


def _scheduler_of(frame: FrameType | None) -> SchedulerMixin:
    """The scheduler of the pipeline, or of the modular pipeline's components, that is running in a frame."""
    while frame is not None:
        for name in ("components", "self"):
            scheduler = getattr(frame.f_locals.get(name), "scheduler", None)
            if hasattr(scheduler, "timesteps"):
                return scheduler
        frame = frame.f_back
    raise ValueError("no running pipeline with a scheduler was found; set guider.scheduler = scheduler")


class IntervalGuidance(_Limited, ClassifierFreeGuidance):
    r"""Classifier-free guidance where the noise level at the start of a step lies in an interval.

    .. math:: D = D_{uncond} + w(\sigma)\,(D_{cond} - D_{uncond}),\quad
        w(\sigma) = w \text{ if } \sigma_{lo} < \sigma \le \sigma_{hi}, \text{ else } 1

    Elsewhere the network is run on the condition alone.

    guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled: of `ClassifierFreeGuidance`.
    sigma_lo, sigma_hi, guided_steps, sigma_unit: see `diffusers_ext.pipelines.guidance_interval.Interval`.

    The scheduler is that of the pipeline that runs; set `scheduler` to name another. Raises ValueError for arguments
    out of range.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        sigma_lo: float | None = None,
        sigma_hi: float | None = None,
        guided_steps: tuple[int, int] | None = None,
        sigma_unit: str = "edm",
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        self.interval = Interval(sigma_lo, sigma_hi, guided_steps, sigma_unit)
        super().__init__(
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            use_original_formulation=use_original_formulation,
            start=start,
            stop=stop,
            enabled=enabled,
        )


def limit_to_interval(
    guider: BaseGuidance,
    *,
    sigma_lo: float | None = None,
    sigma_hi: float | None = None,
    guided_steps: tuple[int, int] | None = None,
    sigma_unit: str = "edm",
) -> BaseGuidance:
    """A copy of any guider of diffusers that does nothing outside of an interval of noise levels.

    sigma_lo, sigma_hi, guided_steps, sigma_unit: see `Interval`. Raises ValueError for what is no guider.
    """
    if not isinstance(guider, BaseGuidance):
        raise ValueError(f"guider must be a diffusers guider, got {type(guider).__name__}")
    limited = copy.copy(guider)
    limited.__class__ = _limited_class(type(guider))
    limited.interval = Interval(sigma_lo, sigma_hi, guided_steps, sigma_unit)
    return limited


@functools.cache
def _limited_class(stock: type[BaseGuidance]) -> type[BaseGuidance]:
    if issubclass(stock, _Limited):
        return stock
    return type(stock.__name__, (_Limited, stock), {"__module__": stock.__module__, "__doc__": stock.__doc__})
