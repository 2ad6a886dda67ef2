"""Jump Your Steps: tables of timesteps made on the spot for the shipped CountDown model, and what they are worth."""

import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.progress import Progress

from ..jump_your_steps import Cost, RateStatistics
from ..jump_your_steps.costs import cheapest_schedules
from ..jump_your_steps.golden import best_hierarchy
from ..metrics import countdown_errors, countdown_sequences
from ..sampling import sample_batches
from ..shipped import load_pipeline
from .tables import print_table, words_table

PAPER, OURS = Cost("klub", held="rates"), Cost()
LEGEND = (
    "Strict error, lower is better, ± its standard error; same seeds. n steps are n + 1 network calls in every column."
    " paper: its objective at its maximum in each interval; ours: the steps of least total cost."
)


@dataclass(frozen=True)
class JumpYourStepsSettings:
    """What is optimised and sampled. steps: powers of two, which the paper's tables are for."""

    model: str = "countdown-sedd"
    steps: tuple[int, ...] = (2, 4, 8)
    grid_size: int = 32
    num_search: int = 4
    num_samples: int = 16
    seed: int = 0


FULL = JumpYourStepsSettings(grid_size=64, num_search=12, num_samples=40)


def run_jump_your_steps(
    output: Path, device: str, console: Console, settings: JumpYourStepsSettings | None = None
) -> dict:
    """Optimise, sample, measure and print; with matplotlib, write jump_your_steps.png into the folder.

    Returns the settings, the edges of each table, a row of errors for each number of steps, the table of these in
    words, the seconds that the timestep tables took, and the files.
    """
    settings = settings or JumpYourStepsSettings()
    pipe = load_pipeline(settings.model, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    with Progress(console=console, transient=True) as progress:
        started, work = time.perf_counter(), progress.add_task("tables", total=None)
        tables = make_tables(pipe, settings)
        seconds = time.perf_counter() - started
        progress.update(work, description="samples", total=len(tables) * sum(n + 1 for n in settings.steps))
        rows = []
        for n in settings.steps:
            errors = {}
            for name, by_steps in tables.items():
                errors[name] = measure(pipe, by_steps[n], settings)
                progress.advance(work, n + 1)
            rows.append({"steps": n, **errors})
    table, files = in_words(rows, seconds, settings), []
    print_table(console, table)
    if find_spec("matplotlib") is not None:
        files.append("jump_your_steps.png")
        plot(tables, rows, output / files[0])
    result = {"settings": asdict(settings), "tables": tables, "rows": rows, "table": table}
    return {**result, "seconds": seconds, "files": files}


def make_tables(pipe: DiffusionPipeline, settings: JumpYourStepsSettings) -> dict[str, dict[int, list[float]]]:
    """Edges by name of the table and number of steps, from one pass of the network over a grid."""
    length, tokens = pipe.model.config.sequence_length, pipe.scheduler.kernel.num_real_tokens
    data = countdown_sequences(settings.num_search, length, tokens, torch.Generator().manual_seed(settings.seed))
    statistics = RateStatistics(pipe.model, pipe.scheduler, data, (PAPER, OURS), grid_size=settings.grid_size)
    sums = statistics.of(torch.arange(len(data)))
    grid, steps = statistics.grid, list(settings.steps)
    cheapest = cheapest_schedules(grid.step_costs(sums[OURS]), steps, free_end=True)
    indices = {
        "even": {n: grid.even(n) for n in steps},
        "paper": best_hierarchy(grid.points, sums[PAPER], steps),
        "ours": {n: path for n, (path, _) in cheapest.items()},
    }
    return {name: {n: [grid.points[i] for i in path] for n, path in by.items()} for name, by in indices.items()}


def measure(pipe: DiffusionPipeline, edges: list[float], settings: JumpYourStepsSettings) -> tuple[float, float]:
    """Strict error rate of samples and its standard error."""
    call = {"timesteps": edges, "output_type": "tokens"}
    batches = sample_batches(pipe, settings.num_samples, None, settings.seed, batch_size=settings.num_samples, **call)
    errors = countdown_errors(torch.cat(list(batches)))
    return float(errors.mean()), float(errors.std() / len(errors) ** 0.5)


def in_words(rows: list[dict], seconds: float, settings: JumpYourStepsSettings) -> dict:
    """A row of the table for each number of steps."""
    title = f"Jump Your Steps on CountDown; {settings.num_samples} sequences a number; all tables in {seconds:.0f} s"
    words = []
    for row in rows:
        errors = [f"{mean:.1%} ± {spread:.1%}" for mean, spread in list(row.values())[1:]]
        words.append([str(row["steps"]), *errors])
    return words_table(title, LEGEND, list(rows[0]), words)


def plot(tables: dict[str, dict[int, list[float]]], rows: list[dict], path: Path) -> None:
    """Left: the edges for the largest number of steps. Right: the error over the network calls."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    steps = [row["steps"] for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for height, (name, by_steps) in enumerate(reversed(tables.items())):
        colour = f"C{len(tables) - 1 - height}"
        left.plot(by_steps[steps[-1]], [height] * (steps[-1] + 1), "|-", color=colour, markersize=14)
        means, spreads = zip(*(row[name] for row in rows), strict=True)
        right.errorbar([n + 1 for n in steps], means, spreads, fmt="o-", color=colour, label=name, markersize=4)
    left.set(xlabel="time", xlim=(1.02, -0.02), title=f"{steps[-1]} steps")
    left.set_yticks(range(len(tables)), list(reversed(tables)))
    right.set(xlabel="network calls", ylabel="strict error", xscale="log", yscale="log")
    right.set_xticks([n + 1 for n in steps], [str(n + 1) for n in steps])
    right.xaxis.set_minor_locator(NullLocator())
    handles, labels = right.get_legend_handles_labels()
    right.legend(handles[::-1], labels[::-1], frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
