"""`diffusers-ext convert sedd | countdown | tauldr`: original checkpoints of discrete diffusion."""

from collections.abc import Callable
from pathlib import Path

import click

from .options import DTYPE

OUTPUT = click.argument("output", type=click.Path(path_type=Path, file_okay=False))


@click.command("sedd")
@click.argument("source")
@OUTPUT
@click.option("--tokenizer", default=None, help="Folder or Hub id, gpt2 for the published networks; by default none.")
@click.option("--revision", default=None, help="Branch, tag or commit of a repository on the Hub.")
@DTYPE
def convert_sedd_command(source, output, tokenizer, revision, dtype):
    """Write SOURCE, a SEDD folder or Hub id such as louaaron/sedd-small, to the new folder OUTPUT."""
    from ..checkpoints import convert_sedd

    write_by(output, lambda folder: convert_sedd(source, folder, tokenizer, _torch_dtype(dtype), revision))


@click.command("countdown")
@click.argument("checkpoint", type=click.Path(path_type=Path, dir_okay=False))
@OUTPUT
@click.option("--length", type=click.IntRange(min=1), default=256, show_default=True, help="Of the sequences.")
@click.option("--num-heads", type=click.IntRange(min=1), default=None, help="Where the checkpoint does not show it.")
@DTYPE
def convert_countdown_command(checkpoint, output, length, num_heads, dtype):
    """Write CHECKPOINT, a CountDown network of Jump Your Steps, to the new folder OUTPUT."""
    from ..checkpoints import convert_countdown

    write_by(output, lambda folder: convert_countdown(checkpoint, folder, length, num_heads, _torch_dtype(dtype)))


@click.command("tauldr")
@click.argument("checkpoint", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("config", type=click.Path(path_type=Path, dir_okay=False))
@OUTPUT
@click.option(
    "--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True, help="The averaged ones or not."
)
@click.option(
    "--real-time", is_flag=True, help="Of a sequence network trained on the time itself, not cut to integers."
)
@DTYPE
def convert_tauldr_command(checkpoint, config, output, weights, real_time, dtype):
    """Write CHECKPOINT, a tauLDR .pt file, with its CONFIG, a .yaml file, to the new folder OUTPUT."""
    from ..checkpoints import convert_tauldr

    def write(folder: Path):
        return convert_tauldr(checkpoint, config, folder, weights, not real_time, _torch_dtype(dtype))

    write_by(output, write)


def _torch_dtype(name: str):
    import torch

    return getattr(torch, name)


def write_by(output: Path, write: Callable, network: str = "model") -> None:
    """Write the folder by a converter, and say what it is or that it was there already. network: a component."""
    from ..runs.files import write_once

    (pipeline, error), finished = write_once(output, write)
    click.echo(f"largest difference of outputs to the checkpoint: {error:.1e}")
    converted = getattr(pipeline, network)
    what = (
        f"{type(pipeline).__name__} with {type(converted).__name__} in {str(converted.dtype).removeprefix('torch.')}"
    )
    click.echo(f"{output} was finished before: {what}, nothing to do" if finished else f"wrote {what} to {output}")
