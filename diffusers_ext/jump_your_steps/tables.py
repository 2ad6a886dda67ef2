"""Timestep tables: the edges of the steps for each number of steps, what they were optimised for, and how."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..checkpoints.tensor_files import read_torch_file
from ..pipelines.call_arguments import checked_arguments
from ..runs.files import write_json
from ..schedulers import CTMCScheduler
from ..schedulers.timestep_tables import chain_of as chain_of_config
from ..schedulers.timestep_tables import check_chain, check_tables
from .diffusers_schedulers import chain_of_diffusers, kernel_and_class

FORMAT = "diffusers_ext timestep tables, 1"


def chain_of(scheduler: CTMCScheduler) -> dict:
    """The settings of a scheduler that a table depends on: kernel, vocabulary and noise."""
    return chain_of_config(scheduler.config)


@dataclass(frozen=True)
class TimestepTables:
    """Edges by number of steps, for one chain.

    Attributes:
        tables: {n: (t_0, ..., t_n)}, strictly decreasing in (0, 1].
        chain: what they are for, see `chain_of`; entries that are missing are not compared.
        info: {n: provenance}, JSON-able; each records the chain, and the sampler if known.

    Raises:
        ValueError: for edges that do not decrease strictly in (0, 1], or are not n + 1.
    """

    tables: Mapping[int, tuple[float, ...]]
    chain: Mapping[str, str | int | float]
    info: Mapping[int, dict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_tables(self.tables, self.info)
        tables = {int(n): edges for n, edges in sorted((self.tables or {}).items(), key=lambda item: int(item[0]))}
        info = {int(n): dict(entry) for n, entry in (self.info or {}).items()}
        if unknown := sorted(set(info) - set(tables)):
            raise ValueError(f"info is about {unknown} steps, but there are tables for {sorted(tables)} only")
        info = {n: {"chain": dict(self.chain), **info.get(n, {})} for n in tables}
        object.__setattr__(self, "tables", {n: tuple(map(float, edges)) for n, edges in tables.items()})
        object.__setattr__(self, "chain", dict(self.chain))
        object.__setattr__(self, "info", info)

    def __getitem__(self, num_inference_steps: int) -> tuple[float, ...]:
        if num_inference_steps not in self.tables:
            raise ValueError(f"there is no table for {num_inference_steps} steps, only for {sorted(self.tables)}")
        return self.tables[num_inference_steps]

    # JSON

    @checked_arguments
    def save(self, path: str | Path, notes: Mapping | None = None) -> Path:
        """Write a JSON file, which appears whole or not at all.

        Args:
            path: of the file.
            notes: further entries, JSON-able.
        """
        path = Path(path)
        content = {
            "format": FORMAT,
            "chain": self.chain,
            "tables": {str(n): list(edges) for n, edges in self.tables.items()},
            "info": {str(n): entry for n, entry in self.info.items()},
            **(notes or {}),
        }
        write_json(path, content)
        return path

    @classmethod
    @checked_arguments
    def load(cls, path: str | Path) -> "TimestepTables":
        """Read what `save` wrote.

        Args:
            path: of the file.

        Raises:
            ValueError: for another file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise KeyError("format")
            return cls(content["tables"], content["chain"], content["info"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{str(path)!r} is not a file of timestep tables as `save` writes them: {error}"
            ) from error

    # The authors' files

    @classmethod
    @checked_arguments
    def from_index_lists(cls, path: str | Path, scheduler: CTMCScheduler) -> "TimestepTables":
        """The schedules that the authors' code saves: a .pt file with a list of lists of indices.

        Index i of src + 1 is the time 1 + i (1e-5 - 1) / src, or, if the scheduler's sampler is "gillespie", i tokens
        are decoded of src. A file can hold lists for smaller numbers of steps that a later round of their search has
        changed; the list for the largest number is always as it was found.

        Args:
            path: of the file.
            scheduler: that the tables are for.

        Raises:
            ValueError: for a file that holds anything else.
        """
        lists = read_torch_file(path)
        whole = isinstance(lists, list) and lists and all(isinstance(entry, list) and entry for entry in lists)
        if not whole or not all(isinstance(i, int) and 0 <= i < 2**31 for entry in lists for i in entry):
            raise ValueError(f"{str(path)!r} must hold a list of lists of indices, got {str(lists)[:100]}")
        ends = {(entry[0], entry[-1]) for entry in lists}
        if len(ends) != 1 or min(ends)[0] != 0 or min(ends)[1] == 0:
            raise ValueError(f"{str(path)!r}: every list must run from 0 to the size of the grid, got {sorted(ends)}")
        size = lists[0][-1]
        if scheduler.sampler.counts_tokens:
            tables = {len(entry) - 1: times_of_counts(entry, scheduler.config.min_timestep) for entry in lists}
        else:
            tables = {len(entry) - 1: [1 + i * (1e-5 - 1) / size for i in entry] for entry in lists}
        made = {"method": "imported", "file": Path(path).name, "sampler": scheduler.config.sampler, "grid_size": size}
        info = {n: dict(made) for n in tables}
        return cls(tables, chain_of(scheduler), info)

    # Schedulers

    @classmethod
    @checked_arguments
    def of(cls, scheduler: CTMCScheduler) -> "TimestepTables":
        """The tables in a scheduler's config.

        Args:
            scheduler: with tables in its config.
        """
        config = scheduler.config
        return cls(config.timestep_tables or {}, chain_of(scheduler), config.timestep_table_info or {})

    @checked_arguments
    def apply_to(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """A scheduler with these tables in its config, which `set_timesteps(n)` takes, and `save_pretrained` writes.

        Of diffusers' schedulers for which `optimize_timesteps` makes tables, that is the class of this package that
        takes their place. Tables that it has for other numbers of steps stay.

        Args:
            scheduler: with the chain that the tables are for; it is not changed.

        Raises:
            ValueError: if the tables are for another chain, and for a scheduler that takes none.
        """
        chain, config = dict(self.chain), scheduler.config
        if isinstance(scheduler, CTMCScheduler):
            cls, before = type(scheduler), TimestepTables.of(scheduler)
        else:  # knows no vocabulary, so that its steps compare the network's output instead
            cls, config = kernel_and_class(scheduler)[1], chain_of_diffusers(scheduler, 2).config
            chain.pop("vocab_size", None)
            before = [scheduler.config.get(name) or {} for name in ("timestep_tables", "timestep_table_info")]
            before = TimestepTables(before[0], {}, before[1])
        check_chain(chain, config, type(scheduler).__name__)
        tables = {**before.tables, **self.tables}
        info = {**{n: entry for n, entry in before.info.items() if n not in self.tables}, **self.info}
        # without diffusers' note of defaults, which has those that were given by position, and loses them
        settings = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
        return cls.from_config(
            settings,
            timestep_tables={str(n): list(tables[n]) for n in sorted(tables)},
            timestep_table_info={str(n): info[n] for n in sorted(info)},
            timestep_spacing="table",
        )


def times_of_counts(counts: list[int], min_timestep: float) -> list[float]:
    """Edges at which `CTMCScheduler` with k-Gillespie has decoded these numbers of tokens, the last one being all."""
    length = counts[-1]
    return [min_timestep + (1 - min_timestep) * (1 - count / length) for count in counts]
