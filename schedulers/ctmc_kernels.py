r"""Kernels of continuous-time discrete diffusion: the constant rate matrix Q and all that has a closed form with it.

Q[i, j] is the rate of jumps from i to j and its rows sum to 0. With the total noise sigma the transition is
P_sigma = exp(sigma Q), P[i, j] = P(x_t = j | x_0 = i). The methods act on rows: the (n, vocab) quantities of n
positions whose current tokens are x, all at the same time, so that no method sees a whole batch of sequences.

A score is the ratio p_t(y) / p_t(x) over tokens y for the current token x; a network may predict it (its logarithm)
or p(x_0 | x_t), from which

.. math:: \frac{p_t(y)}{p_t(x)} = \sum_{x_0} p(x_0 | x) \frac{P_{0t}[x_0, y]}{P_{0t}[x_0, x]}
"""

import math

import torch


def race(weights: torch.Tensor, uniforms: torch.Tensor | None, generator: torch.Generator | None) -> torch.Tensor:
    """Draw a category in proportion to each row of weights, by a race of exponential clocks.

    weights: (n, vocab), not normalised; negative ones count as 0. Overwritten. uniforms: recorded uniforms in [0, 1)
    of the same shape to replay, or None to draw from the generator. Returns (n,) int64.
    """
    if uniforms is None:
        device = weights.device if generator is None else generator.device
        clocks = torch.empty(weights.shape, device=device).exponential_(generator=generator).to(weights.device)
    else:
        clocks = -torch.log(uniforms.to(weights.device, torch.float32))
    return weights.div_(clocks.clamp_(min=1e-38)).argmax(dim=-1)


