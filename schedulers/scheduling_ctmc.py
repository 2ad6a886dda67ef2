"""Sampling of discrete diffusion models in continuous time: SEDD, tauLDR, their samplers and timestep tables."""

from collections.abc import Callable, Mapping

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .ctmc_config import check_config, check_source
from .ctmc_corrector import Corrector
from .ctmc_counts import CountedSteps
from .ctmc_draws import Generators
from .ctmc_forward import ForwardChain
from .ctmc_inputs import Times, batch_times, check_step_inputs, spans
from .ctmc_kernels import AbsorbingKernel, ReversibleKernel, UniformKernel, build_kernel
from .ctmc_noise_schedules import NoiseSchedule, build_noise_schedule
from .ctmc_output import CTMCSchedulerOutput, step_output
from .ctmc_reverse import ReverseChain
from .ctmc_samplers import CHUNK, SAMPLERS, Sampler, build_sampler, chunks, denoise, groups, movable
from .scheduler_arguments import checked_arguments, is_of_kind, short
from .timestep_edges import StepEdges, times_of
from .timestep_tables import check_edges, check_tables, interpolated_edges, tables_for


class CTMCScheduler(ForwardChain, CountedSteps, Corrector, SchedulerMixin, ConfigMixin):
    r"""Reverse of a continuous-time Markov chain on tokens (Campbell et al. 2205.14987; Lou et al. 2310.16834).

    Forward, every token jumps by itself with rates sigma(t) Q; in reverse, from token x to y, with

    .. math:: \hat R_t(x, y) = \sigma(t)\, Q[y, x]\, \frac{p_t(y)}{p_t(x)}

    `step` walks the edges 1 = t_0 > t_1 > ... > t_n = min_timestep; at the last edge it returns clean tokens:

        for t in scheduler.timesteps:  # one network call each: n + 1 for n steps of euler
            output = model(sample, scheduler.model_time(t, len(sample))).sample
            sample = scheduler.step(output, t, sample, generator).prev_sample

    Timesteps lie in (0, 1] and may be a number, a tensor (), or one a sample, (batch,).

    Args:
        kernel: what Q is. "absorbing" to a mask, "uniform", "gaussian" (ordered tokens, tauLDR), "birth_death" (to
            either neighbour).
        vocab_size: number of tokens; the mask of the absorbing kernel counts and is the last one.
        noise_schedule: "loglinear", "cosine", "arccos" (with `eps`), "geometric" (`sigma_min`, `sigma_max`),
            "exponential" (`time_base`, `time_exponential`), "constant" (`constant_rate`).
        sampler: "euler" (tau-leaping: the rates are held over a step), "tweedie" (each token by its exact posterior
            given the network's prediction; the analytic sampler of SEDD), "theta_trapezoidal" (of second order, two
            network calls a step) or "gillespie" (k-Gillespie: decodes an exact number of masks a step, those that jump
            first).
        prediction_type: what the network returns, (batch, length, vocab_size): "log_score", log p_t(y)/p_t(x), 0 at
            the current token; "x0", logits of p(x_0 | x_t); "probabilities", p(x_0 | x_t) itself. The column of the
            mask is not read.
        jumps: of the euler sampler. "categorical": one jump at most, with probabilities 1{x} + dt R. "poisson": the
            number of jumps to each token is Poisson distributed, the jumps are added and clamped to the vocabulary
            (tauLDR). None: "poisson" for ordered tokens, otherwise "categorical".
        time_conditioning: what the network receives, sigma_bar(t) or the timestep t itself (tauLDR): `model_time`.
        num_corrector_steps: after each step that starts at a time <= the entry time, so many corrector steps;
            `step_correct` does one.
        corrector_entry_time: steps that start at a larger time have no corrector steps.
        corrector_step_size_multiplier: length of a corrector step over that of the step before.
        timestep_tables: {"16": [t_0, ..., t_16], ...}, optimised edges by number of steps.
        timestep_table_info: where each of the tables comes from; of it are read the `chain` and the `sampler` that it
            was made for.
        timestep_spacing: "table", edges out of timestep_tables, or even ones where there are no tables at all;
            "uniform", even ones.
        min_timestep: the last edge, where the final denoising takes place.
        eps: of the noise schedule.
        eps_ratio: added to the denominator P[x_0, x] of x0 predictions (1e-9 in tauLDR, 1e-6 in Jump Your Steps).
        sigma_min: of the geometric noise schedule.
        sigma_max: of the geometric noise schedule.
        time_base: of the exponential noise schedule.
        time_exponential: of the exponential noise schedule.
        constant_rate: of the constant noise schedule.
        rate_sigma: of the gaussian kernel.
        Q_sigma: of the gaussian kernel.

    Raises:
        ValueError: for values outside of what is listed, and for combinations without a meaning, with the reason.
    """

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
        timestep_spacing: str = "table",
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
        check_config(self.config, tuple(SAMPLERS))
        check_tables(timestep_tables, timestep_table_info)
        self.kernel: AbsorbingKernel | UniformKernel | ReversibleKernel = build_kernel(self.config)
        self._noise: NoiseSchedule = build_noise_schedule(self.config)
        self.reverse = ReverseChain(self.kernel, self._noise, prediction_type, eps_ratio)
        self.sampler: Sampler = build_sampler(self.config, self.reverse)
        self.order = self.sampler.evaluations_per_step  # diffusers' name
        self._steps: StepEdges | None = None
        self.num_inference_steps: int | None = None
        self.timesteps: torch.Tensor | None = None

    @classmethod
    def from_config(
        cls, config: Mapping, return_unused_kwargs: bool = False, **kwargs
    ) -> "CTMCScheduler | tuple[CTMCScheduler, dict]":
        """As of every scheduler.

        Args:
            config: of a `CTMCScheduler`.
            return_unused_kwargs: as of every scheduler.
            **kwargs: values to change.

        Raises:
            ValueError: for the config of one that knows no tokens.
        """
        check_source(config, kwargs, cls._get_init_keys(cls))
        return super().from_config(config, return_unused_kwargs, **kwargs)

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
        """The sample, as it is: tokens have no scale.

        Args:
            sample: (batch, length).
            timestep: not used.
        """
        return sample

    # Schedule

    @checked_arguments(but="num_inference_steps")
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | torch.Tensor | None = None,
    ) -> None:
        """Set the edges of the steps. `timesteps` then holds where the network is evaluated.

        The network is evaluated at every edge, at the last one for the final denoising; theta_trapezoidal also in the
        middle of each step, gillespie not at a last edge <= `min_timestep`, where nothing is left to decode.

        Args:
            num_inference_steps: n steps between n + 1 edges, from 1 to `min_timestep` or the table's last edge. With
                timestep_spacing "table" they are the table for n, or lie between those for the next smaller and the
                next larger number of steps (`timestep_tables.interpolated_edges`).
            device: of `timesteps`.
            timesteps: the n + 1 edges themselves, a list or (n + 1,), strictly decreasing in (0, 1]; they win.

        Raises:
            ValueError: unless exactly one of the two is given, for edges that do not decrease, and for tables that
                were made for another chain.
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
        evaluated = self.sampler.evaluated(edges, self.config.min_timestep)
        self._steps = StepEdges(edges, evaluated, lambda times: self._conditioning(times, self._noise), device)
        self.timesteps = self._steps.timesteps
        if self.kernel.ordered and self.timesteps.device.type != "cpu":
            self.kernel.prepare(self.sampler.noise_levels(edges), self.timesteps.device)

    def _edges_for(self, steps: int) -> list[float]:
        if not is_of_kind(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {short(steps)}")
        with_tables = self.config.timestep_spacing == "table"
        tables = tables_for(self.config, self.sampler.counts_tokens, self.reverse) if with_tables else {}
        if tables:
            return interpolated_edges(tables, steps, self.config.min_timestep)
        return torch.linspace(1, self.config.min_timestep, steps + 1, dtype=torch.float64).tolist()

    @property
    def edges(self) -> torch.Tensor:
        """The n + 1 edges of the schedule as set, (n + 1,) float64 on the CPU.

        Raises:
            ValueError: if none is set.
        """
        return torch.tensor(self._schedule().edges, dtype=torch.float64)

    def _schedule(self) -> StepEdges:
        if self._steps is None:
            raise ValueError("there is no schedule yet; call set_timesteps first")
        return self._steps

    # The chain in reverse

    @checked_arguments
    def reverse_rates(self, model_output: torch.Tensor, timestep: Times, sample: torch.Tensor) -> torch.Tensor:
        """Rates of jumping from each current token x to every token y, (batch, length, vocab) float32.

        A row sums to 0: the entry of the current token is minus the rate of leaving it. Positions that the absorbing
        kernel has decoded never jump again; their rows are 0.

        Args:
            model_output: (batch, length, vocab), see `prediction_type`.
            timestep: at which the network was evaluated, one or (batch,).
            sample: the current tokens, (batch, length) int64.
        """

        def rates(output, x, time):
            rates = self.reverse.rates(output, x, time)
            return rates.scatter_(1, x.unsqueeze(1), -rates.sum(1, keepdim=True))

        return self._rows(rates, 0.0, model_output, timestep, sample)

    @checked_arguments
    def scores(self, model_output: torch.Tensor, timestep: Times, sample: torch.Tensor) -> torch.Tensor:
        """Ratios p_t(y) / p_t(x) of every token y to the current token x, (batch, length, vocab) float32; 1 at x.

        At positions that the absorbing kernel has decoded they say nothing and are 1.

        Args:
            model_output: as of `reverse_rates`.
            timestep: as of `reverse_rates`.
            sample: as of `reverse_rates`.
        """

        def ratios(output, x, time):
            return self.reverse.score(output, x, time).scatter_(1, x.unsqueeze(1), 1)

        return self._rows(ratios, 1.0, model_output, timestep, sample)

    def _rows(self, function: Callable, otherwise: float, model_output, timestep, sample) -> torch.Tensor:
        """function(output, x, time) of n positions, (n, vocab), at all that may jump, (batch, length, vocab)."""
        check_step_inputs(self.config.vocab_size, model_output, sample)
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
        timestep: Times,
        sample: torch.Tensor,
        generator: Generators = None,
        *,
        next_timestep: Times | None = None,
        num_decode: int | list[int] | torch.Tensor | None = None,
        noise: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        return_dict: bool = True,
    ) -> CTMCSchedulerOutput | tuple:
        """One step of the sampler, from a timestep to the next edge; at the last edge, the final denoising.

        Args:
            model_output: (batch, length, vocab) at `sample` and `timestep`.
            timestep: an edge of the schedule; or any time, also one a sample, (batch,), together with next_timestep
                or, for gillespie, num_decode.
            sample: (batch, length) int64.
            generator: one, or a list of one a sample, which makes a sample independent of its batch.
            next_timestep: where the step ends; it may lie below 0 for euler, which knows its length only.
            num_decode: how many masks a sample gillespie decodes, an integer or (batch,); a sample with fewer masks
                left decodes those.
            noise: instead of a generator, recorded uniforms in [0, 1) (batch, length, vocab); for jumps="poisson" the
                counts themselves; for gillespie a pair, uniforms (batch, length) of the holding times and (batch,
                num_decode, vocab - 1) of the tokens in the order in which they are decoded; for the final denoising of
                the absorbing kernel (batch, length, vocab - 1).
            return_dict: whether to return a `CTMCSchedulerOutput` or a tuple.

        Raises:
            ValueError: for other shapes, for times that are no edges where the step's end is not given, do not
                decrease or leave (0, 1], and for num_decode with another sampler than gillespie.
        """
        check_step_inputs(self.config.vocab_size, model_output, sample, generator)
        if self.sampler.counts_tokens:
            if next_timestep is not None:
                raise ValueError(f"next_timestep={next_timestep}: sampler='gillespie' takes num_decode= instead")
            counts = self._counts(timestep, sample, num_decode)
            return self._decode(model_output, timestep, sample, counts, generator, noise, return_dict)
        if num_decode is not None:
            raise ValueError(f"num_decode={num_decode} is for sampler='gillespie', this is {self.config.sampler!r}")
        stage = 0
        if next_timestep is None:
            index = self._schedule().index(timestep)
            if index + 1 == len(self._steps.points):
                denoised = self.denoise(model_output, timestep, sample, generator, noise=noise)
                return step_output(denoised, [0.0] * len(sample), return_dict)
            timestep, next_timestep = self._steps.points[index : index + 2]
            stage = index % self.sampler.evaluations_per_step
        elif self.sampler.evaluations_per_step > 1:
            raise ValueError(
                f"next_timestep={next_timestep}: a step of sampler={self.config.sampler!r} calls the network more than"
                " once; give all edges with set_timesteps(timesteps=...) and step along `timesteps`"
            )
        times = spans(self._times(timestep, len(sample)), times_of(next_timestep), self.sampler.least)
        moved = self.sampler.stages[stage](model_output, sample, times, generator, noise)
        return step_output(moved, [then for _, then in times], return_dict)

    @checked_arguments
    def denoise(
        self,
        model_output: torch.Tensor,
        timestep: Times,
        sample: torch.Tensor,
        generator: Generators = None,
        *,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Clean tokens (batch, length): what is left of the noise at a timestep is removed at once.

        The absorbing kernel draws a token for each mask that is left. Log scores of the uniform kernel are drawn from
        by one tweedie step to time 0. Predictions of x_0 of the other kernels give their most probable token.

        Args:
            model_output: (batch, length, vocab) at `sample` and `timestep`.
            timestep: of the sample, one or (batch,).
            sample: (batch, length) int64.
            generator: as in `step`.
            noise: recorded uniforms (batch, length, vocab), without the mask's column for the absorbing kernel.
        """
        check_step_inputs(self.config.vocab_size, model_output, sample, generator)
        times = [(time, 0.0) for time in self._times(timestep, len(sample))]
        if not self.reverse.denoising_draws:
            return model_output.argmax(dim=-1)
        return denoise(self.reverse, model_output, sample, times, generator, noise)

    def _times(self, timestep: Times, batch: int) -> list[float]:
        return batch_times(self._steps.times(timestep) if self._steps else times_of(timestep), batch)
