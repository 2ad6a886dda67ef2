"""What a boost costs on the shipped MNIST model, and the setting that `choose_boost` finds for a share of digits.

    python recipes/choose_boost_mnist.py --output out/choose_boost_mnist

Rarity is AvgkNN, the mean distance to the 5 nearest of 10,000 training images in the features of the shipped
classifier. Writes choice.json, what was found, and tradeoff.png, rarity against the share of recognised digits: all
that the search has measured, larger gammas besides, and the setting of the paper, gamma 4 with 3 of 250 steps skipped.
Each setting is kept as soon as it is measured, and a second start goes on.

Measured: see docs/boost_and_skip.md.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure
from result_rows import ResultRows
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from diffusers_ext import choose_boost
from diffusers_ext.boost import BoostChoice, MeasuredBoost
from diffusers_ext.boost.shares import at_least
from diffusers_ext.metrics import nearest_neighbours
from diffusers_ext.runs.files import replacing, write_json
from diffusers_ext.runs.lists import NUMBERS, ListsCommand
from diffusers_ext.sampling import sample_images
from diffusers_ext.shipped import load_pipeline, load_shipped_classifier

NEIGHBOURS = 5
PAPER = {"gamma": 4.0, "skip_steps": 3, "num_inference_steps": 250}
REPORT_SEED = 3_000_000  # of no image of the search


def measured(pipe, classifier, rarity, samples: int, settings: dict, on_batch) -> dict:
    """One setting, on digits of other seeds than the search's."""
    labels = torch.arange(samples) % 10
    images = sample_images(pipe, labels, REPORT_SEED, 50, on_batch, **settings)
    with torch.no_grad():
        valid = (classifier(images * 2 - 1).logits.argmax(1) == labels).double()
    share, error = valid.mean().item(), (valid.std() / samples**0.5).item()
    rare = rarity(images).mean().item()
    return asdict(MeasuredBoost(settings["gamma"], None, share, error, at_least(share, samples), rare))


def draw_curve(choice: BoostChoice, others: dict[str, MeasuredBoost], target: float, path: Path) -> None:
    """Rarity over the share of recognised digits, a line for each noise level."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for level in choice.largest:
        line = {one.gamma: one for one in choice.measured if one.skip_to_sigma == level}
        points = [line[gamma] for gamma in sorted(line)]
        axes.errorbar(
            [one.recognised for one in points], [one.rarity for one in points], xerr=[one.error for one in points],
            fmt="o-", markersize=4, capsize=2, label=f"start at sigma {level:g}, gamma 1 to {points[-1].gamma:g}",
        )  # fmt: skip
    for (name, one), marker in zip({"stock sampler": choice.stock, **others}.items(), "s*", strict=True):
        axes.errorbar(one.recognised, one.rarity, xerr=one.error, fmt=marker, color="k", markersize=11, label=name)
    chosen = choice.confirmed
    axes.errorbar(
        chosen.recognised, chosen.rarity, xerr=chosen.error, fmt="D", color="C3", markersize=8,
        label=f"chosen: gamma {chosen.gamma:.3g} from sigma {chosen.skip_to_sigma:g}, other seeds",
    )  # fmt: skip
    axes.axvline(target, color="0.6", linewidth=1, linestyle="--")
    axes.set(xlabel="share recognised", ylabel="AvgkNN")
    axes.invert_xaxis()
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


@click.command(cls=ListsCommand)
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/choose_boost_mnist"), show_default=True)
@click.option("--recognised", default=0.9, show_default=True, help="The share that is asked for.")
@click.option("--samples", default=500, show_default=True, help="Digits of a setting.")
@click.option("--steps", default=30, show_default=True, help="Steps of the schedule, before the skip.")
@click.option(
    "--levels", type=NUMBERS, default=[3.0, 6.0, 12.0], show_default="3,6,12", help="Noise levels to start from."
)
@click.option("--paper-samples", type=int, default=None, help="Digits of the paper's setting; by default as many.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
def main(output, recognised, samples, steps, levels, paper_samples, dtype):
    """Choose a boost for the shipped MNIST model, and draw what boosts cost."""
    started = time.perf_counter()
    pipe = load_pipeline("mnist-unet", "boost-and-skip", dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    classifier, reference = load_shipped_classifier()

    def rarity(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = classifier(images * 2 - 1).features
        return torch.from_numpy(nearest_neighbours(features, reference.features, NEIGHBOURS)[0].mean(axis=1))

    console = Console()
    with Progress(console=console) as progress:
        tasks = {}

        def note(name: str, done: int, total: int = samples) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, visible=done < total)

        output.mkdir(parents=True, exist_ok=True)
        choice = choose_boost(
            pipe, classifier, recognised, num_samples=samples, num_inference_steps=steps, skip_to_sigma=levels,
            rarity=rarity, resume=output / "measured.json", on_batch=lambda settings, done: note(str(settings), done),
        )  # fmt: skip
        name = f"paper: gamma {PAPER['gamma']:g}, skip {PAPER['skip_steps']} of {PAPER['num_inference_steps']}"
        paper_samples, done = paper_samples or samples, [0]

        def advance(count: int) -> None:
            done[0] += count
            note(name, done[0], paper_samples)

        rows = ResultRows(output / "others.json")
        key = f"{name} | {paper_samples} samples | {dtype}"
        other = rows.row(key, lambda: measured(pipe, classifier, rarity, paper_samples, PAPER, advance))

    paper = MeasuredBoost(**other)
    draw_curve(choice, {name: paper}, recognised, output / "tradeoff.png")
    found = {name: asdict(getattr(choice, name)) for name in ("stock", "chosen", "confirmed")}
    write_json(output / "choice.json", {"settings": choice.settings, **found, "largest": choice.largest})
    table = Table("setting", "recognised", "at least", "AvgkNN")
    for title, one in {**found, name: other}.items():
        share = f"{one['recognised']:.3f} ± {one['error']:.3f}"
        table.add_row(title, share, f"{one['at_least']:.3f}", f"{one['rarity']:.3f}")
    console.print(table)
    console.print(json.dumps({"settings": choice.settings, "largest": choice.largest}))
    console.print(f"{len({(one.gamma, one.skip_to_sigma) for one in choice.measured})} settings of {samples} digits")
    console.print(f"{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
