"""Files and folders that appear whole or not at all, with all bytes on the disk before anything older is removed."""

import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from errno import ENOSPC
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

from .lock import LOCK, lock

TEMPORARY = ".unfinished-"
PIECE = 1 << 22  # bytes hashed at a time
MODEL_FILES = ("model_index.json", "config.json", "pipeline.py")  # one of which any written model has


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let what the system refuses in the block, such as a full disk, name a path, also as libraries tell it."""
    try:
        yield
    except Exception as error:
        # safetensors tells the number in words; torch none, its writer finds that less was written
        told = re.search(r"\(os error (\d+)\)|inline_container\S+ \. unexpected pos", str(error))
        number = error.errno if isinstance(error, OSError) else told and int(told[1] or ENOSPC)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` when the block ends well and vanishes when it does not."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, in folders that are made, where it outlives a power cut. Lists of numbers get a line each."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    text = re.sub(r"\[\n[-\d,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f"{TEMPORARY}*-{glob.escape(path.name)}"):  # of starts that were killed
        pid = leftover.name.removeprefix(TEMPORARY).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            leftover.unlink(missing_ok=True)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())
    sync_folder(path.parent)


def check_file(path: Path, names: Set[str]) -> None:
    """Check a file that an earlier start would have written.

    Args:
        path: of the file.
        names: that it has to have.

    Raises:
        ValueError: for a file that is no JSON object with these names, which an earlier start would have written.
        OSError: where it could not be written.
    """
    if path.is_file() and path.stat().st_size:
        try:
            written_here = names <= set(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            written_here = False
        if not written_here:
            raise ValueError(f"{path} was not written by this command; choose another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.exists()
    with path.open("ab"):
        pass
    if not there:
        path.unlink()


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed starts left half-written of a file, or of all files of a folder. Only under `lock`."""
    for leftover in folder.glob(f"{TEMPORARY}*-{name if name == '*' else glob.escape(name)}"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def put_in_place(fresh: Path, folder: Path) -> None:
    """Give a folder its name, once every file in it is on the disk."""
    for root, _, names in os.walk(fresh):
        for name in names:
            with (Path(root) / name).open("rb+") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))
    os.replace(fresh, folder)
    sync_folder(folder.parent)


def hash_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """The sha256 of some files of a folder by their names; by default of all below it."""
    if names is None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: _hash(folder / name) for name in names}


def changed_files(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """The files of a folder that are gone or have other bytes than when they were hashed."""
    there = (name for name in hashes if (folder / name).is_file())
    now = hash_files(folder, there)
    return [name for name, digest in hashes.items() if now.get(name) != digest]


def _hash(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def new_folder(folder: str | Path) -> Path:
    """The resolved path of a folder that does not exist or is empty.

    Raises:
        ValueError: for any other.
    """
    folder = Path(folder).resolve()
    if folder == Path.cwd():
        raise ValueError("output folder must not be the current one; choose a new one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output folder {str(folder)!r} is not empty; choose a new one or remove it first")
    return folder


def check_folder(folder: str | Path, marker: str) -> Path:
    """The resolved path of a folder that is new, empty or begun by an earlier start, which then holds the marker, a
    file.

    Raises:
        ValueError: for others: no start writes where it did not begin.
    """
    folder = Path(folder).resolve()
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    killed_at_once = all(name == LOCK or name.startswith(TEMPORARY) for name in names)
    return folder if marker in names or (names and killed_at_once) else new_folder(folder)


@contextmanager
def staged_folder(folder: str | Path) -> Iterator[tuple[Path, Path]]:
    """A new folder's final path, and one beside it that becomes the folder when the block ends without an error.

    The second one is for the block to make.

    Raises:
        ValueError: for a folder that exists and is not empty, and for one that another start is writing.
    """
    folder = new_folder(folder)
    with scratch_folder(folder) as scratch:
        staged = scratch / "staged"
        yield folder, staged
        if folder.exists():
            new_folder(folder).rmdir()
        put_in_place(staged, folder)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside another one, for one start at a time; it goes at the end, and what a killed start has
    left of it when the next begins."""
    scratch = folder.with_name(f"{TEMPORARY}{folder.name}")
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with lock(scratch):
            _empty(scratch)
            try:
                with naming(folder):
                    yield scratch
            finally:
                _empty(scratch)
    finally:
        with suppress(OSError):  # another start has it now
            scratch.rmdir()


def _empty(scratch: Path) -> None:
    for path in scratch.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path)


Written = TypeVar("Written")


def write_once(folder: str | Path, write: Callable[[Path], Written]) -> tuple[Written, bool]:
    """What `write` returns, which writes a new folder with a model, and whether that was there, byte for byte.

    Raises:
        ValueError: for a folder that holds anything else, at once where that is no model.
    """
    folder = Path(folder).resolve()
    if not any((folder / name).is_file() for name in MODEL_FILES):
        return write(new_folder(folder)), False
    with scratch_folder(folder) as scratch:
        again = scratch / "again"
        written = write(again)
        if hash_files(again) != hash_files(folder):
            new_folder(folder)
    return written, True
