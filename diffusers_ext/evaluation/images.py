"""Sets of images on disk, one way to read them all: a folder, a zip of images, or the .npz of guided-diffusion."""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ..pipelines.call_arguments import checked_arguments

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
GREY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}  # of 8 bits a channel
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)  # the last: encrypted
CHUNK = 2**24  # bytes hashed at a time


FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP", ".tif": "TIFF", ".tiff": "TIFF"}


class EncodedImages:
    """Image files, decoded one by one as they are asked for; see open_images.

    Args:
        path: where they lie.
        names: of the images, sorted.
        files: called for every pass; gives (name, bytes) in order.
    """

    def __init__(self, path: Path, names: list[str], files: Callable[[], Iterator[tuple[str, bytes]]]):
        self.path, self.names, self._files = path, names, files

    @property
    def formats(self) -> set[str]:
        """The formats of the files, by their suffixes."""
        suffixes = {Path(name).suffix.lower() for name in self.names}
        return {FORMATS.get(suffix, suffix[1:].upper()) for suffix in suffixes}

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """All images in order: uint8 (batch, height, width, channels), 1 or 3 channels, as they are stored.

        A batch ends early where the size or the number of channels changes.

        Raises:
            ValueError: for a file that cannot be read as 8-bit still image without transparency.
        """
        return _stacked((_decode(f"{self.path}: {name}", data) for name, data in self._files()), batch_size)

    def content_hash(self) -> str:
        """SHA-256 over the files' bytes in order; names and container do not matter."""
        digest = hashlib.sha256(b"files")
        for _, data in self._files():
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


class ArrayImages:
    """The array arr_0 of an .npz file, read in pieces; see open_images.

    Its `shape` is (count, height, width, channels).

    Args:
        path: the file.
    """

    formats = frozenset({"an array"})

    def __init__(self, path: Path):
        self.path = path
        with _array(path) as (_, shape):
            self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """All images in order: uint8 (batch, height, width, channels).

        Raises:
            ValueError: for a damaged file.
        """
        _check_batch_size(batch_size)
        size = int(np.prod(self.shape[1:]))
        with _array(self.path) as (file, _):
            for start in range(0, len(self), batch_size):
                count = min(batch_size, len(self) - start)
                data = file.read(count * size)
                if len(data) < count * size:
                    raise ValueError(
                        f"{self.path}: arr_0 ends before image {start + len(data) // size}; copy it again"
                    )
                yield np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])

    def content_hash(self) -> str:
        """SHA-256 over shape and pixels."""
        digest = hashlib.sha256(f"array {self.shape}".encode())
        with _array(self.path) as (file, _):
            while data := file.read(CHUNK):
                digest.update(data)
        return digest.hexdigest()


ImageSet = EncodedImages | ArrayImages


@checked_arguments
def open_images(path: str | Path) -> ImageSet:
    """A set of images: `len(images)`, `images.batches(batch_size)`, `images.content_hash()`.

    Pixels are read as they are stored, without regard to EXIF orientation and colour profiles; palettes and CMYK
    become RGB. Nothing but one batch is held in memory.

    Args:
        path: one of

            - a folder: every file below it with an image's suffix (PNG, JPEG, WebP, BMP, TIFF, PPM), sorted by path;
              hidden files and links to folders are left out;
            - a zip of such files, sorted by name;
            - an .npz with arr_0, uint8 (count, height, width, channels) or (count, height, width), as guided-diffusion
              writes.

    Raises:
        FileNotFoundError: for a missing path.
        ValueError: for an empty set, a file that is neither of these, a damaged one, and an arr_0 of another type or
            shape.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no images at '{path}': there is no such file or folder")
    if path.is_dir():
        return _encoded(path, _files_below(path), lambda names: ((name, (path / name).read_bytes()) for name in names))
    if path.suffix.lower() == ".npz":
        return ArrayImages(path)
    if path.suffix.lower() != ".zip" and not zipfile.is_zipfile(path):
        raise ValueError(f"'{path}' is neither a folder of images, nor a zip of images, nor an .npz with arr_0")
    with _zip(path) as archive:
        names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    if len(set(names)) < len(names):
        raise ValueError(f"'{path}' holds several files of one name; write each image under a name of its own")
    return _encoded(path, names, lambda names: _zip_files(path, names))


@checked_arguments
def read_images(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """A whole set and its labels: uint8 (count, height, width, channels), and arr_1 of an .npz, int64 (count,).

    Args:
        path: as of `open_images`.

    Raises:
        ValueError: as `open_images`, and for images of different sizes and another number of labels than of images.
        FileNotFoundError: as `open_images`.
    """
    images = open_images(path)
    batches = list(images.batches(256))
    if len({batch.shape[1:] for batch in batches}) > 1:
        sizes = sorted({batch.shape[1:] for batch in batches})
        raise ValueError(f"'{path}' must hold images of one size, got {sizes}")
    labels = _labels(Path(path)) if isinstance(images, ArrayImages) else None
    if labels is not None and labels.shape != (len(images),):
        raise ValueError(f"'{path}': arr_1 must hold a label for each of {len(images)} images, got {labels.shape}")
    return np.concatenate(batches), labels


def _labels(path: Path) -> np.ndarray | None:
    with np.load(path, allow_pickle=False) as arrays:
        if "arr_1" not in arrays:
            return None
        labels = arrays["arr_1"]
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"'{path}': arr_1 must be integers, the labels, got {labels.dtype}")
    return labels.astype(np.int64)


def _encoded(path: Path, names: list[str], files: Callable[[list[str]], Iterator[tuple[str, bytes]]]) -> EncodedImages:
    images = sorted(name for name in names if name.lower().endswith(SUFFIXES) and not _hidden(name))
    if not images:
        found = f"; it holds {', '.join(sorted(names)[:3])}" if names else ""
        raise ValueError(f"no images in '{path}'{found}; looked for {', '.join(SUFFIXES)}")
    return EncodedImages(path, images, lambda: files(images))


def _hidden(name: str) -> bool:
    """Dot files, and the doubles that macOS puts into a zip."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _files_below(folder: Path) -> list[str]:
    found = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return [path.relative_to(folder).as_posix() for path in found]


