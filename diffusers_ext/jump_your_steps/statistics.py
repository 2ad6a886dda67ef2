"""The divergences d(k, i) between all pairs of grid points, from one pass of the network over the grid.

The network sees each sequence once at each grid point, with the same random numbers. What it says at some positions is
kept for all grid points at once; then where F_ik depends on k by a factor at most, all pairs are a product of two
matrices with a row for each grid point, computed over some positions and tokens at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object

from ..pipelines.call_arguments import checked_arguments
from ..runs.kept import Kept
from ..runs.processes import Processes
from ..schedulers import CTMCScheduler
from .costs import Cost, Grid
from .coupling import NoisyData
from .klub import PART, RateNetwork

STORE_BYTES = 2**30  # of what is kept for all grid points
PAIRWISE_POSITIONS = 64  # of each sequence, where grid points are compared pair by pair


@dataclass
class _Part:
    """Some positions of some sequences at all grid points.

    values: (grid, n, columns) float32, reverse rates, or laws given the other positions.
    tokens: (grid, n). times: (grid, n), at which they are. weight: (n,), how many positions each stands for.
    """

    values: torch.Tensor
    tokens: torch.Tensor
    times: torch.Tensor
    weight: torch.Tensor


class RateStatistics:
    """Computes d(k, i) for a data set, a batch at a time.

    Args:
        model: as of `KLUB`.
        scheduler: as of `KLUB`.
        data: as of `KLUB`.
        costs: for which to compute it.
        grid_size: intervals of the grid, at least 2.
        given: as of `KLUB`.
        seed: as of `KLUB`.
        noise: as of `KLUB`.
        num_positions: how many positions of each sequence enter, chosen at random by its seed; None takes as many as
            fit into 1 GiB at all grid points, and at most 64 for a held prediction and a kernel other than absorbing,
            where no product of matrices does it. Estimates are scaled, so that they stand for whole sequences.

    Raises:
        ValueError: for arguments out of range and, when computing, for network outputs that are not finite.
    """

    @checked_arguments
    def __init__(
        self,
        model: Callable,
        scheduler: CTMCScheduler,
        data: torch.Tensor,
        costs: tuple[Cost, ...] = (Cost(),),
        *,
        grid_size: int = 256,
        given: torch.Tensor | None = None,
        seed: int = 0,
        noise: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        num_positions: int | None = None,
    ):
        self.network, self.scheduler = RateNetwork(model, scheduler), scheduler
        self.data = NoisyData(scheduler, data, given, seed, noise)
        self.grid = Grid.of(scheduler, self.data.length, grid_size)
        self.costs = costs
        self.absorbing = scheduler.kernel.mask is not None
        self.num_positions = self._positions_that_fit(num_positions)

    def _positions_that_fit(self, asked: int | None) -> int:
        length = self.data.length
        if asked is not None:
            if not 1 <= asked <= length:
                raise ValueError(f"num_positions must be in [1, {length}], the sequence's length, got {asked}")
            return asked
        fit = STORE_BYTES // self._bytes_of_a_position()
        pairwise = not all(map(self._by_products, self.costs))
        return max(1, min(length, fit, PAIRWISE_POSITIONS if pairwise else length))

    def _bytes_of_a_position(self) -> int:
        kinds = len({self._kind(cost) for cost in self.costs})
        return kinds * 4 * (self.grid.size + 1) * self.scheduler.config.vocab_size

    def _kind(self, cost: Cost) -> str:
        """What `_Part.values` hold for a cost."""
        return "rates" if self._by_products(cost) else "laws"

    def _by_products(self, cost: Cost) -> bool:
        """Whether F_ik is R_i, or a law times a factor of k."""
        return self.absorbing or not cost.holds_prediction

    @torch.no_grad()
    def of(self, rows: torch.Tensor) -> dict[Cost, torch.Tensor]:
        """The sum of d(k, i) over some sequences, by their indices, for each cost; (grid, grid) float64 on the CPU.

        0 where k is before i.

        Args:
            rows: indices of the sequences.
        """
        size = self.grid.size + 1
        sums = {cost: torch.zeros(size, size, dtype=torch.float64) for cost in self.costs}
        at_once = max(1, STORE_BYTES // (self.num_positions * self._bytes_of_a_position()))
        for some in rows.split(at_once):
            parts = self._parts(some)
            for cost in self.costs:
                part = parts[self._kind(cost)]
                if self._by_products(cost):
                    sums[cost] += self._products(cost, part)
                else:
                    sums[cost] += self._pairs(cost, part)
        return sums

    def is_sum(self, content: dict, parts: int = 1) -> bool:
        """Whether what `accumulate` kept has a sum for each cost and part, of this grid.

        Args:
            content: what was kept.
            parts: how many parts there are.
        """
        size, names = self.grid.size + 1, [sum_name(cost, part) for cost in self.costs for part in range(parts)]
        begun = content["batches"] > 0 and len(content["evaluations"]) == parts
        return begun and all(content[name].shape == (size, size) for name in names)

    # What the network says at all grid points

    def _parts(self, rows: torch.Tensor) -> dict[str, _Part]:
        places, weight = self._places(rows)
        kinds = {self._kind(cost) for cost in self.costs}
        columns = self.scheduler.kernel.num_real_tokens
        shape, device = (self.grid.size + 1, places.numel()), self.network.device
        tokens = torch.empty(shape, dtype=torch.int64, device=device)
        times = torch.empty(shape, device=device)
        values = {kind: torch.zeros(*shape, columns, device=device) for kind in kinds}
        places = places.to(device)
        for k, point in enumerate(self.grid.points):
            x, time = self.data.at(point, rows, device)
            here = x.gather(1, places)
            tokens[k] = here.flatten()
            times[k] = torch.as_tensor(time, device=device).expand(len(x)).repeat_interleave(places.shape[1])
            if self.absorbing and not (x == self.scheduler.mask_token_id).any():
                continue  # nothing is left to decode: the rates are 0
            output = self.network.output(x, time)
            output = output.gather(1, places.unsqueeze(-1).expand(-1, -1, output.shape[-1]))
            for kind in kinds:
                found = self._laws(output, here, time) if kind == "laws" else self.network.rates(output, here, time)
                values[kind][k] = found.flatten(0, 1)
        return {kind: _Part(values[kind], tokens, times, weight.flatten().to(device)) for kind in kinds}

    def _places(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of each sequence, (batch, num_positions), and how many each stands for; 0 for a given one."""
        count, length = self.num_positions, self.data.length
        given = torch.zeros(len(rows), length) if self.data.given is None else self.data.given[rows].float()
        if count == length:
            return torch.arange(length).expand(len(rows), -1), 1 - given
        order = [torch.rand(length, generator=one) for one in self.data.generators(rows, after_noise=True)]
        places = (torch.stack(order) + given).argsort(dim=1)[:, :count]  # those that are not given come first
        free = length - given.sum(dim=1, keepdim=True)
        return places, (1 - given.gather(1, places)) * free / free.clamp(1, count)

    def _laws(self, output: torch.Tensor, tokens: torch.Tensor, time) -> torch.Tensor:
        """The law of each position given the others, (batch, places, vocab_size) float32."""
        rows = output.float().flatten(0, 1).clone()
        laws = self.scheduler.reverse.law_given_others(rows, tokens.flatten(), time)
        if not laws.isfinite().all():
            self.network.rates(output, tokens, time)  # raises, and says where
        return laws.view(output.shape)

    # All pairs of grid points as products of matrices

    def _products(self, cost: Cost, part: _Part) -> torch.Tensor:
        """The sum of d(k, i) where F_ik is R_i, or a law that does not change times a factor of k; (grid, grid)."""
        size, columns = self.grid.size + 1, part.values.shape[-1]
        rates = part.values.sum(dim=-1)  # (grid, n)
        laws = cost.holds_prediction
        masked = part.tokens == self.scheduler.mask_token_id if self.absorbing else torch.ones_like(part.tokens).bool()
        weights = masked * part.weight if laws or not self.grid.counts else masked * part.weight * part.times
        last = masked.sum(dim=0)  # a decoded position stays decoded: it matters at the first so many grid points
        total = torch.zeros(size, dtype=torch.float64)
        held, cross = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
        for some in last.argsort(descending=True).split(max(1, PART // (size * columns))):
            k = int(last[some[0]])
            norm = rates[:k, some].clamp(min=1e-30) if laws else torch.ones_like(rates[:k, some])
            weight, sums = weights[:k, some], rates[:k, some] / norm
            total[:k] += (weight * sums).cpu().double().sum(dim=1)
            held[:k, :k] += (weight @ sums.T).cpu().double()
            width = max(1, PART // (size * len(some)))
            for start in range(0, columns, width):
                values = part.values[:k, some, start : start + width] / norm.unsqueeze(-1)
                left = (cost.left(values) * weight.unsqueeze(-1)).flatten(1)
                cross[:k, :k] += (left @ cost.right(values).flatten(1).T).cpu().double()
        return (cost.from_products(cross, total, held) * self._factors(cost).unsqueeze(1)).tril()

    def _factors(self, cost: Cost) -> torch.Tensor:
        """The factors that the divergence at each grid point is multiplied with, (grid,) float64.

        Times: for laws, the rate lambda at which a mask is decoded. Counts: with m positions of the whole length still
        to come, each is the next one with probability 1 / m, and the time until then is t / m on average, given the
        time t of this one (order statistics of uniforms); so 1 / m, and the times are in `_products`.
        """
        points = torch.tensor(self.grid.points, dtype=torch.float64)
        if self.grid.counts:
            return 1 / (self.data.length - points).clamp(min=1)
        if cost.holds_prediction:
            return self.scheduler.reverse.hazard(points)
        return torch.ones_like(points)

    # Pair by pair

    def _pairs(self, cost: Cost, part: _Part) -> torch.Tensor:
        """The sum of d(k, i) for held predictions whose rates are not a law times a factor of k; (grid, grid)."""
        size, vocab_size = self.grid.size + 1, part.values.shape[-1]
        sums = torch.zeros(size, size, dtype=torch.float64)
        made = self.scheduler.sigma_bar(torch.tensor(self.grid.points, dtype=torch.float64))[:, None, None]
        for some in torch.arange(part.values.shape[1]).split(max(1, PART // (size * vocab_size))):
            weight, laws = part.weight[some], part.values[:, some]
            for k, point in enumerate(self.grid.points):
                # F_ik for all i up to k, the last of them R_k
                held = self.scheduler.reverse.rates_of_law(laws[: k + 1], part.tokens[k, some], made[: k + 1], point)
                d = cost.divergence(held[-1:], held).sum(dim=-1)
                sums[k, : k + 1] += (d @ weight).cpu().double()
        return sums


def accumulate(
    statistics: RateStatistics,
    batch_size: int,
    processes: Processes,
    kept: Kept | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    parts: Sequence[int] | None = None,
) -> list[tuple[dict[Cost, torch.Tensor], int]]:
    """The mean d(k, i) a sequence, (grid, grid) float64, of each cost, and how many sequences passed the network.

    The processes take batches in turn and add their sums in the order of the batches, so that the result does not
    depend on how many they are, but for what more or fewer threads round differently.

    Args:
        statistics: of the data.
        batch_size: sequences that pass the network together.
        processes: that share the work.
        kept: where the sums so far are kept after each round; a later start goes on from them, also with another
            number of processes.
        on_progress: called with the sequences done and their number.
        parts: numbers of sequences that follow each other in the data, with a result for each; by default all are one.

    Raises:
        ValueError: for a file of something else, or begun with other settings.
    """
    parts = [statistics.data.count] if parts is None else list(parts)
    batches = [
        (p, rows) for p, part in enumerate(torch.arange(sum(parts)).split(parts)) for rows in part.split(batch_size)
    ]
    size = statistics.grid.size + 1
    sums = {
        sum_name(cost, p): torch.zeros(size, size, dtype=torch.float64)
        for cost in statistics.costs
        for p in range(len(parts))
    }
    begun = processes.agreed(lambda: kept and kept.load()) or {**sums, "batches": 0, "evaluations": [0] * len(parts)}
    sums, done, evaluations = {name: begun[name] for name in sums}, begun["batches"], list(begun["evaluations"])
    while done < len(batches):
        number, before = done + processes.index, statistics.network.evaluations
        mine = None
        if number < len(batches):
            part, rows = batches[number]
            mine = part, statistics.of(rows), statistics.network.evaluations - before
        for one in [mine] if processes.count == 1 else gather_object([mine]):
            if one is not None:
                part, found, made = one
                for cost in statistics.costs:
                    sums[sum_name(cost, part)] = sums[sum_name(cost, part)] + found[cost]
                evaluations[part] += made
                done += 1
        if kept is not None and processes.is_main:
            kept.save(**sums, batches=done, evaluations=evaluations)
        if on_progress is not None:
            on_progress(sum(len(rows) for _, rows in batches[:done]), sum(parts))
    return [
        ({cost: sums[sum_name(cost, p)] / count for cost in statistics.costs}, evaluations[p])
        for p, count in enumerate(parts)
    ]


def sum_name(cost: Cost, part: int) -> str:
    """Under which the sum of a cost over the sequences of a part is kept."""
    return str(cost) if part == 0 else f"{cost}, part {part}"
