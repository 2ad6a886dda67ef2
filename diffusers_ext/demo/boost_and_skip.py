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
from ..evaluation.pictures import grid, places_beside, side_by_side
from ..sampling import sample_images
from ..shipped import load_pipeline
from .tables import print_table, with_notes, words_table

CLASSES = 10
SHOWN = 100  # images in each panel of the picture
COLUMNS = {
    "recognised": "recognised",
    "knn_distance": "AvgkNN",
    "lof": "LOF",
    "rarity": "rarity",
    "inside": "inside",
    "frechet": "Fréchet",
    "seconds_per_image": "s/image",
}
LEGEND = (
    f"recognised: classified as the digit asked for. AvgkNN: mean distance to the {NEIGHBOURS['knn_distance']} nearest"
    f" training images; LOF: local outlier factor, k {NEIGHBOURS['lof']}; rarity: radius of the smallest real"
    f" neighbourhood (k {NEIGHBOURS['rarity']}) that holds the sample; higher = rarer, all three. inside: share within"
    " any real neighbourhood. Fréchet: distance to the training set."
)


@dataclass(frozen=True)
class BoostAndSkipSettings:
    """What is sampled; gamma 1 is the stock sampler, without skipping."""

    gammas: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    skip_steps: int = 3
    num_inference_steps: int = 50
    num_samples: int = 150
    seed: int = 0

    def call(self, gamma: float) -> dict:
        """Arguments of the pipeline call for one gamma of the sweep."""
        skip = {} if gamma == 1 else {"gamma": gamma, "skip_steps": self.skip_steps}
        return {"num_inference_steps": self.num_inference_steps, **skip}

    def title(self, gamma: float) -> str:
        return "stock sampler" if gamma == 1 else f"gamma {gamma:g}, skip {self.skip_steps}"


QUICK = BoostAndSkipSettings(gammas=(1.0, 2.0, 4.0), skip_steps=1, num_inference_steps=16, num_samples=50)


def run_boost_and_skip(
    output: Path, device: str, console: Console, settings: BoostAndSkipSettings | None = None
) -> dict:
    """Sample, measure and print; write boost_and_skip.png and, with matplotlib, a plot into the folder.

    Every gamma has the same seeds and labels. Returns the settings, a row of numbers for each gamma, the table in
    words, the files, and where the panels lie in the picture.
    """
    settings = settings or BoostAndSkipSettings()
    pipe = load_pipeline("mnist-unet", "boost-and-skip").to(device)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(settings.num_samples) % CLASSES

    rows, panels = [], {}
    with Progress(console=console) as progress:
        for gamma in settings.gammas:
            task = progress.add_task(f"{settings.title(gamma):>15}", total=len(labels))
            started = time.perf_counter()
            images = sample_images(
                pipe, labels, settings.seed, on_batch=partial(progress.advance, task), **settings.call(gamma)
            )
            seconds = (time.perf_counter() - started) / len(labels)
            rows.append({"gamma": gamma, **evaluate_digits(images, labels), "seconds_per_image": seconds})
            panels[settings.title(gamma)] = grid(images[:SHOWN], columns=CLASSES)

    written = [output / "boost_and_skip.png"]
    side_by_side(panels).save(written[0])
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
    legend = with_notes(LEGEND, settings.num_samples, without_lof="lof" not in rows[0])
    return words_table(title, legend, ["gamma", *(COLUMNS[name] for name in names)], words)
