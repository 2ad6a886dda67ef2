"""Guidance in an interval of noise levels for Modular Diffusers (arXiv 2404.07724).

diffusers' guiders can be limited to fractions of the steps; these are limited to noise levels, as the paper does, or
to steps, and can be used for a second call whatever they did in the last step of the first.
"""

import copy
import functools
import math
import sys
import warnings
from collections.abc import Callable
from types import FrameType

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_ext.pipelines.call_arguments import checked_arguments
from diffusers_ext.pipelines.interval import Interval, StepStart, Walk

# What pipelines ask of a guider between `set_state` and the end of the step's evaluation.
_WITHIN_A_STEP = (
    "prepare_inputs",
    "prepare_inputs_from_block_state",
    "prepare_models",
    "cleanup_models",
    "active_predictions",
    "__call__",
)


def _within_a_step(method: Callable) -> Callable:
    """Run a guider's method as that of a disabled guider, where the step is not guided.

    For the time of the method alone: what is asked between steps and before a run, such as whether negative prompts
    are needed, has the answer that the user's settings give, even if a run was broken off in an unguided step.
    """

    @functools.wraps(method)
    def limited(self, *args, **kwargs):
        enabled, count = self._enabled, self._num_inference_steps
        self._enabled, self._num_inference_steps = enabled and self._guided, self._count_of_steps
        try:
            return method(self, *args, **kwargs)
        finally:
            self._enabled, self._num_inference_steps = enabled, count

    return limited


class _Limited:
    """What makes a guider a limited one: where a step is not guided, it acts as if it were disabled."""

    interval: Interval
    scheduler: SchedulerMixin | None = None
    _walk: Walk | None = None
    _start_of_step: StepStart | None = None
    _evaluation = -1
    _steps_begun = 0
    _guided = True
    _decisions: tuple[bool, ...] = ()
    _count_of_steps: int | None = None

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        for name in _WITHIN_A_STEP:
            if hasattr(cls, name):
                setattr(cls, name, _within_a_step(getattr(cls, name)))

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        """Called at each evaluation; decides at the first one of a step, for all of them.

        Passed on is the number of the step, since `start` and `stop` are fractions of num_inference_steps, of which
        there are fewer than evaluations with Heun. Of two guiders that share a run (Wan 2.2) the second is not asked
        before its turn.

        Args:
            step: of the evaluation, from 0 in each run.
            num_inference_steps: of the run.
            timestep: of the evaluation, a scalar of the scheduler's `timesteps`.
        """
        scheduler = self.scheduler or _scheduler_of(sys._getframe(1))
        if step <= self._evaluation:
            self._evaluation, self._steps_begun, self._decisions = -1, 0, ()
        if step != self._evaluation + 1 or step == 0 or self._walk.scheduler is not scheduler:
            self._walk, self._start_of_step = Walk(scheduler), None  # which reads the schedule once a call
        start = self._walk.at(timestep)
        self._steps_begun += step - self._evaluation - 1
        self._evaluation = step
        if start is not self._start_of_step:
            self._steps_begun += 1
            self._start_of_step, self._guided = start, start in self.interval
            self._decisions += (self._guided,)
            if start.index == start.count - 1:
                self._warn_without_effect()
        super().set_state(self._steps_begun - 1, num_inference_steps, timestep)
        # A fraction of the steps is a matter of the step as well: left in place, it would rule the next run.
        self._num_inference_steps, self._count_of_steps = None, num_inference_steps

    def _warn_without_effect(self) -> None:
        if len(set(self._decisions)) == 1:
            which = "every one" if self._guided else "none"
            count = len(self._decisions)
            warnings.warn(f"the guidance interval {self.interval} holds {which} of the {count} steps", stacklevel=3)

    def new(self, **kwargs):
        """A copy with the same interval, and changed parameters.

        Args:
            **kwargs: the parameters to change.
        """
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

    Elsewhere the network is run on the condition alone. The scheduler is that of the pipeline that runs; set
    `scheduler` to name another.

    Args:
        guidance_scale: w; see `ClassifierFreeGuidance`.
        sigma_lo: guide in steps that start above this noise level; see `diffusers_ext.pipelines.interval.Interval`.
        sigma_hi: and at most at this one; see `Interval`.
        guided_steps: instead of sigmas, (first, last) inclusive; see `Interval`.
        sigma_unit: of the sigmas, "edm" or "flow"; see `Interval`.
        guidance_interval: (sigma_lo, sigma_hi), both at once; see `Interval`.
        guidance_rescale: see `ClassifierFreeGuidance`.
        use_original_formulation: see `ClassifierFreeGuidance`.
        start: see `ClassifierFreeGuidance`.
        stop: see `ClassifierFreeGuidance`.
        enabled: see `ClassifierFreeGuidance`.

    Raises:
        ValueError: for arguments out of range.
    """

    @register_to_config
    @checked_arguments
    def __init__(
        self,
        guidance_scale: float = 7.5,
        sigma_lo: float | None = None,
        sigma_hi: float | None = None,
        guided_steps: tuple[int, int] | None = None,
        sigma_unit: str = "edm",
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        for name, value in (("guidance_scale", guidance_scale), ("guidance_rescale", guidance_rescale)):
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value!r}")
        self.interval = Interval(sigma_lo, sigma_hi, guided_steps, sigma_unit, guidance_interval)
        super().__init__(
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            use_original_formulation=use_original_formulation,
            start=start,
            stop=stop,
            enabled=enabled,
        )


@checked_arguments
def limit_to_interval(
    guider: BaseGuidance,
    *,
    guidance_interval: tuple[float, float] | None = None,
    sigma_lo: float | None = None,
    sigma_hi: float | None = None,
    guided_steps: tuple[int, int] | None = None,
    sigma_unit: str = "edm",
) -> BaseGuidance:
    """A copy of any guider of diffusers that does nothing outside of an interval of noise levels.

        pipe.update_components(guider=limit_to_interval(pipe.guider, guidance_interval=(0.28, 5.42)))

    What is saved is the guider without the interval; `IntervalGuidance` saves its interval too.

    Args:
        guider: any guider of diffusers; it is not changed.
        guidance_interval: (sigma_lo, sigma_hi), both at once; see `Interval`.
        sigma_lo: guide in steps that start above this noise level; see `Interval`.
        sigma_hi: and at most at this one; see `Interval`.
        guided_steps: instead of sigmas, (first, last) inclusive; see `Interval`.
        sigma_unit: of the sigmas, "edm" or "flow"; see `Interval`.

    Raises:
        ValueError: for what is no guider.
    """
    limited = copy.copy(guider)
    limited.__class__ = _limited_class(type(guider))
    limited.interval = Interval(sigma_lo, sigma_hi, guided_steps, sigma_unit, guidance_interval)
    return limited


@functools.cache
def _limited_class(stock: type[BaseGuidance]) -> type[BaseGuidance]:
    if issubclass(stock, _Limited):
        return stock
    return type(stock.__name__, (_Limited, stock), {"__module__": stock.__module__, "__doc__": stock.__doc__})
