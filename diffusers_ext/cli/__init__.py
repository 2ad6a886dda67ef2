"""The `diffusers-ext` command, one file each. Each imports what it needs when it runs, so that help comes at once."""

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from zipfile import BadZipFile

import click

from .. import __version__
from ..machine.interruptions import ABORTED, interruptions
from .app import app
from .compare import compare
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

EXPECTED = (ValueError, ImportError, OSError, FloatingPointError, EOFError, BadZipFile, MemoryError)
# HTTPError is of the client that huggingface_hub uses, also for a Hub that is not reached.
EXPECTED_OF_LIBRARIES = {"huggingface_hub.errors": "HTTPError", "torch": "OutOfMemoryError"}


@contextmanager
def _one_line() -> Iterator[None]:
    """Make one line of what is wrong with the input or the machine; other errors are ours, and keep their traceback.

    Ctrl-C ends with "Aborted!" and status 130, also where a library made another error of it.
    """
    with interruptions() as came:
        try:
            yield
        except getattr(click.exceptions, "NoArgsIsHelpError", ()):  # of click 8.2; before, help was no error
            raise
        except BaseException as error:
            if signal.SIGINT in came or isinstance(error, KeyboardInterrupt):
                came.append(signal.SIGINT)
            elif isinstance(error, click.ClickException):
                raise _told(error.format_message(), error.exit_code) from error
            elif _is_expected(error) and getattr(error, "errno", None) != errno.EPIPE:  # left to click
                raise _told(str(error) or type(error).__name__) from error
            else:
                raise
        if signal.SIGINT in came:
            click.echo("Aborted!", err=True)
            raise click.exceptions.Exit(ABORTED)


def _is_expected(error: BaseException) -> bool:
    """A library that was not imported has raised nothing."""
    libraries = [(sys.modules.get(name), error_name) for name, error_name in EXPECTED_OF_LIBRARIES.items()]
    return isinstance(error, (*EXPECTED, *(getattr(library, name) for library, name in libraries if library)))


def _told(message: str, exit_code: int = 1) -> click.ClickException:
    error = click.ClickException(" ".join(message.split()))
    error.exit_code = exit_code
    return error


class FriendlyGroup(click.Group):
    """Says in one line what is expected to go wrong; see `_one_line`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context):
        with _one_line():
            return super().invoke(ctx)


@click.group(cls=FriendlyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="diffusers-ext")
def main():
    """Research methods for diffusers, on shipped models and on yours."""


for command in (
    app, compare, convert, demo, evaluate, export, info, optimize_timesteps, sample, train_postprocessing,
    tune_interval, upsample,
):  # fmt: skip
    main.add_command(command)
