r"""Samplers of the reverse chain: how tokens at a time become tokens at an earlier one.

Each says how many evaluations of the network one step takes, `evaluations_per_step`, at which times of a schedule they
are, `evaluated`, what is done after each, `stages`, whether steps count decoded tokens instead of time,
`counts_tokens`, the earliest time at which one may end, `least`, and at which total noises it needs transitions,
`noise_levels`. They know a `ReverseChain`; what is random comes from a generator, or is recorded noise to replay.

Tokens are worked on position by position, a bounded number at a time, so that memory does not grow with batch x
length x vocab. Draws are made for all positions of a sample, also for those that do not move, so that the host need
not know how many do.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from diffusers.configuration_utils import FrozenDict

from .ctmc_draws import Generators, clocks, clocks_a_token, clocks_for_tokens, draw_tokens, replay_tokens
from .ctmc_inputs import check_recorded
from .ctmc_kernels import rest_stays, stays_or_jumps
from .ctmc_reverse import ReverseChain
from .timestep_edges import StepEdges

CHUNK = 2**22  # floats that are worked on at a time
DRAWS = 2**24  # clocks that are drawn at a time, for whole samples

Times = list[tuple[float, float]]  # of each sample: where a step starts, and where it ends


class TimeSampler:
    """What samplers share whose steps are lengths of time."""

    evaluations_per_step, counts_tokens, least = 1, False, 0.0
    jumps = "categorical"

    def evaluated(self, edges: list[float], end: float) -> list[float]:
        """The times at which a schedule of these edges evaluates the network."""
        return list(edges)

    def noise_levels(self, edges: list[float]) -> list[float]:
        """The total noises whose transitions a schedule of these edges needs."""
        return [self.chain.sigma_bar(t) for t in self.evaluated(edges, 0.0)]


class EulerSampler(TimeSampler):
    """Tau-leaping: the rates of the start are held over a step, of a length h.

    jumps: "categorical", one jump at most, with probabilities 1{x} + h R; "poisson", Poisson numbers of jumps to each
    token, which are added and clamped to the vocabulary (tauLDR, 2205.14987).
    """

    least = -math.inf

    def __init__(self, chain: ReverseChain, jumps: str = "categorical"):
        self.chain, self.jumps = chain, jumps
        self.stages = (self.step,)

    def step(
        self,
        output: torch.Tensor,
        sample: torch.Tensor,
        times: Times,
        generator: Generators,
        noise: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens at the ends of `times`. noise: uniforms (batch, length, vocab), or counts of Poisson jumps."""
        return self._jump(self.chain.rates, output, sample, times, generator, noise)

    def correct(
        self,
        output: torch.Tensor,
        sample: torch.Tensor,
        times: Times,
        generator: Generators,
        noise: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens after as long a leap at the starts of `times`, with rates that leave the law there as it is."""
        return self._jump(self.chain.rates_both_ways, output, sample, times, generator, noise, everywhere=True)

    def _jump(self, rates, output, sample, times, generator, noise, everywhere=False) -> torch.Tensor:
        def means(out, x, time, next_time):
            return rates(out, x, time, time - next_time)

        if self.jumps == "poisson":
            return leap(self.chain, means, output, sample, times, generator, noise)

        def weights(out, x, time, next_time):
            return rest_stays(means(out, x, time, next_time), x)

        return move(self.chain, weights, output, sample, times, generator, noise, everywhere=everywhere)


class TweedieSampler(TimeSampler):
    """Each token by its exact posterior given the network's prediction; the analytic sampler of SEDD (2310.16834)."""

    def __init__(self, chain: ReverseChain):
        self.chain, self.stages = chain, (self.step,)
        self.correct = EulerSampler(chain).correct

    def noise_levels(self, edges: list[float]) -> list[float]:
        """Those of the edges, and of each step between them."""
        levels = super().noise_levels(edges)
        return [*levels, *(now - then for now, then in pairwise(levels))]

    def step(
        self,
        output: torch.Tensor,
        sample: torch.Tensor,
        times: Times,
        generator: Generators,
        noise: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens at the ends of `times`. noise: uniforms (batch, length, vocab)."""
        return move(self.chain, self.chain.posterior_weights, output, sample, times, generator, noise)


class ThetaTrapezoidalSampler(TimeSampler):
    r"""The theta-trapezoidal method (Ren et al., 2502.00234): two evaluations a step, of second order in its length.

    From x at a time, a leap of the share theta of the step leads to x'; from there another leap with the jumps

    .. math:: \Big(\alpha R'(x', y) - (\alpha - 1) R(x, y)\Big)_+, \quad \alpha = \frac{1}{2 \theta (1 - \theta)}

    covers the rest, R' the rates of the network at x'. Both leaps hold the network's prediction rather than the rates
    of the start: what of R follows from the time alone is integrated, see `ReverseChain.held`. A token stays with
    probability exp(-M), M the sum of its expected jumps, and otherwise becomes y in proportion to them. With the
    absorbing kernel masks are then decoded exactly as often as they should.

    Between the two stages of a step the sampler keeps the first output and its tokens.
    """

    evaluations_per_step, least, theta = 2, math.ulp(0.0), 0.5

    def __init__(self, chain: ReverseChain):
        self.chain, self.stages = chain, (self.begin, self.finish)
        self.correct = EulerSampler(chain).correct
        self._begun: tuple | None = None

    def evaluated(self, edges: list[float], end: float) -> list[float]:
        """The edges, and between two of them where the first leap ends."""
        inside = [[now, now - self.theta * (now - then)] for now, then in pairwise(edges)]
        return [*(time for both in inside for time in both), edges[-1]]

    def begin(
        self,
        output: torch.Tensor,
        sample: torch.Tensor,
        times: Times,
        generator: Generators,
        noise: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens at the ends of `times`, inside of the step. noise: uniforms (batch, length, vocab)."""
        self._begun = output, sample, times

        def weights(out, x, time, next_time):
            return stays_or_jumps(self.chain.held(out, x, time, time, next_time), x)

        return move(self.chain, weights, output, sample, times, generator, noise)

    def finish(
        self,
        output: torch.Tensor,
        sample: torch.Tensor,
        times: Times,
        generator: Generators,
        noise: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens at the ends of `times`, where the step ends.

        Raises:
            ValueError: if no step was begun.
        """
        begun, self._begun = self._begun, None
        inside = [now for now, _ in times]
        if begun is None or begun[1].shape != sample.shape or [then for _, then in begun[2]] != inside:
            raise ValueError(
                f"timestep={inside[0]} is in the middle of a step of two network calls; call step at the timestep"
                " before, and then at this one, with the same batch"
            )
        factor = 1 / (2 * self.theta * (1 - self.theta))

        def weights(out, x, time, next_time, before, x_before, start):
            means = self.chain.held(out, x, time, time, next_time).mul_(factor)
            means.sub_(self.chain.held(before, x_before, start, time, next_time), alpha=factor - 1)
            return stays_or_jumps(means.clamp_(min=0).scatter_(1, x.unsqueeze(1), 0), x)

        earlier = *begun[:2], [start for start, _ in begun[2]]
        return move(self.chain, weights, output, sample, times, generator, noise, earlier=earlier)


class GillespieSampler:
    """k-Gillespie (Jump Your Steps, 2410.07761): an exact number of masks is decoded, those that jump first."""

    evaluations_per_step, counts_tokens = 1, True
    jumps = "categorical"

    def __init__(self, chain: ReverseChain):
        self.chain = chain

    def evaluated(self, edges: list[float], end: float) -> list[float]:
        """The last edge only where it lies above the end of time, so that there is something left to decode."""
        return list(edges) if edges[-1] > end else list(edges[:-1])

    def noise_levels(self, edges: list[float]) -> list[float]:
        """None: masked tokens have no transitions."""
        return []

    def num_decode(self, sample: torch.Tensor, schedule: StepEdges, index: int, end: float) -> torch.Tensor:
        """How many masks evaluation `index` of a schedule decodes, (batch,), see `CTMCScheduler.num_decode`."""
        length, end = sample.shape[1], min(end, schedule.edges[-1])

        def left_at(place: int) -> int:
            if place >= schedule.evaluations:
                return 0
            return math.ceil(length * (schedule.points[place] - end) / (1 - end) - 1e-9 * length)

        now, then = left_at(index), left_at(index + 1)
        left = (sample == self.chain.kernel.mask).sum(dim=1)
        return left if now == 0 else left + torch.div(-left * then, now, rounding_mode="floor")

    def step(
        self,
        output: torch.Tensor,
        sample: torch.Tensor,
        start: torch.Tensor,
        counts: int | torch.Tensor,
        generator: Generators,
        noise: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""Tokens (batch, length), the time that passed (batch,) and whether all is decoded (batch,), on the device.

        A mask with the rates R(y) is held for \tau = E / \sum_y R(y), E exponential; the `counts` (an integer, or
        (batch,)) with the shortest times become tokens y in proportion to R(y).

        start: (batch,) float32, the time. noise: a pair of uniforms, (batch, length) of the holding times and (batch,
        most decoded, vocab - 1) of the tokens in the order in which they are decoded.
        """
        masked = sample == self.chain.kernel.mask
        log_totals, drawn = self._totals_and_tokens(output, sample, masked, generator, noise is None)
        rings = clocks(sample.shape, generator, sample.device) if noise is None else -noise[0].to(sample.device).log()
        # log tau: rates may be too large or too small for their exponentials
        holding = rings.log() - log_totals - self.chain.decoding_rates(start).log().unsqueeze(1)
        # a recorded 0 rings never, but before positions that are no masks
        longest = torch.finfo(holding.dtype).max
        holding = holding.nan_to_num(nan=longest, posinf=longest).masked_fill(~masked, math.inf)
        order = holding.argsort(dim=1, stable=True)
        ranks = order.argsort(dim=1)
        chosen = masked & (ranks < (counts if isinstance(counts, int) else counts.unsqueeze(1)))
        if noise is not None:
            if (most := int(chosen.sum(dim=1).max())) > noise[1].shape[1]:
                raise ValueError(f"noise records {noise[1].shape[1]} tokens a sample, the step decodes {most}")
            drawn = self._replayed(output, sample, order, noise[1].to(sample.device))
        elapsed = holding.masked_fill(~chosen, -math.inf).amax(dim=1).exp()
        return torch.where(chosen, drawn, sample), elapsed, (chosen == masked).all(dim=1)

    def _weights(self, output: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of the tokens (n, vocab - 1), and the logarithm of what they are to be multiplied with, (n, 1)."""
        # their ratios and the law of the token do not depend on the time
        output, excess = self.chain.bounded(output.float())
        return self.chain.clean_weights(output, x, 1.0)[:, : self.chain.kernel.num_real_tokens], excess

    def _totals_and_tokens(self, output, sample, masked, generator, draw: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The log of the sum of the weights of each mask, 0 elsewhere, and a token drawn for it, (batch, length)."""
        totals, real = torch.zeros(sample.shape, device=sample.device), output.shape[-1] - 1
        tokens = sample.clone(memory_format=torch.contiguous_format)
        for rows, _ in groups([None] * len(sample), rows_at_once(sample, real)):
            x, flat, sums, drawn = (one[rows].flatten(0, 1) for one in (sample, output, totals, tokens))
            ticks = clocks_for_tokens(sample[rows].shape, real, of_rows(generator, rows), x.device) if draw else None
            for chosen in chunks(masked[rows].flatten().nonzero().squeeze(1), CHUNK // output.shape[-1]):
                weights, excess = self._weights(flat[chosen], x[chosen])
                sums[chosen] = weights.sum(dim=1).log() + excess.squeeze(1)  # views of the whole
                if draw:
                    drawn[chosen] = draw_tokens(weights, ticks.flatten(0, 1)[chosen])
        return totals, tokens

    def _replayed(self, output, sample, order, recorded) -> torch.Tensor:
        """Tokens of recorded uniforms (batch, count, vocab - 1) for the first masks in order, (batch, length)."""
        check_recorded(recorded, (len(sample), recorded.shape[1], output.shape[-1] - 1))
        drawn = sample.clone()
        for place in range(min(recorded.shape[1], sample.shape[1])):
            at = order[:, place : place + 1]
            rows = output.take_along_dim(at.unsqueeze(-1), dim=1).squeeze(1)
            weights, _ = self._weights(rows, sample.gather(1, at).squeeze(1))
            drawn.scatter_(1, at, replay_tokens(weights, recorded[:, place]).unsqueeze(1))
        return drawn


Sampler = EulerSampler | TweedieSampler | ThetaTrapezoidalSampler | GillespieSampler
SAMPLERS = {
    "euler": EulerSampler,
    "tweedie": TweedieSampler,
    "theta_trapezoidal": ThetaTrapezoidalSampler,
    "gillespie": GillespieSampler,
}


def build_sampler(config: FrozenDict, chain: ReverseChain) -> Sampler:
    """The sampler that a checked configuration names."""
    if config.sampler != "euler":
        return SAMPLERS[config.sampler](chain)
    return EulerSampler(chain, config.jumps or ("poisson" if chain.kernel.ordered else "categorical"))


def denoise(
    chain: ReverseChain,
    output: torch.Tensor,
    sample: torch.Tensor,
    times: Times,
    generator: Generators,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """Clean tokens (batch, length). noise: uniforms, (batch, length, vocab) without the mask's column."""

    def weights(out, x, time, _):
        return chain.clean_weights(out, x, time)

    return move(chain, weights, output, sample, times, generator, noise, columns=chain.kernel.num_real_tokens)


def move(
    chain: ReverseChain,
    weights: Callable,
    output: torch.Tensor,
    sample: torch.Tensor,
    times: Times,
    generator: Generators,
    noise: torch.Tensor | None,
    everywhere: bool = False,
    columns: int | None = None,
    earlier: tuple | None = None,
) -> torch.Tensor:
    """New tokens of every position that may jump, in proportion to weights.

    weights(output, x, time, next_time) acts on n positions, (n, vocab). columns: how many tokens there are to draw
    from. everywhere: also where the absorbing kernel has decoded. earlier: an output, its tokens and times before, of
    which weights receives the same positions as well.
    """
    columns = output.shape[-1] if columns is None else columns
    check_recorded(noise, (*sample.shape, columns))
    draw = draw_tokens if noise is None else replay_tokens
    result = sample.clone()
    for rows, (time, next_time) in groups(times, rows_at_once(sample, columns)):
        x, flat = sample[rows].flatten(), output[rows].flatten(0, 1)
        if noise is None:
            draws = clocks_for_tokens(sample[rows].shape, columns, of_rows(generator, rows), x.device).flatten(0, 1)
        else:
            draws = noise[rows].flatten(0, 1).to(x.device)
        new = x.clone()
        for chosen in chunks(all_of(x) if everywhere else movable(chain, x), CHUNK // output.shape[-1]):
            # no name for the weights, so that those of one chunk are gone before the next
            out, further = chain.bounded(flat[chosen].float())[0], ()
            if earlier is not None:
                before, x_before = (one[rows].flatten(0, 1)[chosen] for one in earlier[:2])
                further = chain.bounded(before.float())[0], x_before, earlier[2][rows.start]
            new[chosen] = draw(weights(out, x[chosen], time, next_time, *further)[:, :columns], draws[chosen])
            del out, further
        result[rows] = new.view_as(sample[rows])
    return result


def leap(
    chain: ReverseChain,
    means: Callable,
    output: torch.Tensor,
    sample: torch.Tensor,
    times: Times,
    generator: Generators,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    r"""Tokens plus all jumps of a Poisson number of them to each token y, with means m_y, clamped to the vocabulary.

    With M the sum of the means, the first jump comes after a share E / M of the step, E exponential, if at all, and
    leads to y with probability m_y / M; the rest of the step adds Poisson numbers with means (1 - E / M) m_y. So rare
    jumps do not depend on the resolution of `torch.poisson`, which on CUDA gives 0 for means below 2^-24, except as
    further jumps within one step. `torch.poisson` needs the means where the generator lives: with one of another
    device they are moved there.
    """
    check_recorded(noise, output.shape)
    result, last = sample.clone(), output.shape[-1] - 1
    tokens = torch.arange(last + 1, device=sample.device, dtype=torch.float32)
    for rows, (time, next_time) in groups(times, 1 if isinstance(generator, list) else rows_at_once(sample, last)):
        x, flat, one = sample[rows].flatten(), output[rows].flatten(0, 1), of_rows(generator, rows)
        if noise is None:
            rings = clocks(sample[rows].shape, one, x.device).flatten()
            ticks = clocks_for_tokens(sample[rows].shape, last + 1, one, x.device).flatten(0, 1)
        new = x.clone()
        for chosen in chunks(all_of(x), CHUNK // output.shape[-1]):
            if noise is None:
                mean = means(chain.bounded(flat[chosen].float())[0], x[chosen], time, next_time)
                counts = poisson_counts(mean, rings[chosen], ticks[chosen], one)
            else:
                counts = noise[rows].flatten(0, 1)[chosen].to(x.device).float()
            jumps = counts @ tokens - counts.sum(1) * x[chosen]
            new[chosen] = (x[chosen] + jumps.round().long()).clamp(0, last)
        result[rows] = new.view_as(sample[rows])
    return result


def poisson_counts(
    mean: torch.Tensor, rings: torch.Tensor, ticks: torch.Tensor, generator: Generators
) -> torch.Tensor:
    """Poisson numbers (n, vocab) with these means, overwritten; rings (n,), ticks (n, .): see `leap`.

    generator: one, or a list of one.
    """
    left = 1 - rings / mean.sum(dim=1)  # of the step after the first jump
    first = draw_tokens(mean, ticks)
    mean = mean.mul_(left.nan_to_num(nan=0.0, neginf=0.0).clamp(min=0).unsqueeze(1))
    one = generator[0] if isinstance(generator, list) else generator
    source = mean.device if one is None else one.device
    counts = torch.poisson(mean.to(source), generator=one).to(mean.device)
    return counts.scatter_add_(1, first.unsqueeze(1), (left > 0).float().unsqueeze(1))


def movable(chain: ReverseChain, x: torch.Tensor) -> torch.Tensor:
    """Indices of the tokens (n,) that may jump in reverse."""
    return all_of(x) if chain.kernel.mask is None else (x == chain.kernel.mask).nonzero().squeeze(1)


def all_of(x: torch.Tensor) -> torch.Tensor:
    """Indices of the tokens (n,)."""
    return torch.arange(len(x), device=x.device)


def chunks(positions: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Positions, at least one and no more than size at a time."""
    return iter(positions.split(max(1, size))) if len(positions) else iter(())


def groups(times: list, most: int) -> Iterator[tuple]:
    """(slice of the batch, its time): at most so many samples at once, if all of the batch share the time."""
    most = most if all(time == times[0] for time in times) else 1
    for start in range(0, len(times), most):
        yield slice(start, start + most), times[start]


def rows_at_once(sample: torch.Tensor, vocab_size: int) -> int:
    """Samples (batch, length) whose draws of tokens are made at once."""
    return max(1, DRAWS // max(1, sample.shape[1] * clocks_a_token(vocab_size)))


def of_rows(generator: Generators, rows: slice) -> Generators:
    """The generators of some samples."""
    return generator[rows] if isinstance(generator, list) else generator
