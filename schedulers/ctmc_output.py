"""What the steps of CTMCScheduler return."""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput

from .ctmc_draws import column


@dataclass
class CTMCSchedulerOutput(BaseOutput):
    """What a step of a `CTMCScheduler` returns.

    Attributes:
        prev_sample: (batch, length) int64, the tokens at the next, smaller time.
        prev_timestep: (batch,), that time, 0 for clean tokens.
    """

    prev_sample: torch.Tensor
    prev_timestep: torch.Tensor | None = None  # accelerate rebuilds outputs from one dict, taken as first field


def step_output(
    sample: torch.Tensor, time: list[float] | torch.Tensor, return_dict: bool
) -> CTMCSchedulerOutput | tuple:
    """Of tokens and their time: a list of one a sample on the host, or (batch,) on the sample's device."""
    time = time if isinstance(time, torch.Tensor) else column(time, sample.device)
    return CTMCSchedulerOutput(prev_sample=sample, prev_timestep=time) if return_dict else (sample, time)
