"""One start at a time: a lock of the operating system, which is gone when its owner dies, however that happens."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .processes import Processes

LOCK = "lock.json"
PATIENCE = 1.0  # seconds to wait for an owner that is just ending


@contextmanager
def lock(output: Path, processes: Processes | None = None) -> Iterator[None]:
    """Hold a folder, or a file that is to be written; of several processes the main one holds it for all.

    A folder has its lock.json inside, a file beside it, under its name and .lock.json. The file names the owner; what
    counts is the kernel's lock on it, which no child process keeps. Every machine and container that shares the file
    system sees it, where that has locks.

    Raises:
        ValueError: where another start holds it, naming that, and where lock.json is somebody else's file.
        OSError: for a file system without locks.
    """
    with ExitStack() as held:

        def take() -> None:
            held.enter_context(_locked(output))

        take() if processes is None else processes.agreed(take)
        yield


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    path = output / LOCK if output.is_dir() else output.with_name(f"{output.name}.{LOCK}")
    _owner(path)
    # A soft lock, a mere file, would outlive its owner.
    held = FileLock(path, timeout=PATIENCE, thread_local=False, fallback_to_soft=False, on_acquired=_sign)
    try:
        held.acquire()
    except Timeout:
        owner = _owner(path) or {"pid": "unknown", "host": "unknown"}
        raise ValueError(
            f"output {str(output)!r} is in use by process {owner['pid']} on {owner['host']}; wait for it, or choose"
            " another output"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise OSError(
            f"output {str(output)!r} cannot be locked ({error}), so that two starts could write it at a time; choose a"
            " folder that can be written, on a file system with locks (flock), such as a local disk"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # still held, so that nobody has acquired it by this name
        held.release()


def _sign(descriptor: int) -> None:
    with suppress(OSError):  # the lock holds on a full disk too
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())


def _owner(path: Path) -> dict | None:
    """Who signed a lock file; None where it is missing, empty or being signed. Raises ValueError for another file."""
    try:
        text = path.read_text(encoding="utf-8")
        owner = json.loads(text) if text else None
        if owner is None or {"pid", "host"} <= set(owner):
            return owner
    except (FileNotFoundError, PermissionError):  # Windows lets nobody read it
        return None
    except (ValueError, TypeError, OSError):
        pass
    raise ValueError(f"{path} was not written by this command; choose another output folder")
