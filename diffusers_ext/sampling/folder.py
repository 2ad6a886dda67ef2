"""Many images or sequences from one pipeline in a folder, drawn by any number of processes, over several starts.

manifest.json                what is drawn; at the end the name of the result and the hash of each of its files
lock.json                    held while somebody works here
shards/000012.<sha256>.npy   a finished batch, until the result is there
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from rich.progress import Progress

from ..pipelines.call_arguments import checked_arguments
from ..runs.files import changed_files, check_folder, hash_files, remove_leftovers, sync_folder
from ..runs.kept import Kept
from ..runs.lock import lock
from ..runs.processes import Processes, start_processes
from ..runs.provenance import describe_pipeline, drawing_versions, hash_of
from ..runs.shards import Shards
from .arguments import check_call, format_of, given_tokens, inputs_of, negative_prompts
from .draw import batches_of, check_sizes, draw, draws_sequences, to_integers, to_uint8
from .image_files import check_channels, file_names, write_images
from .methods import applied
from .sequence_files import write_sequences

MANIFEST, SHARDS = "manifest.json", "shards"


@dataclass(frozen=True)
class Sampled:
    """What `sample_to_folder` did.

    Attributes:
        result: the file, or the folder of PNG or txt files.
        count: samples in it.
        drawn: how many of them this start drew, in all of its processes.
        was_finished: whether an earlier start had already done everything.
        kind: "images" or "sequences".
    """

    result: Path
    count: int
    drawn: int
    was_finished: bool
    kind: str = "images"


@checked_arguments(but="prompts")
def sample_to_folder(
    pipe: DiffusionPipeline,
    folder: str | Path,
    count: int,
    labels: Sequence[int | None] | torch.Tensor | str | None = None,
    prompts: Sequence[str] | None = None,
    images: np.ndarray | torch.Tensor | None = None,
    tokens: np.ndarray | torch.Tensor | None = None,
    given: np.ndarray | torch.Tensor | None = None,
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
    of each image. Every process calls this function, with the same arguments, and returns when the result is complete.

    Global random numbers, which pipelines draw that do not pass their generator on, are seeded by the batch. For those
    pipelines (stock `DiTPipeline` with a stochastic scheduler) all of this holds but for other batch sizes.

    Args:
        pipe: unconditional (takes batch_size), class-conditional (takes class_labels), text-to-image (takes prompt) or
            image-to-image, such as an upsampler (takes image); or a `DiscreteDiffusionPipeline`.
        folder: new, empty or begun by the same call.
        count: number of samples.
        labels: gone through in turn, None among them for the null class; None for every class in turn, "random" for
            `random_labels`.
        prompts: gone through in turn.
        images: the input image of each, uint8 (count, height, width, channels).
        tokens: of a discrete pipeline, tokens of each, integers (count, length).
        given: where `tokens` are kept, boolean (count, length) or (length,).
        seed: sample i is drawn with seed + i.
        batch_size: samples that are drawn together.
        format: "png", "zip" or "npz" for images; "txt", "jsonl" or "npz" for sequences. None is "png"; for sequences
            "txt" with a tokenizer, "npz" without.
        cpu_threads: torch threads of each process while it draws on a CPU, where round-off depends on their number;
            more processes are the better use of many cores.
        accelerator: of a program that has one. By default what a launcher started, or this process alone.
        **call: further arguments of the pipeline's call, JSON-able. guidance_interval=(sigma_lo, sigma_hi) is for
            every pipeline that guides: where its call does not take it, a `GuidanceInterval` is applied. gamma,
            skip_steps and skip_to_sigma are for every pipeline with a scheduler of Boost-and-Skip's kinds: see
            `boost_and_skip`. true_cfg_scale > 1 (Flux, Qwen-Image) has an empty negative_prompt where none is given.

    Raises:
        ValueError: before anything is drawn for arguments that the pipeline does not take or that are missing, for a
            folder of other content, of other settings or versions (named, with both values), and one in use by another
            start; and while drawing for images that are not finite.
        OSError: for a full disk; no finished batch is lost.
    """
    check_sizes(count, batch_size)
    inputs = given_tokens(tokens, given, count)
    if not inputs:
        inputs = inputs_of(pipe, count, labels, prompts, images, seed)
    elif any(value is not None for value in (labels, prompts, images)):
        raise ValueError("tokens exclude labels, prompts and images; give one of them")
    methods, its_call = applied(pipe, call)
    inputs, its_call = negative_prompts(count, inputs, its_call)
    check_call(pipe, inputs, its_call)
    kind = "sequences" if draws_sequences(pipe) else "images"
    format = format_of(pipe, kind, format)
    pipe.set_progress_bar_config(disable=True)
    device = pipe._execution_device.type
    processes = Processes(accelerator or start_processes(device))
    if cpu_threads < 1:
        raise ValueError(f"cpu_threads must be >= 1, got {cpu_threads}")
    threads = cpu_threads if device == "cpu" else None
    settings = {
        "count": count,
        "seed": seed,
        "batch_size": batch_size,
        "class_labels": _kept_labels(labels),
        "prompts": None if prompts is None else list(prompts),
        "images": None if images is None else hash_of(images),
        **{name: hash_of(inputs[name]) for name in ("tokens", "given") if name in inputs},
        "format": format,
        "call": call,
        "cpu_threads": threads,
        **describe_pipeline(pipe),
    }
    # Judged by one process, since another may find what the first has begun there.
    folder, labels = processes.agreed(lambda: check_folder(folder, MANIFEST)), inputs.get("class_labels")
    with _made(folder, processes), lock(folder, processes):
        run = _Run(
            folder,
            Kept(folder / MANIFEST, settings, lambda manifest: "result" in manifest, drawing_versions()),
            labels,
        )
        finished = processes.agreed(run.open)
        if finished is not None:
            return Sampled(folder / finished, count, drawn=0, was_finished=True, kind=kind)
        with methods, _cpu_threads(threads):
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


def _kept_labels(labels: Sequence[int | None] | torch.Tensor | str | None) -> list[int | None] | str | None:
    if labels is None or isinstance(labels, str):
        return labels
    return [None if label is None else int(label) for label in labels]


class _Run:
    """The folder of a sampling. kept: its manifest. labels: the class of each image, or None."""

    def __init__(self, folder: Path, kept: Kept, labels: list[int] | None):
        self.folder, self.kept, self.labels = folder, kept, labels
        self.shards, self.settings = Shards(folder / SHARDS), kept.begun_with["settings"]
        self.batches = batches_of(self.settings["count"], self.settings["batch_size"])

    def open(self) -> str | None:
        """Begin or go on: the name of the result where that is finished. What has no finished batch is begun anew.

        Raises:
            ValueError: for other settings or versions, and for a result that is not as it was written.
        """
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


def _shard(pipe: DiffusionPipeline, rows: range, seed: int, inputs: dict, call: dict, format: str) -> np.ndarray:
    """What is kept of a batch. A format that cannot hold it is refused at the first one, not when all are drawn."""
    if draws_sequences(pipe):
        tokens = draw(pipe, rows, seed, inputs, {**call, "output_type": "tokens"})
        return to_integers(tokens, rows, pipe.scheduler.config.vocab_size)
    images = to_uint8(draw(pipe, rows, seed, inputs, {**call, "output_type": "pt"}), rows)
    check_channels(images.shape[-1], format)
    return images


@contextmanager
def _cpu_threads(number: int | None) -> Iterator[None]:
    """Compute with a number of torch threads, or as many as ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
