"""The dtype of parameters: as they are read, and in memory."""

from typing import TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models import modeling_utils
from packaging.version import Version

Castable = TypeVar("Castable", DiffusionPipeline, ModelMixin)


def cast(what: Castable, dtype: torch.dtype, device: str | torch.device | None = None) -> Castable:
    """A model or a pipeline after `.to(device, dtype)`; what is read from disk takes `dtype_option`.

    Without the warning of diffusers' `.to` about modules that should stay in float32: it comes also where a model
    names none, and where one keeps them itself, as EDM2's does.
    """
    note = modeling_utils.logger
    note.addFilter(_is_no_note)
    try:
        return what.to(dtype) if device is None else what.to(device, dtype)
    finally:
        note.removeFilter(_is_no_note)


def _is_no_note(record) -> bool:
    return "should be kept in float32" not in record.getMessage()


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword argument of `from_pretrained` that reads parameters in a dtype, by its name in this diffusers."""
    return {"dtype" if Version(diffusers.__version__) >= Version("0.41") else "torch_dtype": dtype}
