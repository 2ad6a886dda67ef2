"""The forward chain of CTMCScheduler: noise in time, transitions, and tokens at a time."""

from collections.abc import Callable

import torch

from .ctmc_draws import Generators, check_generators, uniforms
from .ctmc_inputs import Times, check_number, check_tokens, recorded_noise
from .ctmc_noise_schedules import NoiseSchedule
from .scheduler_arguments import checked_arguments
from .timestep_edges import times_of


class ForwardChain:
    """What depends on the kernel and its noise in time alone, as methods of a scheduler.

    Of the scheduler it reads `config`, `kernel`, `reverse` and the schedule as set.
    """

    @checked_arguments
    def sigma_bar(self, timestep: Times) -> torch.Tensor:
        """Total noise up to a time in [0, 1]; the shape and dtype of a tensor are kept, a number gives float32.

        Args:
            timestep: one or a tensor.

        Raises:
            ValueError: for a time outside of [0, 1].
        """
        return self._at(self._noise.sigma_bar, timestep)

    @checked_arguments
    def sigma(self, timestep: Times) -> torch.Tensor:
        """Noise rate d sigma_bar / dt at a time in [0, 1]; shape and dtype as of `sigma_bar`.

        Args:
            timestep: one or a tensor.

        Raises:
            ValueError: for a time outside of [0, 1].
        """
        return self._at(self._noise.sigma, timestep)

    @staticmethod
    def _at(function: Callable, timestep: Times) -> torch.Tensor:
        on_device = isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu"  # not read
        if not on_device and not all(0 <= time <= 1 for time in times_of(timestep)):
            raise ValueError(f"timestep must lie in [0, 1], got {timestep}")
        if isinstance(timestep, torch.Tensor):
            return function(timestep if timestep.is_floating_point() else timestep.float())
        return function(torch.as_tensor(timestep, dtype=torch.float64)).float()

    @checked_arguments
    def model_time(self, timestep: Times, batch_size: int, device: str | torch.device | None = None) -> torch.Tensor:
        """What the network receives beside the tokens, (batch_size,) float32: sigma_bar(t), or t.

        An entry of `timesteps` was computed with the schedule; times on the host are computed in float64; other times
        on a device are computed there in float32.

        Args:
            timestep: t in [0, 1], one or (batch_size,).
            batch_size: number of samples.
            device: of the result; by default the timestep's.

        Raises:
            ValueError: for times outside of [0, 1], another number of them, and a batch_size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be an integer >= 1, got {batch_size}")
        index = self._steps.known(timestep) if self._steps else None
        if index is not None:
            time = self._steps.model_times[index]
        elif isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            time = self._conditioning(timestep.float(), self._noise.stable or self._noise)
        else:
            if not all(0 <= one <= 1 for one in times_of(timestep)):
                raise ValueError(f"timestep must lie in [0, 1], got {timestep}")
            time = self._conditioning(torch.as_tensor(timestep, dtype=torch.float64), self._noise).float()
            if time.ndim == 0:
                return torch.full((batch_size,), float(time), dtype=torch.float32, device=device)
        check_number(time.numel(), batch_size)
        return (time if device is None else time.to(device)).reshape(-1).expand(batch_size)

    def _conditioning(self, times: torch.Tensor, noise: NoiseSchedule) -> torch.Tensor:
        return times if self.config.time_conditioning == "timestep" else noise.sigma_bar(times)

    @checked_arguments
    def transition_matrix(self, timestep: float, next_timestep: float = 0.0) -> torch.Tensor:
        """P[i, j] = P(x_t = j | x_s = i), (vocab, vocab) float64, from s = next_timestep to the larger t.

        Args:
            timestep: t.
            next_timestep: s, with 0 <= s <= t.

        Raises:
            ValueError: unless 0 <= s <= t <= 1.
        """
        if not 0 <= next_timestep <= timestep <= 1:
            raise ValueError(f"need 0 <= next_timestep <= timestep <= 1, got {next_timestep=} and {timestep=}")
        earlier = self.reverse.sigma_bar(next_timestep) if next_timestep else 0
        return self.kernel.transition(self.reverse.sigma_bar(timestep) - earlier)

    @checked_arguments
    def rate_matrix(self, timestep: float) -> torch.Tensor:
        """Forward rates sigma(t) Q, [i, j] from i to j, (vocab, vocab) float64; its rows sum to 0.

        Args:
            timestep: t in [0, 1].

        Raises:
            ValueError: for a time outside of [0, 1].
        """
        if not 0 <= timestep <= 1:
            raise ValueError(f"timestep must lie in [0, 1], got {timestep}")
        return self.kernel.base_rate() * self.reverse.sigma(timestep)

    @checked_arguments
    def sample_prior(
        self, shape: tuple[int, ...], generator: Generators = None, device: str | torch.device | None = None
    ) -> torch.Tensor:
        """Tokens at time 1, int64: masks, uniform ones, or of the kernel's Gaussian.

        Args:
            shape: (batch, length).
            generator: one, or a list of one a sample.
            device: of the result; by default the CPU.

        Raises:
            ValueError: for another shape, and for a list of generators that are not one a sample.
        """
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shape must be (batch, length), both >= 1, got {shape}")
        if isinstance(generator, list):
            check_generators(generator, shape[0])
        return self.kernel.sample_prior(tuple(shape), generator, torch.device("cpu" if device is None else device))

    def prior_probabilities(self) -> torch.Tensor:
        """The law from which `sample_prior` draws each token, (vocab,) float64."""
        return self.kernel.prior()

    @checked_arguments
    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | Generators,
        timesteps: Times,
    ) -> torch.Tensor:
        """Tokens at a time t > 0 given clean ones: a draw from P_{0t}[x_0, .] at every position.

        Args:
            original_samples: (batch, length) int64.
            noise: a generator, a list of one a sample or None to draw; or recorded uniforms in [0, 1) to replay, so
                that two times can share them: (batch, length) for the absorbing kernel, which masks where they are
                below 1 - exp(-sigma_bar); a pair (uniforms, target tokens) of (batch, length) for the uniform kernel;
                or (batch, length, vocab) for a race of exponential clocks over the law of each token, uniform and
                ordered kernels.
            timesteps: a number or (batch,).
        """
        x0 = original_samples
        check_tokens(x0)
        generator, recorded = (None, noise) if isinstance(noise, torch.Tensor | tuple) else (noise, None)
        if recorded is not None:
            recorded = recorded_noise(self.kernel, recorded, x0)
        elif isinstance(generator, list):
            check_generators(generator, len(x0))
        sigma = [self.reverse.sigma_bar(t) for t in self._times(timesteps, len(x0))]
        return self.kernel.perturb(x0, sigma, recorded, generator)

    @checked_arguments
    def add_noise_by_count(
        self, original_samples: torch.Tensor, noise: torch.Tensor | Generators, num_decoded: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens with exactly `num_decoded` of them unmasked a sample, and the time at which that happens (absorbing).

        The positions with the smallest uniforms are masked, as `add_noise` with the same uniforms masks them at that
        time.

        Args:
            original_samples: (batch, length).
            noise: uniforms (batch, length) or a generator.
            num_decoded: how many tokens of a sample are not masked, from 0 to the length.

        Returns:
            Tokens (batch, length) int64 and times (batch,) float32 in [min_timestep, 1].

        Raises:
            ValueError: for another kernel or noise schedule than absorbing and loglinear, and for a number of tokens
                below 0 or above the length.
        """
        x0 = original_samples
        check_tokens(x0)
        if self.kernel.mask is None or self.config.noise_schedule != "loglinear":
            raise ValueError(
                "add_noise_by_count needs kernel='absorbing' and noise_schedule='loglinear', whose share of masked"
                f" tokens is (1 - eps) t; this is {self.config.kernel!r} with {self.config.noise_schedule!r}"
            )
        if not 0 <= num_decoded <= x0.shape[1]:
            raise ValueError(f"num_decoded must be in [0, {x0.shape[1]}], the length, got {num_decoded}")
        if isinstance(noise, torch.Tensor):
            noise = recorded_noise(self.kernel, noise, x0)
        else:
            noise = uniforms(x0.shape, noise, x0.device)
        masked, last = self.kernel.perturb_by_count(x0, noise, num_decoded)
        return masked, (last / (1 - self.config.eps)).clamp(self.config.min_timestep, 1)
