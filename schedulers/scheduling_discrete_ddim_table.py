"""DiscreteDDIMScheduler of diffusers with timestep tables in place of its even steps."""

from itertools import pairwise

import torch
from diffusers import DiscreteDDIMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_discrete_ddim import DiscreteDDIMSchedulerOutput

# diffusers loads a saved scheduler only if the namespace of its module holds the name SchedulerMixin.
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401

from .scheduler_arguments import checked_arguments
from .timestep_tables import check_table_settings, check_vocabulary, table_edges


class TableDiscreteDDIMScheduler(DiscreteDDIMScheduler):
    r"""Discrete DDIM of the uniform kernel (D3PM, 2107.03006) with optimised times (Jump Your Steps, 2410.07761).

    A clean token survives until time t with probability alpha(t) = 1 - t. Step i goes from t_i to t_{i+1} by the exact
    posterior of each position given a clean token x_0 drawn from the network,

    .. math:: q(x_s | x_t, x_0) \propto q(x_t | x_s)\, q(x_s | x_0)

    and the last step commits x_0. diffusers' scheduler has t_i = 1 - i / n; here t_i may come from a table.

    A pipeline takes it in place of its own, `pipe.scheduler = tables.apply_to(pipe.scheduler)`, and goes on counting
    steps from 0.

    Args:
        num_inference_steps: as of diffusers' scheduler.
        corrector_steps: as of diffusers' scheduler.
        corrector_k: as of diffusers' scheduler.
        corrector_selection: as of diffusers' scheduler.
        corrector_selection_tau: as of diffusers' scheduler.
        timestep_tables: {"8": [t_0, ..., t_8], ...}, strictly decreasing in (0, 1]; the last edge of each counts as 0.
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
        num_inference_steps: int = 32,
        corrector_steps: int = 0,
        corrector_k: int = 1,
        corrector_selection: str = "lowest_log_margin",
        corrector_selection_tau: float = 1.0,
        timestep_tables: dict[str, list[float]] | None = None,
        timestep_table_info: dict[str, dict] | None = None,
        timestep_spacing: str = "table",
    ):
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {num_inference_steps}")
        super().__init__(
            num_inference_steps=num_inference_steps,
            corrector_steps=corrector_steps,
            corrector_k=corrector_k,
            corrector_selection=corrector_selection,
            corrector_selection_tau=corrector_selection_tau,
        )
        check_table_settings(timestep_spacing, timestep_tables, timestep_table_info)
        self._weights: dict[tuple[int, torch.device], torch.Tensor] = {}  # by vocab_size and device, for one schedule

    @checked_arguments
    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """The steps 0 to n - 1, as of diffusers' scheduler.

        Args:
            num_inference_steps: n, at least 1.
            device: of `timesteps`.

        Raises:
            ValueError: for fewer than 1.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {num_inference_steps}")
        super().set_timesteps(num_inference_steps, device)
        self._weights = {}

    @property
    def table(self) -> list[float] | None:
        """The edges for the number of steps as set, or None where diffusers' even steps hold."""
        return table_edges(self.config, self.num_inference_steps)

    def _alpha(self, step_index: int) -> float:
        """alpha at the start of a step; `step_correct` of diffusers reads it too."""
        if self.table is None:
            return super()._alpha(step_index)
        return 1.0 if step_index == self.num_inference_steps else 1 - self.table[step_index]

    @checked_arguments
    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DiscreteDDIMSchedulerOutput | tuple[torch.LongTensor, torch.LongTensor, torch.Tensor, torch.Tensor]:
        """One step; arguments and result as of diffusers' scheduler.

        Args:
            model_output: logits (batch, length, vocab_size).
            timestep: the step, from 0.
            sample: (batch, length) int64.
            temperature: as of diffusers' scheduler, >= 0.
            generator: as of diffusers' scheduler.
            return_dict: as of diffusers' scheduler.

        Raises:
            ValueError: for other shapes, a temperature below 0 and another vocabulary than the tables'.
        """
        if sample.ndim != 2 or model_output.shape[:-1] != sample.shape or not (temperature >= 0):
            raise ValueError(
                "sample must be (batch, length), model_output (batch, length, vocab_size) and temperature >= 0, got"
                f" {tuple(sample.shape)}, {tuple(model_output.shape)} and {temperature}"
            )
        if isinstance(timestep, torch.Tensor) and timestep.numel() != 1:
            raise ValueError(f"timestep must be one step, got a tensor of shape {tuple(timestep.shape)}")
        if self.table is None:
            return super().step(
                model_output, timestep, sample, temperature=temperature, generator=generator, return_dict=return_dict
            )
        check_vocabulary(self.config, model_output.shape[-1])
        clean, probability = self._sample_from_logits(model_output, temperature=temperature, generator=generator)
        weights = self._weights_at(timestep, model_output.shape[-1], sample.device)
        prev_sample = self._posterior_draw(sample, clean, weights, model_output.shape[-1], generator)
        if not return_dict:
            return prev_sample, clean, probability, model_output
        return DiscreteDDIMSchedulerOutput(
            prev_sample=prev_sample, sampled_tokens=clean, sampled_probs=probability, pred_logits=model_output
        )

    def _weights_at(self, timestep: int | torch.Tensor, vocab_size: int, device: torch.device) -> torch.Tensor:
        """The weights (4,) float32 of a step: to x_0, to x_0 besides where it is x_t, to x_t, to a uniform token.

        They are the products of [a 1{x_s = x_t} + (1 - a) / V] and [b 1{x_s = x_0} + (1 - b) / V] with a = alpha_t /
        alpha_s and b = alpha_s, summed over x_s. The rows of all steps go to the device once a schedule, and a
        timestep that lies there is not read.
        """
        if (vocab_size, device) not in self._weights:
            alphas = [self._alpha(i) for i in range(self.num_inference_steps + 1)]
            rows = [
                (b * (1 - a) / vocab_size, a * b, a * (1 - b) / vocab_size, (1 - a) * (1 - b) / vocab_size)
                for a, b in ((now / then, then) for now, then in pairwise(alphas))
            ]
            self._weights[vocab_size, device] = torch.tensor(rows, dtype=torch.float32, device=device)
        rows = self._weights[vocab_size, device]
        if isinstance(timestep, torch.Tensor) and timestep.device == device:
            return rows.index_select(0, timestep.reshape(1))[0]
        return rows[int(timestep)]

    @staticmethod
    def _posterior_draw(sample, clean, weights: torch.Tensor, vocab_size: int, generator) -> torch.Tensor:
        """x_s of q(x_s | x_t, x_0), which is the sum of three parts: x_0, x_t, and a uniform token."""
        same = (sample == clean).float()
        to_clean, to_same, to_sample, to_any = weights
        parts = [to_clean + to_same * same, to_sample.expand_as(same), to_any.expand_as(same)]
        part = torch.multinomial(torch.stack(parts, dim=-1).flatten(0, -2), 1, generator=generator).view_as(sample)
        tokens = torch.randint(vocab_size, sample.shape, device=sample.device, generator=generator)
        return torch.where(part == 0, clean, torch.where(part == 1, sample, tokens))
