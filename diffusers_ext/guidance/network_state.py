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


class _Same:
    """An object that is equal to itself alone, and a tensor as long as nothing was written into it. The object is
    held, so that no other can get its id."""

    def __init__(self, value: Any):
        self.value = value
        self.version = value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None

    def __eq__(self, other):
        return isinstance(other, _Same) and other.value is self.value and other.version == self.version

    def __hash__(self):
        return id(self.value)


def has_stateful_hooks(network: torch.nn.Module) -> bool:
    """Whether diffusers' hooks keep something between the calls of a network, as `enable_cache` and others do."""
    return any(
        getattr(hook, "_is_stateful", False)
        for module in network.modules()
        if (registry := module.__dict__.get("_diffusers_hook")) is not None
        for hook in registry.hooks.values()
    )


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
            if name not in ASIDE and not (name in EMPTY and type(value) is type(EMPTY[name]) and value == EMPTY[name]):
                state.append((name, _described(value, DEPTH)))
    return state


def _described(value: Any, depth: int) -> Any:
    if isinstance(value, bool | int | float | str | type(None)):
        return type(value), repr(value) if isinstance(value, float) else value
    if type(value) is torch.Tensor and not value.is_meta and value.nbytes <= SMALL:
        return value.dtype, value.device, value.shape, hash_of(value)
    if isinstance(value, torch.Generator):
        return hash_of(value.get_state())
    if isinstance(value, np.ndarray) and value.dtype != object and value.nbytes <= SMALL:
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, torch.Tensor | torch.nn.Module | type | FunctionType | BuiltinFunctionType) or depth == 0:
        return _Same(value)
    if isinstance(value, MethodType):
        return _Same(value.__self__), _Same(value.__func__)
    if isinstance(value, dict):
        return type(value), [(_described(key, depth), _described(one, depth - 1)) for key, one in value.items()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return type(value), [_described(one, depth - 1) for one in value]
    if isinstance(value, partial):
        return partial, _described([value.func, value.args, value.keywords], depth - 1)
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(value, name)]
    if slots or hasattr(value, "__dict__"):
        own = {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}
        return type(value), _described(own, depth - 1)
    return _Same(value)
