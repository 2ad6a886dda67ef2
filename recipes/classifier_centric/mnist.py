"""Study 3: what strong guidance costs on MNIST, and what a postprocessing flow takes back (arXiv 2503.10638).

    diffusers-ext train-postprocessing --base mnist-unet --real digits.npz --guidance-scales 1 2 3 --features patch \\
        --num-inference-steps 16 --output out/flow
    python recipes/classifier_centric/mnist.py --flow one-for-all=out/flow/pipeline --output out/mnist

Samples the base at each guidance scale, repairs the same images with each flow and solver, and measures both: Fréchet
distance, precision and recall in the features of the shipped classifier, and the share that it recognises. "taken
back" is (before - after) / (before - best), where best is the plain sampler at its best scale. Several --flow compare
neighbours, k, or one flow for all scales with a flow for one.

2,000 samples of three scales, one flow and 10 Euler steps take 8 minutes of one CPU core in bfloat16. Every finished
row stays in rows.json, and a second start goes on. Writes frechet.png and digits.png beside it.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_rows import ResultRows, summary

from diffusers_ext import FlowPostprocessingPipeline
from diffusers_ext.evaluation import evaluate_digits, read_images
from diffusers_ext.evaluation.pictures import grid, side_by_side
from diffusers_ext.flow import channels_first
from diffusers_ext.sampling import sample_to_folder
from diffusers_ext.shipped import load_pipeline

METRICS = {"frechet": "Fréchet", "precision": "precision", "recall": "recall", "recognised": "recognised"}
BEFORE = "before"
SEED_OF_ROW = 1_000_000  # seeds do not overlap, nor with those that a flow was trained on, which start at 0
SHOWN = 60


def draw_base(base, folder: Path, scale: float, seed: int, samples: int, steps: int) -> tuple:
    """Images (samples, 1, 28, 28) in [0, 1], their labels (samples,) and the seconds that drawing took, now or 0."""
    started = time.perf_counter()
    done = sample_to_folder(
        base, folder / f"guidance-{scale:g}-seed-{seed}", samples, seed=(seed + 1) * SEED_OF_ROW, batch_size=100,
        format="npz", guidance_scale=scale, num_inference_steps=steps,
    )  # fmt: skip
    seconds = 0.0 if done.was_finished else time.perf_counter() - started
    images, labels = read_images(done.result)
    return channels_first(images) / 255, torch.from_numpy(labels), seconds


def repair(pipe: FlowPostprocessingPipeline, images: torch.Tensor, labels: torch.Tensor, solver: str) -> torch.Tensor:
    """Images (n, 1, 28, 28) in [0, 1] after the flow; solver: "euler:4" or "dopri5"."""
    name, _, steps = solver.partition(":")
    call = (
        {"solver": "dopri5", "rtol": 1e-3, "atol": 1e-3} if name == "dopri5" else {"num_inference_steps": int(steps)}
    )
    conditional = pipe.model.config.num_class_embeds is not None
    parts = []
    for batch, classes in zip(images.split(250), labels.split(250), strict=True):
        given = {"class_labels": classes.tolist()} if conditional else {}
        parts.append(pipe(batch, output_type="pt", **given, **call).images.float())
    return (torch.cat(parts) * 255).round() / 255


def measure_after(pipe, solver: str, images: torch.Tensor, labels: torch.Tensor) -> dict:
    started = time.perf_counter()
    repaired = repair(pipe, images, labels, solver)
    seconds = time.perf_counter() - started
    return {**evaluate_digits(repaired, labels, ("frechet", "precision_recall")), "seconds": seconds}


def taken_back(before: float, after: float, best: float) -> str:
    """Share of what the scale lost against the best one; nothing to say where it lost next to nothing."""
    return "-" if before <= 1.1 * best else f"{(before - after) / (before - best):.0%}"


def print_rows(table: dict, console: Console, title: str) -> None:
    """table: rows of all seeds by (scale, flow, solver)."""
    shown = Table("scale", "flow", "solver", *METRICS.values(), "taken back", title=title, box=SIMPLE)
    mean = {key: sum(row["frechet"] for row in rows) / len(rows) for key, rows in table.items()}
    best = min(value for key, value in mean.items() if key[1] == BEFORE)
    for key, rows in table.items():
        scale, flow, solver = key
        back = "" if flow == BEFORE else taken_back(mean[scale, BEFORE, ""], mean[key], best)
        shown.add_row(f"{scale:g}", flow, solver, *(summary(rows, metric) for metric in METRICS), back)
    console.print(shown)


def plot_frechet(table: dict, path: Path) -> None:
    """Fréchet distance over the guidance scale: the plain sampler, and each flow with each solver."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for flow, solver in dict.fromkeys((flow, solver) for _, flow, solver in table):
        points = [(key[0], sum(row["frechet"] for row in rows) / len(rows)) for key, rows in table.items()
                  if key[1:] == (flow, solver)]  # fmt: skip
        style = {"color": "black", "linewidth": 2} if flow == BEFORE else {"linewidth": 1.2}
        axes.plot(*zip(*points, strict=True), "o-", label=f"{flow} {solver}".strip(), **style)
    axes.set(xlabel="guidance scale", ylabel="Fréchet distance to the training set")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def draw_digits(pipe, solver: str, sets: dict[float, tuple], path: Path) -> None:
    """The same digits before and after, at the first, the middle and the last scale."""
    scales: Sequence[float] = sorted(sets)
    panels = {}
    for scale in dict.fromkeys((scales[0], scales[len(scales) // 2], scales[-1])):
        images, labels = (part[:SHOWN] for part in sets[scale][:2])
        panels[f"scale {scale:g}"] = grid(images, columns=10)
        panels[f"scale {scale:g}, repaired"] = grid(repair(pipe, images, labels, solver), columns=10)
    side_by_side(panels).save(path)


@click.command()
@click.option("--base", default="mnist-unet", show_default=True)
@click.option("--flow", "flows", multiple=True, required=True, metavar="NAME=DIR", help="A trained flow; repeat it.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--guidance-scales", default="1,2,3,4,5,6", show_default=True)
@click.option("--solvers", default="euler:1,euler:4,euler:10,dopri5", show_default=True)
@click.option("--samples", default=2000, show_default=True, help="Images of a row.")
@click.option("--seeds", default=1, show_default=True)
@click.option("--num-inference-steps", default=16, show_default=True, help="Of the base.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(base, flows, output, guidance_scales, solvers, samples, seeds, num_inference_steps, dtype, device):
    """Measure plain guidance and its repair on MNIST."""
    pipe = load_pipeline(base, dtype=getattr(torch, dtype)).to(device)
    repairers = {name: load_pipeline(folder, dtype=getattr(torch, dtype)).to(device)
                 for name, _, folder in (flow.partition("=") for flow in flows)}  # fmt: skip
    for each in (pipe, *repairers.values()):
        each.set_progress_bar_config(disable=True)
    results, table, sets = ResultRows(output / "rows.json"), {}, {}
    scales = [float(scale) for scale in guidance_scales.split(",")]
    for seed in range(seeds):
        for scale in scales:
            draw = draw_base(pipe, output / "samples", scale, seed, samples, num_inference_steps)
            sets.setdefault(scale, draw)
            images, labels, seconds = draw
            key = f"{base} | {num_inference_steps} steps | {samples} samples | {dtype} | scale {scale:g} | seed {seed}"
            plain = partial(evaluate_digits, images, labels, ("frechet", "precision_recall"))
            row = results.row(key, lambda: {**plain(), "seconds": seconds})  # noqa: B023
            table.setdefault((scale, BEFORE, ""), []).append(row)
            for name, repairer in repairers.items():
                for solver in solvers.split(","):
                    after = partial(measure_after, repairer, solver, images, labels)
                    row = results.row(f"{key} | {name} | {solver}", after)
                    table.setdefault((scale, name, solver), []).append(row)
                    click.echo(f"{key} | {name} | {solver}: Fréchet distance {row['frechet']:.4f}")
    console = Console(width=130)
    print_rows(dict(sorted(table.items(), key=lambda item: item[0][0])), console, f"{samples} samples, {seeds} seeds")
    plot_frechet(table, output / "frechet.png")
    draw_digits(next(iter(repairers.values())), solvers.split(",")[-1], sets, output / "digits.png")


if __name__ == "__main__":
    main()
