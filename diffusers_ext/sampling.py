"""Many images or sequences from one pipeline, each with a seed of its own, on any number of processes.

Sample i is drawn with a CPU generator seeded by seed + i, so it depends on nothing but that and, up to round-off, on
the batch that it is drawn in.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from rich.progress import Progress

from . import image_files, sequence_files
from .discrete_sampling import check_discrete, draws_sequences, given_tokens, is_discrete, to_integers
from .image_files import check_channels, file_names, write_images
from .pipelines.guidance_interval import GuidanceInterval, interval_bounds
from .processes import Processes, start_processes
from .provenance import describe_pipeline, drawing_versions
from .sequence_files import write_sequences
from .shards import Shards, check_folder, finish_folder, lock, open_folder

GIVEN_HERE = ("generator", "output_type", "return_dict", "class_labels", "prompt", "tokens", "given")
FORMATS = {"images": image_files.FORMATS, "sequences": sequence_files.FORMATS}


def sample_batches(
    pipe: DiffusionPipeline, count: int, labels: torch.Tensor | None, seed: int, batch_size: int, **call
) -> Iterator:
    """The `images`, or with output_type="tokens" the `tokens`, of one pipeline call after the other.

    Image i has the generator of seed + i and labels[i]; it does not depend on how many others are drawn, nor, up to
    round-off, on the batch. labels: (count,), for pipelines that take class_labels, or None for those that take
    batch_size. call: further arguments of the call.

    Raises ValueError for a count or batch size below 1, or labels of another number.
    """
    _check_sizes(count, batch_size)
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels must hold one label an image, {count}, got {len(labels)}")
    inputs = {} if labels is None else {"class_labels": labels.tolist()}
    for rows in _batches(count, batch_size):
        yield _draw(pipe, rows, seed, inputs, call)


def sample_images(
    pipe: DiffusionPipeline,
    labels: torch.Tensor,
    seed: int = 0,
    batch_size: int = 50,
    on_batch: Callable[[int], None] | None = None,
    **call,
) -> torch.Tensor:
    """Class-conditional images (count, channels, height, width) in [0, 1], float32 on the CPU; see sample_batches.

    labels: (count,). on_batch: called with the number of images of each finished batch.
    """
    images = []
    for batch in sample_batches(pipe, len(labels), labels, seed, batch_size, output_type="pt", **call):
        images.append(_as_tensor(batch).float().cpu())
        if on_batch is not None:
            on_batch(len(batch))
    return torch.cat(images)


def cycled_labels(pipe: DiffusionPipeline, count: int, labels: Sequence[int] | None = None) -> torch.Tensor | None:
    """count labels (count,), the given ones or every class of the model in turn; None for an unconditional model.

    The classes are those of the network without the pipeline's null class.

    Raises ValueError for labels given to a pipeline that takes none, and for an empty list.
    """
    if labels is None:
        labels = _classes(pipe)
        if labels is None:
            return None
    elif not _takes_labels(pipe):
        raise ValueError(f"class labels {labels}: {type(pipe).__name__} takes none; leave them out")
    if len(labels) == 0:
        raise ValueError("class labels must not be empty")
    return torch.as_tensor(labels)[torch.arange(count) % len(labels)]


def random_labels(pipe: DiffusionPipeline, count: int, seed: int) -> torch.Tensor:
    """count labels (count,), uniform over the model's classes; label i depends on seed + i alone.

    It comes from a hash, not from the generator of image i, so labels and noise are independent.

    Raises ValueError for a pipeline without classes.
    """
    classes = _classes(pipe)
    if classes is None:
        raise ValueError(f"random labels: {type(pipe).__name__} of this model has no classes; leave them out")
    return torch.tensor([classes[_hashed("class label", seed + i) % len(classes)] for i in range(count)])


def _hashed(purpose: str, seed: int) -> int:
    """63 bits that look random, another for each purpose and seed."""
    return int.from_bytes(sha256(f"{purpose} {seed}".encode()).digest()[:8], "big") >> 1


def _takes_labels(pipe: DiffusionPipeline) -> bool:
    return "class_labels" in inspect.signature(pipe.__call__).parameters


def _classes(pipe: DiffusionPipeline) -> list[int] | None:
    """The classes of the pipeline's unet or DiT transformer, without the null class; None for an unconditional one."""
    number = None
    if _takes_labels(pipe) and getattr(pipe, "unet", None) is not None:
        config = pipe.unet.config
        number = config.get("num_class_embeds") or config.get("label_dim") or None  # EDM2 has the latter, 0 for none
    elif _takes_labels(pipe) and getattr(pipe, "transformer", None) is not None:
        number = pipe.transformer.config.get("num_embeds_ada_norm")  # the null class comes after these
    if number is None:
        return None
    return [label for label in range(number) if label != pipe.config.get("null_class")]


