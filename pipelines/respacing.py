"""Timestep respacing of guided-diffusion: which of the training timesteps a sampler visits."""

import inspect
from itertools import pairwise
from numbers import Integral
from typing import TypeVar

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .call_arguments import checked_arguments


@checked_arguments(but="respacing")
def respaced_timesteps(respacing: str, num_train_timesteps: int = 1000) -> list[int]:
    r"""Strictly decreasing training timesteps for a respacing of guided-diffusion's command line.

    - `"N"`: N timesteps from 0 to the last one, at the stride (T - 1) / (N - 1) and rounded half to even; "1" is
      timestep 0 alone.
    - `"a,b,c"`: the range is cut into sections of equal length (where it does not divide, the first ones are longer by
      one), from the clean end to the noisy one, with a, b, c timesteps, each section spaced like "N".
    - `"ddimN"`: the smallest integer stride that gives exactly N timesteps from 0 on. The last one is dropped.

    A plain integer as `num_inference_steps` is the scheduler's own spacing, which may be another one.

    Args:
        respacing: one of these strings.
        num_train_timesteps: T, of the training's schedule.

    Raises:
        ValueError: for other strings, no timestep at all, more timesteps than there are, and an N that no integer
            stride gives.
    """
    try:
        if respacing.startswith("ddim"):
            return _integer_stride(int(respacing.removeprefix("ddim")), num_train_timesteps)
        return _sections([int(count) for count in respacing.split(",")], num_train_timesteps)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f'respacing {respacing!r} must be like "250", "10,10,5" or "ddim25" for {num_train_timesteps} training'
            f" timesteps: {error}"
        ) from error


def _integer_stride(count: int, total: int) -> list[int]:
    for stride in range(1, total):
        if len(range(0, total, stride)) == count:
            return list(range(0, total, stride))[::-1]
    raise ValueError(f"no integer stride gives {count} timesteps")


def _sections(counts: list[int], total: int) -> list[int]:
    start, kept = 0, []
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if not 0 <= count <= size:
            raise ValueError(f"a section of {size} timesteps cannot give {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride  # summed, not multiplied: rounding then falls as in the original
        start += size
    if not kept:
        raise ValueError("no timestep is left")
    return kept[::-1]


Steps = TypeVar("Steps", list[int], torch.Tensor)


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int | str,
    timesteps: list[int] | None,
    device: str | torch.device | None,
) -> None:
    """Set a scheduler's schedule by its length, by a respacing, or timestep by timestep, which comes first.

    A scheduler that skips steps drops them from a schedule of its own and from a respacing; a list runs as given.

    Raises:
        ValueError: for a list that is not strictly decreasing in the range of training timesteps, and for a respacing
            or a list given to a scheduler that takes no timesteps.
    """
    if timesteps is None and isinstance(num_inference_steps, str):
        timesteps = respaced_timesteps(num_inference_steps, scheduler.config.num_train_timesteps)
        if is_boost_and_skip(scheduler):
            timesteps = kept_steps(timesteps, scheduler.config.skip_steps)
    if timesteps is None:
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1 or a respacing, got {num_inference_steps}")
        scheduler.set_timesteps(num_inference_steps, device=device)
    elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        timesteps = checked_timesteps(timesteps, scheduler.config.num_train_timesteps)
        scheduler.set_timesteps(timesteps=timesteps, device=device)
    else:
        raise ValueError(
            f"timesteps={timesteps!r}: {type(scheduler).__name__} takes no custom timesteps; use a DDPMScheduler or a"
            " BoostAndSkip... scheduler, or an integer as num_inference_steps"
        )


def is_boost_and_skip(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler itself boosts and skips, which its class shows by taking `gamma` and `skip_steps`.

    Not read from the config: a stock scheduler made from ours keeps the two as ignored entries there.
    """
    return {"gamma", "skip_steps"} <= set(inspect.signature(type(scheduler).__init__).parameters)


def kept_steps(steps: Steps, skip_steps: int) -> Steps:
    """The steps without the first ones.

    Raises:
        ValueError: where none is left.
    """
    if skip_steps >= len(steps):
        raise ValueError(
            f"skip_steps={skip_steps} leaves no step of a schedule of {len(steps)}; use 0 <= skip_steps <"
            f" {len(steps)} or a longer schedule"
        )
    return steps[skip_steps:]


def checked_timesteps(timesteps: list[int], end: int) -> list[int]:
    """The list, if it holds strictly decreasing integers in [0, end); a negative one would index from the end.

    Raises:
        ValueError: for any other.
    """
    table = list(timesteps)
    integers = all(isinstance(t, Integral) and not isinstance(t, bool) for t in table)
    decreasing = integers and all(a > b for a, b in pairwise(table))
    if not table or not decreasing or table[0] >= end or table[-1] < 0:
        raise ValueError(
            f"timesteps must be strictly decreasing integers in [0, {end}), at least one, got {timesteps}"
        )
    return table
