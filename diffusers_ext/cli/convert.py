"""`diffusers-ext convert`: original checkpoints."""

from pathlib import Path

import click

from .convert_discrete import convert_countdown_command, convert_sedd_command, convert_tauldr_command, write_by
from .options import DTYPE


@click.group()
def convert():
    """Turn original checkpoints into folders that diffusers loads."""


for command in (convert_countdown_command, convert_sedd_command, convert_tauldr_command):
    convert.add_command(command)


@convert.command(
    "guided-diffusion", context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
)
@click.argument("checkpoint", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--preset", default=None, help="Flags of a published checkpoint; an unknown name lists them.")
@DTYPE
def convert_guided_diffusion_command(checkpoint, output, flags, preset, dtype):
    """Write CHECKPOINT, a guided-diffusion .pt file, to the new folder OUTPUT.

    FLAGS are those of the original command line, as they stand there: --image_size 64 --num_channels 192 ... What the
    tensors show may be left out.
    """
    import torch

    from ..checkpoints import convert_guided_diffusion
    from ..checkpoints.guided_diffusion import parse_flags

    weights, flags = getattr(torch, dtype), parse_flags(flags)
    write_by(output, lambda folder: convert_guided_diffusion(checkpoint, folder, preset, weights, **flags), "unet")


@convert.command("edm2")
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--uncond", type=click.Path(path_type=Path, exists=True, dir_okay=False), default=None,
    help="The network that guides: an unconditional one, or a weaker conditional one for autoguidance.",
)  # fmt: skip
@click.option(
    "--vae", default=None, metavar="MODEL",
    help="Folder or Hub id of the decoder, such as stabilityai/sd-vae-ft-mse; without it the folder gives latents.",
)  # fmt: skip
def convert_edm2_command(checkpoint, output, uncond, vae):
    """Write CHECKPOINT, a network pickle of EDM2, to the new folder OUTPUT.

    Nothing in the pickle is executed. The weights keep their dtype, float16 in published files.
    """
    from ..checkpoints import convert_edm2

    write_by(output, lambda folder: convert_edm2(checkpoint, folder, uncond, vae), "unet")
