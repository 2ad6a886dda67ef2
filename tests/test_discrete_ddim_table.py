"""TableDiscreteDDIMScheduler: stock when off, its posterior, and a table that errs less by enumeration."""

from itertools import pairwise

import diffusers
import pytest
import torch
from exact_chains import ExactNetwork, all_sequences, markov_chain, total_variation

from diffusers_ext.jump_your_steps import TimestepTables, optimize_timesteps

if not hasattr(diffusers, "DiscreteDDIMScheduler"):
    pytest.skip("this diffusers has no DiscreteDDIMScheduler", allow_module_level=True)

from diffusers import DiscreteDDIMScheduler

from diffusers_ext import TableDiscreteDDIMScheduler
from diffusers_ext.jump_your_steps.diffusers_schedulers import chain_of_diffusers

EVEN = [1.0, 0.75, 0.5, 0.25, 1e-6]
TABLE = [1.0, 0.6, 0.3, 0.1, 1e-5]


class RandomNetwork(torch.nn.Module):
    def __init__(self, vocab_size: int = 7):
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, tokens):
        return self.weight[tokens] + self.weight[tokens.roll(1, dims=1)]


def sampled(scheduler, steps: int = 4, temperature: float = 1.0, correct: bool = False) -> torch.Tensor:
    generator, network = torch.Generator().manual_seed(1), RandomNetwork()
    tokens = torch.randint(7, (3, 12), generator=generator)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        tokens = scheduler.step(network(tokens), t, tokens, temperature=temperature, generator=generator).prev_sample
        if correct and t < steps - 1:
            tokens = scheduler.step_correct(network(tokens), t, tokens, generator=generator).prev_sample
    return tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("correct", [False, True])
def test_off_is_stock(temperature, correct):
    stock = sampled(DiscreteDDIMScheduler(), temperature=temperature, correct=correct)
    for scheduler in (
        TableDiscreteDDIMScheduler(),
        TableDiscreteDDIMScheduler(timestep_tables={"4": TABLE}, timestep_spacing="uniform"),
        TableDiscreteDDIMScheduler(timestep_tables={}),
    ):
        assert torch.equal(sampled(scheduler, temperature=temperature, correct=correct), stock)


@pytest.mark.parametrize("correct", [False, True])
def test_a_table_of_even_steps_is_stock(correct):
    scheduler = TableDiscreteDDIMScheduler(timestep_tables={"4": EVEN}, timestep_spacing="table")
    assert torch.equal(sampled(scheduler, correct=correct), sampled(DiscreteDDIMScheduler(), correct=correct))


def test_steps_without_a_table_are_interpolated():
    """Between the next smaller and the next larger number; the last edge counts as 0 and is no step."""
    tables = {"2": [1.0, 0.4, 1e-5], "4": TABLE}
    scheduler = TableDiscreteDDIMScheduler(timestep_tables=tables)
    for steps in (1, 2, 3, 4, 9):
        scheduler.set_timesteps(steps)
        alphas = [scheduler._alpha(i) for i in range(steps + 1)]
        assert alphas[0] == 0 and alphas[-1] == 1 and all(a < b for a, b in pairwise(alphas))
    scheduler.set_timesteps(8)  # four steps cut in two
    assert [scheduler._alpha(i) for i in (0, 2, 4, 6)] == pytest.approx([1 - t for t in TABLE[:4]])


def test_a_table_changes_steps_and_corrections():
    scheduler = TableDiscreteDDIMScheduler(timestep_tables={"4": TABLE}, timestep_spacing="table")
    assert not torch.equal(sampled(scheduler), sampled(DiscreteDDIMScheduler()))
    scheduler.set_timesteps(4)
    assert [scheduler._alpha(i) for i in range(5)] == pytest.approx([0, 0.4, 0.7, 0.9, 1.0])
    assert torch.equal(scheduler.timesteps, torch.arange(4))


def posterior(clean: torch.Tensor, tokens: torch.Tensor, now: float, then: float) -> torch.Tensor:
    """q(x_s | x_t) of each position, (..., V), for laws of the clean token (..., V): summed over x_0 and by Bayes."""
    vocab_size = clean.shape[-1]
    eye, flat = torch.eye(vocab_size, dtype=torch.float64), torch.full((vocab_size,) * 2, 1 / vocab_size).double()
    to_s, s_to_t = (a * eye + (1 - a) * flat for a in (then, now / then))
    joint = to_s[None] * s_to_t.T[:, None]  # [x_t, x_0, x_s]
    law = joint / joint.sum(dim=-1, keepdim=True)
    return torch.einsum("...v,...vs->...s", clean.double(), law[tokens])


