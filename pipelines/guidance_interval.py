"""Classifier-free guidance in a limited interval of noise levels, for any diffusers pipeline that has guidance.

Kynkäänniemi, Aittala, Karras, Laine, Aila, Lehtinen: Applying Guidance in a Limited Interval Improves Sample and
Distribution Quality in Diffusion Models, NeurIPS 2024, arXiv 2404.07724.
"""

import functools
import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .denoiser_calls import (
    DenoiserCall,
    caches_of_rows,
    copy_tensors,
    count_rows,
    read_denoiser_call,
    spread_rows,
    take_rows,
    tensors_in,
    unclear_arguments,
)

SIGMA_UNITS = ("edm", "flow")
GUIDANCE_ARGUMENT = re.compile(r"(guidance|cfg)_scale$")
FLOW_SCHEDULER = re.compile(r"Flow|EulerAncestralRF|Piflow|Helios|MiniMax")
# What cannot be seen in the calls: the conditional network's output has the text in front of the image.
TEXT_BEFORE_IMAGE = {"Ideogram4Pipeline"}


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


class Interval:
    r"""The noise levels, or the steps, in which guidance is on.

    .. math:: w(\sigma) = w \text{ if } \sigma_{lo} < \sigma \le \sigma_{hi}, \text{ else } 1

    sigma_lo, sigma_hi: by default 0 and infinity; in units of `sigma_unit`, "edm" for the ratio of the standard
        deviations of noise and signal, whatever the scheduler's own unit, or "flow" for the sigma in [0, 1] of flow
        matching, which is sigma / (1 - sigma) in the other. At least one of the two.
    guided_steps: instead of sigmas, (first, last) inclusive, counted from 0 in the schedule as set; step [a, b] is
        (sigma_{b+1}, sigma_a].

    Raises ValueError for anything else.
    """

    def __init__(
        self,
        sigma_lo: float | None = None,
        sigma_hi: float | None = None,
        guided_steps: tuple[int, int] | None = None,
        sigma_unit: str = "edm",
    ):
        if sigma_unit not in SIGMA_UNITS:
            raise ValueError(f'sigma_unit must be "edm" or "flow", got {sigma_unit!r}')
        by_sigma = sigma_lo is not None or sigma_hi is not None
        if by_sigma == (guided_steps is not None):
            raise ValueError(
                "give either sigma_lo and sigma_hi, or guided_steps=(first, last), got"
                f" sigma_lo={sigma_lo!r}, sigma_hi={sigma_hi!r}, guided_steps={guided_steps!r}"
            )
        self.guided_steps = None if guided_steps is None else _checked_steps(guided_steps)
        self.sigma_lo, self.sigma_hi = _checked_sigmas(sigma_lo, sigma_hi, sigma_unit) if by_sigma else (None, None)

    def __repr__(self) -> str:
        if self.guided_steps is not None:
            return f"steps {self.guided_steps[0]} to {self.guided_steps[1]}"
        return f"({self.sigma_lo:g}, {self.sigma_hi:g}]"

    def __contains__(self, step: "StepStart") -> bool:
        """Whether a step is guided. Raises ValueError if that cannot be told from this step."""
        if self.guided_steps is not None:
            first, last = self.guided_steps
            if last >= step.count:
                raise ValueError(
                    f"guided_steps=({first}, {last}) reaches beyond the schedule, whose {step.count} steps are"
                    f" numbered 0 to {step.count - 1}; choose steps in it or set more inference steps"
                )
            return first <= step.index <= last
        if step.sigma is None:
            raise ValueError(
                f"{step.scheduler} shows neither sigmas nor alphas, so the noise level of a step is not known; use"
                " guided_steps=(first, last)"
            )
        return self.sigma_lo < step.sigma <= self.sigma_hi


def _checked_steps(guided_steps: Any) -> tuple[int, int]:
    valid = isinstance(guided_steps, tuple | list) and len(guided_steps) == 2
    valid = valid and all(isinstance(step, Integral) and not isinstance(step, bool) for step in guided_steps)
    if not valid or not 0 <= guided_steps[0] <= guided_steps[1]:
        raise ValueError(f"guided_steps must be (first, last) with 0 <= first <= last, got {guided_steps!r}")
    return int(guided_steps[0]), int(guided_steps[1])