def uniform_noise(shape, generator: torch.Generator | None, device) -> torch.Tensor:
    """float32 uniforms in [0, 1) on the device, drawn where the generator lives."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device)


class AbsorbingKernel:
    """Every token jumps to the mask, the last one, at rate 1, and stays there."""

    ordered = False

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.mask = vocab_size - 1

    def base_rate(self) -> torch.Tensor:
        rate = -torch.eye(self.vocab_size, dtype=torch.float64)
        rate[:, self.mask] += 1
        return rate

    def transition(self, sigma: float) -> torch.Tensor:
        stay = torch.eye(self.vocab_size, dtype=torch.float64) * math.exp(-sigma)
        stay[:, self.mask] += -math.expm1(-sigma)
        return stay

    def prior(self) -> torch.Tensor:
        law = torch.zeros(self.vocab_size, dtype=torch.float64)
        law[self.mask] = 1
        return law

    def sample_prior(self, shape, generator, device) -> torch.Tensor:
        return torch.full(shape, self.mask, device=device)

    def perturb(self, x0, sigma: torch.Tensor, noise, generator) -> torch.Tensor:
        """noise: uniforms of the shape of x0; masked is where they are below 1 - exp(-sigma). sigma: (n, 1)."""
        uniforms = uniform_noise(x0.shape, generator, x0.device) if noise is None else noise
        return torch.where(uniforms < -torch.expm1(-sigma), self.mask, x0)

    def jumps_from(self, x: torch.Tensor) -> torch.Tensor:
        """Q[x, y], diagonal 0."""
        rates = torch.zeros(len(x), self.vocab_size, device=x.device)
        rates[:, self.mask] = x != self.mask
        return rates

    def times_jumps_into(self, score: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """score[y] Q[y, x], diagonal 0; in place."""
        score[:, self.mask] = 0
        return score if bool((x == self.mask).all()) else score.mul_((x == self.mask).unsqueeze(1))

    def score(self, p0, x, sigma_bar: float, floor: float) -> torch.Tensor:
        """p(x_0 = y | x) / expm1(sigma_bar) at masked positions; in place."""
        return p0.div_(math.expm1(sigma_bar))

    def tweedie_weights(self, score, x, delta: float) -> torch.Tensor:
        """Staggered score times P_delta[y, x], which is the score times expm1(delta), and the rest of 1 stays."""
        weights = self.times_jumps_into(score, x).mul_(math.expm1(delta))
        return weights.scatter_(1, x.unsqueeze(1), 1 - weights.sum(1, keepdim=True))

    def posterior_weights(self, p0, x, sigma_bar: float, next_sigma_bar: float, floor: float) -> torch.Tensor:
        return self.tweedie_weights(self.score(p0, x, sigma_bar, floor), x, sigma_bar - next_sigma_bar)


class UniformKernel:
    """Every token jumps at rate 1 to a token drawn uniformly from all, itself included."""

    ordered = False

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def base_rate(self) -> torch.Tensor:
        size = self.vocab_size
        return torch.full((size, size), 1 / size, dtype=torch.float64) - torch.eye(size, dtype=torch.float64)

    def transition(self, sigma: float) -> torch.Tensor:
        size = self.vocab_size
        moved = torch.full((size, size), -math.expm1(-sigma) / size, dtype=torch.float64)
        return moved + torch.eye(size, dtype=torch.float64) * math.exp(-sigma)

    def prior(self) -> torch.Tensor:
        return torch.full((self.vocab_size,), 1 / self.vocab_size, dtype=torch.float64)

    def sample_prior(self, shape, generator, device) -> torch.Tensor:
        source = device if generator is None else generator.device
        return torch.randint(self.vocab_size, shape, generator=generator, device=source).to(device)

    def perturb(self, x0, sigma: torch.Tensor, noise, generator) -> torch.Tensor:
        """noise: a pair (uniforms, target tokens) of the shape of x0, or uniforms (*x0.shape, vocab) for a race.

        sigma: (n, 1).
        """
        if noise is None:
            noise = uniform_noise(x0.shape, generator, x0.device), self.sample_prior(x0.shape, generator, x0.device)
        if isinstance(noise, tuple):
            uniforms, targets = noise
            return torch.where(uniforms < -torch.expm1(-sigma), targets, x0)
        weights = (-torch.expm1(-sigma) / self.vocab_size).unsqueeze(-1).repeat(1, *noise.shape[1:])
        stay = torch.exp(-sigma).expand(x0.shape).unsqueeze(-1)
        return race(weights.scatter_add_(-1, x0.unsqueeze(-1), stay), noise, generator)

    def jumps_from(self, x: torch.Tensor) -> torch.Tensor:
        """Q[x, y], diagonal 0."""
        rates = torch.full((len(x), self.vocab_size), 1 / self.vocab_size, device=x.device)
        return rates.scatter_(1, x.unsqueeze(1), 0)

    def times_jumps_into(self, score: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """score[y] Q[y, x], diagonal 0; in place."""
        return score.div_(self.vocab_size).scatter_(1, x.unsqueeze(1), 0)

    def _expected_ratio(self, p0, x, sigma_bar: float, target_sigma_bar: float, floor: float) -> torch.Tensor:
        """sum over x_0 of p0[x_0] P_target[x_0, y] / (P_t[x_0, x] + floor); in place."""
        away = -math.expm1(-sigma_bar) / self.vocab_size
        x = x.unsqueeze(1)
        here = p0.gather(1, x) / (away + math.exp(-sigma_bar) + floor)
        ratio = p0.div_(away + floor).scatter_(1, x, here)
        shared = ratio.sum(1, keepdim=True) * (-math.expm1(-target_sigma_bar) / self.vocab_size)
        return ratio.mul_(math.exp(-target_sigma_bar)).add_(shared)

    def score(self, p0, x, sigma_bar: float, floor: float) -> torch.Tensor:
        return self._expected_ratio(p0, x, sigma_bar, sigma_bar, floor)

    def _times_transition_into(self, weights, x, delta: float) -> torch.Tensor:
        """weights[y] P_delta[y, x]; in place."""
        away = -math.expm1(-delta) / self.vocab_size
        x = x.unsqueeze(1)
        here = weights.gather(1, x) * (away + math.exp(-delta))
        return weights.mul_(away).scatter_(1, x, here)

    def tweedie_weights(self, score, x, delta: float) -> torch.Tensor:
        """Staggered score times P_delta[y, x] (SEDD, theorem 4.2). score: 1 at the current token. In place."""
        shared = score.sum(1, keepdim=True) * (-math.expm1(delta) / self.vocab_size)
        return self._times_transition_into(score.mul_(math.exp(delta)).add_(shared), x, delta)

    def posterior_weights(self, p0, x, sigma_bar: float, next_sigma_bar: float, floor: float) -> torch.Tensor:
        ratio = self._expected_ratio(p0, x, sigma_bar, next_sigma_bar, floor)
        return self._times_transition_into(ratio, x, sigma_bar - next_sigma_bar)


class ReversibleKernel:
    """Ordered tokens with a rate matrix in detailed balance with its prior, exponentiated by its eigenvalues.

    rate: (vocab, vocab) float64, off-diagonal rates; the diagonal is set. log_prior: (vocab,) float64, not
    normalised, with prior[i] rate[i, j] = prior[j] rate[j, i].
    """

    ordered = True

    def __init__(self, rate: torch.Tensor, log_prior: torch.Tensor, initial: torch.Tensor | None = None):
        self.vocab_size = len(rate)
        self._rate = rate - torch.diag(rate.sum(1))
        self._half = ((log_prior - log_prior.max()) / 2).exp()
        self._initial = torch.softmax(log_prior if initial is None else initial, 0)
        self._eigen: tuple[torch.Tensor, torch.Tensor] | None = None
        self._transitions: dict[float, torch.Tensor] = {}

    def base_rate(self) -> torch.Tensor:
        return self._rate.clone()

    def transition(self, sigma: float) -> torch.Tensor:
        if sigma not in self._transitions:
            if len(self._transitions) == 8:  # a step needs three
                self._transitions.clear()
            self._transitions[sigma] = self._exponential(sigma)
        return self._transitions[sigma].clone()

    def _exponential(self, sigma: float) -> torch.Tensor:
        if self._eigen is None:
            # sqrt(prior_i) rate_ij / sqrt(prior_j) is symmetric, so that eigh applies, which is exact to rounding
            symmetric = self._half[:, None] * self._rate / self._half
            self._eigen = torch.linalg.eigh((symmetric + symmetric.T) / 2)
        values, vectors = self._eigen
        matrix = (vectors * torch.exp(sigma * values)) @ vectors.T
        return (matrix / self._half[:, None] * self._half).clamp_(min=0)

    def prior(self) -> torch.Tensor:
        return self._initial.clone()

    def sample_prior(self, shape, generator, device) -> torch.Tensor:
        source = device if generator is None else generator.device
        law = self._initial.to(source, torch.float32)
        return torch.multinomial(law, math.prod(shape), replacement=True, generator=generator).view(shape).to(device)

    def perturb(self, x0, sigma: torch.Tensor, noise, generator) -> torch.Tensor:
        """One sample, (1, length). noise: uniforms (*x0.shape, vocab) for a race. sigma: (1, 1)."""
        weights = self.transition(float(sigma)).to(x0.device, torch.float32)[x0]
        flat = None if noise is None else noise.reshape(-1, self.vocab_size)
        return race(weights.reshape(-1, self.vocab_size), flat, generator).view(x0.shape)

    def jumps_from(self, x: torch.Tensor) -> torch.Tensor:
        """Q[x, y], diagonal 0."""
        return self._rate.to(x.device, torch.float32)[x].scatter_(1, x.unsqueeze(1), 0)

    def times_jumps_into(self, score: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """score[y] Q[y, x], diagonal 0; in place."""
        return score.mul_(self._rate.T.to(x.device, torch.float32)[x]).scatter_(1, x.unsqueeze(1), 0)

    def _expected_ratio(self, p0, x, sigma_bar: float, target_sigma_bar: float, floor: float) -> torch.Tensor:
        """sum over x_0 of p0[x_0] P_target[x_0, y] / (P_t[x_0, x] + floor)."""
        here = self.transition(sigma_bar).T.to(x.device, torch.float32)[x]
        return (p0 / here.add_(floor)) @ self.transition(target_sigma_bar).to(x.device, torch.float32)

    def score(self, p0, x, sigma_bar: float, floor: float) -> torch.Tensor:
        return self._expected_ratio(p0, x, sigma_bar, sigma_bar, floor)

    def posterior_weights(self, p0, x, sigma_bar: float, next_sigma_bar: float, floor: float) -> torch.Tensor:
        ratio = self._expected_ratio(p0, x, sigma_bar, next_sigma_bar, floor)
        return ratio.mul_(self.transition(sigma_bar - next_sigma_bar).T.to(x.device, torch.float32)[x])


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
    return ReversibleKernel(torch.where(inward, rate, back), log_prior, initial)


def birth_death_kernel(vocab_size: int) -> ReversibleKernel:
    """Jumps to either neighbour at rate 1, reflected at the ends; the prior is uniform (tauLDR)."""
    ones = torch.ones(vocab_size - 1, dtype=torch.float64)
    return ReversibleKernel(torch.diag(ones, 1) + torch.diag(ones, -1), torch.zeros(vocab_size, dtype=torch.float64))
