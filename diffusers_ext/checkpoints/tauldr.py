"""Checkpoints of tauLDR (2205.14987): a torch file with raw and averaged weights, and a config.yaml beside it."""

import re
from pathlib import Path

import torch
import yaml

from ..models import CTMCSequenceTransformer, CTMCUNet
from ..pipelines.call_arguments import checked_arguments
from ..schedulers import CTMCScheduler
from .tensor_files import check_finite, check_size, read_torch_file, refusing

# The authors' names inside a layer, and ours. NiN matrices map from the left and are transposed.
LAYER = {
    "groupnorm0": "norm1",
    "groupnorm1": "norm2",
    "conv0": "conv1",
    "conv1": "conv2",
    "dense0": "time",
    "nin": "skip",
    "conv": "conv",
    "GroupNorm_0": "norm",
    "NIN_0": "to_q",
    "NIN_1": "to_k",
    "NIN_2": "to_v",
    "NIN_3": "to_out",
}
SEQUENCE = (
    (r"^temb_net\.", "time_mlp."),
    (r"^input_embedding\.", "embedding."),
    (r"^encoder_layers\.", "blocks."),
    (r"^output_resid_layers\.", "output_blocks."),
    (r"^output_linear\.", "output."),
    (r"\.self_attn\.in_proj_", ".attn.to_qkv."),
    (r"\.self_attn\.out_proj\.", ".attn.to_out."),
    (r"\.linear1\.", ".ff.0."),
    (r"\.linear2\.", ".ff.3."),
    (r"\.film_from_temb\.", ".film.linear."),
)

# Numbers of layers, and the most that are believed: a damaged file would keep us building.
LAYERS = ("num_layers", "num_output_FFresiduals", "num_res_blocks")
MOST_LAYERS = 1000


@checked_arguments
def load_tauldr(
    checkpoint: str | Path, config: str | Path, weights: str = "ema", integer_time: bool = True
) -> CTMCUNet | CTMCSequenceTransformer:
    """A network of tauLDR, in float32 and evaluation mode; `model(tokens, t).sample` are logits of the clean tokens.

    Args:
        checkpoint: the torch file, read as plain data: nothing in it is executed.
        config: its config.yaml.
        weights: "ema", the averaged ones, or "raw".
        integer_time: of the sequence network only; True is how the authors trained: the network sees the time cut to
            an integer. False for networks trained on the time itself.

    Raises:
        ValueError: for networks that are not known and for weights that do not fit the configuration.
    """
    settings = _read_config(config)
    with refusing(f"{str(config)!r} describes no network of tauLDR"), torch.device("meta"):
        sketch = _build(settings, integer_time)  # without memory, whatever sizes a damaged file gives
    state = _state(read_torch_file(checkpoint), weights, str(checkpoint))
    with refusing(f"the weights of {str(checkpoint)!r} do not fit {str(config)!r}"):
        renamed = _unet_state(sketch, state) if isinstance(sketch, CTMCUNet) else _sequence_state(state)
        _check_shapes(sketch, renamed)
    model = _build(settings, integer_time)
    model.load_state_dict(renamed)
    return model.eval()


