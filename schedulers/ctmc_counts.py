"""Steps of CTMCScheduler that count decoded tokens instead of time: those of k-Gillespie."""

import torch

from .ctmc_draws import column
from .ctmc_inputs import Times, check_number, check_recorded, check_tokens, counts_of
from .ctmc_output import CTMCSchedulerOutput, step_output
from .scheduler_arguments import checked_arguments


class CountedSteps:
    """How many masks a step decodes, and such a step, as methods of a scheduler.

    Of the scheduler it reads `config`, `sampler`, the schedule as set and `_times`, the time of each sample.
    """

    @checked_arguments
    def num_decode(self, sample: torch.Tensor, step_index: int) -> list[int]:
        """How many masks of each sample step `step_index` of the schedule decodes with gillespie.

        At an edge t of the schedule ceil(length (t - t_min) / (1 - t_min)) tokens are still masked, t_min the smaller
        of `min_timestep` and the last edge: a table of token counts k_0 = 0 < k_1 < ... < k_n = length is the table of
        times 1 - k_i / length, the last one `min_timestep`. What is left at a last edge above that, one more step
        decodes. Where other tokens were given at first, the same share of the masks stays.

        Args:
            sample: (batch, length).
            step_index: the step, counted from 0.
        """
        check_tokens(sample)
        return self.num_decode_on_device(sample, step_index).tolist()

    def num_decode_on_device(self, sample: torch.Tensor, step_index: int) -> torch.Tensor:
        """What `num_decode` gives, (batch,) int64 on the sample's device, without reading it.

        Args:
            sample: as of `num_decode`.
            step_index: as of `num_decode`.
        """
        return self.sampler.num_decode(sample, self._schedule(), step_index, self.config.min_timestep)

    def _counts(self, timestep, sample, num_decode) -> int | torch.Tensor:
        """How many masks a gillespie step decodes: one number, or (batch,) on the device."""
        if num_decode is not None:
            return counts_of(num_decode, sample.device, len(sample))
        index = self._schedule().index(timestep)
        if index == self._steps.evaluations:
            raise ValueError(f"timestep={timestep} is the last edge, where gillespie has decoded everything")
        return self.num_decode_on_device(sample, index)

    def _decode(
        self, model_output, timestep, sample, counts, generator, noise, return_dict: bool
    ) -> CTMCSchedulerOutput | tuple:
        """A gillespie step; times on a device are not read."""
        if noise is not None:
            check_recorded(noise[0], sample.shape)
        start = self._start(timestep, sample)
        tokens, elapsed, finished = self.sampler.step(model_output, sample, start, counts, generator, noise)
        least = self.config.min_timestep
        return step_output(tokens, (start - elapsed).clamp(min=least).masked_fill(finished, least), return_dict)

    def _start(self, timestep: Times, sample: torch.Tensor) -> torch.Tensor:
        """The times of a batch, (batch,) float32 on its device."""
        on_device = isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu"
        if on_device and (self._steps is None or self._steps.known(timestep) is None):
            check_number(timestep.numel(), len(sample))
            return timestep.to(sample.device, torch.float32).reshape(-1).expand(len(sample))
        return column(self._times(timestep, len(sample)), sample.device)
