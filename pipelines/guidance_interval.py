"""Guidance in a limited interval of noise levels, or by one of diffusers' guiders, for pipelines that guide.

Kynkäänniemi, Aittala, Karras, Laine, Aila, Lehtinen: Applying Guidance in a Limited Interval Improves Sample and
Distribution Quality in Diffusion Models, NeurIPS 2024, arXiv 2404.07724.

A call of a limited pipeline is a run. While it lasts, interceptors stand in the pipeline's networks and schedulers;
they find the run through a context variable, so that another pipeline with the same networks passes them unseen.
"""

import functools
import inspect
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import BaseGuidance

from .applied_guiders import GuiderOfCall, check_guider, second_answer, weight_of_call
from .guidance_layouts import (
    COMBINED,
    DISTILLED,
    LAYOUTS,
    REFUSED,
    REFUSED_CALLS,
    UNGUIDED_NETWORKS,
    Layout,
    hands_on_only,
    parse_layout,
    propose,
    table_class,
)
from .interval import Interval, StepStart, Walk, interval_bounds, read_step  # noqa: F401  for who imports them here
from .layout_proof import Fit, differs, fit
from .rows import (
    Rows,
    caches_of_rows,
    count_rows,
    join_rows,
    map_tensors,
    split_rows,
    spread_rows,
    take_rows,
    tensors_in,
    unclear_arguments,
)

GUIDANCE_ARGUMENT = re.compile(r"(guidance|cfg)_scale$")


@dataclass
class GuidedStep:
    """One sampling step: its number in the schedule as set, its starting noise level, and what the network did.

    sigma: the EDM noise-to-signal ratio, None where the scheduler has none. guided: whether guidance was applied.
    rows: network rows that were run, all evaluations in the step together, ControlNets not counted.
    rows_saved: further rows that plain guidance would have run.
    """

    index: int
    sigma: float | None
    guided: bool = False
    rows: int = 0
    rows_saved: int = 0


@dataclass
class GuidanceReport:
    """What the interval did in one call of the pipeline, step by step."""

    steps: list[GuidedStep] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Network rows that were run."""
        return sum(step.rows for step in self.steps)

    @property
    def rows_saved(self) -> int:
        """Network rows that plain guidance would have run besides."""
        return sum(step.rows_saved for step in self.steps)

    @property
    def guided_steps(self) -> list[int]:
        """Numbers of the guided steps, in the order in which they were run."""
        return [step.index for step in self.steps if step.guided]

    def __str__(self) -> str:
        lines = [" step       sigma  guided  rows  saved"]
        for step in self.steps:
            sigma = "-" if step.sigma is None else f"{step.sigma:.5g}"
            guided = "yes" if step.guided else "no"
            lines.append(f"{step.index:5d}  {sigma:>10}  {guided:>6}  {step.rows:4d}  {step.rows_saved:5d}")
        lines.append(f"{len(self.guided_steps)} of {len(self.steps)} steps guided; {self.rows} network rows run,")
        lines[-1] += f" {self.rows_saved} saved"
        return "\n".join(lines)


class Guidance:
    """What decides the guidance of a pipeline: an interval, a guider, or a guider in an interval.

    interval: None for the whole line. guider: None for the pipeline's own guidance. layout, verify: see
    `GuidanceInterval`. As a context manager it is in force for the block, and what was in force before is so again
    after it.

    Raises ValueError for what is no pipeline, and for a layout or a guider that cannot be.
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
        self.plans: list[_Plan] | None = _plans(pipe, self.layout)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "plans": None}  # made again when they are needed

    def plans_of(self, pipe: DiffusionPipeline) -> list["_Plan"]:
        """How the pipeline guides, read again if its networks or its code have changed."""
        if pipe is not self.pipe:  # a shallow copy
            return _plans(pipe, self.layout)
        if self.plans is None or not all(plan.is_current() for plan in self.plans):
            self.plans = _plans(pipe, self.layout)
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
            del self.pipe.__dict__["_guidance_interval"]
            self.pipe.__class__ = type(self.pipe).__mro__[1]

    def run(self, call: Callable, pipe: DiffusionPipeline, *args, **kwargs) -> Any:
        """Make one call of the pipeline, `call(pipe, ...)`, with this in force for the call alone.

        For pipelines that take the interval as an argument; after it, `report` tells what was done.
        """
        args = tuple(map(_outside_callback, args))
        kwargs = {key: _outside_callback(value, key) for key, value in kwargs.items()}
        begin_again = _random_states(args, kwargs)
        try:
            run = _Run(self, call, pipe, args, kwargs)
            with run:
                result = call(pipe, *args, **kwargs)
        except _NotShown:  # before the first step of the scheduler
            begin_again()
            run = _Run(self, call, pipe, args, kwargs, as_given=True)
            with run:
                result = call(pipe, *args, **kwargs)
        run.finish()
        return result


class _NotShown(Exception):
    """What the scheduler would be given in the first step does not show whether a layout that was given is right."""


def _random_states(args: tuple, kwargs: dict) -> Callable[[], None]:
    """What puts the generators of a call back to where they are."""
    values = [*args, *kwargs.values()]
    values += [one for value in values if isinstance(value, list) for one in value]
    states = [(one, one.get_state()) for one in values if isinstance(one, torch.Generator)]
    usual = torch.get_rng_state()

    def again():
        torch.set_rng_state(usual)
        for generator, state in states:
            generator.set_state(state)

    return again


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

    pipe: any diffusers pipeline that is not modular. layout: how it guides, if it is not in the table or guides in
    another way: "uncond, cond" for one batch with these halves, "uncond | cond" for rows that take turns, "cond;
    uncond" for two calls. verify: prove the layout of a pipeline in the table as well, which costs one run of all rows
    and a transfer of the first guided step's predictions. The other arguments: see `Interval`.

    Raises ValueError for arguments out of range and for pipelines whose layout is not known; a call raises ValueError
    where it does not guide as its layout says, and warns where the interval has no effect.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        sigma_lo: float | None = None,
        sigma_hi: float | None = None,
        guided_steps: tuple[int, int] | None = None,
        sigma_unit: str = "edm",
        layout: str | None = None,
        verify: bool = False,
    ):
        super().__init__(pipe, Interval(sigma_lo, sigma_hi, guided_steps, sigma_unit), None, layout, verify)

    def attach(self) -> None:
        """Put the interval in force for the pipeline's calls, in place of the one that is."""
        if all(plan.source == "none" for plan in self.plans):
            name = type(self.pipe).__name__
            warnings.warn(f"{name} takes no guidance scale: the interval has no effect", stacklevel=3)
        super().attach()


def apply_guidance_interval(
    pipe: DiffusionPipeline,
    *,
    sigma_lo: float | None = None,
    sigma_hi: float | None = None,
    guided_steps: tuple[int, int] | None = None,
    sigma_unit: str = "edm",
    layout: str | None = None,
    verify: bool = False,
) -> GuidanceInterval:
    """Limit the guidance of a pipeline from now on; a second time replaces the first.

    sigma_lo, sigma_hi, guided_steps, sigma_unit: see `Interval`. layout, verify: see `GuidanceInterval`, which says
    what is raised as well.
    """
    interval = GuidanceInterval(
        pipe,
        sigma_lo=sigma_lo,
        sigma_hi=sigma_hi,
        guided_steps=guided_steps,
        sigma_unit=sigma_unit,
        layout=layout,
        verify=verify,
    )
    interval.attach()
    return interval


def remove_guidance_interval(pipe: DiffusionPipeline) -> None:
    """Guide as the pipeline itself does again, bit for bit; nothing happens to a pipeline without an interval."""
    if (guidance := pipe.__dict__.get("_guidance_interval")) is not None:
        guidance.detach()


