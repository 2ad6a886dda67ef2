"""Corrector steps of CTMCScheduler: tokens move, and their law at a time stays."""

import math

import torch

from .ctmc_draws import Generators
from .ctmc_inputs import Times, check_step_inputs
from .ctmc_output import CTMCSchedulerOutput, step_output
from .scheduler_arguments import checked_arguments


class Corrector:
    """Which corrector steps there are and what one does, as methods of a scheduler.

    Of the scheduler it reads `config`, `sampler`, the schedule as set and `_times`, the time of each sample.
    """

    @checked_arguments
    def step_correct(
        self,
        model_output: torch.Tensor,
        timestep: Times,
        sample: torch.Tensor,
        step_size: float,
        generator: Generators = None,
        *,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> CTMCSchedulerOutput | tuple:
        r"""One corrector step at a fixed time: a leap with the rates R_t + \hat R_t, which leave p_t as it is.

        R_t(x, y) = sigma(t) Q[x, y] are the forward rates out of the current token (2205.14987, section 4.3).

        Args:
            model_output: (batch, length, vocab) at `sample` and `timestep`.
            timestep: of the sample, one or (batch,).
            sample: (batch, length) int64.
            step_size: the time that the leap takes; it is a multiple, `corrector_step_size_multiplier`, of the length
                of the step before, in tauLDR.
            generator: as in `step`.
            noise: as in `step`.
            return_dict: as in `step`.

        Raises:
            ValueError: for other shapes, with gillespie, and for a step_size that is not finite and > 0.
        """
        check_step_inputs(self.config.vocab_size, model_output, sample, generator)
        if self.sampler.counts_tokens:
            raise ValueError("sampler='gillespie' counts decoded tokens and a corrector masks them again; use 'euler'")
        if not (math.isfinite(step_size) and step_size > 0):
            raise ValueError(f"step_size must be a finite number > 0, got {step_size!r}")
        times = self._times(timestep, len(sample))
        leaps = [(time, time - step_size) for time in times]
        corrected = self.sampler.correct(model_output, sample, leaps, generator, noise)
        return step_output(corrected, times, return_dict)

    def corrections(self, index: int) -> list[tuple[float, float]]:
        """(time, step size) of the corrector steps that follow an evaluation, none but at the end of a step.

        Args:
            index: of the evaluation, its entry of `timesteps`.
        """
        step, stage = divmod(index, self.sampler.evaluations_per_step)
        edges = self._schedule().edges[step : step + 2]
        at_end = stage + 1 == self.sampler.evaluations_per_step and len(edges) == 2
        if not at_end or edges[0] > self.config.corrector_entry_time:
            return []
        size = self.config.corrector_step_size_multiplier * (edges[0] - edges[1])
        return [(edges[1], size)] * self.config.num_corrector_steps
