"""Timestep tables for diffusers' DiscreteDDIMScheduler."""

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..schedulers import CTMCScheduler
from ..schedulers.timestep_tables import check_chain
from .tables import TimestepTables

SURVIVAL_AT_ONE = 1e-6  # the chain of discrete DDIM forgets everything by t = 1, where a rate would be infinite


def discrete_ddim_chain(vocab_size: int) -> CTMCScheduler:
    """The chain of `DiscreteDDIMScheduler` as a `CTMCScheduler`: uniform kernel, a token survives with alpha = 1 - t.

    For `optimize_timesteps(model, discrete_ddim_chain(vocab_size), data, ...)`, where model(tokens, time) gives logits
    of clean tokens (batch, length, vocab_size); time is t, and a network that has no use for it leaves it out.
    """
    return CTMCScheduler(
        kernel="uniform", vocab_size=vocab_size, noise_schedule="loglinear", eps=SURVIVAL_AT_ONE,
        sampler="tweedie", prediction_type="x0", time_conditioning="timestep",
    )  # fmt: skip


def with_timestep_tables(scheduler: SchedulerMixin, tables: TimestepTables, vocab_size: int) -> SchedulerMixin:
    """A `TableDiscreteDDIMScheduler` with the settings of a `DiscreteDDIMScheduler` and these tables.

    Raises ValueError for another scheduler, and for tables of another chain than `discrete_ddim_chain(vocab_size)`.
    """
    from diffusers import DiscreteDDIMScheduler

    from ..schedulers import TableDiscreteDDIMScheduler

    if not isinstance(scheduler, DiscreteDDIMScheduler):
        raise ValueError(f"scheduler must be a DiscreteDDIMScheduler, got {type(scheduler).__name__}")
    check_chain(tables.chain, discrete_ddim_chain(vocab_size).config, type(scheduler).__name__)
    return TableDiscreteDDIMScheduler.from_config(
        scheduler.config,
        timestep_tables={str(n): list(edges) for n, edges in tables.tables.items()},
        timestep_table_info={str(n): entry for n, entry in tables.info.items()},
        timestep_spacing="table",
    )
