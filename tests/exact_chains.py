"""Markov chains small enough to enumerate, networks that are exactly right for them, and exact laws of samplers."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from diffusers_ext import CTMCScheduler


@dataclass(frozen=True)
class MarkovChain:
    """Sequences of a length over num_tokens tokens; probabilities (num_tokens ** length,) float64 of each."""

    num_tokens: int
    length: int
    probabilities: torch.Tensor

    def draw(self, count: int, seed: int = 0) -> torch.Tensor:
        """Sequences of the chain, (count, length) int64."""
        generator = torch.Generator().manual_seed(seed)
        return sequences(self)[torch.multinomial(self.probabilities, count, True, generator=generator)]


def markov_chain(num_tokens: int, length: int, seed: int, sharpness: float = 1.5) -> MarkovChain:
    """A chain with random transitions, the sharper the nearer to deterministic."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.softmax(torch.randn(num_tokens, generator=generator, dtype=torch.float64), 0)
    step = torch.softmax(sharpness * torch.randn(num_tokens, num_tokens, generator=generator, dtype=torch.float64), 1)
    every = all_sequences(num_tokens, length)
    probabilities = first[every[:, 0]] * step[every[:, :-1], every[:, 1:]].prod(dim=1)
    return MarkovChain(num_tokens, length, probabilities)


def smooth_chain(num_tokens: int, length: int) -> MarkovChain:
    """Ordered tokens that start at one of two levels and move little."""
    every = all_sequences(num_tokens, length).double()
    start = every[:, 0] / num_tokens
    two = torch.exp(-((start - 0.3) ** 2) / 0.045) + torch.exp(-((start - 0.75) ** 2) / 0.02)
    probabilities = two * torch.exp(-(every.diff(dim=1) ** 2) / 0.8).prod(dim=1)
    return MarkovChain(num_tokens, length, probabilities / probabilities.sum())


def sequences(chain: MarkovChain) -> torch.Tensor:
    """Every sequence, (num_tokens ** length, length) int64, the last token changing fastest."""
    return all_sequences(chain.num_tokens, chain.length)


def all_sequences(num_tokens: int, length: int) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(num_tokens)] * length).view(-1, length)


def total_correlation(chain: MarkovChain) -> float:
    """KL divergence in nats of the chain from the product of its positions' laws."""
    every, product = sequences(chain), torch.ones_like(chain.probabilities)
    for position in every.unbind(dim=1):
        product = (
            product * torch.zeros(chain.num_tokens).double().index_add(0, position, chain.probabilities)[position]
        )
    return float((chain.probabilities * (chain.probabilities / product).log()).sum())


class ExactNetwork(torch.nn.Module):
    """p(x_0 | x_t) at every position, (batch, length, vocab_size), of a scheduler's chain.

    The scheduler has prediction_type="probabilities" and time_conditioning="timestep".
    """

    def __init__(self, chain: MarkovChain, scheduler: CTMCScheduler):
        super().__init__()
        self.scheduler, self.calls = scheduler, 0
        self.register_buffer("every", sequences(chain))
        self.register_buffer("probabilities", chain.probabilities)

    def forward(self, tokens: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if len(time.unique()) == 1:
            rows = self._posterior(tokens, float(time[0]))
        else:
            rows = torch.cat([self._posterior(x[None], float(t)) for x, t in zip(tokens, time, strict=True)])
        onehot = torch.nn.functional.one_hot(self.every, self.scheduler.config.vocab_size).double()
        return torch.einsum("bs,slv->blv", rows, onehot).float()

    def _posterior(self, tokens: torch.Tensor, time: float) -> torch.Tensor:
        """The probability of every sequence, (batch, sequences)."""
        seen = self.scheduler.transition_matrix(time)[self.every]  # (sequences, length, vocab)
        likelihood = torch.ones(len(tokens), len(self.every), dtype=torch.float64)
        for position in range(tokens.shape[1]):
            likelihood *= seen[:, position].T[tokens[:, position]]
        weights = likelihood * self.probabilities
        return weights / weights.sum(dim=1, keepdim=True)


def exact_scheduler(kernel: str, num_tokens: int, **settings) -> CTMCScheduler:
    """For an `ExactNetwork` over sequences of num_tokens tokens."""
    defaults = {"prediction_type": "probabilities", "time_conditioning": "timestep"}
    vocab_size = num_tokens + (kernel == "absorbing")
    return CTMCScheduler(kernel=kernel, vocab_size=vocab_size, **{**defaults, **settings})


def law_of_euler_steps(network: ExactNetwork, edges: list[float], start: torch.Tensor) -> torch.Tensor:
    """The law of all sequences over the vocabulary after the euler steps between edges; start: at the first edge."""
    scheduler, length = network.scheduler, network.every.shape[1]
    states = all_sequences(scheduler.config.vocab_size, length)
    law = start
    for now, then in pairwise(edges):
        times = torch.full((len(states),), now)
        rates = scheduler.reverse_rates(network(states, times), now, states).double()
        stay = torch.nn.functional.one_hot(states, rates.shape[-1])
        moves = (stay + (now - then) * rates).clamp(min=0)
        law = _moved(law, moves / moves.sum(dim=-1, keepdim=True))
    return law


def law_of_denoising(network: ExactNetwork, time: float, law: torch.Tensor) -> torch.Tensor:
    """The law over the vocabulary's sequences after all masks are drawn at once (absorbing kernel)."""
    scheduler, length = network.scheduler, network.every.shape[1]
    states = all_sequences(scheduler.config.vocab_size, length)
    clean = network(states, torch.full((len(states),), time)).double()
    kept = torch.nn.functional.one_hot(states, clean.shape[-1]).double()
    masked = (states == scheduler.mask_token_id).unsqueeze(-1)
    return _moved(law, torch.where(masked, clean, kept))


def noised_law(chain: MarkovChain, scheduler: CTMCScheduler, time: float) -> torch.Tensor:
    """The exact law of x_t over all sequences of the vocabulary."""
    vocab_size, length = scheduler.config.vocab_size, chain.length
    law = torch.zeros([vocab_size] * length, dtype=torch.float64)
    law[tuple(slice(chain.num_tokens) for _ in range(length))] = chain.probabilities.view([chain.num_tokens] * length)
    for _ in range(length):  # each product moves an axis to the end
        law = torch.tensordot(law, scheduler.transition_matrix(time), dims=([0], [0]))
    return law.flatten()


def _moved(law: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    """A law (states,) after every position of each state has moved by itself with moves (states, length, vocab)."""
    joint = torch.ones(len(law), 1, dtype=torch.float64)
    for position in range(moves.shape[1]):
        joint = (joint.unsqueeze(-1) * moves[:, position].unsqueeze(1)).flatten(1)
    return law @ joint


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p - q).abs().sum() / 2)
