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
@click.option("--quick", is_flag=True, help="Few samples and steps, rough numbers.")
def demo(output, device, quick):
    """Try each method on the models that ship; pictures, numbers and a report."""
    from ..demo import run_demo

    run_demo(output, device, quick=quick)
