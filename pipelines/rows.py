"""The rows of a batch in several parts: cut out those that are run, and spread what they give over all of them."""

import functools
import re
from collections.abc import Callable
from numbers import Number
from typing import Any, NamedTuple

import torch

# Arguments that are the same for all rows, whatever their first dimension: position tables of tokens, and masks, one
# for each IP-Adapter.
SHARED_ARGUMENT = re.compile(r"rotary|rope|freqs|^(img|txt)_ids$|^ip_adapter_masks$")
# Arguments that may hold several rows a sample, one a frame, and are halved all the same.
FOLDED_ARGUMENT = re.compile(r"hidden_states|embed|residual|samples|controlnet_cond|mask")
# Arguments whose rows are not in the first dimension: HiDream's are (layers, rows, tokens, channels), AnyFlow's cached
# keys and values (2, rows, heads, tokens, channels).
ROW_DIMENSION = {"encoder_hidden_states_llama3": 1, "compressed_cache": 1, "full_cache": 1}


class Rows(NamedTuple):
    """The arguments of a network call: `total` rows, in a list of tensors if `listed`, else in a tensor."""

    total: int
    listed: bool


class Cut(NamedTuple):
    """A batch in `parts` equal parts.

    run: the parts to run without guidance. source: for each part, which of those that were run stands for it. turns:
    whether the parts take turns row by row, else one follows the other.
    """

    parts: int
    run: tuple[int, ...]
    source: tuple[int, ...]
    turns: bool = False


def count_rows(arguments: dict[str, Any]) -> Rows:
    """Rows of the first argument that has rows: the noisy sample, in every diffusers model but packed ones.

    Raises:
        ValueError: where there is none.
    """
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            return Rows(len(value) if value.ndim > 1 else 1, False)
        if isinstance(value, list) and value:
            return Rows(len(value), True)
    raise ValueError(f"a network was called without a tensor among {list(arguments)}; cannot count its rows")


def split_rows(tensor: torch.Tensor, cut: Cut, dim: int = 0) -> list[torch.Tensor]:
    """The parts of a tensor (rows, ...), or with the rows in dimension dim: each (rows / parts, ...)."""
    if cut.turns:
        return [tensor[i :: cut.parts] for i in range(cut.parts)]
    size = tensor.shape[dim] // cut.parts
    return [tensor.narrow(dim, i * size, size) for i in range(cut.parts)]


