"""What a network's answer depends on besides its input: weights, and what its modules keep between calls."""

from collections import deque
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from ..runs.provenance import hash_of

SMALL = 1 << 16  # bytes of a tensor that a module may compute anew in each call, such as OmniGen's frequencies
DEPTH = 6  # of objects in objects, such as an attention processor's scales, that are looked into
# What stands there only while a pipeline is called, and a config, which is frozen.
ASIDE = {"_compiled_call_impl", "cache_context", "_internal_dict", "_modules", "_parameters", "_buffers"}
EMPTY = torch.nn.Module().__dict__
PLAIN = (bool, int, str, type(None))  # what nearly all attributes are, and most calls here are made for
ITSELF = (torch.Tensor, torch.nn.Module, type, FunctionType, BuiltinFunctionType)
SEVERAL = (list, tuple, set, frozenset, deque)


class _Same:
    """An object that is equal to itself alone, and a tensor as long as nothing was written into it. The object is
    held, so that no other can get its id."""

    def __init__(self, value: Any):
        self.value = value
        self.version = value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value and other.version == self.version

    def __hash__(self) -> int:
        return id(self.value)


def state_of(network: torch.nn.Module) -> list:
    """Equal for two moments between which no weight, buffer, attribute, hook or attention processor has changed.

    Weights that wait elsewhere (on the meta device) are not looked at.
    """
    state: list = []
    for module in network.modules():
        own = module.__dict__
        computed = own["_non_persistent_buffers_set"]
        for name, tensor in (*own["_parameters"].items(), *own["_buffers"].items()):
            if tensor is not None and not tensor.is_meta:
                state.append(_described(tensor, 0) if name in computed else _Same(tensor))
        for name, value in own.items():
            kind = type(value)
            if kind in PLAIN:
                state.append((name, kind, value))
            elif name not in ASIDE and not (name in EMPTY and kind is type(EMPTY[name]) and not value):
                state.append((name, _described(value, DEPTH)))
    return state


def _described(value: Any, depth: int) -> Any:
    if type(value) in PLAIN:
        return type(value), value
    if isinstance(value, float):
        return type(value), repr(value)  # -0.0 is another than 0.0, NaN the same as NaN
    if type(value) is torch.Tensor and not value.is_meta and value.nbytes <= SMALL:
        return value.dtype, value.device, value.shape, hash_of(value)
    if isinstance(value, torch.Generator):
        return hash_of(value.get_state())
    if isinstance(value, np.ndarray) and value.dtype != object and value.nbytes <= SMALL:
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, ITSELF) or depth == 0:
        return _Same(value)
    if isinstance(value, MethodType):
        return _Same(value.__self__), _Same(value.__func__)
    if isinstance(value, dict):
        return type(value), [(_described(key, depth), _described(one, depth - 1)) for key, one in value.items()]
    if isinstance(value, SEVERAL):
        return type(value), [_described(one, depth - 1) for one in value]
    if isinstance(value, partial):
        return partial, _described([value.func, value.args, value.keywords], depth - 1)
    named = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    named = [name for names in named for name in ((names,) if isinstance(names, str) else names)]
    slots = [name for name in named if hasattr(value, name)]
    if slots or hasattr(value, "__dict__"):
        own = {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}
        return type(value), _described(own, depth - 1)
    return _Same(value)
