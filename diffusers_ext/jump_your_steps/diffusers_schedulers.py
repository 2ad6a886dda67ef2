"""Timestep tables for diffusers' own discrete schedulers: their chain, their networks, and the class with tables."""

import math
from collections.abc import Callable

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .. import schedulers
from ..schedulers import CTMCScheduler

SURVIVAL_AT_ONE = 1e-6  # the chain of discrete DDIM forgets everything by t = 1, where a rate would be infinite

# The kernel of each, and the name of the class that takes tables
DIFFUSERS = {
    "DiscreteDDIMScheduler": ("uniform", "TableDiscreteDDIMScheduler"),
    "AmusedScheduler": ("absorbing", "TableAmusedScheduler"),
    "BlockRefinementScheduler": ("absorbing", "TableBlockRefinementScheduler"),
}


def kernel_and_class(scheduler: SchedulerMixin) -> tuple[str, type[SchedulerMixin]]:
    """The kernel of a scheduler of diffusers, and the class with tables that takes its place.

    Raises:
        ValueError: for one whose steps no table decides.
    """
    for name, (kernel, with_tables) in DIFFUSERS.items():
        if hasattr(diffusers, name) and isinstance(scheduler, getattr(diffusers, name)):
            return kernel, getattr(schedulers, with_tables)
    raise ValueError(
        f"scheduler must be one whose steps a table decides, CTMCScheduler, {', '.join(DIFFUSERS)}, got"
        f" {type(scheduler).__name__}"
    )


def chain_of_diffusers(scheduler: SchedulerMixin, num_tokens: int) -> CTMCScheduler:
    """The chain that a scheduler of diffusers goes back, of networks with this number of columns.

    DiscreteDDIM: the uniform kernel by tweedie steps, a token survives with alpha = 1 - t. Amused and BlockRefinement:
    masks, a number of which is unmasked a step, in random order (k-Gillespie); the chain's mask is a further token.

    Raises:
        ValueError: for one whose steps no table decides.
    """
    kernel, _ = kernel_and_class(scheduler)
    masked = kernel == "absorbing"
    return CTMCScheduler(
        kernel=kernel, vocab_size=num_tokens + masked, noise_schedule="loglinear", eps=SURVIVAL_AT_ONE,
        sampler="gillespie" if masked else "tweedie", prediction_type="x0", time_conditioning="timestep",
    )  # fmt: skip


class ChainNetwork(torch.nn.Module):
    """A network of diffusers as that of its chain: logits (batch, length, vocabulary of the chain) of its tokens.

    Args:
        model: called as model(tokens, time).
        chain: see `chain_of_diffusers`.
        mask_token_id: the network's mask, which is never drawn; None without one.
    """

    def __init__(self, model: Callable, chain: CTMCScheduler, mask_token_id: int | None):
        super().__init__()
        self.model, self.mask, self.mask_token_id = model, chain.kernel.mask, mask_token_id

    def forward(self, tokens: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Logits of the chain's tokens, (batch, length, vocabulary of the chain).

        Args:
            tokens: (batch, length) int64.
            time: (batch,).
        """
        if self.mask is None:
            return _logits(self.model(tokens, time))
        logits = _logits(self.model(tokens.masked_fill(tokens == self.mask, self.mask_token_id), time))
        logits = torch.nn.functional.pad(logits, (0, 1), value=-math.inf)
        if self.mask_token_id < self.mask:
            logits[..., self.mask_token_id] = -math.inf
        return logits


def network_and_chain(
    model: Callable, scheduler: SchedulerMixin, data: torch.Tensor, mask_token_id: int | None
) -> tuple[Callable, CTMCScheduler]:
    """What the search runs on, of any scheduler: model and scheduler themselves if that is a CTMCScheduler.

    Args:
        model: a network of the scheduler.
        scheduler: a `CTMCScheduler`, or one of diffusers' that `optimize_timesteps` knows.
        data: (count, length) int64; a diffusers' scheduler knows no vocabulary, so the network is asked for it, once.
        mask_token_id: as of `optimize_timesteps`.

    Raises:
        ValueError: for a scheduler that is none of these, and for a mask_token_id that is missing or of no use.
    """
    own_mask = getattr(scheduler.config, "mask_token_id", None)
    masked = not isinstance(scheduler, CTMCScheduler) and kernel_and_class(scheduler)[0] == "absorbing"
    if mask_token_id is not None and (not masked or own_mask is not None):
        name = type(scheduler).__name__
        raise ValueError(f"mask_token_id={mask_token_id}: {name} has none, or its own; leave it out")
    if isinstance(scheduler, CTMCScheduler):
        return model, scheduler
    mask_token_id = own_mask if mask_token_id is None else mask_token_id
    if masked and (mask_token_id is None or mask_token_id < 0):
        raise ValueError(
            f"mask_token_id must be the network's mask token, which {type(scheduler).__name__} does not know, got"
            f" {mask_token_id}"
        )
    if masked and bool((data == mask_token_id).any()):
        raise ValueError(f"data must hold clean tokens, got the mask, {mask_token_id}")
    chain = chain_of_diffusers(scheduler, _columns(model, data))
    return ChainNetwork(model, chain, mask_token_id), chain


@torch.no_grad()
def _columns(model: Callable, data: torch.Tensor) -> int:
    """The number of tokens that a network's logits are for."""
    places = [*model.parameters(), *model.buffers()] if isinstance(model, torch.nn.Module) else []
    tokens = data[:1].to(places[0].device if places else "cpu")
    logits = _logits(model(tokens, torch.full((1,), 0.5, device=tokens.device)))
    if logits.ndim != 3 or logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"model must give logits (batch, length, tokens) of tokens {tuple(tokens.shape)}, got"
            f" {tuple(logits.shape)}"
        )
    return logits.shape[-1]


def _logits(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
