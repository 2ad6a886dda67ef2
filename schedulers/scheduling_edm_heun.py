r"""The stochastic second-order sampler of EDM: Karras et al., "Elucidating the Design Space of Diffusion-Based
Generative Models" (NeurIPS 2022, arXiv 2206.00364), Algorithm 2, for networks that return the denoised sample.

The schedule (equation 5) is n + 1 strictly decreasing noise levels, the last one 0:

.. math:: \sigma_i = (\sigma_{max}^{1/\rho} + \frac{i}{n-1} (\sigma_{min}^{1/\rho} - \sigma_{max}^{1/\rho}))^{\rho}

Step i goes from sigma_i to sigma_{i+1} and evaluates the network twice, the last step once:

    scheduler.set_timesteps(32)
    x = noise * scheduler.init_noise_sigma
    for i in range(scheduler.num_inference_steps):
        x, sigma_hat = scheduler.churn(x, generator=generator)                 # lines 4 to 6
        x = scheduler.step(denoise(x, sigma_hat), sigma_hat, x).prev_sample    # lines 7 and 8: Euler
        sigma = scheduler.sigmas[i + 1]
        if sigma > 0:
            x = scheduler.step(denoise(x, sigma), sigma, x).prev_sample        # lines 10 and 11: Heun

Without stochasticity (S_churn 0) `churn` changes nothing and may be left out; then the loop is the one of diffusers'
`HeunDiscreteScheduler`, over the 2n - 1 `timesteps`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# diffusers loads a saved scheduler only if the namespace of its module holds the name SchedulerMixin.
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .scheduler_arguments import check_generators, checked_arguments, is_of_kind, short


@dataclass
class EDMHeunSchedulerOutput(BaseOutput):
    """What an evaluation of an `EDMHeunScheduler` gives.

    Attributes:
        prev_sample: x after this evaluation, (batch, ...) in the state's dtype.
        pred_original_sample: the denoised sample that was given, in the same dtype.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class EDMHeunScheduler(SchedulerMixin, ConfigMixin):
    """Algorithm 2 of EDM with a float64 state (float32 on devices without float64).

    Args:
        sigma_min: last noise level before 0, > 0.
        sigma_max: first noise level, > sigma_min.
        rho: exponent of the schedule, > 0; larger values put more steps at low noise.
        S_churn: amount of stochasticity, >= 0; 0 is the deterministic sampler. A step adds noise by the factor
            gamma = min(S_churn / n, sqrt(2) - 1).
        S_min: noise is added in steps that start at a sigma in [S_min, S_max].
        S_max: None or infinite: no upper limit (None in the config, because JSON has no infinity).
        S_noise: factor on the standard deviation of the added noise, >= 0.

    Attributes:
        sigmas: after `set_timesteps`, as the others here: (n + 1,) float64 on the CPU, strictly decreasing to 0.
        timesteps: (2n - 1,) the sigma of each evaluation before churn, in order.
        step_index: the step that the next evaluation belongs to, which starts at `sigmas[step_index]`.
        begin_index: what `set_begin_index` set, or None.

    Raises:
        ValueError: for numbers out of range; the message names them.
    """

    order = 2

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        S_churn: float = 0.0,
        S_min: float = 0.0,
        S_max: float | None = float("inf"),
        S_noise: float = 1.0,
    ):
        limit = math.inf if S_max is None else S_max
        for name, value in {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}.items():
            _check_number(name, value, positive=True)
        for name, value in {"S_churn": S_churn, "S_min": S_min, "S_noise": S_noise}.items():
            _check_number(name, value)
        if sigma_min >= sigma_max:
            raise ValueError(f"sigma_min={sigma_min} must be smaller than sigma_max={sigma_max}: swap them.")
        if not is_of_kind(limit, float) or math.isnan(limit) or limit < S_min:
            raise ValueError(f"S_max={short(S_max)} must be a number >= S_min={S_min}, or None for no limit.")
        if math.isinf(limit):
            self.register_to_config(S_max=None)
        self.num_inference_steps = self.timesteps = self.sigmas = None
        self._step_index = self._begin_index = None

    @staticmethod
    def state_dtype(device: torch.device) -> torch.dtype:
        """dtype of the sample between steps: float64, or float32 on devices without it, which refuse to make one.

        Args:
            device: of the sample.
        """
        if device.type in ("npu", "xla"):  # which may take float64, and compute in less
            return torch.float32
        try:
            return torch.empty((), dtype=torch.float64, device=device).dtype
        except (TypeError, RuntimeError):
            return torch.float32

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the initial sample: the first sigma of the schedule."""
        return self.config.sigma_max if self.sigmas is None else self.sigmas[0].item()

    @property
    def step_index(self) -> int | None:
        """The step that the next evaluation belongs to, from 0; None before `set_timesteps`."""
        if self.num_inference_steps is None or self._step_index is not None:
            return self._step_index
        return (self._begin_index or 0) // self.order

    @property
    def begin_index(self) -> int | None:
        """The entry of `timesteps` at which a run starts, if it was set since the schedule was."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this entry of `timesteps` and leave those before it out; `set_timesteps` takes it back.

        As for every diffusers scheduler of order 2, step i starts at entry 2i. Without effect on a run under way.

        Args:
            begin_index: the entry, counted from 0.

        Raises:
            ValueError: for what is not the start of a step of the schedule.
        """
        entries = math.inf if self.timesteps is None else len(self.timesteps)
        if not is_of_kind(begin_index, int) or begin_index % self.order or not 0 <= begin_index < entries:
            raise ValueError(
                f"begin_index={short(begin_index)} must be an even number in [0, {entries}): an entry of timesteps at"
                " which a step starts, 2i for step i."
            )
        self._begin_index = int(begin_index)

    @checked_arguments(but="num_inference_steps")
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | torch.Tensor | None = None,
    ) -> None:
        """Set the schedule, by its number of steps or as a list, and go back to its start.

        Args:
            num_inference_steps: n, at least 1; n = 1 is one step from sigma_max to 0.
            device: where `timesteps` goes.
            sigmas: the n noise levels themselves, (n,), strictly decreasing and > 0; a last 0 may be left out.

        Raises:
            ValueError: unless exactly one of the two is given and it is as above, and for a rho so small or so large
                that float64 has no such sigmas.
        """
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError(
                f"Pass exactly one of num_inference_steps and sigmas, got {num_inference_steps=} and {sigmas=}."
            )
        table = self._karras_table(num_inference_steps) if sigmas is None else _checked_sigmas(sigmas)
        self.sigmas = torch.from_numpy(np.append(table, 0.0))
        self.num_inference_steps = len(table)
        device = torch.device("cpu" if device is None else device)
        timesteps = self.sigmas[:-1].repeat_interleave(2)[1:]
        self.timesteps = timesteps.to(device=device, dtype=self.state_dtype(device))
        self._step_index = self._begin_index = self._slope = self._start = None
        self._churned = False

    def _karras_table(self, n: int) -> np.ndarray:
        """Equation 5, (n,) float64."""
        if not is_of_kind(n, int) or n < 1:
            raise ValueError(f"num_inference_steps={short(n)} must be an integer >= 1.")
        try:
            first, last = (s ** (1 / self.config.rho) for s in (self.config.sigma_max, self.config.sigma_min))
            table = (first + np.arange(n) / max(n - 1, 1) * (last - first)) ** self.config.rho
        except OverflowError:
            table = np.zeros(n)
        if not np.isfinite(table).all() or table[-1] <= 0 or (table[1:] >= table[:-1]).any():
            raise ValueError(
                f"rho={self.config.rho} leaves no {n} decreasing sigmas from {self.config.sigma_max} to"
                f" {self.config.sigma_min} in float64: use a value near 7, or fewer steps."
            )
        return table

    @checked_arguments
    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample, as it is: the network scales its own input.

        Args:
            sample: (batch, ...).
            timestep: not used.
        """
        return sample

    @checked_arguments
    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: float | list[float] | torch.Tensor
    ) -> torch.Tensor:
        """x_0 + sigma epsilon, in the dtype of the samples.

        Args:
            original_samples: x_0, (batch, ...).
            noise: epsilon of unit variance, the shape of the samples.
            timesteps: sigma, one or (batch,), any numbers >= 0; entries of `timesteps` are such.

        Raises:
            ValueError: for noise of another shape, another number of sigmas, and sigmas on the CPU out of range.
        """
        if noise.shape != original_samples.shape:
            raise ValueError(f"noise must have the shape {tuple(original_samples.shape)}, got {tuple(noise.shape)}.")
        levels = torch.as_tensor(timesteps)
        if levels.numel() not in (1, len(original_samples)) or not _are_levels(levels):
            raise ValueError(
                f"timesteps must be finite numbers >= 0, one or one a sample, {len(original_samples)}, got"
                f" {short(timesteps)}."
            )
        sigma = torch.as_tensor(timesteps, dtype=original_samples.dtype, device=original_samples.device)
        sigma = sigma.reshape(-1, *[1] * (original_samples.ndim - 1))
        return original_samples + sigma * noise.to(original_samples)

    @checked_arguments
    def churn(
        self,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, float]:
        r"""Raise the noise level at the start of a step (lines 4 to 6); S_churn 0 raises nothing.

        .. math:: \hat\sigma = (1 + \gamma) \sigma_i, \quad
            \hat x = x + \sqrt{\hat\sigma^2 - \sigma_i^2} S_{noise} \epsilon

        Args:
            sample: x at sigma_i, (batch, ...).
            generator: draws epsilon in the state's dtype, one for all samples or one a sample. It draws at every step
                of a schedule with S_churn > 0, also where gamma is 0, so that S_min and S_max do not shift the noise.
            noise: epsilon itself, in place of a draw; the shape of sample.

        Returns:
            x_hat, in the state's dtype, and sigma_hat, where to evaluate the network.

        Raises:
            ValueError: in the middle of a step, before `set_timesteps` or after the last step, for noise of another
                shape or given with a generator.
        """
        self._check_running()
        if self._slope is not None:
            raise ValueError("churn belongs to the start of a step: call step on the second evaluation first.")
        if noise is not None and generator is not None:
            raise ValueError("Pass only one of generator and noise: the noise is drawn, or it is given.")
        if noise is not None and noise.shape != sample.shape:
            raise ValueError(f"noise must have the shape of sample, {tuple(sample.shape)}, got {tuple(noise.shape)}.")
        check_generators(generator, len(sample))
        x, config = sample.to(self.state_dtype(sample.device)), self.config
        sigma, gamma = self.sigmas[self._step_index].item(), 0.0
        if config.S_min <= sigma <= (math.inf if config.S_max is None else config.S_max):
            gamma = min(config.S_churn / self.num_inference_steps, math.sqrt(2) - 1)
        self._sigma_hat, self._churned = sigma * (1 + gamma), True
        if config.S_churn > 0:
            if noise is None:
                noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + math.sqrt(self._sigma_hat**2 - sigma**2) * config.S_noise * noise.to(x)
        return x, self._sigma_hat

    @checked_arguments
    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> EDMHeunSchedulerOutput | tuple:
        r"""Use one evaluation of the network; calls alternate between the two of a step.

        .. math:: d_i = (\hat x - D(\hat x; \hat\sigma)) / \hat\sigma, \quad
            x' = \hat x + (\sigma_{i+1} - \hat\sigma) d_i

        .. math:: d'_i = (x' - D(x'; \sigma_{i+1})) / \sigma_{i+1}, \quad
            x_{i+1} = \hat x + (\sigma_{i+1} - \hat\sigma) (d_i + d'_i) / 2

        Args:
            model_output: D, the denoised sample, (batch, ...).
            timestep: the sigma at which D was evaluated: sigma_hat, then sigma_{i+1}. Checked against the schedule.
            sample: where D was evaluated: x_hat, then x' as this function returned it.
            return_dict: `EDMHeunSchedulerOutput`, or the tuple (prev_sample, pred_original_sample).

        Returns:
            x' or, from the second call of a step and from the last step, x_{i+1}, in the state's dtype.

        Raises:
            ValueError: before `set_timesteps`, after the last step, for a timestep out of turn, and at the start of a
                step with S_churn > 0 if `churn` was not called.
        """
        self._check_running()
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the shape {tuple(sample.shape)}, got {tuple(model_output.shape)}."
            )
        if self._start is not None and sample.shape != self._start.shape:
            raise ValueError(f"sample must have the shape {tuple(self._start.shape)}, got {tuple(sample.shape)}.")
        dtype = self.state_dtype(sample.device)
        x, denoised = sample.to(dtype), model_output.to(dtype)
        sigma, sigma_next = self.sigmas[self._step_index : self._step_index + 2].tolist()
        if self._slope is None:
            sigma = self._first_sigma(sigma)
            self._check_timestep(timestep, sigma)
            slope = (x - denoised) / sigma
            prev_sample = x + (sigma_next - sigma) * slope
            if sigma_next > 0:
                self._slope, self._start, self._sigma_hat = slope, x, sigma
            else:
                self._step_index += 1
        else:
            self._check_timestep(timestep, sigma_next)
            slope = (x - denoised) / sigma_next
            prev_sample = self._start + (sigma_next - self._sigma_hat) * (0.5 * self._slope + 0.5 * slope)
            self._slope = self._start = None
            self._step_index += 1
        self._churned = False
        return EDMHeunSchedulerOutput(prev_sample, denoised) if return_dict else (prev_sample, denoised)

    def _first_sigma(self, sigma: float) -> float:
        """sigma_hat of this step."""
        if self._churned:
            return self._sigma_hat
        if self.config.S_churn > 0:
            raise ValueError(
                f"S_churn={self.config.S_churn} adds noise before each step: call x, sigma_hat = scheduler.churn(x,"
                " generator) first and evaluate the network there, or build the scheduler with S_churn=0."
            )
        return sigma

    def _check_running(self):
        if self.num_inference_steps is None:
            raise ValueError("The schedule is not set: call set_timesteps first.")
        self._step_index = self.step_index  # a run has begun
        if self._step_index >= self.num_inference_steps:
            raise ValueError(
                f"All {self.num_inference_steps} steps of the schedule are done: call set_timesteps to start again."
            )

    def _check_timestep(self, timestep: float | torch.Tensor, sigma: float):
        on_cpu = not isinstance(timestep, torch.Tensor) or timestep.device.type == "cpu"  # others would have to wait
        if isinstance(timestep, torch.Tensor) and timestep.numel() != 1:
            raise ValueError(f"timestep must be one sigma, got {short(timestep)}.")
        if on_cpu and not math.isclose(float(timestep), sigma, rel_tol=1e-4):
            which = "second" if self._slope is not None else "first"
            raise ValueError(
                f"timestep={float(timestep)} is out of turn: the {which} evaluation of step {self._step_index} is at"
                f" sigma {sigma}. Call step once for each evaluation, in order, and set_timesteps to start again."
            )


