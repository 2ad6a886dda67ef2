"""Small line charts as inline SVG, whose colours are variables of the page, so that they follow light and dark."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 30, 40  # margins of the plotted area
MOST_TICKS = 5
NICE = (1, 2, 2.5, 5, 10)


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


class Axis:
    """Numbers from low to high, linear or logarithmic, on pixels from start to end. Widened where it has no length.

    Raises:
        ValueError: for a logarithmic axis that does not lie above 0.
    """

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        if log and low <= 0:
            raise ValueError(f"a logarithmic axis needs numbers > 0, got {low}")
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        """The pixel of a number."""
        scale = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """At most five round numbers in the range; where it holds less than two of them, its ends."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            known = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        else:
            step = _nice_step((self.high - self.low) / (MOST_TICKS - 1))
            known = [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        inside = [tick for tick in known if self.low <= tick <= self.high]
        return inside[:: math.ceil(len(inside) / MOST_TICKS)] if len(inside) > 1 else [self.low, self.high]


def _nice_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(nice * power for nice in NICE if nice * power >= least * (1 - 1e-9))


def line_chart(lines: Sequence[Line], title: str, x_label: str, log: bool = False, percent: bool = False) -> str:
    """Lines over a common x, which has a tick at each of their points.

    Each point tells its numbers to a mouse that rests on it.

    Args:
        lines: at least one.
        title: of the chart.
        x_label: of the x axis.
        log: both axes.
        percent: of y.

    Raises:
        ValueError: without lines.
    """
    if not lines:
        raise ValueError("a chart needs at least one line")
    xs = sorted({x for line in lines for x, _ in line.points})
    x, y = Axis(xs[0], xs[-1], LEFT + 8, WIDTH - RIGHT - 8, log), _y_axis(lines, log)
    style = "{:.3g}" if not percent else "{:.1%}" if y.high - y.low < 0.05 else "{:.0%}"
    parts = [_text(LEFT, 16, title, "start", "chart-title"), _text(_middle(), HEIGHT - 6, x_label)]
    for tick in y.ticks():
        parts.append(f'<path class="grid-line" d="M{LEFT} {y(tick)}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, y(tick) + 4, style.format(tick), "end"))
    parts += [_text(x(tick), HEIGHT - BOTTOM + 18, f"{tick:g}") for tick in _apart(xs, x)]
    for number, line in enumerate(lines):
        parts.append(_draw_line(number, line, x, y, "{:.1%}" if percent else "{:.3g}"))
    return _svg(f"{title} over {x_label}", HEIGHT, parts)


def _y_axis(lines: Sequence[Line], log: bool) -> Axis:
    """From below the lowest point or error bar to above the highest."""
    spans = [(y, s) for line in lines for (_, y), s in zip(line.points, _spreads(line), strict=True)]
    lowest = min(y for y, _ in spans)
    low, high = min(y - s for y, s in spans), max(y + s for y, s in spans)
    if log:
        low, high = max(low, lowest / 4) / 1.15, high * 1.15  # a bar may reach below zero
    else:
        low, high = low - 0.08 * (high - low), high + 0.08 * (high - low)
    return Axis(low, high, HEIGHT - BOTTOM, TOP, log)


def _spreads(line: Line) -> Sequence[float]:
    return [0.0] * len(line.points) if line.spreads is None else line.spreads


def _apart(xs: list[float], x: Callable[[float], float]) -> list[float]:
    """Those of the numbers whose labels do not touch."""
    kept: list[float] = []
    for value in xs:
        if not kept or x(value) - x(kept[-1]) >= 24:
            kept.append(value)
    return kept


def _draw_line(number: int, line: Line, x: Axis, y: Axis, style: str) -> str:
    path = " ".join(f"{x(a)},{y(b)}" for a, b in line.points)
    marks = []
    for (a, b), spread in zip(line.points, _spreads(line), strict=True):
        if spread:
            low = y(max(b - spread, y.low))
            marks.append(f'<path d="M{x(a)} {low}V{y(min(b + spread, y.high))}"/>')
        said = escape(f"{line.name} at {a:g}: {style.format(b)}" + (f" ± {style.format(spread)}" if spread else ""))
        marks.append(f'<circle cx="{x(a)}" cy="{y(b)}" r="3.5"><title>{said}</title></circle>')
    return f'<g class="line c{number}"><polyline points="{path}"/>{"".join(marks)}</g>'


def tick_chart(rows: dict[str, Sequence[float]], title: str, x_label: str) -> str:
    """Each row's numbers in [0, 1] as ticks on a line of its own, 1 on the left.

    Raises:
        ValueError: without rows.
    """
    if not rows:
        raise ValueError("a chart needs at least one row")
    x, gap = Axis(1, 0, LEFT + 8, WIDTH - RIGHT - 8), 40
    height = TOP + gap * len(rows) + BOTTOM
    parts = [_text(LEFT, 16, title, "start", "chart-title"), _text(_middle(), height - 6, x_label)]
    for number, (name, values) in enumerate(rows.items()):
        y = TOP + gap * number + gap // 2
        ticks = "".join(f"M{x(value)} {y - 9}v18" for value in values)
        parts.append(_text(LEFT - 6, y + 4, name, "end"))
        parts.append(f'<path class="grid-line" d="M{x(1)} {y}H{x(0)}"/>')
        parts.append(f'<g class="line c{number}"><path d="{ticks}"/></g>')
    parts += [_text(x(tick), height - BOTTOM + 18, f"{tick:g}") for tick in (1, 0.75, 0.5, 0.25, 0)]
    return _svg(f"{title} over {x_label}", height, parts)


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
    low, high = min(value for value, _ in shown), max(value for value, _ in shown)
    x = Axis(low, high, WIDTH - RIGHT - 8, RIGHT + 8, log=True)
    left, right = (x(min(max(bound, x.low), x.high)) for bound in (bounds[1], bounds[0]))
    parts = [_text(RIGHT, 16, title, "start", "chart-title")]
    parts.append(_text(WIDTH / 2, 94, "noise level sigma; sampling starts on the left"))
    if bounds[1] > x.low and bounds[0] < x.high:
        parts.append(f'<rect class="band" x="{left}" y="28" width="{round(right - left, 1)}" height="28"/>')
    parts.append(f'<path class="grid-line" d="M{x(high)} 42H{x(low)}"/>')
    for value, on in shown:
        state = "guided" if on else "not guided"
        parts.append(
            f'<g class="line c0"><circle class="{"on" if on else "off"}" cx="{x(value)}" cy="42" r="4">'
            f"<title>sigma {value:.3g}, {state}</title></circle></g>"
        )
    parts += [_text(x(tick), 74, f"{tick:g}") for tick in x.ticks()]
    return _svg(title, 100, parts)


def legend(names: Sequence[str]) -> str:
    """The names of the lines, each beside its colour."""
    items = "".join(f'<li class="c{i}">{escape(name)}</li>' for i, name in enumerate(names))
    return f'<ul class="legend">{items}</ul>'


def _middle() -> float:
    return (LEFT + WIDTH - RIGHT) / 2


def _text(x: float, y: float, words: str, anchor: str = "middle", style: str = "label") -> str:
    return f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(label: str, height: float, parts: list[str]) -> str:
    inside = "".join(parts)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{inside}</svg>'
