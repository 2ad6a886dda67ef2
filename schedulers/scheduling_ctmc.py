"""Sampling of discrete diffusion models in continuous time: SEDD, tauLDR, their samplers and timestep tables."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging

from .ctmc_config import build_kernel, build_noise_schedule, check_config
from .ctmc_kernels import race, uniform_noise
from .ctmc_noise_schedules import NoiseSchedule
from .timestep_edges import check_edges

logger = logging.get_logger(__name__)

LARGEST_LOG_SCORE = 40.0  # e^40 = 2e17
CHUNK = 2**22  # floats that a step works on at a time, so that its memory does not grow with batch x length x vocab

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class CTMCSchedulerOutput(BaseOutput):
    """prev_sample: (batch, length) int64, the tokens at the next, smaller time. prev_timestep: (batch,), that time.

    0 is the time of clean tokens.
    """

    prev_sample: torch.Tensor
    prev_timestep: torch.Tensor | None = None  # accelerate rebuilds outputs from one dict, taken as first field


class CTMCScheduler(SchedulerMixin, ConfigMixin):
    r"""Reverse of a continuous-time Markov chain on tokens (Campbell et al. 2205.14987; Lou et al. 2310.16834).

    Forward, every token jumps by itself with rates sigma(t) Q; in reverse, from token x to y, with

    .. math:: \hat R_t(x, y) = \sigma(t)\, Q[y, x]\, \frac{p_t(y)}{p_t(x)}

    `step` walks the edges 1 = t_0 > t_1 > ... > t_n = min_timestep; at the last edge it returns clean tokens:

        for t in scheduler.timesteps:  # n + 1 network calls, n for gillespie
            output = model(sample, scheduler.model_time(t, len(sample)))
            sample = scheduler.step(output, t, sample, generator).prev_sample

    kernel: what Q is. "absorbing" to a mask, "uniform", "gaussian" (ordered tokens, tauLDR), "birth_death" (to either
        neighbour).
    vocab_size: number of tokens; the mask of the absorbing kernel counts and is the last one.
    noise_schedule: "loglinear", "cosine", "arccos" (with `eps`), "geometric" (`sigma_min`, `sigma_max`),
        "exponential" (`time_base`, `time_exponential`), "constant" (`constant_rate`).
    sampler: "euler" (tau-leaping: the rates are held over a step), "tweedie" (each token by its exact posterior given
        the network's prediction; the analytic sampler of SEDD) or "gillespie" (k-Gillespie: decodes an exact number
        of masks a step, those that jump first).
    jumps: of the euler sampler. "categorical": one jump at most, with probabilities 1{x} + dt R. "poisson": the number
        of jumps to each token is Poisson distributed, the jumps are added and clamped to the vocabulary (tauLDR).
        None: "poisson" for ordered tokens, otherwise "categorical".
    prediction_type: what the network returns, (batch, length, vocab_size): "log_score", log p_t(y)/p_t(x), 0 at the
        current token; "x0", logits of p(x_0 | x_t); "probabilities", p(x_0 | x_t) itself. The column of the mask
        is not read.
    time_conditioning: what the network receives, sigma_bar(t) or the timestep t itself (tauLDR): `model_time`.
    num_corrector_steps, corrector_entry_time, corrector_step_size_multiplier: after each step that starts at a
        time <= the entry time, so many corrector steps of multiplier times the step's length; `step_correct` does one.
    timestep_tables: {"16": [t_0, ..., t_16], ...}, optimised edges by number of steps; timestep_table_info: where each
        comes from, kept in the config and not read. `set_timesteps(16)` takes the table if timestep_spacing is
        "table" or "interpolated_table", which differ where there is none for 16; "uniform" spaces the edges evenly.
    min_timestep: the last edge, where the final denoising takes place. eps: of the noise schedule.
    eps_ratio: added to the denominator P[x_0, x] of x0 predictions (1e-9 in tauLDR, 1e-6 in Jump Your Steps).
    rate_sigma, Q_sigma: of the gaussian kernel.

    Timesteps lie in (0, 1] and may be a number, a tensor (), or one a sample, (batch,). Raises ValueError for values
    outside of what is listed, and for combinations without a meaning, with the reason.
    """

    order = 1
    init_noise_sigma = 1.0  # tokens have no scale; for code that treats all schedulers alike

    @register_to_config
    def __init__(
        self,
        kernel: str = "absorbing",
        vocab_size: int = 50258,
        noise_schedule: str = "loglinear",
        sampler: str = "euler",
        prediction_type: str = "log_score",
        jumps: str | None = None,
        time_conditioning: str = "sigma_bar",
        num_corrector_steps: int = 0,
        corrector_entry_time: float = 1.0,
        corrector_step_size_multiplier: float = 1.0,
        timestep_tables: dict[str, list[float]] | None = None,
        timestep_table_info: dict[str, dict] | None = None,
        timestep_spacing: str = "uniform",
        min_timestep: float = 1e-5,
        eps: float = 1e-3,
        eps_ratio: float = 1e-9,
        sigma_min: float = 1e-4,
        sigma_max: float = 20.0,
        time_base: float = 3.0,
        time_exponential: float = 100.0,
        constant_rate: float = 1.0,
        rate_sigma: float = 6.0,
        Q_sigma: float = 512.0,
    ):
        check_config(self.config)
        self._kernel = build_kernel(self.config)
        self._noise: NoiseSchedule = build_noise_schedule(self.config)
        self._edges: list[float] | None = None
        self.num_inference_steps: int | None = None
        self.timesteps: torch.Tensor | None = None

    @property
    def mask_token_id(self) -> int | None:
        """The last token for the absorbing kernel; None for the others."""
        return self._kernel.mask if self.config.kernel == "absorbing" else None

    @property
    def jumps(self) -> str:
        """ "categorical" or "poisson", the config's None resolved."""
        return self.config.jumps or (
            "poisson" if self._kernel.ordered and self.config.sampler == "euler" else "categorical"
        )

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample, (batch, length), as it is: tokens have no scale."""
        return sample

    # Time

    def sigma_bar(self, timestep: float | torch.Tensor) -> torch.Tensor:
        """Total noise up to a time in [0, 1]; the shape and dtype of a tensor are kept, a number gives float32."""
        return self._at(self._noise.sigma_bar, timestep)

    def sigma(self, timestep: float | torch.Tensor) -> torch.Tensor:
        """Noise rate d sigma_bar / dt at a time in [0, 1]; shape and dtype as of `sigma_bar`."""
        return self._at(self._noise.sigma, timestep)

    @staticmethod
    def _at(function: Callable, timestep: float | torch.Tensor) -> torch.Tensor:
        if isinstance(timestep, torch.Tensor) and timestep.is_floating_point():
            return function(timestep)
        return function(torch.as_tensor(timestep, dtype=torch.float64)).float()

    def model_time(self, timestep: float | torch.Tensor, batch_size: int) -> torch.Tensor:
        """What the network receives beside the tokens, (batch_size,) float32: sigma_bar(t), or t."""
        timestep = torch.as_tensor(timestep)
        if self.config.time_conditioning == "timestep":
            return timestep.float().expand(batch_size)
        # as exact as the rates' sigma(t): in float32 near t = 1 they would disagree by 1e-5
        exact = self.sigma_bar(timestep.to("cpu", torch.float64))
        return exact.to(timestep.device, torch.float32).expand(batch_size)

    def transition_matrix(self, timestep: float, next_timestep: float = 0.0) -> torch.Tensor:
        """P[i, j] = P(x_t = j | x_s = i), (vocab, vocab) float64, from s = next_timestep to the larger t."""
        delta = self._sigma_bar(timestep) - (self._sigma_bar(next_timestep) if next_timestep else 0)
        return self._kernel.transition(delta)

    def rate_matrix(self, timestep: float) -> torch.Tensor:
        """Forward rates sigma(t) Q, [i, j] from i to j, (vocab, vocab) float64; its rows sum to 0."""
        return self._kernel.base_rate() * self._sigma(timestep)

    def _sigma_bar(self, time: float) -> float:
        return float(self._noise.sigma_bar(torch.tensor(time, dtype=torch.float64)))

    def _sigma(self, time: float) -> float:
        return float(self._noise.sigma(torch.tensor(time, dtype=torch.float64)))

    # Schedule

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | torch.Tensor | None = None,
    ) -> None:
        """Set the edges of the steps. `timesteps` then holds where the network is evaluated.

        num_inference_steps: n steps between n + 1 edges from 1 to `min_timestep`: the table for n if
            timestep_spacing is "table" and there is one (without one a warning, and even spacing). With
            "interpolated_table" a missing table is interpolated between those for the next smaller and larger n.
        timesteps: the n + 1 edges themselves, strictly decreasing in (0, 1]; they win.

        The network is evaluated at every edge, at the last one for the final denoising; with gillespie nothing is
        left to denoise there. Raises ValueError unless exactly one of the two is given.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"give num_inference_steps or timesteps, one of the two; got {num_inference_steps=}, {timesteps=}"
            )
        if timesteps is not None:
            edges = timesteps.tolist() if isinstance(timesteps, torch.Tensor) else [float(t) for t in timesteps]
            check_edges(edges, "timesteps")
        else:
            edges = self._edges_for(num_inference_steps)
        self._edges = edges
        self.num_inference_steps = len(edges) - 1
        evaluated = edges[:-1] if self.config.sampler == "gillespie" else edges
        self.timesteps = torch.tensor(evaluated, dtype=torch.float32, device=device)

    def _edges_for(self, steps: int) -> list[float]:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {steps!r}")
        tables = self.config.timestep_tables or {}
        spacing = self.config.timestep_spacing
        if spacing != "uniform":
            if str(steps) in tables:
                return [float(t) for t in tables[str(steps)]]
            if spacing == "interpolated_table" and tables:
                return _interpolated(tables, steps)
            logger.warning(
                f"timestep_spacing is {spacing!r}, but timestep_tables has none for {steps} steps, only for"
                f" {sorted(tables, key=int)}; the steps are spaced evenly"
            )
        return torch.linspace(1, self.config.min_timestep, steps + 1, dtype=torch.float64).tolist()

    @property
    def edges(self) -> torch.Tensor:
        """The n + 1 edges of the schedule as set, (n + 1,) float64 on the CPU. Raises ValueError if none is set."""
        if self._edges is None:
            raise ValueError("there is no schedule yet; call set_timesteps first")
        return torch.tensor(self._edges, dtype=torch.float64)

    def _edge_index(self, timestep: float | torch.Tensor) -> int:
        """Which edge a timestep is; the same for the whole batch."""
        times = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1).cpu()
        distance = (self.edges - times[0]).abs()
        index = int(distance.argmin())
        if distance[index] > 2e-7 or not torch.equal(times, times[:1].expand_as(times)):
            raise ValueError(
                f"timestep={timestep} is not one of the schedule's {[round(t, 6) for t in self._edges]}; pass one of"
                " them, or say where the step ends with next_timestep= (num_decode= for gillespie)"
            )
        return index

    # The chain forward

    def sample_prior(self, shape: tuple[int, ...], generator: Generators = None, device=None) -> torch.Tensor:
        """Tokens at time 1, int64 of the shape (batch, length): masks, uniform ones, or of the kernel's Gaussian."""
        device = torch.device("cpu" if device is None else device)
        if not isinstance(generator, list):
            return self._kernel.sample_prior(tuple(shape), generator, device)
        _check_generators(generator, shape[0])
        return torch.cat([self._kernel.sample_prior((1, *shape[1:]), one, device) for one in generator])

    def prior_probabilities(self) -> torch.Tensor:
        """The law from which `sample_prior` draws each token, (vocab,) float64."""
        return self._kernel.prior()

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | Generators,
        timesteps: float | torch.Tensor,
    ) -> torch.Tensor:
        """Tokens at a time t > 0 given clean ones: a draw from P_{0t}[x_0, .] at every position.

        original_samples: (batch, length) int64. timesteps: a number or (batch,).
        noise: a generator, a list of one a sample or None to draw; or recorded uniforms in [0, 1) to replay, so that
            two times can share them: (batch, length) for the absorbing kernel, which masks where they are below
            1 - exp(-sigma_bar); a pair (uniforms, target tokens) of (batch, length) for the uniform kernel; or
            (batch, length, vocab) for a race of exponential clocks over the law of each token, uniform and ordered
            kernels.
        """
        x0 = original_samples
        self._check_tokens(x0)
        recorded = isinstance(noise, torch.Tensor | tuple)
        if recorded:
            self._check_noise_of_add_noise(noise, x0)
        elif isinstance(noise, list):
            _check_generators(noise, len(x0))
        sigma = self._noise.sigma_bar(torch.tensor(self._times(timesteps, len(x0)), dtype=torch.float64))
        sigma = sigma[:, None] if self._kernel.ordered else sigma[:, None].to(x0.device, torch.float32)
        if recorded:
            noise = tuple(n.to(x0.device) for n in noise) if isinstance(noise, tuple) else noise.to(x0.device)
        if not isinstance(noise, list) and not self._kernel.ordered:
            generator, noise = (None, noise) if recorded else (noise, None)
            return self._kernel.perturb(x0, sigma, noise, generator)
        noisy = torch.empty_like(x0)
        for b in range(len(x0)):
            row, generator = slice(b, b + 1), noise[b] if isinstance(noise, list) else None if recorded else noise
            noisy[row] = self._kernel.perturb(x0[row], sigma[row], noise[row] if recorded else None, generator)
        return noisy

    def add_noise_by_count(
        self, original_samples: torch.Tensor, noise: torch.Tensor | Generators, num_decoded: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens with exactly `num_decoded` of them unmasked a sample, and the time at which that happens (absorbing).

        The positions with the smallest uniforms are masked, as `add_noise` with the same uniforms masks them at that
        time. original_samples: (batch, length). noise: uniforms (batch, length) or a generator.
        Returns tokens (batch, length) int64 and times (batch,) float32 in [min_timestep, 1].

        Raises ValueError for another kernel or noise schedule than absorbing and loglinear, and for a number of tokens
        below 0 or above the length.
        """
        x0 = original_samples
        self._check_tokens(x0)
        if self.config.kernel != "absorbing" or self.config.noise_schedule != "loglinear":
            raise ValueError(
                "add_noise_by_count needs kernel='absorbing' and noise_schedule='loglinear', whose share of masked"
                f" tokens is (1 - eps) t; this is {self.config.kernel!r} with {self.config.noise_schedule!r}"
            )
        if not 0 <= num_decoded <= x0.shape[1]:
            raise ValueError(f"num_decoded must be in [0, {x0.shape[1]}], the length, got {num_decoded}")
        if not isinstance(noise, torch.Tensor):
            groups = self._groups(x0, 1.0, noise)
            noise = torch.cat([uniform_noise(x0[rows].shape, one, x0.device) for rows, _, one in groups])
        order = noise.argsort(dim=1)[:, : x0.shape[1] - num_decoded]
        masked = x0.scatter(1, order, self._kernel.mask)
        last = noise.gather(1, order[:, -1:])[:, 0] if order.shape[1] else torch.zeros(len(x0), device=x0.device)
        return masked, (last / (1 - self.config.eps)).clamp(self.config.min_timestep, 1)

    # The chain in reverse

    def reverse_rates(
        self, model_output: torch.Tensor, timestep: float | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Rates of jumping from each current token x to every token y, (batch, length, vocab) float32.

        A row sums to 0: the entry of the current token is minus the rate of leaving it. Positions that the absorbing
        kernel has decoded never jump again; their rows are 0.

        model_output: (batch, length, vocab), see `prediction_type`. sample: (batch, length) int64.
        """
        self._check_step_inputs(model_output, sample)
        result = torch.zeros(model_output.shape, dtype=torch.float32, device=model_output.device)
        for rows, time, _ in self._groups(sample, timestep, None):
            target, output, x = result[rows].flatten(0, 1), model_output[rows].flatten(0, 1), sample[rows].flatten()
            for chosen in self._chunks(x):
                rates = self._rates(output[chosen].float(), x[chosen], time)
                target[chosen] = rates.scatter_(1, x[chosen, None], -rates.sum(1, keepdim=True))
        return result

    def _rates(self, output: torch.Tensor, x: torch.Tensor, time: float) -> torch.Tensor:
        """Reverse rates of n positions, (n, vocab), 0 at the current token; output: (n, vocab) float32."""
        score = self._score(output, x, time)
        return self._kernel.times_jumps_into(score, x).mul_(self._sigma(time))

    def _score(self, output: torch.Tensor, x: torch.Tensor, time: float) -> torch.Tensor:
        if self.config.prediction_type == "log_score":
            return output.exp()
        return self._kernel.score(self._x0_law(output), x, self._sigma_bar(time), self.config.eps_ratio)

    def _x0_law(self, output: torch.Tensor) -> torch.Tensor:
        """p(x_0 | x) of n positions, a new tensor (n, vocab)."""
        output = output.clone()
        if self.config.prediction_type == "x0":
            if self.config.kernel == "absorbing":
                output[:, -1] = -math.inf
            return output.softmax(dim=1)
        if self.config.kernel == "absorbing":
            output[:, -1] = 0
        return output

    def _weights(self, output: torch.Tensor, x: torch.Tensor, time: float, next_time: float) -> torch.Tensor:
        """Weights of the next token of n positions after a step of the euler or the tweedie sampler, (n, vocab)."""
        if self.config.sampler == "euler":
            weights = self._rates(self._bounded(output)[0], x, time).mul_(time - next_time)
            return weights.scatter_(1, x.unsqueeze(1), 1 - weights.sum(1, keepdim=True))
        now, then = self._sigma_bar(time), self._sigma_bar(next_time)
        if self.config.prediction_type == "log_score":
            return self._kernel.tweedie_weights(self._bounded(output)[0].exp_(), x, now - then)
        return self._kernel.posterior_weights(self._x0_law(output), x, now, then, self.config.eps_ratio)

    def _bounded(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Log scores (n, vocab) whose exponentials neither overflow nor vanish; what was taken from each row, (n, 1).

        Only a row whose largest score lies outside of +-LARGEST_LOG_SCORE changes. Beyond, a jump is certain in a step
        of any length, or never comes, and its target depends on ratios alone. Other predictions come back as they are.
        """
        if self.config.prediction_type != "log_score":
            return output, 0.0
        real = output[:, :-1] if self.config.kernel == "absorbing" else output
        largest = real.amax(dim=1, keepdim=True)
        excess = largest - largest.clamp(-LARGEST_LOG_SCORE, LARGEST_LOG_SCORE)
        excess = excess.masked_fill(largest.isinf(), 0)
        return (output - excess).clamp_(max=LARGEST_LOG_SCORE), excess

    def _final_weights(self, output: torch.Tensor, x: torch.Tensor, time: float) -> torch.Tensor:
        """Weights of the clean token of n positions, (n, vocab), 0 for the mask."""
        if self.config.prediction_type != "log_score":
            return self._x0_law(output)
        if self.config.kernel == "uniform":
            return self._kernel.tweedie_weights(self._bounded(output)[0].exp_(), x, self._sigma_bar(time))
        weights = self._bounded(output)[0].exp_()
        weights[:, -1] = 0
        return weights

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        *,
        next_timestep: float | torch.Tensor | None = None,
        num_decode: int | torch.Tensor | None = None,
        noise: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        return_dict: bool = True,
    ) -> CTMCSchedulerOutput | tuple:
        """One step of the sampler, from a timestep to the next edge; at the last edge, the final denoising.

        model_output: (batch, length, vocab) at `sample` and `timestep`. sample: (batch, length) int64.
        timestep: an edge of the schedule; or any time, also one a sample, (batch,), together with next_timestep or,
            for gillespie, num_decode.
        next_timestep: where the step ends; it may lie below 0 for euler, which knows its length only.
        num_decode: how many masks a sample gillespie decodes, an integer or (batch,); a sample with fewer masks left
            decodes those.
        generator: one, or a list of one a sample, which makes a sample independent of its batch.
        noise: instead of a generator, recorded uniforms in [0, 1) (batch, length, vocab); for jumps="poisson" the
            counts themselves; for gillespie a pair, uniforms (batch, length) of the holding times and (batch,
            num_decode, vocab - 1) of the tokens in the order in which they are decoded; for the final denoising of
            the absorbing kernel (batch, length, vocab - 1).

        Raises ValueError for other shapes, for times that are no edges where the step's end is not given, do not
        decrease or leave (0, 1], and for num_decode with another sampler than gillespie.
        """
        self._check_step_inputs(model_output, sample)
        if self.config.sampler == "gillespie":
            sample, time = self._gillespie(model_output, timestep, sample, generator, next_timestep, num_decode, noise)
        elif num_decode is not None:
            raise ValueError(f"num_decode={num_decode} is for sampler='gillespie', this is {self.config.sampler!r}")
        else:
            if next_timestep is None:
                index = self._edge_index(timestep)
                if index == self.num_inference_steps:
                    denoised = self.denoise(model_output, timestep, sample, generator, noise=noise)
                    return self._output(denoised, 0.0, return_dict)
                timestep, next_timestep = self._edges[index : index + 2]
            self._check_order(timestep, next_timestep)
            if self.jumps == "poisson":
                sample = self._leap(self._rates, model_output, timestep, next_timestep, sample, generator, noise)
            else:
                times = self._both_times(timestep, next_timestep, len(sample))
                sample = self._draw(self._weights, model_output, times, sample, generator, noise)
            time = next_timestep
        return self._output(sample, time, return_dict)

    @staticmethod
    def _output(sample: torch.Tensor, time: float | torch.Tensor, return_dict: bool) -> CTMCSchedulerOutput | tuple:
        time = torch.as_tensor(time, dtype=torch.float32, device=sample.device).expand(len(sample))
        return CTMCSchedulerOutput(prev_sample=sample, prev_timestep=time) if return_dict else (sample, time)

    def step_correct(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        step_size: float,
        generator: Generators = None,
        *,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> CTMCSchedulerOutput | tuple:
        r"""One corrector step at a fixed time: a leap with the rates R_t + \hat R_t, which leave p_t as it is.

        R_t(x, y) = sigma(t) Q[x, y] are the forward rates out of the current token (2205.14987, section 4.3).
        model_output: at `sample` and `timestep`. step_size: the time that the leap takes; it is a multiple,
        `corrector_step_size_multiplier`, of the length of the step before, in tauLDR. noise: as in `step`.

        Raises ValueError for other shapes, with gillespie, and for a step_size that is not finite and > 0.
        """
        self._check_step_inputs(model_output, sample)
        if self.config.sampler == "gillespie":
            raise ValueError("sampler='gillespie' counts decoded tokens and a corrector masks them again; use 'euler'")
        if not (isinstance(step_size, Real) and math.isfinite(step_size) and step_size > 0):
            raise ValueError(f"step_size must be a finite number > 0, got {step_size!r}")

        def rates(output, x, time):
            return self._rates(output, x, time).add_(self._kernel.jumps_from(x), alpha=self._sigma(time))

        def weights(output, x, time, _):
            change = rates(output, x, time).mul_(step_size)
            return change.scatter_(1, x.unsqueeze(1), 1 - change.sum(1, keepdim=True))

        times = self._both_times(timestep, timestep, len(sample))
        if self.jumps == "poisson":
            ends = [time - step_size for time, _ in times]
            corrected = self._leap(
                rates, model_output, timestep, torch.tensor(ends, dtype=torch.float64), sample, generator, noise
            )
        else:
            corrected = self._draw(weights, model_output, times, sample, generator, noise, everywhere=True)
        return self._output(corrected, timestep, return_dict)

    def denoise(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        *,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Clean tokens (batch, length): what is left of the noise at a timestep is removed at once.

        The absorbing kernel draws a token for each mask that is left. Log scores of the uniform kernel are drawn from
        by one tweedie step to time 0. Predictions of x_0 of the other kernels give their most probable token.
        noise: recorded uniforms (batch, length, vocab), without the mask's column for the absorbing kernel.
        """
        self._check_step_inputs(model_output, sample)
        if self.config.kernel != "absorbing" and self.config.prediction_type != "log_score":
            return model_output.argmax(dim=-1)
        times = self._both_times(timestep, timestep, len(sample))

        def weights(output, x, time, _):
            return self._final_weights(output, x, time)

        return self._draw(weights, model_output, times, sample, generator, noise, real_tokens_only=True)

    # Drawing, position by position in chunks

    def _draw(
        self, weights, output, times, sample, generator, noise, everywhere=False, real_tokens_only=False
    ) -> torch.Tensor:
        """New tokens by one race a position. weights(output, x, time, next_time) acts on n positions, (n, vocab)."""
        columns = self.config.vocab_size - (real_tokens_only and self.config.kernel == "absorbing")
        _check_recorded(noise, (*sample.shape, columns))
        result = sample.clone()
        for rows, (time, next_time), one in self._groups(sample, times, generator):
            x, flat_output = sample[rows].flatten(), output[rows].flatten(0, 1)
            recorded = None if noise is None else noise[rows].flatten(0, 1).to(x.device)
            new = x.clone()
            for chosen in self._chunks(x, everywhere):
                values = weights(flat_output[chosen].float(), x[chosen], time, next_time)[:, :columns]
                new[chosen] = race(values, None if recorded is None else recorded[chosen], one)
            result[rows] = new.view_as(sample[rows])
        return result

    def _leap(self, rates, output, timestep, next_timestep, sample, generator, noise) -> torch.Tensor:
        """Tokens plus all jumps of a Poisson number of them to each token, clamped to the vocabulary."""
        _check_recorded(noise, output.shape)
        result, last = sample.clone(), self.config.vocab_size - 1
        tokens = torch.arange(last + 1, device=sample.device, dtype=torch.float32)
        times = self._both_times(timestep, next_timestep, len(sample))
        for rows, (time, next_time), one in self._groups(sample, times, generator):
            x, flat_output = sample[rows].flatten(), output[rows].flatten(0, 1)
            recorded = None if noise is None else noise[rows].flatten(0, 1).to(x.device)
            new = x.clone()
            for chosen in self._chunks(x):
                if recorded is not None:
                    counts = recorded[chosen].float()
                else:
                    mean = rates(flat_output[chosen].float(), x[chosen], time).mul_(time - next_time)
                    source = mean.device if one is None else one.device
                    counts = torch.poisson(mean.to(source), generator=one).to(mean.device)
                jumps = counts @ tokens - counts.sum(1) * x[chosen]
                new[chosen] = (x[chosen] + jumps.round().long()).clamp(0, last)
            result[rows] = new.view_as(sample[rows])
        return result

    def _gillespie(self, output, timestep, sample, generator, next_timestep, num_decode, noise):
        """Decode the masks with the shortest holding times; tokens (batch, length) and the times reached (batch,)."""
        masked = sample == self._kernel.mask
        counts = torch.tensor(self._counts(timestep, sample, next_timestep, num_decode), device=sample.device)
        _check_recorded(noise[0] if noise else None, sample.shape)
        holding = self._holding_times(output, timestep, sample, generator, None if noise is None else noise[0])
        ranks = holding.argsort(dim=1).argsort(dim=1)
        chosen = masked & (ranks < counts.unsqueeze(1))
        result = sample.clone()
        for rows, time, one in self._groups(sample, timestep, generator):
            x, flat_output = sample[rows].flatten(), output[rows].flatten(0, 1)
            new = x.clone()
            for part in chosen[rows].flatten().nonzero().squeeze(1).split(self._rows()):
                weights = self._rates(self._bounded(flat_output[part].float())[0], x[part], time)[:, :-1]
                recorded = None
                if noise is not None:
                    batch = torch.arange(len(sample), device=x.device)[rows][part // sample.shape[1]]
                    recorded = noise[1].to(x.device)[batch, ranks[rows].flatten()[part]]
                new[part] = race(weights, recorded, one)
            result[rows] = new.view_as(sample[rows])
        elapsed = holding.masked_fill(~chosen, 0).amax(dim=1).float()
        times = torch.tensor(self._times(timestep, len(sample)), dtype=torch.float32, device=sample.device)
        least = self.config.min_timestep
        finished = (chosen == masked).all(dim=1)
        return result, (times - elapsed).clamp(min=least).masked_fill(finished, least)

    def _holding_times(self, output, timestep, sample, generator, uniforms) -> torch.Tensor:
        """Time until each mask jumps at its present rate, (batch, length); infinite for decoded positions."""
        wide = torch.float32 if sample.device.type == "mps" else torch.float64  # for the times of unlikely scores
        holding = torch.full(sample.shape, math.inf, device=sample.device, dtype=wide)
        for rows, time, one in self._groups(sample, timestep, generator):
            x, flat_output, times = sample[rows].flatten(), output[rows].flatten(0, 1), holding[rows].flatten()
            u = uniform_noise(x.shape, one, x.device) if uniforms is None else uniforms[rows].flatten().to(x.device)
            for part in self._chunks(x):
                bounded, excess = self._bounded(flat_output[part].float())
                ticks = -torch.log(u[part]) / self._rates(bounded, x[part], time).sum(dim=1)
                times[part] = ticks.to(wide) * torch.as_tensor(excess, dtype=wide).neg().exp().flatten()
            holding[rows] = times.view_as(sample[rows])
        return holding

    def _counts(self, timestep, sample, next_timestep, num_decode) -> list[int]:
        """How many masks of each sample a gillespie step decodes."""
        if next_timestep is not None:
            raise ValueError(f"next_timestep={next_timestep}: sampler='gillespie' takes num_decode= instead")
        if num_decode is None:
            index = self._edge_index(timestep)
            if index == self.num_inference_steps:
                raise ValueError(f"timestep={timestep} is the last edge, where gillespie has decoded everything")
            return self.num_decode(sample, index)
        counts = torch.as_tensor(num_decode).expand(len(sample)).tolist()
        if any(isinstance(k, float) or k < 0 for k in counts):
            raise ValueError(f"num_decode must be an integer >= 0, or one a sample, got {num_decode}")
        return counts

    def num_decode(self, sample: torch.Tensor, step_index: int) -> list[int]:
        """How many masks of each sample step `step_index` of the schedule decodes with gillespie.

        At an edge t of the schedule ceil(length (t - t_n) / (1 - t_n)) tokens are still masked, t_n the last edge: a
        token-count table k_0 = 0 < k_1 < ... < k_n = length is the table of times 1 - k_i / length, t_n small.
        Where other tokens were given from the start, the same share of the masks stays. sample: (batch, length).
        """
        length, last = sample.shape[1], self._edges[-1]
        ends = self._edges[step_index : step_index + 2]
        now, then = (math.ceil(length * (t - last) / (1 - last) - 1e-9 * length) for t in ends)
        masked = (sample == self._kernel.mask).sum(1).tolist()
        return [left - (-(-left * then // now) if now else 0) for left in masked]

    def _rows(self) -> int:
        return max(1, CHUNK // self.config.vocab_size)

    def _chunks(self, x: torch.Tensor, everywhere: bool = False) -> Iterator[torch.Tensor]:
        """Indices of the positions that may jump, a bounded number at a time. x: (n,) tokens."""
        if self.config.kernel == "absorbing" and not everywhere:
            positions = (x == self._kernel.mask).nonzero().squeeze(1)
        else:
            positions = torch.arange(len(x), device=x.device)
        return iter(positions.split(self._rows())) if len(positions) else iter(())

    def _groups(self, sample: torch.Tensor, times, generator: Generators) -> Iterator[tuple]:
        """(slice of the batch, its time, its generator): the whole batch where all share both, else sample by sample.

        times: a number, a tensor () or (batch,), or a list of one entry a sample.
        """
        batch = len(sample)
        if not isinstance(times, list):
            times = self._times(times, batch)
        if isinstance(generator, list):
            _check_generators(generator, batch)
        elif all(time == times[0] for time in times):
            yield slice(0, batch), times[0], generator
            return
        for b in range(batch):
            yield slice(b, b + 1), times[b], generator[b] if isinstance(generator, list) else generator

    @staticmethod
    def _times(timestep: float | torch.Tensor, batch: int) -> list[float]:
        times = torch.as_tensor(timestep, dtype=torch.float64, device="cpu").reshape(-1)
        if len(times) not in (1, batch):
            raise ValueError(f"timestep must be one time or one a sample, {batch}, got {len(times)}")
        if not bool(((times > 0) & (times <= 1)).all()):
            raise ValueError(f"timestep must lie in (0, 1], got {times.tolist()}")
        return times.expand(batch).tolist()

    def _both_times(self, timestep, next_timestep, batch: int) -> list[tuple[float, float]]:
        starts = self._times(timestep, batch)
        ends = torch.as_tensor(next_timestep, dtype=torch.float64, device="cpu").reshape(-1).expand(batch).tolist()
        return list(zip(starts, ends, strict=True))

    # Checks

    def _check_order(self, timestep, next_timestep) -> None:
        pair = (torch.as_tensor(t, dtype=torch.float64, device="cpu").reshape(-1) for t in (timestep, next_timestep))
        start, end = pair
        if not bool((end < start).all()) or (self.config.sampler == "tweedie" and bool((end < 0).any())):
            least = "in [0, " if self.config.sampler == "tweedie" else "below ("
            raise ValueError(f"next_timestep must be {least}timestep={timestep}), got {next_timestep}")

    def _check_tokens(self, tokens: torch.Tensor) -> None:
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or not len(tokens):
            raise ValueError(
                f"tokens must be int64 (batch, length), got {tokens.dtype} {tuple(tokens.shape)}; use .long()"
            )

    def _check_step_inputs(self, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        self._check_tokens(sample)
        expected = (*sample.shape, self.config.vocab_size)
        if tuple(model_output.shape) != expected:
            raise ValueError(
                f"model_output must be (batch, length, vocab_size) = {expected}, got {tuple(model_output.shape)}"
            )

    def _check_noise_of_add_noise(self, noise, x0: torch.Tensor) -> None:
        shapes = [tuple(n.shape) for n in noise] if isinstance(noise, tuple) else tuple(noise.shape)
        plain, full = tuple(x0.shape), (*x0.shape, self.config.vocab_size)
        allowed = {"absorbing": [plain], "uniform": [[plain, plain], full]}.get(self.config.kernel, [full])
        if shapes not in allowed:
            raise ValueError(f"noise of kernel={self.config.kernel!r} must have the shape {allowed}, got {shapes}")


def _interpolated(tables: dict[str, list[float]], steps: int) -> list[float]:
    """Edges for a number of steps between those of two tables, by linear interpolation over the share of steps done.

    Between the next smaller and the next larger number of steps they are mixed in proportion to the logarithms;
    beyond the smallest and the largest table, these alone are stretched.
    """
    numbers = sorted(map(int, tables))
    low = max((n for n in numbers if n < steps), default=numbers[0])
    high = min((n for n in numbers if n > steps), default=numbers[-1])
    share = 0.0 if low == high else math.log(steps / low) / math.log(high / low)
    places = np.linspace(0, 1, steps + 1)
    near, far = (np.interp(places, np.linspace(0, 1, n + 1), tables[str(n)]) for n in (low, high))
    return ((1 - share) * near + share * far).tolist()


def _check_recorded(noise: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if noise is not None and tuple(noise.shape) != tuple(shape):
        raise ValueError(f"noise must have the shape {tuple(shape)}, got {tuple(noise.shape)}")


def _check_generators(generators: list[torch.Generator], batch: int) -> None:
    if len(generators) != batch:
        raise ValueError(f"generator is a list of {len(generators)}, the batch has {batch} samples; give one a sample")
