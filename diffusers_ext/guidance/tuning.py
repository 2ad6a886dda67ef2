"""Tune a guidance interval on a model: draw images for each candidate, compare their features with real ones."""

import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..checkpoints.tensor_files import read_json
from ..evaluation.evaluate import read_statistics
from ..evaluation.extractors import FeatureExtractor
from ..evaluation.images import open_images
from ..evaluation.notes import compression, few_images
from ..metrics import FeatureStatistics, frechet_distance
from ..pipelines.guidance_interval import GuidanceInterval
from ..runs.files import check_folder, replacing, write_json
from ..runs.lock import lock
from ..runs.provenance import describe_pipeline, hash_of
from ..sampling import sample_batches, to_uint8
from ..shipped import load_shipped_classifier
from .search import DistanceTable, GuidedSteps, IntervalSearch, as_rows, search_interval

DISTANCES, RESULT, PICTURE = "distances.json", "interval.json", "interval.png"


def tune_interval(
    pipe: DiffusionPipeline,
    extractor: FeatureExtractor,
    reference: tuple[torch.Tensor, torch.Tensor],
    guidance_scales: Sequence[float],
    labels: torch.Tensor,
    folder: str | Path,
    num_inference_steps: int = 30,
    seed: int = 0,
    batch_size: int = 50,
    on_batch: Callable[[GuidedSteps, int], None] | None = None,
) -> IntervalSearch:
    """Search the weight and the interval with the least Fréchet distance; see `search_interval`.

    Every candidate is judged by images of the same seeds and labels, so that candidates differ by guidance alone. The
    folder keeps each distance as soon as it is known (distances.json), and a second start goes on; at the end it holds
    interval.json, all candidates with their bounds, the best first.

    pipe: class-conditional, with a guidance_scale. extractor, reference: the feature space, and the mean (dim,) and
    covariance (dim, dim) of the real images in it. labels: (count,), a class for each image. The paper finds 5,000
    images enough to start with. on_batch: called with the candidate and the number of its images drawn so far.

    The distance of the winner is too good by what it was chosen for: measure it again with other seeds.

    Raises ValueError for weights of at most 1, a folder of something else, begun with other settings or in use, and
    pipelines without guidance.
    """
    folder = check_output(folder, guidance_scales, num_inference_steps)
    pipe.set_progress_bar_config(disable=True)
    sigmas = step_sigmas(pipe, labels[:1], num_inference_steps)
    settings = {
        **describe_pipeline(pipe),
        "features": [extractor.name, extractor.identity],
        "reference": hash_of(*(np.asarray(part, dtype=np.float64) for part in reference)),
        "num_inference_steps": num_inference_steps,
        "labels": labels.tolist(),
        "seed": seed,
    }
    objective = Objective(pipe, extractor, reference, labels, num_inference_steps, seed, batch_size, on_batch)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        table = DistanceTable(folder / DISTANCES, settings, objective)
        found = search_interval(table, guidance_scales, num_inference_steps)
        result = {"settings": settings, "sigmas": sigmas, "candidates": as_rows(found, sigmas)}
        write_json(folder / RESULT, result)
    return found


def check_output(folder: str | Path, guidance_scales: Sequence[float], num_inference_steps: int) -> Path:
    """The resolved path of a folder for a search: new, empty, or begun by one.

    Raises ValueError for others, and for weights and steps that `search_interval` refuses.
    """
    search_interval(lambda candidate: 0.0, guidance_scales, num_inference_steps)
    folder = check_folder(folder, DISTANCES)
    if (folder / RESULT).exists():
        with suppress(ValueError):
            if {"settings", "sigmas", "candidates"} <= set(read_json(folder / RESULT)):
                return folder
    elif not (folder / PICTURE).exists():
        return folder
    raise ValueError(
        f"{folder} holds an {RESULT} or {PICTURE} that is damaged or of something else; remove it, or choose another"
        " output folder"
    )


@dataclass(frozen=True)
class Objective:
    """The Fréchet distance of a candidate; the fields are the arguments of `tune_interval`."""

    pipe: DiffusionPipeline
    extractor: FeatureExtractor
    reference: tuple[torch.Tensor, torch.Tensor]
    labels: torch.Tensor
    num_inference_steps: int
    seed: int
    batch_size: int
    on_batch: Callable[[GuidedSteps, int], None] | None = None

    def __call__(self, candidate: GuidedSteps) -> float:
        statistics, done = FeatureStatistics(), 0
        with guided_call(self.pipe, candidate, self.num_inference_steps) as call:
            for batch in sample_batches(
                self.pipe, len(self.labels), self.labels, self.seed, self.batch_size, output_type="pt", **call
            ):
                statistics.update(self.extractor(to_uint8(batch, range(done, done + len(batch)))))
                done += len(batch)
                if self.on_batch is not None:
                    self.on_batch(candidate, done)
        return frechet_distance(statistics.mean, statistics.covariance, *self.reference)