def apply_guider(
    pipe: DiffusionPipeline,
    guider: BaseGuidance,
    *,
    sigma_lo: float | None = None,
    sigma_hi: float | None = None,
    guided_steps: tuple[int, int] | None = None,
    sigma_unit: str = "edm",
    layout: str | None = None,
) -> Guidance:
    """Combine the two predictions of a pipeline with one of diffusers' guiders from now on, perhaps in an interval.

        apply_guider(pipe, AdaptiveProjectedGuidance(guidance_scale=10.0), sigma_lo=0.28, sigma_hi=5.42)
        pipe("an astronaut", guidance_scale=5.0)  # any weight that makes two predictions

    guider: one that combines a conditional and an unconditional prediction: `ClassifierFreeGuidance`,
    `AdaptiveProjectedGuidance`, `ClassifierFreeZeroStarGuidance`, ... Its own weight counts, in its own convention,
    not the call's; so do its `start` and `stop`, as fractions of the call's steps. Each call begins with the state of
    the guider as given, which is not changed. Outside of the interval the prediction is the conditional one.
    pipe: a pipeline of two predictions. The interval: as of `GuidanceInterval`; without one, guided in every step.

    Raises ValueError for other guiders and pipelines; a call raises it where it makes no unconditional prediction.
    """
    check_guider(guider)
    given = any(value is not None for value in (sigma_lo, sigma_hi, guided_steps))
    guidance = Guidance(
        pipe, Interval(sigma_lo, sigma_hi, guided_steps, sigma_unit) if given else None, guider, layout
    )
    for plan in guidance.plans:
        if type(plan.pipe).__name__ == "HeliosPyramidPipeline":
            raise ValueError("HeliosPyramidPipeline may scale its unconditional prediction; use Modular Diffusers")
        if plan.source == "none" or (len(plan.layout.parts) > 2 and plan.layout.optional is None):
            how = "no guidance" if plan.source == "none" else f"the parts {plan.layout}"
            raise ValueError(f"{type(plan.pipe).__name__} has {how}; a guider combines two predictions")
    guidance.attach()
    return guidance


def remove_guider(pipe: DiffusionPipeline) -> None:
    """Guide as the pipeline itself does again, bit for bit; nothing happens to a pipeline without a guider."""
    remove_guidance_interval(pipe)


def guidance_report(pipe: DiffusionPipeline) -> GuidanceReport:
    """What the interval did in the pipeline's last call. Raises ValueError if there was no such call."""
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


@dataclass
class _Plan:
    """A pipeline of a call, itself or inside of it: how it guides, and how that is known.

    source: "listed", "proposed", "given", or "none" without guidance. networks: its denoisers by name.
    prefix: of its arguments' names in the call, "prior_" for the first of a combined pipeline. readable: of a layout
        that was given, whether the source shows that predictions go to the scheduler and nowhere else.
    """

    pipe: DiffusionPipeline
    layout: Layout | None
    source: str
    networks: dict[str, torch.nn.Module]
    prefix: str = ""
    readable: bool = False

    def __post_init__(self):
        self.networks = {name: module for name, module in self.networks.items() if name not in UNGUIDED_NETWORKS}
        self.code = _stock(self.pipe).__call__

    def is_current(self) -> bool:
        """Whether the pipeline has still the networks and the code that it was made for."""
        same = all(getattr(self.pipe, name, None) is module for name, module in self.networks.items())
        return same and self.code is _stock(self.pipe).__call__

    def targets(self) -> list[tuple[Any, Callable]]:
        """What interceptors are put into, and how."""
        networks = {id(module): (module, _into_network) for module in self.networks.values()}
        return [*networks.values(), *((one, _into_scheduler) for one in _schedulers(self.pipe))]


def _plans(pipe: DiffusionPipeline, given: Layout | None) -> list[_Plan]:
    """Raises ValueError for a pipeline without a denoiser, and for one whose layout is not known."""
    known = table_class(_stock(pipe))
    if known is not None and known.__name__ in REFUSED:
        raise ValueError(f"{type(pipe).__name__} {REFUSED[known.__name__]}; {_NOT_LIMITED}")
    if known is not None and known.__name__ in COMBINED:
        parts = {name: part for name, part in vars(pipe).items() if isinstance(part, DiffusionPipeline)}
        plans = [plan for part in parts.values() for plan in _plans(part, given)]
        for plan in plans:
            plan.prefix = "prior_" if plan.pipe is parts.get("prior_pipe") else ""
        return plans
    networks = _denoisers(pipe)
    if not networks:
        raise ValueError(
            f"{type(pipe).__name__} has no component that is called with a timestep; components are"
            f" {sorted(pipe.components)}"
        )
    call = inspect.unwrap(_stock(pipe).__call__)
    if inspect.iscoroutinefunction(call) or inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
        raise ValueError(f"{type(pipe).__name__}.__call__ returns before it has sampled; {_NOT_LIMITED}")
    if given is not None:
        return [_Plan(pipe, given, "given", networks, readable=hands_on_only(_stock(pipe), list(networks)))]
    if known is not None:
        return [_Plan(pipe, LAYOUTS[known.__name__], "listed", networks)]
    own = (call.__module__ or "").startswith("diffusers.") and _stock(pipe).__module__.startswith("diffusers.")
    if own and not _takes_a_scale(call):
        return [_Plan(pipe, None, "none", networks)]
    layout = propose(_stock(pipe), list(networks))
    return [_Plan(pipe, layout, "none" if layout is None else "proposed", networks)]


def _stock(pipe: DiffusionPipeline) -> type:
    return type(pipe).__mro__["_guidance_interval" in pipe.__dict__]


def _takes_a_scale(call: Callable) -> bool:
    return any(map(GUIDANCE_ARGUMENT.search, inspect.signature(call).parameters))


