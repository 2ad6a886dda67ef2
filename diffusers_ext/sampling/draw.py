"""One call of a pipeline after the other, each sample with a generator of its own.

Sample i is drawn with a CPU generator seeded by seed + i, so it depends on nothing but that and, up to round-off, on
the batch that it is drawn in.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ..pipelines.call_arguments import checked_arguments
from ..pipelines.pixel_space import NotFiniteError
from .labels import hashed


def is_discrete(pipe: DiffusionPipeline) -> bool:
    """Whether it is a `DiscreteDiffusionPipeline`, this package's or the copy in an exported repository.

    Args:
        pipe: any pipeline.
    """
    return {"tokens", "given"} <= set(inspect.signature(pipe.__call__).parameters)


def draws_sequences(pipe: DiffusionPipeline) -> bool:
    """Whether tokens or texts come out, not images.

    Args:
        pipe: any pipeline.
    """
    return is_discrete(pipe) and pipe.model.config.get("shape") is None


@checked_arguments(but="prompts")
def sample_batches(
    pipe: DiffusionPipeline,
    count: int,
    labels: torch.Tensor | None,
    seed: int,
    batch_size: int,
    prompts: Sequence[str] | None = None,
    **call,
) -> Iterator:
    """The `images`, or with output_type="tokens" the `tokens`, of one pipeline call after the other.

    Image i has the generator of seed + i and labels[i]; it does not depend on how many others are drawn, nor, up to
    round-off, on the batch.

    Args:
        pipe: any pipeline that `sample_to_folder` takes.
        count: number of images.
        labels: (count,), for pipelines that take class_labels; None of them and of prompts for those that take
            batch_size.
        seed: image i is drawn with seed + i.
        batch_size: images that are drawn together.
        prompts: count of them, for those that take prompt.
        **call: further arguments of the call.

    Raises:
        ValueError: for a count or batch size below 1, or labels or prompts of another number.
    """
    check_sizes(count, batch_size)
    inputs = {} if labels is None else {"class_labels": labels.tolist()}
    inputs |= {} if prompts is None else {"prompt": list(prompts)}
    for name, values in inputs.items():
        if len(values) != count:
            raise ValueError(f"{name} must hold one a sample, {count}, got {len(values)}")
    for rows in batches_of(count, batch_size):
        yield draw(pipe, rows, seed, inputs, call)


@checked_arguments
def sample_images(
    pipe: DiffusionPipeline,
    labels: torch.Tensor,
    seed: int = 0,
    batch_size: int = 50,
    on_batch: Callable[[int], None] | None = None,
    **call,
) -> torch.Tensor:
    """Class-conditional images (count, channels, height, width) in [0, 1], float32 on the CPU; see sample_batches.

    Args:
        pipe: a class-conditional pipeline.
        labels: (count,).
        seed: image i is drawn with seed + i.
        batch_size: images that are drawn together.
        on_batch: called with the number of images of each finished batch.
        **call: further arguments of the pipeline's call.
    """
    images = []
    for batch in sample_batches(pipe, len(labels), labels, seed, batch_size, output_type="pt", **call):
        images.append(_as_tensor(batch).float().cpu())
        if on_batch is not None:
            on_batch(len(batch))
    return torch.cat(images)


def check_sizes(count: int, batch_size: int) -> None:
    """Check a number of samples and of those in a batch.

    Args:
        count: number of samples.
        batch_size: samples in a batch.

    Raises:
        ValueError: for a count or batch size below 1.
    """
    if count < 1 or batch_size < 1:
        raise ValueError(f"count and batch_size must be >= 1, got {count} and {batch_size}")


def batches_of(count: int, batch_size: int) -> list[range]:
    """The samples of each batch."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def draw(pipe: DiffusionPipeline, rows: range, seed: int, inputs: dict, call: dict) -> Any:
    """The images or tokens of one call; global random numbers are seeded by the batch and left as they were.

    Of pipelines without images what they give first, frames or audios.

    Args:
        pipe: any pipeline that `sample_to_folder` takes.
        rows: of the samples.
        seed: sample i has the generator of seed + i.
        inputs: of all samples, by argument.
        call: further arguments of the call.

    Raises:
        ValueError: for a respacing that the pipeline does not take.
    """
    generators = [torch.Generator().manual_seed(seed + i) for i in rows]
    given = {name: values[rows.start : rows.stop] for name, values in inputs.items()} or {"batch_size": len(rows)}
    device = pipe._execution_device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(hashed("batch", seed + rows.start))  # not the seed of an image, whose noise it would repeat
        try:
            output = pipe(generator=generators, **given, **call)
            if call.get("output_type") == "tokens":
                return output.tokens
            return output.images if hasattr(output, "images") else output[0]  # frames, audios
        except NotFiniteError as error:
            raise error.of_sample(rows[error.sample]) from None
        except TypeError as error:
            steps = call.get("num_inference_steps")
            if isinstance(steps, str):
                raise ValueError(
                    f"{type(pipe).__name__} failed with num_inference_steps={steps!r} ({error}); give it a number"
                ) from error
            raise


def _as_tensor(images):
    """Images as channels-first tensors where they are arrays, which diffusers 0.37 gives for "pt" too."""
    return torch.from_numpy(images).permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else images


@checked_arguments(but="images")
def to_uint8(images: torch.Tensor | np.ndarray, rows: range) -> np.ndarray:
    """Images in [0, 1] as uint8 (batch, height, width, channels).

    Args:
        images: a tensor (batch, channels, height, width) or an array (batch, height, width, channels).
        rows: of the samples that the images are, whose number they must have.

    Raises:
        ValueError: for another number of images than rows, and for values that are not finite.
    """
    images = _as_tensor(images) if getattr(images, "ndim", 4) == 4 else images
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or len(images) != len(rows):
        got = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"the pipeline must give {len(rows)} images (batch, channels, height, width), got {got}")
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = rows[int((~finite).nonzero()[0])]
        raise ValueError(f"image {bad} is not finite; use another dtype, bfloat16 or float32, or a smaller gamma")
    return (images.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().contiguous().numpy()


def to_integers(tokens: torch.Tensor, rows: range, vocab_size: int) -> np.ndarray:
    """Tokens (batch, length) in the smallest unsigned type that holds the vocabulary.

    Raises:
        ValueError: for another number of sequences than rows.
    """
    if tokens.ndim != 2 or len(tokens) != len(rows):
        raise ValueError(f"the pipeline must give {len(rows)} sequences (batch, length), got {tuple(tokens.shape)}")
    return tokens.cpu().numpy().astype(np.min_scalar_type(vocab_size - 1))