def _are_levels(sigmas: torch.Tensor) -> bool:
    """Whether they are finite and >= 0, if they are where they can be read at once."""
    if sigmas.is_complex() or sigmas.device.type != "cpu":
        return not sigmas.is_complex()
    return bool((sigmas.isfinite() & (sigmas >= 0)).all())


def _check_number(name: str, value: float, positive: bool = False):
    if not is_of_kind(value, float) or not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}={short(value)} must be a finite number {'> 0' if positive else '>= 0'}.")


def _checked_sigmas(sigmas) -> np.ndarray:
    """(n,) float64 without the last 0. Raises ValueError unless strictly decreasing, finite and > 0."""
    values = sigmas.detach().cpu() if isinstance(sigmas, torch.Tensor) else sigmas
    table = np.asarray(values, dtype=np.float64)
    if table.ndim == 1 and len(table) > 1 and table[-1] == 0:
        table = table[:-1]
    if table.ndim != 1 or len(table) == 0 or not np.isfinite(table).all() or table[-1] <= 0:
        raise ValueError(f"sigmas={sigmas} must be a list of finite numbers > 0, at least one (0 may be the last).")
    if (table[1:] >= table[:-1]).any():
        raise ValueError(f"sigmas={sigmas} must be strictly decreasing: sort them and drop repeated ones.")
    return table.copy()
