"""Read pickles of NVIDIA's research code (networks, reference statistics) as plain data, executing nothing.

A pickle is a program for a small stack machine, and Python's own machine calls whatever the program names. The machine
here has the same stack but no calls: a name is only a name, must be on the allow-list (`READERS`), and stands for a
function of this file that checks what it is given and returns plain data. Storages of tensors, which are files of
their own, are read by the same machine. `torch_files` reads whole torch files with it.

    OrderedDict, EasyDict    -> dict
    numpy arrays, scalars    -> the same (real numbers only)
    torch tensors, parameters -> torch.Tensor on the CPU
    torch modules, and objects that carry their own source code (torch_utils.persistence) -> `PickledObject`

Everything else is refused with the name of what was wanted. Time and memory are linear in the size of the file: what
is kept once and used often (a memoised argument) counts at every use, see `WORK`.
"""

import math
import mmap
import pickletools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..hub.damage import HEAD, other_kind
from ..pipelines.call_arguments import checked_arguments

MAX_OPCODES = 1_000_000  # some twenty times what the largest EDM2 network takes
MAX_LINE = 4_096  # bytes of an argument of the old text protocol, whose conversion is quadratic
MAX_KEY = 4_096  # characters of a key; equal ones are compared at every use
MAX_NUMBERS = 4_096  # in a list that stands for an array
WORK = 4  # bytes that functions may be given in all, for each byte of the file; real files take 1 to 2
FREE_WORK = 100_000


class UnsafePickleError(ValueError):
    """The file wants something that is not on the allow-list, or it is not a pickle."""


@dataclass(eq=False)
class PickledObject:
    """An object that was not built.

    Attributes:
        class_name: its class.
        state: its attributes, `__dict__` as plain data.
    """

    class_name: str
    state: dict = field(default_factory=dict, repr=False)


