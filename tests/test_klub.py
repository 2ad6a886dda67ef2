"""The objective of Jump Your Steps against the authors' numbers, an enumerated chain, and what it refuses."""

import math

import pytest
import torch
from discrete_goldens import GOLDENS, golden, tauldr_model
from exact_chains import ExactNetwork, exact_scheduler, markov_chain, sequences

from diffusers_ext import CTMCScheduler
from diffusers_ext.checkpoints import load_countdown
from diffusers_ext.jump_your_steps import KLUB

ABSORB = golden("jys_klub_absorb")
TAULDR = {
    "gaussian": {
        "kernel": "gaussian", "vocab_size": 16, "noise_schedule": "exponential", "time_base": 0.1,
        "time_exponential": 100.0, "rate_sigma": 3.0, "Q_sigma": 20.0,
    },
    "uniform": {
        "kernel": "uniform", "vocab_size": 13, "noise_schedule": "constant", "constant_rate": 0.03 * 13,
        "jumps": "poisson",
    },
}  # fmt: skip


def values(*kinds: str):
    chosen = [value for value in ABSORB.values if value["fn"] in kinds]
    assert chosen
    names = [f"{v['fn']}-{v['data']}-{v.get('t2', v.get('k2'))}-{v.get('tnext', v.get('knext'))}" for v in chosen]
    return pytest.mark.parametrize("value", chosen, ids=names)


def batches(data: str) -> range:
    return range(3 if data == "three" else 1)


def absorbing(value: dict, noise: str, sampler: str, **further) -> KLUB:
    """The objective on the recorded data and uniforms; the average and truncation are the authors'."""
    data = torch.cat([ABSORB.t[f"x0.{i}"] for i in batches(value["data"])])
    uniforms = torch.cat([ABSORB.t[f"{noise}.{i}"] for i in batches(value["data"])])
    if value["fn"] == "t_q_data" and value["max_length"]:
        data, uniforms = data[:, : value["max_length"]], uniforms[:, : value["max_length"]]
    given = torch.arange(data.shape[1]) < value["fix_length"]
    scheduler = CTMCScheduler(vocab_size=17, sampler=sampler)
    model = load_countdown(GOLDENS / "jys_ddit_model.safetensors", num_heads=2)
    return KLUB(model, scheduler, data, given=given, noise=uniforms, batch_size=4, average="batches", **further)


@values("t_q_data")
def test_times_with_the_same_uniforms(value):
    klub = absorbing(value, "u", "euler")(value["t1"], value["t2"], value["tnext"])
    assert klub == pytest.approx(value["klub"], rel=2e-4)


@values("t_q_path")
def test_times_along_a_step(value):
    steps = torch.cat([ABSORB.t[f"path.u_step.{i}"] for i in batches(value["data"])])
    klub = absorbing(value, "path.u_noise", "euler", coupling="path", step_noise=steps)
    assert klub(value["t1"], value["t2"], value["tnext"]) == pytest.approx(value["klub"], rel=2e-4)


@values("k_q_data")
def test_counts_with_the_same_uniforms(value):
    klub = absorbing(value, "u", "gillespie")(value["k1"], value["k2"], value["knext"])
    assert klub == pytest.approx(value["klub"], rel=2e-4)


@values("k_q_path")
def test_counts_along_a_step(value):
    noise = tuple(ABSORB.t[f"k_path.{value['noise_id']}.{name}"] for name in ("u_exp", "u_cat"))
    klub = absorbing(value, "u", "gillespie", coupling="path", step_noise=noise)
    assert klub(value["k1"], value["k2"], value["knext"]) == pytest.approx(value["klub"], rel=2e-4)


@pytest.mark.parametrize("kernel", TAULDR)
def test_ordered_and_uniform_kernels(kernel, tmp_path):
    case = golden(f"jys_klub_ctmc_{kernel}")
    weights = {"gaussian": "ctmc_unet_model", "uniform": "ctmc_seq_model"}[kernel]
    model = tauldr_model(tmp_path, f"ctmc_scheduler_{kernel}", weights)
    scheduler = CTMCScheduler(**TAULDR[kernel], prediction_type="x0", time_conditioning="timestep", eps_ratio=1e-6)
    data = case.t["x0"].long()
    for value in case.values:
        path = value["fn"] == "t_q_path"
        klub = KLUB(
            model, scheduler, data, coupling="path" if path else "data", noise=case.t["u"],
            given=torch.arange(data.shape[1]) < value["fix_length"],
            step_noise=case.t[f"path.{value['noise_id']}.jumps"] if path else None,
        )  # fmt: skip
        assert klub(value["t1"], value["t2"], value["tnext"]) == pytest.approx(value["klub"], rel=1e-5), value


def test_the_same_seed_is_the_authors_coupling():
    """Their generator starts at seed 42 at every evaluation and runs on through the batches."""
    generator = torch.Generator().manual_seed(42)
    for number in range(3):
        recorded = ABSORB.t[f"u.{number}"]
        assert torch.equal(torch.rand(recorded.shape, generator=generator), recorded)


# Closed form


