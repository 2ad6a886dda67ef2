"""The theta-trapezoidal sampler (2502.00234): its order by enumeration, and its two network calls a step."""

import math
from itertools import pairwise

import pytest
import torch
from exact_chains import ExactNetwork, all_sequences, exact_scheduler, markov_chain, noised_law, total_variation
from tiny_discrete import build

from diffusers_ext import CTMCScheduler
from diffusers_ext.schedulers import ctmc_samplers


def weights_of_steps(scheduler, steps, monkeypatch) -> list[torch.Tensor]:
    """Laws (rows, length, vocab) from which steps draw each position. steps: (output, timestep, tokens) in turn."""
    drawn = []

    def recording(weights, _):
        drawn.append(weights)
        return torch.zeros(len(weights), dtype=torch.int64)

    laws = []
    with monkeypatch.context() as patch:
        patch.setattr(ctmc_samplers, "draw_tokens", recording)
        for output, timestep, tokens in steps:
            drawn.clear()
            scheduler.step(output, timestep, tokens, torch.Generator().manual_seed(0))
            law = torch.nn.functional.one_hot(tokens, output.shape[-1]).double()
            moved = (
                torch.ones_like(tokens).bool() if scheduler.kernel.mask is None else tokens == scheduler.kernel.mask
            )
            law[moved] = torch.cat(drawn).double()
            laws.append(law / law.sum(dim=-1, keepdim=True))
    return laws


def joint(laws: torch.Tensor) -> torch.Tensor:
    """Laws of positions (rows, length, vocab) as laws of sequences, (rows, vocab ** length)."""
    result = torch.ones(len(laws), 1, dtype=torch.float64)
    for position in range(laws.shape[1]):
        result = (result.unsqueeze(-1) * laws[:, position].unsqueeze(1)).flatten(1)
    return result


def law_after(network: ExactNetwork, edges: list[float], start: torch.Tensor, monkeypatch) -> torch.Tensor:
    """The law of all sequences after the steps between edges, by the scheduler's own sampler; nothing is sampled."""
    scheduler, law = network.scheduler, start
    scheduler.set_timesteps(timesteps=edges)
    states = all_sequences(scheduler.config.vocab_size, network.every.shape[1])
    times = scheduler.timesteps

    def output(tokens, time):
        return network(tokens, time.expand(len(tokens)))

    if scheduler.sampler.evaluations_per_step == 1:
        for time in times[:-1]:
            (laws,) = weights_of_steps(scheduler, [(output(states, time), time, states)], monkeypatch)
            law = law @ joint(laws)
        return law
    first, second = states.repeat_interleave(len(states), 0), states.repeat(len(states), 1)
    for start_time, inside in zip(times[:-1:2], times[1::2], strict=True):
        at_start = output(states, start_time).repeat_interleave(len(states), 0)
        at_inside = output(states, inside).repeat(len(states), 1, 1)
        steps = [(at_start, start_time, first), (at_inside, inside, second)]
        to_inside, to_end = weights_of_steps(scheduler, steps, monkeypatch)
        reached = joint(to_inside[:: len(states)])  # the same for all rows of a state
        both = law.unsqueeze(1) * reached  # the law of the tokens at the start and inside
        law = both.flatten() @ joint(to_end)
    return law


@pytest.mark.parametrize("kernel", ["absorbing", "uniform"])
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("theta_trapezoidal", 2)])
def test_order_of_convergence(kernel, sampler, order, monkeypatch):
    """From the exact law at one time to that at another: twice the steps, and a half or a quarter of the error.

    The chain is so smooth that no rate is clipped at 0.
    """
    chain = markov_chain(2, 3, 2, sharpness=1.0) if kernel == "absorbing" else markov_chain(3, 2, 1, sharpness=0.5)
    scheduler = exact_scheduler(kernel, chain.num_tokens, sampler=sampler)
    network, start, end = ExactNetwork(chain, scheduler), 0.9, 0.3
    errors = []
    for steps in (2, 4, 8):
        edges = torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist()
        law = law_after(network, edges, noised_law(chain, scheduler, start), monkeypatch)
        errors.append(total_variation(law, noised_law(chain, scheduler, end)))
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(abs(found - order) < 0.35 for found in orders), (errors, orders)


