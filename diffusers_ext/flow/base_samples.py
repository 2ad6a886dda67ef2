"""What a flow for one base pipeline starts from: samples of the base at several guidance scales, and a network."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DModel

from ..image_sets import read_images
from ..sampling import sample_to_folder


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

    folder: gets a folder for each scale, see `sample_to_folder`. guidance_scales: weights as the base takes them; 1 is
    no guidance, and several train one flow for all of them (arXiv 2503.10638). count: samples of each scale, of
    seeds of their own; classes and prompts are gone through in turn. On many processes each draws its part.

    Returns uint8 (scales * count, channels, height, width), and their classes (scales * count,) or None.

    Raises ValueError for no scale, one given twice, and as `sample_to_folder`.
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


def channels_first(images: np.ndarray) -> torch.Tensor:
    """uint8 (count, height, width, channels) as `read_images` has it, to (count, channels, height, width)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def velocity_network(
    images: torch.Tensor, num_classes: int | None = None, block_out_channels: Sequence[int] = (24, 64, 96)
) -> UNet2DModel:
    """A convolutional `UNet2DModel` for the velocity of square images (count, channels, size, size).

    num_classes: of a flow that is told the class. block_out_channels: of each resolution, halved from one to the next,
    multiples of 8.

    Raises ValueError for images that are not square or cannot be halved that often, and for other channels.
    """
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
