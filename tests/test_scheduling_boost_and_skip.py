"""Boost-and-Skip schedulers: off equals stock, on equals loops written out by hand and the authors' recorded ones."""

import ast
import copy
import importlib.util
import inspect
import itertools
import json
import math
import pickle
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from boost_and_skip_loops import (
    EPS,
    PAIRS,
    PREDICTIONS,
    SPACINGS,
    ancestral_loop,
    both,
    coefficients,
    ddim_loop,
    dpm_loop,
    euler_loop,
    gaussians,
)
from diffusers import (
    DDIMScheduler,
    DDPMParallelScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from tiny_pipelines import LATENT_SCHEDULE, tiny_stable_diffusion

import diffusers_ext.schedulers as package
from diffusers_ext.schedulers import scheduling_boost_and_skip as module
from diffusers_ext.schedulers.scheduling_boost_and_skip import (
    BoostAndSkipDDIMScheduler,
    BoostAndSkipDDPMScheduler,
    BoostAndSkipDPMSolverMultistepScheduler,
    BoostAndSkipEulerDiscreteScheduler,
    boost_and_skip,
)

GOLDENS = Path(__file__).parent / "goldens"


def fake_model(x, t):
    """A cheap network: (batch, channels, ...) and a timestep to the same shape, within [-1, 1]."""
    return torch.sin(2 * x + float(t) / 300)


def fake_learned_model(x, t):
    """The same, with a second half that is a valid variance and a valid interpolation between two."""
    return torch.cat([fake_model(x, t), 0.3 + 0.2 * torch.cos(3 * x)], dim=1)


def sample(scheduler, model=fake_model, steps=7, seed=None, eps=EPS, **step_options):
    """What a pipeline does: noise to sample."""
    if seed is not None:
        step_options["generator"] = torch.Generator().manual_seed(seed)
    if steps is not None:
        scheduler.set_timesteps(steps)
    x = eps * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **step_options).prev_sample
    return x


# -------------------------------------------------------------------------------------------------------- off is stock

OFF = [
    *(
        ("ddpm", {"timestep_spacing": spacing, "prediction_type": prediction, "variance_type": variance}, {"seed": 2})
        for spacing, prediction, variance in itertools.product(
            # not fixed_large_log: the square root of its logarithm is NaN in stock diffusers
            SPACINGS,
            PREDICTIONS,
            ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"],
        )
    ),
    *(
        ("ddim", {"timestep_spacing": spacing, "prediction_type": prediction}, {**noise, **clipped})
        for spacing, prediction, noise, clipped in itertools.product(
            SPACINGS, PREDICTIONS, [{}, {"eta": 0.6, "seed": 2}], [{}, {"use_clipped_model_output": True}]
        )
    ),
    *(
        ("euler", {"timestep_spacing": spacing, "prediction_type": prediction, **sigmas}, {})
        for spacing, prediction, sigmas in itertools.product(
            SPACINGS,
            PREDICTIONS,
            [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}],
        )
    ),
    *(
        ("dpm", {"timestep_spacing": spacing, "prediction_type": prediction, "algorithm_type": algorithm}, {"seed": 2})
        for spacing, prediction, algorithm in itertools.product(
            SPACINGS, PREDICTIONS, ["dpmsolver++", "sde-dpmsolver++"]
        )
    ),
    ("ddpm", {"beta_schedule": "squaredcos_cap_v2", "thresholding": True, "clip_sample": False}, {"seed": 2}),
    ("ddpm", {"beta_schedule": "sigmoid", "clip_sample_range": 0.5, "steps_offset": 1}, {"seed": 2}),
    ("ddim", {"thresholding": True, "sample_max_value": 2.0}, {}),
    ("ddim", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, {"steps": 20}),
    ("ddim", {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.5}, {"steps": 50}),
    ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}, {}),
    ("ddim", {"trained_betas": [0.01, 0.02, 0.03, 0.04, 0.05, 0.06], "num_train_timesteps": 6}, {"steps": 3}),
    ("euler", {**LATENT_SCHEDULE, "final_sigmas_type": "sigma_min"}, {}),
    ("euler", {"interpolation_type": "log_linear"}, {}),
    ("euler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, {}),
    ("euler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {"s_churn": 2.0, "seed": 2}),
    ("dpm", {"solver_order": 3}, {"steps": 20}),
    ("dpm", {"solver_order": 1, "euler_at_final": True}, {}),
    ("dpm", {"solver_type": "heun", "use_karras_sigmas": True, "lower_order_final": False}, {}),
    ("dpm", {"use_lu_lambdas": True, "final_sigmas_type": "sigma_min"}, {}),
    ("dpm", {"use_exponential_sigmas": True, "thresholding": True}, {}),
    ("dpm", {"use_beta_sigmas": True, "beta_schedule": "scaled_linear"}, {}),
    ("dpm", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}, {}),
    ("dpm", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
    ("dpm", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, {"seed": 2}),
    ("dpm", {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}, {}),
]


@pytest.mark.parametrize(("name", "config", "options"), OFF)
@pytest.mark.filterwarnings("ignore:.*dpmsolver.*:FutureWarning")
def test_off_equals_stock(name, config, options):
    stock, ours = (cls(**config) for cls in PAIRS[name])
    model = fake_learned_model if "learned" in config.get("variance_type", "") else fake_model
    expected = sample(stock, model, **options)
    assert expected.isfinite().all()
    assert torch.equal(sample(ours, model, **options), expected)
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert ours.num_inference_steps == stock.num_inference_steps
    assert torch.equal(sample(ours, model, **options), expected)  # nothing is left over from the first run


@both
def test_off_equals_stock_in_half_precision_and_tuples(name):
    stock, ours = (cls() for cls in PAIRS[name])
    x = [EPS.half(), EPS.half()]
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5)
    for t in stock.timesteps:
        for i, scheduler in enumerate((stock, ours)):
            noise = {"generator": torch.Generator().manual_seed(2)} if name == "ddpm" else {}
            model_output = fake_model(scheduler.scale_model_input(x[i], t), t)
            step = scheduler.step(model_output, t, x[i], **noise, return_dict=False)
            x[i] = step[0]
        assert x[1].dtype == x[0].dtype
        assert torch.equal(x[0], x[1])


