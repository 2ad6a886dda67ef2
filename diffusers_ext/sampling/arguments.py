"""What a pipeline's call takes and gets in bulk sampling; what cannot be is refused before anything is drawn."""

import inspect
import json
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ..pipelines.discrete_diffusion import check_start
from . import image_files, sequence_files
from .draw import is_discrete
from .labels import cycled_labels, random_labels

GIVEN_HERE = ("generator", "output_type", "return_dict", "class_labels", "prompt", "tokens", "given")
FORMATS = {"images": image_files.FORMATS, "sequences": sequence_files.FORMATS}


def inputs_of(
    pipe: DiffusionPipeline,
    count: int,
    labels: Sequence[int | None] | torch.Tensor | str | None,
    prompts: Sequence[str] | None,
    images: np.ndarray | None,
    seed: int,
) -> dict[str, list | np.ndarray]:
    """The arguments of the call that have one value an image: images uint8 (count, height, width, channels), prompts,
    labels.

    Raises:
        ValueError: for images of another number or kind, labels and prompts at once, and as `cycled_labels`.
    """
    if images is not None:
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != count:
            raise ValueError(
                f"images must be uint8 ({count}, height, width, channels), got {images.dtype} {images.shape}"
            )
        return {"image": images, **inputs_of(pipe, count, labels, prompts, None, seed)}
    if prompts is not None:
        if labels is not None:
            raise ValueError("give labels or prompts, not both")
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"prompts must be a non-empty list of texts, got {prompts!r}")
        return {"prompt": [prompts[i % len(prompts)] for i in range(count)]}
    if isinstance(labels, str):
        if labels != "random":
            raise ValueError(f'labels must be integers, None or "random", got {labels!r}')
        chosen = random_labels(pipe, count, seed)
    else:
        chosen = cycled_labels(pipe, count, labels)
    return {} if chosen is None else {"class_labels": chosen.tolist()}


def weight_of(pipe: DiffusionPipeline) -> str | None:
    """The argument of a pipeline's call that weighs its two predictions; None where it has none.

    Beside true_cfg_scale (Flux, Qwen-Image), guidance_scale is an input of the network.
    """
    taken = inspect.signature(pipe.__call__).parameters
    return next((name for name in ("true_cfg_scale", "guidance_scale") if name in taken), None)


def negative_prompts(count: int, inputs: dict, call: dict) -> tuple[dict, dict]:
    """The arguments with a negative prompt for each image, and the call without it.

    Where a prompt and true_cfg_scale > 1 are given and no negative prompt, it is an empty one: pipelines with that
    argument (Flux, Qwen-Image) make no second prediction without.

    Raises:
        ValueError: for a negative prompt that is no text.
    """
    negative, scale = call.get("negative_prompt"), call.get("true_cfg_scale")
    if negative is None and "prompt" in inputs and isinstance(scale, int | float) and scale > 1:
        negative = ""
    if negative is None:
        return inputs, call
    if not isinstance(negative, str):
        raise ValueError(f"negative_prompt must be one text, of all images, got {negative!r}")
    rest = {name: value for name, value in call.items() if name != "negative_prompt"}
    return {**inputs, "negative_prompt": [negative] * count}, rest


def given_tokens(tokens: np.ndarray | None, given: np.ndarray | None, count: int) -> dict[str, np.ndarray]:
    """Tokens of each sample, int64, and where they are kept, bool, (count, length) both; {} where none are given.

    Raises:
        ValueError: for other shapes than (count, length), of `given` also (length,), and for one without the other.
    """
    if tokens is None and given is None:
        return {}
    shapes = [None if value is None else np.shape(value) for value in (tokens, given)]
    if None in shapes or len(shapes[0]) != 2 or shapes[0][0] != count or shapes[1] not in (shapes[0], shapes[0][1:]):
        raise ValueError(f"tokens must be ({count}, length), and given of that shape or (length,), got {shapes}")
    whole = {"tokens": (tokens, np.int64), "given": (np.broadcast_to(given, shapes[0]), None)}
    return {name: np.array(value, dtype=dtype, order="C") for name, (value, dtype) in whole.items()}


def check_call(pipe: DiffusionPipeline, inputs: dict, call: dict) -> None:
    """Check the arguments of a pipeline's call before it is made.

    Args:
        pipe: the pipeline.
        inputs: arguments with one value a sample, by name.
        call: further arguments.

    Raises:
        ValueError: where the pipeline's call does not take what it would get, or needs more.
    """
    name, known = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    reserved = sorted(set(call) & set(GIVEN_HERE))
    if reserved:
        raise ValueError(f"{', '.join(reserved)}: set by the sampling itself; leave it out")
    if "images" in known and getattr(pipe, "base", None) is None:
        raise ValueError(
            f"{name} repairs images and has no base pipeline to draw them; in Python give it images, pipe(images=...),"
            " or put a pipeline into it as its base"
        )
    if not inputs and "prompt" in known and "batch_size" not in known:
        raise ValueError(f"{name} needs a prompt; give prompts (--prompt or --prompts)")
    if not inputs and "batch_size" not in known:
        raise ValueError(
            f"{name} cannot be asked for a number of images alone; it samples from class labels, prompts or nothing"
            " but noise"
        )
    given = {*inputs, *call, "generator", "output_type"}
    unknown = sorted(given - set(known))
    if unknown:
        raise ValueError(f"{name} does not take {', '.join(unknown)}; leave it out or choose another pipeline")
    named = {key: value for key, value in known.items() if value.kind is not value.VAR_KEYWORD}
    missing = sorted(key for key, value in named.items() if value.default is value.empty and key not in given)
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}, which cannot be given here; call the pipeline itself")
    try:
        json.dumps(call)
    except TypeError as error:
        raise ValueError(f"arguments of the call must be JSON-able to be kept in the manifest: {error}") from error
    if is_discrete(pipe):
        check_discrete(pipe, inputs, call)


def check_discrete(pipe: DiffusionPipeline, inputs: dict[str, Sequence], call: dict) -> None:
    """Check the arguments of a discrete pipeline's call before it is made.

    Args:
        pipe: the pipeline.
        inputs: arguments with one value a sample, by name.
        call: further arguments.

    Raises:
        ValueError: for texts without a tokenizer, and for a sampler or a schedule that the scheduler refuses.
    """
    if ("prompt" in inputs or "suffix" in call) and pipe.tokenizer is None:
        raise ValueError("prompts and suffix need a tokenizer, which this pipeline has not; give tokens instead")
    changes = {"sampler": call["sampler"]} if call.get("sampler") else {}
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    if call.get("timesteps") is not None:
        scheduler.set_timesteps(timesteps=call["timesteps"])
        check_start(scheduler)
    elif "num_inference_steps" in call:
        scheduler.set_timesteps(call["num_inference_steps"])


def format_of(pipe: DiffusionPipeline, kind: str, format: str | None) -> str:
    """The format, or the one that goes without saying.

    Raises:
        ValueError: for one that the samples cannot have.
    """
    has_tokenizer = getattr(pipe, "tokenizer", None) is not None
    if format is None:
        return "png" if kind == "images" else "txt" if has_tokenizer else "npz"
    if format not in FORMATS[kind]:
        raise ValueError(f"format must be one of {FORMATS[kind]} for {kind}, got {format!r}")
    if format in ("txt", "jsonl") and not has_tokenizer:
        raise ValueError(f"format {format!r} needs a tokenizer, which this pipeline has not; use npz")
    return format
