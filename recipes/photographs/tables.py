"""The tables of photographs: what is drawn in each row, and how rows are measured, kept and shown."""

import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from classifier_centric.mnist import repair
from guiders_mnist import guided
from guiders_mnist import ways as guiders
from photographs.classifier import Judge
from result_rows import ResultRows, summary
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from diffusers_ext import BoostAndSkipPipeline, FlowPostprocessingPipeline, GuidanceInterval
from diffusers_ext.evaluation.pictures import grid, side_by_side
from diffusers_ext.guidance.rows import counted_rows
from diffusers_ext.runs.files import replacing
from diffusers_ext.runs.provenance import describe_component
from diffusers_ext.sampling import sample_images

STEPS = {"boost": 30, "guidance": 16}  # of the schedule: of the rows that are boosted, and of those that are guided
WEIGHTS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INTERVALS = ((0.3, 3.0), (0.75, 1.7), (0.3, 10.0))  # noise over signal; the second is the digits' tuned one
SCALES = (1.0, 2.0, 4.0, 8.0, 15.0)  # that the flow repairs; the first is what none is needed at
SOLVERS = ("euler:2", "euler:10")
GUIDER_WEIGHT, GUIDER_INTERVAL = 3.0, (0.3, 3.0)
SHOWN = 40  # samples of a row in a picture
IMAGES_PER_SEED = 1_000_000  # seeds do not overlap, nor with those that the flow is trained on, which start at 0

