"""Clean sequences and the random numbers that take each of them to any time, the same numbers at all times."""

import torch

from ..schedulers import CTMCScheduler


class NoisyData:
    """Sequences noised to a time with random numbers that do not change with it, so that times can be compared.

    With the scheduler's sampler "gillespie" a "time" is a number of decoded tokens.

    Args:
        scheduler: a `CTMCScheduler`.
        data: (count, length) int64.
        given: where tokens stay clean, (length,) or (count, length) bool.
        seed: of sequence i is seed + i.
        noise: recorded instead, as `CTMCScheduler.add_noise` takes it, for all of the data.

    Raises:
        ValueError: for tokens outside of the scheduler's vocabulary and for shapes that do not fit.
    """

    def __init__(
        self,
        scheduler: CTMCScheduler,
        data: torch.Tensor,
        given: torch.Tensor | None = None,
        seed: int = 0,
        noise: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        data = torch.as_tensor(data)
        if data.ndim != 2 or data.is_floating_point() or data.dtype == torch.bool or 0 in data.shape:
            raise ValueError(f"data must be integers (count, length), got {data.dtype} {tuple(data.shape)}")
        real = scheduler.kernel.num_real_tokens
        if int(data.min()) < 0 or int(data.max()) >= real:
            raise ValueError(
                f"data must hold tokens in [0, {real}), the scheduler's vocabulary without its mask, got"
                f" {int(data.min())} to {int(data.max())}"
            )
        if given is not None:
            given = torch.as_tensor(given)
            if given.dtype != torch.bool or given.shape not in (data.shape, data.shape[1:]):
                raise ValueError(
                    f"given must be boolean, {tuple(data.shape[1:])} or {tuple(data.shape)}, got {given.dtype}"
                    f" {tuple(given.shape)}"
                )
            given = given.expand(data.shape).cpu()
        self.scheduler, self.seed, self.noise = scheduler, seed, noise
        self.data, self.given = data.long().cpu(), given

    @property
    def count(self) -> int:
        """The number of sequences."""
        return len(self.data)

    @property
    def length(self) -> int:
        """The number of tokens of each sequence."""
        return self.data.shape[1]

    def at(
        self, time: float, rows: torch.Tensor, device: str | torch.device
    ) -> tuple[torch.Tensor, float | torch.Tensor]:
        """Tokens (batch, length) of some sequences at a time, and the time.

        gillespie: at a count of decoded tokens, and the time (batch,) at which each sequence has it.
        """
        clean, noise = self.data[rows].to(device), _to(self._noise(rows), device)
        if self.scheduler.sampler.counts_tokens:
            tokens, time = self.scheduler.add_noise_by_count(clean, noise, int(time))
        else:
            tokens = self.scheduler.add_noise(clean, noise, time)
        return self.restore(tokens, rows), time

    def restore(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The tokens (batch, length) of the sequences in rows (batch,), with those in place that are given."""
        if self.given is None:
            return tokens
        return torch.where(self.given[rows].to(tokens.device), self.data[rows].to(tokens.device), tokens)

    def generators(self, rows: torch.Tensor, after_noise: bool = False) -> list[torch.Generator]:
        """A fresh generator for each sequence of rows (batch,).

        Args:
            rows: indices of sequences, (batch,).
            after_noise: as its noise leaves it.
        """
        generators = [torch.Generator().manual_seed(self.seed + int(row)) for row in rows]
        if after_noise and self.noise is None:
            self._drawn(generators)
        return generators

    def _noise(self, rows: torch.Tensor):
        if self.noise is None:
            return self._drawn(self.generators(rows))
        return tuple(n[rows] for n in self.noise) if isinstance(self.noise, tuple) else self.noise[rows]

    def _drawn(self, generators: list[torch.Generator]):
        """Noise of one sequence a generator, in the form that `CTMCScheduler.add_noise` replays."""
        drawn = [self.scheduler.kernel.draw_noise(self.length, generator) for generator in generators]
        pair = isinstance(drawn[0], tuple)
        return tuple(map(torch.stack, zip(*drawn, strict=True))) if pair else torch.stack(drawn)


def _to(noise, device):
    return tuple(n.to(device) for n in noise) if isinstance(noise, tuple) else noise.to(device)
