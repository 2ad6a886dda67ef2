"""diffusers' guiders on the shipped MNIST model, with equal seeds: a picture and their numbers.

    python recipes/guiders_mnist.py --samples 1000 --seeds 3

Plain guidance, an interval of it, adaptive projected guidance (arXiv 2410.02416), CFG-Zero* (arXiv 2503.18886) and
adaptive projected guidance in the interval, all with one weight. Fréchet distance, precision and recall are in the
features of the shipped classifier, against the training set; mean and standard error over the seeds. Each finished row
is kept, and a second start goes on after the last one.
"""

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click
import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance
from result_rows import ResultRows, summary
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from diffusers_ext.evaluation import evaluate_digits
from diffusers_ext.evaluation.pictures import grid, side_by_side
from diffusers_ext.guidance.rows import counted_rows
from diffusers_ext.machine.versions import best_device
from diffusers_ext.pipelines import apply_guider, remove_guider
from diffusers_ext.runs.lists import INTERVAL, ListsCommand
from diffusers_ext.sampling import cycled_labels, sample_images
from diffusers_ext.shipped import load_pipeline

METRICS = {
    "frechet": "Fréchet",
    "precision": "precision",
    "recall": "recall",
    "recognised": "recognised",
    "rows": "rows",
}
IMAGES_PER_SEED = 1_000_000  # seeds do not overlap


def ways(weight: float, interval: tuple[float, float]) -> dict:
    """Guider and interval of each row, by name."""
    bounds = {"guidance_interval": interval}
    projected = partial(AdaptiveProjectedGuidance, weight, adaptive_projected_guidance_rescale=0.0, eta=0.0)
    return {
        "CFG": (ClassifierFreeGuidance(weight), {}),
        f"CFG in ({interval[0]:g}, {interval[1]:g}]": (ClassifierFreeGuidance(weight), bounds),
        "APG": (projected(), {}),
        "CFG-Zero*": (ClassifierFreeZeroStarGuidance(weight, zero_init_steps=0), {}),
        f"APG in ({interval[0]:g}, {interval[1]:g}]": (projected(), bounds),
    }


@contextmanager
def guided(pipe, guider, bounds: dict):
    """The pipeline with a guider, for a block."""
    apply_guider(pipe, guider, **bounds)
    try:
        yield
    finally:
        remove_guider(pipe)


@click.command(cls=ListsCommand)
@click.option("--weight", default=3.0, show_default=True)
@click.option(
    "--guidance-interval", "--interval", "interval", type=INTERVAL, default=(0.75, 1.7), show_default="0.75:1.7"
)
@click.option("--steps", default=16, show_default=True)
@click.option("--samples", default=1000, show_default=True, help="Images a row and seed.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--batch-size", default=100, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/guiders_mnist"))
@click.option("--device", default=None)
def main(weight, interval, steps, samples, seeds, batch_size, output, device):
    """Draw digits with each guider, and measure them."""
    output.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline("mnist-unet", "boost-and-skip").to(device or best_device())
    pipe.set_progress_bar_config(disable=True)
    labels = cycled_labels(pipe, samples)
    call = {"num_inference_steps": steps, "guidance_scale": 2.0}  # of the call; the guider's weight is used
    results, rows, panels = ResultRows(output / "results.json"), {}, {}
    with Progress(console=Console(stderr=True)) as progress:
        for name, (guider, bounds) in ways(weight, interval).items():
            with guided(pipe, guider, bounds):
                panels[name] = grid(sample_images(pipe, torch.arange(50) % 10, 0, **call), columns=10)
            for seed in range(seeds):

                def measured(name=name, guider=guider, bounds=bounds, seed=seed) -> dict:
                    advance = partial(progress.advance, progress.add_task(f"{name}, seed {seed}", total=samples))
                    with guided(pipe, guider, bounds), counted_rows(pipe) as count:
                        images = sample_images(pipe, labels, (seed + 1) * IMAGES_PER_SEED, batch_size, advance, **call)
                    numbers = evaluate_digits(images, labels, ("frechet", "precision_recall"))
                    return {**numbers, "rows": sum(count) / samples}

                key = f"{name}, weight {weight:g}, {steps} steps, {samples} images, seed {seed}"
                rows.setdefault(name, []).append(results.row(key, measured))
    side_by_side(panels).save(output / "guiders.png")
    table = Table("guider", *METRICS.values(), box=SIMPLE)
    for name in rows:
        table.add_row(name, *(summary(rows[name], metric) for metric in METRICS))
    Console().print(table)


if __name__ == "__main__":
    main()
