"""Boost-and-Skip's schedulers by name beside stock ones, and sampling loops written out by hand."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)

from diffusers_ext.schedulers.scheduling_boost_and_skip import (
    BoostAndSkipDDIMScheduler,
    BoostAndSkipDDPMScheduler,
    BoostAndSkipDPMSolverMultistepScheduler,
    BoostAndSkipEulerDiscreteScheduler,
)

PAIRS = {
    "ddpm": (DDPMScheduler, BoostAndSkipDDPMScheduler),
    "ddim": (DDIMScheduler, BoostAndSkipDDIMScheduler),
    "euler": (EulerDiscreteScheduler, BoostAndSkipEulerDiscreteScheduler),
    "dpm": (DPMSolverMultistepScheduler, BoostAndSkipDPMSolverMultistepScheduler),
}
NAMES = list(PAIRS)
SPACINGS = ["linspace", "leading", "trailing"]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
SHAPE = (2, 3, 4, 4)
EPS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
both = pytest.mark.parametrize("name", NAMES)


def coefficients(schedule: dict | None = None):
    """alphas_cumprod of the training process, as Python floats."""
    return DDPMScheduler(**(schedule or {})).alphas_cumprod.double().tolist()


def predictions(kind, output, x, alpha):
    """x_0 and epsilon of x = sqrt(alpha) x_0 + sqrt(1 - alpha) epsilon."""
    a, s = math.sqrt(alpha), math.sqrt(1 - alpha)
    if kind == "epsilon":
        return (x - s * output) / a, output
    if kind == "sample":
        return output, (x - a * output) / s
    return a * x - s * output, a * output + s * x


def ancestral_loop(model, x, table, alphas, variance_type, noise, clip=1.0):
    for i, t in enumerate(table):
        alpha, alpha_prev = alphas[t], alphas[table[i + 1]] if i + 1 < len(table) else 1.0
        beta, output = 1 - alpha / alpha_prev, model(x, t)
        output, v = output.chunk(2, dim=1) if variance_type.startswith("learned") else (output, None)
        x0 = predictions("epsilon", output, x, alpha)[0].clamp(-clip, clip)
        from_x0 = math.sqrt(alpha_prev) * beta / (1 - alpha)
        from_x = math.sqrt(alpha / alpha_prev) * (1 - alpha_prev) / (1 - alpha)
        x = from_x0 * x0 + from_x * x
        if t > 0:
            small = max((1 - alpha_prev) / (1 - alpha) * beta, 1e-20)
            if variance_type == "learned_range":
                variance = torch.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(small))
            else:
                variance = {"fixed_small": small, "fixed_large": beta, "learned": v}[variance_type]
            x = x + variance**0.5 * noise()
    return x


def ddim_loop(model, x, table, alphas, eta=0.0, noise=None, kind="epsilon", last=1.0, clip=1.0, rederive=False):
    for i, t in enumerate(table):
        alpha, alpha_prev = alphas[t], alphas[table[i + 1]] if i + 1 < len(table) else last
        x0, eps = predictions(kind, model(x, t), x, alpha)
        x0 = x0.clamp(-clip, clip)
        eps = (x - math.sqrt(alpha) * x0) / math.sqrt(1 - alpha) if rederive else eps
        sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha)) * math.sqrt(1 - alpha / alpha_prev)
        x = math.sqrt(alpha_prev) * x0 + math.sqrt(1 - alpha_prev - sigma**2) * eps
        if eta:
            x = x + sigma * noise()
    return x


def euler_loop(model, x, timesteps, sigmas, kind="epsilon"):
    """In variance-exploding form: x = x_0 + sigma epsilon."""
    for t, sigma, sigma_next in zip(timesteps, sigmas[:-1], sigmas[1:], strict=True):
        root = math.sqrt(1 + sigma**2)
        # The network sees x / root, which is the variance-preserving sample at alpha = 1 / root^2.
        output = model(x / root, t)
        x0 = output if kind == "sample" else predictions(kind, output, x / root, 1 / root**2)[0]
        x = x + (sigma_next - sigma) * (x - x0) / sigma
    return x


def dpm_loop(model, x, timesteps, sigmas):
    """DPM-Solver++(2M), midpoint (arXiv 2211.01095, algorithm 2), first order at the first and last step."""
    previous = None
    for i, t in enumerate(timesteps):
        (a, s), (a_next, s_next) = [(1 / math.sqrt(1 + z**2), z / math.sqrt(1 + z**2)) for z in sigmas[i : i + 2]]
        log_snr, log_snr_next = math.log(a / s), math.log(a_next / s_next) if s_next else math.inf
        h = log_snr_next - log_snr
        x0 = (x - s * model(x, t)) / a
        slope = 0.0
        if previous is not None and i + 1 < len(timesteps):
            x0_before, log_snr_before = previous
            slope = (x0 - x0_before) * h / (log_snr - log_snr_before) / 2
        x = s_next / s * x - a_next * math.expm1(-h) * (x0 + slope)
        previous = x0, log_snr
    return x


def gaussians(seed, dtype=torch.float64, shape=SHAPE):
    """What `generator=` draws, in any precision."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator).to(dtype)
