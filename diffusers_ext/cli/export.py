"""`diffusers-ext export`."""

from pathlib import Path

import click


@click.command()
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--pipeline", type=click.Choice(["boost-and-skip"]), default=None,
    help="Export the model under this pipeline; by default under its own.",
)  # fmt: skip
@click.option("--license", default=None, help='SPDX identifier for the model card, such as "apache-2.0".')
@click.option("--trust-remote-code", is_flag=True, help="Run the .py files of MODEL's repository while loading it.")
def export(model, output, pipeline, license, trust_remote_code):
    """Write MODEL as a folder that loads with diffusers alone.

    MODEL is the name of a shipped model, a folder or a Hub id; OUTPUT a new folder.
    """
    from ..hub import export_pipeline, new_folder
    from ..shipped import load_pipeline

    new_folder(output)  # before a large model is loaded
    loaded = load_pipeline(model, pipeline, trust_remote_code=trust_remote_code)
    click.echo(f"wrote {export_pipeline(loaded, output, license)}")
