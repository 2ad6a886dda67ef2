"""The sections of `diffusers-ext demo`, with few steps and images."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from diffusers_ext import demo, evaluation
from diffusers_ext.demo import boost_and_skip
from diffusers_ext.demo.boost_and_skip import BoostAndSkipSettings, run_boost_and_skip
from diffusers_ext.demo.guidance_interval import GuidanceIntervalSettings, run_guidance_interval
from diffusers_ext.demo.pictures import grid


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    settings = BoostAndSkipSettings(gammas=(1.0, 4.0), skip_steps=1, num_inference_steps=12, num_samples=20)
    return folder, demo.run_demo(folder, "cpu", {"boost_and_skip": partial(run_boost_and_skip, settings=settings)})


def test_demo_saves_what_it_measured(small_demo):
    folder, result = small_demo
    saved = json.loads((folder / "demo.json").read_text())
    assert saved == json.loads(json.dumps(result))
    assert saved["boost_and_skip"]["settings"]["num_samples"] == 20
    for row, gamma in zip(saved["boost_and_skip"]["rows"], (1.0, 4.0), strict=True):
        assert row["gamma"] == gamma
        assert 0 <= row["recognised"] <= 1 and 0 <= row["inside"] <= 1
        assert min(row[name] for name in ("knn_distance", "lof", "rarity", "frechet", "seconds_per_image")) > 0
    plain, boosted = saved["boost_and_skip"]["rows"]
    assert boosted["knn_distance"] > plain["knn_distance"]


def test_demo_draws_a_panel_for_each_gamma(small_demo):
    picture = np.asarray(Image.open(small_demo[0] / "boost_and_skip.png"))
    half = picture.shape[1] // 2
    for panel in (picture[48:, :half], picture[48:, half:]):
        assert (panel < 128).mean() > 0.02  # ink of digits
    assert Image.open(small_demo[0] / "boost_and_skip_metrics.png").width > 500


def test_demo_without_extras_leaves_out_what_needs_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(boost_and_skip, "find_spec", lambda name: None)
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    settings = BoostAndSkipSettings(gammas=(2.0,), num_inference_steps=4, num_samples=10)
    result = run_boost_and_skip(tmp_path, "cpu", Console(), settings)
    assert "lof" not in result["rows"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["boost_and_skip.png"] == result["files"]
    assert 'pip install "diffusers_ext[metrics]"' in capsys.readouterr().out


def test_grid_is_row_by_row_ink_on_white():
    images = torch.zeros(6, 1, 2, 2)
    images[1] = 1
    pixels = np.asarray(grid(images, columns=3, scale=1))
    assert pixels.shape == (4, 6)
    assert (pixels[:2, 2:4] == 0).all() and (pixels == 255).sum() == 20


def test_guidance_section_counts_rows_and_draws_three_panels(tmp_path, capsys):
    settings = GuidanceIntervalSettings(num_inference_steps=4, num_samples=20, sigma_lo=0.0, sigma_hi=1.0)
    result = run_guidance_interval(tmp_path, "cpu", Console(width=120), settings)
    plain, everywhere, interval = result["rows"]
    assert (plain["rows_per_image"], everywhere["rows_per_image"]) == (4, 8)
    assert 4 < interval["rows_per_image"] < 8
    for row in result["rows"]:
        assert 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1 and row["frechet"] > 0
    assert len({row["frechet"] for row in result["rows"]}) == 3
    assert json.loads(json.dumps(result)) == result
    picture = np.asarray(Image.open(tmp_path / result["files"][0]))
    for panel in np.array_split(picture[48:], 3, axis=1):
        assert (panel < 128).mean() > 0.02  # ink of digits
    assert "weight 2 in (0, 1]" in capsys.readouterr().out
