"""Stable Diffusion XL with guidance in an interval of noise levels as an argument of the call.

Kynkäänniemi et al., NeurIPS 2024, arXiv 2404.07724: guidance weight 16 in (0.28, 5.42], 32 Heun steps on sigmas from
14.61 to 0.03 with rho 3, the unconditional prediction that of the empty prompt.
"""

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

# diffusers copies only the files that this one itself imports
from .applied_guiders import GuiderOfCall  # noqa: F401
from .call_arguments import checked_arguments  # noqa: F401
from .guidance_interval import GuidanceInterval, GuidanceReport
from .guidance_layouts import Layout  # noqa: F401
from .guided_run import Run  # noqa: F401
from .guided_stage import Stage  # noqa: F401
from .interceptors import RUN  # noqa: F401
from .interval import Interval  # noqa: F401
from .layout_proof import Fit  # noqa: F401
from .layout_source import propose  # noqa: F401
from .rows import Rows  # noqa: F401


def edm_sigmas(
    num_steps: int = 32, sigma_min: float = 0.03, sigma_max: float = 14.61, rho: float = 3.0
) -> torch.Tensor:
    r"""Noise levels of EDM (arXiv 2206.00364, equation 5), by default with the paper's numbers for SDXL.

    .. math:: \sigma_i = \left(\sigma_{max}^{1/\rho}
        + \tfrac{i}{N-1}(\sigma_{min}^{1/\rho} - \sigma_{max}^{1/\rho})\right)^\rho

    Args:
        num_steps: N, at least 2.
        sigma_min: the last level.
        sigma_max: the first level.
        rho: exponent of the schedule, > 0.

    Returns:
        A float64 tensor (num_steps,), decreasing, without the final 0.

    Raises:
        ValueError: unless num_steps >= 2, 0 < sigma_min < sigma_max and rho > 0.
    """
    if not (num_steps >= 2 and 0 < sigma_min < sigma_max and rho > 0):
        raise ValueError(
            "need num_steps >= 2, 0 < sigma_min < sigma_max and rho > 0, got"
            f" {num_steps=}, {sigma_min=}, {sigma_max=}, {rho=}"
        )
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (ends[0] + ramp * (ends[1] - ends[0])) ** rho


def timesteps_of_sigmas(scheduler: SchedulerMixin, sigmas: torch.Tensor) -> list[float]:
    """Fractional training timesteps of noise levels, for `timesteps=` of schedulers that take no `sigmas=`.

    diffusers' Heun fixes rho at 7, but interpolates the noise levels of the timesteps that it is given; these are
    where it then arrives at `sigmas` (steps,).

    Raises:
        ValueError: for sigmas outside of the scheduler's range.
    """
    alphas_cumprod = scheduler.alphas_cumprod.cpu()  # `add_noise` moves them to the samples' device
    table = ((1 - alphas_cumprod) / alphas_cumprod).double().sqrt().numpy()
    levels = sigmas.cpu().double().numpy()
    if levels.min() < table[0] or levels.max() > table[-1]:
        raise ValueError(
            f"sigmas from {levels.max():.4g} to {levels.min():.4g} leave the scheduler's range, {table[-1]:.4g} to"
            f" {table[0]:.4g}"
        )
    return np.interp(levels, table, np.arange(len(table))).tolist()


def _with_interval(stock):
    """Give a method the stock signature and the argument guidance_interval."""

    def decorate(call):
        signature = inspect.signature(stock)
        parameters = list(signature.parameters.values())
        rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
        own = inspect.signature(call).parameters["guidance_interval"].replace(kind=inspect.Parameter.KEYWORD_ONLY)
        kept = [name for name in functools.WRAPPER_ASSIGNMENTS if name != "__doc__"]
        call = functools.wraps(stock, assigned=kept)(call)
        ordered = [*(p for p in parameters if p not in rest), own, *rest]
        call.__signature__ = signature.replace(parameters=ordered)
        return call

    return decorate


class StableDiffusionXLGuidanceIntervalPipeline(StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` whose call takes `guidance_interval=(sigma_lo, sigma_hi)`.

        pipe = DiffusionPipeline.from_pretrained(
            "stabilityai/stable-diffusion-xl-base-1.0", custom_pipeline=file, trust_remote_code=True
        )
        pipe("an astronaut", guidance_scale=16.0, guidance_interval=(0.28, 5.42))

    Guidance is on where sigma_lo < sigma <= sigma_hi at the start of a step, sigma in EDM units whatever the
    scheduler; elsewhere the network is run on the conditional rows alone. None, the default, is the stock pipeline.
    With the empty prompt as the negative one, as in the paper, set `force_zeros_for_empty_prompt=False`.
    """

    @property
    def guidance_report(self) -> GuidanceReport | None:
        """What the interval did in the last call that had one."""
        return getattr(self, "_guidance_report", None)

    def progress_bar(self, iterable: Iterable | None = None, total: int | None = None) -> Any:
        """As of `DiffusionPipeline`, over the steps that the scheduler left, which may be fewer than asked for.

        Args:
            iterable: as of `DiffusionPipeline`.
            total: as of `DiffusionPipeline`.
        """
        steps = None if total is None else -(-len(self.scheduler.timesteps) // self.scheduler.order)
        return super().progress_bar(iterable, steps if total is None else min(total, steps))

    @_with_interval(StableDiffusionXLPipeline.__call__)
    def __call__(
        self, *args, guidance_interval: tuple[float, float] | None = None, **kwargs
    ) -> StableDiffusionXLPipelineOutput | tuple:
        """As of `StableDiffusionXLPipeline`, guided where sigma_lo < sigma <= sigma_hi of guidance_interval.

        Args:
            *args: as of `StableDiffusionXLPipeline`.
            guidance_interval: (sigma_lo, sigma_hi), or None for the stock pipeline.
            **kwargs: as of `StableDiffusionXLPipeline`.

        Raises:
            ValueError: unless that is None or a pair with 0 <= sigma_lo < sigma_hi.
        """
        stock = StableDiffusionXLPipeline.__call__
        if guidance_interval is None:
            return stock(self, *args, **kwargs)
        interval = GuidanceInterval(self, guidance_interval=guidance_interval)
        output = interval.run(stock, self, *args, **kwargs)
        self._guidance_report = interval.report
        return output
