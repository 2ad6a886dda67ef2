"""Guidance interval: the shipped MNIST model without guidance, with it in every step, and in an interval."""

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from ..evaluation import NEIGHBOURS, evaluate_digits
from ..evaluation.evaluate import BLOCKS
from ..evaluation.pictures import grid, places_beside, side_by_side
from ..guidance.rows import counted_rows
from ..pipelines import GuidanceInterval
from ..sampling import sample_images
from ..shipped import load_pipeline
from .tables import ERRORS, distance_of_real_images, errors_row, print_table, with_notes, words_table

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
NAMES = {  # of columns, if others
    "recognised": "recog.",
    "frechet": "Fréchet",
    "precision": "prec.",
    "rows_per_image": "rows",
    "seconds_per_image": "s/image",
}
LEGEND = (
    "Fréchet: distance to the training set, lower is nearer. precision: share of samples among real images; recall:"
    f" share of real images among samples; k {NEIGHBOURS['precision_recall']}. rows: network evaluations an image."
    " Same seeds, labels and, with guidance, weight."
)


@dataclass(frozen=True)
class GuidanceIntervalSettings:
    """What is sampled; the interval is (sigma_lo, sigma_hi]. The picture shows guidance_scale alone."""

    guidance_scale: float = 3.0
    further_scales: tuple[float, ...] = ()
    sigma_lo: float = 0.75
    sigma_hi: float = 1.7
    num_inference_steps: int = 10
    num_samples: int = 200
    seed: int = 0

    def variants(self) -> list[tuple[float, bool]]:
        """Guidance weight of each row, and whether it is limited to the interval; the first three are shown."""
        weights = (self.guidance_scale, *self.further_scales)
        return [(1.0, False), *((weight, limited) for weight in weights for limited in (False, True))]

    def title(self, weight: float, limited: bool) -> str:
        """A setting in words."""
        if weight == 1:
            return "no guidance"
        return f"weight {weight:g} " + (f"in ({self.sigma_lo:g}, {self.sigma_hi:g}]" if limited else "everywhere")


FULL = GuidanceIntervalSettings(further_scales=(2.0, 5.0), num_inference_steps=16, num_samples=250)


def run_guidance_interval(
    output: Path, device: str, console: Console, settings: GuidanceIntervalSettings | None = None
) -> dict:
    """Sample, measure and print; write guidance_interval.png into the folder.

    Every row has the same seeds and labels. Returns the settings, the rows of numbers, the table in words, the files,
    and where the panels lie in the picture.
    """
    settings = settings or GuidanceIntervalSettings()
    pipe = load_pipeline("mnist-unet", "boost-and-skip").to(device)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(settings.num_samples) % CLASSES

    rows, panels = [], {}
    with Progress(console=console) as progress:
        for weight, limited in settings.variants():
            title = settings.title(weight, limited)
            advance = partial(progress.advance, progress.add_task(f"{title:>25}", total=len(labels)))
            call = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": weight}
            bounds = {"sigma_lo": settings.sigma_lo, "sigma_hi": settings.sigma_hi}
            started = time.perf_counter()
            with GuidanceInterval(pipe, **bounds) if limited else nullcontext(), counted_rows(pipe) as count:
                images = sample_images(pipe, labels, settings.seed, on_batch=advance, **call)
            seconds = time.perf_counter() - started
            errors = len(labels) >= 2 * BLOCKS
            numbers = evaluate_digits(images, labels, ("frechet", "precision_recall"), with_errors=errors)
            numbers["rows_per_image"] = sum(count) / len(labels)
            numbers["seconds_per_image"] = seconds / len(labels)
            row = {"title": title, "guidance_scale": weight, "limited": limited}
            rows.append({**row, **numbers})
            if weight in (1, settings.guidance_scale):
                panels[title] = grid(images[:SHOWN], columns=CLASSES)
    side_by_side(panels).save(output / "guidance_interval.png")
    table = in_words(rows, settings)
    print_table(console, table)
    result = {"settings": asdict(settings), "rows": rows, "table": table}
    return {**result, "files": ["guidance_interval.png"], "pictures": {"guidance_interval.png": places_beside(panels)}}


def in_words(rows: list[dict], settings: GuidanceIntervalSettings) -> dict:
    """A row of the table for each way of guiding."""
    title = f"Guidance on MNIST, {settings.num_inference_steps} steps; {settings.num_samples} images a row"
    columns = ["guidance", *(NAMES.get(name, name) for name in COLUMNS)]
    words = [[row["title"], *(style.format(row[name]) for name, style in COLUMNS.items())] for row in rows]
    words.append(errors_row(rows, COLUMNS, lambda name, value: COLUMNS[name].format(value)))
    legend = f"{LEGEND} {ERRORS} {distance_of_real_images(settings.num_samples)}"
    return words_table(title, with_notes(legend, settings.num_samples), columns, words)
