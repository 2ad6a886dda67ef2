"""The charts of the report and the app."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from diffusers_ext.evaluation.charts import Axis, Line, axis_chart, legend, line_chart, tick_chart


def points(svg: str) -> list[list[tuple[float, float]]]:
    """The pixels of each line."""
    found = re.findall(r'<polyline points="([^"]+)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in found]


def labels(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


def test_axis_maps_its_ends_and_its_middle():
    assert [Axis(0, 10, 100, 200)(v) for v in (0, 5, 10)] == [100, 150, 200]
    assert [Axis(1, 100, 200, 100, log=True)(v) for v in (1, 10, 100)] == [200, 150, 100]
    assert Axis(3, 3, 0, 10)(3) == 5 and Axis(3, 3, 0, 10, log=True)(3) == 5  # one number is in the middle
    with pytest.raises(ValueError, match="logarithmic axis needs numbers > 0, got 0"):
        Axis(0, 1, 0, 1, log=True)


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 10, False, [0, 2.5, 5, 7.5, 10]),
        (0.93, 0.98, False, [0.94, 0.96, 0.98]),
        (0.02, 0.7, True, [0.02, 0.05, 0.1, 0.2, 0.5]),
        (2.1, 4.9, True, [2.1, 4.9]),
    ],
)
def test_ticks_are_round_numbers_in_the_range(low, high, log, expected):
    assert Axis(low, high, 0, 1, log).ticks() == pytest.approx(expected)


def test_lines_go_where_their_numbers_are():
    svg = line_chart([Line("a <b>", [(1, 0.5), (4, 0.9)]), Line("flat", [(1, 0.7), (4, 0.7)])], "x & y", "gamma")
    first, second = points(svg)
    assert first[0][0] == second[0][0] < first[1][0] == second[1][0]
    assert first[1][1] < second[1][1] == second[0][1] < first[0][1]  # pixels count from the top
    assert "x & y" in labels(svg) and "gamma" in labels(svg) and {"1", "4"} <= set(labels(svg))
    assert "a &lt;b&gt; at 4: 0.9" in svg


def test_logarithmic_chart_is_straight_for_a_power_and_keeps_error_bars_inside():
    xs = (2, 4, 8)
    svg = line_chart([Line("power", [(x, 1 / x) for x in xs], [0.01, 0.3, 0.001])], "error", "steps", log=True)
    ((a, b, c),) = points(svg)
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.2) and b[1] - a[1] == pytest.approx(c[1] - b[1], abs=0.2)
    bars = [(float(low), float(high)) for low, high in re.findall(r'<path d="M[\d.]+ ([\d.]+)V([\d.]+)"', svg)]
    assert len(bars) == 3 and all(30 <= high <= low <= 180 for low, high in bars)
    assert all(high < y < low for (low, high), y in zip(bars, (a[1], b[1]), strict=False))


def test_percent_has_decimals_where_the_range_is_small():
    small = labels(line_chart([Line("a", [(1, 0.981), (2, 0.985)])], "share", "x", percent=True))
    large = labels(line_chart([Line("a", [(1, 0.2), (2, 0.8)])], "share", "x", percent=True))
    assert len(set(small)) == len(small) and "98.2%" in small
    assert "60%" in large


def test_ticks_of_tables_run_from_one_to_zero():
    svg = tick_chart({"even": [1.0, 0.5, 0.0], "ours": [1.0, 0.9]}, "tables", "time")
    even, ours = re.findall(r'<g class="line c\d"><path d="([^"]+)"', svg)
    xs = [float(x) for x in re.findall(r"M([\d.]+)", even)]
    assert xs[0] < xs[1] < xs[2] and xs[1] == pytest.approx((xs[0] + xs[2]) / 2)
    assert ours.count("M") == 2 and {"even", "ours", "time"} <= set(labels(svg))


def test_sigma_axis_fills_the_steps_that_are_guided():
    svg = axis_chart([math.inf, 8.0, 1.0, 0.5], [False, False, True, False], (0.5, 2.0), "one of three")
    circles = re.findall(r'<circle class="(on|off)" cx="([\d.]+)"', svg)
    assert [state for state, _ in circles] == ["off", "on", "off"]
    xs = [float(x) for _, x in circles]
    assert xs == sorted(xs)  # the noisiest on the left
    left, width = map(float, re.search(r'class="band" x="([\d.]+)" y="28" width="([\d.]+)"', svg).groups())
    assert xs[0] < left < xs[1] < xs[2] == pytest.approx(left + width)
    assert 'class="band"' not in axis_chart([8.0, 1.0], [False, False], (20.0, 30.0), "none")


def test_legend_and_empty_charts():
    assert legend(["a", "<b>"]) == '<ul class="legend"><li class="c0">a</li><li class="c1">&lt;b&gt;</li></ul>'
    for empty in (
        lambda: line_chart([], "t", "x"), lambda: tick_chart({}, "t", "x"), lambda: Line("a", []),
        lambda: axis_chart([0.0], [True], (0, 1), "t"), lambda: Line("a", [(1, 2)], [0.1, 0.2]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="needs"):
            empty()
