"""EDMHeunScheduler: the recorded tables, the exact denoiser of a Gaussian, the stock Heun step, its own rules."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from safetensors.torch import load_file

from diffusers_ext import EDMHeunScheduler

GOLDENS = Path(__file__).parent / "goldens"
STD = 0.5


def gaussian(x, sigma):
    """The exact denoiser of data from N(0, STD^2)."""
    return x * STD**2 / (STD**2 + float(sigma) ** 2)


def run(scheduler, noise, steps=None, denoise=gaussian, generator=None, **table):
    scheduler.set_timesteps(steps, **table)
    x = noise * scheduler.init_noise_sigma
    for i in range(scheduler.num_inference_steps):
        assert scheduler.step_index == i
        x, sigma_hat = scheduler.churn(x, generator=generator)
        x = scheduler.step(denoise(x, sigma_hat), sigma_hat, x).prev_sample
        if (sigma := scheduler.sigmas[i + 1]) > 0:
            x = scheduler.step(denoise(x, sigma), sigma, x).prev_sample
    return x


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("name", "table"), load_file(GOLDENS / "edm_sigma_tables.safetensors").items(), ids=lambda value: str(value)[:12]
)
def test_recorded_tables(name, table):
    _, steps, low, high, rho = name.split("_")
    scheduler = EDMHeunScheduler(sigma_min=float(low[3:]), sigma_max=float(high[3:]), rho=float(rho[3:]))
    scheduler.set_timesteps(int(steps[1:]))
    assert scheduler.sigmas.dtype == torch.float64
    torch.testing.assert_close(scheduler.sigmas, table, rtol=1e-12, atol=0)


def test_edges_of_the_table():
    scheduler = EDMHeunScheduler(sigma_min=0.03, sigma_max=14.61, rho=3)
    scheduler.set_timesteps(32)
    assert len(scheduler.sigmas) == 33 and scheduler.sigmas[-1] == 0
    assert (scheduler.sigmas.diff() < 0).all()
    torch.testing.assert_close(scheduler.sigmas[[0, 31]], torch.tensor([14.61, 0.03], dtype=torch.float64))
    assert scheduler.init_noise_sigma == pytest.approx(14.61)
    scheduler.set_timesteps(1)
    assert scheduler.sigmas.tolist() == pytest.approx([14.61, 0])


def test_second_order_on_the_exact_ode():
    """x(0) = x(T) STD / sqrt(STD^2 + T^2); the error falls by four when the number of steps is doubled."""
    start, errors = noise(16), []
    exact = start * 80 * STD / math.sqrt(STD**2 + 80**2)
    for steps in (64, 128, 256):
        errors.append((run(EDMHeunScheduler(sigma_min=1e-4), start, steps) - exact).abs().max().item())
    assert all(3.5 < a / b < 4.5 for a, b in pairwise(errors)), errors


def test_churn_keeps_the_distribution():
    scheduler = EDMHeunScheduler(S_churn=40, S_noise=1.0)
    x = run(scheduler, noise(20_000), 256, generator=torch.Generator().manual_seed(1))
    assert x.std().item() == pytest.approx(STD, rel=0.02)
    assert not torch.allclose(x, run(EDMHeunScheduler(), noise(20_000), 256), atol=0.1)


def test_equals_the_stock_heun_step():
    """Without churn: HeunDiscreteScheduler given the same table, in its float32."""
    ours, stock = EDMHeunScheduler(), HeunDiscreteScheduler(prediction_type="sample")
    stock.set_timesteps(10)
    ours.set_timesteps(10)
    stock.sigmas = torch.cat([ours.timesteps, torch.zeros(1)]).float()
    x = y = noise(2, 3, dtype=torch.float32) * 80
    for t_stock, sigma in zip(stock.timesteps, ours.timesteps, strict=True):
        x = stock.step(gaussian(x, sigma).tanh(), t_stock, x).prev_sample
        y = ours.step(gaussian(y, sigma).tanh(), sigma, y).prev_sample
    assert y.dtype == torch.float64
    torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


def test_without_churn_nothing_is_drawn_and_churn_may_be_left_out():
    scheduler, generator = EDMHeunScheduler(), torch.Generator().manual_seed(5)
    before = generator.get_state()
    x = run(scheduler, noise(4), 6, generator=generator)
    assert torch.equal(generator.get_state(), before)
    scheduler.set_timesteps(6)
    y = noise(4) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        y = scheduler.step(gaussian(scheduler.scale_model_input(y, t), t), t, y).prev_sample
    assert torch.equal(x, y)


def test_noise_is_drawn_at_every_step_and_added_within_the_bounds():
    outside = EDMHeunScheduler(S_churn=40, S_min=100, S_max=200)
    generator = torch.Generator().manual_seed(5)
    x = run(outside, noise(4), 6, generator=generator)
    assert torch.equal(x, run(EDMHeunScheduler(), noise(4), 6))
    replay = torch.Generator().manual_seed(5)
    for _ in range(6):
        torch.randn(4, generator=replay, dtype=torch.float64)
    assert torch.equal(generator.get_state(), replay.get_state())


def test_churn_formula_with_given_noise():
    scheduler = EDMHeunScheduler(S_churn=4, S_min=1, S_max=70, S_noise=1.01)
    scheduler.set_timesteps(8)
    x, e = noise(3), noise(3, seed=1)
    raised, sigma_hat = scheduler.churn(x, noise=e)
    assert torch.equal(raised, x) and sigma_hat == pytest.approx(80)  # above S_max
    scheduler.set_timesteps(sigmas=[70, 2, 0.5])
    raised, sigma_hat = scheduler.churn(x, noise=e)
    gamma = math.sqrt(2) - 1  # 4 / 3 is more than that
    assert sigma_hat == pytest.approx(70 * (1 + gamma))
    torch.testing.assert_close(raised, x + 70 * 1.01 * e)


def test_samples_with_their_own_generators_do_not_depend_on_the_batch():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    scheduler, start = EDMHeunScheduler(S_churn=20), noise(2, 3)
    both = run(scheduler, start, 6, generator=generators(1, 2))
    assert torch.equal(run(scheduler, start[1:], 6, generator=generators(2)), both[1:])


def test_given_sigmas():
    scheduler = EDMHeunScheduler()
    for sigmas in ([5, 2.0, 0.1], [5, 2.0, 0.1, 0], torch.tensor([5, 2, 0.1], dtype=torch.float64)):
        scheduler.set_timesteps(sigmas=sigmas)
        assert scheduler.sigmas.tolist() == [5, 2, 0.1, 0]
        assert scheduler.timesteps.tolist() == [5, 2, 2, 0.1, 0.1]
        assert scheduler.init_noise_sigma == 5 and scheduler.num_inference_steps == 3


def test_float32_state_where_the_device_has_no_float64(monkeypatch):
    assert EDMHeunScheduler.state_dtype(torch.device("mps")) == torch.float32
    exact = run(EDMHeunScheduler(), noise(4), 8)
    monkeypatch.setattr(EDMHeunScheduler, "state_dtype", staticmethod(lambda device: torch.float32))
    rough = run(EDMHeunScheduler(), noise(4, dtype=torch.float64), 8)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), exact, atol=1e-4, rtol=1e-4)


def test_no_limit_is_saved_as_json(tmp_path):
    scheduler = EDMHeunScheduler(S_churn=1.0)
    assert scheduler.config.S_max is None
    scheduler.save_pretrained(tmp_path)
    text = (tmp_path / "scheduler_config.json").read_text()
    assert "Infinity" not in text and json.loads(text)["S_max"] is None
    again = EDMHeunScheduler.from_pretrained(tmp_path)
    again.set_timesteps(4)
    assert again.churn(noise(2), noise=noise(2))[1] > 80


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sigma_min": 0}, "sigma_min=0 must be a finite number > 0"),
        ({"sigma_min": 90}, "sigma_min=90 must be smaller than sigma_max=80.0"),
        ({"sigma_max": float("inf")}, "sigma_max=inf"),
        ({"rho": -1}, "rho=-1"),
        ({"S_churn": -1}, "S_churn=-1 must be a finite number >= 0"),
        ({"S_noise": True}, "S_noise=True"),
        ({"S_min": 2, "S_max": 1}, "S_max=1 must be a number >= S_min=2"),
        ({"S_max": "inf"}, "S_max='inf'"),
    ],
)
def test_numbers_are_checked(config, message):
    with pytest.raises(ValueError, match=message):
        EDMHeunScheduler(**config)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "exactly one of num_inference_steps and sigmas"),
        ({"num_inference_steps": 2, "sigmas": [1.0]}, "exactly one"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be an integer >= 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
        ({"sigmas": [1, 2]}, "strictly decreasing"),
        ({"sigmas": [2, 2]}, "strictly decreasing"),
        ({"sigmas": []}, "at least one"),
        ({"sigmas": [0]}, "> 0"),
        ({"sigmas": [1, -1]}, "> 0"),
        ({"sigmas": [float("nan")]}, "finite"),
    ],
)
def test_schedules_are_checked(table, message):
    with pytest.raises(ValueError, match=message):
        EDMHeunScheduler().set_timesteps(**table)


def test_calls_out_of_turn():
    x = noise(2)
    scheduler = EDMHeunScheduler()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(x, 80, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="out of turn"):
        scheduler.step(x, 0.002, x)
    scheduler.step(x, 80, x)
    with pytest.raises(ValueError, match="start of a step"):
        scheduler.churn(x)
    with pytest.raises(ValueError, match="second evaluation of step 0"):
        scheduler.step(x, 80, x)
    scheduler.step(x, 0.002, x)
    scheduler.step(x, 0.002, x)
    with pytest.raises(ValueError, match="All 2 steps"):
        scheduler.step(x, 0.002, x)
    with pytest.raises(ValueError, match="All 2 steps"):
        scheduler.churn(x)


def test_churn_must_be_called_where_it_acts():
    scheduler, x = EDMHeunScheduler(S_churn=10), noise(2)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="adds noise before each step"):
        scheduler.step(x, 80, x)
    with pytest.raises(ValueError, match="only one of generator and noise"):
        scheduler.churn(x, generator=torch.Generator(), noise=x)
    with pytest.raises(ValueError, match="noise must have the shape"):
        scheduler.churn(x, noise=noise(3))


def test_tuple_output():
    scheduler, x = EDMHeunScheduler(), noise(2)
    scheduler.set_timesteps(3)
    prev, denoised = scheduler.step(gaussian(x, 80), 80, x, return_dict=False)
    scheduler.set_timesteps(3)
    output = scheduler.step(gaussian(x, 80), 80, x)
    assert torch.equal(prev, output.prev_sample)
    assert torch.equal(denoised, output.pred_original_sample) and torch.equal(denoised, gaussian(x, 80))


def test_a_run_may_begin_later_as_with_the_stock_scheduler():
    """The same entry of timesteps for both: the level, the samples and what set_timesteps does to it."""
    ours, stock = EDMHeunScheduler(), HeunDiscreteScheduler(prediction_type="sample")
    for scheduler in (ours, stock):
        assert scheduler.begin_index is None and scheduler.step_index is None
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(2 * scheduler.order)
        assert scheduler.begin_index == 4
    stock.sigmas = torch.cat([ours.timesteps, torch.zeros(1)]).float()
    assert ours.step_index == 2
    x = y = noise(2, 3, dtype=torch.float32)
    for t_stock, sigma in list(zip(stock.timesteps, ours.timesteps, strict=True))[4:]:
        x = stock.step(gaussian(x, sigma).tanh(), t_stock, x, return_dict=False)[0]
        y = ours.step(gaussian(y, sigma).tanh(), sigma, y, return_dict=False)[0]
    torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="All 6 steps"):
        ours.churn(y)
    ours.set_timesteps(6)
    assert ours.begin_index is None and ours.step_index == 0
    ours.churn(y)
    ours.set_begin_index(4)  # too late for this run
    assert ours.step_index == 0


@pytest.mark.parametrize("begin", [1, -2, 12, 2.0, True, None])
def test_a_run_begins_with_a_step(begin):
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match=r"begin_index=.* must be an even number in \[0, 11\)"):
        scheduler.set_begin_index(begin)
