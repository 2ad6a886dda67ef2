"""A second device in Python: tensors that are on "dx:0", hold their data on the CPU, and refuse to meet the CPU's.

It stands in for an accelerator where there is none. What would make a GPU wait for the host, or the host for a GPU,
is noted with the line of Python that asked for it:

    with device(), waits() as noted:
        pipe.to("dx")(...)
    assert not ours(noted)

The law of the device: one op, one result, as the CPU computes it, in the same order of draws, so that whatever runs
here equals a run on the CPU. Its modes are those of other machines: `without_float64`, `coarse_draws`. Outside
of `device()` torch reports no accelerator.

It is built on torch's Python backend for PrivateUse1, which is experimental; where a torch version lacks it, MISSING
says so and `needs_device` skips.
"""

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import diffusers_ext.pipelines
import diffusers_ext.schedulers

MISSING = None
if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    MISSING = f"torch {torch.__version__} has no Python backend for PrivateUse1 (torch.utils.backend_registration)"

needs_device = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
HERE = str(Path(__file__).resolve())
TORCH = str(Path(torch.__file__).parent)
DRAWS = "diffusers/utils/torch_utils.py"  # randn_tensor: the line that calls it is the one that draws
OURS = tuple(
    str(Path(room.__file__).resolve().parent)
    for room in (diffusers_ext, diffusers_ext.pipelines, diffusers_ext.schedulers)
)

aten = torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
# The size or the value of what these return is only known when the device is done
READS = {
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.bincount, aten.allclose, aten._linalg_check_errors, aten._linalg_eigh,
    aten._linalg_svd,
}  # fmt: skip
# Besides the pointwise ops, these take a number of the host, as a tensor () or as the value to write
TAKES_HOST_NUMBERS = {aten.fill_, aten.fill, aten.masked_fill, aten.masked_fill_, aten.where, aten.lerp, *INDEXING}
REFUSED_WITHOUT_FLOAT64 = {torch.float64, torch.complex128}


class Wait(NamedTuple):
    """kind: "read" (device to host), "transfer" (host to device). op: what did it. place: file:line that asked."""

    kind: str
    op: str
    place: str

    @property
    def ours(self) -> bool:
        """Whether a line of this package asked for it, rather than one of diffusers or a test."""
        return self.place.startswith(OURS)


class _Modes:
    on = False
    float64 = True
    bits: int | None = None
    negative_zeros = False
    noted: tuple[list[Wait], ...] = ()


@contextmanager
def device() -> Iterator[torch.device]:
    """Switch the device on: torch, diffusers and accelerate find it inside, and it stands idle after."""
    _register()
    before, _Modes.on = _Modes.on, True
    try:
        yield torch.device("dx:0")
    finally:
        _Modes.on = before


@contextmanager
def waits() -> Iterator[list[Wait]]:
    """Everything that is waited for inside, in order."""
    noted, before = [], _Modes.noted
    _Modes.noted = (*before, noted)
    try:
        yield noted
    finally:
        _Modes.noted = before


def ours(noted: list[Wait]) -> Counter:
    """How often each line of this package made the device or the host wait."""
    return Counter(wait for wait in noted if wait.ours)


class Draws(TorchDispatchMode):
    """Counts what is drawn inside with a generator, which is the host's."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.count += any(isinstance(argument, torch.Generator) for argument in (*args, *kwargs.values()))
        return func(*args, **kwargs)


@contextmanager
def without_float64() -> Iterator[None]:
    """The device refuses float64 with a TypeError, as a Mac's does."""
    before, _Modes.float64 = _Modes.float64, False
    try:
        yield
    finally:
        _Modes.float64 = before


@contextmanager
def coarse_draws(bits: int = 24, negative_zeros: bool = False) -> Iterator[None]:
    """Uniforms are multiples of 2^-bits from 0 on, and exponentials are -log(u) of such a u from 2^-bits to 1.

    With 24 bits that is CUDA's float32, where an exponential of u = 1 is 2^-24; with `negative_zeros` it is -0.0, as
    on MPS. Fewer bits make both ends frequent.
    """
    before = _Modes.bits, _Modes.negative_zeros
    _Modes.bits, _Modes.negative_zeros = bits, negative_zeros
    try:
        yield
    finally:
        _Modes.bits, _Modes.negative_zeros = before


