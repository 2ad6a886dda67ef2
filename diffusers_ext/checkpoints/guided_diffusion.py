"""Checkpoints of guided-diffusion (Dhariwal & Nichol 2021, arXiv 2105.05233) as diffusers models and schedulers.

The flags are those of the original command lines. What the tensors' shapes determine is read off them; the rest comes
from a preset, from the caller, or is the original's default.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.utils import logging

from ..models.adm_unet import ADMUNet2DModel
from ..pipelines.call_arguments import checked_arguments
from ..pipelines.respacing import respaced_timesteps
from .tensor_files import check_names, checked_cast, read_tensors

logger = logging.get_logger(__name__)


def _bool(value) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in known:
        raise ValueError("must be True or False")
    return known[str(value).lower()]


def _numbers(value) -> tuple[float, ...]:
    """ "1,2,3", (1, 2, 3) or "" for none."""
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    return tuple(float(part) for part in value)


# Every flag of the original's image_sample.py and super_res_sample.py that concerns the network or the process, with
# how it is read.
FLAGS: dict[str, Callable] = {
    "image_size": int,
    "large_size": int,
    "small_size": int,
    "num_channels": int,
    "num_res_blocks": int,
    "channel_mult": _numbers,
    "attention_resolutions": _numbers,
    "num_heads": int,
    "num_head_channels": int,
    "num_heads_upsample": int,
    "use_new_attention_order": _bool,
    "resblock_updown": _bool,
    "conv_resample": _bool,
    "use_scale_shift_norm": _bool,
    "class_cond": _bool,
    "learn_sigma": _bool,
    "dropout": float,
    "use_fp16": _bool,
    "use_checkpoint": _bool,
    "diffusion_steps": int,
    "noise_schedule": str,
    "timestep_respacing": str,
    "predict_xstart": _bool,
    "rescale_timesteps": _bool,
    "use_kl": _bool,
    "rescale_learned_sigmas": _bool,
}
# The original's defaults of what the tensors do not show.
DEFAULTS = {
    "num_heads": 4,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_new_attention_order": False,
    "dropout": 0.0,
    "use_fp16": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "predict_xstart": False,
    "rescale_timesteps": False,
}
SIZE_OF_CHANNEL_MULT = {
    (1, 2, 3, 4): 64,
    (1, 1, 2, 3, 4): 128,
    (1, 1, 2, 2, 4, 4): 256,
    (0.5, 1, 1, 2, 2, 4, 4): 512,
}

_COMMON = {
    "attention_resolutions": "32,16,8",
    "learn_sigma": True,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "noise_schedule": "linear",
    "num_res_blocks": 2,
    "num_channels": 256,
    "num_head_channels": 64,
    "class_cond": True,
}
_LSUN = {**_COMMON, "image_size": 256, "class_cond": False, "dropout": 0.1}
_AT_64 = {**_COMMON, "image_size": 64, "num_channels": 192, "num_res_blocks": 3, "noise_schedule": "cosine"}
_AT_64 |= {"use_new_attention_order": True, "dropout": 0.1}
# The flags that were published with each checkpoint.
PRESETS: dict[str, dict] = {
    "celeba64": {**_AT_64, "class_cond": False},
    "imagenet64": _AT_64,
    "imagenet128": {**_COMMON, "image_size": 128, "num_heads": 4, "num_head_channels": -1},
    "imagenet256": {**_COMMON, "image_size": 256},
    "imagenet256_uncond": {**_COMMON, "image_size": 256, "class_cond": False},
    "imagenet512": {**_COMMON, "image_size": 512},
    "imagenet64_256_upsampler": {
        **_COMMON, "large_size": 256, "small_size": 64, "num_channels": 192, "num_heads": 4, "num_head_channels": -1,
    },
    "imagenet128_512_upsampler": {
        **_COMMON, "large_size": 512, "small_size": 128, "num_channels": 192, "attention_resolutions": "32,16",
    },
    "lsun_bedroom256": _LSUN,
    "lsun_cat256": _LSUN,
    "lsun_horse256": _LSUN,
}  # fmt: skip


@dataclass(frozen=True)
class ADMLayout:
    """What the tensors' names and shapes say about an ADM network.

    widths: channels of each level, from the finest. attention: whether each level has it. in_channels counts the
    low-resolution image of an upsampler. num_classes: None for an unconditional network. resampling: "resblock",
    "conv" or "pool".
    """

    in_channels: int
    out_channels: int
    num_channels: int
    widths: tuple[int, ...]
    attention: tuple[bool, ...]
    num_res_blocks: int
    resampling: str
    use_scale_shift_norm: bool
    num_classes: int | None

    @property
    def is_upsampler(self) -> bool:
        """Whether the network takes a small image beside the noisy one."""
        return self.in_channels == 6

    @property
    def channel_mult(self) -> tuple[float, ...]:
        """Channels of each resolution over those of the first."""
        return tuple(width / self.num_channels for width in self.widths)

    def first_input_block(self, level: int) -> int:
        """The number of the first input block of a resolution, which is counted from 0, the highest."""
        return 1 + level * (self.num_res_blocks + 1)


@checked_arguments
def load_guided_diffusion(path: str | Path, preset: str | None = None, **flags) -> UNet2DModel | ADMUNet2DModel:
    r"""The network of a guided-diffusion checkpoint, in evaluation mode.

    The network is called as `unet(sample, timestep, class_labels=)` with the original integer timestep; its output has
    twice as many channels as the image where the variance is learned. An upsampler's sample is the noisy image with
    the bilinearly enlarged low-resolution image after it, (batch, 6, height, width). It is a plain `UNet2DModel` where
    that suffices, an `ADMUNet2DModel` where not.

    Args:
        path: the `.pt` file, plain, of parameters, of views of flat tensors, zipped or in the old format. It is read
            as plain data; nothing in it is executed.
        preset: a name of `PRESETS`, the published checkpoints.
        **flags: names and values of the original command lines, see `FLAGS`; they take precedence over the preset.
            What the tensors determine may be left out. What they do not (`image_size`, `num_heads` or
            `num_head_channels`, `use_new_attention_order`, `noise_schedule`, ...) has the original's default, and a
            warning names it. `use_fp16` returns the network in float16.

    Raises:
        ValueError: for a file that is no such checkpoint or is cut off, an unknown preset or flag, and a flag that
            contradicts the tensors, with the tensor's name; and for weights that are not finite, in the file or in the
            dtype of the network.
    """
    _, _, settings, unet, _ = read_network(path, preset, flags)
    return checked_cast(unet, torch.float16) if settings["use_fp16"] else unet


@checked_arguments
def guided_diffusion_scheduler(path: str | Path, preset: str | None = None, **flags) -> DDPMScheduler:
    """The scheduler that belongs to a guided-diffusion checkpoint: its full process, with the original's betas.

    It is spaced like the original's respacing, which chooses timesteps and leaves the betas alone; the variance is
    learned where the network has the channels for it.

    Args:
        path: as of `load_guided_diffusion`.
        preset: as of `load_guided_diffusion`.
        **flags: as of `load_guided_diffusion`. `timestep_respacing` sets the timesteps; pipelines set them anew, so
            give it to them as `num_inference_steps`.

    Raises:
        ValueError: as `load_guided_diffusion`, whose weights are not looked at here.
    """
    given = _checked_flags(preset, flags)
    layout = read_layout(read_state_dict(path))
    return build_scheduler(layout, _settings(layout, given))


def read_network(
    path: str | Path, preset: str | None, flags: Mapping
) -> tuple[dict[str, torch.Tensor], ADMLayout, dict, UNet2DModel, DDPMScheduler]:
    """(tensors, layout, settings, network in float32, scheduler); see `load_guided_diffusion`."""
    given = _checked_flags(preset, flags)
    state = read_state_dict(path)
    layout = read_layout(state)
    settings = _settings(layout, given)
    return state, layout, settings, build_unet(state, layout, settings), build_scheduler(layout, settings)


def parse_flags(words: Sequence[str]) -> dict[str, str]:
    """`["--image_size", "64", "--class_cond=True"]` as names and texts.

    Raises:
        ValueError: for anything else.
    """
    flags, pending = {}, list(words)
    while pending:
        name, _, value = pending.pop(0).partition("=")
        if not name.startswith("--") or not (value or pending):
            raise ValueError(f"flags must be pairs as in --image_size 64, got {name!r} in {list(words)}")
        flags[name.removeprefix("--").replace("-", "_")] = value or pending.pop(0)
    return flags


def _checked_flags(preset: str | None, flags: Mapping) -> dict:
    """The preset's flags and the given ones, each as its type."""
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    merged = {**PRESETS.get(preset, {}), **flags}
    unknown = sorted(set(merged) - set(FLAGS))
    if unknown:
        raise ValueError(f"unknown flags {unknown}; guided-diffusion's are {sorted(FLAGS)}")
    values = {}
    for name, value in merged.items():
        try:
            values[name] = FLAGS[name](value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}={value!r} is not what this flag takes: {error}") from error
    return values


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    Raises:
        ValueError: for other files and cut-off ones.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {str(path)!r} is no file")
    state = read_tensors(path)
    check_names(state, path)
    return state