def test_fewer_errors_than_euler_at_as_many_calls(monkeypatch):
    """On a sharp chain, where rates are clipped: 4 steps of two calls against 8 of one."""
    chain, errors = markov_chain(3, 2, 1, sharpness=2.5), {}
    for sampler, steps in (("theta_trapezoidal", 4), ("euler", 8)):
        scheduler = exact_scheduler("absorbing", 3, sampler=sampler)
        edges = torch.linspace(0.9, 0.3, steps + 1, dtype=torch.float64).tolist()
        law = law_after(ExactNetwork(chain, scheduler), edges, noised_law(chain, scheduler, 0.9), monkeypatch)
        errors[sampler] = total_variation(law, noised_law(chain, scheduler, 0.3))
    assert errors["theta_trapezoidal"] < 0.8 * errors["euler"]


def test_positions_alone_are_exact(monkeypatch):
    """Of one token there is nothing to hold but the prediction, which stays what it was: any step is exact."""
    chain = markov_chain(3, 1, 0)
    scheduler = exact_scheduler("absorbing", 3, sampler="theta_trapezoidal", noise_schedule="cosine")
    law = law_after(ExactNetwork(chain, scheduler), [0.9, 0.2], noised_law(chain, scheduler, 0.9), monkeypatch)
    torch.testing.assert_close(law, noised_law(chain, scheduler, 0.2), rtol=1e-5, atol=1e-6)


def test_two_calls_a_step_and_one_to_denoise():
    pipe, seen = build("text"), []
    settings = {"sampler": "theta_trapezoidal", "num_corrector_steps": 1, "time_conditioning": "timestep"}
    pipe.scheduler = CTMCScheduler.from_config(pipe.scheduler.config, **settings)
    pipe.model.register_forward_pre_hook(lambda _, inputs: seen.append(round(float(inputs[1][0]), 6)))
    pipe(batch_size=2, timesteps=[1.0, 0.6, 0.1], generator=torch.Generator().manual_seed(0))
    assert seen == [1.0, 0.8, 0.6, 0.6, 0.35, 0.1, 0.1]  # a corrector's call at the end of each step
    assert (
        pipe.scheduler.sampler.evaluations_per_step == pipe.scheduler.order == 2
        and pipe.scheduler.num_inference_steps == 2
    )
    assert pipe.scheduler.edges.tolist() == [1.0, 0.6, 0.1] and pipe.num_timesteps == 5


@pytest.mark.parametrize("kernel", ["absorbing", "uniform", "gaussian"])
def test_samples_do_not_depend_on_their_batch(kernel):
    scheduler = CTMCScheduler(kernel=kernel, vocab_size=6, prediction_type="x0", sampler="theta_trapezoidal")
    network = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))

    def sample(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        scheduler.set_timesteps(3)
        tokens = scheduler.sample_prior((len(seeds), 9), generators)
        for t in scheduler.timesteps:
            tokens = scheduler.step(network[tokens], t, tokens, generators).prev_sample
        return tokens

    together = sample(4, 5)
    assert torch.equal(together, torch.cat([sample(4), sample(5)]))
    assert kernel != "absorbing" or not (together == scheduler.mask_token_id).any()


def test_steps_out_of_order_are_refused():
    scheduler = CTMCScheduler(vocab_size=6, sampler="theta_trapezoidal")
    scheduler.set_timesteps(3)
    tokens, output = torch.full((2, 4), 5), torch.zeros(2, 4, 6)
    middle = pytest.raises(ValueError, match="in the middle of a step of two network calls")
    with middle:
        scheduler.step(output, scheduler.timesteps[1], tokens)
    scheduler.step(output, scheduler.timesteps[0], tokens)
    with middle:
        scheduler.step(output, scheduler.timesteps[3], tokens)
    scheduler.step(output, scheduler.timesteps[0], tokens)
    with middle:
        scheduler.step(output[:1], scheduler.timesteps[1], tokens[:1])
    with pytest.raises(ValueError, match=r"next_timestep=0\.5: a step of sampler='theta_trapezoidal'"):
        scheduler.step(output, 1.0, tokens, next_timestep=0.5)
