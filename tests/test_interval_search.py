"""Search of a guidance interval: a known optimum, resuming, other settings, bad values."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext.guidance.search import (
    DistanceTable,
    GuidedSteps,
    as_rows,
    coarse_to_fine,
    search_interval,
    sigma_bounds,
)


def bowl(weight, first, last):
    """A distance with its minimum at the given candidate."""
    return lambda c: (c.guidance_scale - weight) ** 2 + 0.1 * (c.first - first) ** 2 + 0.1 * (c.last - last) ** 2


@pytest.mark.slow
@given(st.integers(2, 64), st.data())
@settings(max_examples=60)
def test_a_bowl_is_found_exactly(num_steps, data):
    first = data.draw(st.integers(0, num_steps - 1))
    last = data.draw(st.integers(first, num_steps - 1))
    calls = []

    def distance(candidate):
        calls.append(candidate)
        return bowl(2.0, first, last)(candidate)

    found = search_interval(distance, [3.0, 2.0, 1.5], num_steps)
    assert found.best_interval == GuidedSteps(2.0, first, last)
    assert found.best_everywhere == GuidedSteps(2.0, 0, num_steps - 1)
    assert list(found.distances.values()) == sorted(found.distances.values())
    assert len(set(calls)) <= 3 * (num_steps / 2 + 12)


@given(st.integers(0, 5), st.integers(0, 60), st.integers(0, 60))
def test_coarse_to_fine_finds_the_bottom_of_a_valley(low, length, bottom):
    high = low + length
    bottom = min(max(bottom, low), high)
    assert coarse_to_fine(lambda i: abs(i - bottom), low, high) == bottom


def test_bounds_guide_exactly_those_steps():
    sigmas = [80.0, 20.0, 5.0, 1.0, 0.2, 0.0]
    for first in range(5):
        for last in range(first, 5):
            low, high = sigma_bounds(sigmas, GuidedSteps(2.0, first, last))
            inside = [i for i, sigma in enumerate(sigmas[:-1]) if low < sigma <= high]
            assert inside == list(range(first, last + 1))
    rows = as_rows(search_interval(bowl(2.0, 1, 3), [2.0], 5), sigmas)
    assert rows[0]["first"] == 1 and rows[0]["last"] == 3 and json.dumps(rows)


def test_a_second_start_computes_nothing_twice(tmp_path):
    calls = []

    def compute(candidate):
        calls.append(candidate)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return bowl(2.0, 3, 9)(candidate)

    def start():
        return search_interval(DistanceTable(tmp_path / "d.json", {"model": "m"}, compute), [2.0], 16)

    with pytest.raises(KeyboardInterrupt):
        start()
    found = start()
    assert found.best_interval == GuidedSteps(2.0, 3, 9)
    assert len(calls) == len(set(calls)) + 1  # the interrupted one
    before = len(calls)
    assert start() == found and len(calls) == before
    with pytest.raises(ValueError, match="begun with other settings: model: 'm' before, 'n' now"):
        DistanceTable(tmp_path / "d.json", {"model": "n"}, compute)
    for content in ("", "[", "[1]", '{"settings": {}}', '{"settings": {}, "distances": {"a": "far"}}'):
        (tmp_path / "d.json").write_text(content)
        with pytest.raises(ValueError, match=r"d.json was not written by this command; choose another output folder"):
            DistanceTable(tmp_path / "d.json", {"model": "m"}, compute)


@pytest.mark.parametrize(
    ("weights", "steps", "message"),
    [([], 8, "at least one"), ([1.0, 2.0], 8, "> 1"), ([2.0], 1, "num_steps must be")],
)
def test_bad_values(weights, steps, message):
    with pytest.raises(ValueError, match=message):
        search_interval(lambda _: 0.0, weights, steps)


def test_a_distance_that_is_not_finite(tmp_path):
    with pytest.raises(ValueError, match="samples must have gone wrong"):
        DistanceTable(tmp_path / "d.json", {}, lambda _: float("nan"))(GuidedSteps(2.0, 0, 3))
