"""Guidance in a limited interval of noise levels, or by one of diffusers' guiders, for pipelines that guide.

Kynkäänniemi, Aittala, Karras, Laine, Aila, Lehtinen: Applying Guidance in a Limited Interval Improves Sample and
Distribution Quality in Diffusion Models, NeurIPS 2024, arXiv 2404.07724.

A call of a limited pipeline is a run. While it lasts, interceptors stand in the pipeline's networks and schedulers;
they find the run through a context variable, so that another pipeline with the same networks passes them unseen.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance

from .applied_guiders import check_guider
from .call_arguments import checked_arguments
from .guidance_layouts import parse_layout
from .guided_run import GuidanceReport, GuidedStep, Plan, Run, make_plans  # noqa: F401  GuidedStep for who imports it here
from .guided_stage import Stage  # noqa: F401  what a sibling imports, the file that is loaded imports as well
from .interceptors import outside_callback
from .interval import Interval, read_step  # noqa: F401
from .layout_proof import NotShown
from .layout_source import propose  # noqa: F401
from .rows import Rows  # noqa: F401


class Guidance:
    """What decides the guidance of a pipeline: an interval, a guider, or a guider in an interval.

    As a context manager it is in force for the block, and what was in force before is so again after it.

    Args:
        pipe: any diffusers pipeline that is not modular.
        interval: None for the whole line.
        guider: None for the pipeline's own guidance.
        layout: see `GuidanceInterval`.
        verify: see `GuidanceInterval`.

    Raises:
        ValueError: for what is no pipeline, and for a layout or a guider that cannot be.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        interval: Interval | None,
        guider: BaseGuidance | None = None,
        layout: str | None = None,
        verify: bool = False,
    ):
        if not isinstance(pipe, DiffusionPipeline):
            raise ValueError(
                f"pipe must be a diffusers DiffusionPipeline, got {type(pipe).__name__}; for a modular pipeline use"
                " the guiders in diffusers_ext.guidance"
            )
        self.pipe, self.interval, self.guider, self.verify = pipe, interval, guider, verify
        self.layout = None if layout is None else parse_layout(layout)
        self.report: GuidanceReport | None = None
        self.outer: Guidance | None = None
        self.plans: list[Plan] | None = make_plans(pipe, self.layout)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "plans": None}  # made again when they are needed

    def plans_of(self, pipe: DiffusionPipeline) -> list["Plan"]:
        """How the pipeline guides, read again if its networks or its code have changed.

        Args:
            pipe: the pipeline, or a shallow copy of it.
        """
        if pipe is not self.pipe:  # a shallow copy
            return make_plans(pipe, self.layout)
        if self.plans is None or not all(plan.is_current() for plan in self.plans):
            self.plans = make_plans(pipe, self.layout)
        return self.plans

    def __repr__(self) -> str:
        parts = [type(self.pipe).__name__, self.guider and type(self.guider).__name__, self.interval]
        return f"{type(self).__name__}({', '.join(str(part) for part in parts if part is not None)})"

    def __enter__(self) -> "Guidance":
        self.outer = self.pipe.__dict__.get("_guidance_interval")
        self.attach()
        return self

    def __exit__(self, *error) -> None:
        in_force = self.pipe.__dict__.get("_guidance_interval") is self
        outer, self.outer = self.outer, None
        self.detach()
        if in_force and outer is not None:
            outer.attach()

    def attach(self) -> None:
        """Put it in force for the pipeline's calls, in place of what is."""
        remove_guidance_interval(self.pipe)
        self.pipe.__class__ = _limited_class(type(self.pipe))
        self.pipe.__dict__["_guidance_interval"] = self

    def detach(self) -> None:
        """Make the pipeline what it was, if this is in force."""
        if self.pipe.__dict__.get("_guidance_interval") is self:
            remove_guidance_interval(self.pipe)

    def run(self, call: Callable, pipe: DiffusionPipeline, *args, **kwargs) -> Any:
        """Make one call of the pipeline, `call(pipe, ...)`, with this in force for the call alone.

        For pipelines that take the interval as an argument; after it, `report` tells what was done.

        Args:
            call: the `__call__` to make, as a function of the pipeline and its arguments.
            pipe: the pipeline.
            *args: its arguments.
            **kwargs: its arguments.
        """
        names = [*inspect.signature(call).parameters][1 : 1 + len(args)]
        args = tuple(outside_callback(value, name) for value, name in zip_longest(args, names, fillvalue=""))
        kwargs = {key: outside_callback(value, key) for key, value in kwargs.items()}
        begin_again = _random_states(pipe, args, kwargs)
        try:
            run = Run(self, call, pipe, args, kwargs)
            with run:
                result = call(pipe, *args, **kwargs)
        except NotShown:  # before the first step of the scheduler
            begin_again()
            run = Run(self, call, pipe, args, kwargs, as_given=True)
            with run:
                result = call(pipe, *args, **kwargs)
        run.finish()
        return result


