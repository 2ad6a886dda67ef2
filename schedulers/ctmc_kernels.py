r"""Kernels of continuous-time discrete diffusion: the constant rate matrix Q and all that has a closed form with it.

Q[i, j] is the rate of jumps from i to j and its rows sum to 0. With the total noise sigma the transition is
P_sigma = exp(sigma Q), P[i, j] = P(x_t = j | x_0 = i). The methods act on rows: the (n, vocab) quantities of n
positions whose current tokens are x, all at the same time; `sample_prior`, `perturb` and `score_entropy` act on whole
sequences. A kernel says its `name`, its `vocab_size`, how many of the tokens are of data (`num_real_tokens`), the
`mask` (None without one), and whether tokens are `ordered`.

A score is the ratio p_t(y) / p_t(x) over tokens y for the current token x; a network may predict it (its logarithm)
or p(x_0 | x_t), from which

.. math:: \frac{p_t(y)}{p_t(x)} = \sum_{x_0} p(x_0 | x) \frac{P_{0t}[x_0, y]}{P_{0t}[x_0, x]}
"""

import math

import torch
from diffusers.configuration_utils import FrozenDict

from .ctmc_draws import Generators, clocks, clocks_for_tokens, column, draw_tokens, integers, replay_tokens

KEPT_BYTES = 2**28  # of matrices that a kernel keeps on a device

Noise = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None  # recorded, of `perturb`


