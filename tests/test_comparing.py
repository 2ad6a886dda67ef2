"""Grids of settings: each cell is what the methods themselves draw, is drawn once, and survives an interruption."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AdaptiveProjectedGuidance, DDIMScheduler, DDPMPipeline
from PIL import Image
from tiny_guided_pipelines import CASES
from tiny_pipelines import tiny_sdxl, tiny_stable_diffusion

from diffusers_ext import GuidanceInterval, apply_guider, boost_and_skip, remove_guider
from diffusers_ext.cli import main
from diffusers_ext.comparing import AXES, compare
from diffusers_ext.comparing.drawing import Painter
from diffusers_ext.comparing.settings import Settings
from diffusers_ext.evaluation.pictures import labelled_grid
from diffusers_ext.sampling import sample_to_folder
from diffusers_ext.shipped import load_pipeline

STEPS = {"num_inference_steps": 4}
FOUR = {"class_labels": [3], "seeds": [0, 1], "guidance_scales": [1, 4], **STEPS}


@pytest.fixture(scope="module")
def digits():
    return load_pipeline("mnist-unet")


def pixels(cell) -> np.ndarray:
    return np.asarray(cell.image)


def drawn_by(pipe, seed: int, **call) -> np.ndarray:
    """The pipeline's own answer as the folder's files would hold it."""
    generator = [torch.Generator().manual_seed(seed)]
    images = pipe(generator=generator, output_type="pt", **call).images
    return (images * 255).round().clamp(0, 255).byte()[0].permute(1, 2, 0).numpy().squeeze()


def contents(folder) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "seconds.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_cells_are_what_the_pipeline_draws(digits):
    found = compare(
        digits, class_labels=[3, 8], seeds=7, guidance_scales=[1, 4], guidance_intervals=[None, (0.5, 3.0)],
        gammas=3, skip_steps=1, **STEPS,
    )  # fmt: skip
    assert [(cell.row, cell.column) for cell in found.cells] == [(i, j) for i in range(4) for j in range(2)]
    for cell in found.cells:
        asked = cell.settings
        call = {**STEPS, "class_labels": [asked.class_label], "guidance_scale": asked.guidance_scale}
        if asked.guidance_interval is None:
            expected = drawn_by(digits, 7, **call, gamma=3.0, skip_steps=1)
        else:
            with GuidanceInterval(digits, sigma_lo=0.5, sigma_hi=3.0):
                expected = drawn_by(digits, 7, **call, gamma=3.0, skip_steps=1)
        np.testing.assert_array_equal(pixels(cell), expected)
        assert cell.seconds > 0 and cell.file == ""
    rows = [cell.network_rows for cell in found.cells[::2]]
    assert rows[:3] == [3, 3, 6] and 3 < rows[3] < 6  # of three steps, each guided one has a second row
    assert found.drawn == 6  # weight 1 in an interval is weight 1
    assert found.table.count("\n") == 9


@pytest.mark.parametrize("build", [tiny_stable_diffusion, tiny_sdxl])
def test_text_to_image_through_scheduler_and_guiders(build):
    pipe = build()
    own = pipe.scheduler
    settings = {"guidance_scales": 5.0, "guiders": ["cfg", "apg"], "gammas": [1, 2], "skip_steps": 1}
    found = compare(pipe, "a cat", seeds=3, guidance_intervals=(0.5, 8.0), negative_prompt="dog", **settings, **STEPS)
    assert pipe.scheduler is own and not hasattr(pipe, "_guidance_interval")
    for cell in found.cells:
        pipe.scheduler = boost_and_skip(own, gamma=cell.settings.gamma, skip_steps=1)
        call = {"prompt": ["a cat"], "negative_prompt": ["dog"], "guidance_scale": 5.0, **STEPS}
        if cell.settings.guider == "cfg":
            with GuidanceInterval(pipe, sigma_lo=0.5, sigma_hi=8.0):
                expected = drawn_by(pipe, 3, **call)
        else:
            apply_guider(pipe, AdaptiveProjectedGuidance(5.0, eta=0.0), sigma_lo=0.5, sigma_hi=8.0)
            expected = drawn_by(pipe, 3, **call)
            remove_guider(pipe)
        np.testing.assert_array_equal(pixels(cell), expected)
    assert len({pixels(cell).tobytes() for cell in found.cells}) == 4
    pipe.scheduler = own
    stock = compare(pipe, "a cat", gammas=1, skip_steps=0, **STEPS).cells[0]
    np.testing.assert_array_equal(pixels(stock), drawn_by(pipe, 0, prompt=["a cat"], **STEPS))


def test_true_guidance_of_flux_gets_a_negative_prompt():
    pipe = CASES["flux"]().pipe
    painter = Painter(pipe, {})
    assert painter.weight == "true_cfg_scale" and not painter.is_guided(None) and painter.is_guided(4.0)
    assert painter._inputs(Settings(prompt="a")) == {"prompt": ["a"], "negative_prompt": [""]}
    with pytest.raises(ValueError, match=r"guidance_interval: FluxPipeline is not guided at true_cfg_scale=1.0"):
        compare(pipe, "a", guidance_intervals=[(1.0, 2.0)])
    with pytest.raises(ValueError, match=r"gamma: .*FlowMatchEulerDiscreteScheduler is not one"):
        compare(pipe, "a", gammas=2.0)


@pytest.mark.slow
def test_an_interrupted_comparison_ends_with_the_same_bytes(tmp_path, digits):
    compare(digits, **FOUR, output=tmp_path / "whole")

    def stop(image, images, steps):
        assert images == 4
        if (image, steps) == (2, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(digits, **FOUR, output=tmp_path / "cut", on_step=stop)
    assert not (tmp_path / "cut/grid.png").exists() and len(list((tmp_path / "cut/images").iterdir())) == 2
    (tmp_path / "cut/images/.unfinished-1-000002.png").write_bytes(b"half")
    seconds = json.loads((tmp_path / "cut/seconds.json").read_text())
    assert compare(digits, **FOUR, output=tmp_path / "cut").drawn == 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert seconds.items() <= json.loads((tmp_path / "cut/seconds.json").read_text()).items()

    again = compare(digits, **FOUR, output=tmp_path / "cut")
    assert again.drawn == 0
    (tmp_path / "cut/images/000001.png").write_bytes(b"damaged")
    (tmp_path / "cut/images/000003.png").unlink()
    (tmp_path / "cut/grid.png").unlink()
    assert compare(digits, **FOUR, output=tmp_path / "cut").drawn == 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    for cell, kept in zip(compare(digits, **FOUR).cells, again.cells, strict=True):
        np.testing.assert_array_equal(pixels(cell), pixels(kept))
        assert cell.settings == kept.settings and cell.network_rows == kept.network_rows


def test_a_folder_tells_its_settings_and_keeps_to_them(tmp_path, digits):
    found = compare(digits, **FOUR, output=tmp_path / "out")
    kept = json.loads((tmp_path / "out/comparison.json").read_text())
    assert [cell["settings"] for cell in kept["cells"]] == [cell.settings.given() for cell in found.cells]
    assert [cell["file"] for cell in kept["cells"]] == [cell.file for cell in found.cells]
    assert [image["network_rows"] for image in kept["images"].values()] == [4, 4, 8, 8]
    for cell in found.cells:
        chunk = json.loads(Image.open(tmp_path / "out" / cell.file).text["settings"])
        assert {**chunk, **cell.settings.given()} == chunk and chunk["call"] == STEPS and chunk["dtype"]
    grid = json.loads(Image.open(tmp_path / "out/grid.png").text["settings"])
    assert grid["axes"]["guidance_scale"] == [1.0, 4.0] and grid["axes"]["seed"] == [0, 1]
    with pytest.raises(ValueError, match=r"other settings: axes.guidance_scale.*4.0 before, 5.0 now"):
        compare(digits, **{**FOUR, "guidance_scales": [1, 5]}, output=tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(ValueError, match="not empty"):
        compare(digits, **FOUR, output=tmp_path / "other")


REFUSED = {
    "prompt twice": ({"prompt": ["a", "a"]}, "prompt: 'a' is there more than once"),
    "prompt": ({"prompt": "a"}, "does not take prompt"),
    "class": ({"class_labels": [3, 17]}, r"class_label: class labels must be in \[0, 9\]"),
    "scale": ({"guidance_scales": [1.0, float("nan")]}, "guidance_scale: must be a finite number, got nan"),
    "no guidance": ({"guidance_intervals": [(1, 2)]}, "guidance_interval: .* not guided at guidance_scale=1.0"),
    "weight 1": ({"guidance_scales": 1, "guiders": "apg"}, "guider: .* not guided at guidance_scale=1.0"),
    "interval": ({"guidance_scales": 2, "guidance_intervals": [(2, 1)]}, "sigma_lo < sigma_hi"),
    "guider": ({"guidance_scales": 2, "guiders": ["cfg", "none"]}, "guider: must be one of cfg, apg"),
    "gamma": ({"gammas": [1, 0]}, "gamma: must be > 0, got 0"),
    "skip": ({"skip_steps": [0, 4]}, "skip_steps: skip_steps=4 must be smaller"),
    "both skips": ({"skip_steps": 1, "skip_to_sigma": 2.0}, "both say where the sampler starts"),
    "sigma": ({"skip_to_sigma": 1e9}, "skip_to_sigma: .* outside of the noise levels"),
    "columns": ({"columns": ("sigma",)}, "columns must be among prompt"),
    "size": ({"height": 64}, "does not take height"),
    "empty": ({"seeds": []}, "seed: give at least one value"),
    "seed": ({"seeds": [-1]}, "seed: must be >= 0 .*got -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_pipeline_does_not_take_is_refused_before_the_work(tmp_path, digits, monkeypatch, name):
    arguments, message = REFUSED[name]
    monkeypatch.setattr(digits.unet, "forward", None)  # nothing can be drawn
    with pytest.raises(ValueError, match=message):
        compare(digits, **{**STEPS, **arguments}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_kinds_of_pipelines(digits):
    for build, arguments, message in (
        (lambda: tiny_stable_diffusion(), {}, "needs a prompt"),
        (lambda: load_pipeline("countdown-sedd"), {}, "makes no images"),
        (lambda: CASES["wan"]().pipe, {"prompt": "a"}, "makes no images"),
        (lambda: CASES["dit"]().pipe, {"gammas": 2.0}, "gamma: DiTPipeline does not take gamma"),
        (lambda: load_pipeline("mnist-edm2"), {"guidance_scales": 2, "guiders": "apg"}, "guider: EDM2Pipeline"),
        (lambda: DDPMPipeline(digits.unet, digits.scheduler), {"guidance_scales": 2}, "guidance_scale: DDPM"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(build(), **arguments)
    with GuidanceInterval(digits, sigma_lo=1.0), pytest.raises(ValueError, match="in force"):
        compare(digits)


def test_rows_of_a_transformer_and_of_an_argument_of_the_call():
    dit = compare(CASES["dit"]().pipe, guidance_scales=[1, 4], guidance_intervals=[None, (0.5, 5.0)], **STEPS)
    assert [cell.network_rows for cell in dit.cells][:3] == [4, 4, 8] and 4 < dit.cells[3].network_rows < 8
    edm2 = compare(load_pipeline("mnist-edm2"), guidance_scales=2, guidance_intervals=[None, (0.1, 20)], **STEPS)
    everywhere, inside = (cell.network_rows for cell in edm2.cells)
    assert everywhere == 14 and 7 < inside < 14  # Heun of 4 steps: 7 evaluations, each of two networks


def test_axes_may_change_sides(digits):
    found = compare(digits, **{**FOUR, "class_labels": [3]}, columns=("guidance_scale",))
    assert [(cell.row, cell.column, cell.settings.seed) for cell in found.cells] == [
        (0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1),
    ]  # fmt: skip
    assert set(asdict(found.cells[0].settings)) == set(AXES)


def test_labelled_grid_holds_every_picture_under_its_names():
    colours = [["red", "lime"], ["blue", "black"]]
    cells = [[Image.new("RGB", (200, 100), colour) for colour in row] for row in colours]
    grid = np.asarray(labelled_grid(cells, ["a", "b"], ["one", "two"], "title"))
    places = [
        np.argwhere((grid == np.array(Image.new("RGB", (1, 1), c))[0, 0]).all(-1)) for c in ("red", "lime", "blue")
    ]
    red, lime, blue = (place.min(axis=0) for place in places)
    assert [len(place) for place in places] == [200 * 100] * 3
    assert red[0] == lime[0] < blue[0] and red[1] == blue[1] < lime[1]
    assert (grid[: red[0]] < 128).any() and (grid[:, : red[1]] < 128).any()  # names above and at the left


@pytest.mark.slow
def test_command(tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "model")
    grid = ("--seeds", "0,1", "--guidance-scales", "5", "16", "--guidance-intervals", "none,0.28:5.42")
    how = ("--num-inference-steps", 4, "--dtype", "bfloat16", "--device", "cpu")
    words = ("compare", tmp_path / "model", "--prompt", "a cat", *grid, *how)

    def run(*more):
        return CliRunner().invoke(main, [str(word) for word in (*words, *more, "--output", tmp_path / "out")])

    first, second = run(), run()
    assert first.exit_code == 0 and "8 images drawn by this start" in first.output, first.output
    assert second.exit_code == 0 and "finished before" in second.output, second.output
    kept = json.loads((tmp_path / "out/comparison.json").read_text())
    assert kept["settings"]["dtype"] == "torch.bfloat16" and len(kept["cells"]) == 8
    for more, message in (
        (("--guidance-intervals", "5:1"), "neither"),
        (("--guidance-intervals", "all"), "neither"),
        (("--guiders", "cfg,foo"), "'foo' is none of cfg, apg"),
        (("--offload", "model"), "on a CPU leave it out"),
        (("--seeds", "0,x"), "not integers"),
        (("--seeds", "0,-1"), "seed: must be >= 0"),
        (("--seeds", "1,1"), "more than once"),
        (("--gammas", "0"), "gamma: must be > 0"),
        (("--guidance-scales", "nan"), "guidance_scale: must be a finite number"),
        (("--skip-steps", "1", "--skip-to-sigma", "3"), "give one"),
    ):
        refused = run(*more)
        assert refused.exit_code == 2 and message in refused.output, refused.output


def test_sample_boosts_text_to_image_through_the_scheduler(tmp_path):
    pipe = tiny_stable_diffusion()
    boost = {"gamma": 2.0, "skip_steps": 1}
    sample_to_folder(pipe, tmp_path / "out", 1, prompts=["a cat"], seed=5, **boost, **STEPS)
    assert type(pipe.scheduler) is DDIMScheduler
    assert json.loads((tmp_path / "out/manifest.json").read_text())["settings"]["call"] == {**boost, **STEPS}
    pipe.scheduler = boost_and_skip(pipe.scheduler, **boost)
    expected = drawn_by(pipe, 5, prompt=["a cat"], **STEPS)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/000000.png")), expected)
    with pytest.raises(ValueError, match="skip_steps=4 must be smaller"):
        sample_to_folder(tiny_stable_diffusion(), tmp_path / "no", 1, prompts=["a"], skip_steps=4, **STEPS)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline with .*vae.*leave the pipeline out"):
        load_pipeline(str(tmp_path / "model"), "boost-and-skip")
