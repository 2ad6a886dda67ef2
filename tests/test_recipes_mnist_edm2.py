"""Small EDM2 networks of digits: trained, joined, tuned and measured with other seeds, each tried on tiny ones."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from diffusers_ext import EDM2Pipeline, EDM2UNet2DModel, EDMHeunScheduler
from diffusers_ext.cli import main
from diffusers_ext.evaluation import FeatureExtractor
from diffusers_ext.guidance.search import GuidedSteps
from diffusers_ext.guidance.tuning import Objective, guided_call, step_sigmas
from diffusers_ext.metrics import feature_statistics, frechet_distance
from diffusers_ext.models.edm2_unet import normalize
from diffusers_ext.shipped import load_pipeline

RECIPES = Path(__file__).parent.parent / "recipes"
TINY = {"model_channels": 4, "channel_mult": (1, 2), "channels_per_head": 8, "logvar_channels": 4}
STEPS = 3


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(command, *arguments) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def training(monkeypatch):
    """The recipe with networks of a few thousand parameters."""
    module = recipe("train_edm2_mnist")
    monkeypatch.setattr(module, "CONDITIONAL", {**module.CONDITIONAL, **TINY})
    monkeypatch.setattr(module, "UNCONDITIONAL", {**module.UNCONDITIONAL, **TINY})
    return module


@pytest.fixture
def data(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=(np.arange(32) % 10).astype(np.uint8))
    return tmp_path / "mnist.npz"


@pytest.fixture
def pipe():
    """Tiny random networks whose outputs depend on everything."""
    torch.manual_seed(0)
    networks = []
    for label_dim, width in ((10, 8), (0, 4)):
        config = {**recipe("train_edm2_mnist").SHARED, **TINY, "model_channels": width}
        network = EDM2UNet2DModel(label_dim=label_dim, **config)
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.data.fill_(0.5)
        networks.append(network.eval())
    pipe = EDM2Pipeline(networks[0], EDMHeunScheduler(), guidance_unet=networks[1])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_training_goes_on_and_joins_a_pipeline(training, tmp_path, data):
    options = ("--data", data, "--batch-size", 2, "--checkpoint-every", 2)
    run(training.main, "train", *options, "--output", tmp_path / "cond", "--steps", 4)
    run(training.main, "train", *options, "--output", tmp_path / "twice", "--steps", 2)
    assert "2 steps in" in run(training.main, "train", *options, "--output", tmp_path / "twice", "--steps", 4)
    run(training.main, "train", *options, "--output", tmp_path / "uncond", "--steps", 1, "--unconditional")
    once, twice = (
        load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("cond", "twice")
    )
    for name in once:
        torch.testing.assert_close(once[name], twice[name], atol=1e-6, rtol=1e-5)

    assert "parameters in" in run(
        training.main, "join", tmp_path / "cond", tmp_path / "uncond", tmp_path / "mnist-edm2"
    )
    pipe = load_pipeline(str(tmp_path / "mnist-edm2"))
    assert isinstance(pipe, EDM2Pipeline) and pipe.guidance_unet.config.label_dim == 0
    mean_square = np.square(np.load(data)["x_train"] / 127.5 - 1).mean()
    assert pipe.unet.config.sigma_data == pytest.approx(mean_square**0.5, abs=1e-4)
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1, 2], num_inference_steps=2, guidance_scale=2.0, output_type="pt").images.shape == (2, 1, 28, 28)
    saved = load_file(tmp_path / "mnist-edm2/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for name, tensor in saved.items() if "fourier" not in name} == {torch.float16}


def test_the_loss_is_the_papers(training, data):
    """By hand, from the equations, for a network that says its input back and an uncertainty of its sigma."""
    seen = {}

    def network(noisy, sigma, labels, return_logvar, return_dict):
        seen.update(noisy=noisy, sigma=sigma, labels=labels)
        return noisy, sigma.log().reshape(-1, 1, 1, 1)

    images, labels = training.load_images(data)
    torch.manual_seed(0)
    loss = training.loss_of(network, 0.7, images, labels, p_mean=0.5, p_std=1.5)
    sigma = seen["sigma"].double()
    noise = (seen["noisy"] - images).double()
    weight = (sigma**2 + 0.7**2) / (0.7 * sigma) ** 2
    expected = (weight / sigma * noise.square().mean((1, 2, 3)) + sigma.log()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(seen["labels"], labels)
    torch.testing.assert_close(noise.std((1, 2, 3)) / sigma, torch.ones(32).double(), atol=0.15, rtol=0)
    assert abs(sigma.log().mean() - 0.5) < 0.8 and 1 < sigma.log().std() < 2


@pytest.mark.slow
def test_training_learns_and_forces_the_normalisation(training):
    torch.manual_seed(0)
    unet = EDM2UNet2DModel(**training.CONDITIONAL).train()
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-2)
    images, labels, losses = torch.full((8, 1, 28, 28), -1.0), torch.zeros(8, dtype=torch.long), []
    images[:, :, 8:20, 8:20] = 1
    for _ in range(25):
        loss = training.loss_of(unet, 0.5, images, labels, -0.4, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    training.loss_of(unet, 0.5, images, labels, -0.4, 1.0)
    weight = unet.enc["28x28_block0"].conv_res0.weight
    torch.testing.assert_close(weight, normalize(weight, dim=(1, 2, 3)), atol=1e-3, rtol=1e-3)


def test_learning_rate_and_average(training):
    rates = [training.learning_rate(step, 1.0, 1000, warmup=10) for step in (0, 9, 1000, 4000)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5])
    gamma = training.power_exponent(0.1)
    assert gamma == pytest.approx(6.94, abs=5e-3)  # the paper's number for 10 %

    values = torch.arange(1.0, 401.0)
    averaged, update = [torch.zeros(1)], training.power_average(gamma)
    for count, value in enumerate(values):
        update(averaged, [value.reshape(1)], torch.tensor(count))
    weights = values**gamma
    assert averaged[0].item() == pytest.approx((weights * values).sum().item() / weights.sum().item(), rel=5e-3)


@pytest.mark.parametrize(("first", "last", "guided"), [(0, STEPS - 1, 5), (1, 1, 2), (2, 2, 1)])
def test_a_candidate_is_guided_in_its_steps_alone(pipe, first, last, guided):
    """Distance of the very images that the pipeline's own argument gives; the second network skips other steps."""
    extractor = FeatureExtractor("rows", None, lambda images: torch.tensor(images)[:, ::7, 14, 0].double() / 255)
    reference, labels = (np.zeros(4), np.eye(4)), torch.arange(6)
    seen = []
    objective = Objective(
        pipe, extractor, reference, labels, STEPS, 3, 6, lambda *_: seen.append(pipe.num_evaluations)
    )
    distance = objective(GuidedSteps(2.5, first, last))
    assert seen == [{"unet": 5, "guidance_unet": guided}]
    generators = [torch.Generator().manual_seed(3 + i) for i in range(6)]
    edges = step_sigmas(pipe, labels, STEPS)
    interval = (edges[last + 1], edges[first])
    with pytest.warns(UserWarning) if guided == 5 else torch.no_grad():
        images = pipe(
            labels, num_inference_steps=STEPS, guidance_scale=2.5, guidance_interval=interval, generator=generators,
            output_type="np",
        ).images  # fmt: skip
    ours = feature_statistics(extractor((images * 255).round().astype(np.uint8)))
    assert distance == pytest.approx(frechet_distance(ours.mean, ours.covariance, *reference), rel=1e-6)