def _shape(state: Mapping[str, torch.Tensor], name: str, dims: int) -> torch.Size:
    if name not in state:
        raise ValueError(f"this is no guided-diffusion network: tensor {name} is missing")
    if state[name].ndim != dims:
        raise ValueError(f"this is no guided-diffusion network: tensor {name} has shape {tuple(state[name].shape)}")
    return state[name].shape


def read_layout(state: Mapping[str, torch.Tensor]) -> ADMLayout:
    """The architecture that the tensors show.

    Raises:
        ValueError: naming the tensor that does not fit.
    """
    num_channels = _shape(state, "time_embed.0.weight", 2)[1]
    conv_in, conv_out = _shape(state, "input_blocks.0.0.weight", 4), _shape(state, "out.2.weight", 4)
    if conv_in[1] not in (3, 6) or conv_out[0] not in (3, 6):
        raise ValueError(
            f"tensors input_blocks.0.0.weight and out.2.weight of shapes {tuple(conv_in)} and {tuple(conv_out)}: an"
            " ADM network reads 3 channels, or 6 as an upsampler, and gives 3, or 6 with a learned variance"
        )
    num_inputs, num_outputs = _count(state, "input_blocks"), _count(state, "output_blocks")
    resampling, levels = _resampling(state, num_inputs, num_outputs)
    if num_outputs % levels or num_inputs != num_outputs or num_outputs <= levels:
        raise ValueError(
            f"this is no guided-diffusion network: {num_inputs} input_blocks, {num_outputs} output_blocks, {levels}"
            " levels"
        )
    layers = num_outputs // levels
    first = [1 + level * layers for level in range(levels)]
    widths = [_shape(state, f"input_blocks.{n}.0.out_layers.3.weight", 4)[0] for n in first]
    projection = _shape(state, "input_blocks.1.0.emb_layers.1.weight", 2)[0]
    return ADMLayout(
        in_channels=conv_in[1],
        out_channels=conv_out[0],
        num_channels=num_channels,
        widths=tuple(widths),
        attention=tuple(f"input_blocks.{n}.1.qkv.weight" in state for n in first),
        num_res_blocks=layers - 1,
        resampling=resampling,
        use_scale_shift_norm=projection == 2 * widths[0],
        num_classes=_shape(state, "label_emb.weight", 2)[0] if "label_emb.weight" in state else None,
    )


