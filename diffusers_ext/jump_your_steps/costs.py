r"""What a step costs, and the steps of least total cost.

A step from grid point i is as good as what it holds is still right at the points k that it passes. With the true
reverse rates R_k and those that the step uses there, F_ik, both out of the tokens x_k, a step from i to j costs the
sum over its time of

.. math:: d(k, i) = E \sum_{y \ne x_k} D\big(R_k(x_k, y), F_{ik}(x_k, y)\big)

What is held (`Cost.held`):

"rates": the rates of the start, F_ik = R_i(x_i, y): tau-leaping as Jump Your Steps (2410.07761) measures it.
"prediction": what the network says at the start about the clean token of each position, given the other positions;
    rates follow from it as time goes on. This is what a tweedie step does, and an euler step of the absorbing kernel
    with loglinear noise. For the absorbing kernel F_ik(y) = lambda(t_k) p_i(y), where masks are decoded at the rate
    lambda = sigma / (exp(sigma_bar) - 1) and p_i is the law of the token.

The divergence (`Cost.objective`):

"klub": R log(R / F), the paper's bound without the terms that hold no logarithm.
"kl": R log(R / F) - R + F, the Kullback-Leibler divergence of the paths. With a held prediction that is right for each
    position alone, a step of the absorbing kernel costs the total correlation of the tokens that it draws at once.
"alpha": [alpha R + (1 - alpha) F - R^alpha F^(1 - alpha)] / (alpha (1 - alpha)); tends to "kl" for alpha to 1.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..schedulers import CTMCScheduler

FLOOR = 1e-8  # the authors' floor inside the logarithm


@dataclass(frozen=True)
class Cost:
    """What is counted as a step's cost; see the module.

    Attributes:
        objective: "klub", "kl" or "alpha".
        alpha: in (0, 1), of objective="alpha".
        held: what a step holds, "prediction" or "rates".

    Raises:
        ValueError: for anything else.
    """

    objective: str = "kl"
    alpha: float | None = None
    held: str = "prediction"

    def __post_init__(self) -> None:
        if self.objective not in ("klub", "kl", "alpha"):
            raise ValueError(f'objective must be "klub", "kl" or "alpha", got {self.objective!r}')
        if self.held not in ("prediction", "rates"):
            raise ValueError(f'held must be "prediction" or "rates", got {self.held!r}')
        if (self.objective == "alpha") != (self.alpha is not None):
            raise ValueError(f'alpha belongs to objective="alpha", got {self.objective=}, {self.alpha=}')
        if self.alpha is not None and not 0 < self.alpha < 1:
            raise ValueError(f'alpha must be in (0, 1), got {self.alpha}; at 1 it is objective="kl"')
        if self.objective == "klub" and self.held != "rates":
            raise ValueError('objective="klub" is the paper\'s and about held rates; pass held="rates"')

    @property
    def holds_prediction(self) -> bool:
        """Whether the prediction of clean tokens is held, or the rates."""
        return self.held == "prediction"

    def __str__(self) -> str:
        alpha = "" if self.alpha is None else f" {self.alpha:g}"
        return f"{self.objective}{alpha} of held {self.held}"

    # The divergence summed over y is a product of two matrices, left(R) and right(F), and sums of R and of F alone.

    def left(self, rates: torch.Tensor) -> torch.Tensor:
        """left(R), of rates of any shape.

        Args:
            rates: R, of any shape.
        """
        return rates if self.alpha is None else rates**self.alpha

    def right(self, held: torch.Tensor) -> torch.Tensor:
        """right(F), of held rates of any shape.

        Args:
            held: F, of any shape.
        """
        return (held + FLOOR).log() if self.alpha is None else held ** (1 - self.alpha)

    def from_products(self, cross: torch.Tensor, total: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """d(k, i) of cross[k, i] = sum left(R_k) right(F_ik), total[k] = sum R_k and held[k, i] = sum F_ik.

        Args:
            cross: sum left(R_k) right(F_ik), (k, i).
            total: sum R_k, (k,).
            held: sum F_ik, (k, i).
        """
        gain = cross.diagonal().unsqueeze(1) - cross  # round-off cancels where R_k and F_ik are the same
        if self.objective == "klub":
            return gain
        further = held - total.unsqueeze(1)
        if self.alpha is None:
            return gain + further
        return gain / (self.alpha * (1 - self.alpha)) + further / self.alpha  # for cross[k, k] is total[k]

    def divergence(self, rates: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """D(R, F), elementwise.

        Args:
            rates: R.
            held: F, of the same shape.
        """
        gain = self.left(rates) * (self.right(rates) - self.right(held))
        if self.objective == "klub":
            return gain
        if self.alpha is None:
            return gain + (held - rates)
        return gain / (self.alpha * (1 - self.alpha)) + (held - rates) / self.alpha


@dataclass(frozen=True)
class Grid:
    """Points at which the rates are known, in the direction of sampling: times, or counts of decoded tokens."""

    points: tuple[float, ...]
    counts: bool

    @classmethod
    def of(cls, scheduler: CTMCScheduler, length: int, size: int) -> "Grid":
        """size + 1 even points; for gillespie counts, of every token where the sequence is no longer than size.

        Raises:
            ValueError: for a size below 2.
        """
        if size < 2:
            raise ValueError(f"grid_size must be >= 2, got {size}")
        if scheduler.sampler.counts_tokens:
            points = torch.linspace(0, length, min(size, length) + 1, dtype=torch.float64).round().long()
            return cls(tuple(points.tolist()), True)
        points = torch.linspace(1, scheduler.config.min_timestep, size + 1, dtype=torch.float64)
        return cls(tuple(points.tolist()), False)

    @property
    def size(self) -> int:
        """The number of intervals, one less than that of points."""
        return len(self.points) - 1

    def step_costs(self, divergence: torch.Tensor) -> torch.Tensor:
        """C[i, j], the cost of a step from point i to a later point j, infinite for others; (grid, grid) float64.

        Args:
            divergence: d(k, i), (grid, grid) float64. Times: the integral of d(., i), by the trapezoid rule. Counts:
                the sum of d(k, i) over the counts k from i up to j, j excluded; between grid points d is interpolated.
        """
        spacing = torch.tensor(self.points, dtype=torch.float64).diff().abs()
        end = (spacing - 1) / (2 * spacing) if self.counts else torch.full_like(spacing, 0.5)
        costs = torch.full_like(divergence, math.inf)
        for i in range(self.size + 1):
            d = divergence[i:, i]
            parts = spacing[i:] * (d[:-1] * (1 - end[i:]) + d[1:] * end[i:])
            costs[i, i:] = torch.cat([parts.new_zeros(1), parts.cumsum(0)])
        return costs

    def even(self, steps: int) -> list[int]:
        """Grid indices of `steps` steps of equal length, as nearly as the grid has them."""
        return [round(i * self.size / steps) for i in range(steps + 1)]


def cheapest_schedules(costs: torch.Tensor, numbers: list[int], free_end: bool) -> dict[int, tuple[list[int], float]]:
    """Grid indices of the steps of least total cost, and the cost, for each number of steps.

    By dynamic programming over the grid: the cheapest way to point j in n steps goes on from the cheapest way to some
    i in n - 1.

    Args:
        costs: (grid, grid), see `Grid.step_costs`.
        numbers: of steps.
        free_end: the last edge may lie anywhere, and what is left from there to the end of the grid is one more step,
            the final denoising; else it is the grid's last point.

    Raises:
        ValueError: for more steps than the grid has, and for costs that are not a number.
    """
    size = len(costs) - 1
    if costs.isnan().any():  # which min() takes for the cheapest
        start, end = costs.isnan().nonzero()[0].tolist()
        raise ValueError(f"the cost of the step from grid point {start} to {end} is not a number")
    if not numbers or min(numbers) < 1 or max(numbers) > size - free_end:
        raise ValueError(f"numbers of steps must be in [1, {size - free_end}] on a grid of {size}, got {numbers}")
    later = torch.ones_like(costs, dtype=torch.bool).triu(1)
    steps = torch.where(later, costs, math.inf)
    reached, came_from = steps[0], [torch.zeros(size + 1, dtype=torch.int64)]
    schedules = {}
    for n in range(1, max(numbers) + 1):
        if n > 1:
            reached, before = (reached.unsqueeze(1) + steps).min(dim=0)
            came_from.append(before)
        if n in numbers:
            ends = reached + steps[:, -1] if free_end else reached
            last = int(ends[:-1].argmin()) if free_end else size
            path = [last]
            for before in reversed(came_from):
                path.append(int(before[path[-1]]))
            schedules[n] = (path[::-1], float(ends[last]))
    return schedules


def total_cost(costs: torch.Tensor, path: list[int], free_end: bool) -> float:
    """The cost of the steps between the grid points of a path, and with free_end of the one to the grid's end.

    Args:
        costs: (grid, grid), see `Grid.step_costs`.
        path: indices of grid points, in order.
        free_end: as of `cheapest_schedules`.
    """
    ends = [*path, len(costs) - 1] if free_end and path[-1] < len(costs) - 1 else path
    return float(sum(costs[i, j] for i, j in pairwise(ends)))
