"""Tuning of a guidance interval: the objective is what its parts give by hand; the command goes on, and refuses."""

import json

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_guided_pipelines import CASES
from tiny_pipelines import tiny_sdxl

from diffusers_ext import GuidanceInterval
from diffusers_ext.cli import main
from diffusers_ext.evaluation import FeatureExtractor, load_extractor
from diffusers_ext.guidance.rows import counted_rows
from diffusers_ext.guidance.search import GuidedSteps
from diffusers_ext.guidance.tuning import Objective, reference_statistics, step_sigmas, tune_interval
from diffusers_ext.metrics import feature_statistics, frechet_distance
from diffusers_ext.sampling import sample_batches
from diffusers_ext.shipped import load_pipeline, load_shipped_classifier

LABELS = torch.arange(12) % 10
STEPS = 4


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline("mnist-unet", "boost-and-skip")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quarters(images):
    """(batch, 4): the mean of each quarter of a digit."""
    grey = torch.tensor(images)[..., 0].double() / 255
    return grey.reshape(-1, 2, 14, 2, 14).mean((2, 4)).flatten(1)


EXTRACTOR = FeatureExtractor("quarters", "quarters", quarters)
REFERENCE = (np.full(4, 0.2), np.eye(4) * 0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "last"), [(0, STEPS - 1), (1, 2), (3, 3)])
def test_the_objective_by_hand(pipe, first, last):
    objective = Objective(pipe, EXTRACTOR, REFERENCE, LABELS, STEPS, seed=5, batch_size=5)
    call = {"guidance_scale": 3.0, "num_inference_steps": STEPS, "output_type": "np"}
    with GuidanceInterval(pipe, guided_steps=(first, last)) as interval:
        images = np.concatenate(list(sample_batches(pipe, len(LABELS), LABELS, 5, 5, **call)))
        assert interval.report.guided_steps == list(range(first, last + 1))
    statistics = feature_statistics(quarters((images * 255).round().astype(np.uint8)))
    expected = frechet_distance(statistics.mean, statistics.covariance, *REFERENCE)
    assert objective(GuidedSteps(3.0, first, last)) == pytest.approx(expected, rel=1e-6)


def test_sigmas_are_those_of_the_schedule(pipe):
    sigmas = step_sigmas(pipe, LABELS[:1], STEPS)
    pipe.scheduler.set_timesteps(STEPS)
    alphas = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double()
    assert sigmas == pytest.approx([*((1 - alphas) / alphas).sqrt().tolist(), 0.0], rel=1e-5)


@pytest.mark.slow
def test_tuning_goes_on_and_keeps_its_settings(pipe, tmp_path):
    drawn = []

    def tune(seed=0, reference=REFERENCE):
        return tune_interval(
            pipe, EXTRACTOR, reference, [2.0], LABELS, tmp_path, STEPS, seed, 6, lambda c, n: drawn.append(c)
        )

    found = tune()
    rows = json.loads((tmp_path / "interval.json").read_text())["candidates"]
    assert rows[0]["distance"] == min(row["distance"] for row in rows) == found.distances[found.best_interval]
    assert all(row["sigma_hi"] is None or row["sigma_lo"] < row["sigma_hi"] for row in rows)
    before = len(drawn)
    assert tune() == found and len(drawn) == before
    with pytest.raises(ValueError, match="other settings: seed: 0 before, 1 now"):
        tune(seed=1)
    with pytest.raises(ValueError, match="other settings: reference: "):
        tune(reference=(np.full(4, 0.3), np.eye(4) * 0.01))
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1)
    try:
        with pytest.raises(ValueError, match=r"other settings: components\.unet\.sha256: "):
            tune()
    finally:
        with torch.no_grad():
            pipe.unet.conv_out.bias.sub_(1)


def test_reference_statistics(tmp_path):
    classifier, reference = load_extractor("classifier", device="cpu"), load_shipped_classifier()[1]
    assert torch.equal(reference_statistics(None, classifier)[0], reference.mean)
    images = (np.random.default_rng(0).random((9, 28, 28, 1)) * 255).astype(np.uint8)
    np.savez(tmp_path / "real.npz", images)
    mean, covariance = reference_statistics(tmp_path / "real.npz", EXTRACTOR, batch_size=4)
    np.testing.assert_allclose(mean, quarters(images).mean(0))
    np.testing.assert_allclose(covariance, np.cov(quarters(images).numpy().T))
    np.savez(tmp_path / "given.npz", mu=mean, sigma=covariance)
    np.testing.assert_array_equal(reference_statistics(tmp_path / "given.npz", EXTRACTOR)[1], covariance)
    with pytest.raises(ValueError, match="a reference is needed for quarters"):
        reference_statistics(None, EXTRACTOR)


