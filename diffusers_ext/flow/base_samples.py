"""What a flow for one base pipeline starts from: samples of the base at several guidance scales, and a network."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DModel

from ..evaluation import read_images
from ..metrics.features import check_k
from ..pipelines.call_arguments import checked_arguments
from ..sampling import cycled_labels, sample_batches, sample_to_folder, to_uint8
from .features import extract_features


def draw_base_samples(
    base: DiffusionPipeline,
    folder: str | Path,
    guidance_scales: Sequence[float],
    count: int,
    prompts: Sequence[str] | None = None,
    num_inference_steps: int | str = 50,
    seed: int = 0,
    batch_size: int = 32,
    accelerator: Accelerator | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Samples of a base pipeline at each guidance scale, one set after the other; goes on after an interruption.

    Args:
        base: the pipeline that is to be repaired later.
        folder: gets a folder for each scale, see `sample_to_folder`.
        guidance_scales: weights as the base takes them; 1 is no guidance, and several train one flow for all of them
            (arXiv 2503.10638).
        count: samples of each scale, of seeds of their own; classes and prompts are gone through in turn. On many
            processes each draws its part.
        prompts: of a text-to-image base.
        num_inference_steps: of the base's call.
        seed: of the first sample.
        batch_size: samples that are drawn together.
        accelerator: of a program that has one, see `sample_to_folder`.

    Returns:
        Samples, uint8 (scales * count, channels, height, width), and their classes (scales * count,) or None.

    Raises:
        ValueError: for no scale, one given twice, and as `sample_to_folder`.
    """
    scales = [float(scale) for scale in guidance_scales]
    if not scales or len(set(scales)) < len(scales):
        raise ValueError(f"guidance_scales must be one or more different numbers, got {scales}")
    sets = []
    for position, scale in enumerate(scales):
        done = sample_to_folder(
            base, Path(folder) / f"guidance-{scale:g}", count, prompts=prompts, seed=seed + position * count,
            batch_size=batch_size, format="npz", accelerator=accelerator, num_inference_steps=num_inference_steps,
            guidance_scale=scale,
        )  # fmt: skip
        sets.append(read_images(done.result))
    images = channels_first(np.concatenate([images for images, _ in sets]))
    labels = None if sets[0][1] is None else torch.from_numpy(np.concatenate([labels for _, labels in sets]))
    return images, labels


def check_base(
    base: DiffusionPipeline,
    real: torch.Tensor,
    k: int,
    real_labels: torch.Tensor | None = None,
    prompts: Sequence[str] | None = None,
    num_inference_steps: int | str = 50,
    guidance_scale: float = 1.0,
    features: str | Callable[[torch.Tensor], torch.Tensor] = "pixel",
    block_out_channels: Sequence[int] = (24, 64, 96),
) -> None:
    """Try on one sample what thousands are drawn for: see `draw_base_samples` and `train_postprocessing_flow`.

    Args:
        base: as of `draw_base_samples`.
        real: uint8 (m, channels, height, width).
        k: as of `train_postprocessing_flow`.
        real_labels: (m,), where neighbours are sought within the class.
        prompts: as of `draw_base_samples`.
        num_inference_steps: as of `draw_base_samples`.
        guidance_scale: one of those of `draw_base_samples`.
        features: as of `train_postprocessing_flow`.
        block_out_channels: as of `velocity_network`.

    Raises:
        ValueError: for real images of another size than the base's samples, k larger than their number or that of a
            class, and what the base, the features and `velocity_network` refuse.
    """
    base.set_progress_bar_config(disable=True)
    classes = None if prompts is not None else _every_class(base)
    drawn = sample_batches(
        base, 1, classes if classes is None else classes[:1], 0, 1, prompts=None if prompts is None else prompts[:1],
        output_type="pt", num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
    )  # fmt: skip
    sample = channels_first(to_uint8(next(drawn), range(1)))
    if sample.shape[1:] != real.shape[1:]:
        shapes = tuple(sample.shape[1:]), tuple(real.shape[1:])
        raise ValueError(f"samples and real images must have one shape, got {shapes[0]} and {shapes[1]}")
    check_k(k, len(real), "number of real images")
    if real_labels is not None:
        for label in [] if classes is None else classes.tolist():
            check_k(k, int((real_labels == label).sum()), f"number of real images of class {label}")
    if features != "pixel":
        extract_features(real[:2], features)
    velocity_network(real[:1], None, block_out_channels)


def _every_class(base: DiffusionPipeline) -> torch.Tensor | None:
    """The classes of a base, without its null class, or None."""
    one = cycled_labels(base, 1)
    return None if one is None else cycled_labels(base, 10_000).unique()


@checked_arguments
def channels_first(images: np.ndarray) -> torch.Tensor:
    """uint8 (count, height, width, channels) as `read_images` has it, to (count, channels, height, width).

    Args:
        images: as `read_images` has them.

    Raises:
        ValueError: for another shape.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (count, height, width, channels), got {images.shape}")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


@checked_arguments
def velocity_network(
    images: torch.Tensor, num_classes: int | None = None, block_out_channels: Sequence[int] = (24, 64, 96)
) -> UNet2DModel:
    """A convolutional `UNet2DModel` for the velocity of square images (count, channels, size, size).

    Args:
        images: (count, channels, size, size).
        num_classes: of a flow that is told the class.
        block_out_channels: channels of each resolution, which is halved from one to the next, multiples of 8.

    Raises:
        ValueError: for images that are not square or cannot be halved that often, and for other channels.
    """
    if images.ndim != 4 or (num_classes is not None and num_classes < 1):
        raise ValueError(
            "images must be (count, channels, size, size) and num_classes None or >= 1, got"
            f" {tuple(images.shape)} and {num_classes}"
        )
    channels, height, width = images.shape[1:]
    halvings = len(block_out_channels) - 1
    if height != width or height % 2**halvings:
        raise ValueError(
            f"images must be square with a side that is a multiple of {2**halvings}, got {height} x {width}; resize"
            " them, or give fewer block_out_channels"
        )
    if not block_out_channels or any(size < 8 or size % 8 for size in block_out_channels):
        raise ValueError(f"block_out_channels must be multiples of 8, at least one, got {list(block_out_channels)}")
    return UNet2DModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(block_out_channels),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * len(block_out_channels),
        up_block_types=("UpBlock2D",) * len(block_out_channels),
        add_attention=False,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=num_classes,
    )
