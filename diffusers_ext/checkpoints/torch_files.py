"""Files of torch.save as plain data: torch reads none of it, and nothing in them is executed.

Since torch 1.6 such a file is a zip archive of stored records: NAME/data.pkl, a pickle in which a persistent id stands
for the storage of a tensor, and NAME/data/KEY, the bytes of each. torch does not look at the archive's checksums.
"""

import mmap
import zipfile
from pathlib import Path
from typing import Any

from ..hub.damage import HEAD, other_kind
from .safe_pickle import DTYPES, READERS, STORAGE_NAMES, Machine, Storage, hashable, load_legacy, storage_of

_MAGIC_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how old files begin


def load_torch_file(path: str | Path) -> Any:
    """The content of a torch file, its tensors on the CPU.

    A zip archive must hold its records as torch writes them, not compressed and with the right checksums, unless all
    of these are 0: torch leaves them out on request.

    Args:
        path: of the file.

    Raises:
        UnsafePickleError: (a ValueError) for more than plain data.
        ValueError: for damage, as are errors of `zipfile`.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
        if not head:
            raise ValueError("the file is empty")
        if other := other_kind(head):
            raise ValueError(f"it is {other}")
        if head.startswith(b"PK"):
            with zipfile.ZipFile(file) as archive:
                return _Archive(archive, file.seek(0, 2)).load()
        if not head.startswith(_MAGIC_PICKLE):
            raise ValueError("it begins like no file of torch.save")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return load_legacy(data, TORCH_READERS)


class _Archive:
    """A zip archive of torch. size: of the file in bytes."""

    def __init__(self, archive: zipfile.ZipFile, size: int):
        records = archive.infolist()
        self.archive, self.records = archive, {record.filename: record for record in records}
        self.storages: dict[str, Storage] = {}
        if len(self.records) != len(records):
            raise ValueError("records of the same name")
        if packed := [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"record {packed[0][:100]!r} is compressed, which torch.save never does")
        if sum(record.file_size for record in records) > size:  # records that lie in each other
            raise ValueError(f"its records are larger than the {size} bytes of the file")
        if not any(record.CRC for record in records):
            for record in records:
                record.CRC = None  # zipfile then compares nothing
        pickles = [name for name in self.records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is a zip archive, but none of torch.save: it has no record data.pkl")
        self.name = pickles[0].removesuffix("/data.pkl")

    def load(self) -> Any:
        if f"{self.name}/byteorder" in self.records and self.read("byteorder") != b"little":
            raise ValueError("its byte order is not little-endian")
        return Machine(bytes(self.read("data.pkl")), TORCH_READERS, persistent=self.storage).run()

    def read(self, name: str) -> bytearray:
        """A record; zipfile compares it with its checksum."""
        record = self.records[f"{self.name}/{name}"]
        content = bytearray(record.file_size)
        with self.archive.open(record) as file:
            if file.readinto(content) != len(content) or file.read(1):
                raise ValueError(f"record {name!r} is cut off")
        return content

    def storage(self, identity: Any) -> Storage:
        """The storage that a persistent id stands for."""
        dtype, key, count = storage_of(identity, 5)
        if key not in self.storages:
            if f"{self.name}/data/{key}" not in self.records:
                raise ValueError(f"record data/{key[:100]} is missing")
            if self.records[f"{self.name}/data/{key}"].file_size != count * dtype.itemsize:
                raise ValueError(f"record data/{key[:100]} does not hold {count} elements of {dtype}")
            self.storages[key] = Storage(dtype, self.read(f"data/{key}"))
            self.storages[key].check()
        if (self.storages[key].elements.dtype, self.storages[key].count) != (dtype, count):
            raise ValueError(f"record data/{key[:100]} is said to be of two kinds")
        return self.storages[key]


def _size(numbers: Any) -> tuple[int, ...]:
    if type(numbers) is not tuple or not all(type(number) is int for number in numbers):
        raise ValueError("a torch.Size of something else than numbers")
    return numbers


def _device(kind: Any, index: Any = None) -> str:
    return str(kind) if index is None else f"{kind}:{index}"


def _set(items: Any = ()) -> set:
    if not isinstance(items, list | tuple):
        raise ValueError("a set of something else than a list")
    return set(hashable(items))


def _counter(counts: Any = None) -> dict:
    if not isinstance(counts, dict | None):
        raise ValueError("a Counter of something else than a dictionary")
    return dict(counts or {})


# Beside what pickles of research code name: what optimizers and schedulers of the learning rate leave in a checkpoint.
TORCH_READERS = {
    **READERS,
    **STORAGE_NAMES,
    **{("torch", str(dtype).removeprefix("torch.")): None for dtype in DTYPES.values()},
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("torch._utils", "_rebuild_parameter_with_state"): READERS["torch._utils", "_rebuild_parameter"],
    ("collections", "Counter"): _counter,
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
}
