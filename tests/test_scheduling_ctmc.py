"""CTMCScheduler against the authors' numbers, closed forms, and what it refuses."""

import itertools
import json
import math

import pytest
import torch
from contracts import public
from diffusers import DDIMScheduler
from discrete_goldens import GOLDENS, golden, tauldr_model
from peak_memory import peak_bytes

from diffusers_ext import CTMCScheduler
from diffusers_ext.checkpoints import load_sedd, sedd_scheduler

ABSORBING = {"kernel": "absorbing", "vocab_size": 17}
# tauLDR's settings of the recorded cases, in our terms
GAUSSIAN = {
    "kernel": "gaussian",
    "noise_schedule": "exponential",
    "time_base": 0.1,
    "time_exponential": 100.0,
    "rate_sigma": 3.0,
    "Q_sigma": 20.0,
    "prediction_type": "x0",
    "time_conditioning": "timestep",
}
PIANO = {
    "kernel": "uniform",
    "vocab_size": 13,
    "noise_schedule": "constant",
    "constant_rate": 0.03 * 13,
    "prediction_type": "x0",
    "jumps": "poisson",
    "time_conditioning": "timestep",
}
TAULDR = {"gaussian": {**GAUSSIAN, "vocab_size": 16}, "uniform": PIANO}
SEDD = {
    "absorb": {"kernel": "absorbing", "vocab_size": 18},
    "uniform": {
        "kernel": "uniform",
        "vocab_size": 17,
        "noise_schedule": "geometric",
        "sigma_min": 1e-4,
        "sigma_max": 20.0,
    },
}