def join_rows(parts: list[torch.Tensor], turns: bool, dim: int = 0) -> torch.Tensor:
    """What `split_rows` split: parts of (rows, ...) each."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts, dim=1).flatten(0, 1) if turns else torch.cat(parts, dim)


def take_rows(name: str, value: Any, rows: Rows, cut: Cut) -> Any:
    """The parts of an argument that are run without guidance; what does not vary by row comes back as it is."""
    if isinstance(value, torch.Tensor):
        if not has_rows(name, value, rows):
            return value
        dim = ROW_DIMENSION.get(name, 0)
        if len(cut.run) == 1 and not cut.turns:
            size = value.shape[dim] // cut.parts
            return value.narrow(dim, cut.run[0] * size, size)
        parts = split_rows(value, cut, dim)
        return join_rows([parts[i] for i in cut.run], cut.turns, dim)
    size = rows.total // cut.parts
    if isinstance(value, dict) and all(isinstance(key, int) for key in value) and not _has_tensor(value):
        # by number of the row, like OmniGen's places of images
        kept = [row for i in cut.run for row in range(i * size, (i + 1) * size)]
        return {new: value[old] for new, old in enumerate(kept) if old in value}
    if isinstance(value, dict):
        return type(value)({key: take_rows(str(key), item, rows, cut) for key, item in value.items()})
    if isinstance(value, list | tuple):
        if isinstance(value, list) and len(value) == rows.total and (rows.listed or _is_nested(value)):
            return [item for i in cut.run for item in value[i * size : (i + 1) * size]]
        return type(value)([take_rows(name, item, rows, cut) for item in value])
    return value


def spread_rows(value: Any, rows: Rows, cut: Cut, name: str = "") -> Any:
    """The output for all parts of a batch from that for `rows` of the parts that were run."""
    if isinstance(value, torch.Tensor):
        dim = ROW_DIMENSION.get(name, 0)
        if value.ndim <= dim or not value.shape[dim] or value.shape[dim] % rows.total:
            return value
        parts = [value] if len(cut.run) == 1 else split_rows(value, cut._replace(parts=len(cut.run)), dim)
        return join_rows([parts[i] for i in cut.source], cut.turns, dim)
    if isinstance(value, list) and rows.listed and len(value) == rows.total:
        size = rows.total // len(cut.run)
        return [item for i in cut.source for item in value[i * size : (i + 1) * size]]
    return _mapped(value, lambda item, key: spread_rows(item, rows, cut, key))


def has_rows(name: str, value: torch.Tensor, rows: Rows) -> bool:
    """Whether a tensor argument, (rows, ...) but for `ROW_DIMENSION`, has an entry for each row."""
    dim, shared, folded = _kind(name)
    if value.ndim <= dim or shared:
        return False
    length = value.shape[dim]
    return length == rows.total or (folded and length > 0 and length % rows.total == 0)


@functools.cache
def _kind(name: str) -> tuple[int, bool, bool]:
    """The dimension of an argument's rows, whether it is the same for all of them, and whether it may be folded."""
    return ROW_DIMENSION.get(name, 0), bool(SHARED_ARGUMENT.search(name)), bool(FOLDED_ARGUMENT.search(name))


def unclear_arguments(name: str, value: Any, rows: Rows, given: bool = False) -> list[str]:
    """Names of tensors of which it is not sure whether they have an entry for each row.

    Those that are taken to be the same for all rows, but have a dimension as long as the batch, and those in a dict
    like `cross_attention_kwargs` that comes from the user (`given`), if they are as long as the batch.
    """
    if isinstance(value, torch.Tensor):
        if SHARED_ARGUMENT.search(name) or rows.total not in value.shape[:2]:
            return []
        return [name] if given or not has_rows(name, value, rows) else []
    if isinstance(value, dict):
        given = given or name.endswith("attention_kwargs")
        return [one for key, item in value.items() for one in unclear_arguments(str(key), item, rows, given)]
    if isinstance(value, list | tuple) and not (rows.listed and len(value) == rows.total):
        return [one for item in value for one in unclear_arguments(name, item, rows, given)]
    return []


def caches_of_rows(name: str, value: Any) -> list[str]:
    """What a network keeps from call to call that is not clear to have rows, by name."""
    if isinstance(value, dict):
        return [one for key, item in value.items() for one in caches_of_rows(f"{key}", item)]
    if isinstance(value, list | tuple):
        return [one for item in value for one in caches_of_rows(name, item)]
    clear = value is None or isinstance(value, str | Number) or name in ROW_DIMENSION
    return [] if clear else [name]


def map_tensors(function: Callable, value: Any) -> Any:
    """The same structure with `function` of each tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return _mapped(value, lambda item, key: map_tensors(function, item))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in an output, in order, but for single numbers."""
    if isinstance(value, torch.Tensor):
        return [value] if value.ndim else []
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def _mapped(value: Any, function) -> Any:
    if isinstance(value, dict):  # a ModelOutput too
        items = {key: function(item, str(key)) for key, item in value.items()}
        return type(value)(**items) if hasattr(value, "to_tuple") else items
    if isinstance(value, list | tuple):
        return type(value)([function(item, "") for item in value])
    return value


def _is_nested(value: list) -> bool:
    """A list of lists or tuples without tensors: one entry a row, like the shapes of packed images."""
    return all(isinstance(item, list | tuple) and not _has_tensor(item) for item in value)


def _has_tensor(value: Any) -> bool:
    return bool(isinstance(value, torch.Tensor) or tensors_in(value))