class _DataMoves(TorchFunctionMode):
    """`parameter.data = moved` across devices, which torch does not do for classes of Python."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.data.__set__ and isinstance(args[0], DeviceTensor) != isinstance(
            args[1], DeviceTensor
        ):
            kept, moved = args
            moved = torch.nn.Parameter(moved, kept.requires_grad) if isinstance(kept, torch.nn.Parameter) else moved
            return torch.utils.swap_tensors(kept, moved)
        return func(*args, **(kwargs or {}))


def moving_data() -> TorchFunctionMode:
    """Inside, `parameter.data = moved` moves a parameter from device to device, as in diffusers' group offloading."""
    return _DataMoves()


def _note(kind: str, op: str) -> None:
    if not _Modes.noted:
        return
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((TORCH, HERE)) and not file.endswith(DRAWS):
            break
        frame = frame.f_back
    place = "?" if frame is None else f"{file}:{frame.f_lineno}"
    for noted in _Modes.noted:
        noted.append(Wait(kind, op, place))


class DeviceTensor(torch.Tensor):
    """A tensor on dx:0; `host` holds its data."""

    @staticmethod
    def __new__(cls, host: torch.Tensor, requires_grad: bool | None = None):
        if requires_grad is not None:  # accelerate makes a parameter anew, by the class of the one that it replaces
            return torch.nn.Parameter(host, requires_grad)
        if host.dtype in REFUSED_WITHOUT_FLOAT64 and not _Modes.float64:
            raise TypeError(f"Cannot convert a tensor to {host.dtype} on dx, which does not support it; use float32")
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            layout=host.layout, device="dx:0",
        )  # fmt: skip
        tensor.host = host
        return tensor

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"{self.host!r}, device='dx:0'"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else super().__format__(spec)

    def tolist(self) -> list:
        _note("read", "tolist")
        return self.host.tolist()

    def __deepcopy__(self, memo):
        copied = DeviceTensor(self.host.clone()).requires_grad_(self.requires_grad)
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args: tuple, kwargs: dict):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    op = func.overloadpacket
    if op is aten._to_copy:
        return _moved(args[0], **kwargs)
    if op is aten.copy_:
        return _copied(args[0], args[1])
    _check_devices(func, args, kwargs, [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)])
    _note_waits(op, args, kwargs)
    host_args, host_kwargs = tree_map(_host, args), tree_map(_host, kwargs)
    if host_kwargs.get("device") is not None:
        host_kwargs["device"] = torch.device("cpu")
    if op in (aten.uniform_, aten.exponential_) and _Modes.bits is not None:
        _draw_coarsely(op, here[0].host, *args[1:], **kwargs)
        return here[0]
    result = func(*host_args, **host_kwargs)
    if op in (aten._local_scalar_dense, aten.equal):
        return result
    same = {id(tensor.host): tensor for tensor in here}  # what an op in place, or into out=, returns
    return tree_map(lambda out: _wrapped(out, same), result)


def _host(value):
    return value.host if isinstance(value, DeviceTensor) else value


def _wrapped(value, same: dict[int, DeviceTensor]):
    if not isinstance(value, torch.Tensor):
        return value
    known = same.get(id(value))
    if known is None:
        return DeviceTensor(value)
    if (known.shape, known.stride()) != (value.shape, value.stride()):  # an op in place gave it another shape
        known.data = DeviceTensor(value)
    return known


def _moved(source: torch.Tensor, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None, **_):
    """`_to_copy` of a tensor on the device, there or to the host."""
    host = source.host.to(dtype=dtype, memory_format=memory_format or torch.preserve_format, copy=True)
    if device is None or torch.device(device).type == "dx":
        return DeviceTensor(host)
    if torch.device(device).type == "meta":
        return host.to("meta")
    _note("read", "to host")
    return host