@pytest.mark.parametrize(("name", "custom"), [("ddpm", "timesteps"), ("euler", "timesteps"), ("dpm", "timesteps")])
def test_off_equals_stock_on_custom_timesteps(name, custom):
    stock, ours = (cls() for cls in PAIRS[name])
    for scheduler in (stock, ours):
        scheduler.set_timesteps(**{custom: [999, 700, 650, 200, 3]})
    assert torch.equal(sample(ours, steps=None, **seeded(name)), sample(stock, steps=None, **seeded(name)))


def seeded(name):
    return {"seed": 2} if name == "ddpm" else {}


# ---------------------------------------------------------------------------------------------------------- the tables


@both
@pytest.mark.parametrize("spacing", SPACINGS)
def test_skip_cuts_every_table_at_each_call(name, spacing):
    stock, ours = PAIRS[name][0](timestep_spacing=spacing), PAIRS[name][1](timestep_spacing=spacing, skip_steps=3)
    for steps in (10, 10, 25, 8):
        stock.set_timesteps(steps)
        ours.set_timesteps(steps)
        assert torch.equal(ours.timesteps, stock.timesteps[3:])
        assert len(ours.timesteps) == steps - 3
        assert ours.num_inference_steps == stock.num_inference_steps == steps
        if hasattr(stock, "sigmas"):
            assert torch.equal(ours.sigmas, stock.sigmas[3:])
            assert len(ours.sigmas) == len(ours.timesteps) + 1


