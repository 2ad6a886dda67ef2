"""The EDM2 recipe on a tiny random network: settings as published, figures of the right pictures."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from diffusers_ext import EDM2Pipeline, EDM2UNet2DModel, EDMHeunScheduler

FILE = Path(__file__).parent.parent / "recipes/guidance_interval_edm2.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_unet(label_dim: int) -> EDM2UNet2DModel:
    torch.manual_seed(label_dim)
    model = EDM2UNet2DModel(
        img_resolution=16, img_channels=3, label_dim=label_dim, model_channels=8, channel_mult=(1, 2), num_blocks=1,
        attn_resolutions=(8,), channels_per_head=8,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            parameter.data.fill_(0.3)
    return model.eval()


@pytest.fixture
def pipe():
    pipe = EDM2Pipeline(tiny_unet(10), EDMHeunScheduler(), guidance_unet=tiny_unet(0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_settings_are_those_of_the_paper(recipe):
    """Each interval's steps lie at the published noise levels, to the published digits."""
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(32)
    edges = scheduler.sigmas.tolist()
    for _, _, tuned, options, _ in recipe.PAPER:
        if "guided_steps" in options:
            first, last = options["guided_steps"]
            assert tuned == f"interval ({edges[last + 1]:.2f}, {edges[first]:.2f}]"
    result = CliRunner().invoke(recipe.main, ["settings"], catch_exceptions=False)
    assert "guidance_scale=2.0, guided_steps=(17, 22)" in result.output and "1.4" in result.output


def test_figure_of_a_tiny_network(recipe, pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "load_pipeline", lambda *arguments: pipe)
    (tmp_path / "network.pkl").touch()
    arguments = ["figure", *[str(tmp_path / "network.pkl")] * 2, "--class-label", 3, "--class-label", 4, "--steps", 4]
    arguments += [
        "--weight",
        1,
        "--weight",
        3,
        "--guided-steps",
        1,
        2,
        "--inset",
        0.25,
        0.25,
        0.25,
        "--output",
        tmp_path,
    ]
    result = CliRunner().invoke(recipe.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0 and "class004_seed0.png" in result.output
    sheet = Image.open(tmp_path / "class003_seed0.png")
    assert sheet.size == (2 * 16 + 4, 2 * 16 + 4)


def test_rows_of_a_figure(recipe, pipe):
    rows = recipe.figure_rows(pipe, 3, 0, (1.0, 3.0), (1, 2), 4)
    pictures = [[np.asarray(image) for image in row] for row in rows]
    assert np.array_equal(pictures[0][0], pictures[1][0])  # weight 1 is off in both
    assert not np.array_equal(pictures[0][1], pictures[1][1])
    again = pipe(
        3, num_inference_steps=4, guidance_scale=3.0, guided_steps=(1, 2), generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert np.array_equal(pictures[1][1], np.asarray(again))


def test_inset_and_grid(recipe):
    image = Image.new("RGB", (100, 100), "black")
    image.paste("red", (10, 10, 30, 30))
    framed = recipe.with_inset(image, (0.1, 0.1, 0.2))
    assert framed.getpixel((80, 80)) == (255, 0, 0) and framed.getpixel((58, 80)) == (255, 255, 255)
    assert framed.getpixel((20, 80)) == (0, 0, 0) and image.getpixel((80, 80)) == (0, 0, 0)
    sheet = recipe.grid([[image, image], [image, image], [image, image]])
    assert sheet.size == (204, 308) and sheet.getpixel((102, 50)) == (255, 255, 255)