def off_diagonal(rates: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    return rates.scatter(-1, sample.unsqueeze(-1), 0)


# Noise schedules


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 1e-4])
def test_loglinear_noise(eps):
    g = golden("noise_jys").t
    scheduler = CTMCScheduler(eps=eps)
    torch.testing.assert_close(scheduler.sigma_bar(g["t"]), g[f"loglinear_eps{eps}.sigma_bar"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scheduler.sigma(g["t"]), g[f"loglinear_eps{eps}.sigma"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "arccos"])
def test_noise_of_masked_image_models(name):
    """The authors' rate lacks the factor 1 - eps of the derivative of their sigma_bar; ours is the derivative."""
    g = golden("noise_jys").t
    scheduler = CTMCScheduler(noise_schedule=name)
    torch.testing.assert_close(scheduler.sigma_bar(g["t"]), g[f"maskgit_{name}.sigma_bar"], rtol=1e-5, atol=1e-6)
    finite = g[f"maskgit_{name}.sigma"].isfinite()
    ours = scheduler.sigma(g["t"])[finite] / (1 - 1e-3)
    torch.testing.assert_close(ours, g[f"maskgit_{name}.sigma"][finite], rtol=3e-5, atol=1e-6)  # steep at t = 1


@pytest.mark.parametrize("name", ["geometric_cfg", "geometric_default", "geometric_alt"])
def test_geometric_noise(name):
    case = golden("noise_sedd")
    low, high = case.config[name]
    scheduler = CTMCScheduler(noise_schedule="geometric", sigma_min=low, sigma_max=high)
    for quantity in ("sigma_bar", "sigma"):
        values = getattr(scheduler, quantity)(case.t["t"])
        torch.testing.assert_close(values, case.t[f"{name}.{quantity}"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["loglinear", "cosine", "arccos", "geometric", "exponential", "constant"])
def test_sigma_is_the_derivative_of_sigma_bar(name):
    scheduler = CTMCScheduler(noise_schedule=name)
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(scheduler.sigma_bar(t).sum(), t)
    torch.testing.assert_close(scheduler.sigma(t), slope)
    assert scheduler.sigma_bar(0.5).dtype == torch.float32 and scheduler.sigma_bar(0.5).shape == ()


def test_model_time():
    t = torch.tensor(0.3)
    by_sigma, by_t = CTMCScheduler(), CTMCScheduler(time_conditioning="timestep")
    torch.testing.assert_close(by_sigma.model_time(t, 3), by_sigma.sigma_bar(t).expand(3))
    assert torch.equal(by_t.model_time(t, 3), t.expand(3))
    torch.testing.assert_close(by_sigma.model_time(t.expand(2), 2), by_sigma.sigma_bar(t).expand(2))
    assert by_sigma.model_time(1.0, 1).double().expm1().item() == pytest.approx(by_sigma.sigma(1.0).item(), rel=2e-6)


# Kernels

RATES = {
    "gaussian_S9": {**GAUSSIAN, "vocab_size": 9},
    "gaussian_S16": {**GAUSSIAN, "vocab_size": 16},
    "uniform_S13": PIANO,
    "birthdeath_S13": {
        "kernel": "birth_death",
        "vocab_size": 13,
        "noise_schedule": "exponential",
        "time_base": 0.5,
        "time_exponential": 100.0,
        "prediction_type": "x0",
    },
}


@pytest.mark.parametrize("name", RATES)
def test_rates_and_transitions_of_tauldr(name):
    g = golden(f"ctmc_rate_{name}").t
    scheduler = CTMCScheduler(**RATES[name])
    ours = torch.stack([scheduler.transition_matrix(float(t)) for t in g["t"]])
    torch.testing.assert_close(ours, g["transition_exact64"], rtol=0, atol=1e-7)
    torch.testing.assert_close(ours.float(), g["transition"], rtol=0, atol=2e-6)
    rates = torch.stack([scheduler.rate_matrix(float(t)) for t in g["t"]]).float()
    if "base_rate" in g:
        torch.testing.assert_close(rates, g["base_rate"] * g["rate_scalar"][:, None, None], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scheduler.prior_probabilities(), g["initial_probs"], rtol=1e-6, atol=0)
    else:
        torch.testing.assert_close(rates, g["rate"].expand_as(rates), rtol=1e-5, atol=1e-6)
    if "integral_rate_scalar" in g:
        torch.testing.assert_close(scheduler.sigma_bar(g["t"]), g["integral_rate_scalar"], rtol=1e-5, atol=1e-6)


KERNELS = {
    "absorbing": {"vocab_size": 5},
    "uniform": {"vocab_size": 5},
    "gaussian": {"vocab_size": 8, "prediction_type": "x0", "rate_sigma": 3.0, "Q_sigma": 4.0},
    "birth_death": {"vocab_size": 5, "prediction_type": "x0"},
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_transitions_are_stochastic_and_compose(kernel):
    """Rows sum to 1, P_{s u} P_{u t} = P_{s t} (Chapman-Kolmogorov), and the slope at 0 is the rate."""
    scheduler = CTMCScheduler(kernel=kernel, **KERNELS[kernel])
    whole = scheduler.transition_matrix(0.9, 0.2)
    assert whole.min() >= 0
    torch.testing.assert_close(whole.sum(1), torch.ones(len(whole), dtype=torch.float64))
    parts = scheduler.transition_matrix(0.5, 0.2) @ scheduler.transition_matrix(0.9, 0.5)
    torch.testing.assert_close(parts, whole)
    slope = (scheduler.transition_matrix(0.5 + 1e-6, 0.5) - torch.eye(len(whole))) / 1e-6
    torch.testing.assert_close(slope, scheduler.rate_matrix(0.5), rtol=1e-4, atol=1e-4)
    assert torch.equal(scheduler.rate_matrix(0.5).sum(1).abs() < 1e-9, torch.ones(len(whole), dtype=torch.bool))


@pytest.mark.parametrize("kernel", ["uniform", "gaussian", "birth_death"])
def test_matrix_kernels_are_reversible(kernel):
    """In detailed balance with their stationary law: the left null vector of the rate."""
    scheduler = CTMCScheduler(kernel=kernel, **KERNELS[kernel])
    rate = scheduler.rate_matrix(0.5)
    values, vectors = torch.linalg.eig(rate.T)
    law = vectors[:, values.abs().argmin()].real
    flow = (law / law.sum())[:, None] * rate
    torch.testing.assert_close(flow, flow.T, atol=1e-9, rtol=1e-6)


# The chain forward


def test_add_noise_of_the_absorbing_kernel():
    g, scheduler = golden("jys_add_noise").t, CTMCScheduler(**ABSORBING)
    assert torch.equal(scheduler.add_noise(g["x0"], g["euler.u"], g["t"]), g["euler.xt"])


@pytest.mark.parametrize("decoded", [0, 5, 12, 23, 24])
def test_add_noise_by_count(decoded):
    g, scheduler = golden("jys_add_noise").t, CTMCScheduler(**ABSORBING)
    tokens, times = scheduler.add_noise_by_count(g["x0"], g[f"gillespie.k{decoded}.u"], decoded)
    assert torch.equal(tokens, g[f"gillespie.k{decoded}.xt"])
    torch.testing.assert_close(times, g[f"gillespie.k{decoded}.t"], rtol=1e-6, atol=1e-7)


def test_add_noise_by_count_is_add_noise_at_its_time():
    scheduler, generator = CTMCScheduler(**ABSORBING), torch.Generator().manual_seed(0)
    x0, u = torch.randint(16, (3, 40), generator=generator), torch.rand(3, 40, generator=generator)
    tokens, times = scheduler.add_noise_by_count(x0, u, 11)
    assert torch.equal(scheduler.add_noise(x0, u, (times + 1e-6).clamp(max=1)), tokens)


@pytest.mark.parametrize("graph", SEDD)
def test_chain_of_sedd(graph):
    """Noise, forward and reverse rates, transitions into the current token."""
    g, scheduler = golden(f"sedd_{graph}_graph").t, CTMCScheduler(**SEDD[graph])
    torch.testing.assert_close(scheduler.sigma_bar(g["t"]), g["sigma"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scheduler.sigma(g["t"]), g["dsigma_rate"], rtol=1e-5, atol=1e-5)
    noise = g["u_move"] if graph == "absorb" else (g["u_move"], g["rand_targets"])
    assert torch.equal(scheduler.add_noise(g["x0"], noise, g["t"]), g["xt"])
    scale = g["dsigma_rate"][:, None, None]
    rates = scheduler.reverse_rates(g["score"].log(), g["t"], g["xt"])
    torch.testing.assert_close(rates, g["reverse_rate"] * scale, rtol=2e-5, atol=1e-5)
    for b, t in enumerate(g["t"].tolist()):
        unit = (scheduler.rate_matrix(t) / scheduler.sigma(torch.tensor(t, dtype=torch.float64))).float()
        torch.testing.assert_close(unit[g["xt"][b]], g["rate"][b], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(unit.T[g["xt"][b]], g["transp_rate"][b], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("recorded", [False, True])
def test_add_noise_has_the_law_of_the_transition_matrix(kernel, recorded):
    scheduler, generator = CTMCScheduler(kernel=kernel, **KERNELS[kernel]), torch.Generator().manual_seed(0)
    size, token, n = scheduler.config.vocab_size, 1, 40_000
    noise = generator
    if recorded and kernel == "absorbing":
        noise = torch.rand(2, n, generator=generator)
    elif recorded:
        noise = torch.rand(2, n, size, generator=generator)
    x = scheduler.add_noise(torch.full((2, n), token), noise, torch.tensor([0.2, 0.6]))
    for row, t in zip(x, (0.2, 0.6), strict=True):
        share = torch.bincount(row, minlength=size) / n
        torch.testing.assert_close(share.double(), scheduler.transition_matrix(t)[token], rtol=0, atol=0.012)


@pytest.mark.parametrize("kernel", KERNELS)
def test_noise_of_a_generator_does_not_depend_on_the_times(kernel):
    """A generator started anew gives two times the same uniforms; a list of them one sample its own."""
    scheduler = CTMCScheduler(kernel=kernel, **KERNELS[kernel])
    x0 = torch.randint(3, (3, 50), generator=torch.Generator().manual_seed(1))

    def noisy(times):
        return scheduler.add_noise(x0, torch.Generator().manual_seed(0), times)

    alike, mixed = noisy(0.5), noisy(torch.tensor([0.5, 0.2, 0.9]))
    assert torch.equal(alike[0], mixed[0]) and not torch.equal(alike[1:], mixed[1:])
    if kernel == "absorbing":
        assert ((alike == 4) >= (noisy(0.4) == 4)).all()
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    last = scheduler.add_noise(x0, generators, 0.5)[2:]
    assert torch.equal(scheduler.add_noise(x0[2:], [torch.Generator().manual_seed(5)], 0.5), last)
    with pytest.raises(ValueError, match="a list of 1, the batch has 3"):
        scheduler.add_noise(x0, [torch.Generator()], 0.5)


def test_prior_samples():
    generator = torch.Generator().manual_seed(0)
    assert (CTMCScheduler(**ABSORBING).sample_prior((2, 5)) == 16).all()
    for kernel in ("uniform", "gaussian"):
        scheduler = CTMCScheduler(kernel=kernel, **KERNELS[kernel])
        x = scheduler.sample_prior((4, 10_000), generator)
        share = torch.bincount(x.flatten(), minlength=scheduler.config.vocab_size) / x.numel()
        torch.testing.assert_close(share.double(), scheduler.prior_probabilities(), rtol=0, atol=0.01)
        seeds = [torch.Generator().manual_seed(i) for i in (5, 6)]
        both = scheduler.sample_prior((2, 9), seeds)
        assert torch.equal(both[1:], scheduler.sample_prior((1, 9), torch.Generator().manual_seed(6)))


# Steps of the authors' samplers, with their noise


def test_reverse_rates_of_the_absorbing_kernel():
    g, scheduler = golden("jys_reverse_euler_tweedie").t, CTMCScheduler(**ABSORBING)
    rates = scheduler.reverse_rates(g["log_score"], g["t"], g["xt"])
    torch.testing.assert_close(rates, g["euler.rev_rate"], rtol=1e-4, atol=1e-6)
    assert (rates[g["xt"] != 16] == 0).all() and (rates[g["xt"] == 16] != 0).all()


@pytest.mark.parametrize("variant", ["euler", "euler_persample", "euler_big", "tweedie", "tweedie_persample"])
def test_steps_of_jump_your_steps(variant):
    g = golden("jys_reverse_euler_tweedie").t
    scheduler = CTMCScheduler(**ABSORBING, sampler=variant.split("_")[0])
    step = g[f"{variant}.step_size"].reshape(-1)
    step = step[:2] if len(step) > 2 else step
    output = scheduler.step(g["log_score"], g["t"], g["xt"], next_timestep=g["t"] - step, noise=g[f"{variant}.u"])
    assert torch.equal(output.prev_sample, g[f"{variant}.xt_next"])
    torch.testing.assert_close(output.prev_timestep, (g["t"] - step).float())


@pytest.mark.parametrize("variant", ["euler_last", "tweedie_last"])
def test_final_denoising_of_jump_your_steps(variant):
    g = golden("jys_reverse_euler_tweedie").t
    scheduler = CTMCScheduler(**ABSORBING, sampler=variant.split("_")[0])
    tokens = scheduler.denoise(g["log_score"], g["t"], g["xt"], noise=g[f"{variant}.u"])
    assert torch.equal(tokens, g[f"{variant}.xt_next"])


def test_predictor_of_the_predictor_corrector():
    """Their corrector has the transposed rate and is not reproduced; see the closed form below."""
    g, scheduler = golden("jys_reverse_pc").t, CTMCScheduler(**ABSORBING)
    torch.testing.assert_close(
        scheduler.reverse_rates(g["log_score"], g["t"], g["xt"]), g["predictor.rev_rate"], rtol=1e-4, atol=1e-6
    )
    ends = g["t"] - g["step_size"]
    output = scheduler.step(g["log_score"], g["t"], g["xt"], next_timestep=ends, noise=g["predictor.u"])
    assert torch.equal(output.prev_sample, g["predictor.xt_next"])
    assert torch.equal(scheduler.denoise(g["log_score"], g["t"], g["xt"], noise=g["last.u"]), g["last.xt_next"])


@pytest.mark.parametrize("name", ["dk1", "dk3", "dkmin"])
def test_gillespie_step(name):
    g, scheduler = golden("jys_reverse_gillespie").t, CTMCScheduler(**ABSORBING, sampler="gillespie")
    count = int(g[f"{name}.dk"])
    noise = (g[f"{name}.u_exp"], g[f"{name}.u_cat"])
    output = scheduler.step(g["log_score"], g["t"], g["xt"], num_decode=count, noise=noise)
    assert torch.equal(output.prev_sample, g[f"{name}.xt_next"])
    torch.testing.assert_close(output.prev_timestep, (g["t"] - g[f"{name}.tau"]).clamp(min=1e-5), rtol=1e-4, atol=1e-5)
    before, after = ((x == 16).sum(1) for x in (g["xt"], output.prev_sample))
    assert torch.equal(before - after, torch.full((2,), count))


def test_gillespie_overrun_decodes_what_is_left_and_keeps_the_rest():
    """The authors' code writes token 0 over decoded positions here."""
    g, scheduler = golden("jys_reverse_gillespie").t, CTMCScheduler(**ABSORBING, sampler="gillespie")
    output = scheduler.step(g["log_score"], g["t"], g["xt"], num_decode=24, generator=torch.Generator().manual_seed(0))
    decoded = g["xt"] != 16
    assert torch.equal(output.prev_sample[decoded], g["xt"][decoded])
    assert (output.prev_sample < 16).all()
    assert ((output.prev_timestep > 0) & (output.prev_timestep <= 1)).all()


@pytest.mark.parametrize("graph", SEDD)
@pytest.mark.parametrize("predictor", ["euler", "analytic"])
@torch.no_grad()
def test_predictors_of_sedd(graph, predictor):
    g = golden(f"sedd_{graph}_predictors").t
    scheduler = CTMCScheduler(**SEDD[graph], sampler="euler" if predictor == "euler" else "tweedie")
    t, log_score = g["t"][:, 0], g["score"].log()
    output = scheduler.step(log_score, t, g["x"], next_timestep=t - g["step_size"], noise=g[f"{predictor}.u"])
    assert torch.equal(output.prev_sample, g[f"{predictor}.x_next"])
    if predictor == "euler":
        here = torch.nn.functional.one_hot(g["x"], log_score.shape[-1])
        weights = here + g["step_size"] * scheduler.reverse_rates(log_score, t, g["x"])
        torch.testing.assert_close(weights, g["euler.probs"], rtol=1e-4, atol=1e-5)
    model = load_sedd(GOLDENS / f"sedd_{graph}_hub")
    for name in ("denoise_t", "denoise_eps"):
        t = g[f"{name}.t"][:, 0]
        log_score = model(g["x"], scheduler.sigma_bar(t)).sample
        assert torch.equal(scheduler.denoise(log_score, t, g["x"], noise=g[f"{name}.u"]), g[f"{name}.x_next"])


@pytest.mark.parametrize(("graph", "sampler"), [("absorb", "euler"), ("uniform", "analytic")])
@torch.no_grad()
def test_whole_sampling_of_sedd(graph, sampler):
    g, folder = golden(f"sedd_{graph}_sampler_{sampler}").t, GOLDENS / f"sedd_{graph}_hub"
    model = load_sedd(folder)
    scheduler = sedd_scheduler(folder, sampler="euler" if sampler == "euler" else "tweedie")
    scheduler.set_timesteps(6)
    torch.testing.assert_close(scheduler.timesteps, g["timesteps"])
    x, noise = g["x_init"], [*g["u_steps"], g["u_denoise"]]
    if graph == "absorb":
        assert torch.equal(scheduler.sample_prior(tuple(x.shape)), x)
    for t, state, u in zip(scheduler.timesteps, g["states"], noise, strict=True):
        assert torch.equal(x, state)
        x = scheduler.step(model(x, scheduler.model_time(t, len(x))).sample, t, x, noise=u).prev_sample
    assert torch.equal(x, g["x_final"])


@pytest.mark.parametrize("name", TAULDR)
def test_steps_of_tauldr(name):
    g = golden(f"ctmc_scheduler_{name}").t
    scheduler = CTMCScheduler(**{**TAULDR[name], "prediction_type": "probabilities"}, eps_ratio=1e-6)
    t, x = g["t"], g["xt"]
    assert torch.equal(scheduler.add_noise(g["x0"], g["addnoise.u"], t), x)
    rates = off_diagonal(scheduler.reverse_rates(g["probs_x0"], t, x), x)
    torch.testing.assert_close(rates, g["rev_rate_exact_q"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rates, g["rev_rate"], rtol=2e-3, atol=1e-5)
    for step in ("step", "bigstep"):
        ends = t - g[f"{step}.h"].reshape(-1)
        output = scheduler.step(g["probs_x0"], t, x, next_timestep=ends, noise=g[f"{step}.jumps"])
        assert torch.equal(output.prev_sample, g[f"{step}.xt_next"].long())
    assert torch.equal(scheduler.denoise(g["probs_x0"], t, x), g["last.xt"])


@pytest.mark.parametrize(
    ("case", "weights"),
    [("gaussian_schedule", "ctmc_unet_model"), ("uniform_schedule", "ctmc_seq_model")],
)
@torch.no_grad()
def test_whole_sampling_of_tauldr_checkpoints(case, weights, tmp_path):
    """As Jump Your Steps samples them; its last evaluation takes place at the time of the step before."""
    g, name = golden(f"ctmc_sampling_{case}").t, case.split("_")[0]
    model = tauldr_model(tmp_path, f"ctmc_scheduler_{name}", weights)
    scheduler = CTMCScheduler(**TAULDR[name], eps_ratio=1e-6)
    scheduler.set_timesteps(timesteps=g["timesteps"])
    x = g["x_init"]
    for i, (t, then) in enumerate(itertools.pairwise(scheduler.edges.tolist())):
        output = model(x, scheduler.model_time(t, len(x))).sample
        mean = off_diagonal(scheduler.reverse_rates(output, t, x), x) * (t - then)
        torch.testing.assert_close(mean, g["poisson_mean"][i], rtol=2e-3, atol=1e-5)
        x = scheduler.step(output, t, x, noise=g["jumps"][i]).prev_sample
        if i < len(g["jumps"]) - 1:
            assert torch.equal(x, g["states"][:, i].long())
    assert torch.equal(scheduler.denoise(model(x, scheduler.model_time(t, len(x))).sample, t, x), g["x_final"])


@torch.no_grad()
def test_predictor_corrector_of_tauldr(tmp_path):
    case = golden("tauldr_pctauleaping")
    g, settings = case.t, case.config["sampler"]
    model = tauldr_model(tmp_path, "ctmc_scheduler_gaussian", "ctmc_unet_model")
    scheduler = CTMCScheduler(**TAULDR["gaussian"])
    steps, low, jumps = settings["num_steps"], settings["min_t"], iter(g["jumps"])
    times, x, draws = torch.linspace(1, low + 1 / steps, steps).tolist(), g["x_init"], 0
    h = times[0] - times[1]
    for t in times[:-1]:
        output = model(x, torch.full((1,), t)).sample
        mean = off_diagonal(scheduler.reverse_rates(output, t, x), x) * h
        torch.testing.assert_close(mean, g["poisson_mean"][draws], rtol=5e-3, atol=1e-5)
        x, draws = scheduler.step(output, t, x, next_timestep=t - h, noise=next(jumps)).prev_sample, draws + 1
        for _ in range(settings["num_corrector_steps"] * (t <= settings["corrector_entry_time"])):
            output, size = model(x, torch.full((1,), t - h)).sample, h * settings["corrector_step_size_multiplier"]
            rates = scheduler.reverse_rates(output, t - h, x) + scheduler.rate_matrix(t - h).float()[x]
            torch.testing.assert_close(off_diagonal(rates, x) * size, g["poisson_mean"][draws], rtol=5e-3, atol=2e-5)
            x, draws = scheduler.step_correct(output, t - h, x, size, noise=next(jumps)).prev_sample, draws + 1
    assert draws == len(g["jumps"])
    assert torch.equal(scheduler.denoise(model(x, torch.full((1,), low)).sample, low, x), g["x_final"])


@torch.no_grad()
def test_conditional_sampling_of_tauldr(tmp_path):
    """The given prefix stays as it is, and the network sees it."""
    case = golden("tauldr_conditionaltauleaping")
    g, given = case.t, case.config["sampler"]["condition_dim"]
    model = tauldr_model(tmp_path, "ctmc_scheduler_uniform", "ctmc_seq_model")
    scheduler = CTMCScheduler(**TAULDR["uniform"])
    times = [*torch.linspace(1, 0.01, 6).tolist(), 0.0]
    x = torch.cat([g["conditioner"], g["x_init"]], dim=1)
    for (t, then), jumps, expected in zip(itertools.pairwise(times), g["jumps"], g["poisson_mean"], strict=True):
        output = model(x, torch.full((2,), t)).sample
        mean = off_diagonal(scheduler.reverse_rates(output, t, x), x) * (t - then)
        torch.testing.assert_close(mean[:, given:], expected, rtol=5e-3, atol=1e-4)
        moved = scheduler.step(output[:, given:], t, x[:, given:], next_timestep=then, noise=jumps).prev_sample
        x = torch.cat([g["conditioner"], moved], dim=1)
    final = scheduler.denoise(model(x, torch.full((2,), 0.01)).sample, 0.01, x)
    assert torch.equal(final[:, given:], g["x_final"][:, given:])


# Closed forms: two positions, whose law is known at every time

PAIRS = torch.tensor([[0.30, 0.02, 0.08], [0.05, 0.25, 0.10], [0.05, 0.05, 0.10]], dtype=torch.float64)


class Exact:
    """Two positions with the data law PAIRS: the law at time t and the exact output of a network."""

    def __init__(self, scheduler: CTMCScheduler):
        self.scheduler, self.size = scheduler, scheduler.config.vocab_size
        self.states = torch.tensor(list(itertools.product(range(self.size), repeat=2)))
        self.data = torch.zeros(self.size, self.size, dtype=torch.float64)
        self.data[:3, :3] = PAIRS

    def law(self, t: float) -> torch.Tensor:
        """(size, size) float64."""
        P = self.scheduler.transition_matrix(t)
        return P.T @ self.data @ P

    def log_score(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """log p_t(y, x_2) / p_t(x_1, x_2) and the same for the second position, (n, 2, size)."""
        law = self.law(t)
        first, second = law[:, x[:, 1]].T, law[x[:, 0]]
        here = law[x[:, 0], x[:, 1]][:, None, None]
        return (torch.stack([first, second], dim=1) / here).clamp(min=1e-30).log().float()

    def x0_law(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """p(x_0 of each position | both current tokens), (n, 2, size)."""
        P = self.scheduler.transition_matrix(t)
        joint = self.data * P[:, x[:, 0]].T[:, :, None] * P[:, x[:, 1]].T[:, None, :]
        joint = joint / joint.sum(dim=(1, 2), keepdim=True)
        return torch.stack([joint.sum(2), joint.sum(1)], dim=1).float()

    def output(self, x: torch.Tensor, t: float) -> torch.Tensor:
        if self.scheduler.config.prediction_type == "log_score":
            return self.log_score(x, t)
        law = self.x0_law(x, t)
        return law.clamp(min=1e-30).log() if self.scheduler.config.prediction_type == "x0" else law

    def empirical(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.bincount(x[:, 0] * self.size + x[:, 1], minlength=self.size**2) / len(x)).view(self.size, -1)

    def distance(self, law: torch.Tensor, t: float | None = None) -> float:
        """Total variation from the law at t, or from the data."""
        return float((law - (self.data if t is None else self.law(t))).abs().sum() / 2)

    def sample(self, steps: int, n: int = 6_000, correct: bool = False) -> torch.Tensor:
        """Walk the schedule with the exact network; tokens (n, 2)."""
        scheduler, generator = self.scheduler, torch.Generator().manual_seed(0)
        scheduler.set_timesteps(steps)
        x, edges = scheduler.sample_prior((n, 2), generator), scheduler.edges.tolist()
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(self.output(x, float(t)), t, x, generator).prev_sample
            if correct and i + 1 < len(edges) - 1:
                for _ in range(4):
                    size = 0.5 * (edges[i] - edges[i + 1])
                    output = self.output(x, edges[i + 1])
                    x = scheduler.step_correct(output, edges[i + 1], x, size, generator).prev_sample
        return x


def exact(**config) -> Exact:
    kernel = config.pop("kernel", "absorbing")
    noise = {"noise_schedule": "geometric", "sigma_min": 1e-3, "sigma_max": 8.0} if kernel == "uniform" else {}
    if kernel in ("gaussian", "birth_death"):
        noise = {"noise_schedule": "exponential", "time_base": 0.2, "rate_sigma": 2.0, "Q_sigma": 30.0}
    return Exact(CTMCScheduler(kernel=kernel, vocab_size=4 if kernel == "absorbing" else 3, **noise, **config))


@pytest.mark.parametrize("kernel", ["absorbing", "uniform"])
def test_law_of_euler_tends_to_the_data_at_first_order(kernel):
    """The law itself, without sampling: p(next) = p (1 + dt R), position by position."""
    chain = exact(kernel=kernel, min_timestep=1e-4)
    errors = []
    for steps in (32, 64, 128):
        chain.scheduler.set_timesteps(steps)
        law = (chain.scheduler.prior_probabilities()[:, None] * chain.scheduler.prior_probabilities()).flatten()
        edges = chain.scheduler.edges.tolist()
        for t, then in itertools.pairwise(edges):
            rates = chain.scheduler.reverse_rates(chain.output(chain.states, t), t, chain.states).double()
            stay = torch.nn.functional.one_hot(chain.states, chain.size)
            move = (stay + (t - then) * rates).clamp(min=0)
            move = move / move.sum(-1, keepdim=True)
            law = law @ (move[:, 0, :, None] * move[:, 1, None, :]).flatten(1)
        errors.append(chain.distance(law.view(chain.size, -1), edges[-1]))
    assert errors[-1] < 0.02
    for coarse, fine in itertools.pairwise(errors):
        assert 1.6 < coarse / fine < 2.5, errors


COMBINATIONS = [
    {"kernel": kernel, "sampler": sampler, "prediction_type": prediction}
    for kernel in ("absorbing", "uniform", "gaussian", "birth_death")
    for sampler in ("euler", "tweedie", "gillespie")
    for prediction in ("log_score", "x0", "probabilities")
    if not (sampler == "gillespie" and kernel != "absorbing")
    if not (prediction == "log_score" and kernel in ("gaussian", "birth_death"))
]


@pytest.mark.parametrize("config", COMBINATIONS, ids=lambda c: "-".join(c.values()))
def test_every_combination_samples_the_data(config):
    chain = exact(**config, min_timestep=1e-3)
    # gillespie: one token a step is exact. euler of ordered tokens: many small Poisson leaps
    x = chain.sample(2 if config["sampler"] == "gillespie" else 40)
    assert chain.distance(chain.empirical(x)) < 0.06


TWEEDIE = [config for config in COMBINATIONS if config["sampler"] == "tweedie"]


@pytest.mark.parametrize("config", TWEEDIE, ids=lambda c: "-".join(c.values()))
def test_tweedie_is_exact_for_one_position(config):
    """However long the step: tokens of the law at t become tokens of the law at the smaller time."""
    scheduler = exact(**config).scheduler
    size, n, t, then = scheduler.config.vocab_size, 30_000, 0.8, 0.3
    data = torch.zeros(size, dtype=torch.float64)
    data[:3] = torch.tensor([0.7, 0.1, 0.2])
    P, generator = scheduler.transition_matrix(t), torch.Generator().manual_seed(0)
    law, posterior = data @ P, data[:, None] * P / (data @ P)
    output = posterior.T.clamp(min=1e-30)  # [x_t, x_0]
    if config["prediction_type"] == "log_score":
        output = (law[None, :] / law[:, None]).clamp(min=1e-30)
    if config["prediction_type"] != "probabilities":
        output = output.log()
    x = torch.multinomial(law, n, replacement=True, generator=generator)[None]
    after = scheduler.step(output.float()[x], t, x, generator, next_timestep=then).prev_sample
    share = torch.bincount(after[0], minlength=size) / n
    torch.testing.assert_close(share.double(), data @ scheduler.transition_matrix(then), rtol=0, atol=0.012)


def test_euler_and_tweedie_agree_for_absorbing_loglinear():
    g = golden("jys_reverse_euler_tweedie").t
    samplers = [CTMCScheduler(**ABSORBING, sampler=name) for name in ("euler", "tweedie")]
    u = torch.rand(g["log_score"].shape, generator=torch.Generator().manual_seed(3))
    first, second = (
        s.step(g["log_score"], g["t"], g["xt"], next_timestep=g["t"] / 2, noise=u).prev_sample for s in samplers
    )
    assert torch.equal(first, second) and not torch.equal(first, g["xt"])
    chains = [exact(sampler=name, noise_schedule="cosine") for name in ("euler", "tweedie")]
    laws = [chain.empirical(chain.sample(3)) for chain in chains]
    assert (laws[0] - laws[1]).abs().max() > 0.01  # with another schedule they differ


@pytest.mark.parametrize("kernel", ["absorbing", "uniform"])
def test_predictions_of_x0_and_of_the_score_give_the_same_rates(kernel):
    score, x0 = (exact(kernel=kernel, prediction_type=name) for name in ("log_score", "x0"))
    states = score.states
    rates = [chain.scheduler.reverse_rates(chain.output(states, 0.4), 0.4, states) for chain in (score, x0)]
    reachable = score.law(0.4).flatten() > 1e-9
    torch.testing.assert_close(rates[0][reachable], rates[1][reachable], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"kernel": "absorbing"}, {"kernel": "uniform"}, {"kernel": "birth_death"}])
def test_correctors_move_the_law_to_the_target_and_keep_it_there(config):
    prediction = "x0" if config["kernel"] == "birth_death" else "log_score"
    chain, t = exact(**config, prediction_type=prediction), 0.15 if config["kernel"] == "birth_death" else 0.4
    generator = torch.Generator().manual_seed(0)
    right = torch.multinomial(chain.law(t).flatten(), 8_000, replacement=True, generator=generator)
    # the same marginals, but independent positions
    product = chain.law(t).sum(1)[:, None] * chain.law(t).sum(0)
    wrong = torch.multinomial(product.flatten(), 8_000, replacement=True, generator=generator)
    distances = []
    for start in (right, wrong):
        x = chain.states[start]
        before = chain.distance(chain.empirical(x), t)
        for _ in range(60):
            x = chain.scheduler.step_correct(chain.output(x, t), t, x, 0.03, generator).prev_sample
        distances.append((before, chain.distance(chain.empirical(x), t)))
    assert distances[0][1] < 0.05, "the target is stationary"
    assert distances[1][0] > 0.1 and distances[1][1] < 0.05, "and is reached from another law"


def test_correctors_improve_a_coarse_sampler():
    chain = exact(kernel="uniform")
    plain, corrected = (chain.distance(chain.empirical(chain.sample(5, correct=on))) for on in (False, True))
    assert corrected < 0.6 * plain


# Schedules


def test_uniform_timesteps_and_their_edges():
    scheduler = CTMCScheduler(min_timestep=1e-4)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.edges, torch.linspace(1, 1e-4, 5, dtype=torch.float64))
    torch.testing.assert_close(scheduler.timesteps.double(), scheduler.edges, rtol=1e-6, atol=0)
    assert scheduler.num_inference_steps == 4
    gillespie = CTMCScheduler(sampler="gillespie")
    gillespie.set_timesteps(4)
    assert len(gillespie.timesteps) == 4 and len(gillespie.edges) == 5


def test_tables_are_used_but_where_even_steps_are_asked_for(tmp_path):
    tables = {"2": [1.0, 0.3, 1e-5], "4": [1.0, 0.7, 0.4, 0.2, 1e-5]}
    info = {"2": {"method": "by hand"}}
    scheduler = CTMCScheduler(timestep_tables=tables, timestep_table_info=info)
    scheduler.save_pretrained(tmp_path)
    again = CTMCScheduler.from_pretrained(tmp_path)
    assert public(again.config) == public(scheduler.config)
    assert again.config.timestep_table_info == info
    for one in (scheduler, again):
        one.set_timesteps(4)
        assert one.edges.tolist() == tables["4"]
        one.set_timesteps(timesteps=[0.9, 0.5, 0.1])
        assert one.edges.tolist() == [0.9, 0.5, 0.1]
    plain = CTMCScheduler.from_config(scheduler.config, timestep_spacing="uniform")
    plain.set_timesteps(4)
    assert plain.edges.tolist() == torch.linspace(1, 1e-5, 5, dtype=torch.float64).tolist()


def test_the_config_of_another_scheduler_is_refused():
    saved = json.loads(DDIMScheduler().to_json_string())
    for config, name in ((DDIMScheduler().config, "another scheduler"), (saved, "DDIMScheduler")):
        with pytest.raises(ValueError, match=f"config of {name}, with beta_end and without kernel and vocab_size"):
            CTMCScheduler.from_config(config)
    with pytest.raises(ValueError, match="without kernel, whose"):
        CTMCScheduler.from_config(DDIMScheduler().config, vocab_size=5)
    assert CTMCScheduler.from_config(CTMCScheduler(vocab_size=5).config, sampler="tweedie").config.vocab_size == 5


def test_config_is_json():
    scheduler = CTMCScheduler(timestep_tables={"1": [1.0, 1e-5]})
    assert json.loads(scheduler.to_json_string())["timestep_tables"] == {"1": [1.0, 1e-5]}
    assert CTMCScheduler.from_config(scheduler.config).config.timestep_tables == {"1": [1.0, 1e-5]}


@pytest.mark.parametrize("length", [48, 50, 1024])
@pytest.mark.parametrize("steps", [1, 7, 8, 16])
def test_gillespie_schedule_decodes_every_mask_once(length, steps):
    """As linspace(0, length, steps + 1), cut to integers, counts decoded tokens."""
    scheduler = CTMCScheduler(**ABSORBING, sampler="gillespie")
    scheduler.set_timesteps(steps)
    x, expected = torch.full((2, length), 16), torch.linspace(0, length, steps + 1).long()
    x[1, : length // 2] = 3  # given tokens: the same share of the rest is decoded
    for i in range(steps):
        counts = scheduler.num_decode(x, i)
        assert counts[0] == int(expected[i + 1] - expected[i])
        for row, count in zip(x, counts, strict=True):
            row[(row == 16).nonzero()[:count, 0]] = 0
    assert not (x == 16).any()


@pytest.mark.parametrize("counts", [[0, 2, 4, 7, 11, 21, 32, 42, 48], [0, 1, 48]])
def test_gillespie_count_tables_are_times(counts):
    scheduler = CTMCScheduler(**ABSORBING, sampler="gillespie")
    scheduler.set_timesteps(timesteps=[1 - k / 48 for k in counts[:-1]] + [1e-5])
    x = torch.full((1, 48), 16)
    for i, (k, after) in enumerate(itertools.pairwise(counts)):
        assert scheduler.num_decode(x, i) == [after - k]
        x[0, k:after] = 0


@pytest.mark.parametrize("by_holding_times", [False, True])
def test_gillespie_walk_stays_in_time_and_never_overwrites(by_holding_times):
    scheduler, generator = CTMCScheduler(**ABSORBING, sampler="gillespie"), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(5)
    x, t = scheduler.sample_prior((3, 23)), torch.ones(3)
    for i, edge in enumerate(scheduler.timesteps):
        output = torch.randn(3, 23, 17, generator=generator)
        if by_holding_times:
            after = scheduler.step(output, t, x, generator, num_decode=scheduler.num_decode(x, i))
        else:
            after = scheduler.step(output, edge, x, generator)
        kept = x != 16
        assert torch.equal(after.prev_sample[kept], x[kept])
        x, t = after.prev_sample, after.prev_timestep
        assert ((t > 0) & (t <= 1)).all()
    assert (x < 16).all()


# Randomness, precision, memory


@pytest.mark.parametrize("sampler", ["euler", "tweedie", "gillespie"])
def test_a_list_of_generators_makes_samples_independent_of_their_batch(sampler):
    scheduler = CTMCScheduler(**ABSORBING, sampler=sampler)
    scheduler.set_timesteps(4)
    output, x = torch.randn(3, 9, 17, generator=torch.Generator().manual_seed(0)), scheduler.sample_prior((3, 9))

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    t = scheduler.timesteps[1]
    together = scheduler.step(output, t, x, seeded(4, 5, 6)).prev_sample
    for b, seed in enumerate((4, 5, 6)):
        assert torch.equal(
            scheduler.step(output[b : b + 1], t, x[b : b + 1], seeded(seed)).prev_sample[0], together[b]
        )


def test_outputs_say_where_they_are():
    scheduler, x = CTMCScheduler(**ABSORBING), torch.full((2, 9), 16)
    scheduler.set_timesteps(2)
    output = torch.zeros(2, 9, 17)
    for t, then in ((scheduler.timesteps[0], scheduler.timesteps[1]), (scheduler.timesteps[2], 0.0)):
        result = scheduler.step(output, t, x, torch.Generator().manual_seed(0))
        torch.testing.assert_close(result.prev_timestep, torch.as_tensor(then).expand(2))
        tokens, time = scheduler.step(output, t, x, torch.Generator().manual_seed(0), return_dict=False)
        assert torch.equal(tokens, result.prev_sample) and torch.equal(time, result.prev_timestep)
    corrected = scheduler.step_correct(output, 0.5, x, 0.1)
    assert corrected.prev_timestep.tolist() == [0.5, 0.5] and corrected.prev_sample.shape == (2, 9)


def test_one_generator_repeats():
    scheduler, x = CTMCScheduler(**ABSORBING), torch.full((2, 9), 16)
    scheduler.set_timesteps(2)
    output = torch.randn(2, 9, 17, generator=torch.Generator().manual_seed(0))
    draws = [scheduler.step(output, 1.0, x, torch.Generator().manual_seed(s)).prev_sample for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("config", [{}, {"kernel": "uniform"}, {"sampler": "gillespie"}, {"sampler": "tweedie"}])
def test_chunks_do_not_change_a_replayed_step(config, monkeypatch):
    scheduler = CTMCScheduler(**{**ABSORBING, **config})
    generator = torch.Generator().manual_seed(0)
    output, u = torch.randn(2, 9, 17, generator=generator), torch.rand(2, 9, 17, generator=generator)
    x = torch.full((2, 9), 16)
    options = {"next_timestep": 0.3, "noise": u}
    if config.get("sampler") == "gillespie":
        options = {"num_decode": 5, "noise": (u[..., 0], u[:, :5, :16])}
    whole = scheduler.step(output, 0.8, x, **options).prev_sample
    for module in ("scheduling_ctmc", "ctmc_samplers"):
        monkeypatch.setattr(f"diffusers_ext.schedulers.{module}.CHUNK", 40)
    assert torch.equal(scheduler.step(output, 0.8, x, **options).prev_sample, whole)
    rates = scheduler.reverse_rates(output, 0.8, x)
    monkeypatch.undo()
    torch.testing.assert_close(scheduler.reverse_rates(output, 0.8, x), rates)


def test_inputs_are_not_changed():
    generator = torch.Generator().manual_seed(0)
    for config in COMBINATIONS:
        scheduler = CTMCScheduler(**config, vocab_size=5)
        scheduler.set_timesteps(2)
        output = torch.rand(2, 4, 5, generator=generator).softmax(-1)
        x = scheduler.sample_prior((2, 4), generator)
        copies = output.clone(), x.clone()
        scheduler.step(output, scheduler.timesteps[0], x, generator)
        scheduler.reverse_rates(output, 0.5, x)
        scheduler.denoise(output, 0.5, x, generator)
        if config["sampler"] != "gillespie":
            scheduler.step_correct(output, 0.5, x, 0.1, generator)
        assert torch.equal(output, copies[0]) and torch.equal(x, copies[1])


def test_half_precision_outputs_are_read_in_float32():
    g = golden("jys_reverse_euler_tweedie").t
    scheduler = CTMCScheduler(**ABSORBING)
    half = g["log_score"].bfloat16()
    rates = scheduler.reverse_rates(half, g["t"], g["xt"])
    assert rates.dtype == torch.float32
    torch.testing.assert_close(rates, scheduler.reverse_rates(half.float(), g["t"], g["xt"]))


@pytest.mark.parametrize("sampler", ["euler", "tweedie", "gillespie"])
def test_a_step_needs_less_than_one_more_vocabulary_sized_tensor(sampler):
    """With the network's output that makes two at most, whatever the batch."""
    scheduler = CTMCScheduler(vocab_size=20_000, sampler=sampler)
    scheduler.set_timesteps(4)
    x, output = scheduler.sample_prior((6, 256)), torch.zeros(6, 256, 20_000)
    peak = peak_bytes(lambda: scheduler.step(output, scheduler.timesteps[1], x, torch.Generator().manual_seed(0)))
    assert 0 < peak < output.numel() * 4


# What is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kernel": "mask"}, "kernel must be one of"),
        ({"noise_schedule": "linear"}, "noise_schedule must be one of"),
        ({"sampler": "ancestral"}, "sampler must be one of"),
        ({"prediction_type": "epsilon"}, "prediction_type must be one of"),
        ({"vocab_size": 1}, "vocab_size must be an integer >= 2, got 1"),
        ({"vocab_size": 10.0}, "vocab_size must be an integer"),
        ({"num_corrector_steps": -1}, "num_corrector_steps must be an integer >= 0"),
        ({"eps": 0.0}, r"eps must be a finite number in \(0, 1\), got 0.0"),
        ({"min_timestep": 1.0}, "min_timestep must be"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_max must be > sigma_min"),
        ({"time_exponential": 1.0}, "time_exponential must be > 1"),
        ({"sampler": "gillespie", "kernel": "uniform"}, "decodes a number of masks"),
        ({"kernel": "gaussian"}, "inverse of an ill-conditioned"),
        ({"kernel": "birth_death"}, "inverse of an ill-conditioned"),
        ({"jumps": "poisson"}, "nothing to add"),
        ({"kernel": "uniform", "sampler": "tweedie", "jumps": "poisson"}, "nothing to add"),
        ({"sampler": "gillespie", "num_corrector_steps": 1}, "masks tokens again"),
        ({"timestep_tables": {"2": [1.0, 0.5]}}, "hold one edge more, got 2"),
        ({"timestep_tables": {"2": [1.0, 0.5, 0.5]}}, "strictly decreasing"),
        ({"timestep_tables": {"two": [1.0, 0.5, 0.1]}}, "named by its number of steps"),
        (
            {"timestep_tables": {"02": [1.0, 0.5, 0.1]}},
            r"timestep_tables\['02'\] must be named by its number of steps",
        ),
        ({"timestep_tables": {"2": [1.0, None, 0.1]}}, r"timestep_tables\['2'\] must be at least two"),
        ({"timestep_tables": {"2": [0.9, 0.5, 0.1]}}, "must begin at 1"),
        ({"timestep_tables": 3}, "timestep_tables must be a dictionary"),
        ({"timestep_table_info": []}, "timestep_table_info must be a dictionary"),
        ({"timestep_table_info": {"02": {}}}, "must be named by numbers of steps, got '02'"),
        ({"timestep_table_info": {"²": {}}}, "must be named by numbers of steps, got '²'"),
        ({"timestep_table_info": {"2": None}}, r"timestep_table_info\['2'\] must be a dictionary"),
        ({"timestep_table_info": {"2": {"chain": 1}}}, r"timestep_table_info\['2'\] must be a dictionary"),
        ({"timestep_table_info": {"2": {"sampler": 1}}}, r"timestep_table_info\['2'\] must be a dictionary"),
        ({"timestep_spacing": "even"}, "timestep_spacing must be one of"),
    ],
)
def test_configurations_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        CTMCScheduler(**config)


def test_schedules_that_are_refused():
    scheduler = CTMCScheduler()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        _ = scheduler.edges
    for given in ({}, {"num_inference_steps": 3, "timesteps": [1.0, 0.1]}):
        with pytest.raises(ValueError, match="one of the two"):
            scheduler.set_timesteps(**given)
    for steps in (0, 2.5, True):
        with pytest.raises(ValueError, match="num_inference_steps must be an integer >= 1"):
            scheduler.set_timesteps(steps)
    for table in ([1.0], [0.5, 0.6], [1.5, 0.5], [1.0, 0.0], [0.5, -0.1], [1.0, math.nan]):
        with pytest.raises(ValueError, match="strictly decreasing numbers in"):
            scheduler.set_timesteps(timesteps=table)


def test_steps_that_are_refused():
    scheduler, x = CTMCScheduler(**ABSORBING), torch.full((2, 4), 16)
    output = torch.zeros(2, 4, 17)
    scheduler.set_timesteps(4)
    for changes, message in [
        ({"model_output": output[..., :16]}, r"\(2, 4, 17\), got \(2, 4, 16\)"),
        ({"sample": x.float()}, "tokens must be int64"),
        ({"sample": x.int()}, r"tokens must be int64 \(batch, length\), got torch.int32 \(2, 4\); use .long"),
        ({"sample": x[:0], "model_output": output[:0]}, "tokens must be int64"),
        ({"timestep": 0.9}, "not one of the schedule's"),
        ({"timestep": 0.5, "next_timestep": 0.6}, "next_timestep must be"),
        ({"timestep": 1.5, "next_timestep": 0.6}, r"in \(0, 1\]"),
        ({"timestep": torch.ones(3), "next_timestep": 0.6}, "one a sample, 2, got 3"),
        ({"num_decode": 2}, "is for sampler='gillespie'"),
        ({"noise": torch.rand(2, 4)}, "noise must have the shape"),
        ({"generator": [torch.Generator()]}, "a list of 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            scheduler.step(**{"model_output": output, "timestep": 1.0, "sample": x, **changes})
    with pytest.raises(ValueError, match="step_size must be"):
        scheduler.step_correct(output, 0.5, x, 0.0)
    gillespie = CTMCScheduler(**ABSORBING, sampler="gillespie")
    gillespie.set_timesteps(4)
    for arguments, message in [
        ({"timestep": 1.0, "next_timestep": 0.5}, "takes num_decode= instead"),
        ({"timestep": 1.0, "num_decode": -1}, "num_decode must be"),
        ({"timestep": 1e-5}, "the last edge"),
    ]:
        with pytest.raises(ValueError, match=message):
            gillespie.step(output, sample=x, **arguments)
    with pytest.raises(ValueError, match="a corrector masks them again"):
        gillespie.step_correct(output, 0.5, x, 0.1)
    with pytest.raises(ValueError, match="num_decoded must be in"):
        scheduler.add_noise_by_count(x, None, 5)
    with pytest.raises(ValueError, match="needs kernel='absorbing'"):
        CTMCScheduler(kernel="uniform").add_noise_by_count(x, None, 2)
    with pytest.raises(ValueError, match=r"must have the shape \[\(2, 4\)\]"):
        scheduler.add_noise(x, torch.rand(2, 4, 17), 0.5)
