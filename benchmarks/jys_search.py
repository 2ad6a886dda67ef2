"""What it costs to find timestep tables: the authors' procedure, golden section with its start kept, one exact pass.

    python benchmarks/jys_search.py            # evaluations, CPU seconds, error rates
    python benchmarks/jys_search.py counts     # error rates of k-Gillespie: even, the authors' table, both of ours
    python benchmarks/jys_search.py memory     # peak memory at vocabulary 50,258 and length 1,024

On the small CountDown model of the goldens (16 tokens, length 48), 256 sequences, a grid of 256 intervals, one thread.
"Plain" is the procedure of Jump Your Steps (2410.07761) written with this package's pieces, not its authors' code:
every value of the objective evaluates the network at both times. "Golden" finds the same tables and keeps what it has
at the start of each interval. "Exact" evaluates the network once at each grid point, for all numbers of steps, here of
two grids. Error: strict rate of samples with the tables found, all by the same number of network calls.
"""

import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from diffusers_ext import CTMCScheduler, DiscreteDiffusionPipeline
from diffusers_ext.checkpoints import load_countdown
from diffusers_ext.jump_your_steps import KLUB, RateStatistics, TimestepTables, optimize_timesteps
from diffusers_ext.jump_your_steps.costs import Grid
from diffusers_ext.jump_your_steps.golden import Bracket, golden_middle, hierarchical_tables
from diffusers_ext.jump_your_steps.tables import times_of_counts
from diffusers_ext.metrics import countdown_errors, countdown_sequences

MODEL = Path(__file__).parent.parent / "tests/goldens/count_model.safetensors"
LENGTH, TOKENS = 48, 16
STEPS = (2, 4, 8, 16, 32)
AUTHORS_COUNTS = {4: [0, 4, 11, 32, 48], 8: [0, 2, 4, 7, 11, 21, 32, 42, 48]}  # of their search on this model


def plain_search(model, scheduler, data: torch.Tensor, grid_size: int) -> tuple[dict[int, list[float]], int]:
    """The authors' procedure, nothing kept: tables by number of steps, and the sequences that the network saw."""
    grid, evaluated = Grid.of(scheduler, data.shape[1], grid_size), 0

    def objective(t1: float, t2: float, t3: float) -> float:
        nonlocal evaluated
        klub = KLUB(model, scheduler, data, batch_size=len(data))
        value = klub(t1, t2, t3)
        evaluated += klub.network.evaluations
        return value

    bracket = Bracket.of_times(grid_size, 1e-3)
    found = hierarchical_tables(
        lambda i, j: golden_middle(objective, grid.points, i, j, bracket), grid_size, max(STEPS).bit_length() - 1
    )
    return {n: [grid.points[i] for i in path] for n, path in found.items()}, evaluated


def error(pipe: DiscreteDiffusionPipeline, edges, samples: int) -> tuple[float, float]:
    """Strict error rate and its standard error."""
    generator, rates = torch.Generator().manual_seed(0), []
    for _ in range(0, samples, 256):
        drawn = pipe(batch_size=256, sequence_length=LENGTH, timesteps=list(edges), generator=generator)
        rates.append(countdown_errors(drawn.tokens))
    rates = torch.cat(rates)
    return float(rates.mean()), float(rates.std() / len(rates) ** 0.5)


