"""BlockRefinementScheduler of diffusers with timestep tables in place of equally many tokens a step."""

from itertools import pairwise

import torch
from diffusers import BlockRefinementScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementSchedulerOutput

# diffusers loads a saved scheduler only if the namespace of its module holds the name SchedulerMixin.
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401

from .scheduler_arguments import checked_arguments
from .timestep_tables import check_table_settings, check_vocabulary, masked_counts, table_edges


class TableBlockRefinementScheduler(BlockRefinementScheduler):
    r"""Blocks of masks, committed by confidence (LLaDA2), with optimised steps (Jump Your Steps, 2410.07761).

    Step i commits at least k_i tokens of a block: those with a confidence above the threshold, or the k_i most
    confident. diffusers' scheduler has k_i = L / n for blocks of L tokens; here the L t_{i+1} tokens that are masked
    afterwards may come from a table, rounded, and k_i is their difference.

    Tables are about tokens that are committed in random order; choosing the confident ones errs by itself, whatever
    the steps are. The mode without masks (DiffusionGemma) is no reverse chain and has no tables, which is for networks
    that `TableDiscreteDDIMScheduler` samples as well.

    Args:
        block_length: as of diffusers' scheduler.
        num_inference_steps: as of diffusers' scheduler.
        threshold: as of diffusers' scheduler.
        editing_threshold: as of diffusers' scheduler.
        minimal_topk: as of diffusers' scheduler.
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
        block_length: int = 32,
        num_inference_steps: int = 32,
        threshold: float = 0.95,
        editing_threshold: float | None = None,
        minimal_topk: int = 1,
        timestep_tables: dict[str, list[float]] | None = None,
        timestep_table_info: dict[str, dict] | None = None,
        timestep_spacing: str = "table",
    ):
        if block_length < 1 or num_inference_steps < 1:
            raise ValueError(
                f"block_length and num_inference_steps must be >= 1, got {block_length} and {num_inference_steps}"
            )
        super().__init__(
            block_length=block_length,
            num_inference_steps=num_inference_steps,
            threshold=threshold,
            editing_threshold=editing_threshold,
            minimal_topk=minimal_topk,
        )
        check_table_settings(timestep_spacing, timestep_tables, timestep_table_info)

    @property
    def table(self) -> list[float] | None:
        """The edges for the number of steps as set, or None where diffusers' even numbers of tokens hold."""
        return table_edges(self.config, self.num_inference_steps)

    @checked_arguments
    def get_num_transfer_tokens(self, block_length: int, num_inference_steps: int) -> torch.LongTensor:
        """How many tokens of a block each step commits, (num_inference_steps,) int64, on the CPU.

        Args:
            block_length: L.
            num_inference_steps: n.
        """
        edges = table_edges(self.config, num_inference_steps) if num_inference_steps > 0 else None
        if edges is None:
            return super().get_num_transfer_tokens(block_length, num_inference_steps)
        return torch.tensor([a - b for a, b in pairwise([block_length, *masked_counts(edges, block_length)])])

    @checked_arguments
    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        *,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: torch.BoolTensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> BlockRefinementSchedulerOutput | tuple[torch.Tensor, ...]:
        """One step; arguments and result as of diffusers' scheduler.

        Args:
            model_output: logits (batch, block_length, vocab_size).
            timestep: the step, from 0.
            sample: (batch, block_length) int64.
            mask_token_id: as of diffusers' scheduler; needed with tables.
            temperature: as of diffusers' scheduler.
            top_p: as of diffusers' scheduler.
            top_k: as of diffusers' scheduler.
            sampling_method: as of diffusers' scheduler.
            threshold: as of diffusers' scheduler.
            editing_threshold: as of diffusers' scheduler.
            minimal_topk: as of diffusers' scheduler.
            prompt_mask: (block_length,) bool.
            generator: as of diffusers' scheduler.
            return_dict: as of diffusers' scheduler.

        Raises:
            ValueError: for other shapes; and with tables before `set_timesteps`, without a mask_token_id, and for
                another vocabulary than theirs.
        """
        if sample.ndim != 2 or model_output.shape[:-1] != sample.shape:
            raise ValueError(
                "sample must be (batch, block_length) and model_output (batch, block_length, vocab_size), got"
                f" {tuple(sample.shape)} and {tuple(model_output.shape)}"
            )
        if self.table is not None:
            if mask_token_id is None:
                raise ValueError(
                    "mask_token_id=None: timestep tables are about blocks of masks; use TableDiscreteDDIMScheduler for"
                    ' networks without a mask, or timestep_spacing="uniform"'
                )
            if self._transfer_schedule is None:
                raise ValueError("this scheduler has no steps yet; call set_timesteps first")
            check_vocabulary(self.config, model_output.shape[-1])
        return super().step(
            model_output, timestep, sample, mask_token_id=mask_token_id, temperature=temperature, top_p=top_p,
            top_k=top_k, sampling_method=sampling_method, threshold=threshold, editing_threshold=editing_threshold,
            minimal_topk=minimal_topk, prompt_mask=prompt_mask, generator=generator, return_dict=return_dict,
        )  # fmt: skip
