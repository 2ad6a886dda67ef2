"""Boost-and-Skip on the shipped MNIST model against what else one would try, in numbers.

    accelerate launch recipes/boost_and_skip_mnist.py --output out/boost_and_skip_mnist.json

Search with 2,000 samples and one seed; report with `--samples 5000 --seeds 3`. Each finished row is written to the
output at once, and a second start goes on after the last one, for the same steps and samples. `--only` picks rows.
All rows cost about the same: guidance evaluates the network twice a step and gets half of the steps.

Measured: see docs/boost_and_skip.md.
"""

import time
from functools import partial
from pathlib import Path

import click
import torch
from accelerate import Accelerator
from result_rows import ResultRows, summary
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from diffusers_ext.evaluation import evaluate_digits
from diffusers_ext.sampling import sample_images
from diffusers_ext.shipped import load_pipeline

SETTINGS = {
    "stock sampler": {},
    "boost and skip, gamma 1.5": {"gamma": 1.5, "skip_steps": 2},
    "boost and skip, gamma 2": {"gamma": 2.0, "skip_steps": 2},
    "boost and skip, gamma 3": {"gamma": 3.0, "skip_steps": 2},
    "boost and skip, gamma 4": {"gamma": 4.0, "skip_steps": 2},
    "boost and skip to sigma 5.8, gamma 3": {"gamma": 3.0, "skip_to_sigma": 5.8},  # where step 2 of 30 starts
    "boost alone (temperature), gamma 4": {"gamma": 4.0},
    "skip alone": {"skip_steps": 2},
    "guidance 0.8": {"guidance_scale": 0.8},
    "guidance 0.5": {"guidance_scale": 0.5},
}
METRICS = (
    "recognised",
    "knn_distance",
    "knn_distance_recognised",
    "lof",
    "rarity",
    "inside",
    "frechet",
    "seconds_per_image",
)
IMAGES_PER_SEED = 1_000_000  # seeds of a row do not overlap


def row_key(name: str, steps: int, samples: int, seed: int) -> str:
    return f"{name} | {steps} steps | {samples} samples | seed {seed}"


def run_row(pipe, autocast, settings: dict, steps: int, samples: int, seed: int, on_batch) -> dict:
    """Sample one setting with one seed, under autocast(), and measure it in full precision."""
    labels = torch.arange(samples) % 10
    if "guidance_scale" in settings:
        steps //= 2
    started = time.perf_counter()
    with autocast():
        images = sample_images(
            pipe, labels, seed * IMAGES_PER_SEED, on_batch=on_batch, num_inference_steps=steps, **settings
        )
    seconds = (time.perf_counter() - started) / samples
    return {"settings": settings, "steps": steps, **evaluate_digits(images, labels), "seconds_per_image": seconds}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/boost_and_skip_mnist.json"))
@click.option("--samples", default=2000, show_default=True, help="Images of a row.")
@click.option("--seeds", default=1, show_default=True, help="Rows of a setting.")
@click.option("--steps", default=30, show_default=True, help="Steps of the schedule, before skipping.")
@click.option("--only", multiple=True, type=click.Choice(list(SETTINGS)), help="Settings to run; by default all.")
@click.option("--mixed-precision", type=click.Choice(["no", "bf16"]), default="no", show_default=True)
def main(output, samples, seeds, steps, only, mixed_precision):
    """Measure Boost-and-Skip and its alternatives on the shipped MNIST model."""
    accelerator = Accelerator(mixed_precision=mixed_precision)
    console = Console()
    pipe = load_pipeline("mnist-unet", "boost-and-skip").to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    results = ResultRows(output)
    names = only or list(SETTINGS)
    with Progress(console=console) as progress:
        for seed in range(seeds):
            for name in names:
                key = row_key(name, steps, samples, seed)
                task = progress.add_task(key, total=samples)
                advance = partial(progress.advance, task)
                measure = partial(run_row, pipe, accelerator.autocast, SETTINGS[name], steps, samples, seed, advance)
                results.row(key, measure)
                progress.update(task, completed=samples)

    table = Table("setting", *METRICS, title=f"{samples} samples, {seeds} seeds, {steps} steps")
    for name in names:
        mine = [results.rows[row_key(name, steps, samples, seed)] for seed in range(seeds)]
        table.add_row(name, *(summary(mine, metric) for metric in METRICS))
    console.print(table)


if __name__ == "__main__":
    main()