@contextmanager
def guided_call(pipe: DiffusionPipeline, candidate: GuidedSteps, num_inference_steps: int) -> Iterator[dict]:
    """Arguments of the pipeline's call that guide as the candidate says, within the block.

    A pipeline that takes guided_steps is given them; to any other a `GuidanceInterval` is applied. Neither happens to
    one that is guided in all of its steps.
    """
    call = {"guidance_scale": candidate.guidance_scale, "num_inference_steps": num_inference_steps}
    steps = (candidate.first, candidate.last)
    if steps == (0, num_inference_steps - 1):
        yield call
    elif "guided_steps" in inspect.signature(pipe.__call__).parameters:
        yield {**call, "guided_steps": steps}
    else:
        with GuidanceInterval(pipe, guided_steps=steps):
            yield call


def step_sigmas(pipe: DiffusionPipeline, labels: torch.Tensor, num_inference_steps: int) -> list[float]:
    """The noise level (EDM's ratio) at which each step starts, and 0 after the last, as a call shows; labels: (1,)."""
    if hasattr(pipe.scheduler, "churn"):  # of EDM2, whose schedule is these levels
        pipe.scheduler.set_timesteps(num_inference_steps)
        return pipe.scheduler.sigmas.tolist()
    with GuidanceInterval(pipe, guided_steps=(0, 0)) as interval:
        call = {"guidance_scale": 2.0, "num_inference_steps": num_inference_steps}
        next(sample_batches(pipe, 1, labels, 0, 1, output_type="pt", **call))
    return [step.sigma for step in interval.report.steps] + [0.0]


def reference_statistics(
    path: str | Path | None, extractor: FeatureExtractor, batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of real images in a feature space: of a set, of a file with mu and sigma, or of MNIST.

    path: None takes the training set of the shipped classifier, for its features alone.

    Raises ValueError for None with other features, and as `open_images`. Warns of few images, and of compressed ones.
    """
    if path is None:
        if extractor.name != "classifier":
            raise ValueError(f"a reference is needed for {extractor.name} features: real images, or an .npz of them")
        reference = load_shipped_classifier()[1]
        return reference.mean, reference.covariance
    if (given := read_statistics(Path(path), extractor.name)) is not None:
        return given
    statistics, images = FeatureStatistics(), open_images(path)
    for batch in images.batches(batch_size):
        statistics.update(extractor(batch))
    notes = few_images(statistics.count, len(statistics.mean), "real "), compression({"uncompressed"}, images.formats)
    for note in filter(None, notes):
        warnings.warn(note, stacklevel=2)
    return statistics.mean, statistics.covariance


def print_search(found: IntervalSearch, folder: Path) -> None:
    """The best interval beside the best weight without one."""
    rows = json.loads((folder / RESULT).read_text())["candidates"]
    table = Table("", "weight", "steps", "sigma_lo", "sigma_hi", "Fréchet distance", box=SIMPLE)
    chosen = {"best interval": found.best_interval, "best without": found.best_everywhere}
    for name, candidate in chosen.items():
        row = next(row for row in rows if GuidedSteps(row["guidance_scale"], row["first"], row["last"]) == candidate)
        high = "inf" if row["sigma_hi"] is None else f"{row['sigma_hi']:.3g}"
        table.add_row(
            name, f"{candidate.guidance_scale:g}", f"{candidate.first}-{candidate.last}", f"{row['sigma_lo']:.3g}",
            high, f"{row['distance']:.4f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"{len(rows)} candidates; all of them in {folder / RESULT}. Measure the winner with other seeds.")


def plot_search(found: IntervalSearch, path: Path) -> Path:
    """Left: the distance over the weight, guided everywhere and in the best interval. Right: each interval tried.

    The sigmas are read from interval.json beside the picture.
    """
    from matplotlib.figure import Figure

    sigmas = json.loads((path.parent / RESULT).read_text())["sigmas"]
    weights = sorted({candidate.guidance_scale for candidate in found.distances})
    whole = (0, len(sigmas) - 2)
    everywhere, best = [], []
    for weight in weights:
        mine = {c: d for c, d in found.distances.items() if c.guidance_scale == weight}
        everywhere.append(next(d for c, d in mine.items() if (c.first, c.last) == whole))
        best.append(min(mine.values()))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(weights, everywhere, "o-", label="guided everywhere")
    left.plot(weights, best, "o-", label="best interval of each weight")
    left.set(xlabel="guidance weight", ylabel="Fréchet distance")
    left.legend(frameon=False)
    chosen = found.best_interval.guidance_scale
    finite = [sigma for sigma in sigmas if 0 < sigma < float("inf")]
    for candidate, distance in reversed(found.distances.items()):  # the best on top
        if candidate.guidance_scale == chosen:
            ends = min(sigmas[candidate.first], max(finite)), max(sigmas[candidate.last + 1], min(finite))
            colour = "C1" if candidate == found.best_interval else "0.6"
            right.plot(ends, [distance, distance], color=colour, linewidth=3 if colour == "C1" else 1.5)
    right.set(xscale="log", xlabel="guided sigma", title=f"intervals at weight {chosen:g}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")
    return path
