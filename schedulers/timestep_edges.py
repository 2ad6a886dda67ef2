"""The edges of the steps of a schedule as data."""

from itertools import pairwise
from numbers import Real


def check_edges(edges: list[float], name: str, steps: str | None = None) -> None:
    """Raise ValueError unless the edges of a schedule decrease strictly in (0, 1], n + 1 of them for n steps."""
    numbers = isinstance(edges, list | tuple) and all(isinstance(t, Real) and not isinstance(t, bool) for t in edges)
    if not numbers or len(edges) < 2 or not all(a > b for a, b in pairwise(edges)) or edges[0] > 1 or edges[-1] <= 0:
        raise ValueError(f"{name} must be at least two strictly decreasing numbers in (0, 1], got {edges!r:.200}")
    if steps is not None and str(len(edges) - 1) != str(steps):
        raise ValueError(f"{name} must be named by its number of steps and hold one edge more, got {len(edges)} edges")
    if steps is not None and edges[0] != 1:
        raise ValueError(f"{name} must begin at 1, where the prior is drawn, got {edges[0]!r}")
