"""The recipes run, go on after an interruption, and write folders that load."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from diffusers_ext import BoostAndSkipPipeline, DiscreteDiffusionPipeline, ImageClassifier
from diffusers_ext.checkpoints import PRESETS
from diffusers_ext.cli import main

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module, *arguments):
    result = CliRunner().invoke(module.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def data(tmp_path) -> Path:
    """Noise in the layout of mnist.npz."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 64), ("test", 20)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"y_{split}"] = (np.arange(count) % 10).astype(np.uint8)
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path / "mnist.npz"


def test_unet_recipe_resumes_and_saves_a_pipeline(tmp_path, data):
    module = recipe("train_mnist_unet")
    options = ("--data", data, "--output", tmp_path / "out", "--batch-size", 2, "--checkpoint-every", 2)
    run(module, *options, "--steps", 2)
    assert "1 steps in" in run(module, *options, "--steps", 3)
    assert json.loads((tmp_path / "out/checkpoint/step.json").read_text()) == {"step": 3}
    pipe = BoostAndSkipPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[1], num_inference_steps=2, output_type="pt").images.shape == (1, 1, 28, 28)
    weights = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_unet_recipe_interrupted_equals_uninterrupted(tmp_path, data):
    module = recipe("train_mnist_unet")
    for name, stops in (("once", (4,)), ("twice", (2, 4))):
        for stop in stops:
            schedule = ("--batch-size", 2, "--checkpoint-every", 2, "--lr", 1e-3)
            # the learning rate depends on the planned end, so the interruption is played by a smaller `steps`
            # inside the warm-up, where it does not
            run(module, "--data", data, "--output", tmp_path / name, "--steps", stop, *schedule)
    once = load_file(tmp_path / "once/checkpoint/model.safetensors")
    twice = load_file(tmp_path / "twice/checkpoint/model.safetensors")
    for key in once:
        torch.testing.assert_close(once[key], twice[key], atol=1e-6, rtol=1e-5)


def test_label_dropout_and_velocity_target(data):
    module = recipe("train_mnist_unet")
    seen = []

    class Perfect(torch.nn.Module):
        def forward(self, noisy, timesteps, class_labels):
            seen.append(class_labels)
            return type("Output", (), {"sample": torch.zeros_like(noisy)})

    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    images, labels = module.load_images(data)
    assert images.min() >= -1 and images.max() <= 1 and images.shape == (64, 1, 28, 28)
    torch.manual_seed(0)
    loss = module.loss_of(Perfect(), scheduler, images, labels, drop=0.5)
    dropped = (seen[0] == module.NULL_CLASS).double().mean()
    assert 0.3 < dropped < 0.7
    kept = seen[0] != module.NULL_CLASS
    assert torch.equal(seen[0][kept], labels[kept])
    assert 0.2 < loss < 2  # the mean square of sqrt(abar) eps - sqrt(1 - abar) x0 over timesteps


