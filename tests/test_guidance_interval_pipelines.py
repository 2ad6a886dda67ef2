"""The pipelines that take the interval as an argument: stock without it, loaded without the package, the schedules."""

import inspect
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from fresh_process import run_fresh
from tiny_guided_pipelines import CASES
from tiny_pipelines import tiny_sdxl

from diffusers_ext.hub import export_pipeline
from diffusers_ext.pipelines import (
    DiTGuidanceIntervalPipeline,
    GuidanceInterval,
    StableDiffusionXLGuidanceIntervalPipeline,
)
from diffusers_ext.pipelines.interval import read_step
from diffusers_ext.pipelines.stable_diffusion_xl_guidance_interval import edm_sigmas, timesteps_of_sigmas

PIPELINES = Path(__file__).parent.parent / "pipelines"
SDXL = {"prompt": ["a cat", "a dog"], "num_inference_steps": 4, "guidance_scale": 4.0}
DIT = {"class_labels": [3, 7], "num_inference_steps": 4, "guidance_scale": 4.0}


def stock(name: str):
    return tiny_sdxl() if name == "sdxl" else CASES["dit"]().pipe


def ours(name: str):
    components = stock(name).components
    if name == "sdxl":
        pipe = StableDiffusionXLGuidanceIntervalPipeline(**components, add_watermarker=False)
    else:
        pipe = DiTGuidanceIntervalPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **options) -> np.ndarray:
    options = {**(SDXL if hasattr(pipe, "unet") else DIT), **options}
    return pipe(**options, generator=torch.Generator().manual_seed(7), output_type="np").images


@pytest.fixture(params=["sdxl", "dit"])
def name(request) -> str:
    return request.param


def test_stock_without_an_interval(name):
    np.testing.assert_array_equal(run(ours(name)), run(stock(name)))


def test_same_as_an_interval_on_the_stock_pipeline(name):
    pipe = stock(name)
    with GuidanceInterval(pipe, sigma_lo=0.05, sigma_hi=4.0) as interval:
        expected = run(pipe)
    pipe = ours(name)
    np.testing.assert_array_equal(run(pipe, guidance_interval=(0.05, 4.0)), expected)
    assert pipe.guidance_report.guided_steps == interval.report.guided_steps == [1, 2]
    assert not np.array_equal(run(pipe), expected)


def test_the_argument_counts_where_an_interval_is_applied(name):
    expected = run(ours(name), guidance_interval=(0.05, 4.0))
    pipe = ours(name)
    with GuidanceInterval(pipe, sigma_lo=100.0):
        np.testing.assert_array_equal(run(pipe, guidance_interval=(0.05, 4.0)), expected)
        assert not np.array_equal(run(pipe), expected)
    assert "_compiled_call_impl" not in vars(pipe.unet if name == "sdxl" else pipe.transformer)


def test_steps_on_dit():
    pipe = ours("dit")
    by_steps = run(pipe, guided_steps=(1, 2))
    np.testing.assert_array_equal(by_steps, run(pipe, guidance_interval=(0.05, 4.0)))
    with pytest.raises(ValueError, match="give either sigma_lo and sigma_hi, or guided_steps"):
        run(pipe, guided_steps=(1, 2), guidance_interval=(0.05, 4.0))


@pytest.mark.parametrize("interval", [(1.0,), 3.0, (2.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0)])
def test_bad_intervals(name, interval):
    with pytest.raises(ValueError, match=r"guidance_interval must be|need 0 <= sigma_lo < sigma_hi"):
        run(ours(name), guidance_interval=interval)


def test_signature_and_unknown_arguments():
    parameters = inspect.signature(StableDiffusionXLGuidanceIntervalPipeline.__call__).parameters
    assert set(parameters) - set(inspect.signature(diffusers.StableDiffusionXLPipeline.__call__).parameters) == {
        "guidance_interval"
    }
    with pytest.raises(TypeError):
        run(ours("dit"), guidance_intervall=(0.05, 4.0))


def test_loads_without_the_package(name, tmp_path):
    """By path through custom_pipeline=, and from a folder in the Hub's layout."""
    pipe = ours(name)
    options = {**(SDXL if name == "sdxl" else DIT), "guidance_interval": (0.05, 4.0)}
    (tmp_path / "options.json").write_text(json.dumps(options))
    expected = run(pipe, **options)
    stock(name).save_pretrained(tmp_path / "stock")
    export_pipeline(pipe, tmp_path / "export")
    file = {"sdxl": "stable_diffusion_xl_guidance_interval.py", "dit": "dit_guidance_interval.py"}[name]
    run_fresh("load_interval_pipelines.py", str(PIPELINES / file), str(tmp_path), cache=tmp_path)
    for how in ("custom", "export"):
        np.testing.assert_allclose(np.load(tmp_path / f"{how}.npy"), expected, atol=1e-4)


def test_schedule_of_the_paper():
    """32 Heun steps on rho 3 in diffusers' Heun, whose sigmas then are the table's; half of them are guided."""
    scheduler = diffusers.HeunDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    sigmas = edm_sigmas()
    assert len(sigmas) == 32 and sigmas[0] == pytest.approx(14.61) and sigmas[-1] == pytest.approx(0.03)
    scheduler.set_timesteps(timesteps=timesteps_of_sigmas(scheduler, sigmas))
    torch.testing.assert_close(scheduler.sigmas[:-1:2].double(), sigmas, rtol=1e-4, atol=0)
    guided = [i for i, sigma in enumerate(sigmas) if 0.28 < sigma <= 5.42]
    assert (guided[0], guided[-1]) == (10, 26)
    pipe = ours("sdxl")
    pipe.scheduler = scheduler
    run(
        pipe,
        num_inference_steps=None,
        timesteps=timesteps_of_sigmas(scheduler, sigmas),
        guidance_interval=(0.28, 5.42),
    )
    assert pipe.guidance_report.guided_steps == guided
    assert [step.rows for step in pipe.guidance_report.steps][-2:] == [4, 2]  # Heun's last step is Euler's


def test_edm_table():
    """rho 7, 0.002 to 80: the table whose values the paper names."""
    sigmas = edm_sigmas(32, 0.002, 80.0, 7.0)
    named = {13: 4.99911, 15: 2.9, 17: 1.60857, 19: 0.84462, 20: 0.59770, 22: 0.28304, 23: 0.18860}
    for i, sigma in named.items():
        assert sigmas[i].item() == pytest.approx(sigma, rel=2e-3)


@pytest.mark.parametrize("arguments", [(1,), (32, 0.0, 1.0), (32, 2.0, 1.0), (32, 0.1, 1.0, 0.0)])
def test_bad_tables(arguments):
    with pytest.raises(ValueError, match="need num_steps >= 2"):
        edm_sigmas(*arguments)


def test_sigmas_beyond_the_scheduler():
    scheduler = diffusers.HeunDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with pytest.raises(ValueError, match="leave the scheduler's range"):
        timesteps_of_sigmas(scheduler, edm_sigmas(sigma_max=80.0))


def test_steps_and_sigmas_of_dit():
    """The paper's steps on DiT's linear schedule lie at other sigmas than the ones that it names."""
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(250)
    levels = [read_step(scheduler, scheduler.timesteps[i]).sigma for i in (125, 198)]
    assert levels == pytest.approx([3.39, 0.75], rel=0.05)
