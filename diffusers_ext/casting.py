"""The dtype of parameters: as they are read, and in memory."""

from typing import TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from packaging.version import Version

Castable = TypeVar("Castable", DiffusionPipeline, ModelMixin)


def cast(what: Castable, dtype: torch.dtype) -> Castable:
    """A model, or every network of a pipeline, in place as by `.to(dtype)`; what is read takes `dtype_option`.

    diffusers' own `.to(dtype)` warns of modules that should stay in float32, also where a model names none or, as
    EDM2's, keeps them itself.
    """
    if isinstance(what, DiffusionPipeline):
        for component in what.components.values():
            if isinstance(component, torch.nn.Module):
                cast(component, dtype)
        return what
    return torch.nn.Module.to(what, dtype)


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword argument of `from_pretrained` that reads parameters in a dtype, by its name in this diffusers."""
    return {"dtype" if Version(diffusers.__version__) >= Version("0.41") else "torch_dtype": dtype}
