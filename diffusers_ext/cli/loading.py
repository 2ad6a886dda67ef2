"""A pipeline on every process that was started."""

from contextlib import nullcontext

import torch

from ..shipped import load_pipeline


def load_on_processes(model: str, pipeline: str | None, device, dtype: str, trust_remote_code: bool, accelerator):
    """The pipeline of a model on its device: of several processes each has its own.

    accelerator: what `start_processes` gave; None for this process alone.
    """
    if accelerator is not None and accelerator.num_processes > 1:
        device = accelerator.device
    # one after the other, since the first may download the model and copy its code
    with nullcontext() if accelerator is None else accelerator.main_process_first():
        pipe = load_pipeline(model, pipeline, trust_remote_code, dtype=getattr(torch, dtype))
    return pipe.to(device)
