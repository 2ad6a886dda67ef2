"""What bulk sampling needs to know of a `DiscreteDiffusionPipeline`."""

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline


def is_discrete(pipe: DiffusionPipeline) -> bool:
    """Whether it is a `DiscreteDiffusionPipeline`, this package's or the copy in an exported repository."""
    return {"tokens", "given"} <= set(inspect.signature(pipe.__call__).parameters)


def draws_sequences(pipe: DiffusionPipeline) -> bool:
    """Whether tokens or texts come out, not images."""
    return is_discrete(pipe) and pipe.model.config.get("shape") is None


def given_tokens(tokens: np.ndarray | None, given: np.ndarray | None, count: int) -> dict[str, np.ndarray]:
    """Tokens of each sample, int64, and where they are kept, bool, (count, length) both; {} where none are given.

    Raises ValueError for other shapes than (count, length), of `given` also (length,), and for one without the other.
    """
    if tokens is None and given is None:
        return {}
    shapes = [None if value is None else np.shape(value) for value in (tokens, given)]
    if None in shapes or len(shapes[0]) != 2 or shapes[0][0] != count or shapes[1] not in (shapes[0], shapes[0][1:]):
        raise ValueError(f"tokens must be ({count}, length), and given of that shape or (length,), got {shapes}")
    whole = {"tokens": (tokens, np.int64), "given": (np.broadcast_to(given, shapes[0]), None)}
    return {name: np.array(value, dtype=dtype, order="C") for name, (value, dtype) in whole.items()}


def check_discrete(pipe: DiffusionPipeline, inputs: dict[str, Sequence], call: dict) -> None:
    """Raises ValueError for texts without a tokenizer, and for a sampler or a schedule that the scheduler refuses."""
    if ("prompt" in inputs or "suffix" in call) and pipe.tokenizer is None:
        raise ValueError("prompts and suffix need a tokenizer, which this pipeline has not; give tokens instead")
    changes = {"sampler": call["sampler"]} if call.get("sampler") else {}
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    if call.get("timesteps") is not None:
        scheduler.set_timesteps(timesteps=call["timesteps"])
    elif "num_inference_steps" in call:
        scheduler.set_timesteps(call["num_inference_steps"])


def to_integers(tokens: torch.Tensor, rows: range, vocab_size: int) -> np.ndarray:
    """Tokens (batch, length) in the smallest unsigned type that holds the vocabulary.

    Raises ValueError for another number of sequences than rows.
    """
    if tokens.ndim != 2 or len(tokens) != len(rows):
        raise ValueError(f"the pipeline must give {len(rows)} sequences (batch, length), got {tuple(tokens.shape)}")
    return tokens.cpu().numpy().astype(np.min_scalar_type(vocab_size - 1))
