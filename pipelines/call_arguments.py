"""Arguments of public calls, checked against the annotations of their signatures, where what is allowed is said."""

import collections.abc
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

NAMES = {
    bool: "True or False", int: "an integer", float: "a number", str: "a string", torch.Tensor: "a tensor",
    np.ndarray: "an array", types.NoneType: "None", torch.device: "a torch device", os.PathLike: "a path",
}  # fmt: skip
SEQUENCES = (list, collections.abc.Sequence, collections.abc.Iterable)
LARGEST = 2**63 - 1


def checked_arguments(function: Callable | None = None, *, but: str = "") -> Callable:
    """The function, that raises ValueError for arguments of another kind than its annotations say.

    The error has the argument's name, what is allowed and the value. Numbers of NumPy are numbers, and arrive as
    Python's; True and False are none; an int fits into 64 bits and a float into a float, NaN and infinity included.
    Where lists are allowed, so are tuples, ranges, arrays and tensors of such elements. Defaults pass, and so do
    arguments without an annotation.

    Args:
        function: whose arguments are checked.
        but: names of arguments that the function checks by itself.
    """
    if function is None:
        return functools.partial(checked_arguments, but=but)
    signature = inspect.signature(function)
    if any(isinstance(p.annotation, str) for p in signature.parameters.values()):  # of a module that postpones them
        signature = inspect.signature(function, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    checked = {p.name: p for p in parameters if p.annotation is not p.empty and p.name not in but.split()}

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            parameter = checked.get(name)
            if parameter and value is not parameter.default and not is_of_kind(value, parameter.annotation):
                raise ValueError(f"{name} must be {named(parameter.annotation)}, got {short(value)}")
        return function(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return wrapper


def plain(value: Any) -> Any:
    """A number of NumPy as Python's, which torch and JSON take; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def is_of_kind(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says; True for annotations that say nothing about kinds."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if isinstance(value, str) and torch.device in inner:
            return _is_device(value)
        # lists last: looking at the elements of a tensor would wait for its device
        return any(is_of_kind(value, one) for one in sorted(inner, key=lambda one: bool(typing.get_args(one))))
    if origin is typing.Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if kind is None or kind is types.NoneType:
        return value is None
    if kind in NUMBERS:
        return NUMBERS[kind](value)
    if kind is torch.device:
        return _is_device(value)
    if type(kind) is type(torch.LongTensor):  # on any device, and of any width if floating
        same = isinstance(value, torch.Tensor) and value.is_floating_point() == kind.dtype.is_floating_point
        return same and (value.is_floating_point() or value.dtype == kind.dtype)
    if kind is DiffusionPipeline:  # or what is called and placed like one
        return not isinstance(value, type) and (callable(value) or hasattr(value, "_execution_device"))
    if (origin or kind) is collections.abc.Callable:
        return callable(value)
    if origin is collections.abc.Iterable and not isinstance(value, str | bytes) and _elements(value) is None:
        return isinstance(value, collections.abc.Iterable)  # looking at its elements would use it up
    if origin in SEQUENCES and inner:
        return _elements(value) is not None and all(is_of_kind(one, inner[0]) for one in _elements(value))
    if origin is tuple:
        elements = _elements(value)
        every = elements is not None and inner[-1] is Ellipsis
        inner = inner[:1] * len(elements) if every else inner
        return elements is not None and len(elements) == len(inner) and all(map(is_of_kind, elements, inner))
    if origin in (dict, collections.abc.Mapping) and inner:
        return isinstance(value, collections.abc.Mapping) and all(
            is_of_kind(key, inner[0]) and is_of_kind(one, inner[1]) for key, one in value.items()
        )
    if origin is type:
        return isinstance(value, type) and issubclass(value, inner[0])
    return not isinstance(origin or kind, type) or isinstance(value, origin or kind)


def _is_int(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_float(value) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        float(value)
    except OverflowError:  # an integer beyond all floats
        return False
    return True


NUMBERS = {bool: lambda value: isinstance(value, bool | np.bool_), int: _is_int, float: _is_float}


def _is_device(value) -> bool:
    if isinstance(value, str):
        try:
            value = torch.device(value)
        except RuntimeError:
            return False
    return isinstance(value, torch.device)


def _elements(value) -> list | None:
    """What a list, or what may stand in for one, holds; None for anything else."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.tolist() if value.ndim else None
    return list(value) if isinstance(value, collections.abc.Sequence) and not isinstance(value, str | bytes) else None


def check_generators(generator: torch.Generator | list[torch.Generator] | None, batch: int) -> None:
    """Raise ValueError for a list of generators that are not one a sample."""
    if isinstance(generator, list | tuple) and len(generator) != batch:
        raise ValueError(f"generator is a list of {len(generator)}, the batch has {batch} samples; give one a sample")


def named(kind: Any, plural: bool = False) -> str:
    """An annotation in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(named(one, plural) for one in inner))
    if origin in (*SEQUENCES, tuple) and inner:
        fixed = origin is tuple and Ellipsis not in inner
        what = ", ".join(named(one) for one in inner) if fixed else named(inner[0], plural=True)
        return f"({what})" if fixed else f"lists of {what}" if plural else f"a list of {what}"
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if origin in (dict, collections.abc.Mapping):
        return "a dictionary"
    if (origin or kind) is collections.abc.Callable:
        return "callable"
    name = NAMES.get(kind) or f"of the class {getattr(origin or kind, '__name__', kind)}"
    return name.split(maxsplit=1)[1] + "s" if plural and name.startswith(("a ", "an ")) else name


def short(value: Any) -> str:
    """A value for a message, no longer than a line."""
    if isinstance(value, torch.Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, torch.Tensor) else "an array"
        return f"{kind} of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.200}"