def _checked_sigmas(sigma_lo: Any, sigma_hi: Any, sigma_unit: str) -> tuple[float, float]:
    highest = math.inf if sigma_unit == "edm" else 1.0
    sigma_lo = 0.0 if sigma_lo is None else sigma_lo
    sigma_hi = highest if sigma_hi is None else sigma_hi
    numbers = all(isinstance(sigma, Real) and not isinstance(sigma, bool) for sigma in (sigma_lo, sigma_hi))
    if not numbers or not 0 <= sigma_lo < sigma_hi <= highest:
        raise ValueError(
            f"need 0 <= sigma_lo < sigma_hi <= {highest:g} in {sigma_unit} units, got {sigma_lo=}, {sigma_hi=}"
        )
    if sigma_unit == "flow":
        return edm_sigma(sigma_lo), edm_sigma(sigma_hi)
    return float(sigma_lo), float(sigma_hi)


def interval_bounds(guidance_interval: Any) -> tuple[float, float]:
    """The argument (sigma_lo, sigma_hi) of a call as a pair. Raises ValueError for anything else."""
    if not isinstance(guidance_interval, tuple | list) or len(guidance_interval) != 2:
        raise ValueError(
            f"guidance_interval must be two noise levels, (sigma_lo, sigma_hi), or None, got {guidance_interval!r}"
        )
    return guidance_interval[0], guidance_interval[1]


def edm_sigma(flow_sigma: float) -> float:
    r"""Noise-to-signal ratio of x_t = (1 - s) x_0 + s noise at flow sigma s: s / (1 - s), infinite at 1."""
    return math.inf if flow_sigma >= 1 else float(flow_sigma) / (1 - float(flow_sigma))


@dataclass
class StepStart:
    """Where in its schedule a sampler stands: step `index` of `count`, starting from the EDM `sigma`.

    sigma: None if the scheduler has none. scheduler: its class name.
    """

    index: int
    count: int
    sigma: float | None
    scheduler: str


