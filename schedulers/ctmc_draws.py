r"""Random draws whose law does not depend on how finely a generator draws, nor on the device that it draws on.

`torch.rand` has a resolution of about 2^-24, and exponentials on CUDA end near 2^-24 as well: by clocks drawn so, a
token with less than 2^-24 of the weight is never drawn, and the more steps, the more such tokens. Two things mend it.

Uniforms are put together from three draws, v_1 to v_3 in [0, 1), of which only the first 16 binary digits are used,

.. math:: u = 2^{-16} \big(\lfloor 2^{16} v_1 \rfloor + 2^{-16} (\lfloor 2^{16} v_2 \rfloor + v_3)\big)

so that they are uniform down to 2^-48 on every generator with 16 digits. A clock -log(1 - u) has the law of an
exponential from 2^-48 to 16.6, with the relative precision of float32.

A token is drawn with two races. The vocabulary is cut into about sqrt(vocab) blocks b of as many tokens; a block wins
the first race with probability S_b / S, for sums S_b of weights w_i, a token in it the second one with w_i / S_b:

.. math:: P(i) = \frac{S_b}{S} \cdot \frac{w_i}{S_b} = \frac{w_i}{S}

Each factor is right to the precision of float32, however small, since a race compares quotients and adds up nothing
but positive weights; and 2 sqrt(vocab) clocks are drawn in place of vocab.
"""

import math

import torch

DIGITS = 2.0**16
Generators = torch.Generator | list[torch.Generator] | None


def uniforms(shape: tuple[int, ...], generator: Generators, device: torch.device) -> torch.Tensor:
    """Uniforms in (0, 1), float32 on the device, fine near 0; shape[0] is the batch where generators are a list.

    They are put together where the generator lives and are moved once.

    Raises:
        ValueError: for a list of another length.
    """
    if not isinstance(generator, list):
        return _composed(shape, generator, device if generator is None else generator.device).to(device)
    check_generators(generator, shape[0])
    return torch.cat([_composed((1, *shape[1:]), one, one.device) for one in generator]).to(device)


def _composed(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    def draw():
        return torch.rand(shape, generator=generator, device=device)

    first, second = (draw().mul_(DIGITS).floor_().clamp_(0, DIGITS - 1) for _ in range(2))
    rest = draw().add_(2.0**-25)  # the middle of its cell, never 0
    return first.add_(second.add_(rest).div_(DIGITS)).div_(DIGITS).clamp_(max=1 - 2.0**-24)


def integers(high: int, shape: tuple[int, ...], generator: Generators, device: torch.device) -> torch.Tensor:
    """Integers in [0, high), int64; shape and errors as of `uniforms`."""
    if not isinstance(generator, list):
        source = device if generator is None else generator.device
        return torch.randint(high, shape, generator=generator, device=source).to(device)
    check_generators(generator, shape[0])
    rows = [torch.randint(high, (1, *shape[1:]), generator=one, device=one.device) for one in generator]
    return torch.cat(rows).to(device)


def clocks(shape: tuple[int, ...], generator: Generators, device: torch.device) -> torch.Tensor:
    """Exponentials of rate 1, positive and finite; shape and errors as of `uniforms`."""
    return uniforms(shape, generator, device).neg_().log1p_().neg_()


def clocks_for_tokens(
    shape: tuple[int, ...], vocab_size: int, generator: Generators, device: torch.device
) -> torch.Tensor:
    """Clocks for `draw_tokens` at each position, (*shape, number of them)."""
    return clocks((*shape, clocks_a_token(vocab_size)), generator, device)


def clocks_a_token(vocab_size: int) -> int:
    """How many clocks `draw_tokens` needs for one token."""
    width = _width(vocab_size)
    return vocab_size // width + 1 + width


def draw_tokens(weights: torch.Tensor, ticks: torch.Tensor) -> torch.Tensor:
    """A token in proportion to each row of weights, (n,) int64, by a race of blocks and one of the winner's tokens.

    weights: (n, vocab), finite, >= 0, not normalised. ticks: (n, .) of `clocks_for_tokens`.
    """
    vocab_size, width = weights.shape[1], _width(weights.shape[1])
    whole = vocab_size // width
    sums = weights[:, : whole * width].unflatten(1, (whole, width)).sum(dim=2)
    rest = weights[:, whole * width :].sum(dim=1, keepdim=True)
    block = (torch.cat([sums, rest], dim=1) / ticks[:, : whole + 1]).argmax(dim=1, keepdim=True)
    tokens = block * width + torch.arange(width, device=weights.device)
    inside = weights.gather(1, tokens.clamp(max=vocab_size - 1)).masked_fill_(tokens >= vocab_size, 0)
    return tokens.gather(1, (inside / ticks[:, whole + 1 :]).argmax(dim=1, keepdim=True)).squeeze(1)


def replay_tokens(weights: torch.Tensor, recorded: torch.Tensor) -> torch.Tensor:
    """A token in proportion to each row of weights, (n,) int64, by one race with recorded uniforms in [0, 1).

    weights: (n, vocab), not normalised; negative ones count as 0. Overwritten. recorded: the same shape, clocks are
    their -log. What they cannot resolve, weights below 2^-24 of the largest where they have 24 digits, is not drawn.
    """
    ticks = torch.log(recorded.to(weights.device, torch.float32)).neg_().clamp_(1e-38, 104)  # the end of float32
    return weights.div_(ticks).argmax(dim=-1)


def check_generators(generators: list[torch.Generator], batch: int) -> None:
    """Raise ValueError unless there is one generator a sample."""
    if len(generators) != batch:
        raise ValueError(f"generator is a list of {len(generators)}, the batch has {batch} samples; give one a sample")


def _width(vocab_size: int) -> int:
    return math.isqrt(vocab_size - 1) + 1


def column(times: list[float], device: torch.device) -> torch.Tensor:
    """(batch,) float32; nothing is moved where all are the same."""
    if all(time == times[0] for time in times):
        return torch.full((len(times),), times[0], device=device, dtype=torch.float32)
    return torch.tensor(times, dtype=torch.float32).to(device)