def test_steps_follow_the_posterior():
    scheduler = TableDiscreteDDIMScheduler(timestep_tables={"4": TABLE}, timestep_spacing="table")
    scheduler.set_timesteps(4)
    logits = torch.tensor([0.3, -0.5, 1.0, 0.0]).expand(200_000, 1, 4)
    tokens = torch.full((200_000, 1), 1)
    drawn = scheduler.step(logits, 1, tokens, temperature=1.0, generator=torch.Generator().manual_seed(0)).prev_sample
    shares = torch.bincount(drawn.flatten(), minlength=4) / len(drawn)
    expected = posterior(logits[0, 0].softmax(0), torch.tensor(1), 0.4, 0.7)
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=4e-3)


def test_the_last_step_commits():
    scheduler = TableDiscreteDDIMScheduler(timestep_tables={"4": [*TABLE[:4], 0.05]}, timestep_spacing="table")
    scheduler.set_timesteps(4)
    logits = torch.randn(2, 50, 7)
    out = scheduler.step(logits, 3, torch.randint(7, (2, 50)), return_dict=False)
    assert torch.equal(out[0], logits.argmax(-1)) and torch.equal(out[0], out[1]) and len(out) == 4


# A small Markov chain, its exact network, and the exact law of samples


class Logits(ExactNetwork):
    def forward(self, tokens, time):
        return super().forward(tokens, time).clamp(min=1e-12).log()


def error(edges: list[float], network: ExactNetwork, chain) -> float:
    """Total variation of samples from the chain; times are 1 - alpha, the last edge counts as 0."""
    states, times = all_sequences(chain.num_tokens, chain.length), [*edges[:-1], 0.0]
    law = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
    for now, then in pairwise(times):
        clean = network(states, torch.full((len(states),), now)).softmax(dim=-1)
        moves = posterior(clean, states, 1 - now, 1 - then)
        joint = torch.ones(len(states), 1, dtype=torch.float64)
        for position in range(chain.length):
            joint = (joint.unsqueeze(-1) * moves[:, position].unsqueeze(1)).flatten(1)
        law = law @ joint
    return total_variation(law, chain.probabilities)


@pytest.mark.slow
def test_an_optimised_table_errs_less_than_even_steps():
    chain = markov_chain(3, 4, 1, sharpness=2.5)
    scheduler = DiscreteDDIMScheduler(corrector_steps=2)
    network = Logits(chain, chain_of_diffusers(scheduler, 3))
    tables = optimize_timesteps(network, scheduler, chain.draw(600), (3, 4, 6), grid_size=48, progress=False)
    for steps in (3, 4, 6):
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        before, after = error(even, network, chain), error(list(tables[steps]), network, chain)
        assert after < 0.85 * before, (steps, before, after)
    filled = tables.apply_to(scheduler)
    assert type(filled) is TableDiscreteDDIMScheduler
    assert filled.config.corrector_steps == 2 and filled.config.timestep_table_info["4"]["objective"] == "kl"
    filled.set_timesteps(4)
    assert filled.table == list(tables[4])


def test_save_and_load(tmp_path):
    scheduler = TableDiscreteDDIMScheduler(timestep_tables={"4": TABLE}, timestep_spacing="table", corrector_k=3)
    scheduler.save_pretrained(tmp_path)
    loaded = TableDiscreteDDIMScheduler.from_pretrained(tmp_path)
    assert loaded.config.corrector_k == 3 and torch.equal(sampled(loaded), sampled(scheduler))
    assert type(DiscreteDDIMScheduler.from_config(loaded.config)) is DiscreteDDIMScheduler


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timestep_spacing": "even"}, 'timestep_spacing must be "uniform" or "table"'),
        ({"timestep_tables": {"4": TABLE[:-1]}}, "one edge more, got 4 edges"),
        ({"timestep_tables": {"2": [1.0, 0.5, 0.5]}}, "strictly decreasing"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TableDiscreteDDIMScheduler(**settings)


def test_tables_of_other_chains():
    tables = TimestepTables({2: [1.0, 0.4, 0.1]}, {"kernel": "absorbing", "vocab_size": 3})
    with pytest.raises(ValueError, match="kernel='absorbing', not 'uniform'"):
        tables.apply_to(DiscreteDDIMScheduler())
    scheduler = TimestepTables({4: TABLE}, {"kernel": "uniform", "vocab_size": 9}).apply_to(DiscreteDDIMScheduler())
    with pytest.raises(ValueError, match="made for a network of 9 tokens, model_output has 7"):
        sampled(scheduler)
