"""Study 3, the targets alone: how good the nearest real digits would be, by space and k, before any flow is trained.

    diffusers-ext train-postprocessing --base mnist-unet --real digits.npz --guidance-scales 1 2 4 6 --output out/flow
    python recipes/classifier_centric/mnist_neighbours.py out/flow/samples digits.npz --output out/neighbours

A flow that learned its task perfectly would turn the samples of all scales together into draws from their neighbours.
This draws one of the k nearest real digits for each sample, sought in pixels, in features of the shipped classifier or
in both, and measures the draws of each scale as `mnist.py` measures repaired samples. Nothing is trained.

SAMPLES holds guidance-SCALE/*.npz; REAL is an .npz with arr_0 (count, 28, 28, 1). Writes rows.json and targets.png.
"""

import json
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from diffusers_ext.evaluation import evaluate_digits, read_images
from diffusers_ext.flow import (
    balanced_weights,
    channels_first,
    classifier_features,
    combined_features,
    extract_features,
    find_neighbours,
    pixel_features,
)
from diffusers_ext.flow.features import CLASSIFIER_WEIGHT
from diffusers_ext.runs.lists import INTEGERS, ListsCommand

METRICS = ("frechet", "precision", "recall")


def read_scales(folder: Path, count: int) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """The first images and labels of each guidance scale, the smallest scale first."""
    found = {float(path.parent.name.removeprefix("guidance-")): path for path in folder.glob("guidance-*/*.npz")}
    if not found:
        raise click.UsageError(f"{folder} has no guidance-*/*.npz; give the samples of train-postprocessing")
    return {scale: tuple(part[:count] for part in read_images(found[scale])) for scale in sorted(found)}


def spaces(real: torch.Tensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """What train-postprocessing can seek neighbours in, by name. real: uint8 (count, 1, 28, 28)."""
    classifier = classifier_features("cpu")
    both = combined_features([(pixel_features, 1.0), (classifier, CLASSIFIER_WEIGHT)], real[:10_000])
    return {"pixel": pixel_features, "classifier": classifier, "pixel+classifier": both}


def draw(nearest: torch.Tensor, num_real: int, balance: bool, generator: torch.Generator) -> torch.Tensor:
    """One of each sample's neighbours: nearest (n, k) to indices (n,)."""
    weights = balanced_weights(nearest, num_real) if balance else torch.ones(nearest.shape)
    return nearest.gather(1, torch.multinomial(weights, 1, generator=generator))[:, 0]


def measure(images: np.ndarray, labels: np.ndarray) -> dict:
    pixels = channels_first(images).float() / 255
    return evaluate_digits(pixels, torch.from_numpy(labels), ("frechet", "precision_recall"))


def plot(rows: list[dict], path: Path) -> None:
    """Fréchet distance of the targets over k, a line for each scale; the samples themselves at the left end."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    spaces = list(dict.fromkeys(row["space"] for row in rows if row["space"]))
    for axes, space in zip(figure.subplots(1, len(spaces), sharey=True, squeeze=False)[0], spaces, strict=True):
        for scale in dict.fromkeys(row["scale"] for row in rows):
            mine = [row for row in rows if row["scale"] == scale]
            points = [(str(row["k"]), row["frechet"]) for row in mine if row["space"] == space]
            before = next(row["frechet"] for row in mine if row["space"] is None)
            axes.plot(*zip(("samples", before), *points, strict=True), "o-", label=f"scale {scale:g}")
        axes.set(title=f"neighbours by {space}", xlabel="k", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("Fréchet distance to the training set")
    figure.axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=130)


def print_rows(rows: list[dict], count: int) -> None:
    table = Table("space", "k", *(f"scale {s:g}" for s in dict.fromkeys(row["scale"] for row in rows)), box=SIMPLE)
    table.title = f"Fréchet distance, precision and recall of the targets of {count} samples a scale"
    for space, k in dict.fromkeys((row["space"], row["k"]) for row in rows):
        mine = [row for row in rows if (row["space"], row["k"]) == (space, k)]
        cells = [" ".join(f"{row[metric]:.3f}" for metric in METRICS) for row in mine]
        table.add_row(space or "samples", "" if k is None else str(k), *cells)
    Console(width=40 + 18 * len(cells)).print(table)


@click.command(cls=ListsCommand)
@click.argument("samples", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("real", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--k", "counts", type=INTEGERS, default=[1, 5, 20, 40, 200], show_default="1 5 20 40 200")
@click.option("--balance", is_flag=True, help="Visit real digits evenly, as train-postprocessing --balance does.")
@click.option("--count", default=2500, show_default=True, help="Samples of each scale.")
@click.option("--seed", default=0, show_default=True)
def main(samples, real, output, counts, balance, count, seed):
    """Measure the nearest real digits of the samples of each guidance scale."""
    scales, (pool, _) = read_scales(samples, count), read_images(real)
    generator = torch.Generator().manual_seed(seed)
    rows = [{"scale": scale, "space": None, "k": None, **measure(*drawn)} for scale, drawn in scales.items()]
    for space, extractor in spaces(channels_first(pool)).items():
        points = extract_features(channels_first(pool), extractor)
        drawn = [channels_first(images) for images, _ in scales.values()]
        nearest = find_neighbours(extract_features(torch.cat(drawn), extractor), points, max(counts)).indices
        for k in counts:
            chosen = draw(nearest[:, :k], len(pool), balance, generator).split([len(images) for images in drawn])
            for (scale, (_, labels)), indices in zip(scales.items(), chosen, strict=True):
                rows.append({"scale": scale, "space": space, "k": k, **measure(pool[indices], labels)})
    output.mkdir(parents=True, exist_ok=True)
    (output / "rows.json").write_text(json.dumps(rows, indent=2) + "\n")
    plot(rows, output / "targets.png")
    print_rows(rows, count)


if __name__ == "__main__":
    main()
