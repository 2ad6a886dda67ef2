"""Original checkpoints of discrete diffusion as Hub-layout folders of a `DiscreteDiffusionPipeline`."""

from pathlib import Path

import torch
from diffusers import ModelMixin
from transformers import AutoTokenizer

from ..casting import dtype_option
from ..hub.downloads import check_source
from ..pipelines import DiscreteDiffusionPipeline
from ..pipelines.call_arguments import checked_arguments
from ..runs.files import new_folder, staged_folder
from ..schedulers import CTMCScheduler
from .convert import Converted
from .sedd import load_countdown, load_sedd, sedd_scheduler
from .tauldr import load_tauldr, tauldr_scheduler
from .tensor_files import check_finite, checked_cast


@checked_arguments
def convert_sedd(
    source: str | Path,
    folder: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Converted:
    """Write a SEDD network, its scheduler and a tokenizer as a pipeline folder; returns the pipeline and an error.

    Args:
        source: as `path` of `load_sedd`.
        folder: new or empty.
        tokenizer: folder or Hub id, such as "gpt2" for the published networks; with none the pipeline gives tokens.
        dtype: of the weights that are written.
        revision: as of `load_sedd`.

    Returns:
        The pipeline, and the error: the largest difference of outputs between the checkpoint in float32 and what was
            written; 0 for float32.

    Raises:
        ValueError: for what `load_sedd` refuses, a folder that is not empty, a tokenizer of more tokens than the
            network has, and a folder that does not load again with the same outputs; nothing is written then.
    """
    folder = new_folder(folder)
    check_source(source, revision)
    if tokenizer is not None:
        check_source(tokenizer)
    model, scheduler = load_sedd(source, revision), sedd_scheduler(source, revision)
    loaded = None if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    real = scheduler.kernel.num_real_tokens
    if loaded is not None and len(loaded) > real:
        raise ValueError(f"tokenizer {str(tokenizer)!r} has {len(loaded)} tokens, the network {real}; give its own")
    return _written(model, scheduler, loaded, folder, dtype)


@checked_arguments
def convert_countdown(
    checkpoint: str | Path,
    folder: str | Path,
    length: int = 256,
    num_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Converted:
    """Write a CountDown network of Jump Your Steps as a pipeline folder; returns the pipeline and an error.

    Args:
        checkpoint: as `path` of `load_countdown`.
        folder: new or empty.
        length: of its sequences, which the checkpoint does not hold; 256 in the paper.
        num_heads: as of `load_countdown`.
        dtype: as of `convert_sedd`.

    Returns:
        The pipeline, and the error as for `convert_sedd`.

    Raises:
        ValueError: for what `load_countdown` refuses, else as for `convert_sedd`.
    """
    folder = new_folder(folder)
    model = load_countdown(checkpoint, num_heads)
    model.register_to_config(sequence_length=length)
    return _written(model, CTMCScheduler(vocab_size=model.config.vocab_size), None, folder, dtype)


@checked_arguments
def convert_tauldr(
    checkpoint: str | Path,
    config: str | Path,
    folder: str | Path,
    weights: str = "ema",
    integer_time: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Converted:
    """Write a network of tauLDR and its scheduler as a pipeline folder; returns the pipeline and an error.

    Args:
        checkpoint: as of `load_tauldr`.
        config: as of `load_tauldr`.
        folder: new or empty.
        weights: as of `load_tauldr`.
        integer_time: as of `load_tauldr`.
        dtype: as of `convert_sedd`.

    Returns:
        The pipeline, and the error as for `convert_sedd`.

    Raises:
        ValueError: for what `load_tauldr` refuses, else as for `convert_sedd`.
    """
    folder = new_folder(folder)
    model = load_tauldr(checkpoint, config, weights, integer_time)
    return _written(model, tauldr_scheduler(config), None, folder, dtype)


def _written(model: ModelMixin, scheduler: CTMCScheduler, tokenizer, folder: Path, dtype: torch.dtype) -> Converted:
    """Save beside the folder, load, compare, and only then put it in its place."""
    expected = _outputs(model, scheduler)
    pipeline = DiscreteDiffusionPipeline(checked_cast(model, dtype), scheduler, tokenizer)
    rounded = expected if dtype == torch.float32 else _outputs(model, scheduler)
    with staged_folder(folder) as (_, staged):
        pipeline.save_pretrained(staged)
        loaded = DiscreteDiffusionPipeline.from_pretrained(staged, **dtype_option(dtype))
        found = _outputs(loaded.model, loaded.scheduler)
        if not torch.equal(found, rounded):
            raise ValueError(
                f"{type(model).__name__}: the folder that was written gives other outputs than the checkpoint, by"
                f" {(found - rounded).abs().max():.2g}; this is a bug"
            )
    return Converted(pipeline, float((rounded - expected).abs().max()))


@torch.no_grad()
def _outputs(model: ModelMixin, scheduler: CTMCScheduler) -> torch.Tensor:
    """What the network says of two noise levels of one sequence, (2, length, vocab) float32."""
    shape = model.config.get("shape")
    length = model.config.sequence_length if shape is None else int(torch.tensor(shape).prod())
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(scheduler.config.vocab_size - 1, (1, length or 64), generator=generator).expand(2, -1)
    times = torch.tensor([0.2, 0.8])
    tokens = scheduler.add_noise(clean.contiguous(), generator, times)
    output = model(tokens, scheduler.model_time(times, 2)).sample.float()
    check_finite({"output": output}, f"{type(model).__name__} in {str(model.dtype).removeprefix('torch.')}")
    return output
