"""Images as a folder of PNG files, a zip of them, or the npz of guided-diffusion; one batch in memory at a time."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
from PIL import Image

from ..runs.files import replacing

FORMATS = ("png", "zip", "npz")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def write_images(
    batches: Iterator[np.ndarray], count: int, labels: Sequence[int] | None, folder: Path, format: str
) -> str:
    """Write all images into a folder in one of `FORMATS`; returns the name of the file, "." for PNG files.

    "png" gives 000000.png, 000001.png, ...; "zip" the same in images.zip; "npz" gives
    samples_{count}x{height}x{width}x{channels}.npz with `arr_0`, uint8 (count, height, width, channels), and where
    there are labels `arr_1`, int64 (count,). The same images give the same bytes.

    Args:
        batches: uint8 (any number, height, width, channels), `count` images in all.
        count: number of images.
        labels: one an image, which only npz holds.
        folder: where they go.
        format: one of `FORMATS`.

    Raises:
        ValueError: for images of different sizes, another number than `count`, and channels that PNG has not.
    """
    writer = {"png": _write_pngs, "zip": _write_zip, "npz": _write_npz}[format]
    return writer(_checked(batches, count, format), count, labels, folder)


def file_names(count: int, suffix: str) -> list[str]:
    """000000.png and so on, with as many digits as the last one needs."""
    digits = max(6, len(str(count - 1)))
    return [f"{i:0{digits}d}.{suffix}" for i in range(count)]


def write_npz(
    path: Path, name: str, first: np.ndarray, batches: Iterator[np.ndarray], count: int, **more: np.ndarray
) -> None:
    """An .npz with one array (count, ...), the rows of the first batch and of the others, and with more arrays."""
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": (count, *first.shape[1:])}
    with replacing(path) as file, ZipFile(file, "w", ZIP_STORED) as archive:
        with archive.open(ZipInfo(f"{name}.npy"), "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            array.write(first.tobytes())
            for batch in batches:
                array.write(batch.tobytes())
        for key, value in more.items():
            with archive.open(ZipInfo(f"{key}.npy"), "w") as array:
                np.lib.format.write_array(array, value, allow_pickle=False)


def check_channels(channels: int, format: str) -> None:
    """Check that a format can hold images of so many channels.

    Args:
        channels: of the images.
        format: one of `FORMATS`.

    Raises:
        ValueError: for channels that a format of `FORMATS` has not.
    """
    if format != "npz" and channels not in MODES:
        raise ValueError(f"PNG holds 1, 3 or 4 channels, the images have {channels}; use the format npz")


def _checked(batches: Iterator[np.ndarray], count: int, format: str) -> Iterator[np.ndarray]:
    """The batches, known to be of one size and to hold count images."""
    shape, seen = None, 0
    for batch in batches:
        shape = shape or batch.shape[1:]
        if batch.shape[1:] != shape:
            raise ValueError(f"images must have one size, got {batch.shape[1:]} after {shape}")
        check_channels(shape[-1], format)
        seen += len(batch)
        yield batch
    if seen != count:
        raise ValueError(f"there must be {count} images, got {seen}")


def _pngs(batches: Iterator[np.ndarray], count: int) -> Iterator[tuple[str, bytes]]:
    pictures = (picture for batch in batches for picture in batch)
    for name, picture in zip(file_names(count, "png"), pictures, strict=True):
        buffer = BytesIO()
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, "PNG")
        yield name, buffer.getvalue()


def _write_pngs(batches: Iterator[np.ndarray], count: int, labels: Sequence[int] | None, folder: Path) -> str:
    for name, data in _pngs(batches, count):
        with replacing(folder / name) as file:
            file.write(data)
    return "."


def _write_zip(batches: Iterator[np.ndarray], count: int, labels: Sequence[int] | None, folder: Path) -> str:
    with replacing(folder / "images.zip") as file, ZipFile(file, "w", ZIP_STORED) as archive:
        for name, data in _pngs(batches, count):
            archive.writestr(ZipInfo(name), data)  # dated 1980, so that the bytes do not depend on the day
    return "images.zip"


def _write_npz(batches: Iterator[np.ndarray], count: int, labels: Sequence[int] | None, folder: Path) -> str:
    first = next(batches)
    shape = (count, *first.shape[1:])
    name = f"samples_{'x'.join(str(size) for size in shape)}.npz"
    more = {} if labels is None else {"arr_1": np.array(labels, dtype=np.int64)}
    write_npz(folder / name, "arr_0", first, batches, count, **more)
    return name
