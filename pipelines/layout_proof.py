"""Whether a pipeline guides as a layout says, by numbers: what reaches `scheduler.step` tells.

Nearly all pipelines hand their scheduler an affine combination of the parts x_i of what the network predicted,

    m = s (x_cond + sum_i k_i (x_i - x_cond)),  s = 1, or -1 where the prediction is negated,

with weights for each sample. Least squares gives them; guidance with a weight above 1 gives the conditional part a
weight above 1, and the unconditional one a weight below 0.
"""

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .rows import Rows, split_rows, tensors_in

NOT_LIMITED = (
    "its guidance cannot be limited or replaced like this; give layout= if it guides in another way, or remove the"
    " interval with remove_guidance_interval(pipe)"
)


class Fit(NamedTuple):
    """What was found: sign s, weights (samples, parts) of the parts, which sum to 1, and how the parts were aligned.

    clear: whether the parts differ enough to tell them apart. exact: whether m is the combination, up to rounding;
    else it is the closest.
    """

    sign: float
    weights: torch.Tensor
    align: Callable[[torch.Tensor], torch.Tensor]
    clear: bool
    exact: bool

    def is_shown(self, cond: int) -> bool:
        """Whether the weights decide on a layout, for it or against it; equal parts leave nothing to decide."""
        weights = self.weights[:, cond]
        return self.exact and (not self.clear or bool((weights < 0.01).any() or (weights > 0.99).all()))

    def combined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The same combination of other parts, (samples, ...) each, as the scheduler is given it."""
        aligned = [self.align(part) for part in parts]
        shape = (-1, *(1,) * (aligned[0].ndim - 1))
        weights = self.weights.to(aligned[0].device, torch.float32)
        terms = [weights[:, i].reshape(shape) * part.float() for i, part in enumerate(aligned)]
        return self.sign * sum(terms)


def fit(m: torch.Tensor, parts: list[torch.Tensor], cond: int) -> Fit | None:
    """How m (samples, ...) combines the parts, each (samples, ...); None if they have nothing to do with its shape."""
    found = None
    for align in _alignments(parts[0], m):
        solved = _solve(m, [align(part) for part in parts], cond)
        if found is None or solved[-1]:
            found = Fit(solved[0], solved[1], align, *solved[2:])
        if found.exact:
            break
    return found


def tolerance(*tensors: torch.Tensor) -> float:
    """Relative differences that rounding can explain, with another number of rows in a batch."""
    exact = 1e-4 if tensors[0].device.type == "cpu" else 2e-3  # TF32
    floating = [torch.finfo(one.dtype).eps for one in tensors if one.is_floating_point()]
    return max([exact, *(8 * eps for eps in floating)])


def differs(one: Any, other: Any) -> bool:
    """Whether two outputs differ by more than rounding."""
    pairs = list(itertools.zip_longest(tensors_in(one), tensors_in(other)))
    for ours, theirs in pairs:
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return True
        if not (ours.float() - theirs.float()).norm() <= tolerance(ours, theirs) * theirs.float().norm() + 1e-12:
            return True
    return False


def _solve(m: torch.Tensor, parts: list[torch.Tensor], cond: int) -> tuple[float, torch.Tensor, bool, bool]:
    """Sign, weights, clearness and exactness by least squares for each sample, in float64."""
    rounding = tolerance(m, *parts)
    target, *flat = (part.detach().to("cpu", torch.float64).flatten(1) for part in (m, *parts))
    condition = flat[cond]
    others = [part - condition for i, part in enumerate(flat) if i != cond]
    # What rounding alone makes of two equal predictions is no difference.
    sizes = torch.stack([one.norm(dim=1) for one in others], dim=1)
    seen = (sizes > rounding * condition.norm(dim=1, keepdim=True)).all(dim=1)
    tried = []
    for sign in (1.0, -1.0):
        told, worst = seen.clone(), 0.0
        weights = torch.zeros(len(target), len(parts), dtype=torch.float64)
        for row in range(len(target)):
            rest = sign * target[row] - condition[row]
            # A large weight makes a small difference seen in what the scheduler is given.
            told[row] |= bool((sizes[row] > 0).all() and rest.norm() > 4 * rounding * target[row].norm())
            if told[row]:
                matrix = torch.stack([one[row] for one in others], dim=1)
                found = torch.linalg.lstsq(matrix, rest[:, None]).solution[:, 0]
                rest = rest - matrix @ found
                weights[row, [i for i in range(len(parts)) if i != cond]] = found
            weights[row, cond] = 1 - weights[row].sum()
            worst = max(worst, float(rest.norm() / target[row].norm().clamp(min=1e-30)))
        tried.append((sign, weights, bool(told.any()), worst <= 4 * rounding, worst))
    best = next((one for one in tried if one[3]), min(tried, key=lambda one: one[-1]))
    return best[:-1]


def _alignments(part: torch.Tensor, m: torch.Tensor) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Ways to see a part in the shape of m: as it is, some channels or tokens of it, transposed or reshaped."""
    if part.shape == m.shape:
        yield lambda x: x
        return
    if part.ndim == m.ndim and part.shape[:1] + part.shape[2:] == m.shape[:1] + m.shape[2:]:
        if part.shape[1] > m.shape[1]:
            count = m.shape[1]
            yield lambda x: x[:, :count]
            yield lambda x: x[:, -count:]
        return
    if part.numel() != m.numel() or part.shape[0] != m.shape[0]:
        return
    for order in itertools.permutations(range(1, part.ndim)):
        if torch.Size([part.shape[i] for i in (0, *order)]) == m.shape:
            yield lambda x, order=order: x.permute(0, *order)
    yield lambda x: x.reshape(m.shape)


