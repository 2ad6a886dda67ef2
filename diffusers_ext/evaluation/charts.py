"""Small charts as inline SVG, drawn by matplotlib; their colours are variables of the page, light or dark."""

import functools
import math
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

COLOURS = ("#c00000", "#c10000", "#c20000", "#c30000")  # stand for the page's --c0 to --c3
INK, FONT = "#123456", "font-family: 'DejaVu Sans', sans-serif; "  # which are the page's as well
OF_PAGE = {**{colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)}, INK: "currentColor", FONT: ""}
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "chart", "font.sans-serif": ["DejaVu Sans"], "font.size": 9,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.5, "lines.markersize": 5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}  # fmt: skip
LOCK = threading.Lock()  # matplotlib's settings are those of the process
WIDTH, HEIGHT = 3.4, 2.2  # inches
SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def styled(chart: Callable[..., str]) -> Callable[..., str]:
    """A function that draws, under `STYLE`, one at a time."""

    @functools.wraps(chart)
    def drawn(*args, **kwargs):
        with LOCK, rc_context(STYLE):
            return chart(*args, **kwargs)

    return drawn


@dataclass(frozen=True)
class Line:
    """A named line through points (x, y).

    Attributes:
        name: shown in the legend.
        points: (x, y).
        spreads: half the height of the error bar of each, if there are any.

    Raises:
        ValueError: for no points, and for another number of spreads than of points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    spreads: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.points or (self.spreads is not None and len(self.spreads) != len(self.points)):
            raise ValueError(
                f"line {self.name!r} needs points, and a spread for each or none, got {len(self.points)} points and"
                f" {self.spreads} as spreads"
            )


@styled
def line_chart(lines: Sequence[Line], title: str, x_label: str, log: bool = False, percent: bool = False) -> str:
    """Lines over a common x, which has a tick at each of their points.

    Each point tells its numbers to a mouse that rests on it.

    Args:
        lines: one to four.
        title: of the chart.
        x_label: of the x axis.
        log: both axes.
        percent: of y.

    Raises:
        ValueError: without lines.
    """
    if not lines:
        raise ValueError("a chart needs at least one line")
    figure, axes = _axes(title, x_label)
    if log:
        axes.loglog()
    said = {}
    for number, line in enumerate(lines):
        x, y = zip(*line.points, strict=True)
        if line.spreads is not None:  # a bar may reach below zero, where a logarithmic axis does not
            below = [min(s, 0.75 * b) if log else s for s, b in zip(line.spreads, y, strict=True)]
            axes.errorbar(x, y, [below, line.spreads], fmt="none", ecolor=COLOURS[number], clip_on=False)
        axes.plot(x, y, "o-", color=COLOURS[number], gid=f"line{number}", clip_on=False)
        said[f"line{number}"] = _said(line, "{:.1%}" if percent else "{:.3g}")
    xs = sorted({x for line in lines for x, _ in line.points})
    axes.minorticks_off()
    axes.set_xticks(_apart(xs, axes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    low, high = axes.get_ylim()
    style = "{:.3g}" if not percent else "{:.1%}" if high - low < 0.05 else "{:.0%}"
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if log else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: style.format(y)))
    axes.grid(axis="y", alpha=0.3, clip_on=False)
    return _svg(figure, f"{title} over {x_label}", said)


def _said(line: Line, style: str) -> list[str]:
    """What a mouse is told at each point."""
    spreads = line.spreads or [0.0] * len(line.points)
    spread = [f" ± {style.format(one)}" if one else "" for one in spreads]
    return [f"{line.name} at {x:g}: {style.format(y)}{s}" for (x, y), s in zip(line.points, spread, strict=True)]


def _apart(xs: Sequence[float], axes: Axes) -> list[float]:
    """Those of the numbers whose labels do not touch."""
    kept, last = [], -math.inf
    for place, x in sorted((axes.transData.transform((x, axes.get_ylim()[1]))[0], x) for x in xs):
        if place - last >= 28:  # pixels
            kept.append(x)
            last = place
    return kept


@styled
def tick_chart(rows: dict[str, Sequence[float]], title: str, x_label: str) -> str:
    """Each row's numbers in [0, 1] as ticks on a line of its own, 1 on the left.

    Raises:
        ValueError: without rows.
    """
    if not rows:
        raise ValueError("a chart needs at least one row")
    figure, axes = _axes(title, x_label, 0.9 + 0.35 * len(rows))
    for number, values in enumerate(rows.values()):
        axes.plot(values, [number] * len(values), "|", markersize=14, color=COLOURS[number], clip_on=False)
    axes.set_xlim(1.02, -0.02)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", alpha=0.3, clip_on=False)
    return _svg(figure, f"{title} over {x_label}", {})


@styled
def axis_chart(values: Sequence[float], chosen: Sequence[bool], bounds: tuple[float, float], title: str) -> str:
    """Noise levels on a logarithmic axis, the highest left, a dot each, filled where chosen; the bounds are shaded.

    Args:
        values: > 0, infinite ones are left out.
        chosen: which of the values are filled.
        bounds: (low, high) of what is shaded.
        title: of the chart.

    Raises:
        ValueError: without any.
    """
    shown = [(value, on) for value, on in zip(values, chosen, strict=True) if 0 < value < math.inf]
    if not shown:
        raise ValueError("a chart needs at least one noise level that is finite and > 0")
    figure, axes = _axes(title, "noise level sigma; sampling starts on the left", 1.0)
    axes.set_xscale("log")
    said = {}
    for group, name, on in (("on", "guided", True), ("off", "not guided", False)):
        dots = [value for value, state in shown if state == on]
        fill = "full" if on else "none"
        axes.plot(dots, [0] * len(dots), "o", color=COLOURS[0], fillstyle=fill, gid=group, clip_on=False)
        said[group] = [f"sigma {value:.3g}, {name}" for value in dots]
    low, high = min(value for value, _ in shown) / 1.2, max(value for value, _ in shown) * 1.2
    axes.set_xlim(high, low)
    if bounds[1] > low and bounds[0] < high:
        left, right = min(bounds[1], high), max(bounds[0], low)
        axes.axvspan(left, right, color=COLOURS[0], alpha=0.18, linewidth=0, gid="band", clip_on=False)
    axes.minorticks_off()
    ticks = LogLocator(subs=(1, 2, 5)).tick_values(low, high)
    axes.set_xticks(_apart([tick for tick in ticks if low < tick < high], axes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    return _svg(figure, title, said)


def _axes(title: str, x_label: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel(x_label)
    return figure, axes


def _svg(figure: Figure, label: str, said: dict[str, list[str]]) -> str:
    """The element, with what a mouse is told at the points of each line."""
    file = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", LINK)
    root = ElementTree.fromstring(file.getvalue())
    for name in ("width", "height"):
        del root.attrib[name]
    root.attrib |= {"class": "chart", "role": "img", "aria-label": label}
    root.remove(root.find(f"{{{SVG}}}defs"))  # a style for the whole page
    for group in root.iter(f"{{{SVG}}}g"):
        for mark, words in zip(group.iter(f"{{{SVG}}}use"), said.get(group.get("id"), ())):  # noqa: B905
            ElementTree.SubElement(mark, f"{{{SVG}}}title").text = words
    text = ElementTree.tostring(root, encoding="unicode")
    for drawn, shown in OF_PAGE.items():
        text = text.replace(drawn, shown)
    return text
