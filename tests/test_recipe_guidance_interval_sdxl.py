"""The SDXL recipe on a tiny random network in a folder: the paper's schedule, and columns that are what they say."""

import functools
import importlib.util
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import HeunDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from tiny_pipelines import tiny_sdxl, tiny_stable_diffusion

from diffusers_ext import GuidanceInterval

FILE = Path(__file__).parent.parent / "recipes/guidance_interval_sdxl.py"
TITLES = ["no guidance", "weight 5", "weight 16", "weight 16 in (0.28, 5.42]"]
# Equation 5 of EDM with the numbers of section 4.3 of the paper: rho 3, 14.61 to 0.03, 32 steps.
PAPER = [(14.61 ** (1 / 3) + i / 31 * (0.03 ** (1 / 3) - 14.61 ** (1 / 3))) ** 3 for i in range(32)]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_sdxl().save_pretrained(folder)
    return folder


def run(recipe, *arguments):
    arguments = [str(argument) for argument in (*arguments, "--device", "cpu")]
    return CliRunner().invoke(recipe.main, arguments, catch_exceptions=False)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.slow
def test_every_column(recipe, model, tmp_path, monkeypatch):
    """The loop walks over the paper's sigmas, and each picture is that of a pipeline called by hand."""
    walked = []

    @functools.wraps(step := HeunDiscreteScheduler.step)
    def watch(self, model_output, timestep, sample, *args, **kwargs):
        result = step(self, model_output, timestep, sample, *args, **kwargs)
        walked.append((len(self.timesteps), float(self.sigmas[self.step_index - 1])))
        return result

    monkeypatch.setattr(HeunDiscreteScheduler, "step", watch)
    options = ["--model", model, "--prompt", "a cat", "--seed", 3, "--output", tmp_path]
    assert run(recipe, *options).exit_code == 0

    loops = [sigma for count, sigma in walked if count == 63]
    assert len(loops) == 4 * 63
    for start in range(0, len(loops), 63):
        # each step but the last is evaluated at its start and at its end, which is the next one's start
        np.testing.assert_allclose(loops[start : start + 63 : 2], PAPER, rtol=1e-4)
        np.testing.assert_allclose(loops[start + 1 : start + 63 : 2], PAPER[1:], rtol=1e-4)

    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert [entry["guidance"] for entry in numbers] == TITLES
    guided = sum(0.28 < sigma <= 5.42 for sigma in PAPER)
    assert guided == 17  # about half of the steps, as the paper says
    assert [entry["rows"] for entry in numbers] == [63, 126, 126, 63 + 2 * guided]
    assert all(entry["seconds"] > 0 for entry in numbers)

    pipe = StableDiffusionXLPipeline.from_pretrained(model, force_zeros_for_empty_prompt=False)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    pipe.set_progress_bar_config(disable=True)
    alphas = pipe.scheduler.alphas_cumprod.double().numpy()
    timesteps = np.interp(PAPER, ((1 - alphas) / alphas) ** 0.5, np.arange(1000)).tolist()

    def by_hand(weight: float) -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        return np.asarray(pipe("a cat", guidance_scale=weight, timesteps=timesteps, generator=generator).images[0])

    drawn = [pixels(tmp_path / f"seed3_prompt0_{column}.png") for column in range(4)]
    expected = [by_hand(weight) for weight in (1.0, 5.0, 16.0)]
    with GuidanceInterval(pipe, sigma_lo=0.28, sigma_hi=5.42):
        expected.append(by_hand(16.0))
    for ours, theirs in zip(drawn, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.astype(int), atol=1)
    assert len({ours.tobytes() for ours in drawn}) == 4


@pytest.mark.slow
def test_sheet(recipe, model, tmp_path):
    """A sheet a seed: prompts from top to bottom, ways of guiding from left to right."""
    options = ["--model", model, "--prompt", "a cat", "--prompt", "a dog", "--seed", 0, "--seed", 1, "--steps", 3]
    result = run(recipe, *options, "--weight", 8, "--interval", 1, 9, "--output", tmp_path)
    assert result.exit_code == 0 and "weight 8 in (1, 9]" in result.output
    for seed in (0, 1):
        page = pixels(tmp_path / f"seed{seed}.png")
        assert page.shape == (2 * 16 + 8 + 3 * 24, 4 * (16 + 24) + 24, 3)
        for row in range(2):
            for column in range(4):
                top, left = 48 + row * 24, 24 + column * 40
                picture = pixels(tmp_path / f"seed{seed}_prompt{row}_{column}.png")
                assert np.array_equal(page[top : top + 16, left : left + 16], picture)
    assert not np.array_equal(pixels(tmp_path / "seed0.png"), pixels(tmp_path / "seed1.png"))
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert [(entry["seed"], entry["prompt"]) for entry in numbers[::4]] == list(product((0, 1), ("a cat", "a dog")))
    large = recipe.column([Image.new("RGB", (1024, 512), colour) for colour in ("red", "blue")])
    assert large.size == (512, 2 * 256 + 8)
    assert large.getpixel((5, 5)) == (255, 0, 0) and large.getpixel((5, 500)) == (0, 0, 255)


def test_bad_input_before_any_work(recipe, model, tmp_path):
    with pytest.raises(ValueError, match="need 0 <= sigma_lo < sigma_hi"):
        run(recipe, "--model", model, "--interval", 5, 1, "--output", tmp_path / "out")
    tiny_stable_diffusion().save_pretrained(tmp_path / "sd")
    result = run(recipe, "--model", tmp_path / "sd", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "is a StableDiffusionPipeline, not a StableDiffusionXLPipeline" in result.output
    assert not (tmp_path / "out").exists()
