"""Timestep tables as text and as a picture."""

from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .tables import TimestepTables


def print_tables(tables: TimestepTables, console: Console) -> None:
    """A row for each number of steps: what its steps cost, beside even steps, and the edges."""
    shown = Table("steps", "cost", "even steps", "edges", box=SIMPLE)
    for n, edges in tables.tables.items():
        info = tables.info.get(n, {})
        costs = (f"{info[name]:.4g}" if name in info else "" for name in ("bound", "bound_of_even_steps"))
        text = [f"{t:.3g}" for t in edges]
        shown.add_row(str(n), *costs, " ".join(text if n <= 8 else [*text[:4], "...", *text[-3:]]))
    console.print(shown)
    first = next(iter(tables.info.values()), {})
    if "bound" in first:
        unit = "nats a sequence" if first["objective"] == "kl" else "a sequence"
        console.print(f"cost: {first['objective']} of held {first['held']}, {unit}; lower is better")


def plot_tables(tables: TimestepTables, path: str | Path) -> Path:
    """Left: the edges of each table over the share of its steps. Right: what the steps cost, beside even steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    costs = {n: entry for n, entry in tables.info.items() if "bound" in entry}
    figure = Figure(figsize=(9 if costs else 4.8, 3.6), layout="constrained")
    left, *rest = figure.subplots(1, 2 if costs else 1, squeeze=False)[0]
    for i, (n, edges) in enumerate(tables.tables.items()):
        shares = [step / n for step in range(n + 1)]
        colour = (0.2 + 0.7 * i / max(1, len(tables.tables) - 1), 0.3, 0.6)
        left.plot(shares, edges, ".-" if n <= 16 else "-", color=colour, label=str(n), linewidth=1.2)
    left.plot([0, 1], [1, 0], "--", color="0.6", label="even")
    left.set(xlabel="share of the steps", ylabel="time", ylim=(-0.02, 1.02))
    left.legend(title="steps", frameon=False, fontsize=7, title_fontsize=7)
    if costs:
        (right,) = rest
        for name, label in (("bound", "table"), ("bound_of_even_steps", "even steps")):
            right.plot(list(costs), [entry[name] for entry in costs.values()], "o-", label=label, markersize=4)
        first = next(iter(costs.values()))
        right.set(xscale="log", yscale="log", xlabel="steps", ylabel=f"{first['objective']} of held {first['held']}")
        right.set_xticks(list(costs), [str(n) for n in costs])
        right.xaxis.set_minor_locator(NullLocator())
        right.legend(frameon=False)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return Path(path)