def brightness(images, inputs):
    """A score of somebody's: one number an image, which depends on its prompt too."""
    assert len(images) == len(inputs["prompt"])
    bonus = torch.tensor([float(len(prompt)) for prompt in inputs["prompt"]])
    return images.float().mean((1, 2, 3)) + 0.01 * bonus


PROMPTS = {"prompt": ["a cat", "two dogs", "a bird"], "negative_prompt": [""] * 3}


def text_to_image(folder, memory, pipe=None, score=brightness, **options):
    pipe = pipe or tiny_sdxl()
    call = {"height": 32, "width": 32}
    return tune_interval(pipe, score, None, [2.0, 5.0], PROMPTS, folder, 4, 1, 2, call=call, memory=memory, **options)


def digits(folder, memory, pipe):
    return tune_interval(pipe, EXTRACTOR, REFERENCE, [1.5, 2.0], LABELS[:3], folder, 4, 3, 2, memory=memory)


def files(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize(("tune", "steps", "little"), [(text_to_image, 4, 100_000), (digits, 4, 150_000)])
def test_what_is_remembered_changes_no_bit_and_saves_evaluations(tune, steps, little, pipe, tmp_path):
    """Also in a memory that holds a part of it alone; rows are those that the networks have seen."""
    pipe = tiny_sdxl() if tune is text_to_image else pipe
    pipe.set_progress_bar_config(disable=True)
    rows = {}
    for name, memory in {"none": 0, "little": little, "enough": 1 << 28}.items():
        with counted_rows(pipe) as counted:
            found = tune(tmp_path / name, memory, pipe=pipe)
        rows[name] = found.rows_run
        assert sum(counted) - found.rows_run == steps + 1  # of the call that shows the noise levels
    assert rows["enough"] < 0.65 * rows["none"] and rows["enough"] < rows["little"] < rows["none"]
    assert found.rows_asked == rows["none"]
    assert files(tmp_path / "none") == files(tmp_path / "little") == files(tmp_path / "enough")
    result = json.loads((tmp_path / "none/interval.json").read_text())
    for row in result["candidates"]:
        assert row["network_rows"] == 3 * (steps + row["last"] - row["first"] + 1)


@pytest.mark.slow
def test_the_distance_by_a_score_of_one_s_own_is_minus_its_mean(tmp_path):
    found = text_to_image(tmp_path / "out", 0)
    pipe, best = tiny_sdxl(), found.best_interval
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "num_inference_steps": 4, "output_type": "pt"}
    call["guidance_scale"] = best.guidance_scale
    scores = []
    with GuidanceInterval(pipe, guided_steps=(best.first, best.last)):
        for rows in (slice(0, 2), slice(2, 3)):
            batch = {name: values[rows] for name, values in PROMPTS.items()}
            generators = [torch.Generator().manual_seed(1 + i) for i in range(3)[rows]]
            scores += brightness(pipe(**batch, **call, generator=generators).images, batch).tolist()
    assert found.distances[best] == pytest.approx(-np.mean(scores), rel=1e-5)
    with pytest.raises(ValueError, match="begun with other settings: score: 'brightness' before, 'darkness' now"):
        text_to_image(tmp_path / "out", 0, score=darkness)