def compare(num_samples: int, grid_size: int, drawn: int) -> None:
    model, scheduler = load_countdown(MODEL, num_heads=4), CTMCScheduler(vocab_size=TOKENS + 1)
    data = countdown_sequences(num_samples, LENGTH, TOKENS, torch.Generator().manual_seed(0))
    pipe = DiscreteDiffusionPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    ours = partial(optimize_timesteps, model, scheduler, data, STEPS, num_report_samples=0, progress=False)
    methods = {
        "plain": lambda: plain_search(model, scheduler, data, grid_size),
        "golden": lambda: ours("golden", grid_size=grid_size, batch_size=num_samples),
        "exact": lambda: ours(grid_size=grid_size),
        "exact, half the grid": lambda: ours(grid_size=grid_size // 2),
    }
    table = Table("search", "evaluations", "CPU s", "ratio", *(f"error, {n} steps" for n in STEPS))
    plain_seconds = None
    for name, search in methods.items():
        start = time.process_time()
        found = search()
        seconds = time.process_time() - start
        plain_seconds = plain_seconds or seconds
        if isinstance(found, TimestepTables):
            tables, evaluated = found.tables, found.info[2]["network_evaluations"]
        else:
            tables, evaluated = found
        errors = (error(pipe, tables[n], drawn) for n in STEPS)
        table.add_row(
            name, f"{evaluated / num_samples:g}", f"{seconds:.0f}", f"{plain_seconds / seconds:.1f}",
            *(f"{mean:.4f} ± {spread:.4f}" for mean, spread in errors),
        )  # fmt: skip
    Console(width=160).print(table)


def compare_counts(num_samples: int, drawn: int) -> None:
    """k-Gillespie: n steps are n network calls, each decodes a number of tokens."""
    model, scheduler = load_countdown(MODEL, num_heads=4), CTMCScheduler(vocab_size=TOKENS + 1, sampler="gillespie")
    data = countdown_sequences(num_samples, LENGTH, TOKENS, torch.Generator().manual_seed(0))
    pipe = DiscreteDiffusionPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    found = {
        method: optimize_timesteps(model, scheduler, data, tuple(AUTHORS_COUNTS), method, progress=False)
        for method in ("hierarchical", "exact")
    }
    table = Table("steps", "even", "authors' table", "hierarchical", "exact")
    for steps, counts in AUTHORS_COUNTS.items():
        even = torch.linspace(1, scheduler.config.min_timestep, steps + 1, dtype=torch.float64).tolist()
        schedules = [even, times_of_counts(counts, scheduler.config.min_timestep)]
        errors = (error(pipe, edges, drawn) for edges in [*schedules, *(tables[steps] for tables in found.values())])
        table.add_row(str(steps), *(f"{mean:.4f} ± {spread:.4f}" for mean, spread in errors))
    Console(width=160).print(table)


class Words(torch.nn.Module):
    """Stands for a language model: its output has the size, and costs next to nothing."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(64, vocab_size))

    def forward(self, tokens: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.table[tokens % 64] - 11


def peak_of_one_sequence(vocab_size: int, length: int, grid_size: int) -> None:
    """Print the peak memory of this process, in GiB: before, and over one sequence."""
    scheduler, model = CTMCScheduler(vocab_size=vocab_size), Words(vocab_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    data = torch.randint(vocab_size - 1, (1, length), generator=torch.Generator().manual_seed(0))
    statistics = RateStatistics(model, scheduler, data, grid_size=grid_size)
    start = time.process_time()
    statistics.of(torch.tensor([0]))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    one = 4 * vocab_size * length / 2**30
    print(
        f"vocabulary {vocab_size}, length {length}, grid {grid_size}: {before:.2f} GiB before, peak {after:.2f} GiB;"
        f" one network output is {one:.2f} GiB; {statistics.num_positions} positions of the sequence,"
        f" {time.process_time() - start:.0f} CPU s"
    )


@click.group(invoke_without_command=True)
@click.option("--num-samples", default=256, show_default=True)
@click.option("--grid-size", default=256, show_default=True)
@click.option("--drawn", default=2048, show_default=True, help="Sequences drawn for each error rate.")
@click.pass_context
def main(context, num_samples, grid_size, drawn):
    torch.set_num_threads(1)
    if context.invoked_subcommand is None:
        compare(num_samples, grid_size, drawn)


@main.command()
@click.option("--num-samples", default=128, show_default=True)
@click.option("--drawn", default=1024, show_default=True)
def counts(num_samples, drawn):
    """Error rates of k-Gillespie with tables of token counts."""
    compare_counts(num_samples, drawn)


@main.command()
@click.option("--vocab-size", default=50258, show_default=True)
@click.option("--length", default=1024, show_default=True)
@click.option("--grid-size", default=256, show_default=True)
def memory(vocab_size, length, grid_size):
    """Peak memory of the exact statistics of one sequence, in a process of its own."""
    code = f"from jys_search import peak_of_one_sequence; peak_of_one_sequence({vocab_size}, {length}, {grid_size})"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


if __name__ == "__main__":
    main()
