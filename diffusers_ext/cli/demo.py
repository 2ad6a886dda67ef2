"""`diffusers-ext demo`."""

from pathlib import Path

import click

from .options import DEVICE


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("out"), show_default=True,
    help="Folder for report.html, pictures and numbers.",
)  # fmt: skip
@DEVICE
@click.option("--full", is_flag=True, help="More samples, steps and rows; it takes several times as long.")
def demo(output, device, full):
    """Try each method on the models that ship; pictures, numbers and a report."""
    from ..demo import run_demo

    run_demo(output, device, full=full)
