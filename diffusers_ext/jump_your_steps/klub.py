r"""The objective of Jump Your Steps (Park et al., 2410.07761): what a further step between two others gains.

Tau-leaping holds the rates of a step's start. Splitting the step from t1 to t3 at t2 lowers a bound on the
Kullback-Leibler divergence between the exact and the sampled paths, up to terms that do not depend on t2, by

.. math:: \mathrm{KLUB}(t_1, t_2, t_3) = (t_2 - t_3)\, E \sum_{y \ne x_{t_2}} R_{t_2}(x_{t_2}, y)
          \log \frac{R_{t_2}(x_{t_2}, y)}{R_{t_1}(x_{t_1}, y)}

averaged over positions. Larger is better.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..pipelines.call_arguments import checked_arguments
from ..runs.processes import Processes
from ..schedulers import CTMCScheduler
from .costs import FLOOR
from .coupling import NoisyData

PART = 2**22  # rates that are worked on at a time
CACHE_BYTES = 2**31  # of network outputs at t1 that are kept between candidates


class RateNetwork:
    """A network and its scheduler as reverse rates of tokens at a time.

    Args:
        model: called as model(tokens (batch, length), time (batch,)), as DiscreteDiffusionPipeline calls it.
        scheduler: a `CTMCScheduler`.

    Attributes:
        evaluations: sequences that passed the network so far.
    """

    def __init__(self, model: Callable, scheduler: CTMCScheduler):
        self.model, self.scheduler = model, scheduler
        self.evaluations = 0

    @property
    def device(self) -> torch.device:
        """Where the network is; the CPU for one without parameters and buffers."""
        if not isinstance(self.model, torch.nn.Module):
            return torch.device("cpu")
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    @torch.no_grad()
    def output(self, tokens: torch.Tensor, times: float | torch.Tensor) -> torch.Tensor:
        """The network's output (batch, length, vocab_size) at one time, or one a sequence."""
        self.evaluations += len(tokens)
        output = self.model(tokens, self.scheduler.model_time(times, len(tokens)).to(tokens.device))
        return output if isinstance(output, torch.Tensor) else output[0]

    @torch.no_grad()
    def rates(self, output: torch.Tensor, tokens: torch.Tensor, times: float | torch.Tensor) -> torch.Tensor:
        """Rates of jumping to every other token, (batch, length, columns) float32, 0 at the current token.

        The absorbing kernel has no column for the mask, to which nothing jumps in reverse.

        Raises:
            ValueError: naming time and position where a rate is not finite.
        """
        rates = self.scheduler.reverse_rates(output, times, tokens).scatter_(-1, tokens.unsqueeze(-1), 0)
        bad = ~rates.sum(dim=-1).isfinite()
        if bad.any():
            row, position = bad.nonzero()[0].tolist()
            time = float(torch.as_tensor(times).expand(len(tokens))[row])
            raise ValueError(
                f"the reverse rates at time {time:.6g} are not finite at position {position} of sequence {row} of the"
                f" batch ({int(bad.sum())} positions in all); the network's output there is"
                f" {'not finite either' if not output[row, position].isfinite().all() else 'finite'}; check the"
                " network's dtype and the scheduler's prediction_type"
            )
        return rates[..., : self.scheduler.kernel.num_real_tokens]


@dataclass
class _Start:
    """A batch at t1: its indices in the data, tokens, time (one a sequence for gillespie) and the network's output."""

    rows: torch.Tensor
    tokens: torch.Tensor
    times: float | torch.Tensor
    output: torch.Tensor | None