def test_steps_reach_pipelines_in_their_own_way(pipe):
    candidate = GuidedSteps(2.0, 1, 1)
    with guided_call(pipe, candidate, STEPS) as call:
        assert call["guided_steps"] == (1, 1) and type(pipe) is EDM2Pipeline
    stock = load_pipeline("mnist-unet")
    kind = type(stock)
    with guided_call(stock, candidate, STEPS) as call:
        assert "guided_steps" not in call and type(stock) is not kind
    assert type(stock) is kind


def found_interval(model, folder: Path) -> Path:
    """A file as a search of three steps writes it, but steps 0 and 1 are the best candidate."""
    run(
        main, "tune-interval", model, "--output", folder, "--guidance-scales", "3", "--num-samples", 4,
        "--num-inference-steps", STEPS, "--device", "cpu",
    )  # fmt: skip
    path = folder / "interval.json"
    found = json.loads(path.read_text())
    found["candidates"].insert(0, {**found["candidates"][0], "first": 0, "last": 1})
    path.write_text(json.dumps(found))
    return path


@pytest.mark.slow
def test_what_a_search_finds_is_measured_again(pipe, tmp_path, monkeypatch):
    module, model = recipe("guidance_interval_mnist"), tmp_path / "edm2"
    pipe.save_pretrained(model)
    path = found_interval(model, tmp_path / "found")
    options = (model, "--interval-json", path, "--samples", 10, "--device", "cpu")
    assert "10 samples, 1 seeds, 3 steps" in " ".join(run(module.main, *options, "--seeds", 1).split())
    rows = json.loads((tmp_path / "found/confirmed.json").read_text())
    assert [key.split(" | ")[1] for key in rows] == ["no guidance", "weight 3 everywhere", "weight 3, steps 0-1"]
    counts = [row["evaluations_of"] for row in rows.values()]
    assert counts == [{"unet": 5}, {"unet": 5, "guidance_unet": 5}, {"unet": 5, "guidance_unet": 4}]
    assert all({"frechet", "precision", "recall", "recognised", "seconds"} <= set(row) for row in rows.values())

    drawn = []
    sample = module.sample_images
    monkeypatch.setattr(module, "sample_images", lambda *args, **call: drawn.append(args[2]) or sample(*args, **call))
    again = run(module.main, *options, "--seeds", 2)
    assert drawn == [2_000_000] * 3 and "±" in again
    kept = json.loads((tmp_path / "found/confirmed.json").read_text())
    assert {key: kept[key] for key in rows} == rows and len(kept) == 6


