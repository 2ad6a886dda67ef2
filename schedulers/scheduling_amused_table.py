"""AmusedScheduler of diffusers with timestep tables in place of its cosine or linear masking schedule."""

import torch
from diffusers import AmusedScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_amused import AmusedSchedulerOutput, gumbel_noise

# diffusers loads a saved scheduler only if the namespace of its module holds the name SchedulerMixin.
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401

from .scheduler_arguments import checked_arguments
from .timestep_tables import check_table_settings, check_vocabulary, masked_counts, table_edges


class TableAmusedScheduler(AmusedScheduler):
    r"""Masked token generation (MaskGIT, 2202.04200; aMUSEd, 2401.01808) with optimised steps (Jump Your Steps,
    2410.07761).

    Step i draws a token x_l for every mask from the network's laws p_l and masks the least confident of them again, by
    \log p_l(x_l) + \tau_i g_l with Gumbel noise g_l, until m_i of L are masked. diffusers' scheduler has m_i = L
    \cos(\pi (i + 1) / 2 n) or L (1 - (i + 1) / n), rounded down; here m_i = L t_{i+1} may come from a table, rounded.

    Tables are about tokens that are unmasked in random order, which is the limit of a large temperature, as in
    `set_timesteps(n, temperature=(1e6, 1e6))`. Choosing the confident ones errs by itself, whatever the steps are.
    With a table, tokens that are no masks stay; diffusers' scheduler may mask them again at temperatures above 4.

    Args:
        mask_token_id: as of diffusers' scheduler.
        masking_schedule: as of diffusers' scheduler, "cosine" or "linear"; a table takes its place.
        timestep_tables: {"8": [t_0, ..., t_8], ...}, shares of masked tokens, strictly decreasing in (0, 1]; the last
            edge of each counts as 0.
        timestep_table_info: where each comes from, of which the chain's vocabulary is checked.
        timestep_spacing: "table" takes the table for a number of steps, or interpolates between those for fewer and
            for more; "uniform", and "table" without any table, is diffusers' scheduler.

    Raises:
        ValueError: for tables that do not decrease strictly in (0, 1], and for another spacing.
    """

    @register_to_config
    @checked_arguments
    def __init__(
        self,
        mask_token_id: int,
        masking_schedule: str = "cosine",
        timestep_tables: dict[str, list[float]] | None = None,
        timestep_table_info: dict[str, dict] | None = None,
        timestep_spacing: str = "table",
    ):
        super().__init__(mask_token_id=mask_token_id, masking_schedule=masking_schedule)
        if masking_schedule not in ("cosine", "linear"):
            raise ValueError(f'masking_schedule must be "cosine" or "linear", got {masking_schedule!r}')
        check_table_settings(timestep_spacing, timestep_tables, timestep_table_info)

    @checked_arguments
    def set_timesteps(
        self,
        num_inference_steps: int,
        temperature: float | list[float] = (2, 0),
        device: str | torch.device | None = None,
    ) -> None:
        """The steps n - 1 to 0, as of diffusers' scheduler.

        Args:
            num_inference_steps: n, at least 1.
            temperature: of the Gumbel noise, one or (first, last).
            device: of `timesteps`.

        Raises:
            ValueError: for fewer than 1, and for a temperature that is neither one nor a first and a last.
        """
        if isinstance(temperature, list | tuple) and len(temperature) != 2:
            raise ValueError(f"temperature must be a number, or a first and a last, got {temperature}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {num_inference_steps}")
        super().set_timesteps(num_inference_steps, temperature, device)

    @property
    def table(self) -> list[float] | None:
        """The edges for the number of steps as set, or None where diffusers' masking schedule holds.

        Raises:
            ValueError: before `set_timesteps`.
        """
        if self.timesteps is None:
            raise ValueError("this scheduler has no steps yet; call set_timesteps first")
        return table_edges(self.config, len(self.timesteps))

    @checked_arguments
    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        starting_mask_ratio: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> AmusedSchedulerOutput | tuple[torch.LongTensor, torch.LongTensor]:
        """One step; arguments and result as of diffusers' scheduler.

        Args:
            model_output: logits (batch, length, tokens), or (batch, tokens, height, width).
            timestep: n - 1 to 0.
            sample: (batch, length) or (batch, height, width) int64.
            starting_mask_ratio: the share that all shares are of.
            generator: as of diffusers' scheduler.
            return_dict: as of diffusers' scheduler.

        Raises:
            ValueError: for other shapes, a timestep that is none, and another vocabulary than the tables'.
        """
        flat = sample.ndim == 2 and model_output.shape[:-1] == sample.shape
        square = sample.ndim == 3 and model_output.ndim == 4 and model_output[:, 0].shape == sample.shape
        if not flat and not square:
            raise ValueError(
                "sample must be (batch, length) and model_output (batch, length, tokens), or (batch, height, width)"
                f" and (batch, tokens, height, width), got {tuple(sample.shape)} and {tuple(model_output.shape)}"
            )
        edges, index = self.table, self._index(timestep)
        if edges is None:
            return super().step(model_output, timestep, sample, starting_mask_ratio, generator, return_dict)
        laws = (model_output.flatten(2).transpose(1, 2) if square else model_output).softmax(dim=-1)
        check_vocabulary(self.config, laws.shape[-1])
        tokens = sample.flatten(1)
        masked = tokens == self.config.mask_token_id
        clean = torch.where(masked, _drawn(laws, generator), tokens)
        count = int(starting_mask_ratio * masked_counts(edges, tokens.shape[1])[index])
        confidence = laws.gather(-1, clean.clamp(max=laws.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        confidence = confidence.clamp(min=1e-20).log() + self.temperatures[index] * gumbel_noise(confidence, generator)
        ranks = confidence.masked_fill(~masked, torch.inf).argsort(dim=1).argsort(dim=1)
        again = masked & (ranks < (masked.sum(dim=1, keepdim=True) - 1).clamp(max=count))
        prev_sample = clean.masked_fill(again, self.config.mask_token_id).view_as(sample)
        if not return_dict:
            return prev_sample, clean.view_as(sample)
        return AmusedSchedulerOutput(prev_sample, clean.view_as(sample))

    @checked_arguments
    def add_noise(
        self,
        sample: torch.LongTensor,
        timesteps: int | torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> torch.LongTensor:
        """Tokens masked as after step `timesteps`, each by itself with the share of masked tokens there.

        Args:
            sample: tokens of any shape, int64.
            timesteps: one, of n - 1 to 0, at which nothing is masked.
            generator: as of diffusers' scheduler.

        Raises:
            ValueError: for a timestep that is none.
        """
        edges, index = self.table, self._index(timesteps)
        if edges is None:
            return super().add_noise(sample, timesteps, generator)
        share = [*edges[1:-1], 0.0][index]
        device = sample.device if generator is None else generator.device
        moved = torch.rand(sample.shape, device=device, generator=generator).to(sample.device) < share
        return sample.masked_fill(moved, self.config.mask_token_id)

    def _index(self, timestep: int | torch.Tensor) -> int:
        """Which step a timestep is, from 0."""
        last = len(self.timesteps) - 1
        if (isinstance(timestep, torch.Tensor) and timestep.numel() != 1) or not 0 <= int(timestep) <= last:
            raise ValueError(f"timestep must be one of {last} to 0, got {timestep}")
        return last - int(timestep)


def _drawn(laws: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """A token of each position's law (batch, length, tokens), drawn where the generator is, as diffusers' draws it."""
    place = laws.device if generator is None else generator.device
    drawn = torch.multinomial(laws.flatten(0, 1).float().to(place), 1, generator=generator)
    return drawn.to(laws.device).view(laws.shape[:-1])