def _random_states(pipe: DiffusionPipeline, args: tuple, kwargs: dict) -> Callable[[], None]:
    """What puts the generators of a call, and those it draws from without one, back to where they are."""
    values = [*args, *kwargs.values()]
    values += [one for value in values if isinstance(value, list) for one in value]
    states = [(one.set_state, one.get_state()) for one in values if isinstance(one, torch.Generator)]
    states += default_states(getattr(pipe, "_execution_device", None) or torch.device("cpu"))

    def again():
        for put_back, state in states:
            put_back(state)

    return again


def default_states(device: torch.device) -> list[tuple[Callable, torch.Tensor]]:
    """The state of each generator that is drawn from where none is given, with what puts it back.

    Args:
        device: whose generator counts besides the CPU's.
    """
    states = [(torch.set_rng_state, torch.get_rng_state())]
    module = None if device.type == "cpu" else torch.get_device_module(device)
    if hasattr(module, "get_rng_state"):
        which = {"device": device} if "device" in inspect.signature(module.get_rng_state).parameters else {}  # not MPS
        states.append((functools.partial(module.set_rng_state, **which), module.get_rng_state(**which)))
    return states


class GuidanceInterval(Guidance):
    """Limits the guidance of a pipeline to an interval of noise levels, and saves the rows that it then needs not run.

        with GuidanceInterval(pipe, sigma_lo=0.28, sigma_hi=5.42) as interval:
            images = pipe("an astronaut", guidance_scale=16).images
        print(interval.report)

    Outside of the interval every prediction is the conditional one, as with guidance weight 1, and the network is not
    run on the unconditional rows. The decision is made once a step, from the noise level at which the step starts,
    for all evaluations in it. How diffusers' pipelines call their networks is in a table (`guidance_layouts`); for
    other classes it is read from the source, or given, and proved by numbers in each call. A batch in three parts
    (InstructPix2Pix) has two kinds of guidance, which are both on or both off.

    The pipeline becomes an instance of a subclass of the same name, whose `__call__` puts interceptors into the
    networks and takes them out again. Devices, offload hooks, compiled networks and pipelines that share a network
    are not touched. Like a pipeline itself, this is not made for calls from several threads.

    Args:
        pipe: any diffusers pipeline that is not modular.
        guidance_interval: (sigma_lo, sigma_hi), both at once; see `Interval`.
        sigma_lo: guide in steps that start above this noise level; see `Interval`.
        sigma_hi: and at most at this one; see `Interval`.
        guided_steps: instead of sigmas, (first, last) inclusive; see `Interval`.
        sigma_unit: of the sigmas, "edm" or "flow"; see `Interval`.
        layout: how the pipeline guides, if it is not in the table or guides in another way: "uncond, cond" for one
            batch with these halves, "uncond | cond" for rows that take turns, "cond; uncond" for two calls.
        verify: prove the layout of a pipeline in the table as well, which costs one run of all rows and a transfer of
            the first guided step's predictions.

    Raises:
        ValueError: for arguments out of range and for pipelines whose layout is not known; in a call, where it does
            not guide as its layout says. A call warns where the interval has no effect.
    """

    @checked_arguments
    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        guidance_interval: tuple[float, float] | None = None,
        sigma_lo: float | None = None,
        sigma_hi: float | None = None,
        guided_steps: tuple[int, int] | None = None,
        sigma_unit: str = "edm",
        layout: str | None = None,
        verify: bool = False,
    ):
        super().__init__(
            pipe, Interval(sigma_lo, sigma_hi, guided_steps, sigma_unit, guidance_interval), None, layout, verify
        )

    def attach(self) -> None:
        """Put the interval in force for the pipeline's calls, in place of the one that is."""
        if all(plan.source == "none" for plan in self.plans):
            name = type(self.pipe).__name__
            warnings.warn(f"{name} takes no guidance scale: the interval has no effect", stacklevel=3)
        super().attach()


@checked_arguments
def apply_guidance_interval(
    pipe: DiffusionPipeline,
    *,
    guidance_interval: tuple[float, float] | None = None,
    sigma_lo: float | None = None,
    sigma_hi: float | None = None,
    guided_steps: tuple[int, int] | None = None,
    sigma_unit: str = "edm",
    layout: str | None = None,
    verify: bool = False,
) -> GuidanceInterval:
    """Limit the guidance of a pipeline from now on; a second time replaces the first.

    Args:
        pipe: any diffusers pipeline that is not modular.
        guidance_interval: (sigma_lo, sigma_hi), both at once; see `Interval`.
        sigma_lo: guide in steps that start above this noise level; see `Interval`.
        sigma_hi: and at most at this one; see `Interval`.
        guided_steps: instead of sigmas, (first, last) inclusive; see `Interval`.
        sigma_unit: of the sigmas, "edm" or "flow"; see `Interval`.
        layout: how the pipeline guides; see `GuidanceInterval`.
        verify: prove the layout of a pipeline in the table as well; see `GuidanceInterval`.

    Raises:
        ValueError: as `GuidanceInterval`.
    """
    interval = GuidanceInterval(
        pipe,
        guidance_interval=guidance_interval,
        sigma_lo=sigma_lo,
        sigma_hi=sigma_hi,
        guided_steps=guided_steps,
        sigma_unit=sigma_unit,
        layout=layout,
        verify=verify,
    )
    interval.attach()
    return interval


