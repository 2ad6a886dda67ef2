"""Boost-and-Skip: the shipped MNIST model sampled at several gammas."""

import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from ..evaluation import NEIGHBOURS, evaluate_digits
from ..evaluation.evaluate import BLOCKS
from ..evaluation.pictures import grid, places_beside, side_by_side
from ..sampling import sample_images
from ..shipped import load_pipeline
from .tables import ERRORS, errors_row, print_table, with_notes, words_table

CLASSES = 10
SHOWN = 100  # images in each panel of the picture
FIRST = 30  # images in each panel of the first picture, which is there before anything is measured
COLUMNS = {
    "recognised": "recognised",
    "knn_distance": "AvgkNN",
    "lof": "LOF",
    "rarity": "rarity",
    "inside": "inside",
    "frechet": "Fréchet",
    "seconds_per_image": "s/image",
}
LEGEND = {  # of each column that is measured
    "recognised": "recognised: classified as the digit asked for.",
    "knn_distance": (
        f"AvgkNN: mean distance to the {NEIGHBOURS['knn_distance']} nearest training images, higher = rarer."
    ),
    "lof": f"LOF: local outlier factor, k {NEIGHBOURS['lof']}, higher = rarer.",
    "rarity": (
        f"rarity: radius of the smallest real neighbourhood (k {NEIGHBOURS['rarity']}) that holds the sample, higher ="
        " rarer."
    ),
    "inside": "inside: share within any real neighbourhood.",
    "frechet": "Fréchet: distance to the training set.",
}


@dataclass(frozen=True)
class BoostAndSkipSettings:
    """What is sampled; gamma 1 is the stock sampler, without skipping. metrics: beside recognised; None is all."""

    gammas: tuple[float, ...] = (1.0, 2.0, 4.0)
    skip_steps: int = 1
    num_inference_steps: int = 16
    num_samples: int = 100
    metrics: tuple[str, ...] | None = ("knn_distance", "rarity")
    seed: int = 0

    def call(self, gamma: float) -> dict:
        """Arguments of the pipeline call for one gamma of the sweep."""
        skip = {} if gamma == 1 else {"gamma": gamma, "skip_steps": self.skip_steps}
        return {"num_inference_steps": self.num_inference_steps, **skip}

    def title(self, gamma: float) -> str:
        """A setting in words."""
        return "stock sampler" if gamma == 1 else f"gamma {gamma:g}, skip {self.skip_steps}"


FULL = BoostAndSkipSettings(
    gammas=(1.0, 2.0, 3.0, 4.0), skip_steps=3, num_inference_steps=50, num_samples=200, metrics=None
)


def run_boost_and_skip(
    output: Path, device: str, console: Console, settings: BoostAndSkipSettings | None = None
) -> dict:
    """Sample, measure and print; write boost_and_skip.png and, with matplotlib, a plot into the folder.

    Every gamma has the same seeds and labels. The first picture, of few digits, is there before the rest is drawn.
    Returns the settings, a row of numbers for each gamma, the table in words, the files, and where the panels lie in
    the picture.
    """
    settings = settings or BoostAndSkipSettings()
    pipe = load_pipeline("mnist-unet", "boost-and-skip").to(device)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(settings.num_samples) % CLASSES

    written = [output / "boost_and_skip.png"]
    with Progress(console=console) as progress:
        tasks = {
            gamma: progress.add_task(f"{settings.title(gamma):>15}", total=len(labels)) for gamma in settings.gammas
        }
        drawn, seconds = {}, dict.fromkeys(settings.gammas, 0.0)
        for part in (slice(0, FIRST), slice(FIRST, None)):
            for gamma in settings.gammas if len(labels[part]) else ():
                started, advance = time.perf_counter(), partial(progress.advance, tasks[gamma])
                seed = settings.seed + part.start  # image i has seed + i in both parts
                images = sample_images(pipe, labels[part], seed, on_batch=advance, **settings.call(gamma))
                seconds[gamma] += time.perf_counter() - started
                drawn[gamma] = torch.cat([drawn[gamma], images]) if gamma in drawn else images
            panels = {settings.title(gamma): grid(drawn[gamma][:SHOWN], columns=CLASSES) for gamma in drawn}
            side_by_side(panels).save(written[0])
            if part.start == 0:
                console.print(f"a first look: {written[0]}; now the rest, and its numbers")
    rows = [
        {
            "gamma": gamma,
            **evaluate_digits(images, labels, settings.metrics, with_errors=len(labels) >= 2 * BLOCKS),
            "seconds_per_image": seconds[gamma] / len(labels),
        }
        for gamma, images in drawn.items()
    ]
    if find_spec("matplotlib") is not None:
        written.append(plot(rows, settings, output / "boost_and_skip_metrics.png"))
    table = in_words(rows, settings)
    print_table(console, table)
    files = [path.name for path in written]
    pictures = {files[0]: places_beside(panels)}
    return {"settings": asdict(settings), "rows": rows, "table": table, "files": files, "pictures": pictures}


def plot(rows: list[dict], settings: BoostAndSkipSettings, path: Path) -> Path:
    """Each metric over gamma, one small chart a metric."""
    from matplotlib.figure import Figure

    names = [name for name in COLUMNS if name in rows[0] and name != "seconds_per_image"]
    figure = Figure(figsize=(2.6 * len(names), 2.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        axes.plot([row["gamma"] for row in rows], [row[name] for row in rows], "o-")
        axes.set(title=COLUMNS[name], xlabel="gamma (1: stock)")
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"Boost-and-Skip on MNIST, skip {settings.skip_steps} of {settings.num_inference_steps} steps,"
        f" {settings.num_samples} images a point"
    )
    figure.savefig(path, dpi=110)
    return path


def format_number(name: str, value: float | None) -> str:
    """A number of the table in words."""
    if value is None:
        return "-"
    return f"{value:.1%}" if name in ("recognised", "inside") else f"{value:.3f}"


def in_words(rows: list[dict], settings: BoostAndSkipSettings) -> dict:
    """The rows of the sweep as a table."""
    names = [name for name in COLUMNS if name in rows[0]]
    title = (
        f"Boost-and-Skip on MNIST, skip {settings.skip_steps} of {settings.num_inference_steps} steps;"
        f" {settings.num_samples} images a row"
    )
    words = [
        ["stock" if row["gamma"] == 1 else f"{row['gamma']:g}", *(format_number(name, row[name]) for name in names)]
        for row in rows
    ]
    words.append(errors_row(rows, names, format_number))
    left_out = settings.metrics is None and "lof" not in rows[0]
    legend = " ".join([*(LEGEND[name] for name in names if name in LEGEND), ERRORS])
    legend = with_notes(legend, settings.num_samples, "frechet" in rows[0], left_out)
    return words_table(title, legend, ["gamma", *(COLUMNS[name] for name in names)], words)
