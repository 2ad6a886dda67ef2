"""Many images or sequences from one pipeline, each with a seed of its own, on any number of processes.

Sample i is drawn with a CPU generator seeded by seed + i, so it depends on nothing but that and, up to round-off, on
the batch that it is drawn in.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from rich.progress import Progress

from ..pipelines.guidance_interval import GuidanceInterval, interval_bounds
from ..runs.files import changed_files, check_folder, hash_files, remove_leftovers, sync_folder
from ..runs.kept import Kept
from ..runs.lock import lock
from ..runs.processes import Processes, start_processes
from ..runs.provenance import describe_pipeline, drawing_versions, hash_of
from ..runs.shards import Shards
from . import image_files, sequence_files
from .arguments import check_discrete, draws_sequences, given_tokens, is_discrete, to_integers
from .image_files import check_channels, file_names, write_images
from .sequence_files import write_sequences

MANIFEST, SHARDS = "manifest.json", "shards"

GIVEN_HERE = ("generator", "output_type", "return_dict", "class_labels", "prompt", "tokens", "given")
FORMATS = {"images": image_files.FORMATS, "sequences": sequence_files.FORMATS}


def sample_batches(
    pipe: DiffusionPipeline,
    count: int,
    labels: torch.Tensor | None,
    seed: int,
    batch_size: int,
    prompts: Sequence[str] | None = None,
    **call,
) -> Iterator:
    """The `images`, or with output_type="tokens" the `tokens`, of one pipeline call after the other.

    Image i has the generator of seed + i and labels[i]; it does not depend on how many others are drawn, nor, up to
    round-off, on the batch. labels: (count,), for pipelines that take class_labels; prompts: count of them, for those
    that take prompt; None of both for those that take batch_size. call: further arguments of the call.

    Raises ValueError for a count or batch size below 1, or labels or prompts of another number.
    """
    _check_sizes(count, batch_size)
    inputs = {} if labels is None else {"class_labels": labels.tolist()}
    inputs |= {} if prompts is None else {"prompt": list(prompts)}
    for name, values in inputs.items():
        if len(values) != count:
            raise ValueError(f"{name} must hold one a sample, {count}, got {len(values)}")
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

    Raises ValueError for labels given to a pipeline that takes none, for those that it has not, and for an empty list.
    """
    if labels is None:
        labels = _classes(pipe)
        if labels is None:
            return None
    elif not _takes_labels(pipe):
        raise ValueError(f"class labels {labels}: {type(pipe).__name__} takes none; leave them out")
    if len(labels) == 0:
        raise ValueError("class labels must not be empty")
    labels, number = torch.as_tensor(labels), _number_of_classes(pipe)
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(f"class labels must be integers, one after the other, got {labels.tolist()}")
    if number is not None and not 0 <= labels.min() <= labels.max() < number:
        wrong = labels[(labels < 0) | (labels >= number)].unique().tolist()
        raise ValueError(f"class labels must be in [0, {number - 1}], the classes of this model, got {wrong}")
    return labels[torch.arange(count) % len(labels)]


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


def _number_of_classes(pipe: DiffusionPipeline) -> int | None:
    """Of the pipeline's unet or DiT transformer, the null class among them; None where nothing says."""
    if _takes_labels(pipe) and getattr(pipe, "unet", None) is not None:
        config = pipe.unet.config
        return config.get("num_class_embeds") or config.get("label_dim") or None  # EDM2 has the latter, 0 for none
    if _takes_labels(pipe) and getattr(pipe, "transformer", None) is not None:
        return pipe.transformer.config.get("num_embeds_ada_norm")  # the null class comes after these
    return None


def _classes(pipe: DiffusionPipeline) -> list[int] | None:
    """The classes of the pipeline's network, without the null class; None for an unconditional one."""
    number = _number_of_classes(pipe)
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
    pipe.set_progress_bar_config(disable=True)
    device = pipe._execution_device.type
    processes = Processes(accelerator or start_processes(device))
    threads = cpu_threads if device == "cpu" else None
    settings = {
        "count": count,
        "seed": seed,
        "batch_size": batch_size,
        "class_labels": labels if labels is None or isinstance(labels, str) else torch.as_tensor(labels).tolist(),
        "prompts": None if prompts is None else list(prompts),
        "images": None if images is None else hash_of(images),
        **{name: hash_of(inputs[name]) for name in ("tokens", "given") if name in inputs},
        "format": format,
        "call": call,
        "cpu_threads": threads,
        **describe_pipeline(pipe),
    }
    folder, labels = check_folder(folder, MANIFEST), inputs.get("class_labels")
    with _made(folder, processes), lock(folder, processes):
        run = _Run(
            folder,
            Kept(folder / MANIFEST, settings, lambda manifest: "result" in manifest, drawing_versions()),
            labels,
        )
        finished = processes.agreed(run.open)
        if finished is not None:
            return Sampled(folder / finished, count, drawn=0, was_finished=True, kind=kind)
        with limited, _cpu_threads(threads):
            drawn = run.draw(lambda rows: _shard(pipe, rows, seed, inputs, its_call, format), processes)
        result = processes.agreed(lambda: run.finish(pipe))
    return Sampled(folder / result, count, drawn, was_finished=False, kind=kind)


