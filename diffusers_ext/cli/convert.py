"""`diffusers-ext convert`: original checkpoints."""

from pathlib import Path

import click

from .convert_discrete import convert_countdown_command, convert_sedd_command, convert_tauldr_command, report
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
@click.option(
    "--check-steps", type=click.IntRange(min=0), default=3, show_default=True,
    help="Steps to sample with the checkpoint's own tensors and with the result; 0 checks nothing.",
)  # fmt: skip
def convert_guided_diffusion_command(checkpoint, output, flags, preset, dtype, check_steps):
    """Write CHECKPOINT, a guided-diffusion .pt file, to the new folder OUTPUT.

    FLAGS are those of the original command line, as they stand there: --image_size 64 --num_channels 192 ... What the
    tensors show may be left out.
    """
    import torch

    from ..checkpoints import convert_guided_diffusion
    from ..checkpoints.guided_diffusion import parse_flags
    from ..runs.files import write_once

    weights = getattr(torch, dtype)
    flags = parse_flags(flags)
    (pipeline, error), finished = write_once(
        output, lambda folder: convert_guided_diffusion(checkpoint, folder, preset, weights, check_steps, **flags)
    )
    if error is not None:
        click.echo(f"largest difference to the checkpoint over {check_steps} steps in float32: {error:.1e}")
    report(output, finished, f"{type(pipeline).__name__} with {type(pipeline.unet).__name__}")


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
@click.option(
    "--check-steps", type=click.IntRange(min=0), default=3, show_default=True,
    help="Steps to sample with the files' own tensors and with the result; 0 checks nothing.",
)  # fmt: skip
def convert_edm2_command(checkpoint, output, uncond, vae, check_steps):
    """Write CHECKPOINT, a network pickle of EDM2, to the new folder OUTPUT.

    Nothing in the pickle is executed. The weights keep their dtype, float16 in published files.
    """
    from ..checkpoints import convert_edm2
    from ..runs.files import write_once

    (pipeline, error), finished = write_once(
        output, lambda folder: convert_edm2(checkpoint, folder, uncond, vae, check_steps)
    )
    if error is not None:
        click.echo(f"largest difference to the checkpoint after {check_steps} steps: {error:.1e}")
    report(output, finished, f"{type(pipeline).__name__} in {str(pipeline.unet.dtype).removeprefix('torch.')}")