def _denoisers(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The components that are called with a timestep; where there is none (Amused), the transformer or the UNet."""
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    timed = {name: module for name, module in modules.items() if any(map(_is_timestep, _parameters(module)))}
    return timed or {name: module for name, module in modules.items() if name in ("transformer", "unet")}


def _is_timestep(name: str) -> bool:
    return name in ("t", "r") or ("timestep" in name and name != "timestep_cond")


def _parameters(module: torch.nn.Module) -> list[str]:
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    return list(inspect.signature(type(module).forward).parameters)[1:]


# From here on: interceptors, which stay in shared networks and schedulers as long as one run needs them.

_RUN: ContextVar["_Run | None"] = ContextVar("guidance_run", default=None)
_LOCK = threading.Lock()
_INTERCEPTED: dict[int, list] = {}  # by id: the object, the number of runs, and how to take the interceptor away


def _intercept(target: Any, put: Callable[[Any], Callable[[], None]]) -> None:
    with _LOCK:
        if id(target) not in _INTERCEPTED:
            _INTERCEPTED[id(target)] = [target, 0, put(target)]
        _INTERCEPTED[id(target)][1] += 1


def _release(target: Any) -> None:
    with _LOCK:
        entry = _INTERCEPTED[id(target)]
        entry[1] -= 1
        if not entry[1]:
            del _INTERCEPTED[id(target)]
            entry[2]()


def _into_network(module: torch.nn.Module) -> Callable[[], None]:
    before = {name: module.__dict__[name] for name in _PLACES if name in module.__dict__}
    # nn.Module.__call__ runs this in place of itself. Set past __setattr__, which torch.compile's wrapper passes on to
    # the module inside.
    call, named = module._compiled_call_impl or module._call_impl, getattr(module, "cache_context", None)

    def intercepted(*args, **kwargs):
        run = _RUN.get()
        stage = None if run is None else run.stages.get(id(module))
        return call(*args, **kwargs) if stage is None else stage.call(module, call, args, kwargs)

    @contextmanager
    def cache_context(name, **kwargs):
        run = _RUN.get()
        with named(name, **kwargs):
            outer = None if run is None else run.contexts.get(id(module))
            if run is not None:
                run.contexts[id(module)] = name
            try:
                yield
            finally:
                if run is not None:
                    run.contexts[id(module)] = outer

    module.__dict__["_compiled_call_impl"] = intercepted
    if named is not None:
        module.__dict__["cache_context"] = cache_context

    def restore():
        for name in _PLACES:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)

    return restore


_PLACES = ("_compiled_call_impl", "cache_context")


def _into_scheduler(scheduler: Any) -> Callable[[], None]:
    # Instance attributes, since pipelines compare the class.
    before = {name: scheduler.__dict__[name] for name in ("step", "set_timesteps") if name in scheduler.__dict__}
    for name in ("step", "set_timesteps"):
        scheduler.__dict__[name] = _Seen(scheduler, name, getattr(scheduler, name))

    def restore():
        for name in ("step", "set_timesteps"):
            scheduler.__dict__.pop(name, None)
        scheduler.__dict__.update(before)

    return restore


class _Seen:
    """A method of a scheduler whose calls the run gets to see; a copy of the scheduler has one of its own."""

    def __init__(self, scheduler: Any, name: str, method: Callable):
        self.scheduler, self.name, self.method = scheduler, name, method
        functools.update_wrapper(self, method)

    def __call__(self, *args, **kwargs):
        if (run := _RUN.get()) is None:
            return self.method(*args, **kwargs)
        if self.name == "step":
            return run.stepped(self.scheduler, self.method, args, kwargs)
        run.prepared.add(id(self.scheduler))
        return self.method(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> "_Seen":
        copied = memo.get(id(self.scheduler))
        return self if copied is None else _Seen(copied, self.name, getattr(type(copied), self.name).__get__(copied))


def _outside_callback(value: Any, name: str = "") -> Any:
    """A callback that is run outside of the run, so that a pipeline called in it is none of ours."""
    if isinstance(value, PipelineCallback | MultiPipelineCallbacks):
        seen = object.__new__(_outside_class(type(value)))
        seen.__dict__ = value.__dict__
        return seen
    plain = inspect.isfunction(value) or inspect.ismethod(value) or isinstance(value, functools.partial)
    # Of objects those alone that are named so, since a pipeline may use an argument as more than a function.
    plain = plain or ("callback" in name and callable(value))
    return _outside(value) if plain else value


@functools.cache
def _outside_class(stock: type) -> type:
    return type(stock.__name__, (stock,), {"__call__": _outside(stock.__call__)})


def _outside(function: Callable) -> Callable:
    @functools.wraps(function)
    def outside(*args, **kwargs):
        token = _RUN.set(None)
        try:
            return function(*args, **kwargs)
        finally:
            _RUN.reset(token)

    return outside


# From here on: a run.


class _Run:
    """One call of a limited pipeline."""

    def __init__(self, guidance: Guidance, call: Callable, pipe: DiffusionPipeline, args, kwargs, as_given=False):
        self.interval, self.name = guidance.interval, type(pipe).__name__
        self.guider = None if guidance.guider is None else GuiderOfCall(guidance.guider)
        self.report = guidance.report = GuidanceReport()
        self.arguments = _bound(call, pipe, args, kwargs)
        self.scales = {name: value for name, value in self.arguments.items() if GUIDANCE_ARGUMENT.search(name)}
        self.guidable: list[GuidedStep] = []
        self.distilled = self.superseded = False
        self.prepared: set[int] = set()
        self.contexts: dict[int, str | None] = {}
        plans = guidance.plans_of(pipe)
        stages = [_Stage(self, plan, guidance.verify, as_given) for plan in plans]
        self.stages = {id(module): stage for stage in stages for module in stage.plan.networks.values()}
        self.of_scheduler = {id(one): stage for stage in stages for one in _schedulers(stage.plan.pipe)}
        self.targets: list[Any] = []
        self.active: _Stage | None = stages[0] if len(stages) == 1 else None

    def __enter__(self):
        if (outer := _RUN.get()) is not None:
            # An interval given as an argument, or of a pipeline inside the pipeline, counts instead.
            outer.superseded = True
        for stage in set(self.stages.values()):
            for target, put in stage.plan.targets():
                _intercept(target, put)
                self.targets.append(target)
        self.token = _RUN.set(self)
        return self

    def __exit__(self, *error):
        _RUN.reset(self.token)
        for target in self.targets:
            _release(target)

    def stepped(self, scheduler: Any, step: Callable, args: tuple, kwargs: dict) -> Any:
        """A call of `scheduler.step`: the end of an evaluation."""
        stage = self.of_scheduler.get(id(scheduler), self.active)
        return step(*args, **kwargs) if stage is None else stage.stepped(scheduler, step, args, kwargs)

    def finish(self) -> None:
        """After the call: raise if guidance was asked for and not found, warn if the interval had no effect."""
        for stage in set(self.stages.values()):
            stage.finish()
        if self.guidable:
            self._warn_without_effect()
        elif not self.superseded:
            self.raise_without_guidance()
            warnings.warn(
                f"guidance is off in this call ({_listed(self.scales)}): the interval has no effect", stacklevel=4
            )

    def _warn_without_effect(self) -> None:
        guided = sum(step.guided for step in self.guidable)
        if guided not in (0, len(self.guidable)) or self.interval is None or (guided and self.guider):
            return
        which = "none" if guided == 0 else "every one"
        warnings.warn(
            f"the guidance interval {self.interval} holds {which} of the {len(self.guidable)} steps"
            f" ({_range(self.guidable)})",
            stacklevel=5,
        )

    def raise_without_guidance(self) -> None:
        """Raise if there was no unconditional prediction, though one should be."""
        if self.distilled:
            raise ValueError(f"{self.name} {DISTILLED} to leave out. {_TRUE_GUIDANCE}; {_NOT_LIMITED}")
        asked = {name: value for name, value in self.scales.items() if _above_one(value)}
        if asked or self.guider:
            raise ValueError(
                f"{self.name} was called with {_listed(asked or self.scales)}, but no unconditional prediction was"
                f" seen; {_TRUE_GUIDANCE if 'true_cfg_scale' in self.scales else _NOT_LIMITED}"
            )


def _schedulers(pipe: DiffusionPipeline) -> list[Any]:
    components = pipe.components.values()
    return [one for one in components if hasattr(one, "set_timesteps") and hasattr(one, "step")]


class _Record:
    """A denoiser's call since the last step of the scheduler: what it was asked, and what it gave for all rows.

    kind: "whole" (all parts, as the pipeline asks for them), "cut" (fewer rows), or "plain". everything: what all rows
    gave where fewer were run for the answer.
    """

    def __init__(self, kind: str, rows: Rows, output: Any, problem: str, everything: Any):
        self.kind, self.rows, self.output, self.problem, self.everything = kind, rows, output, problem, everything


class _Stage:
    """A pipeline of a run: answers the calls of its networks, and sees the steps of its schedulers."""

    def __init__(self, run: _Run, plan: _Plan, verify: bool, as_given: bool):
        self.run, self.plan, self.pipe, self.name = run, plan, plan.pipe, type(plan.pipe).__name__
        self.listed = plan.source == "listed"
        # Whether the layout is still to be proved; what a listed pipeline hands its scheduler is left as it is.
        self.unproved = not self.listed or verify
        # Whether it is proved before anything is changed: the first steps are run in full, whatever they are to be.
        self.proves = plan.source == "proposed" or (plan.source == "given" and plan.readable and not as_given)
        self.names = {id(module): name for name, module in plan.networks.items()}
        self.own_schedulers = {number: f"{name}_scheduler" for number, name in self.names.items()}
        self.timesteps: dict[int, list[str]] = {}  # names of arguments
        self.parameters = {id(module): _parameters(module) for module in plan.networks.values()}
        self.walks: dict[int, Walk] = {}
        self.walk: Walk | None = None
        self.layout: Layout | None = None
        self.start: StepStart | None = None
        self.first: int | None = None
        self.step: GuidedStep | None = None
        self.guided: bool | None = None
        self.rows: int | None = None  # of the sample that the scheduler was given last
        self.records: list[_Record] = []
        self.conditional: dict[str, tuple[GuidedStep, Any, dict]] = {}
        self.waiting: set[str] = set()
        self.fit: tuple[int, Fit] | None = None
        self.filling: list[str] | None = None
        self.checked: set[int] = set()
        self.tried: set[int] = set()
        self.counted: dict[int, list[Any]] = {}  # attention processors that know the number of rows
        self.early = 0

    def call(self, module: torch.nn.Module, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Answer a call of one of the networks."""
        arguments = dict(zip(self.parameters[id(module)], args, strict=False))
        arguments.update(kwargs)
        scheduler = self._scheduler(module)
        aside = None if self.plan.layout is None else self.plan.layout.aside
        if aside is not None and aside(arguments):
            return call(*args, **kwargs)
        if id(scheduler) not in self.run.prepared:  # before the sampling loop
            self.early += not self.listed
            if self.early > 2:
                raise ValueError(f"{self.name} samples without setting its scheduler's timesteps; {_NOT_LIMITED}")
            return call(*args, **kwargs)
        self._begin(module, scheduler, arguments)
        name = self.names[id(module)]
        role = name if "control" in name.lower() else ""
        if self.layout is None:
            return self._plain_call(call, args, kwargs, arguments, role)
        if self.layout.how == "calls":
            return self._one_of_two(module, call, args, kwargs, arguments, role)
        return self._in_batch(module, call, args, kwargs, arguments, role)

    def _scheduler(self, module: torch.nn.Module) -> Any:
        """The scheduler that a network's predictions are for, also one that the call itself put in place."""
        held = self.pipe.__dict__
        scheduler = held.get(self.own_schedulers[id(module)]) or held.get("scheduler")
        if scheduler is None:
            found = _schedulers(self.pipe)
            if len(found) != 1:
                raise ValueError(f"{self.name} steps no scheduler that could be found; {_NOT_LIMITED}")
            scheduler = found[0]
        if id(scheduler) not in self.run.of_scheduler and hasattr(scheduler, "timesteps"):
            _intercept(scheduler, _into_scheduler)
            self.run.targets.append(scheduler)
            self.run.of_scheduler[id(scheduler)] = self
            self.run.prepared.add(id(scheduler))
        return scheduler

    def _begin(self, module: torch.nn.Module, scheduler: Any, arguments: dict) -> None:
        """Find the entry of the report that a call belongs to; a new one if a step begins."""
        self.run.active = self
        walk = self.walks.get(id(scheduler))
        if walk is None:
            walk = self.walks[id(scheduler)] = Walk(scheduler)
            given = {**self.run.arguments, **self._of_part(module)}
            self.arguments = given
            if self.plan.layout is not None:
                self.layout = self.plan.layout.of_call(self.pipe, given)
                self._refuse_call()
        names = self.timesteps.get(id(module))
        if names is None:
            names = self.timesteps[id(module)] = [name for name in arguments if _is_timestep(name)]
        timestep = next((value for name in names if (value := arguments.get(name)) is not None), None)
        start = walk.at(timestep, self.run.arguments.get("strength"))
        if start is not self.start:
            if self.records and self.layout is not None and not self.listed:
                self._disagree("calls its network for the next step without stepping its scheduler")
            if self.start is not None:
                self._after_first_step()
            else:
                self.first = start.index
            self.start, self.guided, self.walk = start, None, walk
            self.step = GuidedStep(start.index, start.sigma)
            self.run.report.steps.append(self.step)

    def _of_part(self, module: torch.nn.Module) -> dict:
        """Arguments of a call that concern the first part of a pipeline in two, under the name of the others."""
        prefix = self.plan.prefix or ("prior_" if self.names[id(module)] == "prior" else "")
        return {
            name.removeprefix(prefix): value
            for name, value in self.run.arguments.items()
            if prefix and name.startswith(prefix)
        }

    def _refuse_call(self) -> None:
        reason, refused = REFUSED_CALLS.get(_stock(self.pipe).__name__, ("", None))
        if self.listed and refused is not None and refused(self.arguments):
            raise ValueError(f"{self.name} {reason}, or {_NOT_LIMITED}")
        if self.run.guider is not None and len(self.layout.parts) > 2:
            raise ValueError(f"{self.name} makes the predictions {self.layout}; a guider combines two")

    def _after_first_step(self) -> None:
        """Before the second step: raise where guidance was asked for and the first step had none."""
        run = self.run
        alone = len(set(run.stages.values())) == 1 and not run.superseded and self.plan.source != "none"
        if alone and not run.guidable and "guider" not in self.pipe.components and len(run.report.steps) == 1:
            run.raise_without_guidance()

    def _is_guided(self) -> bool:
        """The decision for the step, made where the step first shows that it has guidance."""
        if self.guided is None:
            interval = self.run.interval
            self.guided = self.step.guided = interval is None or self.start in interval
        return self.guided

    def _counts(self) -> None:
        """The step has guidance."""
        if not any(step is self.step for step in self.run.guidable[-1:]):
            self.run.guidable.append(self.step)

    def _guider_wants(self) -> bool:
        """Whether the guider needs the unconditional prediction in this step."""
        scheduler, place = self.walk.scheduler, self.walk.position
        count = self.start.count - self.first
        return self.run.guider.enter(self.start.index - self.first, count, scheduler.timesteps[place])

    # One batch.

    def _in_batch(self, module, call, args, kwargs, arguments, role):
        rows = count_rows(arguments)
        if self.run.contexts.get(id(module)) not in (None, "cond_uncond") or not self._is_doubled(rows, role):
            return self._plain_call(call, args, kwargs, arguments, role)
        self._check_network(module, arguments)
        guided, guider = self._is_guided(), self.run.guider
        if self.unproved and not self.listed and (self.proves or (guided and guider)):
            return self._whole_batch(module, call, args, kwargs, arguments, rows, role)
        if self.listed:
            self._counts()
        whole = guided and (guider is None or self._guider_wants())
        everything = None
        if whole:
            self.step.rows += 0 if role else rows.total
            output = call(*args, **kwargs)
        else:
            output, everything = self._fewer_rows(module, call, args, kwargs, arguments, rows, role)
        self._record("whole" if whole else "cut", rows, arguments, output, role, everything=everything)
        if guided and guider is not None and not role:
            output = self._guided_batch(output, rows, arguments, whole)
        return output

    def _is_doubled(self, rows: Rows, role: str) -> bool:
        """Whether a call is on a batch of all parts."""
        layout = self.layout
        if role and self._guesses(role):
            return False
        if not self.listed:
            if self.rows is None:
                return rows.total % layout.cut.parts == 0
            if rows.total not in (self.rows, self.rows * layout.cut.parts):
                self._disagree(f"runs {rows.total} rows for {self.rows} samples, in {layout.cut.parts} parts")
            return rows.total != self.rows
        if (layout.gradient and torch.is_grad_enabled()) or not layout.on(self.pipe, self.arguments):
            return False
        if layout.partly and rows.total == self.rows:
            return False
        if layout.extra and not role:
            first = self.conditional.setdefault("rows", (self.step, rows.total, {}))
            if first[0] is self.step and rows.total * layout.cut.parts == first[1]:
                return False
            self.conditional["rows"] = (self.step, rows.total, {})
        if rows.total % layout.cut.parts:
            self._disagree(f"splits {rows.total} rows in {layout.cut.parts} parts, which does not go up")
        return True

    def _guesses(self, role: str) -> bool:
        """Whether a ControlNet sees the conditional rows alone."""
        network = getattr(self.pipe, role)
        network = getattr(network, "nets", [network])[0]
        pooled = getattr(getattr(network, "config", None), "global_pool_conditions", False)
        return bool(self.run.arguments.get("guess_mode") or pooled)

    def _whole_batch(self, module, call, args, kwargs, arguments, rows, role):
        """A batch whose layout is to be proved: all rows, whatever the step; the scheduler's input is made right."""
        problem = ""
        if not self.guided:
            fewer = self._cut_call(module, call, args, kwargs, rows)
        self.step.rows += 0 if role else rows.total
        output = call(*args, **kwargs)
        if not self.guided:
            self.step.rows += 0 if role else rows.total // self.layout.cut.parts * len(self.layout.cut.run)
            problem = self._difference(fewer, output, rows)
            self.tried.add(id(module))
        self._record("whole", rows, arguments, output, role, problem)
        return output

    def _fewer_rows(self, module, call, args, kwargs, arguments, rows, role):
        """Run the parts that unguided steps need; compared with all rows once where it is unclear what a row is."""
        cut, state = self.layout.cut, None
        kept = rows.total // cut.parts * len(cut.run)
        try_out = id(module) not in self.tried
        unclear = self._unclear(module, arguments, rows) if try_out else []
        if unclear:
            state = _state_of(module)
        output, everything = self._cut_call(module, call, args, kwargs, rows), None
        self.step.rows += 0 if role else kept
        self.step.rows_saved += 0 if role else rows.total - kept
        self.tried.add(id(module))
        if unclear:
            if state != _state_of(module):
                self._disagree("has attention processors that keep count of the calls of the network")
            self.step.rows += 0 if role else rows.total
            everything = call(*args, **kwargs)
            # of an unlisted pipeline it is not known yet whether this is a batch of several parts
            if (problem := self._difference(output, everything, rows)) and (self.listed or self.rows is not None):
                self._disagree(f"{problem}; unclear are {unclear}")
        return output, everything

    def _cut_call(self, module, call, args, kwargs, rows):
        cut = self.layout.cut
        names = self.parameters[id(module)]
        fewer_args = [take_rows(name, value, rows, cut) for name, value in zip(names, args, strict=False)]
        fewer_kwargs = {name: take_rows(name, value, rows, cut) for name, value in kwargs.items()}
        kept = Rows(rows.total // cut.parts * len(cut.run), rows.listed)
        perturbed = len(cut.run) > 1 and hasattr(type(self.pipe), "_set_pag_attn_processor")
        if id(module) not in self.counted:
            counted = {id(one): one for one in _processors(module) if hasattr(one, "batch_size")}
            self.counted[id(module)] = list(counted.values())
        counted = self.counted[id(module)]
        if not perturbed and not counted:
            return spread_rows(call(*fewer_args, **fewer_kwargs), kept, cut)
        with self._fewer_rows_in_attention(counted, perturbed):
            return spread_rows(call(*fewer_args, **fewer_kwargs), kept, cut)

    @contextmanager
    def _fewer_rows_in_attention(self, counted: list[Any], perturbed: bool):
        """Attention that knows the parts (perturbed-attention guidance) or the rows (Text2Video-Zero, over frames)."""
        before = [one.batch_size for one in counted]
        cut = self.layout.cut
        try:
            if perturbed:
                self.pipe._set_pag_attn_processor(self.pipe.pag_applied_layers, do_classifier_free_guidance=False)
            for one in counted:
                one.batch_size = one.batch_size // cut.parts * len(cut.run)
            yield
        finally:
            if perturbed:
                self.pipe._set_pag_attn_processor(self.pipe.pag_applied_layers, do_classifier_free_guidance=True)
            for one, size in zip(counted, before, strict=True):
                one.batch_size = size

    def _unclear(self, module, arguments, rows) -> list[str]:
        """What makes it unclear what belongs to which row: names of arguments, and attention not of diffusers."""
        unclear = [one for name, value in arguments.items() for one in unclear_arguments(name, value, rows)]
        foreign = {type(one) for one in _processors(module) if not type(one).__module__.startswith("diffusers.")}
        unclear += sorted(one.__name__ for one in foreign)
        return unclear or ["all arguments"] * (self.unproved or not self.listed)

    def _difference(self, ours, theirs, rows) -> str:
        """How a run of fewer rows differs from that of all, in the parts that both ran."""
        cut = self.layout.cut
        for one, other in zip(_stacked(ours, rows), _stacked(theirs, rows), strict=True):
            parts = [split_rows(tensor, cut) for tensor in (one, other)]
            if one.shape != other.shape or any(differs(parts[0][i], parts[1][i]) for i in cut.run):
                return "gives its conditional rows another prediction without the others"
        return ""

    def _check_network(self, module, arguments) -> None:
        """Raise for what keeps rows from being left out: gradients, caches of all rows, and of the step before."""
        if torch.is_grad_enabled() and any(one.requires_grad for one in tensors_in(arguments)):
            self._disagree(f"takes the gradient of a batch of {len(self.layout.parts)} parts")
        if any("cache" in key for key in arguments):
            caches = [one for key, value in arguments.items() if "cache" in key for one in caches_of_rows(key, value)]
            if caches:
                self._disagree(f"keeps {caches} of all rows from call to call, so none can be left out")
        self._check_step_cache(module)

    def _check_step_cache(self, module) -> None:
        """Raise if the network reuses what it computed in the step before (FirstBlockCache, FasterCache, ...)."""
        if id(module) in self.checked:
            return
        registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
        hooks = [hook for registry in registries if registry is not None for hook in registry.hooks.values()]
        stateful = sorted({type(hook).__name__ for hook in hooks if getattr(hook, "_is_stateful", False)})
        if stateful:
            raise ValueError(
                f"{type(module).__name__} reuses computations of the step before ({', '.join(stateful)}), which a step"
                " without unconditional rows does not have; call disable_cache() on it, or remove the interval with"
                " remove_guidance_interval(pipe)"
            )
        self.checked.add(id(module))

    def _guided_batch(self, output, rows, arguments, whole):
        """The output with what the guider makes of it in both parts."""
        cut, numbers = self.layout.cut, iter(range(len(tensors_in(output)) + 1))
        cond, uncond = self.layout.parts.index("cond"), self.layout.parts.index("uncond")

        def guided(tensor):
            if tensor.ndim == 0 or len(tensor) % rows.total:
                return tensor
            parts, number = split_rows(tensor, cut), next(numbers)
            count = self._guided_channels(tensor, arguments)
            wanted = self._wanted(number, parts[cond], parts[uncond] if whole else None, count)
            if self.arguments.get("guidance_rescale"):  # the pipeline's own, by the conditional prediction
                scale = (
                    "audio_guidance_scale" if number and "audio_guidance_scale" in self.arguments else "guidance_scale"
                )
                weight = weight_of_call(self.pipe, scale, self.arguments, self.layout.plus_one)
                parts[uncond] = second_answer(wanted, parts[cond], weight)
            else:
                parts = [wanted if i == cond else _with_head(part, wanted, count) for i, part in enumerate(parts)]
            return join_rows(parts, cut.turns)

        if rows.listed and isinstance(_rows_of(output, rows), list):
            listed = _rows_of(output, rows)
            return _with_rows(output, rows, list(guided(torch.stack(listed)).unbind()))
        return map_tensors(guided, output)

    def _wanted(self, number, cond, uncond, count):
        """What the guider makes of two predictions, on the first `count` channels."""
        if count is None:
            return self.run.guider(number, cond, uncond)
        head = self.run.guider(number, cond[:, :count], None if uncond is None else uncond[:, :count])
        return _with_head(cond, head, count)

    def _guided_channels(self, tensor, arguments) -> int | None:
        """How many channels are guided; None for all."""
        if not self.layout.variance or tensor.ndim < 3:
            return None
        if self.layout.variance == "three":
            return 3
        sample = next(value for value in arguments.values() if isinstance(value, torch.Tensor) and value.ndim > 1)
        doubled = tensor.shape[1] == 2 * sample.shape[1]
        return tensor.shape[1] // 2 if self.layout.variance == "always" or doubled else None

    # Two calls.

    def _one_of_two(self, module, call, args, kwargs, arguments, role):
        kind = self._kind_of_call(module, role)
        if kind == "cond":
            if self.listed and self.run.guider is not None and not role:
                self._weight(module)
            output = self._plain_call(call, args, kwargs, arguments, role)
            self.conditional[role] = (self.step, output, arguments)
            self.waiting.add(role)
            return output
        if kind == "uncond":
            return self._second_call(module, call, args, kwargs, arguments, role)
        return self._plain_call(call, args, kwargs, arguments, role)

    def _kind_of_call(self, module, role) -> str:
        """ "cond", "uncond", or "" for a call of another kind."""
        if not self.listed:
            if role:
                return ""
            if len(self.records) > 1:
                self._disagree("calls its network more than twice in a step")
            return "uncond" if self.records else "cond"
        name = self.run.contexts.get(id(module))
        if isinstance(name, str):
            return {"cond": "cond", "pred_cond": "cond", "uncond": "uncond", "pred_uncond": "uncond"}.get(name, "")
        if not self.layout.on(self.pipe, self.arguments):
            return ""
        if role not in self.waiting:
            return "cond"
        if not self.layout.every:
            self.waiting.discard(role)
        return "uncond"

    def _second_call(self, module, call, args, kwargs, arguments, role):
        self._check_step_cache(module)
        step, cond, first = self.conditional[role]
        rows = count_rows(arguments)
        if self.listed and step is not self.step:
            self._disagree("calls its network without the condition before it calls it with")
        if not self.listed and _other_inputs(first, arguments):
            self._disagree("makes two calls of its network in a step, of different samples or times")
        guided, proving = self._is_guided(), self.unproved and self.proves
        if self.listed:
            self._counts()
        whole = guided and (self.run.guider is None or role or self._guider_wants())
        fills = self._fills_a_cache(arguments, first)
        if whole or proving or fills:
            self.step.rows += 0 if role else rows.total
            output = call(*args, **kwargs)
        else:
            self.step.rows_saved += 0 if role else rows.total
            output = None
        self._record("cut" if output is None else "whole", rows, arguments, output, role)
        if output is not None and (proving or (whole and (self.run.guider is None or role))):
            return output
        if guided and self.listed and not role:
            return self._guided_second(module, cond, output if whole else None, arguments)
        if output is not None and not self.listed:  # the scheduler's input is made right
            return output
        output = map_tensors(torch.clone, cond)
        return _image_tokens(output, arguments["hidden_states"].shape[1]) if self.layout.text_first else output

    def _guided_second(self, module, cond, uncond, arguments):
        """What makes the pipeline's combination the guider's prediction."""
        weight = self._weight(module)
        if self.layout.text_first:
            cond = _image_tokens(cond, arguments["hidden_states"].shape[1])
        others, numbers = iter(tensors_in(uncond)), iter(range(len(tensors_in(cond)) + 1))

        def answered(tensor):
            if tensor.ndim == 0:
                return tensor
            wanted = self.run.guider(next(numbers), tensor, None if uncond is None else next(others))
            return second_answer(wanted, tensor, weight)

        return map_tensors(answered, cond)

    def _weight(self, module) -> float:
        """w of u + w (c - u) in this call."""
        name = "true_cfg_scale" if "true_cfg_scale" in self.arguments else "guidance_scale"
        if self.names[id(module)].endswith("_2") and self.arguments.get("guidance_scale_2") is not None:
            name = "guidance_scale_2"  # of Wan's second expert
        return weight_of_call(self.pipe, name, self.arguments, self.layout.plus_one)

    def _fills_a_cache(self, arguments, conditional) -> bool:
        """Whether later unconditional calls need what this one keeps in a cache, which the conditional calls lack.

        The first call fills it (QwenImage21). Where later ones read it, an argument such as `kv_cache_mode` says so.
        """
        if not self.layout.fills_cache:
            return False
        caches = {key: value for key, value in arguments.items() if "cache" in key and value is not None}
        own = any(value is not conditional.get(key) for key, value in caches.items() if not isinstance(value, str))
        mode = [value for value in caches.values() if isinstance(value, str)]
        self.filling = mode if self.filling is None else self.filling
        return own and mode == self.filling

    def _plain_call(self, call, args, kwargs, arguments, role):
        output = call(*args, **kwargs)
        if not role:
            rows = count_rows(arguments)
            self.step.rows += rows.total
            self.run.distilled = self.run.distilled or any(arguments.get(name) is not None for name in _EMBEDDED)
            self._record("plain", rows, arguments, output, role)
        return output

    def _record(self, kind, rows, arguments, output, role, problem="", everything=None) -> None:
        if not role and (self.unproved or not self.listed):
            output = map_tensors(torch.clone, output)  # which the pipeline may change in place
            self.records.append(_Record(kind, rows, output, problem, everything))

    # What reaches the scheduler.

    def stepped(self, scheduler: Any, step: Callable, args: tuple, kwargs: dict) -> Any:
        """A step of the scheduler, whose input is compared with what the layout says where that is to be proved."""
        if self.unproved or not self.listed or (self.layout is not None and self.layout.partly):
            names = _step_parameters(type(scheduler))
            given = dict(zip(names, args, strict=False)) | kwargs
            m, timestep, sample = (given.get(name) for name in names[:3])
            self.rows = len(sample) if isinstance(sample, torch.Tensor) and sample.ndim else None
            if not self.listed:
                given[names[0]] = self._checked(scheduler, m, timestep)
                args, kwargs = (), given
            elif self.unproved:
                self._verify(m)
        result = step(*args, **kwargs)
        self.records.clear()
        self.waiting.clear()
        # A copy of the scheduler is stepped with it, or in its place, for each frame; all frames at once or in turns.
        walk = self.walks.get(id(scheduler), self.walk)
        if walk is not None and walk.position is not None:
            in_turns = bool(self.run.arguments.get("ar_step"))
            walk.next = None if in_turns else min(walk.position + 1, len(walk.timesteps) - 1)
        return result

    def _checked(self, scheduler: Any, m: Any, timestep: Any) -> Any:
        """What the scheduler is to be given. Raises ValueError where it is not as the layout says."""
        if not isinstance(m, torch.Tensor) or self.rows is None:
            self._disagree("hands its scheduler something else than tensors of a batch")
        walk = self.walks.get(id(scheduler))
        if walk is None or not self.records:
            self._disagree(
                "steps its scheduler without calling one of its networks before, or without setting its timesteps"
            )
        if walk.nearest(timestep) != walk.position or walk.walked == walk.position:
            self._disagree(f"does not walk through the schedule that it set: it is at timestep {float(timestep):g}")
        if walk.walked is not None and walk.position != walk.walked + 1:
            self._disagree(
                f"does not walk through the schedule that it set: step {walk.position} follows {walk.walked}"
            )
        walk.walked = walk.position
        if self.layout is None:
            return self._without_layout(m)
        return self._checked_batch(m) if self.layout.how != "calls" else self._checked_calls(m)

    def _without_layout(self, m):
        if len(self.records) > 1 or self.records[0].rows.total != self.rows:
            self._disagree("is not made to guide, as its source seems, but runs more rows than there are samples")
        return m

    def _checked_batch(self, m):
        if len(self.records) > 1:
            self._disagree(f"calls its network {len(self.records)} times in a step")
        record, parts = self.records[0], self.layout.cut.parts
        if record.rows.total == self.rows:
            return self._checked_plain(m, record)
        if record.rows.total != self.rows * parts:
            self._disagree(f"runs {record.rows.total} rows for {self.rows} samples, in {parts} parts")
        if record.problem:
            self._disagree(record.problem)
        self._counts()
        outputs = [split_rows(tensor, self.layout.cut) for tensor in _stacked(record.output, record.rows)]
        if record.everything is not None and self._difference(record.output, record.everything, record.rows):
            self._disagree("gives its conditional rows another prediction without the others")
        if self.unproved and record.kind == "whole":
            self._check_turns(m, record)
            return self._proved(m, outputs)
        return self._as_proved(m, outputs, record.kind)

    def _check_turns(self, m, record) -> None:
        """Raise if the parts take turns where the layout has one after the other, or the other way round."""
        cut = self.layout.cut._replace(turns=not self.layout.cut.turns)
        cond = self.layout.parts.index("cond")
        for tensor in _stacked(record.output, record.rows) if len(m) > 1 else []:
            own = fit(m, split_rows(tensor, self.layout.cut), cond)
            if own is not None and own.exact:  # nearly equal predictions may fit in both orders
                continue
            found = fit(m, split_rows(tensor, cut), cond)
            if (
                found is not None
                and found.exact
                and found.clear
                and bool((found.weights.abs() > 0.01).sum(dim=1).max() > 1)
            ):
                self._disagree(f"has the rows of its parts {'in turns' if cut.turns else 'one part after the other'}")

    def _checked_plain(self, m, record):
        """A batch of as many rows as samples is not guided; raise if its halves are combined all the same."""
        if record.kind == "cut":
            return self._repaired(m, record)
        self._check_plain(m, record)
        self._check_alone(m, record)
        return m

    def _repaired(self, m, record):
        """What the scheduler is to be given where samples were taken for the parts of a batch in the first step."""
        pairs = zip(_stacked(record.output, record.rows), _stacked(record.everything, record.rows), strict=True)
        for ours, theirs in pairs:
            for sign in (1, -1):
                if ours.shape == m.shape and not differs(m, sign * ours):
                    return (sign * theirs).to(m.dtype)
        self._disagree(f"runs {record.rows.total} rows for as many samples, which are not in several parts")

    def _check_plain(self, m, record) -> None:
        parts = self.layout.cut.parts
        if record.rows.total % parts or m.shape[0] % parts:
            return
        for tensor in _stacked(record.output, record.rows):
            found = fit(m[: m.shape[0] // parts], split_rows(tensor, self.layout.cut), self.layout.parts.index("cond"))
            if found is not None and found.exact and found.clear and (found.weights.abs() > 0.01).sum(dim=1).max() > 1:
                self._disagree("keeps the samples themselves in a batch of several parts")

    def _check_alone(self, m, record) -> None:
        """In a step without unconditional prediction, after one that had it, nothing of the latter may be left."""
        shown = self.fit is not None or self.unproved
        if not (self.run.guidable and shown):
            return
        fits = (fit(m, [tensor] * 2, 0) for tensor in _stacked(record.output, record.rows))
        if not any(found is not None and found.exact for found in fits):
            self._disagree("hands its scheduler something else than the only prediction of a step")

    def _checked_calls(self, m):
        if any(record.rows.total != self.rows for record in self.records):
            self._disagree(f"runs {[one.rows.total for one in self.records]} rows for {self.rows} samples")
        if len(self.records) == 1:
            outputs = [[tensor] * 2 for tensor in _stacked(self.records[0].output, self.records[0].rows)]
            if self.fit is not None and not self._is_guided():
                return self._as_proved(m, outputs, "cut")
            self._check_alone(m, self.records[0])
            return m
        self._counts()
        first, second = self.records
        if second.kind == "cut":
            return self._as_proved(m, [[one] * 2 for one in _stacked(first.output, first.rows)], "cut")
        both = zip(_stacked(first.output, first.rows), _stacked(second.output, second.rows), strict=False)
        outputs = [list(pair) for pair in both]
        return self._proved(m, outputs) if self.unproved else self._as_proved(m, outputs, "whole")

    def _proved(self, m, outputs):
        """Prove the layout by what the scheduler is given; returns what it is to be given in this step."""
        cond = self.layout.parts.index("cond")
        fits = [(i, one) for i, parts in enumerate(outputs) if (one := fit(m, parts, cond))]
        number, found = next((one for one in fits if one[1].exact), (fits or [(0, None)])[0])
        if self.proves and self.plan.source == "given" and not self._is_guided():
            contradicts = found is not None and bool((found.weights[:, cond] < -0.1).any())
            if not contradicts and (found is None or not found.is_shown(cond)):
                raise _NotShown
        self._judge(found)
        exact = found is not None and found.exact
        self.fit = (number, found) if exact and not self.unproved else None
        if self._is_guided() and self.run.guider is None:
            return m
        if not exact:
            self._disagree("hands its scheduler something that a guider cannot take the place of")
        return self._replaced(m, found, outputs[number], number)

    def _judge(self, found: Fit | None) -> None:
        """Whether a fit says what the layout says. Raises ValueError if not, or if it says nothing nor anybody did."""
        exact = found is not None and found.exact
        if exact and not found.clear:
            return  # the parts are the same, as those of two equal prompts are
        weights = None if found is None else found.weights[:, self.layout.parts.index("cond")]
        if found is not None and bool((weights < (0.01 if exact else -0.1)).any()):
            self._disagree(
                f"gives the part that the layout {str(self.layout)!r} calls conditional the weight"
                f" {float(weights.min()):.3g}, so it is another part"
            )
        if exact and bool((weights > 0.99).all()):
            self.unproved = not bool((weights > 1.01).any())
            return
        if self.plan.source != "given":
            self._disagree(
                f"may guide as {str(self.layout)!r}, as its source seems, but what reaches its scheduler is not a"
                " combination that shows it; if that is the layout, give it as layout="
            )
        if self.unproved:
            self.unproved = False
            warnings.warn(f"{self._not_shown()} what reaches the scheduler does not show it", stacklevel=2)

    def _replaced(self, m, fitted, parts, number):
        """What the scheduler is to be given where the network was answered in full."""
        cut, cond = self.layout.cut, self.layout.parts.index("cond")
        if not self._is_guided():
            wanted = [parts[cut.run[i]] for i in cut.source]
        else:
            self._guider_wants()
            uncond = self.layout.parts.index("uncond")
            wanted = [self.run.guider(number, parts[cond], parts[uncond])] * len(parts)
        return fitted.combined(wanted).to(m.dtype)

    def _as_proved(self, m, outputs, kind):
        """With a layout that is proved or was given: in an unguided step the conditional prediction must arrive."""
        cond = self.layout.parts.index("cond")
        if self._is_guided():
            answered = self.layout.how != "calls" or kind == "cut"  # a batch has the guider's prediction in its parts
            if kind == "whole" and self.run.guider is None and self.fit is not None:
                self._check_guided(m, outputs[self.fit[0]], cond)
            if self.run.guider is None or answered or self.fit is None:
                return m
            return self._replaced(m, self.fit[1], outputs[self.fit[0]], self.fit[0])
        if "perturbed" in self.layout.parts:
            return m
        if self.fit is not None:
            if differs(m, self.fit[1].sign * self.fit[1].align(outputs[self.fit[0]][cond])):
                self._disagree("adds something else to the prediction of an unguided step")
        elif self.unproved and not any(
            one and one.exact for one in (fit(m, [parts[cond]] * 2, 0) for parts in outputs)
        ):
            self._judge(None)
        return m

    def _check_guided(self, m, parts, cond) -> None:
        """A guided step after the one that proved the layout: the same parts, of this step alone."""
        found = fit(m, parts, cond)
        if found is None and self.plan.source == "proposed":
            self._disagree("hands its scheduler something else than a combination of the predictions of a step")
        if found is not None and found.clear and bool((found.weights[:, cond] < 0.01).any()):
            self._judge(found)

    def _verify(self, m) -> None:
        """Prove the layout of a listed pipeline in its first guided step, if what reaches the scheduler tells."""
        if not self._is_guided() or not self.records or self.run.guider is not None or self.layout is None:
            return
        cond, outputs = self.layout.parts.index("cond"), []
        if self.layout.how == "calls" and len(self.records) == 2:
            both = zip(*(_stacked(one.output, one.rows) for one in self.records), strict=False)
            outputs = [list(pair) for pair in both]
        elif self.layout.how != "calls" and len(self.records) == 1 and self.records[0].kind == "whole":
            outputs = [
                split_rows(one, self.layout.cut) for one in _stacked(self.records[0].output, self.records[0].rows)
            ]
        for parts in outputs:
            found = fit(m, parts, cond) if isinstance(m, torch.Tensor) and len(parts[0]) == len(m) else None
            if found is not None and found.clear and found.exact:
                if bool((found.weights[:, cond] < 0.01).any()):
                    self._judge(found)
                self.unproved = False

    def finish(self) -> None:
        """After the call: say it if a layout that was given was never proved, raise if no step was seen."""
        if self.records and self.layout is not None and not self.listed and self.rows is None:
            self._disagree("does not step its scheduler")
        if self.plan.source == "given" and self.unproved and self.run.guidable:
            warnings.warn(f"{self._not_shown()} no step showed it", stacklevel=5)

    def _not_shown(self) -> str:
        return f"the layout {str(self.layout)!r} of {self.name} is taken as given, it is not proved:"

    def _disagree(self, what: str) -> None:
        raise ValueError(f"{self.name} {what}; {_NOT_LIMITED}")


_NOT_LIMITED = (
    "its guidance cannot be limited or replaced like this; give layout= if it guides in another way, or remove the"
    " interval with remove_guidance_interval(pipe)"
)
_TRUE_GUIDANCE = (
    "Where the pipeline has true classifier-free guidance, turn it on with true_cfg_scale > 1 and a negative_prompt"
)
_EMBEDDED = ("guidance", "guidance_scale", "embedded_guidance", "guidance_scale_embeds", "timestep_cond")


def _bound(call: Callable, pipe: DiffusionPipeline, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by name, with defaults; empty if they do not fit, which the call then reports."""
    try:
        bound = inspect.signature(call).bind(pipe, *args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    given = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name)
    return given


@functools.cache
def _step_parameters(scheduler: type) -> list[str]:
    return list(inspect.signature(scheduler.step).parameters)[1:]


def _processors(module: torch.nn.Module) -> list[Any]:
    return list(getattr(module, "attn_processors", {}).values())


def _state_of(module: torch.nn.Module) -> list:
    """What attention processors that are not diffusers' own keep: numbers, and lengths of containers."""
    found = []
    for processor in _processors(module):
        if not type(processor).__module__.startswith("diffusers."):
            held = [processor, *(one for one in vars(processor).values() if hasattr(one, "__dict__"))]
            held = [one for one in held if not isinstance(one, torch.nn.Module)]
            found += [_counts_in(value) for one in held for value in vars(one).values()]
    return found


def _counts_in(value: Any) -> Any:
    if isinstance(value, list | tuple | set):
        return len(value)
    if isinstance(value, dict):
        return {str(key): _counts_in(item) for key, item in value.items()}
    return value if isinstance(value, int | float | str) else None


def _other_inputs(first: dict, second: dict) -> bool:
    """Whether two calls differ in their samples or times."""
    samples = [
        next((value for value in one.values() if isinstance(value, torch.Tensor)), None) for one in (first, second)
    ]
    times = [next((one[name] for name in one if _is_timestep(name)), None) for one in (first, second)]
    return any(
        one is not other
        and not (
            torch.equal(one, other)
            if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape
            else one == other
            if not isinstance(one, torch.Tensor) and not isinstance(other, torch.Tensor)
            else False
        )
        for one, other in (samples, times)
    )


def _rows_of(output: Any, rows: Rows) -> list | None:
    """The list of rows in an output, if it is one."""
    if isinstance(output, list) and len(output) == rows.total:
        return output
    items = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return next((found for item in items if (found := _rows_of(item, rows)) is not None), None)


def _with_rows(output: Any, rows: Rows, new: list) -> Any:
    if isinstance(output, list) and len(output) == rows.total:
        return new
    if isinstance(output, dict):
        items = {key: _with_rows(item, rows, new) for key, item in output.items()}
        return type(output)(**items) if hasattr(output, "to_tuple") else items
    return type(output)(_with_rows(item, rows, new) for item in output) if isinstance(output, list | tuple) else output


def _stacked(output: Any, rows: Rows) -> list[torch.Tensor]:
    """The tensors of an output with an entry for each row."""
    if rows.listed and (listed := _rows_of(output, rows)) is not None:
        alike = all(isinstance(one, torch.Tensor) and one.shape == listed[0].shape for one in listed)
        return [torch.stack(listed)] if alike else []
    return [tensor for tensor in tensors_in(output) if len(tensor) and len(tensor) % rows.total == 0]


def _with_head(part: torch.Tensor, head: torch.Tensor, count: int | None) -> torch.Tensor:
    """A tensor with other first channels; the head is all of it if count is None."""
    return head if count is None else torch.cat([head[:, :count], part[:, count:]], dim=1)


def _image_tokens(output: Any, count_tokens: int) -> Any:
    return map_tensors(lambda tensor: tensor[:, -count_tokens:], output)


def _above_one(scale: Any) -> bool:
    if isinstance(scale, list | tuple):
        return any(map(_above_one, scale))
    return isinstance(scale, Real) and scale > 1


def _listed(scales: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in scales.items()) or "it takes no guidance scale"


def _range(steps: list[GuidedStep]) -> str:
    sigmas = [step.sigma for step in steps if step.sigma is not None]
    return f"sigma {max(sigmas):.4g} to {min(sigmas):.4g}" if sigmas else f"{steps[0].index} to {steps[-1].index}"
