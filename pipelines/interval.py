"""The interval of noise levels in which guidance is on, and where in its schedule a sampler stands.

Kynkäänniemi, Aittala, Karras, Laine, Aila, Lehtinen: Applying Guidance in a Limited Interval Improves Sample and
Distribution Quality in Diffusion Models, NeurIPS 2024, arXiv 2404.07724.
"""

import math
import re
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

SIGMA_UNITS = ("edm", "flow")
FLOW_SCHEDULER = re.compile(r"Flow|EulerAncestralRF|Piflow|Helios|MiniMax")


class Interval:
    r"""The noise levels, or the steps, in which guidance is on.

    .. math:: w(\sigma) = w \text{ if } \sigma_{lo} < \sigma \le \sigma_{hi}, \text{ else } 1

    Args:
        sigma_lo: guide in steps that start above it; by default 0. At least one of the two sigmas.
        sigma_hi: guide in steps that start at it or below; by default infinity.
        guided_steps: instead of sigmas, (first, last) inclusive, counted from 0 in the schedule as set; step [a, b] is
            (sigma_{b+1}, sigma_a].
        sigma_unit: of the sigmas, "edm" for the ratio of the standard deviations of noise and signal, whatever the
            scheduler's own unit, or "flow" for the sigma in [0, 1] of flow matching, which is sigma / (1 - sigma) in
            the other.
        guidance_interval: (sigma_lo, sigma_hi), both at once.

    Raises:
        ValueError: for anything else.
    """

    def __init__(
        self,
        sigma_lo: float | None = None,
        sigma_hi: float | None = None,
        guided_steps: tuple[int, int] | None = None,
        sigma_unit: str = "edm",
        guidance_interval: tuple[float, float] | None = None,
    ):
        if sigma_unit not in SIGMA_UNITS:
            raise ValueError(f'sigma_unit must be "edm" or "flow", got {sigma_unit!r}')
        by_sigma = sigma_lo is not None or sigma_hi is not None
        if [by_sigma, guided_steps is not None, guidance_interval is not None].count(True) != 1:
            raise ValueError(
                "give either sigma_lo and sigma_hi, or guided_steps=(first, last), or both bounds as"
                f" guidance_interval=(sigma_lo, sigma_hi); got {sigma_lo=}, {sigma_hi=}, {guided_steps=},"
                f" {guidance_interval=}"
            )
        if guidance_interval is not None:
            by_sigma, (sigma_lo, sigma_hi) = True, interval_bounds(guidance_interval)
        self.guided_steps = None if guided_steps is None else _checked_steps(guided_steps)
        self.sigma_lo, self.sigma_hi = _checked_sigmas(sigma_lo, sigma_hi, sigma_unit) if by_sigma else (None, None)

    def __repr__(self) -> str:
        if self.guided_steps is not None:
            return f"steps {self.guided_steps[0]} to {self.guided_steps[1]}"
        return f"({self.sigma_lo:g}, {self.sigma_hi:g}]"

    def __contains__(self, step: "StepStart") -> bool:
        """Whether a step is guided.

        Raises:
            ValueError: if that cannot be told from this step.
        """
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
    """The argument (sigma_lo, sigma_hi) of a call as a pair.

    Raises:
        ValueError: for anything else.
    """
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

    Attributes:
        index: of the step, from 0.
        count: steps of the schedule.
        sigma: at which the step starts, EDM's ratio; None if the scheduler has none.
        scheduler: its class name.
    """

    index: int
    count: int
    sigma: float | None
    scheduler: str


class Walk:
    """Follows a sampler through the schedule of its scheduler, which is read from the device once.

    Args:
        scheduler: of the sampler.

    Attributes:
        position: index into `scheduler.timesteps` of the evaluation asked for last.
        next: of the one that is to come, where a call of `scheduler.step` has told; else None.
        walked: of the last one that the scheduler was stepped from.
    """

    def __init__(self, scheduler: SchedulerMixin):
        self.scheduler, self.start = scheduler, None
        self.position = self.next = self.walked = self.tensor = None
        # What a scheduler lacks is slow to ask for.
        self.pndm = hasattr(scheduler, "prk_timesteps")
        self.staged = hasattr(scheduler, "state_in_first_order")
        self.indexed = [name for name in ("step_index", "begin_index") if hasattr(type(scheduler), name)]

    def at(self, timestep: Any, strength: float | None = None) -> StepStart:
        """The step that a network evaluation belongs to; of later evaluations in one step the same object.

        Args:
            timestep: of the evaluation, as in `scheduler.timesteps`; one a frame where frames differ, whose noisiest
                counts; None for a network that is not told (Amused's), which begins at the last `strength` of the
                schedule.
            strength: share of the schedule that such a network walks; None for all of it.

        Raises:
            ValueError: if the timestep is not in the schedule.
        """
        self._read()
        if timestep is None and self.next is None:
            self.next = 0 if strength is None else len(self.timesteps) - int(len(self.timesteps) * strength)
        position = self.position_of(timestep)
        if position == self.position and self.start is not None:
            return self.start
        self.position = position
        if self.start is None or self._starts_a_step():
            index, count = self._number(position)
            if self.start is None or index != self.start.index:
                self.start = StepStart(index, count, self.sigmas[position], type(self.scheduler).__name__)
        return self.start

    def position_of(self, timestep: Any) -> int:
        """Index into scheduler.timesteps, preferably one that needs no transfer from the device."""
        for name in self.indexed:
            if isinstance(position := getattr(self.scheduler, name), int):
                return min(position, len(self.timesteps) - 1)
        if (position := self._place(timestep)) is not None:
            return position
        if self.next is None:
            self.next = self.nearest(timestep)
        return self.next

    def nearest(self, timestep: Any) -> int:
        """The index of a timestep by its value, which is read from the device; of several, the one to be expected.

        Raises:
            ValueError: for a timestep that is not in the schedule.
        """
        self._read()
        given, length = self._value(timestep), getattr(self.scheduler, "config", {}).get("num_train_timesteps", 1)
        found = []
        for t in (given, given * length, (1 - given) * length):  # some networks are told t / 1000, or 1 - t / 1000
            i = min(range(len(self.timesteps)), key=lambda i: (abs(self.timesteps[i] - t), i != self.next))
            found += [i] if self.is_at(t, i) else []
        if not found:
            raise ValueError(
                f"timestep {given:g} is not in the schedule of {type(self.scheduler).__name__}, so the step and its"
                " noise level are not known"
            )
        return next((i for i in (self.next, self.position, 0) if i in found), found[0])

    def is_at(self, timestep: Any, position: int) -> bool:
        """Whether a timestep is that of the schedule at a position, by its value."""
        t = self._value(timestep)
        return abs(self.timesteps[position] - t) <= 1e-3 * max(1.0, abs(t))

    def _value(self, timestep: Any) -> float:
        return float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)

    def _read(self) -> None:
        if self.tensor is not self.scheduler.timesteps:
            self.tensor = self.scheduler.timesteps
            self.timesteps = torch.as_tensor(self.tensor).tolist()
            self.sigmas = _edm_sigmas(self.scheduler, self.timesteps)
            self.position = self.next = self.walked = self.start = None

    def _place(self, timestep: Any) -> int | None:
        """Where a timestep lies in the tensor of the schedule, of which it is a view in most sampling loops."""
        if not (isinstance(timestep, torch.Tensor) and isinstance(self.tensor, torch.Tensor)):
            return None
        base = timestep._base
        if base is None or not (base is self.tensor or base is self.tensor._base) or any(timestep.stride()):
            return None
        return (timestep.storage_offset() - self.tensor.storage_offset()) // self.tensor.stride(0)

    def _starts_a_step(self) -> bool:
        scheduler = self.scheduler
        if self.pndm:  # four Runge-Kutta evaluations a step, or a first step of two
            prk = 0 if scheduler.config.skip_prk_steps else len(scheduler.prk_timesteps)
            if scheduler.counter < prk:
                return scheduler.counter % 4 == 0
            return not (scheduler.config.skip_prk_steps and scheduler.counter == 1)
        return not self.staged or scheduler.state_in_first_order

    def _number(self, position: int) -> tuple[int, int]:
        """The number of the step, and the number of steps."""
        scheduler = self.scheduler
        if self.pndm:
            # PNDM lists a timestep for each evaluation; _timesteps holds those of the steps, ascending
            starts = list(scheduler._timesteps)[::-1]
            return min(range(len(starts)), key=lambda i: abs(starts[i] - self.timesteps[position])), len(starts)
        stages = scheduler.order if self.staged else 1
        return position // stages, -(-len(self.timesteps) // stages)


def read_step(scheduler: SchedulerMixin, timestep: Any) -> StepStart:
    """The step of a schedule that starts at a timestep.

    Raises:
        ValueError: if the timestep is not in the schedule.
    """
    return Walk(scheduler).at(timestep)


def _edm_sigmas(scheduler: SchedulerMixin, timesteps: list[float]) -> list[float | None]:
    """The noise level of each timestep; None where the scheduler shows none."""
    sigmas, config = getattr(scheduler, "sigmas", None), getattr(scheduler, "config", {})
    if sigmas is not None and len(sigmas) >= len(timesteps):
        levels = torch.as_tensor(sigmas).tolist()
        if config.get("invert_sigmas", False):  # Mochi's run from 0, where all is noise, to 1
            return [edm_sigma(1 - level) for level in levels]
        flow = FLOW_SCHEDULER.search(type(scheduler).__name__) or config.get("use_flow_sigmas", False)
        # Cosmos Predict2 has its EDM sigmas, up to 80, in a scheduler for flows.
        return [edm_sigma(level) for level in levels] if flow and levels[0] <= 1 else levels
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        table = torch.as_tensor(scheduler.alphas_cumprod).tolist()
        alphas = [table[int(t)] for t in timesteps]
    elif hasattr(scheduler, "_alpha_cumprod"):
        alphas = [float(scheduler._alpha_cumprod(torch.as_tensor([t]), "cpu")) for t in timesteps]
    else:
        return [None] * len(timesteps)
    return [math.sqrt((1 - alpha) / alpha) if alpha > 0 else math.inf for alpha in alphas]