def read_step(scheduler: SchedulerMixin, timestep: Any, previous: StepStart | None = None) -> StepStart:
    """The step that a network evaluation belongs to; later evaluations in one step return `previous` itself.

    timestep: of the evaluation, as in `scheduler.timesteps`; one a frame where frames differ, whose noisiest counts.
    previous: what the last evaluation returned. Raises ValueError if the timestep is not in the schedule.
    """
    stages = _stages(scheduler)
    if previous is not None and not _starts_a_step(scheduler):
        return previous
    position, count = _position(scheduler, timestep), len(scheduler.timesteps)
    sigma = _sigma_at(scheduler, position)
    if hasattr(scheduler, "prk_timesteps"):
        # PNDM lists a timestep for each evaluation; _timesteps holds those of the steps, ascending
        starts = list(scheduler._timesteps)[::-1]
        index = min(range(len(starts)), key=lambda i: abs(starts[i] - float(scheduler.timesteps[position])))
        return StepStart(index, len(starts), sigma, type(scheduler).__name__)
    return StepStart(position // stages, -(-count // stages), sigma, type(scheduler).__name__)


def _stages(scheduler: SchedulerMixin) -> int:
    """Timesteps that the schedule lists for one step."""
    return scheduler.order if hasattr(scheduler, "state_in_first_order") else 1


def _starts_a_step(scheduler: SchedulerMixin) -> bool:
    if hasattr(scheduler, "prk_timesteps"):  # PNDM: four Runge-Kutta evaluations a step, or a first step of two
        prk = 0 if scheduler.config.skip_prk_steps else len(scheduler.prk_timesteps)
        if scheduler.counter < prk:
            return scheduler.counter % 4 == 0
        return not (scheduler.config.skip_prk_steps and scheduler.counter == 1)
    return getattr(scheduler, "state_in_first_order", True)


def _position(scheduler: SchedulerMixin, timestep: Any) -> int:
    """Index into scheduler.timesteps, preferably the scheduler's own, which needs no transfer from the device."""
    for name in ("step_index", "begin_index"):
        if isinstance(position := getattr(scheduler, name, None), int):
            return position
    t = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
    distances = [abs(other - t) for other in torch.as_tensor(scheduler.timesteps).tolist()]
    position = min(range(len(distances)), key=distances.__getitem__)
    if distances[position] > 1e-3 * max(1.0, abs(t)):
        raise ValueError(
            f"timestep {t:g} is not in the schedule of {type(scheduler).__name__}, so the step and its noise level are"
            " not known"
        )
    return position


def _sigma_at(scheduler: SchedulerMixin, position: int) -> float | None:
    sigmas, config = getattr(scheduler, "sigmas", None), getattr(scheduler, "config", {})
    if sigmas is not None and len(sigmas) > position:
        sigma = float(sigmas[position])
        if config.get("invert_sigmas", False):  # Mochi's run from 0, where all is noise, to 1
            return edm_sigma(1 - sigma)
        flow = FLOW_SCHEDULER.search(type(scheduler).__name__) or config.get("use_flow_sigmas", False)
        # Cosmos Predict2 has its EDM sigmas, up to 80, in a scheduler for flows.
        return edm_sigma(sigma) if flow and float(sigmas[0]) <= 1 else sigma
    t = scheduler.timesteps[position]
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        alpha_bar = float(scheduler.alphas_cumprod[int(t)])
    elif hasattr(scheduler, "_alpha_cumprod"):
        alpha_bar = float(scheduler._alpha_cumprod(torch.as_tensor([float(t)]), "cpu"))
    else:
        return None
    return math.sqrt((1 - alpha_bar) / alpha_bar) if alpha_bar > 0 else math.inf


class GuidanceInterval:
    """Limits the guidance of a pipeline to an interval of noise levels, and saves the rows that it then needs not run.

        with GuidanceInterval(pipe, sigma_lo=0.28, sigma_hi=5.42) as interval:
            images = pipe("an astronaut", guidance_scale=16).images
        print(interval.report)

    Outside of the interval every prediction is the conditional one, as with guidance weight 1, and the network is not
    run on the unconditional rows. The decision is made once a step, from the noise level at which the step starts,
    for all evaluations in it. How the pipeline calls its networks is read off the call (`denoiser_calls`). A batch
    in three parts (InstructPix2Pix) has two kinds of guidance, which are both on or both off.

    The pipeline becomes an instance of a subclass of the same name, whose `__call__` puts interceptors into the
    networks and takes them out again. Devices, offload hooks, compiled networks and pipelines that share a network
    are not touched. Like a pipeline itself, this is not made for calls from several threads.

    pipe: any diffusers pipeline that is not modular. The other arguments: see `Interval`.

    Raises ValueError for arguments out of range and for pipelines without a denoiser; a call raises ValueError where
    it guides in a way that is not understood, and warns where the interval has no effect.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        sigma_lo: float | None = None,
        sigma_hi: float | None = None,
        guided_steps: tuple[int, int] | None = None,
        sigma_unit: str = "edm",
    ):
        if not isinstance(pipe, DiffusionPipeline):
            raise ValueError(
                f"pipe must be a diffusers DiffusionPipeline, got {type(pipe).__name__}; for a modular pipeline use"
                " the guiders in diffusers_ext.guiders"
            )
        self.interval = Interval(sigma_lo, sigma_hi, guided_steps, sigma_unit)
        self.pipe = pipe
        self.report: GuidanceReport | None = None
        if not _denoisers(pipe):
            raise ValueError(
                f"{type(pipe).__name__} has no component that is called with a timestep; components are"
                f" {sorted(pipe.components)}"
            )

    def __repr__(self) -> str:
        return f"GuidanceInterval({type(self.pipe).__name__}, {self.interval})"

    def __enter__(self) -> "GuidanceInterval":
        self.attach()
        return self

    def __exit__(self, *error) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the interval in force for the pipeline's calls, in place of the one that is."""
        remove_guidance_interval(self.pipe)
        stock = type(self.pipe)
        arguments = inspect.signature(stock.__call__).parameters
        if not any(map(GUIDANCE_ARGUMENT.search, arguments)) and "guider" not in self.pipe.components:
            warnings.warn(f"{stock.__name__} takes no guidance scale: the interval has no effect", stacklevel=3)
        self.pipe.__class__ = _limited_class(stock)
        self.pipe.__dict__["_guidance_interval"] = self

    def detach(self) -> None:
        """Make the pipeline what it was, if this interval is in force."""
        if self.pipe.__dict__.get("_guidance_interval") is self:
            del self.pipe.__dict__["_guidance_interval"]
            self.pipe.__class__ = type(self.pipe).__mro__[1]

    def run(self, call: Callable, *args, **kwargs) -> Any:
        """Make one call of the pipeline, `call(pipe, ...)`, with the interval in force for this call alone.

        For pipelines that take the interval as an argument; after it, `report` tells what was done.
        """
        scales = _guidance_scales(call, args, kwargs)
        with _GuidedRun(self, sys._getframe()) as guided:
            result = call(*args, **kwargs)
        guided.check(scales)
        return result


def apply_guidance_interval(
    pipe: DiffusionPipeline,
    *,
    sigma_lo: float | None = None,
    sigma_hi: float | None = None,
    guided_steps: tuple[int, int] | None = None,
    sigma_unit: str = "edm",
) -> GuidanceInterval:
    """Limit the guidance of a pipeline from now on; a second time replaces the first.

    sigma_lo, sigma_hi, guided_steps, sigma_unit: see `Interval`. Raises ValueError as `GuidanceInterval`.
    """
    interval = GuidanceInterval(
        pipe, sigma_lo=sigma_lo, sigma_hi=sigma_hi, guided_steps=guided_steps, sigma_unit=sigma_unit
    )
    interval.attach()
    return interval


def remove_guidance_interval(pipe: DiffusionPipeline) -> None:
    """Guide the whole line again, bit for bit; nothing happens to a pipeline without an interval."""
    if (interval := pipe.__dict__.get("_guidance_interval")) is not None:
        interval.detach()


def guidance_report(pipe: DiffusionPipeline) -> GuidanceReport:
    """What the interval did in the pipeline's last call. Raises ValueError if there was no such call."""
    interval = pipe.__dict__.get("_guidance_interval")
    if interval is None or interval.report is None:
        raise ValueError(
            f"{type(pipe).__name__} has not been called with a guidance interval; use apply_guidance_interval, then"
            " call the pipeline"
        )
    return interval.report


@functools.cache
def _limited_class(stock: type) -> type:
    @functools.wraps(stock.__call__)
    def limited_call(self, *args, **kwargs):
        return self.__dict__["_guidance_interval"].run(stock.__call__, self, *args, **kwargs)

    names = {"__call__": limited_call, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), {**names, "__doc__": stock.__doc__})


