"""Checkpoints of SEDD (Hub layout: config.json, model.safetensors) and of the CountDown models of Jump Your Steps."""

import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..models import SEDDTransformer
from ..pipelines.call_arguments import checked_arguments
from ..schedulers import CTMCScheduler
from .tensor_files import check_names, checked_cast, read_json, read_tensors, refusing

# The authors' parameter names, and ours.
RENAMED = (
    (r"^vocab_embed\.embedding$", "embedding.weight"),
    (r"^sigma_map\.mlp\.", "time_mlp."),
    (r"\.attn_qkv\.", ".attn.to_qkv."),
    (r"\.attn_out\.", ".attn.to_out."),
    (r"^output_layer\.norm_final\.", "output.norm."),
    (r"^output_layer\.", "output."),
    (r"\.adaLN_modulation\.", ".modulation."),
)
INV_FREQ = "rotary_emb.inv_freq"


@checked_arguments
def load_sedd(path: str | Path, revision: str | None = None) -> SEDDTransformer:
    """A SEDD network, in float32 and evaluation mode; `model(tokens, sigma).sample` are log scores.

    Args:
        path: a folder with config.json and model.safetensors (or pytorch_model.bin), or the id of such a repository on
            the Hub, such as "louaaron/sedd-small".
        revision: branch, tag or commit of the repository.

    Raises:
        ValueError: if the configuration or the weights are not SEDD's.
        OSError: if a file is not there.
    """
    config = _read_config(path, revision)
    settings = config["model"]
    absorbing = _is_absorbing(config)
    state = _read_weights(path, revision)
    check_names(state, path)
    with refusing(f"config.json of {str(path)!r} is not SEDD's"):
        sizes = {
            "vocab_size": config["tokens"] + absorbing,
            "hidden_size": settings["hidden_size"],
            "cond_dim": settings["cond_dim"],
            "num_blocks": settings["n_blocks"],
        }
        _check_sizes(sizes, state, path)  # before a network of any size is built
        model = SEDDTransformer(
            **sizes,
            num_heads=settings["n_heads"],
            dropout=settings["dropout"],
            scale_by_sigma=settings["scale_by_sigma"],
            sequence_length=settings.get("length"),
        )
    return _filled(model, _renamed(state), path)


@checked_arguments
def sedd_scheduler(path: str | Path, revision: str | None = None, **overrides) -> CTMCScheduler:
    """The scheduler that belongs to a SEDD checkpoint: its kernel, vocabulary and noise schedule.

    Args:
        path: as of `load_sedd`.
        revision: as of `load_sedd`.
        **overrides: any other arguments of CTMCScheduler, such as sampler="tweedie".

    Raises:
        ValueError: if the configuration is not SEDD's.
        OSError: if it is not there.
    """
    config = _read_config(path, revision)
    absorbing, noise = _is_absorbing(config), config["noise"]
    with refusing(f"config.json of {str(path)!r} is not SEDD's"):
        settings = {
            "kernel": "absorbing" if absorbing else "uniform",
            "vocab_size": config["tokens"] + absorbing,
            "noise_schedule": noise["type"],
        }
        if noise["type"] == "geometric":
            settings |= {"sigma_min": float(noise["sigma_min"]), "sigma_max": float(noise["sigma_max"])}
    return CTMCScheduler(**{**settings, **overrides})


@checked_arguments
def load_countdown(path: str | Path, num_heads: int | None = None) -> SEDDTransformer:
    """A network of Jump Your Steps' CountDown experiment, in float32 and evaluation mode.

    Args:
        path: its state dict, as .safetensors or as a torch file (read as plain data). The sizes are read off the
            tensors.
        num_heads: needed only where the file lacks the buffer of rotary frequencies.

    Raises:
        ValueError: if the tensors are not of such a network.
    """
    path = Path(path)
    state = {re.sub(r"^module\.", "", name): tensor for name, tensor in read_tensors(path).items()}
    sizes = _sizes(state, path)
    if num_heads is None and INV_FREQ not in state:
        raise ValueError(f"{str(path)!r} has no {INV_FREQ}, from which the heads are counted; pass num_heads=")
    with refusing(f"{str(path)!r} is no CountDown checkpoint"):
        model = SEDDTransformer(
            **sizes,
            num_heads=num_heads or sizes["hidden_size"] // (2 * len(state[INV_FREQ])),
            mlp_ratio=len(state["blocks.0.mlp.0.bias"]) // sizes["hidden_size"],
        )
    return _filled(model, _renamed(state), path)


def _sizes(state: dict[str, torch.Tensor], path) -> dict[str, int]:
    """The sizes of the network as arguments of SEDDTransformer, read off its tensors."""
    with refusing(f"{str(path)!r} is no CountDown checkpoint, nor one of SEDD"):
        vocab_size, hidden_size = state["vocab_embed.embedding"].shape
        return {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "cond_dim": len(state["sigma_map.mlp.0.bias"]),
            "num_blocks": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        }


def _check_sizes(sizes: dict[str, int], state: dict[str, torch.Tensor], path) -> None:
    if (found := _sizes(state, path)) != sizes:
        raise ValueError(f"the weights of {str(path)!r} do not fit its configuration: {found}, not {sizes}")


def _read_config(path: str | Path, revision: str | None) -> dict:
    config = read_json(_file(path, "config.json", revision))
    needed = {"model": ("hidden_size", "cond_dim", "n_blocks", "n_heads", "scale_by_sigma"), "graph": ("type",)}
    needed["noise"] = ("type",)
    for part in needed:
        if not isinstance(config.setdefault(part, {}), dict):
            raise ValueError(f"config.json of {str(path)!r} is not SEDD's: {part} is no object")
    config["model"].setdefault("dropout", 0.0)
    missing = [f"{part}.{key}" for part, keys in needed.items() for key in keys if key not in config[part]]
    missing += ["tokens"] * ("tokens" not in config)
    if missing:
        raise ValueError(f"config.json of {str(path)!r} is not SEDD's: it lacks {', '.join(missing)}")
    return config


def _is_absorbing(config: dict) -> bool:
    kind = config["graph"]["type"]
    if kind not in ("absorb", "uniform"):
        raise ValueError(f'graph.type must be "absorb" or "uniform", got {kind!r}')
    return kind == "absorb"


def _read_weights(path: str | Path, revision: str | None) -> dict[str, torch.Tensor]:
    try:
        return read_tensors(_file(path, "model.safetensors", revision))
    except (EntryNotFoundError, FileNotFoundError):
        return read_tensors(_file(path, "pytorch_model.bin", revision))


def _file(path: str | Path, name: str, revision: str | None) -> str:
    """A file of a folder or of a repository on the Hub."""
    if Path(path).is_dir():
        return str(Path(path) / name)
    return hf_hub_download(str(path), name, revision=revision)


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state.items():
        if name == INV_FREQ:
            continue
        for pattern, ours in RENAMED:
            name = re.sub(pattern, ours, name)
        renamed[name] = tensor.float()
    return renamed


def _filled(model: SEDDTransformer, state: dict[str, torch.Tensor], path) -> SEDDTransformer:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights of {str(path)!r} do not fit its configuration: {error}") from None
    return checked_cast(model.eval(), torch.float32)