@pytest.mark.parametrize(
    ("name", "config", "schedule"),
    [
        ("euler", {"use_karras_sigmas": True}, {"num_inference_steps": 9}),
        ("euler", {"use_exponential_sigmas": True}, {"num_inference_steps": 9}),
        ("euler", {"use_beta_sigmas": True}, {"num_inference_steps": 9}),
        ("euler", {"final_sigmas_type": "sigma_min"}, {"num_inference_steps": 9}),
        ("euler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, {"num_inference_steps": 9}),
        ("dpm", {"use_karras_sigmas": True}, {"num_inference_steps": 9}),
        ("dpm", {"use_lu_lambdas": True}, {"num_inference_steps": 9}),
        ("dpm", {"final_sigmas_type": "sigma_min"}, {"num_inference_steps": 9}),
    ],
)
def test_skip_cuts_sigma_variants(name, config, schedule):
    ours, uncut = PAIRS[name][1](**config, skip_steps=2), PAIRS[name][1](**config)
    ours.set_timesteps(**schedule)
    uncut.set_timesteps(**schedule)
    assert torch.equal(ours.timesteps, uncut.timesteps[2:])
    stock = PAIRS[name][0](**config)
    stock.set_timesteps(**schedule)
    assert ours.num_inference_steps == stock.num_inference_steps
    assert torch.equal(ours.sigmas, uncut.sigmas[2:])


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm"])
def test_gamma_is_the_initial_noise_sigma(name):
    scheduler = PAIRS[name][1](gamma=4, skip_steps=1)
    assert scheduler.init_noise_sigma == 4.0
    scheduler.set_timesteps(10)
    assert scheduler.init_noise_sigma == 4.0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_initial_noise_sigma_of_euler_follows_the_first_kept_sigma(spacing):
    stock = EulerDiscreteScheduler(timestep_spacing=spacing)
    ours = BoostAndSkipEulerDiscreteScheduler(timestep_spacing=spacing, gamma=2.5, skip_steps=3)
    stock.set_timesteps(10)
    ours.set_timesteps(10)
    sigma = stock.sigmas[3].item()
    stock_formula = math.sqrt(1 + sigma**2) if spacing == "leading" else sigma
    assert float(ours.init_noise_sigma) == pytest.approx(2.5 * stock_formula, rel=1e-6)
    ours.set_timesteps(sigmas=[12.0, 8.0, 5.0, 2.0, 1.0, 0.0])  # a list runs as given
    stock_formula = math.sqrt(1 + 12.0**2) if spacing == "leading" else 12.0
    assert float(ours.init_noise_sigma) == pytest.approx(2.5 * stock_formula, rel=1e-6)


@both
def test_add_noise_and_model_input_know_the_levels_of_the_kept_steps(name):
    stock, ours = PAIRS[name][0](**LATENT_SCHEDULE), PAIRS[name][1](**LATENT_SCHEDULE, gamma=3.0, skip_steps=4)
    stock.set_timesteps(10)
    ours.set_timesteps(10)
    clean, noise = torch.ones(2, 3, 4, 4), EPS
    for i in (0, 2):
        t = ours.timesteps[i : i + 1].repeat(2)
        assert torch.equal(ours.add_noise(clean, noise, t), stock.add_noise(clean, noise, t))
    t = ours.timesteps[0]
    stock_input = EPS / math.sqrt(1 + stock.sigmas[4].item() ** 2) if name == "euler" else EPS
    torch.testing.assert_close(ours.scale_model_input(EPS, t), stock_input)


# --------------------------------------------------------------------------------- loops written out, apart from stock


def close(actual, expected, atol=2e-5):
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=2e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("spacing", [*SPACINGS, "custom"])
def test_ddpm_equals_the_loop_written_out(variance, spacing):
    model = fake_learned_model if variance.startswith("learned") else fake_model
    table = {
        "linspace": [999, 888, 777, 666, 555, 444, 333, 222, 111, 0],
        "leading": [900, 800, 700, 600, 500, 400, 300, 200, 100, 0],
        "trailing": [999, 899, 799, 699, 599, 499, 399, 299, 199, 99],
        "custom": [990, 980, 970, 500, 420, 77, 3, 0],
    }[spacing]
    config = {"variance_type": variance, "gamma": 2.5, "skip_steps": 3}
    if spacing == "custom":
        ours = BoostAndSkipDDPMScheduler(**config)
        ours.set_timesteps(timesteps=table)
    else:
        ours = BoostAndSkipDDPMScheduler(**config, timestep_spacing=spacing)
        ours.set_timesteps(10)
    kept = table if spacing == "custom" else table[3:]  # a list runs as given
    expected = ancestral_loop(model, 2.5 * EPS.double(), kept, coefficients(), variance, gaussians(2))
    close(sample(ours, model, steps=None, seed=2), expected, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("rederive", [False, True])
@pytest.mark.parametrize(
    ("spacing", "table"),
    [
        ("linspace", [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        ("leading", [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]),
        ("trailing", [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        ("custom", [990, 980, 970, 500, 420, 77, 3, 0]),
    ],
)
def test_ddim_equals_the_loop_written_out_with_true_neighbours(eta, kind, rederive, spacing, table):
    config = {"gamma": 2.5, "skip_steps": 3, "prediction_type": kind, "set_alpha_to_one": False}
    if spacing == "custom":
        ours = BoostAndSkipDDIMScheduler(**config)
        ours.set_timesteps(timesteps=table)
    else:
        ours = BoostAndSkipDDIMScheduler(**config, timestep_spacing=spacing, steps_offset=1)
        ours.set_timesteps(10)
    kept = table if spacing == "custom" else table[3:]  # a list runs as given
    assert ours.timesteps.tolist() == kept
    noise = {"eta": eta, "seed": 2} if eta else {}
    alphas, options = coefficients(), {"kind": kind, "rederive": rederive}
    expected = ddim_loop(fake_model, 2.5 * EPS.double(), kept, alphas, eta, gaussians(2), last=alphas[0], **options)
    actual = sample(ours, steps=None, use_clipped_model_output=rederive, **noise)
    close(actual, expected)
    learned = sample(ours, fake_learned_model, steps=None, use_clipped_model_output=rederive, **noise)
    assert torch.equal(learned, actual)  # the variance half of the output is dropped


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        ({"timestep_spacing": "linspace"}, {"num_inference_steps": 10}),
        ({"timestep_spacing": "leading"}, {"num_inference_steps": 10}),
        ({"timestep_spacing": "trailing", "use_karras_sigmas": True}, {"num_inference_steps": 10}),
        ({"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}, {"num_inference_steps": 10}),
        ({"use_beta_sigmas": True}, {"num_inference_steps": 10}),
        ({}, {"timesteps": [999, 800, 790, 300, 100, 50, 0]}),
        ({"timestep_spacing": "leading"}, {"sigmas": [14.0, 9.0, 4.0, 1.0, 0.3, 0.1, 0.0]}),
    ],
)
def test_euler_equals_the_loop_written_out(kind, config, schedule):
    config = {**config, "beta_schedule": "scaled_linear", "prediction_type": kind}
    stock = EulerDiscreteScheduler(**config)
    stock.set_timesteps(**schedule)
    skip = 3 if "num_inference_steps" in schedule else 0  # a list runs as given
    timesteps, sigmas = stock.timesteps[skip:], stock.sigmas[skip:].tolist()
    level = math.sqrt(1 + sigmas[0] ** 2) if config.get("timestep_spacing") == "leading" else sigmas[0]
    expected = euler_loop(fake_model, 2.5 * level * EPS.double(), timesteps, sigmas, kind)
    ours = BoostAndSkipEulerDiscreteScheduler(**config, gamma=2.5, skip_steps=3)
    ours.set_timesteps(**schedule)
    close(sample(ours, steps=None), expected, atol=1e-4)
    ours.set_timesteps(**schedule)
    ours.set_begin_index(0)  # as SDXL does
    close(sample(ours, steps=None), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        ({}, {"num_inference_steps": 10}),
        ({"timestep_spacing": "leading", "steps_offset": 1}, {"num_inference_steps": 10}),
        ({"timestep_spacing": "trailing"}, {"num_inference_steps": 22}),
        ({"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, {"num_inference_steps": 10}),
        ({"use_lu_lambdas": True}, {"num_inference_steps": 10}),
        ({}, {"timesteps": [999, 800, 790, 300, 100, 50, 10]}),
    ],
)
def test_dpm_equals_the_loop_written_out(config, schedule):
    config = {**config, "beta_schedule": "scaled_linear"}
    stock = DPMSolverMultistepScheduler(**config)
    stock.set_timesteps(**schedule)
    skip = 3 if "num_inference_steps" in schedule else 0  # a list runs as given
    timesteps, sigmas = stock.timesteps[skip:], stock.sigmas[skip:].tolist()
    expected = dpm_loop(fake_model, 2.5 * EPS.double(), timesteps, sigmas)
    shaken = dpm_loop(fake_model, 2.5 * EPS.double() * (1 + 2**-24), timesteps, sigmas)  # by a digit of float32
    atol = 2e-5 + 16 * (shaken - expected).abs().max().item()
    ours = BoostAndSkipDPMSolverMultistepScheduler(**config, gamma=2.5, skip_steps=3)
    ours.set_timesteps(**schedule)
    close(sample(ours, steps=None), expected, atol)
    # The second run must not remember the first: its order starts at 1 again, and so in SDXL.
    ours.set_timesteps(**schedule)
    assert ours.lower_order_nums == 0
    assert ours.model_outputs == [None, None]
    ours.set_begin_index(0)
    close(sample(ours, steps=None), expected, atol)


@pytest.mark.parametrize("solver", [{"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"}])
def test_dpm_variants_equal_stock_on_the_kept_timesteps(solver):
    """Custom timesteps make stock start where the cut starts."""
    stock = DPMSolverMultistepScheduler(**solver)
    stock.set_timesteps(10)
    kept = stock.timesteps[3:].tolist()
    stock.set_timesteps(timesteps=kept)
    ours = BoostAndSkipDPMSolverMultistepScheduler(**solver, gamma=2.5, skip_steps=3)
    ours.set_timesteps(10)
    boosted = sample(ours, steps=None, seed=2)
    assert torch.equal(boosted, sample(stock, steps=None, seed=2, eps=2.5 * EPS))


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [7, 20])
def test_skip_equals_stock_over_the_rest_of_a_leading_table(name, steps):
    stock = PAIRS[name][0](timestep_spacing="leading")
    stock.set_timesteps(steps)
    x, generator = 2.5 * EPS, torch.Generator().manual_seed(2)
    for t in stock.timesteps[3:]:
        x = stock.step(fake_model(x, t), t, x, generator=generator).prev_sample
    ours = PAIRS[name][1](timestep_spacing="leading", gamma=2.5, skip_steps=3)
    assert torch.equal(sample(ours, steps=steps, seed=2), x)


# ---------------------------------------------------------------------------------------------------------------- DDIM


def test_ddim_neighbours():
    ours = BoostAndSkipDDIMScheduler(timestep_spacing="linspace", skip_steps=1)
    ours.set_timesteps(10)
    assert ours.previous_timestep(888) == 777
    assert ours.previous_timestep(torch.tensor(0)) == -1
    ours.set_timesteps(timesteps=[999, 900, 100])
    assert ours.previous_timestep(900) == 100  # stock: 900 - 1000 // 3 = 567
    assert ours.previous_timestep(100) == -1
    boosted = BoostAndSkipDDIMScheduler(timestep_spacing="linspace", gamma=2.0)
    boosted.set_timesteps(10)
    assert boosted.previous_timestep(999) == 888


def test_ddim_keeps_the_stock_rule_only_while_nothing_is_changed():
    off = BoostAndSkipDDIMScheduler(timestep_spacing="linspace")
    assert off.previous_timestep(999) == 998  # before set_timesteps: the training process
    off.set_timesteps(10)
    assert off.previous_timestep(999) == 899
    off.set_timesteps(timesteps=off.timesteps.tolist())
    assert off.previous_timestep(999) == 888
    off.set_timesteps(10)
    assert off.previous_timestep(999) == 899


@pytest.mark.parametrize("timesteps", [[999, 500, 0], np.array([999, 500, 0]), torch.tensor([999, 500, 0])])
def test_ddim_accepts_custom_timesteps(timesteps):
    ours = BoostAndSkipDDIMScheduler()
    ours.set_timesteps(timesteps=timesteps, device="cpu")
    assert ours.timesteps.tolist() == [999, 500, 0]
    assert ours.timesteps.dtype == torch.int64
    assert ours.num_inference_steps == 3


@pytest.mark.parametrize("steps", [[], [5, 5], [1, 2], [1000, 1], [5, -1], [5.5, 1.0], [[3, 2]], [True, False]])
def test_ddim_refuses_other_timesteps(steps):
    with pytest.raises(ValueError, match=r"timesteps=.*strictly decreasing integers in \[0, 1000\)"):
        BoostAndSkipDDIMScheduler().set_timesteps(timesteps=steps)


@pytest.mark.parametrize("arguments", [{}, {"num_inference_steps": 2, "timesteps": [5, 1]}])
def test_ddim_takes_exactly_one_schedule(arguments):
    with pytest.raises(ValueError, match="exactly one of num_inference_steps and timesteps"):
        BoostAndSkipDDIMScheduler().set_timesteps(**arguments)


@pytest.mark.parametrize("timestep", [1, 10, 49, 950])
def test_ddim_off_steps_from_any_timestep_as_stock(timestep):
    ours, stock = BoostAndSkipDDIMScheduler(), DDIMScheduler()
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    assert torch.equal(ours.step(EPS, timestep, EPS).prev_sample, stock.step(EPS, timestep, EPS).prev_sample)


@pytest.mark.parametrize("config", [{"gamma": 2.0}, {"skip_steps": 2}])
@pytest.mark.parametrize("timestep", [950, 999, -1, 700.5])
def test_ddim_refuses_a_timestep_outside_the_table(config, timestep):
    ours = BoostAndSkipDDIMScheduler(**config)
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match=rf"timestep={timestep} is not in the schedule.*scheduler\.timesteps"):
        ours.step(EPS, timestep, EPS)


@pytest.mark.parametrize(("timestep", "neighbour"), [(700, 600), (699, 600), (601, 600), (600, 500), (1, 0), (0, -1)])
def test_ddim_steps_from_between_two_entries_to_the_smaller_one(timestep, neighbour):
    ours = BoostAndSkipDDIMScheduler(skip_steps=2)
    ours.set_timesteps(10)
    assert ours.previous_timestep(timestep) == neighbour


def test_ddim_refuses_a_skipped_timestep():
    ours = BoostAndSkipDDIMScheduler(skip_steps=2)
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep=800 is not in the schedule"):
        ours.step(EPS, 800, EPS)


def test_ddim_step_refuses_what_stock_refuses():
    ours = BoostAndSkipDDIMScheduler()
    with pytest.raises(ValueError, match="set_timesteps"):
        ours.step(EPS, 999, EPS)
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match="only one of generator and variance_noise"):
        ours.step(EPS, 900, EPS, eta=1.0, generator=torch.Generator(), variance_noise=EPS)
    with pytest.raises(ValueError, match="1001"):
        ours.set_timesteps(1001)
    ours = BoostAndSkipDDIMScheduler(prediction_type="flow")
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match="'flow' must be 'epsilon', 'sample' or 'v_prediction'"):
        ours.step(EPS, 900, EPS)


def test_ddim_given_noise_equals_drawn_noise_and_shapes_are_free():
    ours = BoostAndSkipDDIMScheduler(gamma=2.0, clip_sample=False)
    ours.set_timesteps(10)
    for shape in [(5,), (2, 3), (2, 1, 3, 3, 3)]:
        x = torch.ones(shape)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        drawn = ours.step(x, 900, x, eta=1.0, generator=torch.Generator().manual_seed(3))
        given = ours.step(x, 900, x, eta=1.0, variance_noise=noise)
        assert torch.equal(drawn.prev_sample, given.prev_sample)
        assert drawn.prev_sample.shape == shape


# ------------------------------------------------------------------------------------------------------- configuration


@both
def test_config_from_stock_and_back(name):
    stock_class, ours_class = PAIRS[name]
    stock = stock_class(beta_start=0.002, beta_schedule="scaled_linear", timestep_spacing="trailing")
    ours = ours_class.from_config(stock.config, gamma=4.0, skip_steps=3)
    assert torch.equal(ours.betas, stock.betas)
    assert (ours.config.gamma, ours.config.skip_steps) == (4.0, 3)
    assert {k: v for k, v in ours.config.items() if k in stock.config and k[0] != "_"} == {
        k: v for k, v in stock.config.items() if k[0] != "_"
    }
    back = stock_class.from_config(ours.config)
    assert type(back) is stock_class
    assert torch.equal(sample(back, **seeded(name)), sample(stock, **seeded(name)))
    again = ours_class.from_config(back.config)  # diffusers keeps what another class needs
    assert (again.config.gamma, again.config.skip_steps) == (4.0, 3)
    plain = ours_class.from_config(stock.config)
    assert (plain.config.gamma, plain.config.skip_steps) == (1.0, 0)


@both
def test_config_between_our_own_classes(name):
    ours = PAIRS[name][1](beta_start=0.002, gamma=4.0, skip_steps=3)
    for _, other_class in PAIRS.values():
        other = other_class.from_config(ours.config)
        assert (other.config.gamma, other.config.skip_steps) == (4.0, 3)
        assert torch.equal(other.betas, ours.betas)


@both
def test_positional_arguments_reach_the_parent_and_the_config(name):
    ours = PAIRS[name][1](100, 0.001, 0.03, gamma=2.0)
    assert len(ours.betas) == ours.config.num_train_timesteps == 100
    copied = PAIRS[name][1].from_config(ours.config)
    assert torch.equal(copied.betas, ours.betas)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bata_start'"):
        PAIRS[name][1](bata_start=0.001)
    with pytest.raises(TypeError, match="too many positional"):
        PAIRS[name][1](*range(50))


@both
def test_copies_and_files_keep_everything(name, tmp_path):
    cls = PAIRS[name][1]
    # numpy numbers stand in for what a search over settings passes; JSON knows plain ones only
    ours = cls(beta_start=0.002, timestep_spacing="trailing", gamma=np.float32(2.5), skip_steps=np.int64(3))
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == cls.__name__
    assert (saved["gamma"], saved["skip_steps"], saved["beta_start"]) == (2.5, 3, 0.002)
    expected = sample(ours, **seeded(name))
    for copied in (cls.from_pretrained(tmp_path), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is cls
        assert dict(copied.config) | {"_use_default_values": 0} == dict(ours.config) | {"_use_default_values": 0}
        assert torch.equal(sample(copied, **seeded(name)), expected)
    assert repr(ours).startswith(cls.__name__)
    assert '"gamma": 2.5' in repr(ours)
    assert '"skip_steps": 3' in repr(ours)


@both
def test_signatures_that_pipelines_inspect(name):
    stock, ours = (cls() for cls in PAIRS[name])
    step, schedule = (list(inspect.signature(method).parameters) for method in (ours.step, ours.set_timesteps))
    assert step == list(inspect.signature(stock.step).parameters)
    assert "generator" in step
    assert ("eta" in step) == (name == "ddim")
    assert schedule[:2] == ["num_inference_steps", "device"]
    assert "timesteps" in schedule
    assert ("sigmas" in schedule) == (name == "euler")
    stock_schedule = list(inspect.signature(stock.set_timesteps).parameters)
    assert schedule == stock_schedule + ["timesteps"] * (name == "ddim")
    init = inspect.signature(type(ours).__init__).parameters
    own = {"gamma": 1.0, "skip_steps": 0, "skip_to_sigma": None}
    assert list(init) == [*inspect.signature(type(stock).__init__).parameters, *own]
    assert {key: init[key].default for key in own} == own
    assert ours.order == stock.order == 1
    assert type(ours).__module__ == "diffusers_ext.schedulers.scheduling_boost_and_skip"


LEVELS = {**LATENT_SCHEDULE, "timestep_spacing": "trailing"}


def start_of(scheduler) -> float:
    """Noise over signal where the sampler starts, from the timestep alone."""
    alpha = scheduler.alphas_cumprod[scheduler.timesteps[0].long()].double()
    return ((1 - alpha) / alpha).sqrt().item()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("sigma", [11.2, 9.0, 3.0])  # the first lies between two levels of ten steps
def test_a_skip_to_a_noise_level_is_one_for_any_number_of_steps(name, sigma):
    """The start is the step of the stock schedule whose level is nearest; 3 steps are another level each time."""
    stock, ours = PAIRS[name]
    starts, counted = [], []
    for steps in (10, 30, 50, 250):
        plain, skipping, by_count = stock(**LEVELS), ours(**LEVELS, skip_to_sigma=sigma), ours(**LEVELS, skip_steps=3)
        for scheduler in (plain, skipping, by_count):
            scheduler.set_timesteps(steps)
        table = [((1 - a) / a) ** 0.5 for a in plain.alphas_cumprod.double()[plain.timesteps.long()].tolist()]
        first = min(range(steps), key=lambda i: abs(math.log(table[i] / sigma)))
        assert torch.equal(skipping.timesteps, plain.timesteps[first:])
        if hasattr(plain, "sigmas"):
            assert torch.equal(skipping.sigmas, plain.sigmas[first:])
        starts.append(start_of(skipping))
        counted.append(start_of(by_count))
    assert max(starts[1:]) / min(starts[1:]) < 1.15 < 1.4 < max(counted[1:]) / min(counted[1:])


@pytest.mark.parametrize("name", PAIRS)
def test_one_kind_of_skip_replaces_the_other(name, tmp_path):
    stock, ours = PAIRS[name]
    counted = boost_and_skip(stock(**LEVELS), gamma=2.0, skip_steps=3)
    by_level = boost_and_skip(counted, skip_to_sigma=5.0)
    assert (by_level.config.gamma, by_level.config.skip_steps, by_level.config.skip_to_sigma) == (2.0, 0, 5.0)
    assert boost_and_skip(by_level, skip_steps=1).config.skip_to_sigma is None
    assert boost_and_skip(by_level, gamma=3.0).config.skip_to_sigma == 5.0
    by_level.save_pretrained(tmp_path)
    loaded = ours.from_pretrained(tmp_path)
    assert loaded.config.skip_to_sigma == 5.0
    off = boost_and_skip(stock.from_config(by_level.config))
    assert (off.config.gamma, off.config.skip_steps, off.config.skip_to_sigma) == (1.0, 0, None)
    for wrong, message in (
        ({"skip_to_sigma": 0.0}, "skip_to_sigma=0.0 must be"),
        ({"skip_to_sigma": math.nan}, "skip_to_sigma=nan must be"),
        ({"skip_to_sigma": True}, "skip_to_sigma=True must be"),
        ({"skip_to_sigma": 5.0, "skip_steps": 1}, "pass one"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(**LEVELS, **wrong)
    for unreached in (14.7, 0.001):  # above the training's last timestep, and below the last step
        with pytest.raises(ValueError, match="outside of the noise levels of this schedule"):
            ours(**LEVELS, skip_to_sigma=unreached).set_timesteps(30)


def test_module_stands_alone(monkeypatch, tmp_path):
    """As files of a Hub repository: with its sibling, nothing but torch, numpy and diffusers."""
    tree = ast.parse(inspect.getsource(module))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    siblings = [node.module for node in imports if getattr(node, "level", 0)]
    assert siblings == ["scheduler_arguments"]
    imports = [node for node in imports if not getattr(node, "level", 0)]
    names = {
        name
        for node in imports
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"diffusers", "numpy", "torch"}
    monkeypatch.setitem(sys.modules, "diffusers_ext", None)
    for name in (Path(module.__file__).stem, *siblings):
        (tmp_path / "alone").mkdir(exist_ok=True)
        shutil.copy(Path(module.__file__).with_name(f"{name}.py"), tmp_path / "alone")
    monkeypatch.syspath_prepend(tmp_path)
    alone = importlib.import_module("alone.scheduling_boost_and_skip")
    assert alone.SchedulerMixin is diffusers.SchedulerMixin  # diffusers looks for this name
    ours = alone.boost_and_skip(DDIMScheduler(), gamma=2.0, skip_steps=1)
    assert len(ours.betas) == 1000


def test_package_exports():
    assert set(package.__all__) >= {cls.__name__ for _, cls in PAIRS.values()} | {"boost_and_skip"}
    assert package.boost_and_skip is boost_and_skip
    assert all(getattr(package, name) is not None for name in package.__all__)


# -------------------------------------------------------------------------------------------------------------- errors


@both
@pytest.mark.parametrize("gamma", [0, -1.0, math.inf, math.nan, "4", None, True])
def test_gamma_out_of_range(name, gamma):
    with pytest.raises(ValueError, match=r"gamma=.*must be a finite number > 0.*gamma=1\.0"):
        PAIRS[name][1](gamma=gamma)


@both
@pytest.mark.parametrize("skip_steps", [-1, 1.0, 2.5, "3", None, True])
def test_skip_steps_out_of_range(name, skip_steps):
    with pytest.raises(ValueError, match=r"skip_steps=.*must be an integer >= 0.*skip_steps=0"):
        PAIRS[name][1](skip_steps=skip_steps)


@both
def test_skip_steps_must_leave_a_step(name):
    ours = PAIRS[name][1](skip_steps=5)
    ours.set_timesteps(6)
    assert len(ours.timesteps) == 1
    with pytest.raises(ValueError, match=r"skip_steps=5 must be smaller than the number of steps.*has 5: set more"):
        ours.set_timesteps(5)


@both
def test_a_list_runs_as_given(name):
    """Also the schedule of the scheduler itself, which has no skipped steps any more. The boost holds."""
    ours = PAIRS[name][1](skip_steps=2, gamma=3.0)
    ours.set_timesteps(6)
    kept = ours.timesteps.clone()
    ours.set_timesteps(timesteps=kept)
    assert torch.equal(ours.timesteps, kept) and len(kept) == 4
    assert torch.isfinite(sample(ours, steps=None)).all()
    boost = ours.init_noise_sigma / PAIRS[name][1].__mro__[2].init_noise_sigma.fget(ours) if name == "euler" else 3.0
    assert boost == pytest.approx(3.0)


@pytest.mark.parametrize("kind", ["karras_sigmas", "lu_lambdas", "exponential_sigmas", "beta_sigmas"])
def test_equal_timesteps_are_walked_one_by_one(kind):
    """A run may begin where noise levels round to one timestep; stock's search takes the second for the first."""
    uncut = DPMSolverMultistepScheduler(**{f"use_{kind}": True})
    uncut.set_timesteps(100)
    skip = next(i for i in range(99) if uncut.timesteps[i] == uncut.timesteps[i + 1])
    ours = BoostAndSkipDPMSolverMultistepScheduler.from_config(uncut.config, gamma=2.0, skip_steps=skip)
    ours.set_timesteps(100)
    expected = dpm_loop(fake_model, 2.0 * EPS.double(), ours.timesteps, ours.sigmas.tolist())
    close(sample(ours, steps=None), expected)


@both
def test_image_to_image_that_the_skip_leaves_no_step(name):
    ours = PAIRS[name][1](skip_steps=4, gamma=2.0)
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match=r"strength leaves no step: skip_steps=4 .* strength > .* 4 / 10"):
        ours.add_noise(EPS, EPS, ours.timesteps[6:7])
    assert ours.add_noise(EPS, EPS, ours.timesteps[5:6]).shape == EPS.shape


# ------------------------------------------------------------------------------------------------------ boost_and_skip


@both
def test_boost_and_skip_picks_the_class_and_keeps_the_config(name):
    stock_class, ours_class = PAIRS[name]
    stock = stock_class(beta_start=0.002)
    ours = boost_and_skip(stock, gamma=4.0, skip_steps=3)
    assert type(ours) is ours_class
    assert (ours.config.gamma, ours.config.skip_steps, ours.config.beta_start) == (4.0, 3, 0.002)
    assert type(stock) is stock_class  # left as it was
    assert "gamma" not in stock.config
    again = boost_and_skip(ours, gamma=2.0)
    assert type(again) is ours_class
    assert (again.config.gamma, again.config.skip_steps, again.config.beta_start) == (
        2.0,
        3,
        0.002,
    )  # what is left out stays
    assert (ours.config.gamma, ours.config.skip_steps) == (4.0, 3)
    with pytest.raises(ValueError, match="gamma=0"):
        boost_and_skip(stock, gamma=0)
    hidden = stock_class.from_config(ours.config)  # a stock scheduler that keeps our numbers as ignored entries
    off = boost_and_skip(hidden, skip_steps=1)
    assert (off.config.gamma, off.config.skip_steps) == (1.0, 1)


@pytest.mark.parametrize("cls", [PNDMScheduler, LCMScheduler, DDPMParallelScheduler])
def test_boost_and_skip_refuses_what_it_does_not_know(cls):
    with pytest.raises(ValueError) as error:
        boost_and_skip(cls(), gamma=4.0)
    message = str(error.value)
    assert cls.__name__ in message
    assert all(known.__name__ in message for pair in PAIRS.values() for known in pair)
    assert "EulerDiscreteScheduler.from_config(pipe.scheduler.config)" in message
    converted = boost_and_skip(EulerDiscreteScheduler.from_config(cls().config), gamma=4.0)
    assert type(converted) is BoostAndSkipEulerDiscreteScheduler


def test_boost_and_skip_does_not_send_flow_matching_to_euler():
    with pytest.raises(ValueError, match=r"Flow matching .* not covered") as error:
        boost_and_skip(FlowMatchEulerDiscreteScheduler(shift=3.0), gamma=4.0)
    assert "convert" not in str(error.value)


@pytest.mark.parametrize("timesteps", [[], [5, -1], [5, 5], [1000, 5], [5.5, 1]])
def test_ddpm_checks_custom_timesteps(timesteps):
    with pytest.raises(ValueError, match="strictly decreasing integers"):
        BoostAndSkipDDPMScheduler().set_timesteps(timesteps=timesteps)


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_image_to_image_loses_the_skipped_steps_from_its_strength(name):
    """As documented: it starts from the noised image, so gamma does nothing and a skip shortens the way."""
    pipe = StableDiffusionImg2ImgPipeline(**tiny_stable_diffusion().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    counts, results = [], []
    for gamma in (1.0, 4.0):
        steps = []
        pipe.scheduler = PAIRS[name][1](**LATENT_SCHEDULE, gamma=gamma, skip_steps=3)
        result = pipe(
            "a", image=image, strength=0.5, num_inference_steps=20, output_type="np", guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=lambda *step, steps=steps: steps.append(step) or {},
        )  # fmt: skip
        counts.append(len(steps))
        results.append(result.images)
    assert counts == [7, 7]
    np.testing.assert_array_equal(*results)


def test_boost_and_skip_refuses_subclasses_of_ours():
    class Mine(BoostAndSkipDDIMScheduler):
        pass

    with pytest.raises(ValueError, match="Mine"):
        boost_and_skip(Mine())


# ----------------------------------------------------------------------------------- Gaussian data, the exact denoiser


def exact_epsilon(variance, alphas):
    """E[epsilon | x_t] for data N(0, variance)."""
    return lambda x, t: x * math.sqrt(1 - alphas[int(t)]) / (alphas[int(t)] * variance + 1 - alphas[int(t)])


@pytest.mark.parametrize(
    ("variance", "gamma", "skip"), [(1.0, 2.0, 300), (0.25, 3.0, 400), (4.0, 0.5, 600), (0.25, 1.0, 0)]
)
def test_gaussian_data_ends_at_the_boosted_variance(variance, gamma, skip):
    """The flow of the exact denoiser maps N(0, c v(t)) to N(0, c v(0)), v(t) = alpha variance + 1 - alpha, so the
    start gamma epsilon, of variance gamma^2, ends at variance gamma^2 v(0) / v(start)."""
    alphas = coefficients()
    eps = torch.linspace(-2, 2, 5)
    start = alphas[999 - skip]
    expected = gamma * eps * math.sqrt(variance / (start * variance + 1 - start))
    config = {"clip_sample": False, "gamma": gamma, "skip_steps": skip, "timestep_spacing": "leading"}
    ddim = BoostAndSkipDDIMScheduler(**config)
    torch.testing.assert_close(
        sample(ddim, exact_epsilon(variance, alphas), steps=1000, eps=eps), expected, rtol=0.01, atol=0
    )
    del config["clip_sample"]
    euler = BoostAndSkipEulerDiscreteScheduler(**config)
    torch.testing.assert_close(
        sample(euler, exact_epsilon(variance, alphas), steps=1000, eps=eps), expected, rtol=0.02, atol=0
    )