def _check_shapes(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    expected, found = ({name: tuple(t.shape) for name, t in each.items()} for each in (model.state_dict(), state))
    different = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if different:
        first = ", ".join(f"{name} is {found.get(name)}, not {expected.get(name)}" for name in different[:3])
        raise ValueError(f"{len(different)} tensors differ, such as {first}")


@checked_arguments
def tauldr_scheduler(config: str | Path, **overrides) -> CTMCScheduler:
    """The scheduler that belongs to a tauLDR checkpoint: its kernel, noise and tau-leaping down to t = 0.01.

    Args:
        config: its config.yaml.
        **overrides: any other arguments of CTMCScheduler.

    Raises:
        ValueError: for a file of something else, and for processes that are not known.
    """
    with refusing(f"{str(config)!r} describes no process of tauLDR"):
        settings = _scheduler_settings(_read_config(config))
    return CTMCScheduler(**{**settings, **overrides})


def _scheduler_settings(config: dict) -> dict:
    model, size, name = config["model"], config["data"]["S"], config["model"]["name"]
    common = {
        "vocab_size": size,
        "prediction_type": "x0",
        "jumps": "poisson",
        "time_conditioning": "timestep",
        "min_timestep": 0.01,
    }
    if name.startswith("GaussianTargetRate"):
        time = {key: float(model[key]) for key in ("time_base", "time_exponential", "rate_sigma", "Q_sigma")}
        kernel = {"kernel": "gaussian", "noise_schedule": "exponential", **time}
    elif name.startswith("UniformRate"):
        # the authors' rate between any two tokens, ours in units of the rate of drawing a new one
        kernel = {"kernel": "uniform", "noise_schedule": "constant", "constant_rate": model["rate_const"] * size}
    elif name.startswith("BirthDeath"):
        low, high = float(model["sigma_min"]), float(model["sigma_max"])
        time = {"time_base": low**2 / 2, "time_exponential": (high / low) ** 2}
        kernel = {"kernel": "birth_death", "noise_schedule": "exponential", **time}
    else:
        raise ValueError(f"model.name must begin with GaussianTargetRate, UniformRate or BirthDeath, got {name!r}")
    return {**common, **kernel}


def _read_config(path: str | Path) -> dict:
    with refusing(f"{str(path)!r} is not plain YAML"):
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    parts = [config.get(part) for part in ("model", "data")] if isinstance(config, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or "S" not in parts[1] or "name" not in parts[0]:
        raise ValueError(f"{str(path)!r} is no config of tauLDR: it needs model.name and data.S")
    for name in LAYERS:
        number = parts[0].get(name, 0)
        if not isinstance(number, int) or not 0 <= number <= MOST_LAYERS:
            raise ValueError(f"{str(path)!r}: {name} must be an integer in [0, {MOST_LAYERS}], got {number!r}"[:300])
    return config


def _build(config: dict, integer_time: bool) -> CTMCUNet | CTMCSequenceTransformer:
    data, model = config["data"], config["model"]
    if "ImageX0Pred" in model["name"]:
        if list(model["data_min_max"]) != [0, data["S"] - 1]:
            raise ValueError(f"model.data_min_max must be [0, S - 1] with S={data['S']}, got {model['data_min_max']}")
        return CTMCUNet(
            shape=tuple(data["shape"]),
            num_levels=data["S"],
            channels=model["ch"],
            channel_mult=tuple(model["ch_mult"]),
            num_res_blocks=model["num_res_blocks"],
            attention_level=model["scale_count_to_put_attn"],
            dropout=model["dropout"],
            time_embed_dim=model["time_embed_dim"],
            time_scale_factor=model["time_scale_factor"],
            skip_rescale=model["skip_rescale"],
            fix_logistic=model["fix_logistic"],
        )
    if "SequenceTransformer" in model["name"]:
        return CTMCSequenceTransformer(
            vocab_size=data["S"],
            d_model=model["d_model"],
            num_layers=model["num_layers"],
            num_heads=model["num_heads"],
            dim_feedforward=model["dim_feedforward"],
            num_output_layers=model["num_output_FFresiduals"],
            temb_dim=model["temb_dim"],
            time_scale_factor=model["time_scale_factor"],
            dropout=model["dropout"],
            one_hot_input=model["use_one_hot_input"],
            integer_time=integer_time,
            sequence_length=data["shape"][0],
        )
    raise ValueError(f"model.name must contain ImageX0Pred or SequenceTransformer, got {model['name']!r}")


def _state(content, weights: str, path: str) -> dict[str, torch.Tensor]:
    """Parameters of the network by the authors' names, without prefixes, float32.

    The averaged ones are a list in the order of the model's parameters, which is that of the raw ones in the file.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f'weights must be "ema" or "raw", got {weights!r}')
    if not isinstance(content, dict):
        raise ValueError(f"{path!r} holds a {type(content).__name__}, not the checkpoint of a tauLDR network")
    entries = {**content, **content["model"]} if isinstance(content.get("model"), dict) else content
    raw = {name: value for name, value in entries.items() if str(name).startswith("net.") and torch.is_tensor(value)}
    if not raw:
        raise ValueError(f"{path!r} holds no parameters of a tauLDR network (net.*)")
    values = list(raw.values())
    if weights == "ema":
        if "ema_shadow_params" not in entries:
            raise ValueError(f"{path!r} holds no averaged weights; use weights='raw'")
        values = entries["ema_shadow_params"]
        tensors = isinstance(values, list) and all(map(torch.is_tensor, values))
        if not tensors or [v.shape for v in values] != [v.shape for v in raw.values()]:
            raise ValueError(f"{path!r}: the averaged weights do not match the raw ones in number or shape")
    names = [re.sub(r"^net\.(module\.)?", "", name) for name in raw]
    state = {name: value.float() for name, value in zip(names, values, strict=True)}
    check_size(state, path)
    check_finite(state, f"checkpoint {path!r}")
    return state


def _sequence_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of the sequence network by our names."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, ours in SEQUENCE:
            name = re.sub(pattern, ours, name)
        renamed[name] = tensor
    return renamed


def _unet_state(model: CTMCUNet, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters by our names: the authors number the layers of each way through in one list."""
    prefixes = {"temb_modules.0": "time_mlp.0", "temb_modules.1": "time_mlp.2", "input_conv": "conv_in"}
    prefixes |= {"output_modules.0": "norm_out", "output_modules.1": "conv_out"}
    for theirs, ours, stages in (("downsampling", "down", model.down), ("upsampling", "up", model.up)):
        places = [f"{ours}.{i}.{j}" for i, stage in enumerate(stages) for j in range(len(stage))]
        prefixes |= {f"{theirs}_modules.{number}": place for number, place in enumerate(places)}
    prefixes |= {f"middle_modules.{i}": f"middle.{i}" for i in range(len(model.middle))}
    renamed = {}
    for name, tensor in state.items():
        place, _, rest = next(
            (
                (ours, *name[len(theirs) :].partition(".")[1:])
                for theirs, ours in prefixes.items()
                if name.startswith(f"{theirs}.")
            ),
            (None, "", ""),
        )
        if place is None:
            raise ValueError(f"{name} belongs to no layer of the configured UNet")
        if "." in rest:
            layer, _, kind = rest.partition(".")
            rest = f"{LAYER.get(layer, layer)}.{ {'W': 'weight', 'b': 'bias'}.get(kind, kind) }"
            if kind == "W":
                tensor = tensor.T[:, :, None, None] if layer == "nin" else tensor.T
        renamed[f"{place}.{rest}"] = tensor.contiguous()
    return renamed