@checked_arguments
def remove_guidance_interval(pipe: DiffusionPipeline) -> None:
    """Guide as the pipeline itself does again, bit for bit; nothing happens to a pipeline without an interval.

    Args:
        pipe: what `apply_guidance_interval` was called with.
    """
    if pipe.__dict__.pop("_guidance_interval", None) is not None:
        pipe.__class__ = type(pipe).__mro__[1]


@checked_arguments(but="guider")
def apply_guider(
    pipe: DiffusionPipeline,
    guider: BaseGuidance,
    *,
    guidance_interval: tuple[float, float] | None = None,
    sigma_lo: float | None = None,
    sigma_hi: float | None = None,
    guided_steps: tuple[int, int] | None = None,
    sigma_unit: str = "edm",
    layout: str | None = None,
) -> Guidance:
    """Combine the two predictions of a pipeline with one of diffusers' guiders from now on, in an interval if given.

        apply_guider(pipe, AdaptiveProjectedGuidance(guidance_scale=10.0), guidance_interval=(0.28, 5.42))
        pipe("an astronaut", guidance_scale=5.0)  # any weight that makes two predictions

    Outside of the interval the prediction is the conditional one.

    Args:
        pipe: a pipeline of two predictions.
        guider: one that combines a conditional and an unconditional prediction: `ClassifierFreeGuidance`,
            `AdaptiveProjectedGuidance`, `ClassifierFreeZeroStarGuidance`, ... Its own weight counts, in its own
            convention, not the call's; so do its `start` and `stop`, as fractions of the call's steps. Each call
            begins with the state of the guider as given, which is not changed.
        guidance_interval: (sigma_lo, sigma_hi), both at once; see `Interval`. Without an interval, guided in every
            step.
        sigma_lo: guide in steps that start above this noise level; see `Interval`.
        sigma_hi: and at most at this one; see `Interval`.
        guided_steps: instead of sigmas, (first, last) inclusive; see `Interval`.
        sigma_unit: of the sigmas, "edm" or "flow"; see `Interval`.
        layout: how the pipeline guides; see `GuidanceInterval`.

    Raises:
        ValueError: for other guiders and pipelines; in a call, where it makes no unconditional prediction.
    """
    check_guider(guider)
    given = any(value is not None for value in (guidance_interval, sigma_lo, sigma_hi, guided_steps))
    interval = Interval(sigma_lo, sigma_hi, guided_steps, sigma_unit, guidance_interval) if given else None
    guidance = Guidance(pipe, interval, guider, layout)
    for plan in guidance.plans:
        if type(plan.pipe).__name__ == "HeliosPyramidPipeline":
            raise ValueError("HeliosPyramidPipeline may scale its unconditional prediction; use Modular Diffusers")
        if plan.source == "none" or (len(plan.layout.parts) > 2 and plan.layout.optional is None):
            how = "no guidance" if plan.source == "none" else f"the parts {plan.layout}"
            raise ValueError(f"{type(plan.pipe).__name__} has {how}; a guider combines two predictions")
    guidance.attach()
    return guidance


@checked_arguments
def remove_guider(pipe: DiffusionPipeline) -> None:
    """Guide as the pipeline itself does again, bit for bit; nothing happens to a pipeline without a guider.

    Args:
        pipe: what `apply_guider` was called with.
    """
    remove_guidance_interval(pipe)


@checked_arguments
def guidance_report(pipe: DiffusionPipeline) -> GuidanceReport:
    """What the interval did in the pipeline's last call.

    Args:
        pipe: what `apply_guidance_interval` was called with.

    Raises:
        ValueError: if there was no such call.
    """
    guidance = pipe.__dict__.get("_guidance_interval")
    if guidance is None or guidance.report is None:
        raise ValueError(
            f"{type(pipe).__name__} has not been called with a guidance interval; use apply_guidance_interval, then"
            " call the pipeline"
        )
    return guidance.report


@functools.cache
def _limited_class(stock: type) -> type:
    """A subclass of the same name whose calls are runs. Calling the class itself makes a stock pipeline."""

    @functools.wraps(stock.__call__)
    def limited_call(self, *args, **kwargs):
        return self.__dict__["_guidance_interval"].run(stock.__call__, self, *args, **kwargs)

    def new(cls, *args, **kwargs):
        return stock(*args, **kwargs)

    def reduce(self, protocol):
        return _limited_again, (stock,), self.__dict__

    names = {"__call__": limited_call, "__new__": new, "__reduce_ex__": reduce, "__doc__": stock.__doc__}
    return type(
        stock.__name__, (stock,), {**names, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    )


def _limited_again(stock: type) -> DiffusionPipeline:
    """A pipeline that was pickled or copied with its interval."""
    pipe = stock.__new__(stock)
    pipe.__class__ = _limited_class(stock)
    return pipe