def enumerated(chain, network, scheduler, t1: float, t2: float, t3: float) -> float:
    """The objective with the expectation over data and masks taken by enumeration."""
    data, length = sequences(chain), chain.length
    masked = [1 - math.exp(-float(scheduler.sigma_bar(t))) for t in (t1, t2)]
    total = 0.0
    for pattern in range(3**length):  # each position: decoded at t1; masked at t1 only; masked at both
        kinds = torch.tensor([pattern // 3**i % 3 for i in range(length)])
        weight = math.prod([1 - masked[0], masked[0] - masked[1], masked[1]][kind] for kind in kinds.tolist())
        x1, x2 = (torch.where(kinds >= least, scheduler.mask_token_id, data) for least in (1, 2))
        r1, r2 = (
            scheduler.reverse_rates(network(x, torch.full((len(x),), t)), t, x)[..., :-1]
            for x, t in ((x1, t1), (x2, t2))
        )
        terms = torch.where(r2 > 0, r2 * ((r2 + 1e-8).log() - (r1 + 1e-8).log()), 0).sum(dim=(1, 2)).double()
        total += weight * float(chain.probabilities @ terms)
    return (t2 - t3) * total / length


@pytest.mark.slow
def test_equals_the_enumerated_objective():
    chain = markov_chain(num_tokens=2, length=3, seed=1)
    scheduler = exact_scheduler("absorbing", 2)
    network, data = ExactNetwork(chain, scheduler), chain.draw(40_000)
    noise = torch.rand(data.shape, generator=torch.Generator().manual_seed(1))
    klub = KLUB(network, scheduler, data, noise=noise, batch_size=20_000)
    for times in ((1.0, 0.5, 1e-5), (0.8, 0.3, 0.1), (0.5, 0.4, 0.3)):
        expected = enumerated(chain, network, scheduler, *times)
        assert klub(*times) == pytest.approx(expected, rel=0.03, abs=2e-3)


# What is computed how often, and by whom


def chain_klub(**options) -> KLUB:
    chain = markov_chain(num_tokens=3, length=4, seed=0)
    scheduler = exact_scheduler("absorbing", 3, sampler=options.pop("sampler", "euler"))
    return KLUB(ExactNetwork(chain, scheduler), scheduler, sequences(chain), **options)


@pytest.mark.parametrize("coupling", ["data", "path"])
def test_the_start_of_an_interval_is_evaluated_once(coupling):
    klub = chain_klub(batch_size=81, coupling=coupling)
    first = [klub(0.9, t2, 0.1) for t2 in (0.3, 0.5, 0.7)]
    assert klub.network.model.calls == 4
    assert klub(0.9, 0.5, 0.1) == first[1] and klub.network.model.calls == 4  # and a candidate too
    klub(0.8, 0.5, 0.1)
    assert klub.network.model.calls == 6
    assert klub.network.evaluations == 6 * 81


@pytest.mark.parametrize("coupling", ["data", "path"])
@pytest.mark.parametrize("sampler", ["euler", "gillespie"])
def test_values_do_not_depend_on_the_batch(coupling, sampler):
    times = (0.9, 0.5, 0.1) if sampler == "euler" else (0, 2, 3)
    whole, split = (chain_klub(batch_size=n, coupling=coupling, sampler=sampler)(*times) for n in (81, 7))
    assert split == pytest.approx(whole, rel=1e-6)
    assert chain_klub(batch_size=81, coupling=coupling, sampler=sampler, seed=1000)(*times) != whole


def test_counts_that_round_alike_are_the_same():
    klub = chain_klub(sampler="gillespie")
    assert klub(0, 1.6, 4) == klub(0, 2.4, 4) == klub(0, 2, 4)
    assert klub(0, 1, 4) != klub(0, 2, 4)


def test_given_tokens_are_never_noised():
    given = torch.tensor([True, True, False, False])
    klub = chain_klub(given=given)
    tokens, _ = klub.data.at(1.0, torch.arange(81), "cpu")
    assert torch.equal(tokens[:, :2], klub.data.data[:, :2]) and (tokens[:, 2:] == 3).float().mean() > 0.9


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "both"}, 'coupling must be "data" or "path", got \'both\''),
        ({"average": "tokens"}, 'average must be "sequences" or "batches"'),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"given": torch.ones(4)}, "given must be boolean"),
        ({"given": torch.ones(5, dtype=torch.bool)}, "given must be boolean, \\(4,\\) or \\(81, 4\\)"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        chain_klub(**options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.full((2, 4), 3), "data must hold tokens in \\[0, 3\\), .* got 3 to 3"),
        (torch.rand(2, 4), "data must be integers \\(count, length\\), got torch.float32"),
        (torch.zeros(0, 4, dtype=torch.int64), "data must be integers"),
    ],
)
def test_refused_data(data, message):
    with pytest.raises(ValueError, match=message):
        KLUB(torch.nn.Identity(), exact_scheduler("absorbing", 3), data)


def test_times_out_of_order():
    for times in ((0.5, 0.9, 0.1), (0.9, 0.5, 0.5), (1.2, 0.5, 0.1), (0.9, 0.5, 0.0)):
        with pytest.raises(ValueError, match="need 1 >= t1 > t2 > t3 > 0, got"):
            chain_klub()(*times)
    with pytest.raises(ValueError, match="need 0 <= k1 <= k2 <= k3 <= 4, got 0, 3, 5"):
        chain_klub(sampler="gillespie")(0, 3, 5)


def test_rates_that_are_not_finite_are_named():
    class Broken(torch.nn.Module):
        def forward(self, tokens, time):
            output = torch.full((*tokens.shape, 4), 1 / 3)
            output[1, 2] = float("nan")
            return output

    scheduler = CTMCScheduler(vocab_size=4, prediction_type="probabilities")
    klub = KLUB(Broken(), scheduler, torch.zeros(3, 4, dtype=torch.int64), noise=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"at time 0.5 are not finite at position 2 of sequence 1 .* not finite"):
        klub(0.9, 0.5, 0.1)
