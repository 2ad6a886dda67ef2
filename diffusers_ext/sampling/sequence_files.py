"""Token sequences as an npz or as texts, a file or a line of JSON each; one batch in memory at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..runs.files import replacing
from .image_files import file_names, write_npz

FORMATS = ("txt", "jsonl", "npz")


def write_sequences(
    batches: Iterator[np.ndarray],
    count: int,
    folder: Path,
    format: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """Write all sequences into a folder in one of `FORMATS`; returns the name of the file, "." for txt files.

    "npz" gives tokens_{count}x{length}.npz with `tokens`, (count, length) of the type of the batches. The others need
    the tokenizer: "txt" gives 000000.txt, 000001.txt, ...; "jsonl" gives samples.jsonl with {"text": ..., "tokens":
    [...]} a line. The same sequences give the same bytes.

    Args:
        batches: integers (any number, length), `count` sequences in all.
        count: number of sequences.
        folder: where they go.
        format: one of `FORMATS`.
        tokenizer: of the pipeline, or None.

    Raises:
        ValueError: for sequences of different lengths and another number than `count`.
    """
    checked = _checked(batches, count)
    if format == "npz":
        first = next(checked)
        name = f"tokens_{count}x{first.shape[1]}.npz"
        write_npz(folder / name, "tokens", first, checked, count)
        return name
    texts = ((row, text) for batch in checked for row, text in zip(batch, tokenizer.batch_decode(batch), strict=True))
    if format == "txt":
        for name, (_, text) in zip(file_names(count, "txt"), texts, strict=True):
            with replacing(folder / name) as file:
                file.write(text.encode())
        return "."
    with replacing(folder / "samples.jsonl") as file:
        for row, text in texts:
            line = json.dumps({"text": text, "tokens": row.tolist()}, ensure_ascii=False)
            file.write(f"{line}\n".encode())
    return "samples.jsonl"


def _checked(batches: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The batches, known to be of one length and to hold count sequences."""
    length, seen = None, 0
    for batch in batches:
        length = length or batch.shape[1]
        if batch.shape[1] != length:
            raise ValueError(f"sequences must have one length, got {batch.shape[1]} after {length}")
        seen += len(batch)
        yield batch
    if seen != count:
        raise ValueError(f"there must be {count} sequences, got {seen}")