def _copied(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`copy_`, where one of the two is on the device."""
    if not isinstance(source, DeviceTensor):
        _note("transfer", "to device")
    elif not isinstance(target, DeviceTensor):
        _note("read", "to host")
    _host(target).copy_(_host(source))
    return target


def _check_devices(func, args, kwargs, others: list[torch.Tensor]) -> None:
    """Refuse what a device refuses: tensors of the host, but for single numbers, and generators of the host."""
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, torch.Generator):
            raise RuntimeError(f"Expected a 'dx' device type for generator but found '{argument.device}'")
    op = func.overloadpacket
    numbers = torch.Tag.pointwise in func.tags or op in TAKES_HOST_NUMBERS
    indices = [] if op not in INDEXING or not isinstance(args[0], DeviceTensor) else tree_leaves(args[1])
    for tensor in others:
        fits = (tensor.ndim == 0 and numbers) or any(tensor is index for index in indices)
        if tensor.device.type != "meta" and not fits:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, dx:0 and"
                f" {tensor.device}! ({func}, {tuple(tensor.shape)})"
            )


def _note_waits(op, args, kwargs) -> None:
    if op in READS or (op is aten.repeat_interleave and kwargs.get("output_size") is None and len(args) < 4):
        _note("read", op.__name__)
    elif op in INDEXING:
        indices = [index for index in args[1] if index is not None]
        fills = op is not aten.index and len(indices) == 1 and args[2].numel() == 1  # CUDA then fills a mask
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not fills:
            _note("read", "nonzero of a mask")
        for index in indices:
            if not isinstance(index, DeviceTensor):
                _note("transfer", "index from the host")
        if op is not aten.index and op is not aten._unsafe_index and not isinstance(args[2], DeviceTensor):
            _note("transfer", "value from the host")
    elif op is aten.where:
        for part in args:
            if isinstance(part, torch.Tensor) and not isinstance(part, DeviceTensor):
                _note("transfer", "operand of where")


def _draw_coarsely(op, target: torch.Tensor, *parameters: float, generator=None) -> None:
    """parameters: the ends of uniforms, or the rate of exponentials."""
    steps = 2**_Modes.bits
    uniform = (torch.rand(target.shape, dtype=torch.float64) * steps).floor() / steps
    if op is aten.uniform_:
        low, high = parameters or (0.0, 1.0)
        target.copy_(low + (high - low) * uniform)
        return
    uniform += 1 / steps
    drawn = torch.where(uniform == 1, -0.0 if _Modes.negative_zeros else 1 / steps, -uniform.log())
    target.copy_(drawn / (parameters or (1.0,))[0])


class _Backend:
    """What torch, diffusers and accelerate ask `torch.dx`."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return _Modes.on

    def device_count(self) -> int:
        return int(_Modes.on)

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        """Nothing: the device draws from the CPU's generator."""

    def manual_seed(self, seed: int) -> None:
        """Nothing, as above."""

    def get_rng_state(self, device=None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device=None) -> None:
        torch.set_rng_state(state)

    def synchronize(self, device=None) -> None:
        """Nothing is ever outstanding."""

    def empty_cache(self) -> None:
        """Nothing is kept."""


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return DeviceTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    return _copied(target, source)


def _local_scalar_dense(source):
    return _run(aten._local_scalar_dense.default, (source,), {})


@functools.cache
def _register() -> tuple[torch.library.Library, ...]:
    """Give torch the device. Python's dispatch has most ops; these kernels serve what meets no tensor on the way."""
    backend_registration._setup_privateuseone_for_python_backend("dx", backend_module=_Backend(), hook=_hook())
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in {"empty.memory_format": _empty, "empty_strided": _empty_strided}.items():
        library.impl(name, kernel, "PrivateUse1")
    for kernel in (_copy_from, _local_scalar_dense):
        library.impl(kernel.__name__, kernel, "PrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast is there, and casts nothing
    return library, others


def _hook():
    hook = backend_registration._DummyPrivateUse1Hook
    return type("Hook", (hook,), {"is_available": lambda self: _Modes.on})()


if MISSING is None:
    # The first backward of a process fixes for how many devices there are threads.
    with device():
        torch.ones(1, requires_grad=True).sum().backward()
