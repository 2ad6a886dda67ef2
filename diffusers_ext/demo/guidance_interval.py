"""Guidance interval: the shipped MNIST model without guidance, with it in every step, and in an interval."""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..evaluation import NEIGHBOURS, evaluate_digits
from ..pipelines import GuidanceInterval
from ..sampling import sample_images
from ..shipped import load_pipeline
from .pictures import grid, side_by_side

CLASSES = 10
SHOWN = 100  # images in each panel of the picture
COLUMNS = {
    "recognised": "{:.1%}",
    "frechet": "{:.3f}",
    "precision": "{:.3f}",
    "recall": "{:.3f}",
    "rows_per_image": "{:.1f}",
    "seconds_per_image": "{:.3f}",
}
LEGEND = (
    "Fréchet: distance to the training set, lower is nearer. precision: share of samples among real images; recall:"
    f" share of real images among samples; k {NEIGHBOURS['precision_recall']}. rows: network evaluations an image."
    " Same seeds, labels and, with guidance, weight."
)


@dataclass(frozen=True)
class GuidanceIntervalSettings:
    """What is sampled; the interval is (sigma_lo, sigma_hi]."""

    guidance_scale: float = 3.0
    sigma_lo: float = 0.75
    sigma_hi: float = 1.7
    num_inference_steps: int = 16
    num_samples: int = 300
    seed: int = 0

    def variants(self) -> dict[str, tuple[float, dict | None]]:
        """Title of each row: guidance weight, and the bounds of its interval if it has one."""
        bounds = {"sigma_lo": self.sigma_lo, "sigma_hi": self.sigma_hi}
        return {
            "no guidance": (1.0, None),
            f"weight {self.guidance_scale:g} everywhere": (self.guidance_scale, None),
            f"weight {self.guidance_scale:g} in ({self.sigma_lo:g}, {self.sigma_hi:g}]": (self.guidance_scale, bounds),
        }


def run_guidance_interval(
    output: Path, device: str, console: Console, settings: GuidanceIntervalSettings | None = None
) -> dict:
    """Sample, measure and print; write guidance_interval.png into the folder.

    Every row has the same seeds and labels. Returns the settings, the rows of numbers and the files.
    """
    settings = settings or GuidanceIntervalSettings()
    pipe = load_pipeline("mnist-unet", "boost-and-skip").to(device)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(settings.num_samples) % CLASSES

    rows, panels = [], {}
    with Progress(console=console) as progress:
        for title, (weight, bounds) in settings.variants().items():
            advance = partial(progress.advance, progress.add_task(f"{title:>25}", total=len(labels)))
            call = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": weight}
            started = time.perf_counter()
            with nullcontext() if bounds is None else GuidanceInterval(pipe, **bounds), counted_rows(pipe) as count:
                images = sample_images(pipe, labels, settings.seed, on_batch=advance, **call)
            seconds = time.perf_counter() - started
            numbers = evaluate_digits(images, labels, ("frechet", "precision_recall"))
            numbers["rows_per_image"] = sum(count) / len(labels)
            numbers["seconds_per_image"] = seconds / len(labels)
            rows.append({"title": title, **{name: numbers[name] for name in COLUMNS}})
            panels[title] = grid(images[:SHOWN], columns=CLASSES)
    side_by_side(panels).save(output / "guidance_interval.png")
    print_table(console, rows, settings)
    return {"settings": asdict(settings), "rows": rows, "files": ["guidance_interval.png"]}


@contextmanager
def counted_rows(pipe: DiffusionPipeline):
    """A list to which every call of the UNet adds the rows of its batch."""
    counts: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    try:
        yield counts
    finally:
        handle.remove()


def print_table(console: Console, rows: list[dict], settings: GuidanceIntervalSettings) -> None:
    """A row of numbers for each way of guiding."""
    title = f"Guidance on MNIST, {settings.num_inference_steps} steps; {settings.num_samples} images a row"
    table = Table(title=title, caption=LEGEND, caption_justify="left", box=SIMPLE)
    table.add_column("guidance", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name.removesuffix("_per_image"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["title"], *(style.format(row[name]) for name, style in COLUMNS.items()))
    console.print(table)
