"""Files of tensors and their configurations, read as data; a damaged one is a ValueError that names it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import load_file

from ..casting import cast
from ..hub.damage import HEAD, SAFETENSORS, other_kind, read_json, refusing
from .torch_files import load_torch_file

__all__ = [
    "check_finite", "check_names", "check_size", "checked_cast", "read_json", "read_tensors", "read_torch_file",
    "refusing",
]  # fmt: skip

MOST_SHOWN = 8  # bytes of tensors for each byte of the file; shared and tied weights show the same ones twice
PART = 1 << 24  # elements that are looked at at a time


def read_torch_file(path: str | Path) -> Any:
    """The content of a torch file, on the CPU; see `load_torch_file`.

    Raises:
        ValueError: for one that is damaged or holds more than data.
        OSError: for one that is not there.
    """
    with refusing(f"checkpoint {str(path)!r} cannot be read; is it whole, and a torch file of plain data?"):
        return load_torch_file(path)


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or torch file by name, on the CPU.

    Args:
        path: of the file.

    Raises:
        ValueError: as `read_torch_file`, and for a torch file of something else and for numbers that are not finite.
        OSError: as `read_torch_file`.
    """
    if Path(path).suffix == ".safetensors":
        with refusing(f"checkpoint {str(path)!r} cannot be read; is it whole?"):
            state = _read_safetensors(path)
    else:
        state = read_torch_file(path)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"checkpoint {str(path)!r} holds {_content(state)}")
    state = {name: value.detach() for name, value in state.items()}
    check_size(state, path)
    check_finite(state, f"checkpoint {str(path)!r}")
    return state


def _read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:
        if other := other_kind(file.read(HEAD), wanted=SAFETENSORS):
            raise ValueError(f"it is {other}")
    return load_file(path)


def _content(state) -> str:
    """What a file holds in place of tensors by name, and where those may be."""
    if not isinstance(state, Mapping):
        return f"a {type(state).__name__}, not tensors by name"
    nested = [
        name
        for name, value in state.items()
        if isinstance(value, Mapping) and value and all(isinstance(one, torch.Tensor) for one in value.values())
    ]
    found = f"a dictionary with {', '.join(repr(name)[:60] for name in list(state)[:6]) or 'nothing'}"
    if not nested:
        return f"{found}, not tensors by name"
    return f"{found}; the tensors by name lie under {nested[0]!r}: write that one alone to a file of its own"


def check_size(state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Raise ValueError where tensors show the same elements so often that copies of them would fill the memory."""
    size, shown = Path(path).stat().st_size, sum(value.nbytes for value in state.values())
    if shown > MOST_SHOWN * size:
        raise ValueError(f"checkpoint {str(path)!r} of {size} bytes shows {shown} bytes of tensors")


def check_names(state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Raise ValueError, saying so, where every name has the prefix of a data-parallel wrapper."""
    if state and all(name.startswith("module.") for name in state):
        raise ValueError(
            f"checkpoint {str(path)!r} was saved from a data-parallel wrapper: its names begin with 'module.'; write"
            " the same tensors to a file under their names without it"
        )


def check_finite(state: Mapping[str, torch.Tensor], owner: str) -> None:
    """Raise ValueError naming the first tensor that holds NaN or infinity, and how many do."""
    broken = [name for name, value in state.items() if value.is_floating_point() and not _is_finite(value)]
    if broken:
        raise ValueError(
            f"{owner}: tensor {broken[0]} holds numbers that are not finite, NaN or infinity"
            + (f", and so do {len(broken) - 1} others" if len(broken) > 1 else "")
        )


def _is_finite(value: torch.Tensor) -> bool:
    return all(torch.isfinite(part).all() for part in value.flatten().split(PART))


def checked_cast(model: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """The model in another dtype.

    Raises:
        ValueError: naming a tensor that is no longer finite there.
    """
    model = model if model.dtype == dtype else cast(model, dtype)
    name = str(dtype).removeprefix("torch.")
    check_finite(model.state_dict(), f"{type(model).__name__} in {name}, so use another dtype")
    return model
