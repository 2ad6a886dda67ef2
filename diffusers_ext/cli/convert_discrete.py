"""`diffusers-ext convert sedd | countdown | tauldr`: original checkpoints of discrete diffusion."""

from pathlib import Path

import click

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
OUTPUT = click.argument("output", type=click.Path(path_type=Path, file_okay=False))
DTYPE = click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True, help="Of the weights."
)


@click.command("sedd")
@click.argument("source")
@OUTPUT
@click.option("--tokenizer", default=None, help="Folder or Hub id, gpt2 for the published networks; by default none.")
@click.option("--revision", default=None, help="Branch, tag or commit of a repository on the Hub.")
@DTYPE
def convert_sedd_command(source, output, tokenizer, revision, dtype):
    """Write SOURCE, a SEDD folder or Hub id such as louaaron/sedd-small, to the new folder OUTPUT."""
    from ..checkpoints import convert_sedd

    _report(*convert_sedd(source, output, tokenizer, _torch_dtype(dtype), revision), output)


@click.command("countdown")
@click.argument("checkpoint", type=click.Path(path_type=Path, dir_okay=False))
@OUTPUT
@click.option("--length", type=click.IntRange(min=1), default=256, show_default=True, help="Of the sequences.")
@click.option("--num-heads", type=click.IntRange(min=1), default=None, help="Where the checkpoint does not show it.")
@DTYPE
def convert_countdown_command(checkpoint, output, length, num_heads, dtype):
    """Write CHECKPOINT, a CountDown network of Jump Your Steps, to the new folder OUTPUT."""
    from ..checkpoints import convert_countdown

    _report(*convert_countdown(checkpoint, output, length, num_heads, _torch_dtype(dtype)), output)


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

    _report(*convert_tauldr(checkpoint, config, output, weights, not real_time, _torch_dtype(dtype)), output)


def _torch_dtype(name: str):
    import torch

    return getattr(torch, DTYPES[name])


def _report(pipeline, error: float, output: Path) -> None:
    click.echo(f"largest difference of outputs to the checkpoint in float32: {error:.1e}")
    click.echo(f"wrote {type(pipeline).__name__} with {type(pipeline.model).__name__} to {output}")