@checked_arguments
def safe_load(path: str | Path) -> Any:
    """Read a pickle file as plain data; see the module for what comes out.

    Args:
        path: of the file.

    Raises:
        UnsafePickleError: (a ValueError) with the name of the first thing that is not allowed, the place where the
            file is malformed, or what else the file is.
    """
    with open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            raise UnsafePickleError(f"{path}: the file is empty.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                if other := other_kind(data[:HEAD]):
                    raise UnsafePickleError(f"it is {other}, no pickle.")
                return Machine(data, READERS).run()
            except UnsafePickleError as error:
                raise UnsafePickleError(f"{path}: {error}") from error


def safe_loads(data: bytes) -> Any:
    """Read a pickle from bytes; as `safe_load`."""
    return Machine(data, READERS).run()


def as_numbers(value: Any) -> np.ndarray:
    """An array, a scalar, or a short flat list of numbers out of a pickle, as an array.

    Anything else is an array of the object dtype, which no check takes for numbers: NumPy itself would walk through
    nested lists of a few bytes for ever.
    """
    if isinstance(value, torch.Tensor):
        return value.numpy(force=True) if value.dtype != torch.bfloat16 else value.float().numpy(force=True)
    plain = isinstance(value, list | tuple) and len(value) <= MAX_NUMBERS
    if plain and all(isinstance(number, int | float | np.number) and _is_short(number) for number in value):
        return np.asarray(value)
    if isinstance(value, np.ndarray | np.number | float) or (isinstance(value, int) and _is_short(value)):
        return np.asarray(value)
    return np.array(None)


@dataclass(frozen=True)
class _Name:
    """What a pickle calls a global: a name, never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class _Dtype:
    """A numpy dtype under construction: its byte order arrives in a second step."""

    dtype: np.dtype


class _Source:
    """The file as pickletools wants it, with limits on what one argument may ask for."""

    def __init__(self, data: bytes | mmap.mmap, position: int = 0):
        self.data, self.position = data, position

    def tell(self) -> int:
        return self.position

    def read(self, n: int) -> bytes:
        chunk = self.data[self.position : self.position + n]  # at most what is there, however large n is
        self.position += len(chunk)
        return chunk

    def readline(self) -> bytes:
        end = self.data.find(b"\n", self.position, self.position + MAX_LINE)
        if end < 0:
            raise ValueError(f"a line of text is longer than {MAX_LINE} bytes, or has no end")
        return self.read(end + 1 - self.position)


# What odd data raises on its way through the functions of this file.
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, EOFError)

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8")
_ARGUMENTS = frozenset((*_NUMBERS, *_TEXTS, *_BYTES))
_SCALARS = (str, int, float, bytes, type(None))


class Machine:
    """The stack machine of pickle, on inert data.

    readers: see `READERS`. persistent: what stands for a persistent id, None where none is allowed.
    """

    def __init__(self, data: bytes | mmap.mmap, readers: dict, position: int = 0, persistent: Callable | None = None):
        self.source, self.readers, self.persistent = _Source(data, position), readers, persistent
        self.stack, self.marks, self.memo = [], [], {}
        self.work_left = WORK * len(data) + FREE_WORK
        self.unbuilt: dict[int, Any] = {}  # arrays that wait for their contents, by identity

    def run(self) -> Any:
        """The value of the pickle.

        Raises:
            UnsafePickleError: for a pickle that is malformed or wants what is not allowed.
        """
        place = "its start"
        try:
            for count, (opcode, argument, position) in enumerate(pickletools.genops(self.source)):
                place = f"{opcode.name} at byte {position}"
                if count >= MAX_OPCODES:
                    raise ValueError(f"more than {MAX_OPCODES} instructions")
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.execute(opcode.name, argument)
        except UnsafePickleError:
            raise
        except _MALFORMED as error:
            reason = str(error).partition("\n")[0]
            raise UnsafePickleError(f"malformed pickle, {place}: {reason}") from error
        raise UnsafePickleError("malformed pickle: it has no end")

    def execute(self, name: str, argument: Any) -> None:
        if name in _ARGUMENTS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in _INSTRUCTIONS:
            instruction = _INSTRUCTIONS[name]
            instruction(self) if argument is None else instruction(self, argument)
        else:
            raise UnsafePickleError(f"the pickle uses the instruction {name}, which no EDM2 file needs.")

    # The stack

    def do_mark(self):
        self.marks.append(self.stack)
        self.stack = []

    def to_mark(self) -> list:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def do_pop(self):
        if self.stack:
            self.stack.pop()
        else:
            self.to_mark()

    def do_pop_mark(self):
        self.to_mark()

    def do_dup(self):
        self.stack.append(self.stack[-1])

    # Containers

    def take(self, count: int) -> list:
        if len(self.stack) < count:
            raise ValueError("the stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def do_tuple(self):
        items = self.to_mark()
        self.stack.append(tuple(items))

    def do_tuple1(self):
        self.stack.append(tuple(self.take(1)))

    def do_tuple2(self):
        self.stack.append(tuple(self.take(2)))

    def do_tuple3(self):
        self.stack.append(tuple(self.take(3)))

    def do_list(self):
        items = self.to_mark()
        self.stack.append(items)

    def do_dict(self):
        items = self.to_mark()
        self.stack.append({})
        self.set_items(items)

    def do_frozenset(self):
        items = self.to_mark()
        self.stack.append(frozenset(hashable(items)))

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"a {kind.__name__} was expected, not a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def do_append(self):
        items = self.take(1)
        self.top(list).extend(items)

    def do_appends(self):
        items = self.to_mark()
        self.top(list).extend(items)

    def do_additems(self):
        items = self.to_mark()
        self.top(set).update(hashable(items))

    def do_setitem(self):
        self.set_items(self.take(2))

    def do_setitems(self):
        self.set_items(self.to_mark())

    def set_items(self, items: list):
        self.top(dict).update(zip(hashable(items[::2]), items[1::2], strict=True))

    # Names, and what would be calls

    def do_global(self, argument: str):
        self.push_name(*argument.split(" ", 1))

    def do_stack_global(self):
        self.push_name(*self.take(2))

    def push_name(self, module: Any, name: Any):
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnsafePickleError("the pickle makes up a name out of something else than text.")
        if (module, name) not in self.readers:
            raise _wanted(f"{module}.{name}")
        self.stack.append(_Name(module, name))

    def do_inst(self, argument: str):
        raise _wanted(argument.replace(" ", "."))

    def do_obj(self):
        self.refuse_call(self.to_mark()[:1])

    def do_newobj_ex(self):
        self.refuse_call(self.take(3)[:1])

    def refuse_call(self, names: list):
        wanted = [str(name) if isinstance(name, _Name) else f"a {type(name).__name__}" for name in names]
        raise UnsafePickleError(
            f"the pickle wants to make an object of {''.join(wanted)} in a way that is not allowed."
        )

    def refuse_extension(self, code: int):
        raise _wanted(f"the extension with the code {code}")

    do_ext1 = do_ext2 = do_ext4 = refuse_extension

    def do_newobj(self):
        name, arguments = self.take(2)
        maker = CLASSES.get((name.module, name.name)) if isinstance(name, _Name) else None
        if maker is None or arguments != ():
            self.refuse_call([name])
        self.stack.append(maker())

    def do_reduce(self):
        name, arguments = self.take(2)
        if not isinstance(name, _Name):
            raise UnsafePickleError(f"the pickle wants to call a {type(name).__name__}.")
        reader = self.readers[name.module, name.name]
        if reader is None or type(arguments) is not tuple:
            raise UnsafePickleError(f"the pickle wants to call {name} in a way that is not allowed.")
        self.count_work(arguments)
        value = reader(*arguments)
        if isinstance(value, np.ndarray) and value.dtype == _UNBUILT.dtype:
            self.unbuilt[id(value)] = value
        self.stack.append(value)

    def count_work(self, arguments: Any) -> None:
        """Before a function is given something: its length and that of what is in it.

        Args:
            arguments: what the function is given.

        Raises:
            UnsafePickleError: once more work was done than the pickle's length accounts for.
        """
        self.work_left -= _work(arguments)
        if self.work_left > 0 and type(arguments) is tuple:
            self.work_left -= sum(map(_work, arguments))
        if self.work_left < 0:
            raise UnsafePickleError("the pickle uses the same data over and over; no EDM2 or torch file does.")

    def do_build(self):
        (state,) = self.take(1)
        self.count_work(state)
        target = self.stack[-1]
        if type(target) is _Dtype:
            target.dtype = _ordered_dtype(target.dtype, state)
        elif self.unbuilt.pop(id(target), None) is not None:
            target.__setstate__(_array_state(*state))
        elif type(target) is PickledObject and not target.state and type(state) is dict:
            target.state.update(state)
        elif type(target) is not dict or type(state) is not dict:  # attributes of a dictionary mean nothing here
            what = str(target) if isinstance(target, _Name) else f"a {type(target).__name__}"
            raise UnsafePickleError(f"the pickle wants to set the state of {what}.")

    def do_binpersid(self):
        self.do_persid(*self.take(1))

    def do_persid(self, value: Any):
        if self.persistent is None:
            raise UnsafePickleError("the pickle refers to something outside of itself (a persistent id).")
        self.stack.append(self.persistent(value))


_INSTRUCTIONS = {
    name.removeprefix("do_").upper(): method for name, method in vars(Machine).items() if name.startswith("do_")
}


def _wanted(name: str) -> UnsafePickleError:
    return UnsafePickleError(
        f"the pickle wants {name[:200]}, which is not on the allow-list of plain data; nothing was executed. Do not"
        " unpickle this file unless you trust it."
    )


def hashable(items: Iterable) -> list:
    """The items, if they are short scalars: hashing nested tuples takes exponential time."""
    items = list(items)
    if wrong := [type(item).__name__ for item in items if not isinstance(item, _SCALARS)]:
        raise ValueError(f"a {wrong[0]} as a key or as a member of a set")
    if not all(map(_is_short, items)):
        raise ValueError(f"a key, or a member of a set, that is longer than {MAX_KEY}")
    return items


def _is_short(value: Any) -> bool:
    return value.bit_length() <= 64 if isinstance(value, int) else _length(value) <= MAX_KEY


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | bytearray) else 1


def _work(value: Any) -> int:
    """Bytes that stand for what a function does with a value: four for each entry of a container."""
    containers = list | tuple | dict | set | frozenset
    return 4 * len(value) if isinstance(value, containers) else _length(value)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _checked_shape(shape: Any) -> tuple[int, ...]:
    if type(shape) is not tuple or len(shape) > 16 or not all(map(_is_size, shape)):
        raise ValueError("a shape or stride that is no tuple of at most 16 sizes")
    return shape


# Plain data for each allowed name


def _ordered_dict(pairs: Any = ()) -> dict:
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) for pair in pairs):
        raise ValueError("an OrderedDict of something else than pairs")
    return dict(zip(hashable(key for key, _ in pairs), (value for _, value in pairs), strict=True))


def _persistent_object(meta: Any) -> PickledObject:
    """An object of torch_utils.persistence; the source code that it carries is dropped."""
    if type(meta) is not dict or meta.get("type") != "class" or type(meta.get("class_name")) is not str:
        raise ValueError("a persistent object that is no class")
    if type(meta.get("state")) is not dict:
        raise ValueError("a persistent object without a state")
    return PickledObject(meta["class_name"], meta["state"])


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("an encoding other than latin1")
    return text.encode("latin1")


# An array waits for its contents in a type that no real array has here.
_UNBUILT = np.empty(0, dtype="V1")


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> np.ndarray:
    if kind != _Name("numpy", "ndarray"):
        raise ValueError("an array of another class than numpy.ndarray")
    return _UNBUILT.copy()


def _dtype(code: Any, align: Any = False, copy: Any = True) -> _Dtype:
    if type(code) is not str or not re.fullmatch(r"[<>=|]?[biuf][1248]", code):
        raise ValueError("a dtype that holds no real numbers")
    return _Dtype(np.dtype(code))


def _ordered_dtype(dtype: np.dtype, state: Any) -> np.dtype:
    """The state of a dtype is (version, byte order, None, None, None, ...): the Nones are for structures."""
    if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "=", "|") or any(state[2:5]):
        raise ValueError("the state of a dtype that holds no real numbers")
    return dtype.newbyteorder(state[1])


def _array_state(version: Any, shape: Any, dtype: Any, fortran_order: Any, contents: Any) -> tuple:
    if type(dtype) is not _Dtype or not isinstance(contents, bytes | bytearray):
        raise ValueError("an array of something else than real numbers")
    if math.prod(_checked_shape(shape)) * dtype.dtype.itemsize != len(contents):
        raise ValueError(f"an array that does not fit its {len(contents)} bytes")
    return 1, shape, dtype.dtype, bool(fortran_order), bytes(contents)


def _frombuffer(contents: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """How protocol 5 writes an array."""
    if order not in ("C", "F"):
        raise ValueError("an array that is neither in C nor in Fortran order")
    array = _UNBUILT.copy()
    array.__setstate__(_array_state(1, shape, dtype, order == "F", contents))
    return array


def _scalar(dtype: Any, contents: Any) -> np.generic:
    array = _UNBUILT.copy()
    array.__setstate__(_array_state(1, (), dtype, False, contents))
    return array[()]


# Storages: the elements of tensors

DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
STORAGE_NAMES = {("torch", name): None for name in DTYPES}
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001


class Storage:
    """Elements of one dtype, in memory that may be filled later."""

    def __init__(self, dtype: torch.dtype, memory: bytearray):
        self.memory, self.count = memory, len(memory) // dtype.itemsize
        self.elements = torch.frombuffer(memory, dtype=dtype) if memory else torch.empty(0, dtype=dtype)

    def __len__(self) -> int:
        return self.count

    def check(self) -> None:
        """Check truth values.

        Raises:
            ValueError: for truth values that are neither: arithmetic on them is undefined.
        """
        if self.elements.dtype == torch.bool and self.count and self.elements.view(torch.uint8).max() > 1:
            raise ValueError("a storage of truth values that are neither 0 nor 1")


def storage_of(identity: Any, length: int) -> tuple[torch.dtype, str, int]:
    """(dtype, key, number of elements) of a persistent id of torch, a tuple of `length`.

    After the word "storage" come type, key, location (of no interest: all is read to the CPU) and number of elements;
    in old files also a view, which torch has not written for years.

    Raises:
        ValueError: for others.
    """
    if type(identity) is not tuple or len(identity) != length:
        raise ValueError("a persistent id that is not one storage as torch.save writes it")
    word, kind, key, _, count, *view = identity
    known = isinstance(kind, _Name) and kind.module == "torch" and kind.name in DTYPES
    if word != "storage" or not known or type(key) is not str or not _is_size(count) or view not in ([], [None]):
        raise ValueError("a persistent id that is not one storage as torch.save writes it")
    return DTYPES[kind.name], key, count


def load_legacy(data: bytes | mmap.mmap, readers: dict, single: bool = False) -> Any:
    """The content of a file of torch.save before 1.6.

    Five pickles (a magic number, a version, the machine's word sizes, the content, and the keys of its storages), then
    for each key the number of elements (8 bytes) and the elements. single: of one storage, mentioned once. Raises
    UnsafePickleError or ValueError.
    """
    storages: dict[str, Storage] = {}
    free = len(data)  # a storage is no longer than the file

    def storage(identity: Any) -> Storage:
        nonlocal free
        if single and storages:
            raise ValueError("a second persistent id in one storage")
        dtype, key, count = storage_of(identity, 6)
        if key not in storages:
            free -= count * dtype.itemsize
            if free < 0:
                raise ValueError(f"a storage of {count} elements in a file of {len(data)} bytes")
            storages[key] = Storage(dtype, bytearray(count * dtype.itemsize))
        if (storages[key].elements.dtype, storages[key].count) != (dtype, count):
            raise ValueError("a storage that is said to be of two kinds")
        return storages[key]

    position, parts = 0, []
    for part in range(5):
        machine = Machine(data, readers if part == 3 else {}, position, storage if part == 3 else None)
        parts.append(machine.run())
        position = machine.source.position
        if part == 1 and parts != [_MAGIC, _VERSION]:
            raise ValueError("bytes that are no file of torch.save")
    if type(parts[2]) is not dict or parts[2].get("little_endian") is not True:
        raise ValueError("a torch file whose byte order is not little-endian")
    keys = parts[4]
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise ValueError("a list of storages that is not that of the content")
    for key in keys:
        position = _fill(storages[key], data, position)
    if position != len(data):
        raise ValueError(f"{len(data) - position} bytes after the end")
    return parts[3]


def _fill(storage: Storage, data: bytes | mmap.mmap, position: int) -> int:
    """Copy the elements of a storage from their place; returns where they end."""
    start, end = position + 8, position + 8 + len(storage.memory)
    if int.from_bytes(data[position:start], "little") != storage.count or end > len(data):
        raise ValueError(f"a storage of {storage.count} elements in {len(data) - position - 8} bytes")
    storage.memory[:] = data[start:end]
    storage.check()
    return end


def _load_from_bytes(data: Any) -> Storage:
    """A storage in a pickle, as a file of its own."""
    if not isinstance(data, bytes | bytearray):
        raise ValueError("a storage that is no bytes")
    storage = load_legacy(bytes(data), STORAGE_NAMES, single=True)
    if not isinstance(storage, Storage):
        raise ValueError("bytes that are not one storage as torch.save writes it")
    return storage


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """A view of a storage, no larger than the storage. What follows (gradients, hooks) is dropped."""
    if not isinstance(storage, Storage) or not _is_size(offset):
        raise ValueError("a tensor of something else than a storage")
    size, stride = _checked_shape(size), _checked_shape(stride)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    wanted = math.prod(size)
    if wanted > storage.count or (wanted > 0 and last >= storage.count):
        raise ValueError(f"a tensor that reaches beyond its storage of {storage.count} elements")
    return storage.elements.as_strided(size, stride, offset if wanted else 0)


def _rebuild_parameter(data: Any, *_: Any) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise ValueError("a parameter of something else than a tensor")
    return data


# Classes whose empty objects a pickle may make.
CLASSES: dict[tuple[str, str], Callable] = {
    ("dnnlib.util", "EasyDict"): dict,
    ("torch.nn.modules.container", "ModuleDict"): lambda: PickledObject("ModuleDict"),
}

# All that a pickle may name, and the function that stands for it. None: it may be mentioned but not called.
READERS: dict[tuple[str, str], Callable | None] = {
    **dict.fromkeys(CLASSES),
    ("collections", "OrderedDict"): _ordered_dict,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _dtype,
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
}
for _core in ("numpy.core", "numpy._core"):
    READERS[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    READERS[f"{_core}.multiarray", "scalar"] = _scalar
    READERS[f"{_core}.numeric", "_frombuffer"] = _frombuffer