def test_classifier_recipe_saves_reference_features(tmp_path, data, monkeypatch):
    module = recipe("train_mnist_classifier")
    monkeypatch.setattr(module, "REFERENCE_IMAGES", 16)
    output = run(module, "--data", data, "--output", tmp_path / "out", "--epochs", 1, "--batch-size", 16)
    assert "test accuracy" in output
    reference = load_file(tmp_path / "out/reference.safetensors")
    images, labels = module.load_split(data, "train")
    features = module.predict(ImageClassifier.from_pretrained(tmp_path / "out"), images)[1]
    torch.testing.assert_close(reference["features"].float(), features[:16], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(reference["mean"], features.double().mean(0))
    torch.testing.assert_close(reference["covariance"], features.double().T.cov())
    assert reference["labels"].tolist() == labels[:16].tolist()


def test_boost_and_skip_recipe_goes_on_after_the_last_row(tmp_path, monkeypatch):
    module = recipe("boost_and_skip_mnist")
    rows = ("stock sampler", "boost and skip, gamma 4", "guidance 0.5")
    only = [word for row in rows for word in ("--only", row)]
    common = ("--output", tmp_path / "rows.json", "--samples", 10, "--steps", 8)
    output = run(module, *common, *only[:4])
    first = json.loads((tmp_path / "rows.json").read_text())
    assert [key.split(" | ")[0] for key in first] == list(rows[:2])
    assert "10 samples, 1 seeds, 8 steps" in output

    drawn = []
    monkeypatch.setattr(module, "sample_images", spy(module.sample_images, drawn))
    run(module, *common, *only, "--seeds", 2)
    second = json.loads((tmp_path / "rows.json").read_text())
    assert {key: second[key] for key in first} == first
    assert len(second) == 6 and len(drawn) == 4
    assert [call["num_inference_steps"] for call in drawn if "guidance_scale" in call] == [4, 4]
    stock = [second[module.row_key("stock sampler", 8, 10, seed)]["knn_distance"] for seed in (0, 1)]
    assert stock[0] != stock[1]


def spy(function, calls: list):
    """The function, noting the keyword arguments of each call."""

    def wrapper(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    return wrapper


def test_summary_is_mean_and_standard_error():
    module = recipe("boost_and_skip_mnist")
    rows = [{"lof": 1.0}, {"lof": 2.0}, {"lof": 3.0}]
    assert module.summary(rows, "lof") == "2.000 ± 0.577"
    assert module.summary(rows[:1], "lof") == "1.000"
    assert module.summary(rows, "rarity") == "-"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.sh")), ids=lambda path: path.name)
def test_shell_recipes_call_commands_that_exist(path):
    """The shell can read it, and every option is one of the command that it is given to."""
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text().replace("\\\n", " ")
    calls = re.findall(r"(?:diffusers-ext|\$run) (convert guided-diffusion|sample|upsample|evaluate)(.*)", text)
    assert {name for name, _ in calls} >= {"convert guided-diffusion", "evaluate"}
    assert {name for name, _ in calls} & {"sample", "upsample"}
    for name, rest in calls:
        command = main
        for word in name.split():
            command = command.commands[word]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z][a-z-]*", rest)) <= known, (name, rest)
    for preset in re.findall(r"--preset (\w+)", text):
        assert preset in PRESETS


TINY_DISCRETE = ("--num-tokens", 6, "--length", 8, "--hidden-size", 16, "--num-blocks", 1, "--num-heads", 2)


def test_discrete_recipe_resumes_and_saves_a_pipeline(tmp_path):
    module = recipe("train_discrete")
    options = (*TINY_DISCRETE, "--output", tmp_path / "out", "--batch-size", 4, "--eval-samples", 3, "--eval-steps", 2)
    run(module, *options, "--steps", 2)
    output = run(module, *options, "--steps", 3)
    assert "1 steps, running loss" in output and "(3 samples, 2 steps)" in output
    pipe = DiscreteDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    tokens = pipe(num_inference_steps=2).tokens
    assert tokens.shape == (1, 8) and tokens.max() < 6
    weights = load_file(tmp_path / "out/model/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


@pytest.mark.parametrize(("kernel", "objective"), [("absorbing", "x0"), ("uniform", "score"), ("uniform", "x0")])
def test_discrete_recipe_on_own_tokens(kernel, objective, tmp_path):
    module = recipe("train_discrete")
    np.savez(tmp_path / "tokens.npz", tokens=np.random.default_rng(0).integers(0, 6, (9, 5)))
    options = ("--data", tmp_path / "tokens.npz", "--kernel", kernel, "--objective", objective)
    run(module, *TINY_DISCRETE, *options, "--output", tmp_path / "out", "--batch-size", 4, "--steps", 1)
    pipe = DiscreteDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.scheduler.config.kernel == kernel and pipe.model.config.sequence_length == 5
    assert pipe.scheduler.config.prediction_type == {"score": "log_score", "x0": "x0"}[objective]


@pytest.mark.parametrize(("kernel", "objective"), [("absorbing", "score"), ("absorbing", "x0"), ("uniform", "x0")])
def test_discrete_loss_learns(kernel, objective):
    """On one token that repeats, a few steps make the loss fall."""
    module = recipe("train_discrete")
    torch.manual_seed(0)
    model, scheduler = module.build(kernel, objective, 4, 6, 16, 1, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    original, losses = torch.full((64, 6), 2), []
    for _ in range(60):
        loss = module.loss_of(model, scheduler, original, "none")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
