"""A folder that several processes fill batch by batch, over several starts.

    manifest.json                what is drawn; at the end the hash of every batch and the name of the result
    lock.json                    who works here, while somebody does
    shards/000012.<sha256>.npy   a finished batch, named by the hash of its bytes

A file appears under its name only when all of its bytes are on the disk, so a kill at any moment loses the batches
that were being drawn and no other.
"""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
import psutil

from .hub import new_folder

MANIFEST, LOCK, SHARDS = "manifest.json", "lock.json", "shards"
TEMPORARY = ".unfinished-"


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` when the block ends well and vanishes when it does not."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Shards:
    """The finished batches of samples in `folder`/shards; any number of processes may write different ones."""

    def __init__(self, folder: Path):
        self.folder = folder / SHARDS

    def write(self, number: int, samples: np.ndarray) -> None:
        """Keep a batch, an array (batch, ...)."""
        buffer = BytesIO()
        np.save(buffer, samples, allow_pickle=False)
        data = buffer.getvalue()
        with replacing(self.folder / f"{number:06d}.{sha256(data).hexdigest()}.npy") as file:
            file.write(data)
        sync_folder(self.folder)

    def holds(self, number: int) -> bool:
        """Whether a batch is there and whole; removes it where its bytes have not the hash of its name."""
        for path in self._paths(number):
            if sha256(path.read_bytes()).hexdigest() == _recorded(path):
                return True
            path.unlink()
        return False

    def read(self, number: int) -> np.ndarray:
        """A batch as it was written. Raises ValueError where it is missing or damaged."""
        for path in self._paths(number):
            data = path.read_bytes()
            if sha256(data).hexdigest() == _recorded(path):
                return np.load(BytesIO(data), allow_pickle=False)
        raise ValueError(f"batch {number} in {self.folder} is missing or damaged; start again to draw it anew")

    def __len__(self) -> int:
        return len(self.hashes())

    def hashes(self) -> list[str]:
        """The sha256 of each batch, in order."""
        finished = self.folder.glob("[0-9]*.npy")  # a star alone finds unfinished ones too
        return [_recorded(path) for path in sorted(finished)]

    def _paths(self, number: int) -> list[Path]:
        return sorted(self.folder.glob(f"{number:06d}.*.npy"))


def _recorded(path: Path) -> str:
    return path.name.split(".")[1]


def check_folder(folder: str | Path) -> Path:
    """The resolved path of a folder that is new, empty or begun by an earlier start. Raises ValueError for others."""
    folder = Path(folder).resolve()
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    begun = MANIFEST in names
    killed_at_once = LOCK in names and all(name == LOCK or name.startswith(TEMPORARY) for name in names)
    return folder if begun or killed_at_once else new_folder(folder)


def open_folder(folder: Path, plan: dict) -> dict:
    """Begin or go on: the manifest of a folder that holds what `plan` says. Only under `lock`.

    plan: JSON-able; its entries "settings" and "versions" must be those that the folder was begun with. What a killed
    start left half-written is removed.

    Raises ValueError naming each entry that differs, with both values, and for a manifest of something else.
    """
    plan = json.loads(json.dumps(plan))
    path = folder / MANIFEST
    if path.is_file():
        manifest = _read_manifest(path)
        check_same(folder, manifest, plan)
    else:
        manifest = {**plan, "result": None, "shards": []}
        write_manifest(folder, manifest)
    if manifest["result"] is not None:
        shutil.rmtree(folder / SHARDS, ignore_errors=True)
        return manifest
    (folder / SHARDS).mkdir(exist_ok=True)
    for place in (folder, folder / SHARDS):
        for leftover in place.glob(f"{TEMPORARY}*"):
            leftover.unlink(missing_ok=True)
    return manifest


def finish_folder(folder: Path, manifest: dict, result: str) -> None:
    """Note the result, which must be on the disk, and the hash of every batch; then remove the batches."""
    sync_folder(folder)
    write_manifest(folder, {**manifest, "result": result, "shards": Shards(folder).hashes()})
    shutil.rmtree(folder / SHARDS)


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write manifest.json, which appears whole or not at all. Lists of numbers get a line each."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    text = re.sub(r"\[\n[-\d,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # labels on one line
    with replacing(folder / MANIFEST) as file:
        file.write(f"{text}\n".encode())
    sync_folder(folder)


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if {"settings", "versions", "result", "shards"} <= set(manifest):
            return manifest
    except (json.JSONDecodeError, TypeError):
        pass
    raise ValueError(f"{path} was not written by this command; choose another output folder")


def check_same(folder: Path, old: dict, new: dict) -> None:
    """Raises ValueError where settings or versions of two manifests differ."""
    changed = list(differences(old["settings"], new["settings"]))
    if changed:
        raise ValueError(
            f"output folder {str(folder)!r} was begun with other settings: {_listed(changed)}; go on with the old"
            " ones, or choose another output folder"
        )
    changed = list(differences(old["versions"], new["versions"]))
    if changed:
        raise ValueError(
            f"output folder {str(folder)!r} was begun with other versions, whose images may differ:"
            f" {_listed(changed)}; install the old ones to go on, or choose another output folder"
        )


def differences(old, new, name: str = "") -> Iterator[str]:
    """ "name: old before, new now" for each leaf of two JSON values that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (before, now) in enumerate(zip(old, new, strict=True)):
            yield from differences(before, now, f"{name}[{i}]")
    elif old != new or type(old) is not type(new):
        yield f"{name}: {_short(old)} before, {_short(new)} now"


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _listed(changed: list[str], shown: int = 5) -> str:
    more = len(changed) - shown
    return "; ".join(changed[:shown]) + (f"; and {more} more" if more > 0 else "")


@contextmanager
def lock(output: Path) -> Iterator[None]:
    """Hold a folder for this process, or a file that is to be written. Raises ValueError where another process holds
    it, naming that.

    A folder has its lock.json inside, a file beside it, under its name and .lock.json. The lock of a process of this
    machine that no longer runs is taken over; whether a process of another machine runs cannot be seen from here.
    """
    path = output / LOCK if output.is_dir() else output.with_name(f"{output.name}.{LOCK}")
    process = psutil.Process()
    mine = {"pid": process.pid, "host": socket.gethostname(), "started": process.create_time()}
    if not _create(path, mine):
        _take_over(path, mine)
    try:
        yield
    finally:
        if _read_lock(path) == mine:
            path.unlink()


def _create(path: Path, content: dict) -> bool:
    """Write a file that does not exist; False where it does."""
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            json.dump(content, file)
    except BaseException:
        path.unlink()
        raise
    return True


def _read_lock(path: Path) -> dict | None:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return owner if {"pid", "host", "started"} <= set(owner) else None
    except (FileNotFoundError, ValueError, TypeError):  # gone, or being written
        return None


def _take_over(path: Path, mine: dict) -> None:
    owner = _read_lock(path)
    if owner is not None and owner["host"] == mine["host"] and not _runs(owner):
        # Of two that find the same dead owner, one moves its lock away; the other has then moved a live one, or none.
        moved = path.with_name(f"{TEMPORARY}{mine['pid']}-{LOCK}")
        with suppress(FileNotFoundError):
            os.replace(path, moved)
            if _read_lock(moved) == owner and _create(path, mine):
                moved.unlink()
                return
            os.replace(moved, path)
    owner = owner or {"pid": "unknown", "host": "unknown"}
    held = path.parent if path.name == LOCK else path.with_name(path.name.removesuffix(f".{LOCK}"))
    raise ValueError(
        f"output {str(held)!r} is in use by process {owner['pid']} on {owner['host']}; wait for it, or,"
        f" if it no longer runs, remove {path}"
    )


def _runs(owner: dict) -> bool:
    """Whether the process that wrote a lock lives; one with its number that began at another time is not it."""
    try:
        process = psutil.Process(owner["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner["started"]) < 2
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
