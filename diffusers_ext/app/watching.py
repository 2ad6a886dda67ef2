"""What a computation of the app tells while it runs, and how it is stopped: between two steps, or while it waits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, RLock

from diffusers import DiffusionPipeline

_WATCH: ContextVar["Watch | None"] = ContextVar("watch", default=None)
WAITING = "waiting: another computation is running"


class StoppedError(Exception):
    """The one who asked for a computation has stopped it."""


class Watch:
    """One computation.

    Args:
        tell: called with steps done, of how many (0 of 0 while it waits), and words.
        stop: set to end it.
    """

    def __init__(self, tell: Callable[[int, int, str], None], stop: Event):
        self.tell, self.stop, self.samplings = tell, stop, 0

    def say(self, done: int, total: int, words: str) -> None:
        """Tell how far the computation is.

        Args:
            done: steps done.
            total: of how many; 0 while it waits.
            words: what is being done.

        Raises:
            StoppedError: once it is to stop.
        """
        if self.stop.is_set():
            raise StoppedError(f"stopped: {words}" if words else "stopped")
        self.tell(done, total, words)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """What is computed in the block, in this thread, is watched."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


class Turn:
    """A lock that tells who waits for it, and can be waited for no longer; the holder may take it again."""

    def __init__(self) -> None:
        self._lock = RLock()

    def __enter__(self) -> None:
        watch = _WATCH.get()
        while not self._lock.acquire(timeout=-1 if watch is None else 0.2):
            watch.say(0, 0, WAITING)

    def __exit__(self, *error) -> None:
        self._lock.release()


class _Bar:
    """A pipeline's progress bar, as far as pipelines use it, that is not shown, but told."""

    def __init__(self, iterable, total: int | None, watch: Watch):
        watch.samplings += 1
        self.iterable, self.watch, self.done = iterable, watch, 0
        self.steps = len(iterable) if total is None else total
        self._say()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error) -> None:
        pass

    def _say(self) -> None:
        self.watch.say(self.done, self.steps, f"sampling {self.watch.samplings}, step {self.done} of {self.steps}")

    def update(self, n: float = 1) -> None:
        self.done += int(n)
        self._say()

    def __iter__(self) -> Iterator:
        for value in self.iterable:
            yield value
            self.update()


def tell_steps(pipe: DiffusionPipeline) -> None:
    """Let a pipeline's progress bar tell its steps to the watch of the thread that calls it."""
    shown = pipe.progress_bar

    def progress_bar(iterable=None, total: int | None = None):
        watch = _WATCH.get()
        return shown(iterable, total) if watch is None else _Bar(iterable, total, watch)

    pipe.progress_bar = progress_bar