class AbsorbingKernel:
    """Every token jumps to the mask, the last one, at rate 1, and stays there."""

    name, ordered = "absorbing", False

    def __init__(self, vocab_size: int):
        self.vocab_size, self.num_real_tokens = vocab_size, vocab_size - 1
        self.mask = vocab_size - 1

    def base_rate(self) -> torch.Tensor:
        """The rates Q (vocab, vocab), float64, at unit speed; each row sums to 0."""
        rate = -torch.eye(self.vocab_size, dtype=torch.float64)
        rate[:, self.mask] += 1
        return rate

    def transition(self, sigma: float) -> torch.Tensor:
        """P (vocab, vocab), float64: of each token to each other one over a total noise."""
        stay = torch.eye(self.vocab_size, dtype=torch.float64) * math.exp(-sigma)
        stay[:, self.mask] += -math.expm1(-sigma)
        return stay

    def prior(self) -> torch.Tensor:
        """The law (vocab,), float64, of a token at time 1."""
        law = torch.zeros(self.vocab_size, dtype=torch.float64)
        law[self.mask] = 1
        return law

    def sample_prior(self, shape: tuple[int, ...], generator: Generators, device: torch.device) -> torch.Tensor:
        """Tokens at time 1, int64, of a shape (batch, length)."""
        return torch.full(shape, self.mask, device=device)

    def draw_noise(self, length: int, generator: torch.Generator) -> torch.Tensor:
        """Noise of one sequence in a form that `perturb` replays, on the generator's device."""
        return torch.rand(length, generator=generator)

    def noise_shapes(self, shape: tuple[int, ...]) -> list:
        """The shapes of recorded noise that `perturb` takes for tokens (batch, length)."""
        return [shape]

    def perturb(self, x0: torch.Tensor, sigma: list[float], noise: Noise, generator: Generators) -> torch.Tensor:
        """A draw of x_t for x0 (batch, length). sigma: one a sample. noise: recorded uniforms (batch, length) or None.

        Masked is where they are below 1 - exp(-sigma); drawn, where a clock rings before sigma, which has the same
        probability to a relative 1e-7 and however small it is.
        """
        return x0.masked_fill(_moved(x0, sigma, noise, generator), self.mask)

    def perturb_by_count(
        self, x0: torch.Tensor, uniforms: torch.Tensor, num_decoded: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_t with `num_decoded` tokens a sample unmasked, those with the largest uniforms; the largest of the others.

        Masked at a share u of moved tokens are those with uniforms below u, so that is the share at which it happens.
        """
        order = uniforms.argsort(dim=1, stable=True)[:, : x0.shape[1] - num_decoded]
        last = uniforms.gather(1, order[:, -1:])[:, 0] if order.shape[1] else torch.zeros(len(x0), device=x0.device)
        return x0.scatter(1, order, self.mask), last

    def jumps_from(self, x: torch.Tensor) -> torch.Tensor:
        """Q[x, y], diagonal 0."""
        rates = torch.zeros(len(x), self.vocab_size, device=x.device)
        rates[:, self.mask] = x != self.mask
        return rates

    def jumps_into(self, score: torch.Tensor, x: torch.Tensor, rate: float) -> torch.Tensor:
        """rate score[y] Q[y, x], diagonal 0; in place."""
        score[:, self.mask] = 0
        return score.mul_(((x == self.mask) * rate).unsqueeze(1))

    def x0_law(self, output: torch.Tensor, logits: bool) -> torch.Tensor:
        """p(x_0 | x) of its logits or of itself; the mask's column is not read. In place."""
        output[:, self.mask] = -math.inf if logits else 0
        return output.softmax(dim=1) if logits else output

    def exposure(self, now: float, start: float, end: float) -> float:
        """What `jumps_into` of a score at the total noise `now` is multiplied with, from noise `start` down to `end`.

        The prediction of clean tokens is held: masks are decoded at the rate 1 / expm1 of the noise.
        """
        return math.expm1(now) * math.log(math.expm1(-start) / math.expm1(-end))

    def score(self, p0: torch.Tensor, x: torch.Tensor, sigma_bar: float, floor: float) -> torch.Tensor:
        """p(x_0 = y | x) / expm1(sigma_bar) at masked positions; in place."""
        return p0.div_(math.expm1(sigma_bar))

    def tweedie_weights(self, score: torch.Tensor, x: torch.Tensor, delta: float) -> torch.Tensor:
        """Staggered score times P_delta[y, x], which is the score times expm1(delta), and the rest of 1 stays."""
        return rest_stays(self.jumps_into(score, x, math.expm1(delta)), x)

    def clean_weights(self, score: torch.Tensor, x: torch.Tensor, sigma_bar: float) -> torch.Tensor:
        """Weights of the token that a mask hides, at any time: the score, 0 for the mask. In place."""
        score[:, self.mask] = 0
        return score

    def score_entropy(
        self, log_score: torch.Tensor, noisy: torch.Tensor, original: torch.Tensor, sigma_bar: torch.Tensor
    ) -> torch.Tensor:
        """See `losses.score_entropy`.

        Only x_0 can have become the mask: r is 1 / expm1(sigma_bar) there and 0 elsewhere.
        """
        ratio = 1 / torch.expm1(sigma_bar)
        score = log_score.gather(-1, original.unsqueeze(-1)).squeeze(-1)
        total = log_score[..., : self.mask].exp().sum(dim=-1)
        entropy = total - ratio * score + ratio * (ratio.log() - 1)
        return torch.where(noisy == self.mask, entropy, 0.0)

    def posterior_weights(
        self, p0: torch.Tensor, x: torch.Tensor, sigma_bar: float, next_sigma_bar: float, floor: float
    ) -> torch.Tensor:
        """Weights (n, vocab) of the tokens at the smaller total noise, under the law p0 of x_0."""
        return self.tweedie_weights(self.score(p0, x, sigma_bar, floor), x, sigma_bar - next_sigma_bar)


class UniformKernel:
    """Every token jumps at rate 1 to a token drawn uniformly from all, itself included."""

    name, ordered, mask = "uniform", False, None

    def __init__(self, vocab_size: int):
        self.vocab_size = self.num_real_tokens = vocab_size

    def base_rate(self) -> torch.Tensor:
        """The rates Q (vocab, vocab), float64, at unit speed; each row sums to 0."""
        size = self.vocab_size
        return torch.full((size, size), 1 / size, dtype=torch.float64) - torch.eye(size, dtype=torch.float64)

    def transition(self, sigma: float) -> torch.Tensor:
        """P (vocab, vocab), float64: of each token to each other one over a total noise."""
        size = self.vocab_size
        moved = torch.full((size, size), -math.expm1(-sigma) / size, dtype=torch.float64)
        return moved + torch.eye(size, dtype=torch.float64) * math.exp(-sigma)

    def prior(self) -> torch.Tensor:
        """The law (vocab,), float64, of a token at time 1."""
        return torch.full((self.vocab_size,), 1 / self.vocab_size, dtype=torch.float64)

    def sample_prior(self, shape: tuple[int, ...], generator: Generators, device: torch.device) -> torch.Tensor:
        """Tokens at time 1, int64, of a shape (batch, length)."""
        return integers(self.vocab_size, shape, generator, device)

    def draw_noise(self, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise of one sequence in a form that `perturb` replays, on the generator's device."""
        uniforms = torch.rand(length, generator=generator)
        return uniforms, torch.randint(self.vocab_size, (length,), generator=generator)

    def noise_shapes(self, shape: tuple[int, ...]) -> list:
        """The shapes of recorded noise that `perturb` takes for tokens (batch, length)."""
        return [[shape, shape], (*shape, self.vocab_size)]

    def perturb(self, x0: torch.Tensor, sigma: list[float], noise: Noise, generator: Generators) -> torch.Tensor:
        """A draw of x_t for x0 (batch, length). sigma: one a sample; moved is what would be masked, see above.

        noise: None, or recorded: a pair (uniforms, target tokens) (batch, length), or uniforms (batch, length, vocab)
        for a race.
        """
        if isinstance(noise, torch.Tensor):
            total = column(sigma, x0.device).unsqueeze(1)
            weights = (-torch.expm1(-total) / self.vocab_size).unsqueeze(-1).repeat(1, *noise.shape[1:])
            stay = torch.exp(-total).expand(x0.shape).unsqueeze(-1)
            return replay_tokens(weights.scatter_add_(-1, x0.unsqueeze(-1), stay), noise)
        moved = _moved(x0, sigma, None if noise is None else noise[0], generator)
        targets = self.sample_prior(x0.shape, generator, x0.device) if noise is None else noise[1]
        return torch.where(moved, targets, x0)

    def jumps_from(self, x: torch.Tensor) -> torch.Tensor:
        """Q[x, y], diagonal 0."""
        rates = torch.full((len(x), self.vocab_size), 1 / self.vocab_size, device=x.device)
        return rates.scatter_(1, x.unsqueeze(1), 0)

    def jumps_into(self, score: torch.Tensor, x: torch.Tensor, rate: float) -> torch.Tensor:
        """rate score[y] Q[y, x], diagonal 0; in place."""
        return score.mul_(rate / self.vocab_size).scatter_(1, x.unsqueeze(1), 0)

    def x0_law(self, output: torch.Tensor, logits: bool) -> torch.Tensor:
        """p(x_0 | x) of its logits or of itself."""
        return output.softmax(dim=1) if logits else output

    def _expected_ratio(self, p0, x, sigma_bar: float, target_sigma_bar: float, floor: float) -> torch.Tensor:
        """sum over x_0 of p0[x_0] P_target[x_0, y] / (P_t[x_0, x] + floor); in place."""
        away = -math.expm1(-sigma_bar) / self.vocab_size
        x = x.unsqueeze(1)
        here = p0.gather(1, x) / (away + math.exp(-sigma_bar) + floor)
        ratio = p0.div_(away + floor).scatter_(1, x, here)
        shared = ratio.sum(1, keepdim=True) * (-math.expm1(-target_sigma_bar) / self.vocab_size)
        return ratio.mul_(math.exp(-target_sigma_bar)).add_(shared)

    def law_given_others(self, score: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The law of x_t at each position that its scores imply; in place."""
        score.scatter_(1, x.unsqueeze(1), 1)
        return score.div_(score.sum(1, keepdim=True))

    def law_at(self, law: torch.Tensor, made: torch.Tensor, sigma_bar: float) -> torch.Tensor:
        """The law of x at a smaller total noise, of `law_given_others` made at another, (..., vocab)."""
        growth = (made - sigma_bar).exp().to(law)
        return (growth * (law - 1 / self.vocab_size) + 1 / self.vocab_size).clamp(min=0)

    def exposure(self, now: float, start: float, end: float) -> float:
        """What `jumps_into` of a score is multiplied with, from noise `start` down to `end`; the score is held."""
        return start - end

    def score(self, p0: torch.Tensor, x: torch.Tensor, sigma_bar: float, floor: float) -> torch.Tensor:
        """The expected ratios p_t(y) / p_t(x) (n, vocab) under the law p0 of x_0."""
        return self._expected_ratio(p0, x, sigma_bar, sigma_bar, floor)

    def _times_transition_into(self, weights, x, delta: float) -> torch.Tensor:
        """weights[y] P_delta[y, x]; in place."""
        away = -math.expm1(-delta) / self.vocab_size
        x = x.unsqueeze(1)
        here = weights.gather(1, x) * (away + math.exp(-delta))
        return weights.mul_(away).scatter_(1, x, here)

    def tweedie_weights(self, score: torch.Tensor, x: torch.Tensor, delta: float) -> torch.Tensor:
        """Staggered score times P_delta[y, x] (SEDD, theorem 4.2). score: 1 at the current token. In place."""
        shared = score.sum(1, keepdim=True) * (-math.expm1(delta) / self.vocab_size)
        return self._times_transition_into(score.mul_(math.exp(delta)).add_(shared).clamp_(min=0), x, delta)

    def clean_weights(self, score: torch.Tensor, x: torch.Tensor, sigma_bar: float) -> torch.Tensor:
        """Weights of x_0: all of the noise is removed by one tweedie step. score: 1 at the current token. In place."""
        return self.tweedie_weights(score, x, sigma_bar)

    def posterior_weights(
        self, p0: torch.Tensor, x: torch.Tensor, sigma_bar: float, next_sigma_bar: float, floor: float
    ) -> torch.Tensor:
        """Weights (n, vocab) of the tokens at the smaller total noise, under the law p0 of x_0."""
        ratio = self._expected_ratio(p0, x, sigma_bar, next_sigma_bar, floor)
        return self._times_transition_into(ratio, x, sigma_bar - next_sigma_bar)

    def score_entropy(
        self, log_score: torch.Tensor, noisy: torch.Tensor, original: torch.Tensor, sigma_bar: torch.Tensor
    ) -> torch.Tensor:
        """See `losses.score_entropy`.

        r is (a + b) / b at x_0 if x is another token, b / (a + b) everywhere if it is not, and 1 elsewhere.
        """
        size = self.vocab_size
        away = -torch.expm1(-sigma_bar) / size
        log_ratio = torch.log(away + torch.exp(-sigma_bar)) - torch.log(away)  # of x_0 to any other token

        def at(tokens):
            return log_score.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

        positive = log_score.exp().sum(dim=-1) - at(noisy).exp()
        others = log_score.sum(dim=-1) - at(noisy)  # of all tokens but the current one
        kept = noisy == original
        small, large = torch.exp(-log_ratio), torch.exp(log_ratio)
        negative = torch.where(kept, small * others, others - at(original) + large * at(original))
        constant_kept = (size - 1) * small * (-log_ratio - 1)
        constant_moved = large * (log_ratio - 1) - (size - 2)
        return (positive - negative + torch.where(kept, constant_kept, constant_moved)) / size


class ReversibleKernel:
    """Ordered tokens with a rate matrix in detailed balance with its prior, exponentiated by its eigenvalues.

    rate: (vocab, vocab) float64, off-diagonal rates; the diagonal is set. log_prior: (vocab,) float64, not
    normalised, with prior[i] rate[i, j] = prior[j] rate[j, i]. Matrices are computed in float64 on the CPU; float32
    copies of them are kept on the device that asks (`prepare`).
    """

    ordered, mask = True, None

    def __init__(self, name: str, rate: torch.Tensor, log_prior: torch.Tensor, initial: torch.Tensor | None = None):
        self.name = name
        self.vocab_size = self.num_real_tokens = len(rate)
        self._rate = rate - torch.diag(rate.sum(1))
        self._half = ((log_prior - log_prior.max()) / 2).exp()
        self._initial = torch.softmax(log_prior if initial is None else initial, 0)
        self._eigen: tuple[torch.Tensor, torch.Tensor] | None = None
        self._kept: dict[tuple, torch.Tensor] = {}

    def base_rate(self) -> torch.Tensor:
        """The rates Q (vocab, vocab), float64, at unit speed; each row sums to 0."""
        return self._rate.clone()

    def transition(self, sigma: float) -> torch.Tensor:
        """P (vocab, vocab), float64: of each token to each other one over a total noise."""
        if self._eigen is None:
            # sqrt(prior_i) rate_ij / sqrt(prior_j) is symmetric, so that eigh applies, which is exact to rounding
            symmetric = self._half[:, None] * self._rate / self._half
            self._eigen = torch.linalg.eigh((symmetric + symmetric.T) / 2)
        values, vectors = self._eigen
        matrix = (vectors * torch.exp(sigma * values)) @ vectors.T
        return (matrix / self._half[:, None] * self._half).clamp_(min=0)

    def prepare(self, sigmas: list[float], device: torch.device) -> None:
        """Move the transitions of these total noises to a device at once, as many as 256 MiB hold, and the rates.

        The others are moved when they are asked for.
        """
        self._kept.clear()
        room = KEPT_BYTES // (4 * self.vocab_size**2) - 1
        sigmas = list(dict.fromkeys(sigmas))[: max(0, room)]
        matrices = torch.stack([*map(self.transition, sigmas), self._rate]).to(torch.float32).to(device)
        self._kept = {(sigma, matrices.device): one for sigma, one in zip([*sigmas, None], matrices, strict=True)}

    def _on(self, device: torch.device, sigma: float | None) -> torch.Tensor:
        """The transition of a total noise, or the rates (None), float32 on a device."""
        key = sigma, device
        if key not in self._kept:
            if len(self._kept) >= max(4, KEPT_BYTES // (4 * self.vocab_size**2)):
                self._kept.popitem()  # the last one; the first are those of the schedule
            matrix = self._rate if sigma is None else self.transition(sigma)
            self._kept[key] = matrix.to(torch.float32).to(device)
        return self._kept[key]

    def prior(self) -> torch.Tensor:
        """The law (vocab,), float64, of a token at time 1."""
        return self._initial.clone()

    def sample_prior(self, shape: tuple[int, ...], generator: Generators, device: torch.device) -> torch.Tensor:
        """Tokens at time 1, int64, of a shape (batch, length)."""
        ticks = clocks_for_tokens(shape, self.vocab_size, generator, device).flatten(0, -2)
        law = self._initial.to(torch.float32).to(device)
        return draw_tokens(law.expand(len(ticks), -1), ticks).view(shape)

    def draw_noise(self, length: int, generator: torch.Generator) -> torch.Tensor:
        """Noise of one sequence in a form that `perturb` replays, on the generator's device."""
        return torch.rand(length, self.vocab_size, generator=generator)

    def noise_shapes(self, shape: tuple[int, ...]) -> list:
        """The shapes of recorded noise that `perturb` takes for tokens (batch, length)."""
        return [(*shape, self.vocab_size)]

    def perturb(self, x0: torch.Tensor, sigma: list[float], noise: Noise, generator: Generators) -> torch.Tensor:
        """A draw of x_t for x0 (batch, length). sigma: one a sample. noise: uniforms (*x0.shape, vocab) or None."""
        ticks = clocks_for_tokens(x0.shape, self.vocab_size, generator, x0.device) if noise is None else None
        result = torch.empty_like(x0)
        for b, one in enumerate(sigma):
            weights = self._on(x0.device, one)[x0[b]]
            result[b] = draw_tokens(weights, ticks[b]) if noise is None else replay_tokens(weights, noise[b])
        return result

    def jumps_from(self, x: torch.Tensor) -> torch.Tensor:
        """Q[x, y], diagonal 0."""
        return self._on(x.device, None)[x].scatter_(1, x.unsqueeze(1), 0)

    def jumps_into(self, score: torch.Tensor, x: torch.Tensor, rate: float) -> torch.Tensor:
        """rate score[y] Q[y, x], diagonal 0; in place."""
        return score.mul_(self._on(x.device, None).T[x]).mul_(rate).scatter_(1, x.unsqueeze(1), 0)

    def x0_law(self, output: torch.Tensor, logits: bool) -> torch.Tensor:
        """p(x_0 | x) of its logits or of itself."""
        return output.softmax(dim=1) if logits else output

    def _expected_ratio(self, p0, x, sigma_bar: float, target_sigma_bar: float, floor: float) -> torch.Tensor:
        """sum over x_0 of p0[x_0] P_target[x_0, y] / (P_t[x_0, x] + floor)."""
        here = self._on(x.device, sigma_bar).T[x]
        return (p0 / here.add_(floor)) @ self._on(x.device, target_sigma_bar)

    def law_given_others(self, p0: torch.Tensor, x: torch.Tensor, sigma_bar: float, floor: float) -> torch.Tensor:
        """The law of x_0 at each position by the others alone, not normalised; in place."""
        return p0.div_(self._on(x.device, sigma_bar).T[x].add_(floor))

    def law_at(self, law: torch.Tensor, made: torch.Tensor, sigma_bar: float) -> torch.Tensor:
        """The law of x at a total noise, of `law_given_others`, (..., vocab), whenever it was made."""
        return law @ self._on(law.device, sigma_bar)

    def exposure(self, now: float, start: float, end: float) -> float:
        """What `jumps_into` of a score is multiplied with, from noise `start` down to `end`; the score is held."""
        return start - end

    def score(self, p0: torch.Tensor, x: torch.Tensor, sigma_bar: float, floor: float) -> torch.Tensor:
        """The expected ratios p_t(y) / p_t(x) (n, vocab) under the law p0 of x_0."""
        return self._expected_ratio(p0, x, sigma_bar, sigma_bar, floor)

    def posterior_weights(
        self, p0: torch.Tensor, x: torch.Tensor, sigma_bar: float, next_sigma_bar: float, floor: float
    ) -> torch.Tensor:
        """Weights (n, vocab) of the tokens at the smaller total noise, under the law p0 of x_0."""
        ratio = self._expected_ratio(p0, x, sigma_bar, next_sigma_bar, floor)
        return ratio.mul_(self._on(x.device, sigma_bar - next_sigma_bar).T[x])

    def score_entropy(
        self, log_score: torch.Tensor, noisy: torch.Tensor, original: torch.Tensor, sigma_bar: torch.Tensor
    ) -> torch.Tensor:
        """Not possible: scores are not predicted for ordered tokens.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"score entropy is for kernel='absorbing' and 'uniform', this is {self.name!r}")


def build_kernel(config: FrozenDict) -> AbsorbingKernel | UniformKernel | ReversibleKernel:
    """The kernel that a checked configuration names."""
    if config.kernel == "absorbing":
        return AbsorbingKernel(config.vocab_size)
    if config.kernel == "uniform":
        return UniformKernel(config.vocab_size)
    if config.kernel == "gaussian":
        return gaussian_kernel(config.vocab_size, config.rate_sigma, config.Q_sigma)
    return birth_death_kernel(config.vocab_size)


def gaussian_kernel(vocab_size: int, rate_sigma: float, Q_sigma: float) -> ReversibleKernel:
    r"""tauLDR's rate with a discretised Gaussian prior (2205.14987, appendix E).

    Jumps by d tokens that lead towards the middle (up to the mirror image, which counts for the lower half) have the
    rate exp(-(d - 1)^2 / rate_sigma^2); the way back follows by detailed balance with
    prior[i] ~ exp(-(i + 1 - S/2)^2 / (2 Q_sigma^2)). The same Gaussian centred on the state S // 2 - 1 is where
    sampling starts.
    """
    tokens = torch.arange(vocab_size, dtype=torch.float64)
    i, j = tokens[:, None], tokens[None, :]
    inward = ((i < j) & (j < vocab_size - i)) | ((vocab_size - 1 - i < j) & (j < i))
    log_prior = -((tokens + 1 - vocab_size / 2) ** 2) / (2 * Q_sigma**2)
    rate = torch.exp(-(((i - j).abs() - 1) ** 2) / rate_sigma**2) * inward
    back = rate.T * torch.exp(log_prior[None, :] - log_prior[:, None])
    initial = -((tokens - (vocab_size // 2 - 1)) ** 2) / (2 * Q_sigma**2)
    return ReversibleKernel("gaussian", torch.where(inward, rate, back), log_prior, initial)


def birth_death_kernel(vocab_size: int) -> ReversibleKernel:
    """Jumps to either neighbour at rate 1, reflected at the ends; the prior is uniform (tauLDR)."""
    ones = torch.ones(vocab_size - 1, dtype=torch.float64)
    rate = torch.diag(ones, 1) + torch.diag(ones, -1)
    return ReversibleKernel("birth_death", rate, torch.zeros(vocab_size, dtype=torch.float64))


def rest_stays(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Weights (n, vocab) with what they leave of 1 for the current token x (n,), at least 0; in place."""
    return weights.scatter_(1, x.unsqueeze(1), (1 - weights.sum(1, keepdim=True)).clamp_(min=0))


def stays_or_jumps(means: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Weights (n, vocab) of tokens whose jumps to each other one have these means; in place.

    The current token x (n,), whose mean is 0, stays with probability exp(-M), M the sum of the means.
    """
    total = means.sum(1, keepdim=True)
    jumps = -torch.expm1(-total)
    means.mul_(jumps / total.clamp(min=torch.finfo(means.dtype).tiny))
    return means.scatter_(1, x.unsqueeze(1), 1 - jumps)


def _moved(x0: torch.Tensor, sigma: list[float], recorded: torch.Tensor | None, generator) -> torch.Tensor:
    """Where tokens (batch, length) jump at rate 1 within a time sigma, at least once; bool."""
    total = column(sigma, x0.device).unsqueeze(1)
    if recorded is None:
        return clocks(x0.shape, generator, x0.device) < total
    return recorded < -torch.expm1(-total)