@dataclass(frozen=True)
class Sampled:
    """What `sample_to_folder` did.

    result: the file, or the folder of PNG or txt files. count: samples in it. drawn: how many of them this start
    drew, in all of its processes. was_finished: whether an earlier start had already done everything. kind: "images"
    or "sequences".
    """

    result: Path
    count: int
    drawn: int
    was_finished: bool
    kind: str = "images"


def sample_to_folder(
    pipe: DiffusionPipeline,
    folder: str | Path,
    count: int,
    labels: Sequence[int] | torch.Tensor | str | None = None,
    prompts: Sequence[str] | None = None,
    images: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
    given: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 32,
    format: str | None = None,
    cpu_threads: int = 1,
    accelerator: Accelerator | None = None,
    **call,
) -> Sampled:
    """Draw samples 0 to count - 1 into a folder; started again after an interruption, go on with the same call.

    The work is cut into batches of consecutive samples; of n processes, process p draws the batches b with b % n == p.
    Each finished batch is kept at once, with its hash, and at the end all become files (see `write_images` and
    `write_sequences`). Sample i has the generator of seed + i: the files have the same bytes for any number of
    processes and interruptions, and images are within one grey level for any batch size; a sequence may then leave
    its path at a token that round-off decides. manifest.json says what was drawn, with which versions, and the label
    of each image.

    Global random numbers, which pipelines draw that do not pass their generator on, are seeded by the batch. For those
    pipelines (stock `DiTPipeline` with a stochastic scheduler) all of this holds but for other batch sizes.

    pipe: unconditional (takes batch_size), class-conditional (takes class_labels), text-to-image (takes prompt) or
        image-to-image, such as an upsampler (takes image); or a `DiscreteDiffusionPipeline`.
    labels: gone through in turn; None for every class in turn, "random" for `random_labels`.
    prompts: gone through in turn.
    images: the input image of each, uint8 (count, height, width, channels).
    tokens, given: of a discrete pipeline, tokens of each, integers (count, length), and where they are kept, boolean
        (count, length) or (length,).
    format: "png", "zip" or "npz" for images; "txt", "jsonl" or "npz" for sequences. None is "png"; for sequences "txt"
        with a tokenizer, "npz" without.
    cpu_threads: torch threads of each process while it draws on a CPU, where round-off depends on their number; more
        processes are the better use of many cores.
    accelerator: of a program that has one. By default what a launcher started, or this process alone.
    call: further arguments of the pipeline's call, JSON-able. guidance_interval=(sigma_lo, sigma_hi) is for every
        pipeline that guides: where its call does not take it, a `GuidanceInterval` is applied.

    Every process calls this function, with the same arguments, and returns when the result is complete.

    Raises ValueError before anything is drawn for arguments that the pipeline does not take or that are missing, for a
    folder of other content, of other settings or versions (named, with both values), and one in use by another start;
    and while drawing for images that are not finite. OSError for a full disk; no finished batch is lost.
    """
    _check_sizes(count, batch_size)
    inputs = given_tokens(tokens, given, count)
    if not inputs:
        inputs = _inputs(pipe, count, labels, prompts, images, seed)
    elif any(value is not None for value in (labels, prompts, images)):
        raise ValueError("tokens exclude labels, prompts and images; give one of them")
    limited, its_call = _limited(pipe, call)
    _check_call(pipe, inputs, its_call)
    kind = "sequences" if draws_sequences(pipe) else "images"
    format = _format(pipe, kind, format)
    device = pipe._execution_device.type
    processes = Processes(accelerator or start_processes(device))
    threads = cpu_threads if device == "cpu" else None
    settings = {
        "count": count,
        "seed": seed,
        "batch_size": batch_size,
        "class_labels": labels if labels is None or isinstance(labels, str) else torch.as_tensor(labels).tolist(),
        "prompts": None if prompts is None else list(prompts),
        "images": None if images is None else sha256(np.ascontiguousarray(images)).hexdigest(),
        **{name: sha256(inputs[name]).hexdigest() for name in ("tokens", "given") if name in inputs},
        "format": format,
        "call": call,
        "cpu_threads": threads,
        **describe_pipeline(pipe),
    }
    plan = {"settings": settings, "versions": drawing_versions(), "labels": inputs.get("class_labels")}
    with ExitStack() as held:
        folder, manifest = processes.agreed(lambda: _opened(held, folder, plan))
        if manifest["result"] is not None:
            return Sampled(folder / manifest["result"], count, drawn=0, was_finished=True, kind=kind)
        with limited, _cpu_threads(threads):
            drawn = _draw_shards(pipe, folder, count, batch_size, seed, inputs, its_call, format, processes)
        result = processes.agreed(lambda: _assembled(pipe, folder, manifest))
    return Sampled(folder / result, count, drawn, was_finished=False, kind=kind)