class KLUB:
    """The objective as a function of (t1, t2, t3), times of a `CTMCScheduler`; larger is better.

    With the sampler "gillespie" the three are numbers of decoded tokens, rounded to integers; the time that passes
    between t2 and t3 is then each sequence's own.

    The network's output at t1 is kept until another t1 is asked for (up to 2 GiB), so that the candidates t2 of one
    interval cost one evaluation each.

    Args:
        model: see `RateNetwork`.
        scheduler: its chain and its sampler.
        data: clean sequences (count, length) int64.
        coupling: "data" noises x_{t1} and x_{t2} from the same data with the same random numbers (the paper's q_data);
            "path" takes x_{t2} from x_{t1} by one step of the scheduler's sampler (q_path).
        given: where tokens are given, as conditional generation has it, (length,) or (count, length) bool.
        seed: sequence i draws from its own generator, seeded with seed + i, afresh at every evaluation.
        noise: recorded noise to replay instead, as `CTMCScheduler.add_noise` takes it, for all of the data.
        step_noise: of the step of q_path, as `CTMCScheduler.step` takes it, for all of the data.
        batch_size: sequences that pass the network together.
        average: "sequences", over all alike; "batches", the mean of the batches' means, as in the authors' code, where
            a smaller last batch weighs as much as others.
        accelerator: the batches are shared out among its processes, each of which gets the same values.

    Raises:
        ValueError: for rates that are not finite, and for times out of order.
    """

    @checked_arguments
    def __init__(
        self,
        model: Callable,
        scheduler: CTMCScheduler,
        data: torch.Tensor,
        *,
        coupling: str = "data",
        given: torch.Tensor | None = None,
        seed: int = 0,
        noise: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        step_noise: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        batch_size: int = 64,
        average: str = "sequences",
        accelerator: Accelerator | None = None,
    ):
        if coupling not in ("data", "path"):
            raise ValueError(f'coupling must be "data" or "path", got {coupling!r}')
        if average not in ("sequences", "batches"):
            raise ValueError(f'average must be "sequences" or "batches", got {average!r}')
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.network = RateNetwork(model, scheduler)
        self.data = NoisyData(scheduler, data, given, seed, noise)
        self.coupling, self.step_noise = coupling, step_noise
        self.batch_size, self.average = batch_size, average
        self.processes = Processes(accelerator)
        self._t1: float | None = None
        self._starts: dict[int, _Start] = {}
        self.values: dict[tuple, float] = {}

    @checked_arguments
    def __call__(self, t1: float, t2: float, t3: float) -> float:
        """The objective, a mean over sequences and positions.

        Args:
            t1: where the step begins.
            t2: the point between.
            t3: where the step ends.
        """
        key = self._rounded(t1, t2, t3)
        if key not in self.values:
            means = [(len(values), float(values.mean())) for values in self._batches(*key)]
            if self.processes.count > 1:
                means = _in_turn(gather_object([means]))
            weights = [size if self.average == "sequences" else 1 for size, _ in means]
            total = sum(weight * mean for weight, (_, mean) in zip(weights, means, strict=True))
            self.values[key] = total / sum(weights)
        return self.values[key]

    @property
    def held(self) -> tuple[float | None, int]:
        """The t1 at which network outputs are kept, and of how many sequences of this process."""
        return self._t1, sum(len(start.rows) for start in self._starts.values())

    @property
    def gillespie(self) -> bool:
        """Whether the sampler is k-Gillespie, so that the objective is about numbers of tokens and not about times."""
        return self.network.scheduler.sampler.counts_tokens

    def _rounded(self, t1: float, t2: float, t3: float) -> tuple[float, float, float]:
        if self.gillespie:  # candidates that round to the same counts are the same, exactly
            t1, t2, t3 = round(t1), round(t2), round(t3)
            ordered, rule = 0 <= t1 <= t2 <= t3 <= self.data.length, f"0 <= k1 <= k2 <= k3 <= {self.data.length}"
        else:
            ordered, rule = 1 >= t1 > t2 > t3 > 0, "1 >= t1 > t2 > t3 > 0"
        if not ordered:
            raise ValueError(f"need {rule}, got {t1}, {t2}, {t3}")
        return t1, t2, t3

    def _batches(self, t1, t2, t3) -> Iterator[torch.Tensor]:
        """The objective of each sequence of each batch of this process, (batch,) float64."""
        if t1 != self._t1:
            self._t1, self._starts = t1, {}
        batches = torch.arange(self.data.count).split(self.batch_size)
        for number in range(self.processes.index, len(batches), self.processes.count):
            yield self._of_batch(self._start(number, batches[number], t1), t1, t2, t3)

    def _start(self, number: int, rows: torch.Tensor, t1) -> _Start:
        start = self._starts.get(number)
        if start is not None:
            return start
        tokens, times = self.data.at(t1, rows, self.network.device)
        start = _Start(rows, tokens, times, self.network.output(tokens, times))
        kept = sum(s.output.nbytes for s in self._starts.values())
        if kept + start.output.nbytes <= CACHE_BYTES:
            self._starts[number] = start
        return start

    def _of_batch(self, start: _Start, t1, t2, t3) -> torch.Tensor:
        tokens, times = self.data.at(t2, start.rows, start.tokens.device)
        if self.coupling == "path":
            tokens = self._step(start, t1, t2)
        end = self.data.at(t3, start.rows, start.tokens.device)[1] if self.gillespie else t3
        output = self.network.output(tokens, times)
        length, vocab_size = output.shape[1:]
        total = torch.zeros(len(tokens), dtype=torch.float64)
        for part in torch.arange(length).split(max(1, PART // (vocab_size * len(tokens)))):
            part = slice(int(part[0]), int(part[-1]) + 1)
            now = self.network.rates(output[:, part], tokens[:, part], times)
            frozen = self.network.rates(start.output[:, part], start.tokens[:, part], start.times)
            total += (now * ((now + FLOOR).log() - (frozen + FLOOR).log())).sum(dim=(1, 2)).cpu().double()
        return total * torch.as_tensor(times - end, dtype=torch.float64).cpu() / length

    def _step(self, start: _Start, t1, t2) -> torch.Tensor:
        """x_{t2} from x_{t1} by one step of the sampler; given tokens stay."""
        scheduler, noise, generators = self.network.scheduler, None, None
        if self.step_noise is None:
            generators = self.data.generators(start.rows, after_noise=True)
        else:
            pair = isinstance(self.step_noise, tuple)
            noise = tuple(n[start.rows] for n in self.step_noise) if pair else self.step_noise[start.rows]
        length = {"num_decode": t2 - t1} if self.gillespie else {"next_timestep": t2}
        result = scheduler.step(start.output, start.times, start.tokens, generators, noise=noise, **length)
        return self.data.restore(result.prev_sample, start.rows)


def _in_turn(parts: list[list]) -> list:
    """The entries of several processes, of which process p did numbers p, p + count, ..., in order."""
    ordered = [None] * sum(map(len, parts))
    for index, part in enumerate(parts):
        ordered[index :: len(parts)] = part
    return ordered
