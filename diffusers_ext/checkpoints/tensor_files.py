"""Files of tensors and their configurations, read as data; a damaged one is a ValueError that names it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file


@contextmanager
def refusing(problem: str) -> Iterator[None]:
    """Make a ValueError that begins with `problem` of whatever damaged content raises in the block.

    Only a file that is not there stays an OSError. Bytes mean anything once they are damaged, so that there is no list
    of what can be raised.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        first_line = (str(error) or type(error).__name__).split("\n", 1)[0]
        raise ValueError(f"{problem}: {first_line[:300]}") from error


def read_torch_file(path: str | Path):
    """The content of a torch file, on the CPU, read with weights_only. Raises ValueError for one that is damaged or
    holds more than data, OSError for one that is not there."""
    with refusing(f"checkpoint {str(path)!r} cannot be read; is it whole, and a torch file of plain data?"):
        return torch.load(path, map_location="cpu", weights_only=True)


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or torch file by name, on the CPU. Raises as `read_torch_file`, and ValueError for
    a torch file of something else."""
    if Path(path).suffix == ".safetensors":
        with refusing(f"checkpoint {str(path)!r} cannot be read; is it whole?"):
            return load_file(path)
    state = read_torch_file(path)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(state).__name__}, not tensors by name")
    return {name: value.detach() for name, value in state.items()}


def read_json(path: str | Path) -> dict:
    """A JSON object. Raises ValueError for anything else, OSError for a file that is not there."""
    with refusing(f"{str(path)!r} is no JSON object"):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        return content
