"""Original checkpoints as Hub-layout folders."""

from pathlib import Path

import torch
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel

from ..hub import new_folder
from ..pipelines import ADMUpsamplerPipeline, BoostAndSkipPipeline
from .guided_diffusion import read_network
from .guided_diffusion_check import SourceNetwork, conversion_error


def convert_guided_diffusion(
    path: str | Path,
    folder: str | Path,
    preset: str | None = None,
    dtype: torch.dtype = torch.float32,
    check_steps: int = 3,
    **flags,
) -> tuple[DiffusionPipeline, float | None]:
    """Write a guided-diffusion checkpoint as a pipeline folder; returns the pipeline and the error of the check.

    Upsamplers become an `ADMUpsamplerPipeline`, unconditional networks that a plain `UNet2DModel` holds a
    `DDPMPipeline`, which `BoostAndSkipPipeline.from_pretrained` reads as well, and others a `BoostAndSkipPipeline`.

    path, preset, flags: as for `load_guided_diffusion`. dtype: of the weights that are written. check_steps: steps
    that are sampled with the checkpoint's own tensors and with the result, in float32; the error is the largest
    difference, None for 0 steps, which check nothing.

    Raises ValueError for what `load_guided_diffusion` refuses, a folder that is not empty, and an error above 1e-3;
    nothing is written then.
    """
    folder = new_folder(folder)
    state, layout, settings, unet, scheduler = read_network(path, preset, flags)
    error = None
    if check_steps:
        error = conversion_error(SourceNetwork(state, layout, settings), unet, scheduler, check_steps)
        if not error < 1e-3:
            raise ValueError(
                f"checkpoint {str(path)!r}: the converted network differs from the checkpoint by {error:.2g} over"
                f" {check_steps} steps; the flags must be wrong, or this is a bug"
            )
    if layout.is_upsampler:
        pipeline = ADMUpsamplerPipeline(unet, scheduler)
    elif layout.num_classes is None and type(unet) is UNet2DModel:
        pipeline = DDPMPipeline(unet, scheduler)
    else:
        pipeline = BoostAndSkipPipeline(unet, scheduler)
    pipeline.to(dtype).save_pretrained(folder)
    return pipeline, error
