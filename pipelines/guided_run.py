"""One call of a pipeline under guidance: which of its pipelines guide, and the report of what was done."""

import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .applied_guiders import GuiderOfCall
from .guidance_layouts import (
    COMBINED,
    DISTILLED,
    LAYOUTS,
    REFUSED,
    UNGUIDED_NETWORKS,
    Layout,
    table_class,
)
from .guided_stage import GuidanceReport, GuidedStep, Stage, is_timestep, parameters_of, schedulers_of, stock_class
from .interceptors import RUN, intercept, into_network, into_scheduler, release
from .interval import Walk  # noqa: F401  what a sibling imports, the file that imports it does as well
from .layout_proof import NOT_LIMITED
from .layout_source import hands_on_only, propose
from .rows import Rows  # noqa: F401

GUIDANCE_ARGUMENT = re.compile(r"(guidance|cfg)_scale$")
_TRUE_GUIDANCE = (
    "Where the pipeline has true classifier-free guidance, turn it on with true_cfg_scale > 1 and a negative_prompt"
)


@dataclass
class Plan:
    """A pipeline of a call, itself or inside of it: how it guides, and how that is known.

    Attributes:
        pipe: the pipeline.
        layout: how it guides; None where it does not.
        source: "listed", "proposed", "given", or "none" without guidance.
        networks: its denoisers by name.
        prefix: of its arguments' names in the call, "prior_" for the first of a combined pipeline.
        readable: of a layout that was given, whether the source shows that predictions go to the scheduler and nowhere
            else.
    """

    pipe: DiffusionPipeline
    layout: Layout | None
    source: str
    networks: dict[str, torch.nn.Module]
    prefix: str = ""
    readable: bool = False

    def __post_init__(self) -> None:
        self.networks = {name: module for name, module in self.networks.items() if name not in UNGUIDED_NETWORKS}
        self.code = stock_class(self.pipe).__call__

    def is_current(self) -> bool:
        """Whether the pipeline has still the networks and the code that it was made for."""
        same = all(getattr(self.pipe, name, None) is module for name, module in self.networks.items())
        return same and self.code is stock_class(self.pipe).__call__

    def targets(self) -> list[tuple[Any, Callable]]:
        """What interceptors are put into, and how."""
        networks = {id(module): (module, into_network) for module in self.networks.values()}
        return [*networks.values(), *((one, into_scheduler) for one in schedulers_of(self.pipe))]


def make_plans(pipe: DiffusionPipeline, given: Layout | None) -> list[Plan]:
    """How each guided stage of a pipeline is run.

    Args:
        pipe: the pipeline.
        given: its layout, or None where that is to be found.

    Raises:
        ValueError: for a pipeline without a denoiser, and for one whose layout is not known.
    """
    known = table_class(stock_class(pipe))
    if known is not None and known.__name__ in REFUSED:
        raise ValueError(f"{type(pipe).__name__} {REFUSED[known.__name__]}; {NOT_LIMITED}")
    if known is not None and known.__name__ in COMBINED:
        parts = {name: part for name, part in vars(pipe).items() if isinstance(part, DiffusionPipeline)}
        plans = [plan for part in parts.values() for plan in make_plans(part, given)]
        for plan in plans:
            plan.prefix = "prior_" if plan.pipe is parts.get("prior_pipe") else ""
        return plans
    networks = denoisers_of(pipe)
    if not networks:
        raise ValueError(
            f"{type(pipe).__name__} has no component that is called with a timestep; components are"
            f" {sorted(pipe.components)}"
        )
    call = inspect.unwrap(stock_class(pipe).__call__)
    if inspect.iscoroutinefunction(call) or inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
        raise ValueError(f"{type(pipe).__name__}.__call__ returns before it has sampled; {NOT_LIMITED}")
    if given is not None:
        return [Plan(pipe, given, "given", networks, readable=hands_on_only(stock_class(pipe), list(networks)))]
    if known is not None:
        return [Plan(pipe, LAYOUTS[known.__name__], "listed", networks)]
    own = all((one.__module__ or "").startswith("diffusers.") for one in (call, stock_class(pipe)))
    if own and not _takes_a_scale(call):
        return [Plan(pipe, None, "none", networks)]
    layout = propose(stock_class(pipe), list(networks))
    return [Plan(pipe, layout, "none" if layout is None else "proposed", networks)]


