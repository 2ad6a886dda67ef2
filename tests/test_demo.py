"""The sections of `diffusers-ext demo`, with few steps and images."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image
from rich.console import Console

from diffusers_ext import (
    CTMCScheduler,
    DiscreteDiffusionPipeline,
    FlowPostprocessingPipeline,
    SEDDTransformer,
    demo,
    evaluation,
)
from diffusers_ext.demo import boost_and_skip, jump_your_steps
from diffusers_ext.demo.boost_and_skip import BoostAndSkipSettings, run_boost_and_skip
from diffusers_ext.demo.discrete import DiscreteSettings, run_discrete
from diffusers_ext.demo.flow_postprocessing import FlowPostprocessingSettings, run_flow_postprocessing
from diffusers_ext.demo.guidance_interval import GuidanceIntervalSettings, run_guidance_interval
from diffusers_ext.demo.jump_your_steps import JumpYourStepsSettings, run_jump_your_steps
from diffusers_ext.demo.report import MEDIA_TYPES
from diffusers_ext.demo.tables import distance_of_real_images, errors_row
from diffusers_ext.discrete.music import NUM_TOKENS
from diffusers_ext.evaluation import evaluate_digits
from diffusers_ext.evaluation.pictures import grid, places_stacked, sequences_picture, stacked
from diffusers_ext.sampling import sample_images
from diffusers_ext.shipped import load_pipeline


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    settings = BoostAndSkipSettings(
        gammas=(1.0, 4.0), skip_steps=1, num_inference_steps=12, num_samples=20, metrics=None
    )
    return folder, demo.run_demo(folder, "cpu", {"boost_and_skip": partial(run_boost_and_skip, settings=settings)})


@pytest.mark.slow
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
    last = saved["boost_and_skip"]["table"]["rows"][-1]
    largest = max(row["knn_distance_error"] for row in (plain, boosted))
    assert (last[0], last[2]) == ("± at most", f"{largest:.3f}") and largest > 0


def test_demo_draws_a_panel_for_each_gamma(small_demo):
    picture = np.asarray(Image.open(small_demo[0] / "boost_and_skip.png"))
    half = picture.shape[1] // 2
    for panel in (picture[48:, :half], picture[48:, half:]):
        assert (panel < 128).mean() > 0.02  # ink of digits
    assert Image.open(small_demo[0] / "boost_and_skip_metrics.png").width > 500
    boxes = small_demo[1]["boost_and_skip"]["pictures"]["boost_and_skip.png"]
    assert list(boxes) == ["stock sampler", "gamma 4, skip 1"]
    for left, top, right, bottom in boxes.values():
        assert (right - left, bottom - top) == (10 * 28 * 2, 2 * 28 * 2)  # twenty digits at twice their size
        assert (picture[top:bottom, left:right] < 128).mean() > 0.02


@pytest.mark.slow
def test_demo_leaves_a_report_after_each_section(tmp_path):
    def fails(output, device, console):
        assert "Not run yet: guidance interval" in (output / "report.html").read_text()
        raise KeyboardInterrupt

    settings = BoostAndSkipSettings(gammas=(1.0,), num_inference_steps=2, num_samples=10)
    first = partial(run_boost_and_skip, settings=settings)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, "cpu", {"boost_and_skip": first, "guidance_interval": fails})
    saved = json.loads((tmp_path / "demo.json").read_text())
    assert list(saved["boost_and_skip"]["pictures"]) == ["boost_and_skip.png"]
    assert "data:image/png" in (tmp_path / "report.html").read_text()


def test_full_sections_are_the_same_with_more_to_do(monkeypatch, tmp_path):
    assert list(demo.FULL_SECTIONS) == list(demo.SECTIONS)
    for name, full in demo.FULL_SECTIONS.items():
        assert full.func is demo.SECTIONS[name]
        more = {key for key in vars(full.keywords["settings"]) if key.startswith(("num_", "chorale_steps"))}
        short = type(full.keywords["settings"])()
        for key in more:
            assert getattr(full.keywords["settings"], key) > getattr(short, key), (name, key)
    called = []
    for name, number in (("SECTIONS", 1), ("FULL_SECTIONS", 2)):
        section = partial(
            lambda output, device, console, number: called.append(number) or {"files": []}, number=number
        )
        monkeypatch.setattr(demo, name, {"seen": section})
    result = demo.run_demo(tmp_path, "cpu")
    assert called == [1] and result["full"] is False
    assert "This is the short demo" in (tmp_path / "report.html").read_text()
    assert demo.run_demo(tmp_path, "cpu", full=True)["full"] is True and called == [1, 2]
    assert "short demo" not in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_first_picture_is_there_before_the_rest_is_drawn(tmp_path, monkeypatch):
    """And the digits are those that one call would have drawn."""
    drawn, pictures = [], []

    def seen(pipe, labels, seed, **call):
        pictures.append((tmp_path / "boost_and_skip.png").exists())
        drawn.append((len(labels), labels[0].item(), seed))
        return sample_images(pipe, labels, seed, **call)

    monkeypatch.setattr(boost_and_skip, "sample_images", seen)
    settings = BoostAndSkipSettings(gammas=(1.0, 2.0), num_inference_steps=2, num_samples=34, metrics=("frechet",))
    result = run_boost_and_skip(tmp_path, "cpu", Console(), settings)
    assert drawn == [(30, 0, 0), (30, 0, 0), (4, 0, 30), (4, 0, 30)] and pictures == [False, False, True, True]
    whole = sample_images(load_pipeline("mnist-unet", "boost-and-skip"), torch.arange(34) % 10, num_inference_steps=2)
    number = evaluate_digits(whole, torch.arange(34) % 10, ["frechet"])["frechet"]
    assert result["rows"][0]["frechet"] == pytest.approx(number, rel=1e-2)


def test_tables_say_how_far_their_numbers_bear():
    rows = [{"a": 1.0, "a_error": 0.2, "b": 3.0}, {"a": 2.0, "a_error": 0.1, "b": 4.0, "b_error": None}]
    assert errors_row(rows, ("a", "b"), lambda name, value: f"{name}{value:.2f}") == ["± at most", "a0.20", ""]
    few, many = (float(distance_of_real_images(n).split()[-1][:-1]) for n in (50, 1000))
    assert few > 5 * many > 0


def test_demo_without_extras_leaves_out_what_needs_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(boost_and_skip, "find_spec", lambda name: None)
    monkeypatch.setattr(evaluation.evaluate, "find_spec", lambda name: None)
    settings = BoostAndSkipSettings(gammas=(2.0,), num_inference_steps=4, num_samples=10, metrics=None)
    result = run_boost_and_skip(tmp_path, "cpu", Console(), settings)
    assert "lof" not in result["rows"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["boost_and_skip.png"] == result["files"]
    assert "it needs scikit-learn" in " ".join(capsys.readouterr().out.split())


def test_grid_is_row_by_row_ink_on_white():
    images = torch.zeros(6, 1, 2, 2)
    images[1] = 1
    pixels = np.asarray(grid(images, columns=3, scale=1))
    assert pixels.shape == (4, 6)
    assert (pixels[:2, 2:4] == 0).all() and (pixels == 255).sum() == 20


def test_grid_shows_colours_as_they_are():
    images = torch.zeros(2, 3, 2, 1)
    images[1, :, 0, 0] = torch.tensor([1.0, 0.0, 0.2])
    pixels = np.asarray(grid(images, columns=2, scale=1))
    assert pixels.shape == (2, 2, 3) and pixels[0, 1].tolist() == [255, 0, 51] and pixels.sum() == 306


@pytest.mark.slow
def test_guidance_section_counts_rows_and_draws_three_panels(tmp_path, capsys):
    settings = GuidanceIntervalSettings(
        further_scales=(2.0,), num_inference_steps=4, num_samples=20, sigma_lo=0.0, sigma_hi=1.0
    )
    result = run_guidance_interval(tmp_path, "cpu", Console(width=120), settings)
    plain, everywhere, interval, *further = result["rows"]
    assert [(row["guidance_scale"], row["limited"]) for row in further] == [(2, False), (2, True)]
    assert (plain["rows_per_image"], everywhere["rows_per_image"]) == (4, 8)
    assert 4 < interval["rows_per_image"] < 8
    for row in result["rows"]:
        assert 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1 and row["frechet"] > 0
    assert len({row["frechet"] for row in result["rows"]}) == 5
    assert len(result["pictures"]["guidance_interval.png"]) == 3
    assert json.loads(json.dumps(result))["rows"] == result["rows"]
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


@pytest.mark.slow
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
    assert "20 sequences a row" in printed and "chorales: 3 of 32 steps" in printed
    assert {Path(name).suffix for name in result["files"]} <= {".png", *MEDIA_TYPES}  # which the report can hold
    texts = (tmp_path / "out/texts.txt").read_text()
    assert texts in printed and texts.count("== ") == 5 and "== 64 steps, by the table" in texts
    between = texts.split("== 64 steps, by the table, between 'O Romeo,' and ' to die.'\n")[1].strip()
    assert between.startswith("O Romeo,") and between.endswith(" to die.")


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


def test_jump_your_steps_section_needs_no_matplotlib(tmp_path, sequence_models, monkeypatch):
    monkeypatch.setattr(jump_your_steps, "find_spec", lambda name: None)
    settings = JumpYourStepsSettings(
        sequence_models["countdown_model"], steps=(2,), grid_size=4, num_search=1, num_samples=2
    )
    result = run_jump_your_steps(tmp_path, "cpu", Console(), settings)
    assert result["files"] == [] and not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_flow_section_measures_before_and_after(tmp_path, capsys):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    sizes = {"sample_size": 28, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DModel(**blocks, **sizes, num_class_embeds=10)
    FlowPostprocessingPipeline(unet, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "flow")
    (tmp_path / "out").mkdir()
    settings = FlowPostprocessingSettings(str(tmp_path / "flow"), (1.0, 4.0), num_inference_steps=3, num_samples=20)
    result = run_flow_postprocessing(tmp_path / "out", "cpu", Console(width=120), settings)
    assert [(row["guidance_scale"], row["repaired"]) for row in result["rows"]] == [
        (1, False), (1, True), (4, False), (4, True)
    ]  # fmt: skip
    assert len({row["frechet"] for row in result["rows"]}) == 4  # the untrained flow changes the digits
    assert list(result["pictures"]["flow_postprocessing.png"]) == [row["title"] for row in result["rows"]]
    assert "guidance 4, repaired" in capsys.readouterr().out


def test_cells_of_sequences():
    tokens, marked = torch.tensor([[0, 31], [31, 0]]), torch.tensor([[False, True], [False, False]])
    pixels = np.asarray(sequences_picture(tokens, 32, marked, width=4, height=2))
    assert pixels.shape == (4, 8, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[0, 7].tolist() == [13, 44, 92]
    assert pixels[1, 4].tolist() == pixels[1, 5].tolist() == [220, 30, 30] and (pixels == 220).sum() == 4
    panels = {"one": Image.new("RGB", (30, 10), "red"), "two": Image.new("RGB", (20, 5), "blue")}
    canvas = stacked(panels, margin=10)
    assert places_stacked(panels, margin=10) == {"one": [10, 30, 40, 40], "two": [10, 80, 30, 85]}
    assert canvas.size == (50, 95) and canvas.getpixel((10, 30)) == (255, 0, 0) and canvas.getpixel((10, 80))[2] == 255
