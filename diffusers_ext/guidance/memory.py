"""What networks have answered, remembered: calls of a pipeline that begin alike run their common beginning once.

Stock pipelines cannot be forked in the middle. What they can be given is the answer that a network gave to the very
same input before, so that a second call walks to the place where it parts from the first without running the network.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from ..pipelines.guidance_interval import default_states
from ..pipelines.guided_stage import stateful_hooks
from ..pipelines.rows import map_tensors, tensors_in
from .network_state import state_of
from .rows import networks_of, rows_of

STATES = 4  # of a network that are told apart
OVERHEAD = 2048  # bytes of an entry beside its tensors, roughly
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class OutputMemory:
    """Outputs of networks by the exact bytes of their inputs, in at most `limit` bytes of this machine's memory.

    An output is found again where all arguments are equal, bit for bit, with equal strides, devices and autocast,
    and the network is in the state that it was in. What was used least recently is forgotten first. Never remembered
    are calls that draw random numbers (dropout), leave something changed in the network (caches, counters) or in
    their arguments, have arguments or outputs of which it is not known what they hold, or could be differentiated;
    nor those of networks with a cache of diffusers (`enable_cache`).

    rows_asked: network rows that were asked for. rows_run: those of them that a network has run. size: bytes held.
    """

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.rows_asked = self.rows_run = 0
        self._entries: OrderedDict[tuple, tuple[Any, list[torch.device], int]] = OrderedDict()
        self._parts: dict[bytes, list] = {}  # of keys: the one object for equal bytes, and how many keys hold it
        self._states: dict[int, dict[int, list]] = {}  # of networks, by id, each with its number
        self._count = 0

    def answer(self, network: torch.nn.Module, call: Callable, args: tuple, kwargs: dict) -> Any:
        """The output of a call, remembered or run."""
        rows = rows_of([*args, *kwargs.values()])
        self.rows_asked += rows
        key = self._key(network, args, kwargs) if self.limit else None
        if key in self._entries:
            self._entries.move_to_end(key)
            output, devices, _ = self._entries[key]
            places = iter(devices)
            return map_tensors(lambda tensor: _copy(tensor, next(places)), output)
        self.rows_run += rows
        if key is None:
            return call(*args, **kwargs)
        device = _device_of((args, kwargs))
        random = [state for _, state in default_states(device)]
        output = call(*args, **kwargs)
        drawn = any(not torch.equal(then, now) for then, (_, now) in zip(random, default_states(device), strict=True))
        if self._key(network, args, kwargs) == key and not drawn:
            self._keep(key, output)
        return output

    def _key(self, network: torch.nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """What an output depends on; None where that is not known."""
        if stateful_hooks(network):
            return None
        parts: list[bytes] = []
        try:
            form = _form((args, kwargs), parts)
        except TypeError:
            return None
        kind = _device_of((args, kwargs)).type
        cast = torch.is_autocast_enabled(kind) and str(torch.get_autocast_dtype(kind))
        return id(network), self._state(network), cast, form, tuple(parts)

    def _state(self, network: torch.nn.Module) -> int:
        """The number of the state that a network is in, which may be one of a few that take turns: perturbed attention
        puts other processors in. What it has answered in others is forgotten."""
        known = self._states.setdefault(id(network), {})
        state = state_of(network)
        number = next((number for number, one in known.items() if one == state), None)
        if number is None:
            number = self._count = self._count + 1
            if len(known) == STATES:
                del known[gone := next(iter(known))]
                for key in [key for key in self._entries if key[1] == gone]:
                    self._drop(key)
        known[number] = known.pop(number, state)  # the last one used
        return number

    def _keep(self, key: tuple, output: Any) -> None:
        *rest, parts = key
        try:
            tensors = list(_tensors(output))
        except TypeError:
            return
        size = OVERHEAD + sum(tensor.nbytes for tensor in tensors)
        if size + sum(map(len, parts)) > self.limit:
            return
        self.size += size + sum(len(part) for part in {*parts} if part not in self._parts)
        shared = [self._parts.setdefault(part, [part, 0]) for part in parts]
        for entry in shared:
            entry[1] += 1
        kept = map_tensors(lambda tensor: _copy(tensor, torch.device("cpu")), output)
        devices = [tensor.device for tensor in tensors]
        self._entries[(*rest, tuple(part for part, _ in shared))] = kept, devices, size
        while self.size > self.limit:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: tuple) -> None:
        self.size -= self._entries.pop(key)[-1]
        for part in key[-1]:
            entry = self._parts[part]
            entry[1] -= 1
            if not entry[1]:
                del self._parts[part]
                self.size -= len(part)


@contextmanager
def remembering(pipe: DiffusionPipeline, limit: int) -> Iterator[OutputMemory]:
    """Let the networks of a pipeline that denoise answer from memory within the block; its results stay the same.

    The memory ends with the block. An interval may be applied within it or before.

    Args:
        pipe: whose networks.
        limit: bytes; 0 remembers nothing and counts rows.

    Raises:
        ValueError: for a negative limit.
    """
    if limit < 0:
        raise ValueError(f"limit must be >= 0 bytes, got {limit}; 0 remembers nothing")
    memory = OutputMemory(limit)
    with ExitStack() as networks:
        for network in networks_of(pipe):
            networks.enter_context(_answered(network, memory))
        yield memory


@contextmanager
def _answered(network: torch.nn.Module, memory: OutputMemory) -> Iterator[None]:
    # Where nn.Module.__call__ looks first, past __setattr__, which torch.compile's wrapper passes on; an interval that
    # is applied later stands before it.
    before = {name: network.__dict__[name] for name in ("_compiled_call_impl",) if name in network.__dict__}
    call = network._compiled_call_impl or network._call_impl
    network.__dict__["_compiled_call_impl"] = lambda *args, **kwargs: memory.answer(network, call, args, kwargs)
    try:
        yield
    finally:
        network.__dict__.pop("_compiled_call_impl")
        network.__dict__.update(before)


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy with the same strides, on which the round-off of what is computed from it may depend."""
    copied = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return copied.copy_(tensor.detach())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of an output. Raises TypeError for what may hold more than is seen."""
    if isinstance(value, torch.Tensor):
        overlapping = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
        if value.requires_grad or overlapping or not _is_plain(value):
            raise TypeError
        yield value
    elif isinstance(value, BaseOutput) or type(value) is dict:
        yield from (tensor for one in value.values() for tensor in _tensors(one))
    elif type(value) in (list, tuple):
        yield from (tensor for one in value for tensor in _tensors(one))
    elif type(value) not in PLAIN:
        raise TypeError


def _form(value: Any, parts: list[bytes]) -> tuple:
    """What arguments are besides the bytes of their tensors, which are added to parts. Raises TypeError for others."""
    if isinstance(value, torch.Tensor):
        if not _is_plain(value):
            raise TypeError
        whole = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        parts.append(whole.view(-1).view(torch.uint8).numpy().tobytes())
        # A kernel may treat what does not begin at a multiple of its vectors' size in another order.
        place = value.storage_offset() * value.element_size() % 64
        return "tensor", value.dtype, tuple(value.shape), value.stride(), value.device, place
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        parts.append(value.tobytes())
        return "array", str(value.dtype), value.shape, value.strides
    if type(value) in (float, complex):
        return type(value), repr(value)  # -0.0 and 0.0 are two inputs
    if type(value) in PLAIN:
        return type(value), value
    if type(value) is dict:
        return dict, tuple((_form(key, parts), _form(one, parts)) for key, one in value.items())
    if type(value) in (list, tuple, torch.Size):
        return type(value), tuple(_form(one, parts) for one in value)
    raise TypeError


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is its bytes, shape, strides and device, and nothing else."""
    known = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return known and not (tensor.is_meta or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def _device_of(value: Any) -> torch.device:
    """The device of the first tensor of the arguments."""
    return next((tensor.device for tensor in tensors_in(value)), torch.device("cpu"))
