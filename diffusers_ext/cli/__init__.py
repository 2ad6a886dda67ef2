"""The `diffusers-ext` command, one file each. Each imports what it needs when it runs."""

import click

from .. import __version__
from .app import app
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .export import export
from .info import info
from .optimize_timesteps import optimize_timesteps
from .sample import sample
from .train_postprocessing import train_postprocessing
from .tune_interval import tune_interval
from .upsample import upsample


class FriendlyGroup(click.Group):
    """Shows bad input, missing files and missing optional packages as one line; the rest keeps its traceback."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (ValueError, ImportError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=FriendlyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="diffusers-ext")
def main():
    """Research methods for diffusers, on shipped models and on yours."""


for command in (
    app, convert, demo, evaluate, export, info, optimize_timesteps, sample, train_postprocessing, tune_interval,
    upsample,
):  # fmt: skip
    main.add_command(command)
