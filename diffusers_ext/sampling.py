"""Many images from one pipeline, each with a seed of its own."""

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from rich.progress import Progress

from .hub import new_folder
from .info import package_versions


def sample_batches(
    pipe: DiffusionPipeline, count: int, labels: torch.Tensor | None, seed: int, batch_size: int, **call
) -> Iterator:
    """The `images` of one pipeline call after the other; image i has the generator of seed + i and labels[i].

    An image does not depend on how many others are drawn, nor, up to round-off, on the batch. labels: (count,), for
    pipelines that take class_labels, or None for those that take batch_size. call: further arguments of the call.

    Raises ValueError for a count or batch size below 1, or labels of another number.
    """
    if count < 1 or batch_size < 1:
        raise ValueError(f"count and batch_size must be >= 1, got {count} and {batch_size}")
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels must hold one label an image, {count}, got {len(labels)}")
    for start in range(0, count, batch_size):
        rows = range(start, min(start + batch_size, count))
        generators = [torch.Generator().manual_seed(seed + i) for i in rows]
        size = {"batch_size": len(rows)} if labels is None else {"class_labels": labels[rows.start : rows.stop]}
        yield pipe(generator=generators, **size, **call).images


def sample_images(
    pipe: DiffusionPipeline,
    labels: torch.Tensor,
    seed: int = 0,
    batch_size: int = 50,
    on_batch: Callable[[int], None] | None = None,
    **call,
) -> torch.Tensor:
    """Class-conditional images (count, channels, height, width) in [0, 1], float32 on the CPU; see sample_batches.

    labels: (count,). on_batch: called with the number of images of each finished batch.
    """
    images = []
    for batch in sample_batches(pipe, len(labels), labels, seed, batch_size, output_type="pt", **call):
        images.append(batch.float().cpu())
        if on_batch is not None:
            on_batch(len(batch))
    return torch.cat(images)


def cycled_labels(pipe: DiffusionPipeline, count: int, labels: list[int] | None = None) -> torch.Tensor | None:
    """count labels (count,), the given ones or every class of the model in turn; None for an unconditional model.

    The classes are those of the unet without the pipeline's null class.

    Raises ValueError for labels given to a pipeline that takes none, and for an empty list.
    """
    takes_labels = "class_labels" in inspect.signature(pipe.__call__).parameters
    if labels is None:
        unet = getattr(pipe, "unet", None)
        classes = unet.config.get("num_class_embeds") if takes_labels and unet is not None else None
        if classes is None:
            return None
        labels = [label for label in range(classes) if label != pipe.config.get("null_class")]
    elif not takes_labels:
        raise ValueError(f"class labels {labels}: {type(pipe).__name__} takes none; leave them out")
    if not labels:
        raise ValueError("class labels must not be empty")
    return torch.tensor(labels)[torch.arange(count) % len(labels)]


def sample_to_folder(
    pipe: DiffusionPipeline, folder: Path, count: int, labels: torch.Tensor | None, seed: int, batch_size: int, **call
) -> None:
    """Write 000000.png, 000001.png, ... as they are drawn, then settings.json, into a new folder.

    Arguments as in sample_batches. Raises ValueError for a folder that is not empty, for arguments that the pipeline's
    call does not take, and for pipelines that need more than labels or a number of images.
    """
    known = inspect.signature(pipe.__call__).parameters
    if labels is None and "batch_size" not in known:
        raise ValueError(
            f"{type(pipe).__name__} cannot be asked for a number of images alone; this command samples pixel-space"
            " pipelines, unconditional or with class labels"
        )
    unknown = sorted(set(call) - set(known))
    if unknown:
        raise ValueError(
            f"{type(pipe).__name__} does not take {', '.join(unknown)}; leave it out or choose another pipeline"
            " (--pipeline boost-and-skip for gamma and skip_steps)"
        )
    folder = new_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    settings = {
        "pipeline": type(pipe).__name__,
        "model": str(pipe.config.get("_name_or_path")),
        "seed": seed,
        "batch_size": batch_size,
        "class_labels": None if labels is None else labels.tolist(),
        **call,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype),
        "versions": package_versions(),
    }
    number = 0
    with Progress() as progress:
        task = progress.add_task("sampling", total=count)
        for batch in sample_batches(pipe, count, labels, seed, batch_size, output_type="pil", **call):
            for picture in batch:
                picture.save(folder / f"{number:06d}.png")
                number += 1
            progress.advance(task, len(batch))
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