def _takes_a_scale(call: Callable) -> bool:
    return any(map(GUIDANCE_ARGUMENT.search, inspect.signature(call).parameters))


def denoisers_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The components that are called with a timestep; where there is none (Amused), the transformer or the UNet."""
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    timed = {name: module for name, module in modules.items() if any(map(is_timestep, parameters_of(module)))}
    return timed or {name: module for name, module in modules.items() if name in ("transformer", "unet")}


class Run:
    """One call of a limited pipeline."""

    def __init__(
        self,
        guidance: Any,
        call: Callable,
        pipe: DiffusionPipeline,
        args: tuple,
        kwargs: dict[str, Any],
        as_given: bool = False,
    ):
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
        if true := [plan for plan in plans if plan.source == "listed" and _takes_true_guidance(plan)]:
            self._refuse_without_second_prediction(any(map(_is_distilled, true)))
        stages = [Stage(self, plan, guidance.verify, as_given) for plan in plans]
        self.stages = {id(module): stage for stage in stages for module in stage.plan.networks.values()}
        self.of_scheduler = {id(one): stage for stage in stages for one in schedulers_of(stage.plan.pipe)}
        self.targets: list[Any] = []
        self.active: Stage | None = stages[0] if len(stages) == 1 else None

    def __enter__(self) -> "Run":
        if (outer := RUN.get()) is not None:
            # An interval given as an argument, or of a pipeline inside the pipeline, counts instead.
            outer.superseded = True
        for stage in set(self.stages.values()):
            for target, put in stage.plan.targets():
                intercept(target, put)
                self.targets.append(target)
        self.token = RUN.set(self)
        return self

    def __exit__(self, *error) -> None:
        RUN.reset(self.token)
        for target in self.targets:
            release(target)

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

    def _refuse_without_second_prediction(self, distilled: bool) -> None:
        """Raises ValueError, before the first step, for a call that will make one prediction a step.

        Of a distilled network that is every call without true guidance; of others (Qwen-Image) one that asks for it,
        if only by its default, and gives no negative prompt. A weight of 1 there turns guidance off on purpose.
        """
        scale = self.arguments.get("true_cfg_scale")
        negative = [value for name, value in self.arguments.items() if name.startswith("negative_prompt")]
        if not negative or (_above_one(scale) and any(value is not None for value in negative)):
            return
        if distilled:
            raise ValueError(f"{self.name} {DISTILLED} to leave out. {_TRUE_GUIDANCE}; {NOT_LIMITED}")
        if _above_one(scale):
            raise ValueError(
                f"{self.name} was called with true_cfg_scale={scale!r} and without a negative prompt, so that there is"
                f" no unconditional prediction; {_TRUE_GUIDANCE}"
            )

    def raise_without_guidance(self) -> None:
        """Check, after the call, that it was guided where it should be.

        Raises:
            ValueError: if there was no unconditional prediction, though one should be.
        """
        if self.distilled:
            raise ValueError(f"{self.name} {DISTILLED} to leave out. {_TRUE_GUIDANCE}; {NOT_LIMITED}")
        asked = {name: value for name, value in self.scales.items() if _above_one(value)}
        if asked or self.guider:
            raise ValueError(
                f"{self.name} was called with {_listed(asked or self.scales)}, but no unconditional prediction was"
                f" seen; {_TRUE_GUIDANCE if 'true_cfg_scale' in self.scales else NOT_LIMITED}"
            )


def _takes_true_guidance(plan: Plan) -> bool:
    return "true_cfg_scale" in inspect.signature(plan.code).parameters


def _is_distilled(plan: Plan) -> bool:
    """Whether the weight is an input of the network, as Flux's is."""
    configs = [getattr(module, "config", {}) for module in plan.networks.values()]
    return any(config.get("guidance_embeds") for config in configs)


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


def _above_one(scale: Any) -> bool:
    if isinstance(scale, list | tuple):
        return any(map(_above_one, scale))
    return isinstance(scale, Real) and scale > 1


def _listed(scales: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in scales.items()) or "it takes no guidance scale"


def _range(steps: list[GuidedStep]) -> str:
    sigmas = [step.sigma for step in steps if step.sigma is not None]
    return f"sigma {max(sigmas):.4g} to {min(sigmas):.4g}" if sigmas else f"{steps[0].index} to {steps[-1].index}"
