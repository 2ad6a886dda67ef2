"""The batches of a folder that several processes fill, over several starts.

    000012.<sha256>.npy   a finished batch, named by the hash of its bytes

A file appears under its name only when all of its bytes are on the disk, so a kill at any moment loses the batches
that were being drawn and no other.
"""

from contextlib import suppress
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np

from .files import remove_leftovers, replacing, sync_folder


class Shards:
    """The finished batches of samples in a folder; any number of processes may write different ones."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, number: int, samples: np.ndarray) -> None:
        """Keep a batch, an array (batch, ...)."""
        buffer = BytesIO()
        np.save(buffer, samples, allow_pickle=False)
        data = buffer.getvalue()
        self.folder.mkdir(exist_ok=True)
        with replacing(self.folder / f"{number:06d}.{sha256(data).hexdigest()}.npy") as file:
            file.write(data)
        sync_folder(self.folder)

    def holds(self, number: int) -> bool:
        """Whether a batch is there and whole; removes it where its bytes have not the hash of its name."""
        for path in self._paths(f"{number:06d}"):
            if _is_whole(path.name, path.read_bytes()):
                return True
            path.unlink()
        return False

    def read(self, number: int) -> np.ndarray:
        """A batch as it was written.

        Raises:
            ValueError: where it is missing or damaged.
        """
        for path in self._paths(f"{number:06d}"):
            data = path.read_bytes()
            if _is_whole(path.name, data):
                return np.load(BytesIO(data), allow_pickle=False)
        raise ValueError(f"batch {number} in {self.folder} is missing or damaged; start again to draw it anew")

    def __len__(self) -> int:
        return len(self._paths("[0-9]*"))

    def clear(self) -> None:
        """Remove the batches and what killed starts left half-written; the folder too, where it then is empty."""
        remove_leftovers(self.folder)
        for path in self._paths("[0-9]*"):
            path.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _paths(self, number: str) -> list[Path]:
        return sorted(self.folder.glob(f"{number}.*.npy"))


def _is_whole(name: str, data: bytes) -> bool:
    return name.split(".")[1] == sha256(data).hexdigest()
