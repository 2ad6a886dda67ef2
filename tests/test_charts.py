"""The charts of the report and the app."""

import math
import re
import threading
import xml.etree.ElementTree as ElementTree
from html import unescape

import matplotlib
import pytest

from diffusers_ext.evaluation.charts import SVG, Line, axis_chart, line_chart, tick_chart


def points(svg: str) -> dict[str, tuple[float, float]]:
    """Where each point that tells something is."""
    marks = [(mark, mark.find(f"{{{SVG}}}title")) for mark in ElementTree.fromstring(svg).iter(f"{{{SVG}}}use")]
    return {title.text: (float(mark.get("x")), float(mark.get("y"))) for mark, title in marks if title is not None}


def labels(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{{{SVG}}}text")]


def test_lines_go_where_their_numbers_are():
    svg = line_chart([Line("a <b>", [(1, 0.5), (4, 0.9)]), Line("flat", [(1, 0.7), (4, 0.7)])], "x & y", "gamma")
    at = points(svg)
    assert list(at) == ["a <b> at 1: 0.5", "a <b> at 4: 0.9", "flat at 1: 0.7", "flat at 4: 0.7"]
    low, high, left, right = at.values()
    assert low[0] == left[0] < high[0] == right[0]
    assert high[1] < left[1] == right[1] < low[1]  # counted from the top
    assert {"x & y", "gamma", "1", "4"} <= set(labels(svg))


def test_a_logarithmic_chart_is_straight_for_a_power_and_bars_end_inside():
    power = [(x, 1 / x) for x in (2, 4, 8)]
    svg = line_chart([Line("power", power, [0.01, 0.3, 0.001])], "error", "steps", log=True)
    assert list(points(svg))[1] == "power at 4: 0.25 ± 0.3"
    a, b, c = points(svg).values()
    assert b[0] - a[0] == pytest.approx(c[0] - b[0]) and b[1] - a[1] == pytest.approx(c[1] - b[1])
    height = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1])
    bars = ElementTree.fromstring(svg).find(f".//{{{SVG}}}g[@id='LineCollection_1']")
    ends = [[float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", bar.get("d"))] for bar in bars]
    assert len(ends) == 3 and all(
        0 < high < y < low < height for (low, high), (_, y) in zip(ends, (a, b, c), strict=True)
    )


def test_percent_has_decimals_where_the_range_is_small():
    small = labels(line_chart([Line("a", [(1, 0.981), (2, 0.985)])], "share", "x", percent=True))
    large = labels(line_chart([Line("a", [(1, 0.2), (2, 0.8)])], "share", "x", percent=True))
    assert len(set(small)) == len(small) and "98.2%" in small
    assert "60%" in large


def test_numbers_that_lie_together_share_a_label():
    shown = labels(line_chart([Line("a", [(x, x) for x in (0, 1, 2, 100)])], "t", "over x"))
    assert shown[: shown.index("over x")] == ["0", "100"]


def test_ticks_of_tables_run_from_one_to_zero():
    svg = tick_chart({"even": [1.0, 0.5, 0.0], "ours": [1.0, 0.9]}, "tables", "time")
    assert {"even", "ours", "time"} <= set(labels(svg))
    marks = [m for m in ElementTree.fromstring(svg).iter(f"{{{SVG}}}use") if "var(--c" in m.get("style", "")]
    even, ours = ([m for m in marks if f"var(--c{i})" in m.get("style")] for i in (0, 1))
    x = [float(mark.get("x")) for mark in (*even, *ours)]
    assert (len(even), len(ours)) == (3, 2) and x[0] == x[3] < x[4] < x[1] < x[2]
    assert x[1] == pytest.approx((x[0] + x[2]) / 2)
    assert float(even[0].get("y")) < float(ours[0].get("y"))


def test_sigma_axis_fills_the_steps_that_are_guided():
    svg = axis_chart([math.inf, 8.0, 1.0, 0.5], [False, False, True, False], (0.5, 2.0), "one of three")
    at = points(svg)
    assert set(at) == {"sigma 8, not guided", "sigma 1, guided", "sigma 0.5, not guided"}
    x = {name.split(",")[0]: place[0] for name, place in at.items()}
    assert x["sigma 8"] < x["sigma 1"] < x["sigma 0.5"]  # the noisiest on the left
    band = re.search(r'<g id="band">\s*<path d="M ([\d.]+) \S+\s+L ([\d.]+)', svg)
    left, right = sorted(map(float, band.groups()))
    assert x["sigma 8"] < left < x["sigma 1"] and right == pytest.approx(x["sigma 0.5"])
    assert svg.count("fill: var(--c0); stroke") == 1
    assert 'id="band"' not in axis_chart([8.0, 1.0], [False] * 2, (20.0, 30.0), "none")


def test_a_chart_takes_colours_and_letters_from_its_page():
    charts = [line_chart([Line(f"{i}", [(0, i)]) for i in range(4)], "t", "x"), tick_chart({"a": [1]}, "t", "x")]
    for svg in charts:
        assert "#123456" not in svg and "#c0" not in svg and "font-family" not in svg and "currentColor" in svg
        assert "<style" not in svg and "url(" not in svg and svg.startswith("<svg") and 'class="chart"' in svg
    assert all(f"var(--c{i})" in charts[0] for i in range(4))
    assert (
        unescape(re.search('aria-label="([^"]*)"', line_chart([Line("a", [(0, 1)])], "<b>", "x"))[1]) == "<b> over x"
    )


def test_charts_are_drawn_the_same_at_once_and_leave_no_setting():
    def draw():
        return tick_chart({"even": [1.0, 0.5]}, "tables", "time")

    before, expected, drawn = dict(matplotlib.rcParams), draw(), []
    threads = [threading.Thread(target=lambda: drawn.append(draw())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn == [expected] * 8 and dict(matplotlib.rcParams) == before


def test_empty_charts():
    for empty in (
        lambda: line_chart([], "t", "x"), lambda: tick_chart({}, "t", "x"), lambda: Line("a", []),
        lambda: axis_chart([0.0], [True], (0, 1), "t"), lambda: Line("a", [(1, 2)], [0.1, 0.2]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="needs"):
            empty()