@contextmanager
def _made(folder: Path, processes: Processes) -> Iterator[None]:
    """A folder that exists, and goes again where nothing has come into it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if processes.is_main:
            with suppress(OSError):
                folder.rmdir()


class _Run:
    """The folder of a sampling. kept: its manifest. labels: the class of each image, or None."""

    def __init__(self, folder: Path, kept: Kept, labels: list[int] | None):
        self.folder, self.kept, self.labels = folder, kept, labels
        self.shards, self.settings = Shards(folder / SHARDS), kept.begun_with["settings"]
        self.batches = _batches(self.settings["count"], self.settings["batch_size"])

    def open(self) -> str | None:
        """Begin or go on: the name of the result where that is finished. What has no finished batch is begun anew.

        Raises ValueError for other settings or versions, and for a result that is not as it was written."""
        manifest = self.kept.read()
        begun = manifest is not None and (manifest["result"] is not None or len(self.shards) > 0)
        if begun:
            self.kept.check(manifest)
            if manifest["result"] is not None:
                self._check_result(manifest)
                self.shards.clear()
                return manifest["result"]
        remove_leftovers(self.folder)
        remove_leftovers(self.shards.folder)
        return None

    def _check_result(self, manifest: dict) -> None:
        """Raises ValueError where files of a finished folder are gone or have changed."""
        if "files" in manifest:
            changed = changed_files(self.folder, manifest["files"])
        else:  # of earlier versions, which noted no hashes
            changed = [name for name in self._names(manifest["result"]) if not (self.folder / name).is_file()]
        if changed:
            how = "damaged" if (self.folder / changed[0]).exists() else "gone"
            raise ValueError(
                f"output folder {str(self.folder)!r} was finished, but {len(changed)} of its files are {how}, such as"
                f" {changed[0]}; remove it to draw them anew, or choose another one"
            )

    def _names(self, result: str) -> list[str]:
        return [result] if result != "." else file_names(self.settings["count"], self.settings["format"])

    def draw(self, shard: Callable[[range], np.ndarray], processes: Processes) -> int:
        """Draw the batches of this process that are not there yet; returns how many samples all processes drew.

        The settings are kept once each process has drawn a batch with them.
        """
        mine = range(processes.index, len(self.batches), processes.count)
        missing = [number for number in mine if not self.shards.holds(number)]
        first = {number: shard(self.batches[number]) for number in missing[:1]}
        processes.agreed(lambda: self.kept.save(labels=self.labels, result=None))
        drawn, count = 0, self.settings["count"]
        with Progress(disable=not processes.is_main) as progress:
            task = progress.add_task("sampling", total=count)
            for number in missing:
                rows = self.batches[number]
                self.shards.write(number, first.pop(number) if number in first else shard(rows))
                drawn += len(rows)
                progress.update(task, completed=min(count, len(self.shards) * self.settings["batch_size"]))
            drawn = processes.total(drawn)
            progress.update(task, completed=count)
        return drawn

    def finish(self, pipe: DiffusionPipeline) -> str:
        """Turn the batches into the result, and note that with its hashes before the batches go; returns its name."""
        batches = (self.shards.read(number) for number in range(len(self.batches)))
        count, format = self.settings["count"], self.settings["format"]
        if draws_sequences(pipe):
            result = write_sequences(batches, count, self.folder, format, pipe.tokenizer)
        else:
            result = write_images(batches, count, self.labels, self.folder, format)
        sync_folder(self.folder)
        self.kept.save(labels=self.labels, result=result, files=hash_files(self.folder, self._names(result)))
        self.shards.clear()
        return result


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


def _shard(pipe: DiffusionPipeline, rows: range, seed: int, inputs: dict, call: dict, format: str) -> np.ndarray:
    """What is kept of a batch. A format that cannot hold it is refused at the first one, not when all are drawn."""
    if draws_sequences(pipe):
        tokens = _draw(pipe, rows, seed, inputs, {**call, "output_type": "tokens"})
        return to_integers(tokens, rows, pipe.scheduler.config.vocab_size)
    images = to_uint8(_draw(pipe, rows, seed, inputs, {**call, "output_type": "pt"}), rows)
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
