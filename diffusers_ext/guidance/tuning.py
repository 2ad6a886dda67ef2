"""Tune a guidance interval on a model: draw images for each candidate, compare their features with real ones."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

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
from ..metrics import FeatureStatistics
from ..runs.files import TEMPORARY, check_folder, replacing, write_json
from ..runs.lock import lock
from ..runs.provenance import describe_pipeline, hash_of
from ..shipped import load_shipped_classifier
from .memory import remembering
from .objective import Inputs, Judge, Objective, guided_call, number_of_images, per_image, step_sigmas  # noqa: F401
from .search import DistanceTable, GuidedSteps, IntervalSearch, as_rows, search_interval

MEMORY = 4 << 30  # bytes of network outputs that are remembered
DISTANCES, RESULT, PICTURE = "distances.json", "interval.json", "interval.png"


def tune_interval(
    pipe: DiffusionPipeline,
    judge: Judge,
    reference: tuple[torch.Tensor, torch.Tensor] | None,
    guidance_scales: Sequence[float],
    inputs: Inputs,
    folder: str | Path,
    num_inference_steps: int = 30,
    seed: int = 0,
    batch_size: int = 50,
    on_batch: Callable[[GuidedSteps, int], None] | None = None,
    call: Mapping | None = None,
    memory: int = MEMORY,
) -> IntervalSearch:
    """Search the weight and the interval with the least Fréchet distance, or with the highest score of your own; see
    `search_interval`.

    Every candidate is judged by images of the same seeds and inputs, so that candidates differ by guidance alone. The
    folder keeps each batch of a candidate and each distance as soon as it is known (distances.json), and a second
    start goes on; at the end it holds interval.json, all candidates with their bounds, the best first, each with the
    network rows that its images take.

    Candidates of a round begin alike: as long as none is guided yet, and at one weight as long as all still are. They
    are drawn side by side, and what the networks answered to equal inputs is remembered (`OutputMemory`), so that the
    results are the same, bit for bit, and each beginning is run once. What rounds share is found again as far as the
    memory reaches.

    The distance of the winner is too good by what it was chosen for: measure it again with other seeds.

    Args:
        pipe: any pipeline that `GuidanceInterval` limits, with a guidance_scale or true_cfg_scale.
        judge: a `FeatureExtractor`; or a function of your own, score(images, inputs), that gives one number an image,
            higher is better, for images as the pipeline gives them, (batch, channels, height, width) in [0, 1], and
            the inputs of the batch by name. The distance is then minus the mean score. A start goes on with a score of
            the same name.
        reference: the mean (dim,) and covariance (dim, dim) of real images in the extractor's space; None with a
            function of your own.
        guidance_scales: the weights to try, each above 1.
        inputs: labels (count,), a class for each image; or arguments of the pipeline's call with one value an image,
            by name, {"prompt": [...], "negative_prompt": [...]}. The paper finds 5,000 images enough to start with.
        folder: new, empty or begun by the same search.
        num_inference_steps: steps of the sampler.
        seed: of the first image.
        batch_size: images that are drawn together.
        on_batch: called with the candidate and the number of its images drawn so far.
        call: further arguments of the call.
        memory: bytes; 0 remembers nothing.

    Raises:
        ValueError: for weights of at most 1, a folder of something else, begun with other settings or in use,
            pipelines without guidance, inputs of unequal length, and scores that are not finite or not one an image.
    """
    folder = check_output(folder, guidance_scales, num_inference_steps)
    count, call = number_of_images(per_image(inputs)), dict(call or {})
    if reference is None and (isinstance(judge, FeatureExtractor) or not callable(judge)):
        raise ValueError(
            f"reference=None goes with a score function of your own, got {type(judge).__name__}; give the mean and"
            " covariance of real images (reference_statistics)"
        )
    pipe.set_progress_bar_config(disable=True)
    first = inputs[:1] if isinstance(inputs, torch.Tensor) else {name: one[:1] for name, one in inputs.items()}
    sigmas = step_sigmas(pipe, first, num_inference_steps, call)
    objective = Objective(
        pipe, judge, reference, inputs, num_inference_steps, seed, min(batch_size, count), on_batch, call
    )
    settings = {**describe_pipeline(pipe), **objective.settings()}
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder), remembering(pipe, memory) as remembered:
        table = DistanceTable(folder / DISTANCES, settings, objective)
        rounds = 0

        def prepare(candidates: list[GuidedSteps]) -> None:
            nonlocal rounds
            rounds += 1
            if new := [candidate for candidate in candidates if candidate.key not in table.values]:
                for candidate, distance, rows in objective.together(new, measured, remembered, rounds % 2 == 0):
                    table.add(candidate, distance, rows)

        with batches_folder(folder, settings, batch_size) as measured:
            found = search_interval(table, guidance_scales, num_inference_steps, prepare)
        candidates = as_rows(found, sigmas, table.rows)
        write_json(folder / RESULT, {"settings": settings, "sigmas": sigmas, "candidates": candidates})
    return replace(found, rows_asked=remembered.rows_asked, rows_run=remembered.rows_run)


@contextmanager
def batches_folder(folder: Path, settings: dict, batch_size: int) -> Iterator[Path]:
    """Where the measured batches of unfinished candidates are kept, with these settings; gone at the end of a search.
    What starts with others left is removed, since no distance came of it. Only under `lock`."""
    number = hash_of(torch.frombuffer(bytearray(json.dumps([settings, batch_size]).encode()), dtype=torch.uint8))
    mine = folder / f"{TEMPORARY}batches-{number[:16]}"
    for other in folder.glob(f"{TEMPORARY}batches-*"):
        if other != mine:
            shutil.rmtree(other)
    mine.mkdir(exist_ok=True)
    yield mine
    shutil.rmtree(mine)


def check_output(folder: str | Path, guidance_scales: Sequence[float], num_inference_steps: int) -> Path:
    """The resolved path of a folder for a search: new, empty, or begun by one.

    Args:
        folder: of the run.
        guidance_scales: of the search.
        num_inference_steps: of the search.

    Raises:
        ValueError: for others, and for weights and steps that `search_interval` refuses.
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


