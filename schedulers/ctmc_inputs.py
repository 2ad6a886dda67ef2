"""What the methods of CTMCScheduler take: checks of tokens, outputs and times, with what is allowed."""

from typing import Any

import torch

from .ctmc_draws import Generators, check_generators

Times = float | list[float] | torch.Tensor  # one, or one a sample


def check_tokens(tokens: torch.Tensor) -> None:
    """Raise ValueError for anything but int64 (batch, length) of at least one sample."""
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or not len(tokens):
        raise ValueError(
            f"tokens must be int64 (batch, length), got {tokens.dtype} {tuple(tokens.shape)}; use .long()"
        )


def check_step_inputs(
    vocab_size: int, model_output: torch.Tensor, sample: torch.Tensor, generator: Generators = None
) -> None:
    """Raise ValueError for other tokens, an output of another shape, and a list of generators of another length."""
    if isinstance(generator, list):
        check_generators(generator, len(sample))
    check_tokens(sample)
    expected = (*sample.shape, vocab_size)
    if tuple(model_output.shape) != expected:
        raise ValueError(
            f"model_output must be (batch, length, vocab_size) = {expected}, got {tuple(model_output.shape)}"
        )


def recorded_noise(
    kernel: Any, noise: torch.Tensor | tuple[torch.Tensor, torch.Tensor], x0: torch.Tensor
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Recorded noise of `add_noise`, a tensor or a pair, on the device of the tokens. kernel: of `build_kernel`.

    Raises:
        ValueError: for other shapes, and for what is no uniform in [0, 1) and no token.
    """
    pair = isinstance(noise, tuple)
    shapes = [tuple(n.shape) for n in noise] if pair else tuple(noise.shape)
    allowed = kernel.noise_shapes(tuple(x0.shape))
    if shapes not in allowed:
        raise ValueError(f"noise of kernel={kernel.name!r} must have the shape {allowed}, got {shapes}")
    draws, *targets = noise if pair else (noise,)
    if not draws.is_floating_point() or not bool(((draws >= 0) & (draws < 1)).all()):
        raise ValueError("noise must hold uniforms in [0, 1): torch.rand, not torch.randn")
    if any(bool(((tokens < 0) | (tokens >= kernel.vocab_size)).any()) for tokens in targets):
        raise ValueError(f"noise must hold target tokens in [0, {kernel.vocab_size})")
    return tuple(n.to(x0.device) for n in noise) if pair else noise.to(x0.device)


def check_recorded(noise: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError for recorded noise of another shape."""
    if noise is not None and tuple(noise.shape) != tuple(shape):
        raise ValueError(f"noise must have the shape {tuple(shape)}, got {tuple(noise.shape)}")


def check_number(count: int, batch: int) -> None:
    """Raise ValueError unless times are one or one a sample."""
    if count not in (1, batch):
        raise ValueError(f"timestep must be one time or one a sample, {batch}, got {count}")


def batch_times(times: list[float], batch: int) -> list[float]:
    """The time of each sample.

    Raises:
        ValueError: for another number of them and for times outside of (0, 1].
    """
    check_number(len(times), batch)
    if not all(0 < time <= 1 for time in times):
        raise ValueError(f"timestep must lie in (0, 1], got {times}")
    return times if len(times) == batch else times * batch


def spans(starts: list[float], ends: list[float], least: float) -> list[tuple[float, float]]:
    """Where the step of each sample starts and ends.

    Raises:
        ValueError: for ends below `least` or not before it.
    """
    check_number(len(ends), len(starts))
    ends = ends if len(ends) == len(starts) else ends * len(starts)
    if not all(least <= end < start for start, end in zip(starts, ends, strict=True)):
        allowed = "in [0, " if least == 0 else "below ("
        raise ValueError(f"next_timestep must be {allowed}timestep={starts}), got {ends}")
    return list(zip(starts, ends, strict=True))


def counts_of(num_decode: int | list[int] | torch.Tensor, device: torch.device, batch: int) -> int | torch.Tensor:
    """How many masks a gillespie step decodes: one number, or (batch,) on the device.

    Raises:
        ValueError: for what is no integer, and for a negative one on the host; on a device it decodes nothing.
    """
    counts = torch.as_tensor(num_decode)
    on_device = counts.device.type != "cpu"  # its numbers are not read
    negative = not on_device and bool((counts < 0).any())
    if counts.is_floating_point() or counts.numel() not in (1, batch) or negative:
        raise ValueError(f"num_decode must be an integer >= 0, or one a sample, got {num_decode}")
    if counts.ndim == 0 and not on_device:
        return int(counts)
    return counts.to(device).reshape(-1).expand(batch)