def _format(pipe: DiffusionPipeline, kind: str, format: str | None) -> str:
    """The format, or the one that goes without saying."""
    has_tokenizer = getattr(pipe, "tokenizer", None) is not None
    if format is None:
        return "png" if kind == "images" else "txt" if has_tokenizer else "npz"
    if format not in FORMATS[kind]:
        raise ValueError(f"format must be one of {FORMATS[kind]} for {kind}, got {format!r}")
    if format in ("txt", "jsonl") and not has_tokenizer:
        raise ValueError(f"format {format!r} needs a tokenizer, which this pipeline has not; use npz")
    return format


def _limited(pipe: DiffusionPipeline, call: dict) -> tuple[AbstractContextManager, dict]:
    """What to draw in, and the arguments of the call; an interval that the call does not take is applied."""
    interval = call.get("guidance_interval")
    if interval is None:
        return nullcontext(), call
    sigma_lo, sigma_hi = interval_bounds(interval)
    if "guidance_interval" in inspect.signature(pipe.__call__).parameters:
        return nullcontext(), call
    others = {name: value for name, value in call.items() if name != "guidance_interval"}
    return GuidanceInterval(pipe, sigma_lo=sigma_lo, sigma_hi=sigma_hi), others


def _inputs(pipe, count: int, labels, prompts, images, seed: int) -> dict[str, list | np.ndarray]:
    """The arguments of the call that have one value an image."""
    if images is not None:
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != count:
            raise ValueError(
                f"images must be uint8 ({count}, height, width, channels), got {images.dtype} {images.shape}"
            )
        return {"image": images, **_inputs(pipe, count, labels, prompts, None, seed)}
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


def _check_sizes(count: int, batch_size: int) -> None:
    if count < 1 or batch_size < 1:
        raise ValueError(f"count and batch_size must be >= 1, got {count} and {batch_size}")


def _check_call(pipe: DiffusionPipeline, inputs: dict, call: dict) -> None:
    """Raises ValueError where the pipeline's call does not take what it would get, or needs more."""
    name, known = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    reserved = sorted(set(call) & set(GIVEN_HERE))
    if reserved:
        raise ValueError(f"{', '.join(reserved)}: set by the sampling itself; leave it out")
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
        raise ValueError(
            f"{name} does not take {', '.join(unknown)}; leave it out or choose another pipeline"
            " (--pipeline boost-and-skip for gamma and skip_steps)"
        )
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


def _opened(held: ExitStack, folder: str | Path, plan: dict) -> tuple[Path, dict]:
    """Lock the folder until the stack unwinds; begin or go on in it."""
    folder = check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(lock(folder))
    manifest = open_folder(folder, plan)
    if manifest["result"] is not None:
        _check_result(folder, manifest)
    return folder, manifest


