"""Flow postprocessing: digits of the shipped MNIST model at several guidance scales, before and after their repair."""

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from ..evaluation import NEIGHBOURS, evaluate_digits
from ..evaluation.evaluate import BLOCKS
from ..evaluation.pictures import grid, places_beside, side_by_side
from ..sampling import sample_images
from ..shipped import load_pipeline
from .tables import ERRORS, distance_of_real_images, errors_row, print_table, with_notes, words_table

CLASSES = 10
SHOWN = 100  # images in each panel of the picture
COLUMNS = {
    "recognised": "{:.1%}",
    "knn_distance": "{:.3f}",
    "frechet": "{:.3f}",
    "precision": "{:.3f}",
    "recall": "{:.3f}",
    "seconds_per_image": "{:.4f}",
}
NAMES = {  # of columns, if others
    "recognised": "recog.",
    "knn_distance": "AvgkNN",
    "frechet": "Fréchet",
    "precision": "prec.",
    "seconds_per_image": "s/image",
}
LEGEND = (
    f"AvgkNN: mean distance to the {NEIGHBOURS['knn_distance']} nearest training images. Fréchet: distance to the"
    " training set. precision: share of samples among real images; recall: share of real images among samples; k"
    f" {NEIGHBOURS['precision_recall']}. seconds: an image, of the base, or of the repair alone."
)


@dataclass(frozen=True)
class FlowPostprocessingSettings:
    """What is sampled and how it is repaired."""

    flow: str = "mnist-flow"
    guidance_scales: tuple[float, ...] = (15.0,)
    num_inference_steps: int = 10
    repair_steps: int = 10
    num_samples: int = 200
    seed: int = 0


FULL = FlowPostprocessingSettings(guidance_scales=(1.0, 6.0, 15.0), num_inference_steps=16, num_samples=250)


def run_flow_postprocessing(
    output: Path, device: str, console: Console, settings: FlowPostprocessingSettings | None = None
) -> dict:
    """Sample, repair, measure and print; write flow_postprocessing.png into the folder.

    Every guidance scale has the same seeds and labels, and the repaired images are those of the row above. Returns the
    settings, the rows of numbers, the table in words, the files, and where the panels lie in the picture.
    """
    settings = settings or FlowPostprocessingSettings()
    base = load_pipeline("mnist-unet", "boost-and-skip").to(device)
    flow = load_pipeline(settings.flow).to(device)
    for pipe in (base, flow):
        pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(settings.num_samples) % CLASSES

    rows, panels = [], {}
    with Progress(console=console) as progress:
        for scale in settings.guidance_scales:
            advance = partial(progress.advance, progress.add_task(f"guidance {scale:g}", total=len(labels)))
            call = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": scale}
            started = time.perf_counter()
            images = sample_images(base, labels, settings.seed, on_batch=advance, **call)
            drawn = time.perf_counter()
            steps = {"num_inference_steps": settings.repair_steps}
            repaired = flow(images, class_labels=labels, output_type="pt", **steps).images.float().cpu()
            finished = time.perf_counter()
            for is_repaired, sheet, seconds in ((False, images, drawn - started), (True, repaired, finished - drawn)):
                title = f"guidance {scale:g}" + (", repaired" if is_repaired else "")
                metrics, errors = ("knn_distance", "frechet", "precision_recall"), len(labels) >= 2 * BLOCKS
                numbers = evaluate_digits(sheet, labels, metrics, with_errors=errors)
                numbers["seconds_per_image"] = seconds / len(labels)
                row = {"title": title, "guidance_scale": scale, "repaired": is_repaired}
                rows.append({**row, **numbers})
                panels[title] = grid(sheet[:SHOWN], columns=CLASSES)
    side_by_side(panels).save(output / "flow_postprocessing.png")
    table = in_words(rows, settings)
    print_table(console, table)
    result = {"settings": asdict(settings), "rows": rows, "table": table}
    return {
        **result,
        "files": ["flow_postprocessing.png"],
        "pictures": {"flow_postprocessing.png": places_beside(panels)},
    }


def in_words(rows: list[dict], settings: FlowPostprocessingSettings) -> dict:
    """A row of the table before and one after the repair, for each guidance scale."""
    title = (
        f"Flow postprocessing on MNIST, {settings.num_inference_steps} steps, repaired in {settings.repair_steps};"
        f" {settings.num_samples} images a row"
    )
    words = [[row["title"], *(style.format(row[name]) for name, style in COLUMNS.items())] for row in rows]
    words.append(errors_row(rows, COLUMNS, lambda name, value: COLUMNS[name].format(value)))
    legend = f"{LEGEND} {ERRORS} {distance_of_real_images(settings.num_samples)}"
    legend = with_notes(legend, settings.num_samples)
    return words_table(title, legend, ["digits", *(NAMES.get(name, name) for name in COLUMNS)], words)
