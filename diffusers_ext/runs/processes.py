"""Several processes at one piece of work, started by torchrun or accelerate launch."""

import os
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object


def start_processes(device: str, mixed_precision: str | None = None) -> Accelerator | None:
    """The processes that a launcher started, for a kind of device; None where there is no launcher.

    accelerate launch starts one process on a CPU and does not tell it how many were asked for, so there a warning says
    to use torchrun.

    Args:
        device: kind of device.
        mixed_precision: "no", "fp16" or "bf16"; None is what the launcher was told.

    Raises:
        ValueError: where the launcher promised another number of processes than accelerate makes, and for a device
            with an index that several processes would share.
    """
    on_cpu = torch.device(device).type == "cpu"
    promised = os.environ.get("WORLD_SIZE")
    if promised is None:
        if on_cpu and "ACCELERATE_USE_CPU" in os.environ:
            warnings.warn(
                "accelerate launch starts one process on a CPU, whatever --num_processes says; for several use"
                " torchrun --nproc_per_node N"
            )
        return None
    if int(promised) > 1 and torch.device(device).index is not None:
        raise ValueError(f"device {device!r}: each of {promised} processes has one of its own; leave the index out")
    # Processes wait for the slowest one, and for the main one while it writes the result.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed_precision, kwargs_handlers=[patience])
    if accelerator.num_processes != int(promised):
        raise ValueError(
            f"the launcher promised {promised} processes (WORLD_SIZE), but accelerate made {accelerator.num_processes}"
            f" on {device}; use a cuda or cpu device, or start without a launcher"
        )
    return accelerator


def start_accelerator(device: str, mixed_precision: str) -> Accelerator:
    """As `start_processes`; without a launcher, an Accelerator for this process alone on the device.

    Every later one in the process has the same device and precision, that of a training too.
    """
    launched = start_processes(device, mixed_precision)
    if launched is not None:
        return launched
    place = torch.device(device)
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)  # accelerate takes the current one
    return Accelerator(cpu=place.type == "cpu", mixed_precision=mixed_precision)


def end_processes(accelerator: Accelerator | None) -> None:
    """Take leave of the other processes, with the work done; nothing happens without an accelerator."""
    if accelerator is None:
        return
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        # torch 2.6 closes a group on the CPU without letting its threads run Python, which they need to free the last
        # message, and then waits for them forever.
        time.sleep(0.5)
    accelerator.end_training()


class Processes:
    """What the work needs to know of an Accelerator; without one, this process alone.

    Creating an Accelerator fixes the device of every later one in the process, so none is made for a process alone.
    """

    def __init__(self, accelerator: Accelerator | None):
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index
        self.is_main = self.index == 0

    def agreed(self, work: Callable) -> Any:
        """What the main process makes of `work`, in every process; what it raises is raised in all of them."""
        if self.count == 1:
            return work()
        outcome = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except (ValueError, OSError) as error:
                outcome[1] = error
        result, error = broadcast_object_list(outcome)
        if error is not None:
            raise error
        return result

    def total(self, number: int) -> int:
        """The sum over all processes, once each has come here."""
        return number if self.count == 1 else sum(gather_object([number]))