def _check_result(folder: Path, manifest: dict) -> None:
    """Raises ValueError where files of a finished folder are gone."""
    settings = manifest["settings"]
    names = [manifest["result"]] if manifest["result"] != "." else file_names(settings["count"], settings["format"])
    missing = sorted(set(names) - {path.name for path in folder.iterdir()})
    if missing:
        raise ValueError(
            f"output folder {str(folder)!r} was finished, but {len(missing)} of its files are gone, such as"
            f" {missing[0]}; remove it to draw them anew, or choose another one"
        )


def _draw_shards(pipe, folder: Path, count, batch_size, seed, inputs, call, format, processes: Processes) -> int:
    """Draw the batches of this process that are not there yet; returns how many samples all processes drew."""
    pipe.set_progress_bar_config(disable=True)
    call = {**call, "output_type": "tokens" if draws_sequences(pipe) else "pt"}
    shards, drawn = Shards(folder), 0
    with Progress(disable=not processes.is_main) as progress:
        task = progress.add_task("sampling", total=count)
        for number, rows in enumerate(_batches(count, batch_size)):
            if number % processes.count != processes.index:
                continue
            if not shards.holds(number):
                shards.write(number, _to_array(pipe, _draw(pipe, rows, seed, inputs, call), rows, format))
                drawn += len(rows)
            progress.update(task, completed=min(count, len(shards) * batch_size))
        drawn = processes.total(drawn)
        progress.update(task, completed=count)
    return drawn


def _assembled(pipe: DiffusionPipeline, folder: Path, manifest: dict) -> str:
    """Turn the finished batches into the result; returns its name in the folder."""
    settings, shards = manifest["settings"], Shards(folder)
    numbers = range(len(_batches(settings["count"], settings["batch_size"])))
    batches = (shards.read(number) for number in numbers)
    count, format = settings["count"], settings["format"]
    if draws_sequences(pipe):
        result = write_sequences(batches, count, folder, format, pipe.tokenizer)
    else:
        result = write_images(batches, count, manifest["labels"], folder, format)
    finish_folder(folder, manifest, result)
    return result


def _batches(count: int, batch_size: int) -> list[range]:
    """The samples of each batch."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def _draw(pipe: DiffusionPipeline, rows: range, seed: int, inputs: dict, call: dict):
    """The images or tokens of one call; global random numbers are seeded by the batch and left as they were."""
    generators = [torch.Generator().manual_seed(seed + i) for i in rows]
    given = {name: values[rows.start : rows.stop] for name, values in inputs.items()} or {"batch_size": len(rows)}
    device = pipe._execution_device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_hashed("batch", seed + rows.start))  # not the seed of an image, whose noise it would repeat
        try:
            output = pipe(generator=generators, **given, **call)
            return output.tokens if call.get("output_type") == "tokens" else output.images
        except TypeError as error:
            steps = call.get("num_inference_steps")
            if isinstance(steps, str):
                raise ValueError(
                    f"{type(pipe).__name__} failed with num_inference_steps={steps!r} ({error}); give it a number"
                ) from error
            raise


def _to_array(pipe: DiffusionPipeline, batch, rows: range, format: str) -> np.ndarray:
    """What is kept of a batch. A format that cannot hold it is refused at the first one, not when all are drawn."""
    if draws_sequences(pipe):
        return to_integers(batch, rows, pipe.scheduler.config.vocab_size)
    images = to_uint8(batch, rows)
    check_channels(images.shape[-1], format)
    return images


def _as_tensor(images):
    """Images as channels-first tensors where they are arrays, which diffusers 0.37 gives for "pt" too."""
    return torch.from_numpy(images).permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else images


def to_uint8(images: torch.Tensor | np.ndarray, rows: range) -> np.ndarray:
    """Images in [0, 1] as uint8 (batch, height, width, channels).

    images: a tensor (batch, channels, height, width) or an array (batch, height, width, channels).

    Raises ValueError for another number of images than rows, and for values that are not finite.
    """
    images = _as_tensor(images)
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or len(images) != len(rows):
        got = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"the pipeline must give {len(rows)} images (batch, channels, height, width), got {got}")
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = rows[int((~finite).nonzero()[0])]
        raise ValueError(f"image {bad} is not finite; use another dtype, bfloat16 or float32, or a smaller gamma")
    return (images.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().contiguous().numpy()


@contextmanager
def _cpu_threads(number: int | None) -> Iterator[None]:
    """Compute with a number of torch threads, or as many as ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
