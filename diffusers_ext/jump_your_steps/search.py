"""Timestep tables for a model, by the paper's search or by an exact one (Jump Your Steps, 2410.07761)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from ..pipelines.call_arguments import checked_arguments
from ..runs.kept import Kept
from ..runs.lock import lock
from ..runs.processes import Processes
from ..runs.provenance import describe_component, drawing_versions, hash_of
from ..schedulers import CTMCScheduler
from .costs import Cost, Grid, cheapest_schedules, total_cost
from .diffusers_schedulers import network_and_chain
from .golden import Bracket, best_hierarchy, golden_middle, hierarchical_tables, levels_of
from .klub import KLUB
from .statistics import RateStatistics, accumulate
from .tables import TimestepTables, chain_of, times_of_counts

METHODS = ("exact", "hierarchical", "golden")
GRID_SIZES = {"exact": 256, "hierarchical": 256, "golden": 1024}
INTERVALS_A_STEP, FEWEST_INTERVALS = 4, 128  # of exact's grid of times: docs/jump_your_steps.md has what fewer cost


@checked_arguments
def optimize_timesteps(
    model: Callable,
    scheduler: SchedulerMixin,
    data: torch.Tensor,
    num_inference_steps: Sequence[int] = (4, 8, 16, 32),
    method: str = "exact",
    *,
    objective: str | None = None,
    alpha: float | None = None,
    held: str | None = None,
    last_edge: str | None = None,
    coupling: str = "data",
    num_samples: int | None = None,
    num_report_samples: int | None = None,
    batch_size: int = 64,
    grid_size: int | None = None,
    num_positions: int | None = None,
    given: torch.Tensor | None = None,
    mask_token_id: int | None = None,
    seed: int = 0,
    noise: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    average: str = "sequences",
    resume: str | Path | None = None,
    progress: bool | Callable[[int, int], None] = True,
    accelerator: Accelerator | None = None,
) -> TimestepTables:
    """Edges of the steps with which the scheduler's sampler errs least, for each number of steps.

        tables = optimize_timesteps(pipe.model, pipe.scheduler, tokens, (4, 8, 12))
        pipe.scheduler = tables.apply_to(pipe.scheduler)  # pipe(num_inference_steps=12) then takes the table

    Another number of threads or processes, another batch size or another machine rounds the network's float32 in its
    own way. That changes costs by about 1e-7 of themselves, so they are recorded to five digits, the last of which may
    differ; and a table only where two are equally good to that rounding.

    Args:
        model: called as model(tokens (batch, length), time (batch,)), such as a pipeline's; put in evaluation mode
            meanwhile.
        scheduler: its chain and its sampler; with "gillespie" the tables are about numbers of tokens. Or diffusers'
            DiscreteDDIMScheduler, AmusedScheduler or BlockRefinementScheduler, whose network gives logits and need not
            look at the time; `apply_to` then gives the scheduler with tables that takes its place.
        data: sequences like those to generate, (count, length) integers; the first num_samples are used, by default
            all. exact and hierarchical choose the tables on all of these but the last num_report_samples, by default a
            quarter, and say on the last what the steps cost on sequences that have not chosen them: info's "bound" and
            "bound_of_even_steps", beside "bound_where_chosen".
        num_inference_steps: as of `CTMCScheduler.set_timesteps`; any numbers for "exact", else powers of two.
        method: "exact": the network runs once over a grid, then dynamic programming finds the steps of least total
            cost. "hierarchical": the paper's objective, whose best point in each interval is looked up on the same
            grid, level after level. "golden": the paper's search for it, by golden section.
        objective: what a step costs, see `Cost`. "exact" takes any, by default "kl" of a held prediction; the others
            are about "klub" of held rates.
        alpha: of objective "alpha", see `Cost`.
        held: what a step holds, "prediction" or "rates", see `Cost`.
        last_edge: "free" lets the last step end before `min_timestep`, where the final denoising, a network call that
            is made anyway, then is a step like the others. Only "exact" can, for kernels whose final denoising draws
            tokens: there it is the default. Otherwise, and by default elsewhere, "min_timestep".
        coupling: of golden, "data" or "path", see `KLUB`.
        num_samples: how many sequences of the data are used; by default all.
        num_report_samples: how many of these, the last, are kept from the choice; by default a quarter.
        batch_size: sequences that pass the network together.
        grid_size: intervals of the grid, so many evaluations of the network; by default for exact 4 for each of the
            most steps and at least 128, for hierarchical 256, for golden 1024. The grid of gillespie are the numbers
            of tokens, by default 256 of them or all where the length is no larger, and always all for golden.
        num_positions: of exact and hierarchical, how many positions of a sequence enter, see `RateStatistics`.
        given: where tokens are given, (length,) or (count, length) bool, see `KLUB`.
        mask_token_id: the mask of a BlockRefinementScheduler's network, which that scheduler does not know.
        seed: sequence i draws with seed + i, see `KLUB`.
        noise: recorded noise in place of a draw, see `KLUB`.
        average: of golden, "sequences" or "batches", see `KLUB`.
        resume: a file in which what was computed is kept, so that a later call with the same settings goes on from
            there.
        progress: whether to show a progress bar; or a function, called with what is done and what there is.
        accelerator: shares the work out among its processes, all of which get the same tables.

    Raises:
        ValueError: for arguments that are out of range or contradict each other, more steps than the grid has, data
            that are not of the scheduler's vocabulary, a file of other settings or in use, and rates that are not
            finite, with the time and the position.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    cost = _cost(method, objective, alpha, held)
    numbers = _numbers(num_inference_steps, method)
    data = _first(data, num_samples)
    with _evaluating(model):
        network, scheduler = network_and_chain(model, scheduler, data, mask_token_id)
    if scheduler.sampler.evaluations_per_step > 1:
        raise ValueError(
            f"tables are about steps that hold one prediction, and sampler={scheduler.config.sampler!r} makes"
            f" {scheduler.sampler.evaluations_per_step} a step; optimise with sampler='euler', whose tables it takes"
        )
    free_end = _free_end(last_edge, method, scheduler)
    grid = _grid(method, scheduler, data.shape[1], grid_size, max(numbers))
    num_report_samples = _num_report(num_report_samples, method, len(data))
    settings = {
        "method": method, "objective": cost.objective, "alpha": cost.alpha, "held": cost.held,
        "last_edge": "free" if free_end else "min_timestep", "grid_size": grid.size, "num_samples": len(data),
        "num_report_samples": num_report_samples, "seed": seed, "sampler": scheduler.config.sampler,
        "model": _described(model),
    }  # fmt: skip
    kept = {
        **settings, "chain": chain_of(scheduler), "batch_size": batch_size, "versions": drawing_versions(),
        "inputs": hash_of(data, given, *(noise if isinstance(noise, tuple) else (noise,))),
    }  # fmt: skip
    if method == "golden":
        kept |= {"coupling": coupling, "average": average}
        del kept["num_report_samples"]  # which it has no use for
    work = _Work(Processes(accelerator), None if resume is None else Path(resume), kept, progress)
    with _evaluating(model), work.locked():
        if method == "golden":
            klub = KLUB(
                network, scheduler, data, coupling=coupling, given=given, seed=seed, noise=noise, average=average,
                batch_size=batch_size, accelerator=accelerator,
            )  # fmt: skip
            found, evaluations = _golden(klub, grid, numbers, work)
            further = {"coupling": coupling}
        else:
            statistics = RateStatistics(
                network, scheduler, data, (cost,), grid_size=grid.size, given=given, seed=seed, noise=noise,
                num_positions=num_positions,
            )  # fmt: skip
            found, evaluations, reported = _by_statistics(
                statistics, cost, numbers, method, free_end, batch_size, num_report_samples, work
            )
            further = {"num_positions": statistics.num_positions, "report_evaluations": reported}
    return _tables(found, grid, scheduler, {**settings, **further, "network_evaluations": evaluations})


