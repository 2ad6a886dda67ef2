"""The pipeline that a trained flow becomes, in a folder that is written whole, and replaced only if it is ours."""

from pathlib import Path
from shutil import rmtree

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ..checkpoints.tensor_files import read_json
from ..pipelines import FlowPostprocessingPipeline
from ..runs.files import changed_files, hash_files, new_folder, put_in_place, scratch_folder, write_json


def save_flow(model: torch.nn.Module, folder: str | Path) -> None:
    """A `FlowPostprocessingPipeline` in fp16, solved by Euler steps.

    Args:
        model: the network.
        folder: of the pipeline.
    """
    FlowPostprocessingPipeline(model.half(), FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)


def check_flow_folder(folder: Path, record: Path, begun: bool) -> None:
    """Check that a folder may be written to.

    Args:
        folder: of the pipeline.
        record: a file with the hashes of what is there.
        begun: whether a training that knew of no record may have ended.

    Raises:
        ValueError: for a folder that is not empty and not as `write_flow` left it.
    """
    if record.exists() and folder.exists():
        written = read_json(record)
        if changed := changed_files(folder, written) or sorted(set(hash_files(folder)) - set(written)):
            raise ValueError(f"{folder}: {', '.join(changed)} is gone or not as it was written; remove {folder}")
    elif not begun:
        new_folder(folder)


def write_flow(model: torch.nn.Module, folder: Path, record: Path) -> bool:
    """Write the pipeline in place of one of fewer steps; whether it was there already, byte for byte.

    Args:
        model: the network.
        folder: of the pipeline.
        record: a file with the hashes of what is there.

    Raises:
        ValueError: as `check_flow_folder`.
    """
    with scratch_folder(folder) as scratch:
        fresh = scratch / "pipeline"
        save_flow(model, fresh)
        hashes = hash_files(fresh)
        finished = folder.exists() and hash_files(folder) == hashes
        if not finished:
            check_flow_folder(folder, record, begun=False)
            rmtree(folder, ignore_errors=True)  # can be made again of the checkpoint
        write_json(record, hashes)
        if not finished:
            put_in_place(fresh, folder)
    return finished
