"""What decides about a result: versions, a pipeline besides the arguments of its call, and data, as JSON."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..machine.versions import package_versions

# The packages whose version can change an image or its file.
DRAWING = (
    "python", "diffusers_ext", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow",
    "xformers",
)  # fmt: skip


def drawing_versions() -> dict[str, str | None]:
    """Version of each package that can change an image; None where it is not installed."""
    versions = package_versions()
    return {name: versions[name] for name in DRAWING}


def hash_of(*arrays) -> str:
    """One sha256 over the bytes of tensors, arrays and None, one after the other."""
    digest = sha256()
    for array in arrays:
        if isinstance(array, torch.Tensor):
            array = array.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(b"none" if array is None else np.ascontiguousarray(array))
    return digest.hexdigest()


def describe_pipeline(pipe: DiffusionPipeline) -> dict:
    """Class, origin, device, dtype and components of a pipeline; equal for two that draw the same images."""
    model = str(pipe.config.get("_name_or_path"))
    plain = {name: value for name, value in _config(pipe).items() if name not in pipe.components}
    parts = {name: describe_component(part) for name, part in pipe.components.items() if part is not None}
    return {
        "pipeline": type(pipe).__name__,
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "device": pipe._execution_device.type,
        "dtype": str(pipe.dtype),
        "components": {**plain, **parts},
    }


def describe_component(part: Any) -> dict[str, str | dict]:
    """The class of a component, with the config of a scheduler or a hash of a network's config and weights.

    A pipeline that is a component of another one is described as a whole.
    """
    described: dict = {"class": type(part).__name__}
    if isinstance(part, DiffusionPipeline):
        described["components"] = describe_pipeline(part)["components"]
    if isinstance(part, SchedulerMixin):
        described["config"] = _config(part)
    if isinstance(part, torch.nn.Module):
        described["sha256"] = _hash_of_network(part)
    return described


def _config(part) -> dict:
    """The config of a diffusers or transformers class or of a pipeline, without where it came from."""
    config = getattr(part, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    return json.loads(json.dumps(config, default=str))


def _hash_of_network(network: torch.nn.Module) -> str:
    """A hash over the config and every parameter and buffer, by name, shape, dtype and some 64 of its values.

    Training changes nearly every value, so a few of each parameter tell two models apart in a moment.
    """
    digest = sha256(json.dumps(_config(network), sort_keys=True).encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta and type(tensor) is torch.Tensor:  # quantised kinds cannot all be indexed
            values = tensor.detach().reshape(-1)
            values = values[:: max(1, len(values) // 64)].contiguous().cpu()
            digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()
