"""Tuning of a guidance interval: the objective is what its parts give by hand; the command goes on, and refuses."""

import json

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from diffusers_ext import GuidanceInterval
from diffusers_ext.cli import main
from diffusers_ext.evaluation import FeatureExtractor, load_extractor
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
