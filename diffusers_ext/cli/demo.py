"""`diffusers-ext demo`."""

from pathlib import Path

import click


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("out"), show_default=True,
    help="Folder for pictures and numbers.",
)  # fmt: skip
@click.option("--device", default=None, help="torch device; by default the fastest one here.")
def demo(output, device):
    """Try each method on the models that ship; pictures and numbers."""
    from ..demo import run_demo

    run_demo(output, device)
