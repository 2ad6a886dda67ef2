"""EDM2 networks from NVIDIA's pickles (github.com/NVlabs/edm2), without executing anything in them."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..models.edm2_unet import EDM2UNet2DModel
from ..pipelines.call_arguments import checked_arguments
from .safe_pickle import PickledObject, as_numbers, safe_load
from .tensor_files import check_finite, check_size, checked_cast

_LARGEST = 64  # blocks of a resolution, resolutions, taps; the published networks have 3, 4 and 2
_MOST_TENSORS = 100_000
_CONFIG_NAMES = frozenset(inspect.signature(EDM2UNet2DModel.__init__).parameters) - {"self"}
_CONFIG_ATTRIBUTES = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data")


@dataclass(frozen=True)
class EDM2Checkpoint:
    """What a network pickle of EDM2 holds.

    Attributes:
        state_dict: of the averaged network, under the authors' names.
        config: the authors' arguments.
        latent_scale: with which the training latents were made, one number a channel; None for a network of pixels.
        latent_bias: likewise.
    """

    state_dict: dict[str, torch.Tensor]
    config: dict
    latent_scale: list[float] | None = None
    latent_bias: list[float] | None = None


@checked_arguments
def load_edm2(path: str | Path, dtype: torch.dtype | None = None) -> EDM2UNet2DModel:
    """The averaged network ("ema") of an EDM2 checkpoint, in evaluation mode.

    Args:
        path: a network pickle of EDM2, {"ema": Precond, ...}; its source code is not needed and not run.
        dtype: of the parameters. None: as in the file, which is float16 for published checkpoints and
            gives the network as its authors evaluate it; float32 gives the same weights with unrounded gains.

    Raises:
        UnsafePickleError: (a ValueError) if the file wants anything but known data.
        ValueError: if it holds no EDM2 network.
    """
    checkpoint = read_edm2(path)
    model = EDM2UNet2DModel.from_edm2_state_dict(checkpoint.state_dict, **checkpoint.config)
    return model if dtype is None else checked_cast(model, dtype)


def read_edm2(path: str | Path) -> EDM2Checkpoint:
    """The content of an EDM2 checkpoint, before a network is built; raises as `load_edm2`."""
    data = safe_load(path)
    network = data.get("ema") if isinstance(data, dict) else None
    if not isinstance(network, PickledObject) or network.class_name != "Precond":
        raise ValueError(
            f"{path}: no EDM2 network: expected a dictionary with a Precond object under 'ema', found"
            f" {_description(data)}."
        )
    attributes = {name: network.state[name] for name in _CONFIG_ATTRIBUTES if name in network.state}
    config = {**attributes, **_plain_dict(network.state.get("_init_kwargs", {}))}
    try:
        _check_config(config)
        scale, bias = _latent_statistics(data.get("encoder"), config.get("img_channels"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    state = module_state_dict(network)
    check_size(state, path)
    check_finite(state, str(path))
    return EDM2Checkpoint(state, config, scale, bias)


def _latent_statistics(encoder, channels) -> tuple[list[float] | None, list[float] | None]:
    """scale and bias of a pickled StabilityVAEEncoder; (None, None) for the encoder of pixels and for none."""
    if not isinstance(encoder, PickledObject) or encoder.class_name != "StabilityVAEEncoder":
        return None, None
    found = []
    for name in ("scale", "bias"):
        value = as_numbers(encoder.state.get(name))
        if value.dtype.kind != "f" or value.shape != (channels,) or not np.isfinite(value).all():
            raise ValueError(f"{name} of the encoder must be a finite number for each of the {channels} channels.")
        found.append(value.tolist())
    return tuple(found)


def _check_config(config: dict) -> None:
    """Raise ValueError for arguments that are not EDM2's, and for ones that would build without end."""
    if unknown := [str(name) for name in config if name not in _CONFIG_NAMES]:
        raise ValueError(f"the network was made with {', '.join(unknown)[:200]}, which EDM2 does not have.")
    for name, value in config.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        plain = all(isinstance(number, int | float | type(None)) for number in numbers)
        if not plain or len(numbers) > _LARGEST or (name == "num_blocks" and not 0 < value <= _LARGEST):
            raise ValueError(f"{name} of the network is no number, no list of numbers, or out of all proportion.")


def module_state_dict(module: PickledObject) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a pickled torch module and of all modules in it, by their dotted names.

    Raises:
        ValueError: for what is no module, and for one that occurs twice (a cycle, or an endless tree).
    """
    found, seen, waiting = {}, set(), [("", module)]
    while waiting:
        prefix, current = waiting.pop()
        if not isinstance(current, PickledObject) or id(current) in seen or len(prefix) > 1000:
            raise ValueError(f"module {prefix[:100]!r} is no module, lies too deep, or is one that occurs twice.")
        seen.add(id(current))
        not_kept = current.state.get("_non_persistent_buffers_set", ())
        for group in ("_parameters", "_buffers"):
            for name, tensor in _plain_dict(current.state.get(group, {})).items():
                if isinstance(tensor, torch.Tensor) and not (group == "_buffers" and name in not_kept):
                    found[f"{prefix}{name}"] = tensor
                if len(found) > _MOST_TENSORS:
                    raise ValueError(f"a network of more than {_MOST_TENSORS} tensors.")
        children = _plain_dict(current.state.get("_modules", {}))
        waiting.extend((f"{prefix}{name}.", child) for name, child in children.items() if child is not None)
    return found


def _plain_dict(value) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"a dictionary was expected in the checkpoint, not a {type(value).__name__}.")
    return value


def _description(data) -> str:
    if isinstance(data, dict):
        return f"a dictionary with {', '.join(repr(str(key)[:40]) for key in list(data)[:8]) or 'nothing'}"
    return f"a {type(data).__name__}"
