"""The best guidance interval and weight of a model, by the recipe of the guidance-interval paper.

Kynkäänniemi et al., NeurIPS 2024, arXiv 2404.07724, section 4: with sigma_lo = 0 search sigma_hi, then with that
sigma_hi search sigma_lo, for each guidance weight. Only which steps are guided can be told apart, so the search runs
over step boundaries. It goes in rounds, one for all weights, whose candidates can be drawn together.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path

from ..pipelines.call_arguments import checked_arguments
from ..runs.kept import Kept


@dataclass(frozen=True)
class GuidedSteps:
    """Guidance of weight `guidance_scale` at steps first to last, inclusive, counted from the noisiest, 0."""

    guidance_scale: float
    first: int
    last: int

    @property
    def key(self) -> str:
        """Its name in distances.json."""
        return f"weight {self.guidance_scale:g}, steps {self.first}-{self.last}"


@dataclass(frozen=True)
class IntervalSearch:
    """What a search found.

    Attributes:
        best_interval: the candidate of least distance.
        best_everywhere: the best of those that guide in every step.
        distances: of every candidate that was tried, with the lowest first.
        rows_asked: network rows that this start asked for.
        rows_run: those of `rows_asked` that were run and not remembered.
    """

    best_interval: GuidedSteps
    best_everywhere: GuidedSteps
    distances: dict[GuidedSteps, float]
    rows_asked: int = field(default=0, compare=False)
    rows_run: int = field(default=0, compare=False)


class DistanceTable:
    """The distance of each candidate, computed once and kept in a JSON file, where a second start finds it.

    Args:
        path: of the file.
        settings: JSON-able, all else that the distances depend on.
        compute: the distance of a candidate, lower is better.

    Attributes:
        rows: of candidates for which they are known, by key, the network rows that sampling takes.

    Raises:
        ValueError: for a file of something else or begun with other settings, and for a distance that is not finite.
    """

    def __init__(self, path: Path, settings: dict, compute: Callable[[GuidedSteps], float]):
        self.kept = Kept(path, settings, lambda content: all(map(isfinite, content["distances"].values())))
        self.compute = compute
        content = self.kept.load() or {}
        self.values: dict[str, float] = content.get("distances", {})
        self.rows: dict[str, int] = content.get("network_rows", {})

    def __call__(self, candidate: GuidedSteps) -> float:
        """The distance of a candidate, computed unless it is known."""
        if candidate.key not in self.values:
            self.add(candidate, float(self.compute(candidate)))
        return self.values[candidate.key]

    def add(self, candidate: GuidedSteps, distance: float, rows: int | None = None) -> None:
        """Keep a distance, and the network rows that the candidate's samples take.

        Raises:
            ValueError: as the class.
        """
        if not isfinite(distance):
            raise ValueError(f"the distance at {candidate.key} is {distance}; the samples must have gone wrong")
        self.values[candidate.key] = distance
        if rows is not None:
            self.rows[candidate.key] = rows
        self.kept.save(distances=self.values, network_rows=self.rows)


Rounds = Generator[list, dict, object]  # gives what is to be measured together, is sent the values, returns the best


@checked_arguments
def search_interval(
    distance: Callable[[GuidedSteps], float],
    guidance_scales: Iterable[float],
    num_steps: int,
    prepare: Callable[[list[GuidedSteps]], None] | None = None,
) -> IntervalSearch:
    """Try the whole line at each weight, then search where to begin, then where to end guidance.

    A search goes from coarse to fine: every fourth boundary, then the neighbours of the best at half the spacing, so
    that a weight takes some 2 log2(num_steps) + num_steps / 2 distances at most.

    Args:
        distance: of a candidate, best a `DistanceTable`.
        guidance_scales: the weights, each above 1.
        num_steps: steps of the sampler.
        prepare: called with the candidates of a round, of all weights, before their distances are asked for.

    Raises:
        ValueError: for no weight, a weight of at most 1, and fewer than 2 steps.
    """
    weights = sorted(set(map(float, guidance_scales)))
    if not weights or weights[0] <= 1:
        raise ValueError(f"guidance_scales must be numbers > 1, at least one, got {weights}; 1 is no guidance")
    if num_steps < 2:
        raise ValueError(f"num_steps must be >= 2, got {num_steps}")
    tried: dict[GuidedSteps, float] = {}

    def measure(candidate: GuidedSteps) -> float:
        tried[candidate] = found = distance(candidate)
        if not isfinite(found):  # min() may take NaN for the best
            raise ValueError(f"the distance at {candidate.key} is {found}; the samples must have gone wrong")
        return found

    searches = {weight: _of_weight(weight, num_steps) for weight in weights}
    waiting = {weight: next(search) for weight, search in searches.items()}
    while waiting:
        candidates = [candidate for ones in waiting.values() for candidate in ones]
        if prepare is not None:
            prepare(candidates)
        values = {candidate: measure(candidate) for candidate in candidates}
        waiting = {weight: more for weight in waiting if (more := _sent(searches[weight], values)) is not None}
    ordered = dict(sorted(tried.items(), key=lambda item: item[1]))
    everywhere = [candidate for candidate in ordered if (candidate.first, candidate.last) == (0, num_steps - 1)]
    return IntervalSearch(next(iter(ordered)), everywhere[0], ordered)


def _of_weight(weight: float, num_steps: int) -> Rounds:
    """The rounds of a weight: where to begin, then where to end."""
    end = num_steps - 1
    first = yield from _of_places(lambda i: GuidedSteps(weight, i, end), 0, end)
    yield from _of_places(lambda i: GuidedSteps(weight, first, i), first, end)


def _of_places(candidate: Callable[[int], object], low: int, high: int) -> Rounds:
    """The rounds of `coarse_to_fine`, over what stands for the integers; returns the best integer."""
    spacing = 4 if high - low >= 8 else max(1, (high - low) // 2)
    values: dict[int, float] = {}
    places = sorted({*range(low, high + 1, spacing), high})
    while True:
        if places:
            found = yield [candidate(i) for i in places]
            values |= {i: found[candidate(i)] for i in places}
        best = min(values, key=values.get)
        if spacing <= 1:
            return best
        spacing = (spacing + 1) // 2
        places = [i for i in (best - spacing, best + spacing) if low <= i <= high and i not in values]


def _sent(rounds: Rounds, values: dict) -> list | None:
    """The next round; None after the last."""
    try:
        return rounds.send(values)
    except StopIteration:
        return None


@checked_arguments
def coarse_to_fine(value: Callable[[int], float], low: int, high: int) -> int:
    """The integer of [low, high] with the least value found: every fourth one, then closer around the best."""
    rounds = _of_places(lambda i: i, low, high)
    places = next(rounds)
    while True:
        try:
            places = rounds.send({i: value(i) for i in places})
        except StopIteration as end:
            return end.value


@checked_arguments
def sigma_bounds(sigmas: list[float], candidate: GuidedSteps) -> tuple[float, float]:
    """(sigma_lo, sigma_hi] that guides exactly the candidate's steps.

    Each bound is the geometric middle between the last step inside and the first outside, so that round-off cannot
    move it; 0 and infinity at the ends.

    Args:
        sigmas: the noise level at each step's start, decreasing, and 0 after the last one.
        candidate: its weight and steps.

    Raises:
        ValueError: for a candidate that reaches beyond the sigmas.
    """
    first, last = candidate.first, candidate.last
    if not 0 <= first <= last <= len(sigmas) - 2:
        raise ValueError(f"sigmas must hold one more than the steps, {first} to {last} of the candidate, got {sigmas}")
    high = float("inf") if first == 0 else (sigmas[first] * sigmas[first - 1]) ** 0.5
    low = 0.0 if last == len(sigmas) - 2 else (sigmas[last] * sigmas[last + 1]) ** 0.5
    return low, high


def as_rows(search: IntervalSearch, sigmas: list, rows: Mapping[str, int] | None = None) -> list[dict]:
    """JSON-able: each candidate with its bounds and distance, the best first; of those in rows, by key, also that.

    Args:
        search: what was found.
        sigmas: as of `sigma_bounds`, or None for each step of a scheduler without noise levels.
        rows: network rows by candidate's key.
    """
    found, known = [], None not in sigmas
    for candidate, distance in search.distances.items():
        low, high = sigma_bounds(sigmas, candidate) if known else (None, float("inf"))
        found.append(
            {
                **asdict(candidate),
                "sigma_lo": low,
                "sigma_hi": None if high == float("inf") else high,
                "distance": distance,
                **({"network_rows": rows[candidate.key]} if candidate.key in (rows or {}) else {}),
            }
        )
    return found
