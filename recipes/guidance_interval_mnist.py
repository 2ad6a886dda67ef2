"""A tuned guidance interval against tuned guidance without one, on MNIST digits of other seeds, in numbers.

    diffusers-ext tune-interval MODEL --output DIR ...
    python recipes/guidance_interval_mnist.py MODEL --interval-json DIR/interval.json --samples 5000 --seeds 3

MODEL is a class-conditional pipeline of 28x28 digits: a shipped model's name (mnist-unet with --pipeline
boost-and-skip) or a folder, such as the one that train_edm2_mnist.py writes. The settings are the best interval that
the search found, the best weight without an interval, and no guidance, with the search's number of steps. Each
finished row is written to the output at once, and a second start goes on after the last one. Run with the --dtype of
the search.

Fréchet distance, precision and recall are in the features of the shipped classifier. Evaluations are network rows for
an image, counted at the networks themselves.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click
import torch
from diffusers import DiffusionPipeline
from result_rows import ResultRows, summary
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from diffusers_ext.evaluation import evaluate_digits
from diffusers_ext.guidance.search import GuidedSteps
from diffusers_ext.guidance.tuning import guided_call
from diffusers_ext.machine.versions import best_device
from diffusers_ext.sampling import cycled_labels, sample_images
from diffusers_ext.shipped import load_pipeline

METRICS = {
    "frechet": "Fréchet",
    "precision": "precision",
    "recall": "recall",
    "recognised": "recog- nised",
    "evaluations": "evalu- ations",
    "seconds": "seconds",
}
NETWORKS = ("unet", "transformer", "guidance_unet")
IMAGES_PER_SEED = 1_000_000  # seeds do not overlap with each other, nor with the search's, which start at 0


def read_settings(path: Path) -> tuple[int, dict[str, GuidedSteps]]:
    """The number of steps of a search, and what to compare, by name. path: interval.json."""
    found = json.loads(path.read_text())
    steps = found["settings"]["num_inference_steps"]
    candidates = [GuidedSteps(row["guidance_scale"], row["first"], row["last"]) for row in found["candidates"]]
    everywhere = next(c for c in candidates if (c.first, c.last) == (0, steps - 1))
    best = candidates[0]
    settings = {
        "no guidance": GuidedSteps(1.0, 0, steps - 1),
        f"weight {everywhere.guidance_scale:g} everywhere": everywhere,
    }
    if best == everywhere:
        click.echo("the search found no interval that is better than guidance everywhere")
        return steps, settings
    return steps, {**settings, f"weight {best.guidance_scale:g}, steps {best.first}-{best.last}": best}


@contextmanager
def counted_rows(pipe: DiffusionPipeline) -> Iterator[Counter]:
    """Rows that each network of the pipeline runs within the block."""
    rows = Counter()
    networks = [(name, pipe.components[name]) for name in NETWORKS if pipe.components.get(name) is not None]

    def counter(name: str):
        return lambda module, args: rows.update({name: len(args[0])})

    hooks = [network.register_forward_pre_hook(counter(name)) for name, network in networks]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def run_row(pipe, candidate: GuidedSteps, steps: int, samples: int, batch_size: int, seed: int, on_batch) -> dict:
    """Sample one setting with one seed, and measure it; seconds are of the sampling alone."""
    labels = cycled_labels(pipe, samples)
    first = (seed + 1) * IMAGES_PER_SEED
    started = time.perf_counter()
    with counted_rows(pipe) as rows, guided_call(pipe, candidate, steps) as call:
        images = sample_images(pipe, labels, first, batch_size, on_batch, **call)
    seconds = time.perf_counter() - started
    images = (images * 255).round() / 255  # as the search judged them, and as files hold them
    numbers = evaluate_digits(images, labels, ("frechet", "precision_recall"))
    each = {name: count / samples for name, count in rows.items()}
    return {**numbers, "evaluations": sum(each.values()), "evaluations_of": each, "seconds": seconds}


@click.command()
@click.argument("model")
@click.option("--interval-json", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
@click.option("--pipeline", type=click.Choice(["boost-and-skip"]), default=None, help="As for the search.")
@click.option("--output", type=click.Path(path_type=Path), default=None, help="By default confirmed.json beside it.")
@click.option("--samples", default=5000, show_default=True, help="Images of a row.")
@click.option("--seeds", default=3, show_default=True, help="Rows of a setting.")
@click.option("--batch-size", default=100, show_default=True)
@click.option("--device", default=None, help="torch device; by default the fastest one here.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
def main(model, interval_json, pipeline, output, samples, seeds, batch_size, device, dtype):
    """Measure what a search for a guidance interval found for MODEL, with seeds that it did not see."""
    pipe = load_pipeline(model, pipeline, dtype=getattr(torch, dtype)).to(device or best_device())
    pipe.set_progress_bar_config(disable=True)
    steps, settings = read_settings(interval_json)
    results = ResultRows(output or interval_json.with_name("confirmed.json"))
    console = Console(width=130)
    title = f"{model}: {samples} samples, {seeds} seeds, {steps} steps"
    table = Table("setting", *METRICS.values(), title=title, box=SIMPLE)
    rows = {name: [] for name in settings}
    with Progress(console=console) as progress:
        for seed in range(seeds):
            for name, candidate in settings.items():
                key = f"{model} | {name} | {steps} steps | {samples} samples | {dtype} | seed {seed}"
                task = progress.add_task(key, total=samples)
                advance = partial(progress.advance, task)
                measure = partial(run_row, pipe, candidate, steps, samples, batch_size, seed, advance)
                rows[name].append(results.row(key, measure))
                progress.update(task, completed=samples)
    for name, mine in rows.items():
        table.add_row(name, *(summary(mine, metric) for metric in METRICS))
    console.print(table)


if __name__ == "__main__":
    main()
