"""Sampling of discrete diffusion models in continuous time: SEDD, tauLDR, their samplers and timestep tables."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging

from .ctmc_config import check_config
from .ctmc_draws import Generators, check_generators, uniforms
from .ctmc_kernels import AbsorbingKernel, ReversibleKernel, UniformKernel, build_kernel
from .ctmc_noise_schedules import NoiseSchedule, build_noise_schedule
from .ctmc_reverse import ReverseChain
from .ctmc_samplers import CHUNK, Sampler, build_sampler, check_recorded, chunks, denoise, groups, movable
from .scheduler_arguments import checked_arguments, is_of_kind, short
from .timestep_edges import StepEdges, check_edges, interpolated_edges, times_of

logger = logging.get_logger(__name__)


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
            output = model(sample, scheduler.model_time(t, len(sample))).sample
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
        self.kernel: AbsorbingKernel | UniformKernel | ReversibleKernel = build_kernel(self.config)
        self._noise: NoiseSchedule = build_noise_schedule(self.config)
        self.reverse = ReverseChain(self.kernel, self._noise, prediction_type, eps_ratio)
        self.sampler: Sampler = build_sampler(self.config, self.reverse)
        self._steps: StepEdges | None = None
        self.num_inference_steps: int | None = None
        self.timesteps: torch.Tensor | None = None

    @property
    def mask_token_id(self) -> int | None:
        """The last token for the absorbing kernel; None for the others."""
        return self.kernel.mask

    @property
    def jumps(self) -> str:
        """ "categorical" or "poisson", the config's None resolved."""
        return self.sampler.jumps

    @checked_arguments
    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample, (batch, length), as it is: tokens have no scale."""
        return sample

    # Time

    @checked_arguments
    def sigma_bar(self, timestep: float | list[float] | torch.Tensor) -> torch.Tensor:
        """Total noise up to a time in [0, 1]; the shape and dtype of a tensor are kept, a number gives float32."""
        return self._at(self._noise.sigma_bar, timestep)

    @checked_arguments
    def sigma(self, timestep: float | list[float] | torch.Tensor) -> torch.Tensor:
        """Noise rate d sigma_bar / dt at a time in [0, 1]; shape and dtype as of `sigma_bar`."""
        return self._at(self._noise.sigma, timestep)

    @staticmethod
    def _at(function: Callable, timestep: float | list[float] | torch.Tensor) -> torch.Tensor:
        on_device = isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu"  # not read
        if not on_device and not all(0 <= time <= 1 for time in times_of(timestep)):
            raise ValueError(f"timestep must lie in [0, 1], got {timestep}")
        if isinstance(timestep, torch.Tensor):
            return function(timestep if timestep.is_floating_point() else timestep.float())
        return function(torch.as_tensor(timestep, dtype=torch.float64)).float()

    @checked_arguments
    def model_time(
        self, timestep: float | list[float] | torch.Tensor, batch_size: int, device: str | torch.device | None = None
    ) -> torch.Tensor:
        """What the network receives beside the tokens, (batch_size,) float32: sigma_bar(t), or t.

        device: of the result; by default the timestep's. An entry of `timesteps` was computed with the schedule; times
        on the host are computed in float64; other times on a device are computed there in float32.

        Raises ValueError for times outside of [0, 1], another number of them, and a batch_size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be an integer >= 1, got {batch_size}")
        index = self._steps.known(timestep) if self._steps else None
        if index is not None:
            time = self._steps.model_times[index]
        elif isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            time = self._conditioning(timestep.float(), self._noise.stable or self._noise)
        else:
            if not all(0 <= one <= 1 for one in times_of(timestep)):
                raise ValueError(f"timestep must lie in [0, 1], got {timestep}")
            time = self._conditioning(torch.as_tensor(timestep, dtype=torch.float64), self._noise).float()
            if time.ndim == 0:
                return torch.full((batch_size,), float(time), dtype=torch.float32, device=device)
        self._check_number(time.numel(), batch_size)
        return (time if device is None else time.to(device)).reshape(-1).expand(batch_size)

    def _conditioning(self, times: torch.Tensor, noise: NoiseSchedule) -> torch.Tensor:
        return times if self.config.time_conditioning == "timestep" else noise.sigma_bar(times)

    @checked_arguments
    def transition_matrix(self, timestep: float, next_timestep: float = 0.0) -> torch.Tensor:
        """P[i, j] = P(x_t = j | x_s = i), (vocab, vocab) float64, from s = next_timestep to the larger t.

        Raises ValueError unless 0 <= s <= t <= 1.
        """
        if not 0 <= next_timestep <= timestep <= 1:
            raise ValueError(f"need 0 <= next_timestep <= timestep <= 1, got {next_timestep=} and {timestep=}")
        earlier = self.reverse.sigma_bar(next_timestep) if next_timestep else 0
        return self.kernel.transition(self.reverse.sigma_bar(timestep) - earlier)

    @checked_arguments
    def rate_matrix(self, timestep: float) -> torch.Tensor:
        """Forward rates sigma(t) Q, [i, j] from i to j, (vocab, vocab) float64; its rows sum to 0.

        Raises ValueError for a time outside of [0, 1].
        """
        if not 0 <= timestep <= 1:
            raise ValueError(f"timestep must lie in [0, 1], got {timestep}")
        return self.kernel.base_rate() * self.reverse.sigma(timestep)

    # Schedule

    @checked_arguments(but="num_inference_steps")
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
        self.num_inference_steps = len(edges) - 1
        # gillespie has nothing left to evaluate at the last edge
        evaluated = len(edges) - self.sampler.counts_tokens
        self._steps = StepEdges(edges, evaluated, lambda times: self._conditioning(times, self._noise), device)
        self.timesteps = self._steps.timesteps
        if self.kernel.ordered and self.timesteps.device.type != "cpu":
            self.kernel.prepare(self.sampler.noise_levels(edges), self.timesteps.device)

    def _edges_for(self, steps: int) -> list[float]:
        if not is_of_kind(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {short(steps)}")
        tables = self.config.timestep_tables or {}
        spacing = self.config.timestep_spacing
        if spacing != "uniform":
            if str(steps) in tables:
                return [float(t) for t in tables[str(steps)]]
            if spacing == "interpolated_table" and tables:
                return interpolated_edges(tables, steps)
            logger.warning(
                f"timestep_spacing is {spacing!r}, but timestep_tables has none for {steps} steps, only for"
                f" {sorted(tables, key=int)}; the steps are spaced evenly"
            )
        return torch.linspace(1, self.config.min_timestep, steps + 1, dtype=torch.float64).tolist()

    @property
    def edges(self) -> torch.Tensor:
        """The n + 1 edges of the schedule as set, (n + 1,) float64 on the CPU. Raises ValueError if none is set."""
        return torch.tensor(self._schedule().edges, dtype=torch.float64)

    def _schedule(self) -> StepEdges:
        if self._steps is None:
            raise ValueError("there is no schedule yet; call set_timesteps first")
        return self._steps

    # The chain forward

    @checked_arguments
    def sample_prior(
        self, shape: tuple[int, ...], generator: Generators = None, device: str | torch.device | None = None
    ) -> torch.Tensor:
        """Tokens at time 1, int64 of the shape (batch, length): masks, uniform ones, or of the kernel's Gaussian.

        Raises ValueError for another shape, and for a list of generators that are not one a sample.
        """
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shape must be (batch, length), both >= 1, got {shape}")
        if isinstance(generator, list):
            check_generators(generator, shape[0])
        return self.kernel.sample_prior(tuple(shape), generator, torch.device("cpu" if device is None else device))

    def prior_probabilities(self) -> torch.Tensor:
        """The law from which `sample_prior` draws each token, (vocab,) float64."""
        return self.kernel.prior()

    @checked_arguments
    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | Generators,
        timesteps: float | list[float] | torch.Tensor,
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
        generator, recorded = (None, noise) if isinstance(noise, torch.Tensor | tuple) else (noise, None)
        if recorded is not None:
            self._check_noise_of_add_noise(recorded, x0)
            pair = isinstance(recorded, tuple)
            recorded = tuple(n.to(x0.device) for n in recorded) if pair else recorded.to(x0.device)
        elif isinstance(generator, list):
            check_generators(generator, len(x0))
        sigma = [self.reverse.sigma_bar(t) for t in self._times(timesteps, len(x0))]
        return self.kernel.perturb(x0, sigma, recorded, generator)

    @checked_arguments
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
        if self.kernel.mask is None or self.config.noise_schedule != "loglinear":
            raise ValueError(
                "add_noise_by_count needs kernel='absorbing' and noise_schedule='loglinear', whose share of masked"
                f" tokens is (1 - eps) t; this is {self.config.kernel!r} with {self.config.noise_schedule!r}"
            )
        if not 0 <= num_decoded <= x0.shape[1]:
            raise ValueError(f"num_decoded must be in [0, {x0.shape[1]}], the length, got {num_decoded}")
        if isinstance(noise, torch.Tensor):
            self._check_noise_of_add_noise(noise, x0)
        else:
            noise = uniforms(x0.shape, noise, x0.device)
        order = noise.argsort(dim=1, stable=True)[:, : x0.shape[1] - num_decoded]
        masked = x0.scatter(1, order, self.kernel.mask)
        last = noise.gather(1, order[:, -1:])[:, 0] if order.shape[1] else torch.zeros(len(x0), device=x0.device)
        return masked, (last / (1 - self.config.eps)).clamp(self.config.min_timestep, 1)

    # The chain in reverse

    @checked_arguments
    def reverse_rates(
        self, model_output: torch.Tensor, timestep: float | list[float] | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Rates of jumping from each current token x to every token y, (batch, length, vocab) float32.

        A row sums to 0: the entry of the current token is minus the rate of leaving it. Positions that the absorbing
        kernel has decoded never jump again; their rows are 0.

        model_output: (batch, length, vocab), see `prediction_type`. sample: (batch, length) int64.
        """

        def rates(output, x, time):
            rates = self.reverse.rates(output, x, time)
            return rates.scatter_(1, x.unsqueeze(1), -rates.sum(1, keepdim=True))

        return self._rows(rates, 0.0, model_output, timestep, sample)

    @checked_arguments
    def scores(
        self, model_output: torch.Tensor, timestep: float | list[float] | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Ratios p_t(y) / p_t(x) of every token y to the current token x, (batch, length, vocab) float32; 1 at x.

        At positions that the absorbing kernel has decoded they say nothing and are 1. Arguments as of `reverse_rates`.
        """

        def ratios(output, x, time):
            return self.reverse.score(output, x, time).scatter_(1, x.unsqueeze(1), 1)

        return self._rows(ratios, 1.0, model_output, timestep, sample)

    def _rows(self, function: Callable, otherwise: float, model_output, timestep, sample) -> torch.Tensor:
        """function(output, x, time) of n positions, (n, vocab), at all that may jump, (batch, length, vocab)."""
        self._check_step_inputs(model_output, sample)
        result = torch.full(model_output.shape, otherwise, dtype=torch.float32, device=model_output.device)
        for rows, time in groups(self._times(timestep, len(sample)), len(sample)):
            target, output, x = result[rows].flatten(0, 1), model_output[rows].flatten(0, 1), sample[rows].flatten()
            for chosen in chunks(movable(self.reverse, x), CHUNK // output.shape[-1]):
                target[chosen] = function(output[chosen].float(), x[chosen], time)
        return result

    @checked_arguments
    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | list[float] | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        *,
        next_timestep: float | list[float] | torch.Tensor | None = None,
        num_decode: int | list[int] | torch.Tensor | None = None,
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
        self._check_step_inputs(model_output, sample, generator)
        if self.sampler.counts_tokens:
            if next_timestep is not None:
                raise ValueError(f"next_timestep={next_timestep}: sampler='gillespie' takes num_decode= instead")
            counts = self._counts(timestep, sample, num_decode)
            return self._decode(model_output, timestep, sample, counts, generator, noise, return_dict)
        if num_decode is not None:
            raise ValueError(f"num_decode={num_decode} is for sampler='gillespie', this is {self.config.sampler!r}")
        if next_timestep is None:
            index = self._schedule().index(timestep)
            if index == self.num_inference_steps:
                denoised = self.denoise(model_output, timestep, sample, generator, noise=noise)
                return self._output(denoised, 0.0, return_dict)
            timestep, next_timestep = self._steps.edges[index : index + 2]
        times = self._both_times(timestep, next_timestep, len(sample))
        moved = self.sampler.step(model_output, sample, times, generator, noise)
        return self._output(moved, [then for _, then in times], return_dict)

    def _decode(self, model_output, timestep, sample, counts, generator, noise, return_dict: bool):
        """A gillespie step; times on a device are not read."""
        if noise is not None:
            check_recorded(noise[0], sample.shape)
        start = self._start(timestep, sample)
        tokens, elapsed, finished = self.sampler.step(model_output, sample, start, counts, generator, noise)
        least = self.config.min_timestep
        return self._output(tokens, (start - elapsed).clamp(min=least).masked_fill(finished, least), return_dict)

    def _start(self, timestep: float | list[float] | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The times of a batch, (batch,) float32 on its device."""
        on_device = isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu"
        if on_device and (self._steps is None or self._steps.known(timestep) is None):
            self._check_number(timestep.numel(), len(sample))
            return timestep.to(sample.device, torch.float32).reshape(-1).expand(len(sample))
        return _column(self._times(timestep, len(sample)), sample.device)

    @staticmethod
    def _output(sample: torch.Tensor, time, return_dict: bool) -> CTMCSchedulerOutput | tuple:
        """time: a number or a list of one a sample on the host, or (batch,) on the sample's device."""
        if not isinstance(time, torch.Tensor):
            time = _column(time if isinstance(time, list) else [time] * len(sample), sample.device)
        return CTMCSchedulerOutput(prev_sample=sample, prev_timestep=time) if return_dict else (sample, time)

    @checked_arguments
    def step_correct(
        self,
        model_output: torch.Tensor,
        timestep: float | list[float] | torch.Tensor,
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
        self._check_step_inputs(model_output, sample, generator)
        if self.sampler.counts_tokens:
            raise ValueError("sampler='gillespie' counts decoded tokens and a corrector masks them again; use 'euler'")
        if not (math.isfinite(step_size) and step_size > 0):
            raise ValueError(f"step_size must be a finite number > 0, got {step_size!r}")
        times = self._times(timestep, len(sample))
        leaps = [(time, time - step_size) for time in times]
        corrected = self.sampler.correct(model_output, sample, leaps, generator, noise)
        return self._output(corrected, times, return_dict)

    @checked_arguments
    def denoise(
        self,
        model_output: torch.Tensor,
        timestep: float | list[float] | torch.Tensor,
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
        self._check_step_inputs(model_output, sample, generator)
        times = [(time, 0.0) for time in self._times(timestep, len(sample))]
        if self.kernel.mask is None and self.config.prediction_type != "log_score":
            return model_output.argmax(dim=-1)
        return denoise(self.reverse, model_output, sample, times, generator, noise)

    # Counting tokens

    @checked_arguments
    def num_decode(self, sample: torch.Tensor, step_index: int) -> list[int]:
        """How many masks of each sample step `step_index` of the schedule decodes with gillespie.

        At an edge t of the schedule ceil(length (t - t_n) / (1 - t_n)) tokens are still masked, t_n the last edge: a
        token-count table k_0 = 0 < k_1 < ... < k_n = length is the table of times 1 - k_i / length, t_n small.
        Where other tokens were given from the start, the same share of the masks stays. sample: (batch, length).
        """
        self._check_tokens(sample)
        return self.num_decode_on_device(sample, step_index).tolist()

    def num_decode_on_device(self, sample: torch.Tensor, step_index: int) -> torch.Tensor:
        """What `num_decode` gives, (batch,) int64 on the sample's device, without reading it."""
        length, last = sample.shape[1], self._schedule().edges[-1]
        ends = self._steps.edges[step_index : step_index + 2]
        now, then = (math.ceil(length * (t - last) / (1 - last) - 1e-9 * length) for t in ends)
        left = (sample == self.kernel.mask).sum(dim=1)
        return left if now == 0 else left + torch.div(-left * then, now, rounding_mode="floor")

    def _counts(self, timestep, sample, num_decode) -> int | torch.Tensor:
        """How many masks a gillespie step decodes: one number, or (batch,) on the device."""
        if num_decode is None:
            index = self._schedule().index(timestep)
            if index == self.num_inference_steps:
                raise ValueError(f"timestep={timestep} is the last edge, where gillespie has decoded everything")
            return self.num_decode_on_device(sample, index)
        counts = torch.as_tensor(num_decode)
        on_device = counts.device.type != "cpu"  # its numbers are not read: a negative one decodes nothing
        if (
            counts.is_floating_point()
            or counts.numel() not in (1, len(sample))
            or (not on_device and bool((counts < 0).any()))
        ):
            raise ValueError(f"num_decode must be an integer >= 0, or one a sample, got {num_decode}")
        if counts.ndim == 0 and not on_device:
            return int(counts)
        return counts.to(sample.device).reshape(-1).expand(len(sample))

    # Times of a batch, on the host, and checks

    def _times(self, timestep: float | list[float] | torch.Tensor, batch: int) -> list[float]:
        times = self._steps.times(timestep) if self._steps else times_of(timestep)
        self._check_number(len(times), batch)
        if not all(0 < time <= 1 for time in times):
            raise ValueError(f"timestep must lie in (0, 1], got {times}")
        return times if len(times) == batch else times * batch

    @staticmethod
    def _check_number(count: int, batch: int) -> None:
        if count not in (1, batch):
            raise ValueError(f"timestep must be one time or one a sample, {batch}, got {count}")

    def _both_times(self, timestep, next_timestep, batch: int) -> list[tuple[float, float]]:
        starts, ends = self._times(timestep, batch), times_of(next_timestep)
        self._check_number(len(ends), batch)
        ends = ends if len(ends) == batch else ends * batch
        least = 0.0 if self.config.sampler == "tweedie" else -math.inf
        if not all(least <= end < start for start, end in zip(starts, ends, strict=True)):
            allowed = "in [0, " if least == 0 else "below ("
            raise ValueError(f"next_timestep must be {allowed}timestep={timestep}), got {next_timestep}")
        return list(zip(starts, ends, strict=True))

    def _check_tokens(self, tokens: torch.Tensor) -> None:
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or not len(tokens):
            raise ValueError(
                f"tokens must be int64 (batch, length), got {tokens.dtype} {tuple(tokens.shape)}; use .long()"
            )

    def _check_step_inputs(self, model_output, sample: torch.Tensor, generator: Generators = None) -> None:
        if isinstance(generator, list):
            check_generators(generator, len(sample))
        self._check_tokens(sample)
        expected = (*sample.shape, self.config.vocab_size)
        if tuple(model_output.shape) != expected:
            raise ValueError(
                f"model_output must be (batch, length, vocab_size) = {expected}, got {tuple(model_output.shape)}"
            )

    def _check_noise_of_add_noise(self, noise, x0: torch.Tensor) -> None:
        shapes = [tuple(n.shape) for n in noise] if isinstance(noise, tuple) else tuple(noise.shape)
        allowed = self.kernel.noise_shapes(tuple(x0.shape))
        if shapes not in allowed:
            raise ValueError(f"noise of kernel={self.config.kernel!r} must have the shape {allowed}, got {shapes}")
        draws, *targets = noise if isinstance(noise, tuple) else (noise,)
        if not draws.is_floating_point() or not bool(((draws >= 0) & (draws < 1)).all()):
            raise ValueError("noise must hold uniforms in [0, 1): torch.rand, not torch.randn")
        if any(bool(((tokens < 0) | (tokens >= self.config.vocab_size)).any()) for tokens in targets):
            raise ValueError(f"noise must hold target tokens in [0, {self.config.vocab_size})")


def _column(times: list[float], device: torch.device) -> torch.Tensor:
    """(batch,) float32; nothing is moved where all are the same."""
    if all(time == times[0] for time in times):
        return torch.full((len(times),), times[0], device=device, dtype=torch.float32)
    return torch.tensor(times, dtype=torch.float32).to(device)
