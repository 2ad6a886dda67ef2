"""Data for a search from files, and a model's folder with the tables in it."""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from ..hub.damage import read_json, refusing
from ..hub.export import drop_paths
from ..metrics import countdown_sequences
from ..runs.files import changed_files, hash_files, new_folder, staged_folder
from ..runs.kept import check_same
from .report import plot_tables
from .tables import TimestepTables

logger = logging.get_logger(__name__)
ENOUGH = 0.75  # of the vocabulary, that the largest token of its data reaches
TABLES, PLOT = "timestep_tables.json", "timestep_tables.png"
CARD = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")


def check_discrete(pipe: DiffusionPipeline) -> None:
    """Raise ValueError unless a pipeline has the network and the scheduler that a search needs."""
    if not hasattr(getattr(pipe, "scheduler", None), "reverse_rates") or not hasattr(pipe, "model"):
        raise ValueError(
            f"timestep tables are for a DiscreteDiffusionPipeline with a CTMCScheduler, got {type(pipe).__name__} with"
            f" {type(getattr(pipe, 'scheduler', None)).__name__}"
        )


def read_sequences(data: str, pipe: DiffusionPipeline, count: int, seed: int = 0) -> torch.Tensor:
    """Sequences to optimise on, (count or fewer, length) int64.

    Warns of tokens that fill too little of the model's vocabulary to be of it.

    Args:
        data: an .npz with `tokens` or an .npy, (count, length) integers; a .txt file, which the pipeline's tokenizer
            cuts into sequences of the model's length, without the special tokens it adds; or "countdown", sequences of
            Jump Your Steps' CountDown task for the model's length and vocabulary, drawn with the seed.
        pipe: whose model and scheduler the sequences are for.
        count: how many at most.
        seed: of "countdown".

    Raises:
        ValueError: for other files, where there is no sequence in it, and for sequences of another length or with
            other tokens than the model's.
    """
    config, tokens = pipe.model.config, pipe.scheduler.kernel.num_real_tokens
    if data == "countdown":
        return countdown_sequences(count, _length(config), tokens, torch.Generator().manual_seed(seed))
    content = check_data(data)
    if isinstance(content, str):
        content = _tokens(data, content, pipe)
    sequences = torch.from_numpy(content[:count].astype(np.int64)).flatten(1)
    _check_belongs(data, sequences, content, config, tokens)
    return sequences


def _check_belongs(data: str, sequences: torch.Tensor, loaded: np.ndarray, config, tokens: int) -> None:
    known = config.get("sequence_length") or config.get("shape")
    if known and sequences.shape[1] != (length := _length(config)):
        raise ValueError(
            f"{data!r} holds sequences of {sequences.shape[1]} tokens, this model's have {length}; cut them so, or"
            " give data of this model"
        )
    least, most = int(loaded.min()), int(loaded.max())
    if least < 0 or most >= tokens:
        raise ValueError(
            f"data must hold tokens in [0, {tokens}), the scheduler's vocabulary without its mask, got"
            f" {least} to {most}"
        )
    if most + 1 < ENOUGH * tokens:
        logger.warning(
            f"{data!r} holds no token above {most}, and the model's vocabulary has {tokens}: is it data of this model?"
        )


def check_data(data: str) -> np.ndarray | str | None:
    """What a file of data holds, an array or text; None for "countdown".

    Raises:
        ValueError: for other names and what `read_sequences` refuses without a model.
        OSError: for a missing file.
    """
    if data == "countdown":
        return None
    path = Path(data)
    if path.suffix not in (".npz", ".npy", ".txt"):
        raise ValueError(f'data must be an .npz, .npy or .txt file or "countdown", got {data!r}')
    path.open("rb").close()
    with refusing(f"data {data!r} cannot be read; is it whole?"):
        content = path.read_text(encoding="utf-8") if path.suffix == ".txt" else np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            if "tokens" not in content:
                raise ValueError(f"it has no array `tokens`, only {sorted(content)}")
            content = content["tokens"]
    if path.suffix != ".txt" and (content.ndim < 2 or content.dtype.kind not in "iu" or len(content) == 0):
        raise ValueError(f"{data!r} must hold integers (count, length), got {content.dtype} {content.shape}")
    return content