def _count(state: Mapping[str, torch.Tensor], group: str) -> int:
    """One more than the largest index of a group of blocks."""
    found = [int(name.split(".")[1]) for name in state if re.match(rf"{group}\.\d+\.", name)]
    if not found:
        raise ValueError(f"this is no guided-diffusion image network: it has no {group}")
    return max(found) + 1


def _resampling(state: Mapping[str, torch.Tensor], num_inputs: int, num_outputs: int) -> tuple[str, int]:
    """How the resolution changes, and the number of levels.

    An output block that ends a level holds one more module: a residual block or a convolution. Pooling has no tensors:
    there the numbering of the input blocks has gaps.
    """

    def last_modules(suffix: str) -> int:
        names = (rf"output_blocks\.{n}\.[12]\.{re.escape(suffix)}" for n in range(num_outputs))
        return sum(any(re.fullmatch(name, key) for key in state) for name in names)

    present = {int(name.split(".")[1]) for name in state if name.startswith("input_blocks.")}
    counts = {
        "resblock": last_modules("in_layers.0.weight"),
        "conv": last_modules("conv.weight"),
        "pool": num_inputs - len(present),
    }
    kinds = [kind for kind, count in counts.items() if count]
    if len(kinds) > 1:
        raise ValueError(f"this is no guided-diffusion network: its resolution changes in several ways, {counts}")
    kind = kinds[0] if kinds else "conv"  # one level: nothing is resampled
    return kind, 1 + counts[kind]


