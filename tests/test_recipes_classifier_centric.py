"""The studies of recipes/classifier_centric: their closed forms, and a short run of each."""

import importlib.util
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes/classifier_centric"


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module, *arguments, exit_code=0):
    result = CliRunner().invoke(module.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.output


GAUSSIANS, FRACTAL = recipe("gaussians_1d"), recipe("fractal_2d")


def gaussians(mean=0.5):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    return GAUSSIANS.TwoGaussians(mean, scheduler.alphas_cumprod), scheduler


def test_eps_of_two_gaussians_is_the_gradient_of_their_density():
    mixture, _ = gaussians()
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None].requires_grad_()
    for t in (0, 100, 999):
        time = torch.full((7,), t)
        means, variance = mixture.moments(time)
        log_p = (-((x - means) ** 2) / (2 * variance)).logsumexp(1)
        (score,) = torch.autograd.grad(log_p.sum(), x)
        expected = -(1 - mixture.alphas[t]).sqrt() * score
        torch.testing.assert_close(mixture(x, time).sample.detach(), expected)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_exact_classifier_guides_as_classifier_free_guidance_does(scale):
    mixture, scheduler = gaussians()
    classifiers = {"exact classifier": mixture.log_posterior}
    paths = [
        GAUSSIANS.trajectories(
            GAUSSIANS.predictor(method, scale, mixture, classifiers, scheduler), scheduler, count=50, steps=100
        )
        for method in ("classifier-free", "exact classifier")
    ]
    torch.testing.assert_close(*paths, atol=1e-6, rtol=0)
    assert (paths[0][-1] > 0.2).all() and paths[0].shape == (101, 50)


def test_conditional_sampling_reaches_the_class():
    mixture, scheduler = gaussians()
    predict = GAUSSIANS.predictor("conditional", 1.0, mixture, {}, scheduler)
    numbers = GAUSSIANS.measure(GAUSSIANS.trajectories(predict, scheduler, count=2000, steps=1000)[-1], 0.5)
    assert abs(numbers["shift"]) < 0.1 and abs(numbers["spread"] - 1) < 0.1 and numbers["right_side"] == 1