def reference_statistics(
    path: str | Path | None, extractor: FeatureExtractor, batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of real images in a feature space: of a set, of a file with mu and sigma, or of MNIST.

    Warns of few images, and of compressed ones.

    Args:
        path: of the set or file; None takes the training set of the shipped classifier, for its features alone.
        extractor: of the features.
        batch_size: images that pass it together.

    Raises:
        ValueError: for None with other features, and as `open_images`.
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
    result = read_json(folder / RESULT)
    rows = result["candidates"]
    table = Table("", "weight", "steps", "sigma_lo", "sigma_hi", _distance_of(result), box=SIMPLE)
    chosen = {"best interval": found.best_interval, "best without": found.best_everywhere}
    for name, candidate in chosen.items():
        row = next(row for row in rows if GuidedSteps(row["guidance_scale"], row["first"], row["last"]) == candidate)
        low = "-" if row["sigma_lo"] is None else f"{row['sigma_lo']:.3g}"
        high = low if low == "-" else "inf" if row["sigma_hi"] is None else f"{row['sigma_hi']:.3g}"
        table.add_row(
            name, f"{candidate.guidance_scale:g}", f"{candidate.first}-{candidate.last}", low, high,
            f"{row['distance']:.4f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"{len(rows)} candidates; all of them in {folder / RESULT}. Measure the winner with other seeds.")


def _distance_of(result: dict) -> str:
    return "minus the mean score" if "score" in result["settings"] else "Fréchet distance"


def plot_search(found: IntervalSearch, path: Path) -> Path:
    """Left: the distance over the weight, guided everywhere and in the best interval. Right: each interval tried.

    The sigmas are read from interval.json beside the picture; where the scheduler has none, steps are counted.
    """
    from matplotlib.figure import Figure

    result = read_json(path.parent / RESULT)
    known = None not in result["sigmas"]
    sigmas = result["sigmas"] if known else [*range(len(result["sigmas"]), 0, -1)]
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
    left.set(xlabel="guidance weight", ylabel=_distance_of(result))
    left.legend(frameon=False)
    chosen = found.best_interval.guidance_scale
    finite = [sigma for sigma in sigmas if 0 < sigma < float("inf")]
    for candidate, distance in reversed(found.distances.items()):  # the best on top
        if candidate.guidance_scale == chosen:
            ends = min(sigmas[candidate.first], max(finite)), max(sigmas[candidate.last + 1], min(finite))
            colour = "C1" if candidate == found.best_interval else "0.6"
            right.plot(ends, [distance, distance], color=colour, linewidth=3 if colour == "C1" else 1.5)
    right.set(
        xscale="log" if known else "linear",
        xlabel="guided sigma" if known else "steps left",
        title=f"intervals at weight {chosen:g}",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")
    return path