def _settings(layout: ADMLayout, given: dict) -> dict:
    """All that the tensors do not show, after a check of what they do."""
    _check_against_tensors(layout, given)
    assumed = {name: value for name, value in DEFAULTS.items() if name not in given}
    settings = {**DEFAULTS, **given, "image_size": _image_size(layout, given)}
    if settings["num_head_channels"] != -1:
        assumed.pop("num_heads", None)
    visible = {name: assumed[name] for name in ("num_heads", "noise_schedule") if name in assumed}
    if not layout.is_upsampler and "use_new_attention_order" in assumed:
        visible["use_new_attention_order"] = False
    if not {"image_size", "large_size"} & set(given):
        visible["image_size"] = settings["image_size"]
    if visible:
        text = ", ".join(f"{name}={value!r}" for name, value in visible.items())
        logger.warning(f"not given and not to be seen in the tensors, so taken as in the original's defaults: {text}")
    _check_settings(layout, settings)
    return settings


def _image_size(layout: ADMLayout, given: dict) -> int:
    if {"image_size", "large_size"} <= set(given) and given["image_size"] != given["large_size"]:
        raise ValueError(f"image_size={given['image_size']} and large_size={given['large_size']}: give one of them")
    size = given.get("large_size", given.get("image_size"))
    return SIZE_OF_CHANNEL_MULT.get(layout.channel_mult, 64) if size is None else size


def _check_against_tensors(layout: ADMLayout, given: dict) -> None:
    level_ends = f"output_blocks.{layout.num_res_blocks}"
    seen = {
        "num_channels": (layout.num_channels, "time_embed.0.weight"),
        "num_res_blocks": (layout.num_res_blocks, level_ends),
        "use_scale_shift_norm": (layout.use_scale_shift_norm, "input_blocks.1.0.emb_layers.1.weight"),
        "class_cond": (layout.num_classes is not None, "label_emb.weight"),
        "learn_sigma": (layout.out_channels == 6, "out.2.weight"),
    }
    if len(layout.widths) > 1:
        seen["resblock_updown"] = (layout.resampling == "resblock", level_ends)
        if layout.resampling != "resblock":  # which has no plain resampling to put a convolution into
            seen["conv_resample"] = (layout.resampling == "conv", f"input_blocks.{layout.num_res_blocks + 1}")
    if given.get("channel_mult"):
        seen["channel_mult"] = (layout.channel_mult, "input_blocks.*.0.out_layers.3.weight")
    for name, (value, tensor) in seen.items():
        if name in given and given[name] != value:
            raise ValueError(f"{name}={given[name]} contradicts the checkpoint: tensor {tensor} says {value}")
    if layout.is_upsampler != ("large_size" in given) and {"image_size", "large_size"} & set(given):
        tensor = "tensor input_blocks.0.0.weight"
        raise ValueError(
            f"{tensor} reads 6 channels, so this is an upsampler: give large_size and small_size, not image_size"
            if layout.is_upsampler
            else f"large_size contradicts the checkpoint: {tensor} reads 3 channels, an upsampler's reads 6"
        )
    if "attention_resolutions" in given and {"image_size", "large_size"} & set(given):
        _check_attention(layout, given["attention_resolutions"], _image_size(layout, given))


