"""Ctrl-C and SIGTERM of the `diffusers-ext` command, from its first import on. Needs the standard library alone."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ABORTED = 128 + signal.SIGINT


def guard_imports() -> None:
    """End the command in one word where Ctrl-C comes while it is imported; in other programs nothing is changed."""
    command = os.path.basename(sys.argv[0]).startswith("diffusers-ext") if sys.argv else False
    module = "diffusers_ext.cli" in sys.orig_argv  # python -m, which has no sys.argv yet
    if (command or module) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


def end_at_once(*_) -> None:
    """Leave without another line of Python; what a start leaves behind then is tidied up by the next."""
    os.write(2, b"Aborted!\n")
    os._exit(ABORTED)


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """The signals that came: SIGINT raises KeyboardInterrupt, SIGTERM SystemExit, and what was begun is tidied up.

    A second Ctrl-C ends at once. So does one in a destructor, whose errors Python prints and forgets, and one in an
    import, of which libraries make other errors, or none.
    """
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (number in came or _is_importing(frame)):
            end_at_once()
        came.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def forgotten(error) -> None:
        end_at_once() if error.exc_type is KeyboardInterrupt else hook(error)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    hook, sys.unraisablehook = sys.unraisablehook, forgotten
    try:
        yield came
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_globals.get("__name__") != "importlib._bootstrap":
        frame = frame.f_back
    return frame is not None
