"""Data for a search from files, and a model's folder with the tables in it."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ..hub import staged_folder
from ..metrics import countdown_sequences
from .report import plot_tables
from .tables import TimestepTables


def check_discrete(pipe: DiffusionPipeline) -> None:
    """Raise ValueError unless a pipeline has the network and the scheduler that a search needs."""
    if not hasattr(getattr(pipe, "scheduler", None), "reverse_rates") or not hasattr(pipe, "model"):
        raise ValueError(
            f"timestep tables are for a DiscreteDiffusionPipeline with a CTMCScheduler, got {type(pipe).__name__} with"
            f" {type(getattr(pipe, 'scheduler', None)).__name__}"
        )


def read_sequences(data: str, pipe: DiffusionPipeline, count: int, seed: int = 0) -> torch.Tensor:
    """Sequences to optimise on, (count or fewer, length) int64.

    data: an .npz with `tokens` or an .npy, (count, length) integers; a .txt file, which the pipeline's tokenizer cuts
    into sequences of the model's length; or "countdown", sequences of Jump Your Steps' CountDown task for the model's
    length and vocabulary, drawn with the seed.

    Raises ValueError for other files and where there is no sequence in it.
    """
    config = pipe.model.config
    if data == "countdown":
        tokens = pipe.scheduler.config.vocab_size - (pipe.scheduler.mask_token_id is not None)
        length = _length(config)
        return countdown_sequences(count, length, tokens, torch.Generator().manual_seed(seed))
    path = Path(data)
    if path.suffix == ".txt":
        return _read_text(path, pipe, count)
    if path.suffix not in (".npz", ".npy"):
        raise ValueError(f'data must be an .npz, .npy or .txt file or "countdown", got {data!r}')
    loaded = np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        if "tokens" not in loaded:
            raise ValueError(f"{data!r} has no array `tokens`, only {sorted(loaded)}")
        loaded = loaded["tokens"]
    if loaded.ndim < 2 or loaded.dtype.kind not in "iu" or len(loaded) == 0:
        raise ValueError(f"{data!r} must hold integers (count, length), got {loaded.dtype} {loaded.shape}")
    return torch.from_numpy(loaded[:count].astype(np.int64)).flatten(1)


def _read_text(path: Path, pipe: DiffusionPipeline, count: int) -> torch.Tensor:
    if getattr(pipe, "tokenizer", None) is None:
        raise ValueError(f"{str(path)!r} is text and the pipeline has no tokenizer; give an .npz with tokens")
    tokens, length = pipe.tokenizer(path.read_text(encoding="utf-8")).input_ids, _length(pipe.model.config)
    whole = len(tokens) // length
    if whole == 0:
        raise ValueError(f"{str(path)!r} has {len(tokens)} tokens, a sequence of this model has {length}")
    return torch.tensor(tokens[: whole * length], dtype=torch.int64).view(whole, length)[:count]


def _length(config) -> int:
    length = config.get("sequence_length") or int(np.prod(config.get("shape") or [0]))
    if not length:
        raise ValueError("the model's config has no sequence_length; give an .npz with tokens of the length to use")
    return length


def write_model(pipe: DiffusionPipeline, source: str, tables: TimestepTables, folder: str | Path) -> Path:
    """A copy of a model with the tables in its scheduler, as a new folder; timestep_tables.json beside, and with
    matplotlib timestep_tables.png.

    pipe: the loaded model. source: the folder that it was loaded from, which is copied whole; of a Hub id the pipeline
    is saved. The copy appears whole or not at all. Raises ValueError if the folder is not empty.
    """
    scheduler = tables.apply_to(pipe.scheduler)
    with staged_folder(folder) as (folder, staged):
        if Path(source).is_dir():
            shutil.copytree(source, staged)
        else:
            pipe.save_pretrained(staged)
        scheduler.save_pretrained(staged / "scheduler")
        tables.save(staged / "timestep_tables.json")
        if find_spec("matplotlib") is not None:
            plot_tables(tables, staged / "timestep_tables.png")
    return folder