def _guidance_scales(call: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The guidance scales that a call asks for, by name; empty if its arguments do not fit, which it then reports."""
    try:
        bound = inspect.signature(call).bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if GUIDANCE_ARGUMENT.search(name)}


def _denoisers(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The components that are called with a timestep; where there is none (Amused), the transformer or the UNet."""
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    timed = {name: module for name, module in modules.items() if _takes_timestep(_parameters(module))}
    return timed or {name: module for name, module in modules.items() if name in ("transformer", "unet")}


def _takes_timestep(parameters: list[str]) -> bool:
    return any(name in ("t", "r") or "timestep" in name for name in parameters)


def _parameters(module: torch.nn.Module) -> list[str]:
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    return list(inspect.signature(type(module).forward).parameters)[1:]


class _GuidedRun:
    """One call of a limited pipeline: the interceptors in its networks, and the state that they share."""

    def __init__(self, interval: GuidanceInterval, frame):
        self.interval, self.pipe, self.frame = interval.interval, interval.pipe, frame
        self.report = interval.report = GuidanceReport()
        self.start: StepStart | None = None
        self.step: GuidedStep | None = None
        self.scheduler: Any = None
        self.conditional: dict[str, tuple] = {}
        self.guidable: list[GuidedStep] = []
        self.clear: set[tuple] = set()
        self.filling: list[str] | None = None
        self.without_cache: set[torch.nn.Module] = set()
        self.over_frames: dict[torch.nn.Module, list[tuple]] = {}
        self.distilled = self.superseded = False
        self.replaced: list[tuple[torch.nn.Module, Any]] = []

    def __enter__(self):
        for name, module in _denoisers(self.pipe).items():
            if any(module is other for other, _ in self.replaced):
                continue
            # nn.Module.__call__ runs this in place of itself. Set past __setattr__, which torch.compile's wrapper
            # passes on to the module inside.
            self.replaced.append((module, module.__dict__.get("_compiled_call_impl")))
            call = module._compiled_call_impl or module._call_impl
            if (outer := getattr(call, "guided_run", None)) is not None:
                # An interval given as an argument, or of a pipeline inside the pipeline, counts instead.
                outer.superseded, call = True, call.beneath
            role = name if "control" in name.lower() else ""
            module.__dict__["_compiled_call_impl"] = self._interceptor(module, call, role)
        return self

    def __exit__(self, *error):
        for module, before in self.replaced:
            if before is None:
                module.__dict__.pop("_compiled_call_impl", None)
            else:
                module.__dict__["_compiled_call_impl"] = before
        self.conditional.clear()
        self.frame = None

    def _interceptor(self, module: torch.nn.Module, call: Callable, role: str) -> Callable:
        """What runs in place of a network. role: "" for the denoiser, else the name of what helps it."""
        parameters = _parameters(module)

        def intercept(*args, **kwargs):
            site = read_denoiser_call(module, sys._getframe(1), self.frame)
            if site is None or not self._is_ours(site.owner):
                return call(*args, **kwargs)
            arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
            step = self._at_step(site)
            if site.kind == "mixed":
                raise ValueError(
                    f"{type(self.pipe).__name__} calls its network again with the unconditional part of what it"
                    f" predicted; {_NOT_UNDERSTOOD}"
                )
            if site.kind == "split" and not (role and site.guess_mode):
                return self._split_call(module, call, args, kwargs, arguments, site, step, role)
            if site.kind == "unconditional":
                return self._second_call(module, call, args, kwargs, arguments, step, role)
            return self._plain_call(call, args, kwargs, arguments, site, step, role)

        intercept.guided_run, intercept.beneath = self, call
        return intercept

    def _is_ours(self, owner: Any) -> bool:
        """A pipeline that a callback runs with the same networks is none of ours; one inside the pipeline is."""
        if owner is self.pipe or not isinstance(owner, DiffusionPipeline):
            return True
        return any(owner is part for part in vars(self.pipe).values())

    def _at_step(self, site: DenoiserCall) -> GuidedStep:
        """The entry of the report that a call belongs to; a new one if a step begins."""
        scheduler = site.scheduler if hasattr(site.scheduler, "timesteps") else getattr(self.pipe, "scheduler", None)
        if scheduler is None:
            raise ValueError(f"{type(self.pipe).__name__} steps no scheduler that could be found; {_NOT_UNDERSTOOD}")
        if scheduler is not self.scheduler:
            self.scheduler, self.start = scheduler, None
        start = read_step(scheduler, site.timestep, self.start)
        if self.start is None or start.index != self.start.index:
            self.step = GuidedStep(start.index, start.sigma)
            self.report.steps.append(self.step)
            self._guided = None
            if self.distilled and not self.guidable:
                raise ValueError(_DISTILLED.format(type(self.pipe).__name__))
        self.start = start
        return self.step

    def _is_guided(self) -> bool:
        """The decision for the step, made where the step first shows that it has guidance."""
        if self._guided is None:
            self._guided = self.step.guided = self.start in self.interval
            self.guidable.append(self.step)
        return self._guided

    def _plain_call(self, call, args, kwargs, arguments, site, step, role):
        output = call(*args, **kwargs)
        if not role:
            step.rows += count_rows(arguments).total
            self.distilled = self.distilled or any(arguments.get(name) is not None for name in _EMBEDDED_SCALES)
        if site.context in (None, "cond", "pred_cond"):
            known = self.conditional.get(role)
            # Of several calls in a step the first is the conditional one; the others, like skip-layer guidance's,
            # come from other statements.
            if known is None or known[0] == site.site or known[1] is not step:
                self.conditional[role] = (site.site, step, output, arguments)
        return output

    def _second_call(self, module, call, args, kwargs, arguments, step, role):
        self._check_step_cache(module)
        conditional = self.conditional.get(role)
        if conditional is None or conditional[1] is not step:
            raise ValueError(
                f"{type(self.pipe).__name__} calls its network without the condition before it calls it with;"
                f" {_NOT_UNDERSTOOD}"
            )
        guided, rows = self._is_guided(), count_rows(arguments).total
        if self._fills_a_cache(arguments, conditional[3]) or guided:
            step.rows += 0 if role else rows
            output = call(*args, **kwargs)
            if guided:
                return output
        else:
            step.rows_saved += 0 if role else rows
        output = copy_tensors(conditional[2])
        if any(cls.__name__ in TEXT_BEFORE_IMAGE for cls in type(self.pipe).__mro__):
            return _image_tokens(output, count_tokens=arguments["hidden_states"].shape[1])
        return output

    def _fills_a_cache(self, arguments, conditional) -> bool:
        """Whether later unconditional calls need what this one keeps in a cache, which the conditional calls lack.

        The first call fills it (QwenImage21). Where later ones read it, an argument such as `kv_cache_mode` says so.
        """
        caches = {key: value for key, value in arguments.items() if "cache" in key and value is not None}
        own = any(value is not conditional.get(key) for key, value in caches.items() if not isinstance(value, str))
        mode = [value for value in caches.values() if isinstance(value, str)]
        self.filling = mode if self.filling is None else self.filling
        return own and mode == self.filling

    def _split_call(self, module, call, args, kwargs, arguments, site, step, role):
        rows, split = count_rows(arguments), site.split
        self._check_step_cache(module)
        self._check_split(rows, split, arguments)
        if self._is_guided():
            step.rows += 0 if role else rows.total
            return call(*args, **kwargs)
        kept = rows._replace(total=rows.total // split.parts * len(split.run))
        step.rows += 0 if role else kept.total
        step.rows_saved += 0 if role else rows.total - kept.total
        fewer_args = [take_rows(name, value, rows, split) for name, value in zip(arguments, args, strict=False)]
        fewer_kwargs = {name: take_rows(name, value, rows, split) for name, value in kwargs.items()}
        with self._perturbed_attention(split), self._attention_over_frames(module, split):
            output = spread_rows(call(*fewer_args, **fewer_kwargs), kept, split)
        if (site.site, rows.total) not in self.clear:
            self.clear.add((site.site, rows.total))
            unclear = [one for name, value in arguments.items() for one in unclear_arguments(name, value, rows)]
            if unclear and (tried := (type(self.pipe).__mro__[1], site.site)) not in _tried:
                step.rows += 0 if role else rows.total
                self._try_out(output, call(*args, **kwargs), split, unclear)
                _tried.add(tried)
        return output

    def _try_out(self, output, full, split, unclear) -> None:
        """Compare with the run on all rows, once for a pipeline whose arguments leave it unclear what a row is."""
        for ours, theirs in zip(tensors_in(output), tensors_in(full), strict=True):
            size = len(theirs) // split.parts
            part = slice(split.run[0], None, split.parts)
            part = part if split.interleaved else slice(split.run[0] * size, (split.run[0] + 1) * size)
            scale = theirs.float().abs().max() + 1e-6
            if ours.shape != theirs.shape or (ours[part] - theirs[part]).float().abs().max() > 0.02 * scale:
                raise ValueError(
                    f"{type(self.pipe).__name__} calls its network with {unclear}, of which it is unclear what belongs"
                    f" to which row; {_NOT_UNDERSTOOD}"
                )

    @contextmanager
    def _perturbed_attention(self, split):
        """Perturbed-attention guidance splits the rows inside of the network as well: into two now, not three."""
        if split.perturbed:
            self.pipe._set_pag_attn_processor(self.pipe.pag_applied_layers, do_classifier_free_guidance=False)
        try:
            yield
        finally:
            if split.perturbed:
                self.pipe._set_pag_attn_processor(self.pipe.pag_applied_layers, do_classifier_free_guidance=True)

    @contextmanager
    def _attention_over_frames(self, module, split):
        """Attention to the first frame of each row (Text2Video-Zero) knows the number of rows."""
        if module not in self.over_frames:
            processors = getattr(module, "attn_processors", {}).values()
            self.over_frames[module] = [(one, one.batch_size) for one in processors if hasattr(one, "batch_size")]
        try:
            for processor, rows in self.over_frames[module]:
                processor.batch_size = rows // split.parts * len(split.run)
            yield
        finally:
            for processor, rows in self.over_frames[module]:
                processor.batch_size = rows

    def _check_step_cache(self, module) -> None:
        """Raise if the network reuses what it computed in the step before (FirstBlockCache, FasterCache, ...)."""
        if module in self.without_cache:
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
        self.without_cache.add(module)

    def _check_split(self, rows, split, arguments) -> None:
        name = type(self.pipe).__name__
        if not split.run:
            raise ValueError(f"{name} splits its prediction in {split.parts} unclear parts; {_NOT_UNDERSTOOD}")
        if rows.total % split.parts:
            raise ValueError(
                f"{name} splits {rows.total} rows in {split.parts} parts, which does not go up; {_NOT_UNDERSTOOD}"
            )
        if torch.is_grad_enabled() and any(one.requires_grad for one in tensors_in(arguments)):
            raise ValueError(f"{name} takes the gradient of a batch of {split.parts} parts; {_NOT_UNDERSTOOD}")
        caches = [one for key, value in arguments.items() if "cache" in key for one in caches_of_rows(key, value)]
        if caches:
            raise ValueError(
                f"{name} keeps {caches} of all rows from call to call, so none can be left out; {_NOT_UNDERSTOOD}"
            )

    def check(self, scales: dict[str, Any]) -> None:
        """After the call: raise if guidance was asked for and not found, warn if the interval had no effect."""
        name, asked = type(self.pipe).__name__, {key: value for key, value in scales.items() if _above_one(value)}
        if self.guidable:
            guided = sum(step.guided for step in self.guidable)
            if guided in (0, len(self.guidable)):
                which = "none" if guided == 0 else "every one"
                warnings.warn(
                    f"the guidance interval {self.interval} holds {which} of the {len(self.guidable)} steps"
                    f" ({_range(self.guidable)})",
                    stacklevel=3,
                )
        elif self.superseded:
            return
        elif self.distilled:
            raise ValueError(_DISTILLED.format(name))
        elif asked:
            raise ValueError(
                f"{name} was called with {_listed(asked)}, but no unconditional prediction was seen;"
                f" {_TRUE_GUIDANCE if 'true_cfg_scale' in scales else ''}{_NOT_UNDERSTOOD}"
            )
        else:
            warnings.warn(
                f"guidance is off in this call ({_listed(scales)}): the interval has no effect", stacklevel=3
            )


# Calling statements whose arguments were unclear, and which were tried out.
_tried: set[tuple] = set()
_NOT_UNDERSTOOD = "a guidance interval cannot be applied to it; remove it with remove_guidance_interval(pipe)"
_TRUE_GUIDANCE = "turn guidance on with true_cfg_scale > 1 and a negative_prompt; as it is, "
_EMBEDDED_SCALES = ("guidance", "guidance_scale", "embedded_guidance", "guidance_scale_embeds", "timestep_cond")
_DISTILLED = (
    "{} hands the guidance scale to its network, which is distilled: there is no unconditional prediction to leave"
    " out. Where the pipeline has true classifier-free guidance, turn it on with true_cfg_scale > 1 and a"
    " negative_prompt; else remove the interval with remove_guidance_interval(pipe)"
)


def _image_tokens(output: Any, count_tokens: int) -> Any:
    if isinstance(output, tuple | list):
        return type(output)([_image_tokens(item, count_tokens) for item in output])
    return output[:, -count_tokens:] if isinstance(output, torch.Tensor) else output


def _above_one(scale: Any) -> bool:
    if isinstance(scale, list | tuple):
        return any(map(_above_one, scale))
    return isinstance(scale, Real) and scale > 1


def _listed(scales: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in scales.items()) or "it takes no guidance scale"


def _range(steps: list[GuidedStep]) -> str:
    sigmas = [step.sigma for step in steps if step.sigma is not None]
    return f"sigma {max(sigmas):.4g} to {min(sigmas):.4g}" if sigmas else f"{steps[0].index} to {steps[-1].index}"