@pytest.mark.slow
def test_the_stock_pipeline_is_measured_by_an_applied_interval(tmp_path):
    module, path = recipe("guidance_interval_mnist"), found_interval("mnist-unet", tmp_path)
    run(module.main, "mnist-unet", "--interval-json", path, "--samples", 10, "--seeds", 1, "--device", "cpu")
    rows = json.loads((tmp_path / "confirmed.json").read_text())
    assert [row["evaluations"] for row in rows.values()] == [3, 6, 5]

    found = json.loads(path.read_text())
    found["candidates"] = [row for row in found["candidates"] if (row["first"], row["last"]) == (0, STEPS - 1)]
    path.write_text(json.dumps(found))
    steps, settings = module.read_settings(path)
    assert steps == STEPS and list(settings) == ["no guidance", "weight 3 everywhere"]


def test_full_precision_survives_autocast(pipe):
    """The embedding is float32 as without autocast, the body is not."""
    seen = {}
    network = pipe.unet
    network.emb_noise.register_forward_hook(lambda module, args, output: seen.update(emb=output))
    network.out_conv.register_forward_hook(lambda module, args, output: seen.update(body=output))
    x, sigma = torch.randn(2, 1, 28, 28), torch.tensor([0.3, 4.0])
    with torch.no_grad():
        exact = network(x, sigma, [1, 2]).sample
        emb = seen["emb"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = network(x, sigma, [1, 2]).sample
    assert torch.equal(seen["emb"], emb) and seen["body"].dtype == torch.bfloat16
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0.05)