QUALITY = ("frechet", "precision", "recall", "recognised", "evaluations", "seconds")
METRICS = {
    "boost": ("recognised", "knn_distance", "lof", "rarity", "inside", "frechet", "evaluations", "seconds"),
    "guidance": QUALITY,
    "guiders": QUALITY,
    "flow": QUALITY,
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How samples are drawn: arguments of the call, a guider in place of its guidance, an interval, and a repair.

    shown: in the picture of its table.
    """

    steps: int
    call: dict = field(default_factory=dict)
    guider: Any = None
    bounds: dict = field(default_factory=dict)
    solver: str | None = None
    shown: bool = True

    def around(self, pipe: BoostAndSkipPipeline) -> AbstractContextManager:
        """What the pipeline is called in."""
        if self.guider is not None:
            return guided(pipe, self.guider, self.bounds)
        return GuidanceInterval(pipe, **self.bounds) if self.bounds else nullcontext()


def ways_of_tables() -> dict[str, dict[str, Way]]:
    """The rows of every table by their names."""
    boost, steps = partial(Way, STEPS["boost"]), STEPS["guidance"]
    tables = {"boost": {
        "stock sampler": boost(),
        "boost and skip, gamma 2": boost({"gamma": 2.0, "skip_steps": 2}),
        "boost and skip, gamma 4": boost({"gamma": 4.0, "skip_steps": 2}),
        "boost alone, gamma 4": boost({"gamma": 4.0}),
    }, "guidance": {}, "guiders": {}, "flow": {}}  # fmt: skip
    for weight in WEIGHTS:
        call = {"guidance_scale": weight}
        tables["guidance"][f"weight {weight:g}"] = Way(steps, call, shown=weight in (1, 3, 6))
        for low, high in INTERVALS if weight > 1 else ():
            bounds, shown = {"guidance_interval": (low, high)}, weight in (3, 6) and (low, high) == INTERVALS[0]
            tables["guidance"][f"weight {weight:g} in ({low:g}, {high:g}]"] = Way(
                steps, call, bounds=bounds, shown=shown
            )
    for name, (guider, bounds) in guiders(GUIDER_WEIGHT, GUIDER_INTERVAL).items():
        # the guider's weight counts; the call's only says that there is guidance
        tables["guiders"][f"{name}, weight {GUIDER_WEIGHT:g}"] = Way(steps, {"guidance_scale": 2.0}, guider, bounds)
    for scale in SCALES:
        call = {"guidance_scale": scale}
        tables["flow"][f"guidance {scale:g}"] = Way(steps, call)
        for solver in SOLVERS:
            name = f"guidance {scale:g}, repaired by {solver}"
            tables["flow"][name] = Way(steps, call, solver=solver, shown=solver == SOLVERS[-1])
    return tables


@dataclass(frozen=True)
class Studio:
    """What draws and measures."""

    base: BoostAndSkipPipeline
    flow: FlowPostprocessingPipeline
    judge: Judge
    accelerator: Accelerator
    batch_size: int

    def identity(self) -> str:
        """What rows depend on besides their settings."""
        networks = (self.base.unet, self.flow.model, self.judge.classifier)
        digests = [describe_component(network)["sha256"][:8] for network in networks]
        return f"networks {' '.join(digests)} | {self.accelerator.mixed_precision}"

    def draw(self, way: Way, labels: torch.Tensor, seed: int, on_batch=None) -> torch.Tensor:
        """Images (count, 3, 32, 32) in [0, 1], before any repair."""
        with way.around(self.base), self.accelerator.autocast():
            images = sample_images(
                self.base, labels, seed, self.batch_size, on_batch, num_inference_steps=way.steps, **way.call
            )
        return (images * 255).round() / 255

    def repaired(self, way: Way, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Images after the flow, or as they are."""
        if way.solver is None:
            return images
        with self.accelerator.autocast():
            return repair(self.flow, images, labels, way.solver).cpu()

    def measured(self, way: Way, labels: torch.Tensor, draw) -> dict:
        """One row. Evaluations are rows of the networks an image; seconds, on top of them, are of drawing."""
        images, evaluations, seconds = draw()
        started = time.perf_counter()
        with counted_rows(self.flow) as rows:
            images = self.repaired(way, images, labels)
        cost = {
            "evaluations": evaluations + sum(rows) / len(labels),
            "seconds": seconds + time.perf_counter() - started,
        }
        return {**self.judge.measure(images, labels), **cost}


def rows_of_table(studio: Studio, ways: dict[str, Way], labels, seeds: int, results: ResultRows, progress) -> dict:
    """The rows of all seeds by the names of a table; what is there is not drawn again."""
    prefix, rows = studio.identity(), {name: [] for name in ways}
    for seed in range(seeds):

        @cache  # what is repaired is drawn once
        def drawn(before: str, seed=seed) -> tuple[torch.Tensor, float, float]:
            advance = partial(progress.advance, progress.add_task(f"{before}, seed {seed}", total=len(labels)))
            started = time.perf_counter()
            with counted_rows(studio.base) as count:
                images = studio.draw(ways[before], labels, (seed + 1) * IMAGES_PER_SEED, advance)
            return images, sum(count) / len(labels), time.perf_counter() - started

        for name, way in ways.items():
            key = f"{prefix} | {name} | {way.steps} steps | {len(labels)} samples | seed {seed}"
            draw = partial(drawn, name.split(", repaired")[0])
            rows[name].append(results.row(key, partial(studio.measured, way, labels, draw)))
    return rows


def draw_picture(studio: Studio, ways: dict[str, Way], path: Path) -> None:
    """The same samples in each way that is shown."""
    labels, panels = torch.arange(SHOWN) // 4 % 10, {}
    for name, way in ways.items():
        if way.shown:
            images = studio.repaired(way, studio.draw(way, labels, 0), labels)
            panels[name.replace("repaired by ", "")] = grid(images, columns=4, scale=2)
    with replacing(path) as file:
        side_by_side(panels).save(file, format="png")


def statistics_of(rows: list[dict]) -> dict[str, dict[str, float | None]]:
    """Mean and standard error over the seeds of each number; None where there is none."""
    found = {}
    for metric in rows[0]:
        values = [row[metric] for row in rows if row[metric] is not None]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        found[metric] = {"mean": statistics.mean(values) if values else None, "error": error}
    return found


def measured_tables(studio: Studio, samples: int, seeds: int, output: Path) -> Iterator[tuple[str, dict]]:
    """Each table as it is done, its rows by name; printed, and a picture drawn of it."""
    labels, results, console = torch.arange(samples) % 10, ResultRows(output / "results.json"), Console(width=150)
    for title, ways in ways_of_tables().items():
        with Progress(console=Console(stderr=True)) as progress:
            rows = rows_of_table(studio, ways, labels, seeds, results, progress)
        if not (output / f"{title}.png").exists():
            draw_picture(studio, ways, output / f"{title}.png")
        table = Table(title, *METRICS[title], title=f"{samples} samples, {seeds} seeds", box=SIMPLE)
        for name, mine in rows.items():
            table.add_row(name, *(summary(mine, metric) for metric in METRICS[title]))
        console.print(table)
        yield title, {name: statistics_of(mine) for name, mine in rows.items()}
