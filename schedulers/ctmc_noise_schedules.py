"""Noise schedules of continuous-time discrete diffusion: the total noise sigma_bar(t) and its derivative sigma(t).

The forward chain has the rate matrix sigma(t) Q with a constant Q, so that its transition over [0, t] is
exp(sigma_bar(t) Q). Time runs from 0 (data) to 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import FrozenDict


@dataclass(frozen=True)
class NoiseSchedule:
    """sigma_bar and sigma as functions of a floating-point tensor of times; both keep its shape and dtype.

    Attributes:
        sigma_bar: the total noise.
        sigma: its rate.
        stable: the same functions without the cancellation near t = 1 that the usual forms have in float32, for
            devices without float64; None where there is none.
    """

    sigma_bar: Callable[[torch.Tensor], torch.Tensor]
    sigma: Callable[[torch.Tensor], torch.Tensor]
    stable: "NoiseSchedule | None" = None


def loglinear(eps: float) -> NoiseSchedule:
    """sigma_bar = -log(1 - (1 - eps) t): a share (1 - eps) t of the tokens has moved at time t (SEDD, 2310.16834)."""
    rest = 1 - eps
    stable = _of_shares(lambda t: rest * t, lambda t: eps + rest * (1 - t), lambda t: torch.full_like(t, rest))
    return NoiseSchedule(lambda t: -torch.log1p(-rest * t), lambda t: rest / (1 - rest * t), stable)


def cosine(eps: float) -> NoiseSchedule:
    """A share sin(pi/2 (1 - eps) t) of the tokens has moved at time t."""
    angle = math.pi / 2

    def moved(t):
        return torch.cos(angle * (1 - (1 - eps) * t))

    def sigma(t):
        return angle * (1 - eps) * torch.sin(angle * (1 - (1 - eps) * t)) / (1 - moved(t))

    def rest(t):
        return angle * (eps + (1 - eps) * (1 - t))

    stable = _of_shares(
        lambda t: torch.sin(angle * (1 - eps) * t),
        lambda t: 2 * torch.sin(rest(t) / 2) ** 2,
        lambda t: angle * (1 - eps) * torch.sin(rest(t)),
    )
    return NoiseSchedule(lambda t: -torch.log1p(-moved(t)), sigma, stable)


def arccos(eps: float) -> NoiseSchedule:
    """A share 2/pi arccos(1 - (1 - eps) t) of the tokens has moved at time t; sigma is infinite at t = 0."""

    def moved(t):
        return torch.acos(1 - (1 - eps) * t) * 2 / math.pi

    def sigma(t):
        slope = 2 * (1 - eps) / (math.pi * torch.sqrt(1 - (1 - (1 - eps) * t) ** 2))
        return slope / (1 - moved(t))

    rest = 1 - eps
    stable = _of_shares(
        lambda t: 4 / math.pi * torch.asin(torch.sqrt(rest * t / 2)),
        lambda t: 2 / math.pi * torch.asin(eps + rest * (1 - t)),
        lambda t: 2 * rest / (math.pi * torch.sqrt(rest * t * (2 - rest * t))),
    )
    return NoiseSchedule(lambda t: -torch.log1p(-moved(t)), sigma, stable)


def _of_shares(moved: Callable, left: Callable, slope: Callable) -> NoiseSchedule:
    """sigma_bar = -log(left) and sigma = slope / left, of the share of tokens that have moved and of the others.

    Both shares are given in a form without cancellation. slope: the derivative of the first.
    """

    def sigma_bar(t):
        return torch.where(t < 0.5, -torch.log1p(-moved(t)), -torch.log(left(t)))

    return NoiseSchedule(sigma_bar, lambda t: slope(t) / left(t))


def geometric(sigma_min: float, sigma_max: float) -> NoiseSchedule:
    """sigma_bar = sigma_min^(1-t) sigma_max^t (SEDD); at t = 0 it is sigma_min, not 0."""
    growth = math.log(sigma_max / sigma_min)

    def sigma_bar(t):
        return sigma_min * torch.exp(growth * t)

    return NoiseSchedule(sigma_bar, lambda t: growth * sigma_bar(t))


def exponential(time_base: float, time_exponential: float) -> NoiseSchedule:
    """sigma_bar = time_base (time_exponential^t - 1) (tauLDR, 2205.14987, for its Gaussian rate)."""
    growth = math.log(time_exponential)

    def sigma(t):
        return time_base * growth * torch.exp(growth * t)

    return NoiseSchedule(lambda t: time_base * torch.expm1(growth * t), sigma)


def constant(rate: float) -> NoiseSchedule:
    """sigma_bar = rate t."""
    return NoiseSchedule(lambda t: rate * t, lambda t: torch.full_like(t, rate))


def build_noise_schedule(config: FrozenDict) -> NoiseSchedule:
    """The noise schedule that a checked configuration names."""
    builders = {
        "loglinear": lambda: loglinear(config.eps),
        "cosine": lambda: cosine(config.eps),
        "arccos": lambda: arccos(config.eps),
        "geometric": lambda: geometric(config.sigma_min, config.sigma_max),
        "exponential": lambda: exponential(config.time_base, config.time_exponential),
        "constant": lambda: constant(config.constant_rate),
    }
    return builders[config.noise_schedule]()