@contextmanager
def _evaluating(model: Callable) -> Iterator[None]:
    """Evaluation mode, and the mode from before in the end."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


# Each method: grid indices for each number of steps and what is known of their quality, and how many sequences passed
# the network in all starts

Found = dict[int, tuple[list[int], dict]]


def _by_statistics(
    statistics: RateStatistics, cost: Cost, numbers: list[int], method: str, free_end: bool, batch_size: int,
    num_report: int, work,
) -> tuple[Found, int, int]:  # fmt: skip
    """Chosen on the first sequences, reported on the last `num_report`; evaluations for both, and for the report."""
    if max(numbers) > statistics.grid.size - free_end:
        raise ValueError(
            f"{max(numbers)} steps do not fit on a grid of {statistics.grid.size} intervals; pass a larger grid_size,"
            " or fewer steps"
        )
    parts = [statistics.data.count - num_report, *([num_report] if num_report else [])]
    with work.progress_bar(statistics.data.count) as on_progress:
        kept = work.kept(
            lambda content: statistics.is_sum(content, len(parts)), num_positions=statistics.num_positions
        )
        (chosen_on, made), *report = accumulate(statistics, batch_size, work.processes, kept, on_progress, parts)
    grid = statistics.grid
    costs = grid.step_costs(chosen_on[cost])
    if method == "exact":
        paths = {n: path for n, (path, _) in cheapest_schedules(costs, numbers, free_end).items()}
    else:
        paths = best_hierarchy(grid.points, chosen_on[cost], numbers)
    fresh = [grid.step_costs(means[cost]) for means, _ in report]

    def quality(n: int) -> dict:
        found = {"bound_where_chosen": _recorded(total_cost(costs, paths[n], free_end))}
        for one in fresh:
            found["bound"] = _recorded(total_cost(one, paths[n], free_end))
            found["bound_of_even_steps"] = _recorded(total_cost(one, grid.even(n), free_end))
        return found

    reported = sum(evaluations for _, evaluations in report)
    return {n: (path, quality(n)) for n, path in paths.items()}, made + reported, reported


def _recorded(cost: float) -> float:
    """To five digits: a float32 network rounds by its number of threads, its batch and its machine in the seventh."""
    return float(f"{cost:.5g}")


def _golden(objective: KLUB, grid: Grid, numbers: list[int], work) -> tuple[Found, int]:
    levels, masks = levels_of(numbers), objective.network.scheduler.kernel.mask is not None
    bracket = Bracket.of_counts() if grid.counts else Bracket.of_times(grid.size, 1e-3 if masks else 1e-2)
    kept = work.kept(lambda content: all(math.isfinite(value) for _, value in content["values"]))
    total = work.processes.total
    begun = work.processes.agreed(lambda: kept and kept.load()) or {"values": []}
    objective.values.update((tuple(times), value) for times, value in begun["values"])
    evaluations, held = begun.get("evaluations", 0), begun.get("held", [None, 0])
    done = 0
    with work.progress_bar(2**levels - 1) as on_progress:

        def middle(i: int, j: int) -> int:
            nonlocal done, evaluations, held
            before = objective.network.evaluations
            index = golden_middle(objective, grid.points, i, j, bracket)
            if made := total(objective.network.evaluations - before):
                # What an earlier start had at t1 is gone; without the interruption it would not have been made again.
                evaluations += made - (held[1] if held[0] == grid.points[i] else 0)
                held = [None, 0]
                outputs = [objective.held[0], total(objective.held[1])]
                if kept is not None and work.processes.is_main:
                    values = [[times, value] for times, value in objective.values.items()]
                    kept.save(values=values, evaluations=evaluations, held=outputs)
            done += 1
            on_progress(done, 2**levels - 1)
            return index

        tables = hierarchical_tables(middle, grid.size, levels)
    return {n: (tables[n], {}) for n in numbers}, evaluations


def _tables(found: dict, grid: Grid, scheduler: CTMCScheduler, settings: dict) -> TimestepTables:
    tables, info = {}, {}
    for n, (path, quality) in found.items():
        points = [grid.points[i] for i in path]
        tables[n] = times_of_counts(points, scheduler.config.min_timestep) if grid.counts else points
        info[n] = {**settings, **quality, **({"token_counts": points} if grid.counts else {})}
        info[n]["versions"] = drawing_versions()
    return TimestepTables(tables, chain_of(scheduler), info)


class _Work:
    """Processes, progress, and the file in which a search keeps what it has."""

    def __init__(self, processes: Processes, path: Path | None, settings: dict, progress):
        self.processes, self.path, self.settings, self.progress = processes, path, settings, progress

    @contextmanager
    def progress_bar(self, total: int) -> Iterator[Callable[[int, int], None]]:
        """A function to call with what is done and what there is; it shows a bar in the main process, if asked to."""
        if callable(self.progress):
            yield self.progress
            return
        shown = self.progress and self.processes.is_main
        columns = *Progress.get_default_columns(), MofNCompleteColumn()
        with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
            task = bar.add_task("optimising", total=total)
            yield lambda done, _: bar.update(task, completed=done)

    def locked(self) -> AbstractContextManager:
        """The file for this search alone, for as long as it goes on."""
        if self.path is None:
            return nullcontext()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return lock(self.path, self.processes)

    def kept(self, is_whole: Callable[[dict], bool], **more) -> Kept | None:
        """What is kept, with the settings and with more of them; None where nothing is."""
        return None if self.path is None else Kept(self.path, {**self.settings, **more}, is_whole)


# Arguments


def _cost(method: str, objective: str | None, alpha: float | None, held: str | None) -> Cost:
    if method == "exact":
        objective = objective or "kl"
        return Cost(objective, alpha, held or ("rates" if objective == "klub" else "prediction"))
    cost = Cost(objective or "klub", alpha, held or "rates")
    if cost.objective != "klub":
        raise ValueError(f'method={method!r} is about objective="klub", got {objective!r}; use method="exact"')
    return cost


def _free_end(last_edge: str | None, method: str, scheduler: CTMCScheduler) -> bool:
    config = scheduler.config
    draws = not scheduler.sampler.counts_tokens and scheduler.reverse.denoising_draws
    if last_edge is None:
        return method == "exact" and draws
    if last_edge not in ("free", "min_timestep"):
        raise ValueError(f'last_edge must be "free" or "min_timestep", got {last_edge!r}')
    if last_edge == "free" and method != "exact":
        raise ValueError(f'last_edge="free" needs method="exact", got method={method!r}')
    if last_edge == "free" and not draws:
        raise ValueError(
            f'last_edge="free": with sampler={config.sampler!r} and kernel={config.kernel!r} of'
            f' prediction_type={config.prediction_type!r} the final denoising draws no tokens; use "min_timestep"'
        )
    return last_edge == "free"


def _numbers(numbers: Sequence[int], method: str) -> list[int]:
    numbers = sorted(set(numbers))
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise ValueError(f"num_inference_steps must be integers >= 1, at least one, got {numbers}")
    odd = [n for n in numbers if n < 2 or n & (n - 1)]
    if method != "exact" and odd:
        raise ValueError(f'method={method!r} makes tables for 2, 4, 8, ... steps, not {odd}; use method="exact"')
    return numbers


def _first(data: torch.Tensor, num_samples: int | None) -> torch.Tensor:
    data = torch.as_tensor(data)
    if data.ndim != 2 or not len(data):
        raise ValueError(f"data must be (sequences, length), got {tuple(data.shape)}")
    if num_samples is None:
        return data
    if not 1 <= num_samples <= len(data):
        raise ValueError(
            f"num_samples must be in [1, {len(data)}], the number of sequences in data, got {num_samples}"
        )
    return data[:num_samples]


def _num_report(asked: int | None, method: str, count: int) -> int:
    if method == "golden":
        if asked:
            raise ValueError(f"num_report_samples={asked}: golden records no bound; leave it out")
        return 0
    if asked is None:
        return 0 if count == 1 else max(1, round(count / 4))
    if isinstance(asked, bool) or not isinstance(asked, int) or not 0 <= asked < count:
        raise ValueError(f"num_report_samples must be an integer in [0, {count}), got {asked!r}")
    return asked


def _grid(method: str, scheduler: CTMCScheduler, length: int, size: int | None, most: int) -> Grid:
    if method == "golden" and scheduler.sampler.counts_tokens:
        size = size or length
        if size != length:
            raise ValueError(f"grid_size={size}: golden with gillespie counts every token, {length}; leave it out")
    elif method == "exact" and not scheduler.sampler.counts_tokens:
        size = size or max(FEWEST_INTERVALS, INTERVALS_A_STEP * most)
    return Grid.of(scheduler, length, size or GRID_SIZES[method])


def _described(model: Callable) -> dict:
    """Class, hash and name: the Hub id, or the last two folders of a path, since tables are pushed to the Hub."""
    described = describe_component(model)
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name and Path(name).exists():
        name = "/".join(Path(name).parts[-2:])
    return {**described, "name": name} if name else described
