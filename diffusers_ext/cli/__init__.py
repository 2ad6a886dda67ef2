"""The `diffusers-ext` command, one file each. Each imports what it needs when it runs."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """The signals that came: SIGINT raises KeyboardInterrupt, SIGTERM SystemExit, and what was begun is tidied up."""
    came: list[int] = []

    def stop(number: int, _) -> None:
        came.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class FriendlyGroup(click.Group):
    """Shows bad input, missing files and missing optional packages as one line; the rest keeps its traceback.

    Ctrl-C ends with "Aborted!" and status 130, also where a library made another error of it.
    """

    def invoke(self, ctx: click.Context):
        with _interruptions() as came:
            try:
                return super().invoke(ctx)
            except BaseException as error:
                if signal.SIGINT in came or isinstance(error, KeyboardInterrupt):
                    click.echo("Aborted!", err=True)
                    ctx.exit(128 + signal.SIGINT)
                if isinstance(error, ValueError | ImportError | OSError | FloatingPointError):
                    raise click.ClickException(str(error)) from error
                raise


@click.group(cls=FriendlyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="diffusers-ext")
def main():
    """Research methods for diffusers, on shipped models and on yours."""


for command in (
    app, convert, demo, evaluate, export, info, optimize_timesteps, sample, train_postprocessing, tune_interval,
    upsample,
):  # fmt: skip
    main.add_command(command)