def _check_attention(layout: ADMLayout, resolutions: tuple[float, ...], image_size: int) -> None:
    factors = {image_size // int(resolution) for resolution in resolutions}
    for level, present in enumerate(layout.attention):
        if (2**level in factors) != present:
            raise ValueError(
                f"attention_resolutions={[int(r) for r in resolutions]} at image_size={image_size} contradicts the"
                f" checkpoint: tensor input_blocks.{layout.first_input_block(level)}.1.qkv.weight is"
                f" {'there' if present else 'missing'}, so resolution {image_size // 2**level} has"
                f" {'' if present else 'no '}attention"
            )


def _check_settings(layout: ADMLayout, settings: dict) -> None:
    if settings["noise_schedule"] not in ("linear", "cosine"):
        raise ValueError(f'noise_schedule must be "linear" or "cosine", got {settings["noise_schedule"]!r}')
    if settings["rescale_timesteps"] and settings["diffusion_steps"] != 1000:
        raise ValueError(
            f"rescale_timesteps=True with diffusion_steps={settings['diffusion_steps']} gives the network fractional"
            " timesteps, which diffusers' schedulers do not have; only 1000 steps can be converted"
        )
    if layout.is_upsampler and settings["use_new_attention_order"]:
        raise ValueError("use_new_attention_order=True: upsamplers always have the old order; leave it out")
    if settings["num_heads_upsample"] not in (-1, settings["num_heads"]) and settings["num_head_channels"] == -1:
        raise ValueError(
            f"num_heads_upsample={settings['num_heads_upsample']} must be -1 or num_heads={settings['num_heads']}; no"
            " published checkpoint has another number of heads on the way up"
        )
    for width in _attention_widths(layout):
        divisor = settings["num_head_channels"] if settings["num_head_channels"] != -1 else settings["num_heads"]
        if divisor < 1 or width % divisor:
            name = "num_heads" if settings["num_head_channels"] == -1 else "num_head_channels"
            raise ValueError(
                f"{name}={divisor} contradicts the checkpoint: it does not divide the {width} channels of an attention"
                " layer, such as those of tensor middle_block.1.qkv.weight"
            )


def _attention_widths(layout: ADMLayout) -> list[int]:
    """Channels of each attention layer's level; the middle block always has one."""
    return [width for width, here in zip(layout.widths, layout.attention, strict=True) if here] + [layout.widths[-1]]


def build_scheduler(layout: ADMLayout, settings: dict) -> DDPMScheduler:
    """The original's process: betas, variance and clipping."""
    steps = settings["diffusion_steps"]
    scheduler = DDPMScheduler(
        num_train_timesteps=steps,
        beta_schedule="squaredcos_cap_v2" if settings["noise_schedule"] == "cosine" else "linear",
        beta_start=0.0001 * 1000 / steps,
        beta_end=0.02 * 1000 / steps,
        variance_type="learned_range" if layout.out_channels == 6 else "fixed_large",
        prediction_type="sample" if settings["predict_xstart"] else "epsilon",
        clip_sample=True,
        timestep_spacing="linspace",
    )
    if settings["timestep_respacing"]:
        scheduler.set_timesteps(timesteps=respaced_timesteps(settings["timestep_respacing"], steps))
    return scheduler


def build_unet(state: Mapping[str, torch.Tensor], layout: ADMLayout, settings: dict) -> UNet2DModel:
    """The network with the checkpoint's weights in float32, in eval mode."""
    cls, config = unet_config(layout, settings)
    tensors = _renamed(state, layout, _heads_of_legacy_order(settings))
    with torch.device("meta"):
        unet = cls(**config)
    expected = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    for name, (source, value) in tensors.items():
        if expected.get(name) != tuple(value.shape):
            raise ValueError(
                f"this is no guided-diffusion network: tensor {source} has shape {tuple(value.shape)}, expected"
                f" {expected.get(name)}"
            )
    unet.load_state_dict({name: value for name, (_, value) in tensors.items()}, strict=True, assign=True)
    return checked_cast(unet.eval(), torch.float32)  # float64 of the file may leave its range


def unet_config(layout: ADMLayout, settings: dict) -> tuple[type[UNet2DModel], dict]:
    """The class that suffices and its parameters."""
    resblock = layout.resampling == "resblock"
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resblock else ("DownBlock2D", "UpBlock2D")
    kinds = [("AttnDownBlock2D", "AttnUpBlock2D") if attention else plain for attention in layout.attention]
    widths = set(_attention_widths(layout))
    by_width = settings["num_head_channels"] != -1
    config = {
        "sample_size": settings["image_size"],
        "in_channels": layout.in_channels,
        "out_channels": layout.out_channels,
        "block_out_channels": layout.widths,
        "layers_per_block": layout.num_res_blocks,
        "down_block_types": tuple(down for down, _ in kinds),
        "up_block_types": tuple(up for _, up in reversed(kinds)),
        "downsample_type": "resnet" if resblock else "conv",
        "upsample_type": "resnet" if resblock else "conv",
        "dropout": settings["dropout"],
        "attention_head_dim": settings["num_head_channels"] if by_width else max(widths) // settings["num_heads"],
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if layout.use_scale_shift_norm else "default",
        "num_class_embeds": layout.num_classes,
        "num_train_timesteps": settings["diffusion_steps"],
    }
    own = {}
    if not by_width and len(widths) > 1:
        own["num_attention_heads"] = settings["num_heads"]
        config["attention_head_dim"] = 32  # every width is a multiple of the 32 groups; the heads are set afterwards
    if layout.widths[0] != layout.num_channels:
        own["timestep_dim"] = layout.num_channels
        config["time_embedding_dim"] = 4 * layout.num_channels
    if layout.resampling == "pool":
        own["conv_resample"] = False
    return (ADMUNet2DModel if own else UNet2DModel), {**config, **own}


def _heads_of_legacy_order(settings: dict) -> Callable[[int], int] | None:
    """The number of heads at a width, for the order that lays out each head's q, k, v together; None for the new."""
    if settings["use_new_attention_order"]:
        return None
    per_head = settings["num_head_channels"]
    return lambda width: settings["num_heads"] if per_head == -1 else width // per_head


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _modules(layout: ADMLayout):
    """(source, target, kind) of every module that has tensors; kind is "plain", "resnet" or "attention"."""
    yield from [
        ("time_embed.0", "time_embedding.linear_1", "plain"),
        ("time_embed.2", "time_embedding.linear_2", "plain"),
        ("label_emb", "class_embedding", "plain"),
        ("input_blocks.0.0", "conv_in", "plain"),
        ("middle_block.0", "mid_block.resnets.0", "resnet"),
        ("middle_block.1", "mid_block.attentions.0", "attention"),
        ("middle_block.2", "mid_block.resnets.1", "resnet"),
        ("out.0", "conv_norm_out", "plain"),
        ("out.2", "conv_out", "plain"),
    ]
    last = len(layout.widths) - 1
    for level, attention in enumerate(layout.attention):
        start, block = layout.first_input_block(level), f"down_blocks.{level}"
        for j in range(layout.num_res_blocks):
            yield f"input_blocks.{start + j}.0", f"{block}.resnets.{j}", "resnet"
            if attention:
                yield f"input_blocks.{start + j}.1", f"{block}.attentions.{j}", "attention"
        if level < last:
            end = f"input_blocks.{start + layout.num_res_blocks}.0"
            yield from _resampler(layout, end, f"{block}.downsamplers.0", "op")
    for level, attention in enumerate(reversed(layout.attention)):
        start, block = level * (layout.num_res_blocks + 1), f"up_blocks.{level}"
        for j in range(layout.num_res_blocks + 1):
            yield f"output_blocks.{start + j}.0", f"{block}.resnets.{j}", "resnet"
            if attention:
                yield f"output_blocks.{start + j}.1", f"{block}.attentions.{j}", "attention"
        if level < last:
            end = f"output_blocks.{start + layout.num_res_blocks}.{2 if attention else 1}"
            yield from _resampler(layout, end, f"{block}.upsamplers.0", "conv")


def _resampler(layout: ADMLayout, source: str, target: str, convolution: str):
    if layout.resampling == "resblock":
        yield source, target, "resnet"
    elif layout.resampling == "conv":
        yield f"{source}.{convolution}", f"{target}.conv", "plain"


def _renamed(
    state: Mapping[str, torch.Tensor], layout: ADMLayout, legacy_heads: Callable[[int], int] | None
) -> dict[str, tuple[str, torch.Tensor]]:
    """diffusers' name: (original name, tensor) for every tensor. Raises ValueError for missing ones and for others."""
    renamed, left = {}, dict(state)

    def move(source: str, target: str) -> None:
        for part in ("weight", "bias"):
            if (source, part) != ("label_emb", "bias"):
                name = f"{source}.{part}"
                if name not in left:
                    raise ValueError(f"this is no guided-diffusion network: tensor {name} is missing")
                renamed[f"{target}.{part}"] = (name, left.pop(name).float().clone())

    for source, target, kind in _modules(layout):
        if kind == "plain":
            if source != "label_emb" or layout.num_classes is not None:
                move(source, target)
        elif kind == "resnet":
            for old, new in _RESNET.items():
                if old != "skip_connection" or f"{source}.{old}.weight" in left:
                    move(f"{source}.{old}", f"{target}.{new}")
        else:
            move(f"{source}.norm", f"{target}.group_norm")
            move(f"{source}.qkv", f"{target}.to_qkv")
            move(f"{source}.proj_out", f"{target}.to_out.0")
            _split_attention(renamed, target, legacy_heads)
    if left:
        raise ValueError(f"this is no guided-diffusion network: tensor {min(left)} has no place in it")
    return renamed


def _split_attention(renamed: dict, target: str, legacy_heads: Callable[[int], int] | None) -> None:
    """Three linear layers out of one pointwise convolution; the old order holds q, k, v of one head after another."""
    for part in ("weight", "bias"):
        name, value = renamed.pop(f"{target}.to_qkv.{part}")
        width = value.shape[0] // 3
        heads = 1 if legacy_heads is None else legacy_heads(width)
        if value.shape[0] % (3 * heads):
            raise ValueError(f"tensor {name} of shape {tuple(value.shape)} does not hold q, k and v of {heads} heads")
        rows = value.flatten(1) if part == "weight" else value
        split = rows.view(heads, 3, width // heads, *rows.shape[1:]).transpose(0, 1)
        for letter, piece in zip("qkv", split, strict=True):
            renamed[f"{target}.to_{letter}.{part}"] = (name, piece.reshape(width, *rows.shape[1:]).clone())
    name, value = renamed[f"{target}.to_out.0.weight"]
    renamed[f"{target}.to_out.0.weight"] = (name, value.flatten(1))
