"""Whether a pipeline guides as a layout says, by numbers: what reaches `scheduler.step` tells.

Nearly all pipelines hand their scheduler an affine combination of the parts x_i of what the network predicted,

    m = s (x_cond + sum_i k_i (x_i - x_cond)),  s = 1, or -1 where the prediction is negated,

with weights for each sample. Least squares gives them; guidance with a weight above 1 gives the conditional part a
weight above 1, and the unconditional one a weight below 0.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .rows import tensors_in


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
