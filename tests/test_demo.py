"""The sections of `diffusers-ext demo`, with few steps and images."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from diffusers_ext import CTMCScheduler, DiscreteDiffusionPipeline, SEDDTransformer, demo, evaluation
from diffusers_ext.cli.train_postprocessing import save_flow
from diffusers_ext.demo import boost_and_skip
from diffusers_ext.demo.boost_and_skip import BoostAndSkipSettings, run_boost_and_skip
from diffusers_ext.demo.discrete import DiscreteSettings, run_discrete
from diffusers_ext.demo.flow_postprocessing import FlowPostprocessingSettings, run_flow_postprocessing
from diffusers_ext.demo.guidance_interval import GuidanceIntervalSettings, run_guidance_interval
from diffusers_ext.demo.jump_your_steps import JumpYourStepsSettings, run_jump_your_steps
from diffusers_ext.demo.pictures import grid, sequences_picture, stacked
from diffusers_ext.flow import velocity_network
from diffusers_ext.music import NUM_TOKENS


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
    assert "weight 3 in (0, 1]" in capsys.readouterr().out


@pytest.fixture
def sequence_models(tmp_path):
    """Folders of untrained models of CountDown and of chorales."""
    folders, sizes = {}, {"hidden_size": 8, "cond_dim": 8, "num_blocks": 1, "num_heads": 2}
    for name, vocab_size in (("countdown_model", 33), ("chorale_model", NUM_TOKENS + 1)):
        model = SEDDTransformer(vocab_size=vocab_size, sequence_length=32, **sizes)
        DiscreteDiffusionPipeline(model, CTMCScheduler(vocab_size=vocab_size)).save_pretrained(tmp_path / name)
        folders[name] = str(tmp_path / name)
    return folders


def test_discrete_section_measures_and_writes_music(tmp_path, sequence_models, capsys):
    (tmp_path / "out").mkdir()
    settings = DiscreteSettings(**sequence_models, countdown_steps=(2, 3), num_countdowns=20, num_chorales=3)
    result = run_discrete(tmp_path / "out", "cpu", Console(width=120), settings)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(result["files"])
    assert [row["steps"] for row in result["rows"]] == [2, 3]
    for row in result["rows"]:
        assert 0.8 < row["strict"] < 1 and row["original"] < 0.6 and row["seconds_per_sequence"] > 0  # of noise
    assert json.loads(json.dumps(result))["rows"] == result["rows"]
    picture = np.asarray(Image.open(tmp_path / "out/countdown.png"))
    assert (picture == (220, 30, 30)).all(-1).mean() > 0.1
    assert Image.open(tmp_path / "out/chorales.png").height > 4 * 3 * 12
    midi = (tmp_path / "out/chorales.mid").read_bytes()
    assert midi[:4] == b"MThd" and midi.count(b"MTrk") == 5
    printed = capsys.readouterr().out
    assert "20 sequences a row" in printed and "chorales: 3 of 64 steps" in printed


def test_jump_your_steps_section_makes_and_measures_tables(tmp_path, sequence_models, capsys):
    (tmp_path / "out").mkdir()
    settings = JumpYourStepsSettings(
        sequence_models["countdown_model"], steps=(2, 4), grid_size=16, num_search=3, num_samples=10
    )
    result = run_jump_your_steps(tmp_path / "out", "cpu", Console(width=120), settings)
    assert [file.name for file in (tmp_path / "out").iterdir()] == result["files"] == ["jump_your_steps.png"]
    for name in ("even", "paper", "ours"):
        assert {n: len(edges) for n, edges in result["tables"][name].items()} == {2: 3, 4: 5}
    assert result["tables"]["ours"][4][-1] > result["tables"]["paper"][4][-1] == 1e-5
    assert [row["steps"] for row in result["rows"]] == [2, 4]
    assert all(0.8 < row[name][0] < 1 for row in result["rows"] for name in ("even", "paper", "ours"))  # of noise
    assert np.asarray(Image.open(tmp_path / "out/jump_your_steps.png")).std() > 10
    assert "10 sequences a number" in capsys.readouterr().out


def test_cells_of_sequences():
    tokens, marked = torch.tensor([[0, 31], [31, 0]]), torch.tensor([[False, True], [False, False]])
    pixels = np.asarray(sequences_picture(tokens, 32, marked, width=4, height=2))
    assert pixels.shape == (4, 8, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[0, 7].tolist() == [13, 44, 92]
    assert pixels[1, 4].tolist() == pixels[1, 5].tolist() == [220, 30, 30] and (pixels == 220).sum() == 4
    canvas = stacked({"one": Image.new("RGB", (30, 10), "red"), "two": Image.new("RGB", (20, 5), "blue")}, margin=10)
    assert canvas.size == (50, 95) and canvas.getpixel((10, 30)) == (255, 0, 0) and canvas.getpixel((10, 80))[2] == 255


def test_flow_section_measures_before_and_after(tmp_path, capsys):
    torch.manual_seed(0)
    flow = velocity_network(torch.zeros(1, 1, 28, 28), num_classes=10, block_out_channels=(8, 8))
    flow.conv_out.weight.data.mul_(8)  # an untrained flow that blurs: something to see
    save_flow(flow, tmp_path / "flow")
    settings = FlowPostprocessingSettings(
        str(tmp_path / "flow"), guidance_scales=(1.0, 4.0), num_inference_steps=4, repair_steps=2, num_samples=20
    )
    result = run_flow_postprocessing(tmp_path, "cpu", Console(width=120), settings)
    assert [row["title"] for row in result["rows"]] == [
        "guidance 1", "guidance 1, repaired", "guidance 4", "guidance 4, repaired"
    ]  # fmt: skip
    assert len({row["knn_distance"] for row in result["rows"]}) == 4
    for row in result["rows"]:
        assert 0 <= row["recognised"] <= 1 and row["frechet"] > 0 and row["seconds_per_image"] > 0
    assert json.loads(json.dumps(result))["rows"] == result["rows"]
    panels = np.array_split(np.asarray(Image.open(tmp_path / result["files"][0]))[48:], 4, axis=1)
    assert all((panel < 128).mean() > 0.02 for panel in panels)  # ink of digits
    assert "guidance 4, repaired" in capsys.readouterr().out
