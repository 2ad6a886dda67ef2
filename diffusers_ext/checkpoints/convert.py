"""Original checkpoints as Hub-layout folders."""

from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DDPMPipeline, DiffusionPipeline, UNet2DModel

from ..hub.downloads import check_source
from ..models import EDM2UNet2DModel
from ..pipelines import ADMUpsamplerPipeline, BoostAndSkipPipeline, EDM2Pipeline
from ..pipelines.call_arguments import checked_arguments
from ..runs.files import new_folder, staged_folder
from ..schedulers import EDMHeunScheduler
from .edm2 import read_edm2
from .edm2_check import EDM2SourceNetwork, sampling_error
from .guided_diffusion import read_network
from .guided_diffusion_check import SourceNetwork, conversion_error
from .tensor_files import checked_cast


class Converted(NamedTuple):
    """What a conversion wrote.

    Attributes:
        pipeline: as it lies in the folder.
        error: the largest difference of what the checkpoint's own tensors and the result compute, each conversion says
            of what; None where that was not asked for.
    """

    pipeline: DiffusionPipeline
    error: float | None


@checked_arguments
def convert_guided_diffusion(
    path: str | Path,
    folder: str | Path,
    preset: str | None = None,
    dtype: torch.dtype = torch.float32,
    check_steps: int = 3,
    **flags,
) -> Converted:
    """Write a guided-diffusion checkpoint as a pipeline folder; returns the pipeline and the error of the check.

    Upsamplers become an `ADMUpsamplerPipeline`, unconditional networks that a plain `UNet2DModel` holds a
    `DDPMPipeline`, which `BoostAndSkipPipeline.from_pretrained` reads as well, and others a `BoostAndSkipPipeline`.

    Args:
        path: as of `load_guided_diffusion`.
        folder: new or empty.
        preset: as of `load_guided_diffusion`.
        dtype: of the weights that are written.
        check_steps: steps that are sampled with the checkpoint's own tensors and with the result, in float32; the
            error is the largest difference, None for 0 steps, which check nothing.
        **flags: as of `load_guided_diffusion`.

    Raises:
        ValueError: for what `load_guided_diffusion` refuses, a folder that is not empty, and an error above 1e-3;
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
    checked_cast(unet, dtype)
    with staged_folder(folder) as (_, staged):
        pipeline.save_pretrained(staged)
    return Converted(pipeline, error)


@checked_arguments
def convert_edm2(
    path: str | Path,
    folder: str | Path,
    uncond: str | Path | None = None,
    vae: str | Path | None = None,
    check_steps: int = 3,
) -> Converted:
    """Write network pickles of EDM2 as an `EDM2Pipeline` folder; returns the pipeline and the error of the check.

    The weights keep the dtype of the files, which is float16 for published networks: load the folder with
    `torch_dtype=torch.float16` for the networks as their authors evaluate them. The scale and bias of the latents are
    those in the file.

    Args:
        path: the conditional network.
        folder: new or empty.
        uncond: the network that guides, an unconditional one or, for autoguidance, a weaker conditional one.
        vae: folder or Hub id of the decoder, an `AutoencoderKL`; None writes a folder without one, which samples
            latents.
        check_steps: steps that are sampled, guided by 2, with the files' own tensors and with the result; the error is
            the largest difference of the latents, None for 0 steps, which check nothing.

    Raises:
        ValueError: for what `load_edm2` refuses, networks that do not belong together, a decoder of other channels, a
            folder that is not empty, and an error above 1e-3; nothing is written then.
    """
    folder = new_folder(folder)
    if vae is not None:
        check_source(vae)  # before the networks are read
    checkpoints = [read_edm2(file) for file in (path, uncond) if file is not None]
    unet, *guide = (EDM2UNet2DModel.from_edm2_state_dict(file.state_dict, **file.config) for file in checkpoints)
    decoder = None if vae is None else _decoder(vae, unet.config.img_channels)
    scaling = {"latent_scale": checkpoints[0].latent_scale, "latent_bias": checkpoints[0].latent_bias}
    scaling = {name: values for name, values in scaling.items() if values is not None}
    pipeline = EDM2Pipeline(unet, EDMHeunScheduler(), decoder, guide[0] if guide else None, **scaling)
    error = None
    if check_steps:
        sources = [EDM2SourceNetwork(file.state_dict, file.config) for file in checkpoints]
        error = sampling_error(pipeline, sources, check_steps)
        if not error < 1e-3:
            raise ValueError(
                f"checkpoint {str(path)!r}: samples of the converted networks differ by {error:.2g} after"
                f" {check_steps} steps; the file must be of another kind of network, or this is a bug"
            )
    with staged_folder(folder) as (_, staged):
        pipeline.save_pretrained(staged)
    return Converted(pipeline, error)


def _decoder(vae: str | Path, channels: int) -> AutoencoderKL:
    decoder = AutoencoderKL.from_pretrained(vae)
    if decoder.config.latent_channels != channels:
        raise ValueError(
            f"vae {str(vae)!r} decodes latents of {decoder.config.latent_channels} channels, the network makes"
            f" {channels}; choose another one, or none for a network of pixels"
        )
    return decoder