def _tokens(data: str, text: str, pipe: DiffusionPipeline) -> np.ndarray:
    if getattr(pipe, "tokenizer", None) is None:
        raise ValueError(f"{data!r} is text and the pipeline has no tokenizer; give an .npz with tokens")
    # [CLS] and [SEP] would stand in the first and the last sequence alone
    tokens = pipe.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    length = _length(pipe.model.config)
    whole = len(tokens) // length
    if whole == 0:
        raise ValueError(f"{data!r} has {len(tokens)} tokens, a sequence of this model has {length}")
    return np.array(tokens[: whole * length]).reshape(whole, length)


def _length(config) -> int:
    length = config.get("sequence_length") or int(np.prod(config.get("shape") or [0]))
    if not length:
        raise ValueError("the model's config has no sequence_length; give an .npz with tokens of the length to use")
    return length


def write_model(
    pipe: DiffusionPipeline, source: str, tables: TimestepTables, folder: str | Path, settings: dict
) -> Path:
    """A copy of a model with the tables in its scheduler, as a new folder; timestep_tables.json beside, and with
    matplotlib timestep_tables.png.

    The copy appears whole or not at all.

    Args:
        pipe: the loaded model.
        source: the folder that it was loaded from, of which what belongs to the model is copied: what
            `save_pretrained` writes, the card, the licence and the code that model_index.json names; of a Hub id the
            pipeline is saved.
        tables: the edges.
        folder: new or empty.
        settings: JSON-able, with which the tables were made; see `finished_tables`.

    Raises:
        ValueError: if the folder is not empty.
    """
    scheduler = tables.apply_to(pipe.scheduler)
    with staged_folder(folder) as (folder, staged):
        pipe.save_pretrained(staged)
        if Path(source).is_dir():
            _copy_originals(Path(source), staged)
        scheduler.save_pretrained(staged / "scheduler")
        drop_paths(staged)
        tables.save(staged / TABLES, {"settings": settings, "files": hash_files(staged)})
        if find_spec("matplotlib") is not None:
            plot_tables(tables, staged / PLOT)
    return folder


def finished_tables(folder: Path, settings: dict) -> TimestepTables | None:
    """The tables of a folder that `write_model` wrote with these settings; None where there is no folder yet.

    Raises:
        ValueError: for a folder of something else or with other settings, which are named, and where files are gone or
            damaged.
    """
    if not (folder / TABLES).exists():
        return None
    content = read_json(folder / TABLES)
    if not {"settings", "files"} <= set(content):
        new_folder(folder)
    check_same(folder, content["settings"], json.loads(json.dumps(settings)))
    if changed := changed_files(folder, content["files"]):
        raise ValueError(
            f"{str(folder)!r} was finished, but {', '.join(changed)} is gone or damaged; remove it to write it anew"
        )
    return TimestepTables.load(folder / TABLES)


def _copy_originals(source: Path, staged: Path) -> None:
    """Replace what was saved by the files of the source, weights in their own dtype among them, and add its card and
    its code. A component whose files have other names there, such as shards, stays as it was saved."""
    for part in [path for path in staged.iterdir() if path.is_dir()]:
        names = [path.relative_to(staged) for path in part.rglob("*") if path.is_file()]
        if all((source / name).is_file() for name in names):
            for name in names:
                copyfile(source / name, staged / name)
    for name in ("model_index.json", *CARD, *_code(source)):
        if (source / name).is_file():
            copyfile(source / name, staged / name)


def _code(source: Path) -> Iterator[Path]:
    """The files of code that model_index.json names, and their siblings, relative to the folder."""
    index = read_json(source / "model_index.json")
    for name, value in index.items():
        folder = Path() if name == "_class_name" else Path(name)
        if isinstance(value, list) and (path := source / folder / f"{value[0]}.py").is_file():
            siblings = re.findall(r"^\s*from\s+\.(\w+)\s+import", path.read_text(encoding="utf-8"), re.MULTILINE)
            yield from (folder / f"{stem}.py" for stem in (value[0], *siblings))
