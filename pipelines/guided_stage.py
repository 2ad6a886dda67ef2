"""A pipeline in a call under guidance: what its networks are answered, in one batch or in two calls."""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .applied_guiders import second_answer, weight_of_call
from .guidance_layouts import REFUSED_CALLS, Layout
from .interceptors import intercept, into_scheduler
from .interval import StepStart, Walk
from .layout_proof import NOT_LIMITED, Fit, Proof, Record, differs, listed_rows, stacked
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

_EMBEDDED = ("guidance", "guidance_scale", "embedded_guidance", "guidance_scale_embeds", "timestep_cond")


@dataclass
class GuidedStep:
    """One sampling step: its number in the schedule as set, its starting noise level, and what the network did.

    Attributes:
        index: of the step in the schedule as set.
        sigma: the EDM noise-to-signal ratio, None where the scheduler has none.
        guided: whether guidance was applied.
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
    """What the interval did in one call of the pipeline, step by step.

    Attributes:
        steps: of the call, in order.
    """

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


class Stage(Proof):
    """A pipeline (`Plan`) of a `Run`: answers the calls of its networks, and sees the steps of its schedulers."""

    def __init__(self, run: Any, plan: Any, verify: bool, as_given: bool):
        self.run, self.plan, self.pipe, self.name = run, plan, plan.pipe, type(plan.pipe).__name__
        self.listed = plan.source == "listed"
        # Whether the layout is still to be proved; what a listed pipeline hands its scheduler is left as it is.
        self.unproved = not self.listed or verify
        # Whether it is proved before anything is changed: the first steps are run in full, whatever they are to be.
        self.proves = plan.source == "proposed" or (plan.source == "given" and plan.readable and not as_given)
        self.names = {id(module): name for name, module in plan.networks.items()}
        self.own_schedulers = {number: f"{name}_scheduler" for number, name in self.names.items()}
        self.timesteps: dict[int, list[str]] = {}  # names of arguments
        self.parameters = {id(module): parameters_of(module) for module in plan.networks.values()}
        self.walks: dict[int, Walk] = {}
        self.walk: Walk | None = None
        self.layout: Layout | None = None
        self.start: StepStart | None = None
        self.first: int | None = None
        self.step: GuidedStep | None = None
        self.guided: bool | None = None
        self.rows: int | None = None  # of the sample that the scheduler was given last
        self.records: list[Record] = []
        self.conditional: dict[str, tuple[GuidedStep, Any, dict]] = {}
        self.waiting: set[str] = set()
        self.fit: tuple[int, Fit] | None = None
        self.filling: list[str] | None = None
        self.checked: set[int] = set()
        self.tried: set[int] = set()
        self.counted: dict[int, list[Any]] = {}  # attention processors that know the number of rows
        self.early = 0

    def call(self, module: torch.nn.Module, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Answer a call of a network.

        Raises:
            ValueError: where the pipeline does not do as its layout says.
        """
        arguments = dict(zip(self.parameters[id(module)], args, strict=False))
        arguments.update(kwargs)
        scheduler = self._scheduler(module)
        aside = None if self.plan.layout is None else self.plan.layout.aside
        if aside is not None and aside(arguments):
            return call(*args, **kwargs)
        if id(scheduler) not in self.run.prepared:  # before the sampling loop
            self.early += not self.listed
            if self.early > 2:
                raise ValueError(f"{self.name} samples without setting its scheduler's timesteps; {NOT_LIMITED}")
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
        """The scheduler that a network's predictions are for; one that the call itself made is seen from now."""
        held = self.pipe.__dict__
        scheduler = held.get(self.own_schedulers[id(module)]) or held.get("scheduler")
        if scheduler is None:
            found = schedulers_of(self.pipe)
            if len(found) != 1:
                raise ValueError(f"{self.name} steps no scheduler that could be found; {NOT_LIMITED}")
            scheduler = found[0]
        if id(scheduler) not in self.run.of_scheduler and hasattr(scheduler, "timesteps"):
            intercept(scheduler, into_scheduler)
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
            names = self.timesteps[id(module)] = [name for name in arguments if is_timestep(name)]
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
        reason, refused = REFUSED_CALLS.get(stock_class(self.pipe).__name__, ("", None))
        if self.listed and refused is not None and refused(self.arguments):
            raise ValueError(f"{self.name} {reason}, or {NOT_LIMITED}")
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
        """Run the parts that unguided steps need, and compare with all rows once where a row is not clear."""
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
        """Attention that knows the parts (perturbed-attention guidance) or the rows (Text2Video-Zero's)."""
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
        for one, other in zip(stacked(ours, rows), stacked(theirs, rows), strict=True):
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
        if stateful := stateful_hooks(module):
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

        if rows.listed and isinstance(listed_rows(output, rows), list):
            listed = listed_rows(output, rows)
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
            self.records.append(Record(kind, rows, output, problem, everything))


def stateful_hooks(module: torch.nn.Module) -> list[str]:
    """Names of diffusers' hooks that keep something between the calls of a network, as `enable_cache` puts them in."""
    registries = (part.__dict__.get("_diffusers_hook") for part in module.modules())
    hooks = [hook for registry in registries if registry is not None for hook in registry.hooks.values()]
    return sorted({type(hook).__name__ for hook in hooks if getattr(hook, "_is_stateful", False)})


def schedulers_of(pipe: DiffusionPipeline) -> list[Any]:
    """The components that are stepped."""
    components = pipe.components.values()
    return [one for one in components if hasattr(one, "set_timesteps") and hasattr(one, "step")]


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
    times = [next((one[name] for name in one if is_timestep(name)), None) for one in (first, second)]
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


def _with_rows(output: Any, rows: Rows, new: list) -> Any:
    if isinstance(output, list) and len(output) == rows.total:
        return new
    if isinstance(output, dict):
        items = {key: _with_rows(item, rows, new) for key, item in output.items()}
        return type(output)(**items) if hasattr(output, "to_tuple") else items
    return type(output)(_with_rows(item, rows, new) for item in output) if isinstance(output, list | tuple) else output


def _with_head(part: torch.Tensor, head: torch.Tensor, count: int | None) -> torch.Tensor:
    """A tensor with other first channels; the head is all of it if count is None."""
    return head if count is None else torch.cat([head[:, :count], part[:, count:]], dim=1)


def _image_tokens(output: Any, count_tokens: int) -> Any:
    return map_tensors(lambda tensor: tensor[:, -count_tokens:], output)


def stock_class(pipe: DiffusionPipeline) -> type:
    """The class of a pipeline without its guidance."""
    return type(pipe).__mro__["_guidance_interval" in pipe.__dict__]


def is_timestep(name: str) -> bool:
    """Whether a network is told the time in the argument of this name."""
    return name in ("t", "r") or ("timestep" in name and name != "timestep_cond")


def parameters_of(module: torch.nn.Module) -> list[str]:
    """Names of the arguments of a network's forward."""
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    return list(inspect.signature(type(module).forward).parameters)[1:]
