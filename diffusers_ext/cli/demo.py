"""`diffusers-ext demo`."""

from pathlib import Path

import click


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("out"), show_default=True,
    help="Folder for the picture and the numbers.",
)  # fmt: skip
@click.option("--device", default=None, help="torch device; by default the fastest one here.")
def demo(output, device):
    """Sample the shipped MNIST model plainly and with Boost-and-Skip; picture and numbers."""
    from ..demo import run_demo

    run_demo(output, device)