def darkness(images, inputs):
    return -brightness(images, inputs)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda images, inputs: images.mean((1, 2, 3))[:1], "one number an image, 2, got shape"),
        (lambda images, inputs: torch.full((len(images),), float("nan")), "scores must be finite"),
        (EXTRACTOR, "reference=None goes with a score function of your own, got FeatureExtractor"),
    ],
)
def test_scores_that_are_none(score, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        text_to_image(tmp_path / "out", 0, score=score)
    for inputs in ({"prompt": "a cat"}, {"prompt": []}, {}, {"prompt": ["a"], "negative_prompt": ["", ""]}):
        with pytest.raises(ValueError, match="inputs must be labels"):
            tune_interval(tiny_sdxl(), brightness, None, [2.0], inputs, tmp_path / "other", 4)
    assert not (tmp_path / "other").exists()


def test_pipelines_with_true_guidance(tmp_path):
    """Whose weight is true_cfg_scale, and whose prompts are given as embeddings."""
    case = CASES["qwen_image"]()
    names = [name for name in case.options if "prompt_embeds" in name]
    inputs = {name: case.options[name] for name in names}
    call = {
        name: value
        for name, value in case.options.items()
        if name not in (*names, "num_inference_steps", "true_cfg_scale", "guidance_scale")
    }
    tune_interval(
        case.pipe, lambda images, inputs: images.flatten(1).mean(1), None, [2.0, 4.0], inputs, tmp_path, 4, call=call
    )
    rows = json.loads((tmp_path / "interval.json").read_text())["candidates"]
    assert len({row["distance"] for row in rows}) == len(rows)  # both weights reach the pipeline


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_going_on_after_any_batch_changes_no_byte(tmp_path):
    """And draws nothing twice that was finished."""
    pipe, seen = tiny_sdxl(), []

    def start(folder, most=None):
        drawn = []

        def on_batch(candidate, done):
            drawn.append((candidate, done))
            if len(drawn) == most:
                raise Stopped

        try:
            text_to_image(folder, 1 << 28, pipe, on_batch=on_batch)
        finally:
            seen.extend(drawn)
        return len(drawn)

    count = start(tmp_path / "whole")
    for most in (1, count // 2, count - 1):
        seen.clear()
        with pytest.raises(Stopped):
            start(tmp_path / str(most), most)
        start(tmp_path / str(most))
        assert len(seen) == count
        assert files(tmp_path / str(most)) == files(tmp_path / "whole")


def test_batches_of_other_settings_are_begun_anew(tmp_path):
    """As long as no distance was kept."""

    def stop(candidate, done):
        raise Stopped

    for seed in (1, 2):
        with pytest.raises(Stopped):
            tune_interval(tiny_sdxl(), brightness, None, [2.0], PROMPTS, tmp_path, 4, seed, 2, stop)
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 1 and len(list(folders[0].iterdir())) == 1


@pytest.mark.slow
def test_the_command_tunes_by_prompts(tmp_path):
    tiny_sdxl().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    np.savez(tmp_path / "real.npz", (np.random.default_rng(0).random((6, 32, 32, 3)) * 255).astype(np.uint8))
    (tmp_path / "features.py").write_text("def means(images):\n    return images.float().mean((2, 3))\n")
    arguments = ["tune-interval", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    arguments += ["--reference", str(tmp_path / "real.npz"), "--features", f"{tmp_path / 'features.py'}:means"]
    arguments += ["--num-samples", "4", "--num-inference-steps", "3", "--guidance-scales", "2"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2 and "give --prompts, a file with one a line" in refused.output
    done = CliRunner().invoke(main, [*arguments, "--prompts", str(tmp_path / "prompts.txt")])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "network rows were run in this start" in said and "0 more were remembered" not in said
    settings = json.loads((tmp_path / "out/interval.json").read_text())["settings"]
    assert settings["inputs"] == {"prompt": ["a cat", "two dogs"] * 2}


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch):
    arguments = ["tune-interval", "mnist-unet", "--pipeline", "boost-and-skip", "--output", str(tmp_path / "out")]
    arguments += ["--num-samples", "20", "--num-inference-steps", "3", "--guidance-scales", "2", "--device", "cpu"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "best interval" in done.output and "best without" in done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"distances.json", "interval.json", "interval.png"}
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0 and "was finished before, nothing to do" in again.output.replace("\n", " ")
    (tmp_path / "out/interval.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0 and not (tmp_path / "out/interval.png").exists()  # which needs matplotlib
    refused = CliRunner().invoke(main, [*arguments, "--seed", "1"])
    assert refused.exit_code == 1 and "seed: 0 before, 1 now" in refused.output
    wrong = CliRunner().invoke(main, [*arguments[:-4], "--guidance-scales", "1,2", "--device", "cpu"])
    assert wrong.exit_code == 1 and "guidance_scales must be numbers > 1" in wrong.output


@pytest.mark.parametrize("name", ["interval.json", "interval.png", "notes.txt"])
@pytest.mark.parametrize("begun", [False, True])
def test_foreign_files_stay(pipe, tmp_path, name, begun):
    """In a folder of somebody's, and beside the distances that a search has kept."""
    if begun:
        if name == "notes.txt":
            pytest.skip("is not written")
        (tmp_path / "distances.json").write_text('{"settings": {}, "distances": {}}')
    (tmp_path / name).write_text('{"mine": 1}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = ["tune-interval", "mnist-unet", "--output", str(tmp_path), "--device", "cpu"]
    for refused in (
        lambda: tune_interval(pipe, EXTRACTOR, REFERENCE, [2.0], LABELS, tmp_path, STEPS),
        lambda: CliRunner().invoke(main, arguments, standalone_mode=False, catch_exceptions=False),
    ):
        with pytest.raises((ValueError, click.ClickException), match=r"is not empty|damaged or of something else"):
            refused()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
