"""Original checkpoints as Hub-layout folders."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DDPMPipeline, DiffusionPipeline, UNet2DModel

from ..casting import dtype_option
from ..hub.downloads import check_source
from ..models import EDM2UNet2DModel
from ..pipelines import ADMUpsamplerPipeline, BoostAndSkipPipeline, EDM2Pipeline
from ..pipelines.call_arguments import checked_arguments
from ..runs.files import new_folder, staged_folder
from ..schedulers import EDMHeunScheduler
from .edm2 import read_edm2
from .guided_diffusion import read_network
from .tensor_files import check_finite, checked_cast


class Converted(NamedTuple):
    """What a conversion wrote.

    Attributes:
        pipeline: as it lies in the folder.
        error: the largest difference of outputs between the networks as they were read and those of the folder, loaded
            again; 0 but for rounding where the dtype of the weights is kept.
    """

    pipeline: DiffusionPipeline
    error: float


@checked_arguments
def convert_guided_diffusion(
    path: str | Path,
    folder: str | Path,
    preset: str | None = None,
    dtype: torch.dtype = torch.float32,
    **flags,
) -> Converted:
    """Write a guided-diffusion checkpoint as a pipeline folder; returns the pipeline and the error of the check.

    Upsamplers become an `ADMUpsamplerPipeline`, unconditional networks that a plain `UNet2DModel` holds a
    `DDPMPipeline`, which `BoostAndSkipPipeline.from_pretrained` reads as well, and others a `BoostAndSkipPipeline`.
    The error is the largest difference of one evaluation, in float32, between the network as read and the folder.

    Args:
        path: as of `load_guided_diffusion`.
        folder: new or empty.
        preset: as of `load_guided_diffusion`.
        dtype: of the weights that are written.
        **flags: as of `load_guided_diffusion`.

    Raises:
        ValueError: for what `load_guided_diffusion` refuses, a network whose output is not finite, a folder that is
            not empty, and one that does not load again with the same outputs; nothing is written then.
    """
    folder = new_folder(folder)
    _, layout, _, unet, scheduler = read_network(path, preset, flags)
    expected = _adm_output(unet)
    if layout.is_upsampler:
        pipeline = ADMUpsamplerPipeline(unet, scheduler)
    elif layout.num_classes is None and type(unet) is UNet2DModel:
        pipeline = DDPMPipeline(unet, scheduler)
    else:
        pipeline = BoostAndSkipPipeline(unet, scheduler)
    checked_cast(unet, dtype)
    return _written(pipeline, folder, lambda pipe: _adm_output(pipe.unet), expected, torch.float32)


@checked_arguments
def convert_edm2(
    path: str | Path,
    folder: str | Path,
    uncond: str | Path | None = None,
    vae: str | Path | None = None,
) -> Converted:
    """Write network pickles of EDM2 as an `EDM2Pipeline` folder; returns the pipeline and the error of the check.

    The weights keep the dtype of the files, which is float16 for published networks: load the folder with
    `torch_dtype=torch.float16` for the networks as their authors evaluate them. The scale and bias of the latents are
    those in the file. The error is the largest difference of one guided step, in the dtype of the files, between the
    networks as read and the folder.

    Args:
        path: the conditional network.
        folder: new or empty.
        uncond: the network that guides, an unconditional one or, for autoguidance, a weaker conditional one.
        vae: folder or Hub id of the decoder, an `AutoencoderKL`; None writes a folder without one, which samples
            latents.

    Raises:
        ValueError: for what `load_edm2` refuses, networks that do not belong together or whose output is not finite, a
            decoder of other channels, a folder that is not empty, and one that does not load again with the same
            outputs; nothing is written then.
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
    return _written(pipeline, folder, _edm2_latents, _edm2_latents(pipeline), unet.dtype)


def _decoder(vae: str | Path, channels: int) -> AutoencoderKL:
    decoder = AutoencoderKL.from_pretrained(vae)
    if decoder.config.latent_channels != channels:
        raise ValueError(
            f"vae {str(vae)!r} decodes latents of {decoder.config.latent_channels} channels, the network makes"
            f" {channels}; choose another one, or none for a network of pixels"
        )
    return decoder


def _written(
    pipeline: DiffusionPipeline,
    folder: Path,
    outputs: Callable[[DiffusionPipeline], torch.Tensor],
    expected: torch.Tensor,
    dtype: torch.dtype,
) -> Converted:
    """Save beside the folder, load in a dtype, compare the outputs, and only then put it in its place.

    expected: the outputs of the networks as read, in that dtype.
    """
    with staged_folder(folder) as (_, staged):
        pipeline.save_pretrained(staged)
        loaded = type(pipeline).from_pretrained(staged, **dtype_option(dtype))
        error = (outputs(loaded) - expected).abs().max().item()
        if pipeline.unet.dtype == dtype and not error <= 1e-3 * expected.abs().max().item():
            raise ValueError(
                f"{type(pipeline).__name__}: the folder that was written gives other outputs than the checkpoint, by"
                f" {error:.2g}; this is a bug"
            )
    return Converted(pipeline, error)


@torch.no_grad()
def _adm_output(unet: UNet2DModel) -> torch.Tensor:
    """One evaluation of noise of the smallest size; raises ValueError if it is not finite."""
    generator, classes = torch.Generator().manual_seed(0), unet.config.num_class_embeds
    noise = _small_noise(unet.config.in_channels, len(unet.config.block_out_channels), generator)
    labels = torch.randint(classes, (1,), generator=generator) if classes else None
    output = unet(noise, torch.ones(1), class_labels=labels).sample
    check_finite({"output": output}, f"{type(unet).__name__}, evaluated on noise")
    return output


def _edm2_latents(pipeline: EDM2Pipeline) -> torch.Tensor:
    """One step, guided by 2 where a network guides, from noise of the smallest size; raises as the pipeline does."""
    config, generator = pipeline.unet.config, torch.Generator().manual_seed(0)
    noise = _small_noise(config.img_channels, len(config.channel_mult), generator)
    label = torch.randint(config.label_dim, (1,), generator=generator) if config.label_dim else None
    pipeline.set_progress_bar_config(disable=True)
    scale = 1.0 if pipeline.guidance_unet is None else 2.0
    call = {"sigmas": [2.0], "guidance_scale": scale, "latents": noise, "output_type": "latent"}
    return pipeline(label, **call).images


def _small_noise(channels: int, levels: int, generator: torch.Generator) -> torch.Tensor:
    """One sample, 4 pixels wide at the lowest level."""
    return torch.randn(1, channels, *[4 * 2 ** (levels - 1)] * 2, generator=generator)