@pytest.mark.slow
def test_gaussians_run(tmp_path):
    output = run(GAUSSIANS, "--output", tmp_path, "--samples", 60, "--steps", 5, "--classifier-steps", 3, "--scale", 2)
    assert "threads; figures in" in output
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert len(numbers["rows"]) == 3 * (1 + 5 * 4)
    for name in ("trajectories", "scales"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", FRACTAL.CLASSES)
def test_log_density_is_the_recorded_one(name):
    path = HERE / "goldens/toy2d.safetensors"
    mixture = FRACTAL.load_mixtures(path)[FRACTAL.CLASSES.index(name)]
    golden = load_file(path)
    for sigma, expected in zip(golden[f"{name}.sigma"].tolist(), golden[f"{name}.logp_f64"], strict=True):
        found = mixture.log_density(golden[f"{name}.x"], sigma)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_fractals_are_trees_that_point_apart():
    first, second = FRACTAL.load_mixtures(None)
    for mixture, angle in ((first, math.pi / 4), (second, 5 * math.pi / 4)):
        assert len(mixture.mu) == 127 * 8 and mixture.phi.sum() == pytest.approx(1)
        root = mixture.mu[7]
        assert math.atan2(root[1], root[0]) == pytest.approx(angle if angle < math.pi else angle - 2 * math.pi)
        points = mixture.sample(4000, torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            points.mean(0).double(), (mixture.phi[:, None] * mixture.mu).sum(0), atol=0.03, rtol=0
        )
        assert mixture.log_density(points).mean() > mixture.log_density(points + 0.05).mean() + 5
    assert not torch.allclose(first.mu, -second.mu, atol=0.1)


def test_sliced_wasserstein_of_a_shift():
    x = torch.randn(200, 2)
    shifted = FRACTAL.sliced_wasserstein(x, x + torch.tensor([0.3, -0.4]))
    assert shifted == pytest.approx(0.5 / math.sqrt(2), rel=1e-4)  # the mean of cos^2 over all directions is a half
    assert FRACTAL.sliced_wasserstein(x, x[torch.randperm(200)]) == 0


def test_sampling_with_the_exact_denoiser_reaches_the_data(monkeypatch):
    """One Gaussian in place of the network: E[x0 | x] = shrink (x - m) + m; every guidance scale gives the same."""
    mean, std = torch.tensor([0.4, -0.2]), 0.1

    def exact(network, x, sigma, labels):
        return mean + std**2 / (std**2 + sigma**2) * (x - mean)

    monkeypatch.setattr(FRACTAL, "denoise", exact)
    labels = torch.zeros(4000, dtype=torch.long)
    points = FRACTAL.sample((None, None), "classifier-free", 3.0, labels, seed=0)
    torch.testing.assert_close(points.mean(0), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(points.std(0), torch.full((2,), std), atol=0.005, rtol=0)

    def towards_the_right(x, time):
        return torch.stack([torch.zeros_like(x[:, 0]), 0.1 * x[:, 0]], dim=1)

    wanted = [
        FRACTAL.sample((None, towards_the_right), "classifier", 4.0, labels.fill_(c), seed=0).mean(0) for c in (0, 1)
    ]
    assert wanted[0][0] < mean[0] < wanted[1][0]


@pytest.mark.slow
def test_fractal_run_goes_on_and_guards_its_folder(tmp_path):
    options = ("--output", tmp_path, "--points", 120, "--steps", 4, "--batch-size", 16, "--samples", 40, "--k", 3)
    run(FRACTAL, *options)
    first = json.loads((tmp_path / "numbers.json").read_text())
    assert len(first["rows"]) == 2 * 4 * 2 * 2
    for name in ("before_after.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    run(FRACTAL, *options)
    assert json.loads((tmp_path / "numbers.json").read_text())["rows"] == first["rows"]
    assert "steps: 4 before, 5 now" in run(FRACTAL, *options[:4], "--steps", 5, exit_code=1)


@pytest.mark.slow
def test_cifar10_from_encoded_files_to_distances(tmp_path):
    """All commands on twenty small pictures in PNG, with networks of width 8."""
    module, rng = recipe("cifar10"), np.random.default_rng(0)
    pixels, files = rng.integers(0, 256, (20, 32, 32, 3), np.uint8), []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    encoded, real = tmp_path / "encoded.npz", tmp_path / "real.npz"
    np.savez(encoded, train_bytes=np.concatenate(files), train_offsets=offsets, train_labels=np.arange(20) % 10)
    run(module, "images", encoded, real)
    with np.load(real) as data:
        np.testing.assert_array_equal(data["arr_0"], pixels)

    tiny = ("--width", 8, "--batch-size", 2, "--steps", 2)
    run(module, "train-base", real, tmp_path / "base", *tiny)
    drawn = ("--guidance-scales", 1, 3, "--samples", 6, "--sampling-steps", 2)
    flow = tmp_path / "flow"
    options = ("--features", "pixel", "--k", 3, "--layers", 1)
    run(module, "train-flow", real, tmp_path / "base", flow, *drawn, *options, *tiny)
    (tmp_path / "means.py").write_text("def means(images):\n    return images.float().flatten(2).mean(2) / 255\n")
    features = ("--features", f"{tmp_path / 'means.py'}:means", "--device", "cpu")
    arguments = (real, tmp_path / "base", flow / "pipeline", tmp_path / "measured", *drawn, *features)
    output = run(module, "measure", *arguments)
    assert [line for line in output.splitlines() if line.startswith("scale")] == [
        "scale 1, before", "scale 1, after", "scale 3, before", "scale 3, after"
    ]  # fmt: skip
    before, after = (np.load(tmp_path / f"measured/{name}-3.npz")["arr_0"] for name in ("before", "after"))
    assert before.shape == after.shape == (6, 32, 32, 3) and (before != after).any()
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "measured").glob("*.npz"))]
    run(module, "measure", *arguments)  # nothing is repaired again
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "measured").glob("*.npz"))] == stamps


def test_cifar10_networks_have_the_papers_widths():
    unet = recipe("cifar10").build_unet(128, 4, 10)
    assert [block.resnets[0].conv2.out_channels for block in unet.down_blocks] == [128, 256, 256, 256]
    assert len(unet.down_blocks[0].resnets) == 4
    heads = [block.attentions[0].heads for block in unet.down_blocks if hasattr(block, "attentions")]
    assert heads == [256 // 64]


@pytest.mark.slow
def test_targets_of_real_images_are_themselves(tmp_path):
    """With k = 1 the targets are the samples; with more they are others."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 28, 28, 1), np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=pixels, arr_1=np.arange(60) % 10)
    for scale in (1, 3):
        folder = tmp_path / f"samples/guidance-{scale}"
        folder.mkdir(parents=True)
        np.savez(folder / "samples.npz", arr_0=pixels[:40], arr_1=np.arange(40) % 10)
    module, common = recipe("mnist_neighbours"), (tmp_path / "real.npz", "--output", tmp_path / "out")
    output = run(module, tmp_path / "samples", *common, "--k", 1, 4)
    rows = json.loads((tmp_path / "out/rows.json").read_text())
    spaces = ("pixel", "classifier", "pixel+classifier")
    assert [(row["scale"], row["space"], row["k"]) for row in rows] == [
        *((1, None, None), (3, None, None)),
        *((scale, space, k) for space in spaces for k in (1, 4) for scale in (1, 3)),
    ]
    before, nearest, further = rows[0]["frechet"], rows[2]["frechet"], rows[4]["frechet"]
    assert nearest == pytest.approx(before) != further
    assert "classifier" in output and (tmp_path / "out/targets.png").stat().st_size > 10_000
    assert "no guidance-" in run(module, tmp_path, *common, exit_code=2)

    run(module, tmp_path / "samples", *common, "--k", 1, 4, "--balance")
    balanced = json.loads((tmp_path / "out/rows.json").read_text())
    assert balanced[2] == rows[2] and balanced[4] != rows[4]  # one neighbour leaves nothing to balance
