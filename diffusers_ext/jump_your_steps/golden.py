"""The search of Jump Your Steps (2410.07761): golden section in every interval, level after level.

Each level halves every interval of the one before at the point where the objective is largest, so the numbers of
steps are powers of two. Edges are kept on a grid; before a level neighbours are moved at least two grid points apart,
after it at least one.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

PHI = 1.618  # as the authors write it
MAX_ITERATIONS = 32


@dataclass(frozen=True)
class Bracket:
    """Where the golden section looks in an interval, and when it stops.

    Attributes:
        margin: of the first bracket from either end of the interval.
        tolerance: width at which it stops.
    """

    margin: float
    tolerance: float

    @classmethod
    def of_times(cls, grid_size: int, margin: float) -> "Bracket":
        """In times of [0, 1], stopping at a quarter of the grid's spacing."""
        return cls(margin, 0.25 / grid_size)

    @classmethod
    def of_counts(cls) -> "Bracket":
        """In numbers of tokens, stopping where a quarter of a token is left."""
        return cls(1.001, 0.25)


def hierarchical_tables(middle: Callable[[int, int], int], size: int, levels: int) -> dict[int, list[int]]:
    """Indices of a grid for 2, 4, ..., 2 ** levels steps: every interval is split at its middle, level after level.

    Args:
        middle: the index at which to split the interval between two others.
        size: the index of the grid's last point.
        levels: of splits.

    Raises:
        ValueError: where the grid is too small for so many steps: 2 ** levels points are needed.
    """
    if levels < 1 or 2**levels > size:
        raise ValueError(f"2 ** {levels} = {2**levels} steps need a grid of as many intervals, this one has {size}")
    schedule, tables = [0, size], {}
    for _ in range(levels):
        edges = spread(schedule, 2, size)
        split = [0]
        for i, j in pairwise(edges):
            split += [middle(i, j), j]
        schedule = spread(split, 1, size)
        tables[len(schedule) - 1] = schedule
    return tables


def best_hierarchy(grid: Sequence[float], divergence: torch.Tensor, numbers: Sequence[int]) -> dict[int, list[int]]:
    """Indices of the grid for some powers of two, where the paper's objective is largest in every interval.

    Args:
        grid: values of the grid points.
        divergence: d(k, i) of the cost "klub", (grid, grid); the objective of splitting the interval from i to j at k
            is |t_k - t_j| d(k, i), for all k between them.
        numbers: of steps, powers of two.
    """
    points = torch.tensor(grid, dtype=torch.float64)

    def middle(i: int, j: int) -> int:
        values = (points[i + 1 : j] - points[j]).abs() * divergence[i + 1 : j, i]
        return i + 1 + int(values.argmax())

    tables = hierarchical_tables(middle, len(grid) - 1, levels_of(numbers))
    return {n: tables[n] for n in numbers}


def levels_of(numbers: Sequence[int]) -> int:
    """How many times intervals are halved for the largest of some powers of two."""
    return max(numbers).bit_length() - 1


def spread(schedule: Sequence[int], gap: int, size: int) -> list[int]:
    """Indices from 0 to size that lie at least gap apart: first each is moved up as far as needed, then down."""
    result = list(schedule)
    for i in range(len(result) - 1):
        if result[i + 1] - result[i] < gap:
            result[i + 1] = min(result[i] + gap, size)
    for i in range(len(result) - 1, 0, -1):
        if result[i] - result[i - 1] < gap:
            result[i - 1] = max(result[i] - gap, 0)
    return result


def nearest(grid: Sequence[float], value: float) -> int:
    """The index of the grid value nearest to one, the first of two equally near."""
    sign = 1 if grid[-1] > grid[0] else -1
    right = bisect_left(grid, sign * value, key=lambda entry: sign * entry)
    around = [i for i in (right - 1, right) if 0 <= i < len(grid)]
    return min(around, key=lambda i: abs(grid[i] - value))


def golden_middle(
    objective: Callable[[float, float, float], float], grid: Sequence[float], i: int, j: int, bracket: Bracket
) -> int:
    """The grid point nearest to the best of all points that a golden section between points i and j tries.

    Where the margins leave no room: the middle.

    Args:
        objective: of (start, middle, end), values of the grid; larger is better.
        grid: in the direction of sampling, times that decrease or counts of decoded tokens that increase.
        i: index of the one end.
        j: index of the other end.
        bracket: where to look, and when to stop.
    """
    start, end = grid[i], grid[j]
    low, high = min(start, end), max(start, end)
    tried: dict[float, float] = {}

    def value(middle: float) -> float:
        # A bracket whose margins cross has points beyond the interval, which have no meaning.
        tried[middle] = objective(start, middle, end) if low < middle < high else -math.inf
        if math.isnan(tried[middle]):
            raise ValueError(f"the objective at {middle:.6g} between {start:.6g} and {end:.6g} is not a number")
        return tried[middle]

    golden_section(value, low + bracket.margin, high - bracket.margin, bracket.tolerance)
    best = max(tried, key=tried.get)
    return nearest(grid, best if tried[best] > -math.inf else (start + end) / 2)


def golden_section(value: Callable[[float], float], a: float, c: float, tolerance: float) -> None:
    """Call value at the points at which the authors' search evaluates the bracket [a, c].

    Where a point is better than the best so far, b, only b moves to it; where not, it becomes the end on its side.
    """
    b = a + (c - a) / (1 + PHI)
    value(a)
    best = value(b)
    value(c)
    for _ in range(MAX_ITERATIONS):
        if c - a <= tolerance:
            break
        on_left = b - a > c - b
        x = b - (b - a) / (1 + PHI) if on_left else b + (c - b) / (1 + PHI)
        at_x = value(x)
        if at_x > best:
            b, best = x, at_x
        elif on_left:
            a = x
        else:
            c = x