@contextmanager
def _zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except BROKEN_ZIP as error:
        raise ValueError(f"'{path}' cannot be read as zip: {error}") from error


def _zip_files(path: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    with _zip(path) as archive:
        for name in names:
            yield name, archive.read(name)


def _decode(name: str, data: bytes) -> np.ndarray:
    """Pixels (height, width, 1 or 3), uint8."""
    try:
        with Image.open(BytesIO(data)) as picture:
            still = picture.format == "MPO" or getattr(picture, "n_frames", 1) == 1  # MPO: a JPEG and its previews
            picture.load()
    except Exception as error:  # every decoder of Pillow fails in its own way
        raise ValueError(f"{name} is no image that can be read: {error}") from error
    if not still:
        raise ValueError(f"{name} holds several pictures; need one a file")
    if picture.mode not in GREY_MODES | COLOUR_MODES:
        raise ValueError(f"{name} has pixels of mode {picture.mode!r}; need 8-bit grey or RGB")
    if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise ValueError(f"{name} is transparent in places; lay it on a background first")
    pixels = np.asarray(picture.convert("L" if picture.mode in GREY_MODES else "RGB"))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _stacked(images: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Consecutive images of one shape, at most batch_size of them at a time."""
    _check_batch_size(batch_size)
    batch: list[np.ndarray] = []
    for image in images:
        if batch and (len(batch) == batch_size or image.shape != batch[0].shape):
            yield np.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield np.stack(batch)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


@contextmanager
def _array(path: Path) -> Iterator[tuple[BinaryIO, tuple[int, int, int, int]]]:
    """The stream of arr_0's pixels and its shape (count, height, width, channels), checked; never unpickles."""
    with _zip(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            keys = ", ".join(name.removesuffix(".npy") for name in archive.namelist()) or "nothing"
            raise ValueError(f"'{path}' has no arr_0, the array of images; it holds {keys}")
        with archive.open("arr_0.npy") as file:
            try:
                first = np.lib.format.read_magic(file) == (1, 0)
                read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                shape, fortran_order, dtype = read_header(file)
            except ValueError as error:
                raise ValueError(f"'{path}': arr_0 cannot be read: {error}") from error
            yield file, _checked_shape(path, shape, fortran_order, dtype)


def _checked_shape(path: Path, shape: tuple[int, ...], fortran_order: bool, dtype: np.dtype):
    if dtype != np.uint8:
        raise ValueError(f"'{path}': arr_0 must be uint8 with values 0 to 255, got {dtype}; round it to bytes first")
    full = (*shape, 1) if len(shape) == 3 else shape
    if len(full) != 4 or full[3] not in (1, 3):
        raise ValueError(
            f"'{path}': arr_0 must have shape (count, height, width), or with 1 or 3 channels last, got {shape}"
        )
    if 0 in full:
        raise ValueError(f"'{path}': arr_0 holds no images, its shape is {shape}")
    if fortran_order and len(shape) > 1:
        raise ValueError(f"'{path}': arr_0 is stored in Fortran order; save np.ascontiguousarray(arr_0) instead")
    return full