class NotShown(Exception):
    """What the scheduler would be given in the first step does not show whether a layout that was given is right."""


class Record:
    """A denoiser's call since the last step of the scheduler: what it was asked, and what it gave for all rows.

    Args:
        kind: "whole" (all parts, as the pipeline asks for them), "cut" (fewer rows), or "plain".
        rows: that were run.
        output: of the network.
        problem: why nothing can be shown by it; None if something can.
        everything: what all rows gave where fewer were run for the answer.
    """

    def __init__(self, kind: str, rows: Rows, output: Any, problem: str, everything: Any):
        self.kind, self.rows, self.output, self.problem, self.everything = kind, rows, output, problem, everything


class Proof:
    """What a stage of a run does with the calls of its schedulers: prove its layout, and see that it holds."""

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
        if not walk.is_at(timestep, walk.position) or walk.walked == walk.position:
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
        outputs = [split_rows(tensor, self.layout.cut) for tensor in stacked(record.output, record.rows)]
        if record.everything is not None and self._difference(record.output, record.everything, record.rows):
            self._disagree("gives its conditional rows another prediction without the others")
        if self.unproved and record.kind == "whole":
            self._check_turns(m, record)
            return self._proved(m, outputs)
        return self._as_proved(m, outputs, record.kind)

    def _check_turns(self, m, record) -> None:
        """Raise if the parts take turns where the layout has one after the other, or the other way round."""
        cut, cond = self.layout.cut._replace(turns=not self.layout.cut.turns), self.layout.parts.index("cond")
        for tensor in stacked(record.output, record.rows) if len(m) > 1 else []:
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
        pairs = zip(stacked(record.output, record.rows), stacked(record.everything, record.rows), strict=True)
        for ours, theirs in pairs:
            for sign in (1, -1):
                if ours.shape == m.shape and not differs(m, sign * ours):
                    return (sign * theirs).to(m.dtype)
        self._disagree(f"runs {record.rows.total} rows for as many samples, which are not in several parts")

    def _check_plain(self, m, record) -> None:
        parts = self.layout.cut.parts
        if record.rows.total % parts or m.shape[0] % parts:
            return
        for tensor in stacked(record.output, record.rows):
            found = fit(m[: m.shape[0] // parts], split_rows(tensor, self.layout.cut), self.layout.parts.index("cond"))
            if found is not None and found.exact and found.clear and (found.weights.abs() > 0.01).sum(dim=1).max() > 1:
                self._disagree("keeps the samples themselves in a batch of several parts")

    def _check_alone(self, m, record) -> None:
        """In a step without unconditional prediction, after one that had it, nothing of the latter may be left."""
        if not self.run.guidable or (self.fit is None and not self.unproved):
            return
        fits = (fit(m, [tensor] * 2, 0) for tensor in stacked(record.output, record.rows))
        if not any(found is not None and found.exact for found in fits):
            self._disagree("hands its scheduler something else than the only prediction of a step")

    def _checked_calls(self, m):
        if any(record.rows.total != self.rows for record in self.records):
            self._disagree(f"runs {[one.rows.total for one in self.records]} rows for {self.rows} samples")
        if len(self.records) == 1:
            outputs = [[tensor] * 2 for tensor in stacked(self.records[0].output, self.records[0].rows)]
            if self.fit is not None and not self._is_guided():
                return self._as_proved(m, outputs, "cut")
            self._check_alone(m, self.records[0])
            return m
        self._counts()
        first, second = self.records
        if second.kind == "cut":
            return self._as_proved(m, [[one] * 2 for one in stacked(first.output, first.rows)], "cut")
        both = zip(stacked(first.output, first.rows), stacked(second.output, second.rows), strict=False)
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
                raise NotShown
        self._judge(found)
        exact = found is not None and found.exact
        self.fit = (number, found) if exact and not self.unproved else None
        if self._is_guided() and self.run.guider is None:
            return m
        if not exact:
            self._disagree("hands its scheduler something that a guider cannot take the place of")
        return self._replaced(m, found, outputs[number], number)

    def _judge(self, found: Fit | None) -> None:
        """Whether a fit says what the layout says. Raises ValueError if not, or if neither it nor the user says so."""
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
        """With a layout that is proved or given: in an unguided step the conditional prediction must arrive."""
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
        if self.proves and (found is None or not found.exact):
            self._disagree("hands its scheduler something else than a combination of the predictions of a step")
        if found is not None and found.clear and bool((found.weights[:, cond] < 0.01).any()):
            self._judge(found)

    def _verify(self, m) -> None:
        """Prove the layout of a listed pipeline in its first guided step, if what reaches the scheduler tells."""
        if not self._is_guided() or not self.records or self.run.guider is not None or self.layout is None:
            return
        cond, outputs = self.layout.parts.index("cond"), []
        if self.layout.how == "calls" and len(self.records) == 2:
            both = zip(*(stacked(one.output, one.rows) for one in self.records), strict=False)
            outputs = [list(pair) for pair in both]
        elif self.layout.how != "calls" and len(self.records) == 1 and self.records[0].kind == "whole":
            outputs = [
                split_rows(one, self.layout.cut) for one in stacked(self.records[0].output, self.records[0].rows)
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
        raise ValueError(f"{self.name} {what}; {NOT_LIMITED}")


@functools.cache
def _step_parameters(scheduler: type) -> list[str]:
    return list(inspect.signature(scheduler.step).parameters)[1:]


def listed_rows(output: Any, rows: Rows) -> list | None:
    """The list of rows in an output, if it is one."""
    if isinstance(output, list) and len(output) == rows.total:
        return output
    items = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return next((found for item in items if (found := listed_rows(item, rows)) is not None), None)


def stacked(output: Any, rows: Rows) -> list[torch.Tensor]:
    """The tensors of an output with an entry for each row."""
    if rows.listed and (listed := listed_rows(output, rows)) is not None:
        alike = all(isinstance(one, torch.Tensor) and one.shape == listed[0].shape for one in listed)
        return [torch.stack(listed)] if alike else []
    return [tensor for tensor in tensors_in(output) if len(tensor) and len(tensor) % rows.total == 0]
