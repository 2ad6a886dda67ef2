"""recipes/photographs: the network, the classifier's pictures, and the whole command on a few small photographs."""

import importlib.util
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext import BoostAndSkipPipeline
from diffusers_ext.metrics import average_knn_distance, precision_recall

FILE = "diffusion_pytorch_model.safetensors"
RECIPES = Path(__file__).parent.parent / "recipes"


def load_run():
    spec = importlib.util.spec_from_file_location("photographs_run", RECIPES / "photographs/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = load_run()
NETWORK, CLASSIFIER, TABLES = (sys.modules[f"photographs.{name}"] for name in ("network", "classifier", "tables"))


def test_the_network_has_the_size_it_says_and_begins_as_zero():
    with torch.device("meta"):
        assert sum(p.numel() for p in NETWORK.build_network().parameters()) == pytest.approx(10.7e6, rel=0.005)
    tiny = NETWORK.PatchTransformer(8, 3, 4, 1, 2, 8, 4).train()
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 3])
    assert torch.equal(tiny(x, 7, labels).sample, torch.zeros_like(x))
    for parameter in tiny.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    one = tiny(x, torch.tensor(7), labels).sample
    assert torch.equal(tiny(x, torch.full((3,), 7), labels).sample, one)  # no label is dropped by the blocks
    assert not torch.equal(tiny(x, 7, torch.tensor([0, 1, 2])).sample[2], one[2])  # the null class is one of its own
    assert torch.equal(tiny(x, 7, labels, return_dict=False)[0], one)


def test_flips_and_shifts_move_pixels_and_make_none():
    images = torch.arange(3 * 32 * 32.0).reshape(1, 3, 32, 32).expand(200, -1, -1, -1) / 3072
    moved = CLASSIFIER.flip_and_shift(images)
    middle = moved[:, 0, 16, 16] * 3072
    torch.testing.assert_close(middle, middle.round(), atol=0.02, rtol=0)
    rows, columns = (middle.round() // 32), (middle.round() % 32)
    assert set(rows.tolist()) == set(range(12, 21))  # 16, by up to 4
    assert set(columns.tolist()) == set(range(11, 21))  # of 15 or 16, mirrored or not
    assert moved.min() >= 0 and moved.max() < 1


def test_the_judge_compares_equal_numbers_for_precision_and_all_for_the_rest(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    real, features = torch.randn(60, 4, generator=generator), torch.randn(30, 4, generator=generator)
    real[30:] = features  # which all samples are among, and none is among the first 30
    judge, labels = object.__new__(CLASSIFIER.Judge), torch.arange(30) % 10
    judge.reference = {"features": real, "mean": real.mean(0), "covariance": real.T.cov()}
    monkeypatch.setattr(judge, "outputs", lambda images: (features, labels.where(labels > 2, 0)), raising=False)
    numbers = judge.measure(torch.rand(30, 3, 32, 32), labels)
    assert (numbers["precision"], numbers["recall"]) == precision_recall(features, real[:30], 3)
    assert precision_recall(features, real, 3) != precision_recall(features, real[:30], 3)
    assert numbers["knn_distance"] == pytest.approx(average_knn_distance(features, real, 5))
    assert numbers["recognised"] == pytest.approx(0.8)


@pytest.fixture
def data(tmp_path) -> Path:
    """Noise around a colour for each class, as encoded files."""
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 300), ("test", 20)):
        labels, files = np.arange(count) % 10, []
        for label in labels:
            buffer = io.BytesIO()
            pixels = rng.integers(0, 80, (32, 32, 3)) + 17 * label * np.array([1, 0, 1])
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG")
            files.append(np.frombuffer(buffer.getvalue(), np.uint8))
        arrays[f"{split}_bytes"], arrays[f"{split}_labels"] = np.concatenate(files), labels
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "photographs.npz", **arrays)
    return tmp_path / "photographs.npz"


@pytest.fixture
def small(monkeypatch):
    """Networks of a few thousand weights, and few rows of each kind."""
    monkeypatch.setattr(NETWORK, "NETWORK", {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8})
    monkeypatch.setattr(CLASSIFIER, "CLASSIFIER", {"in_channels": 3, "channels": (4, 8)})
    monkeypatch.setattr(RUN, "FLOW_CHANNELS", (8, 8))
    for module in (RUN, TABLES):
        monkeypatch.setattr(module, "STEPS", {"boost": 4, "guidance": 3})
        monkeypatch.setattr(module, "SCALES", (1.0, 4.0))
    for name, value in {
        "WEIGHTS": (1.0, 3.0),
        "INTERVALS": ((0.3, 3.0),),
        "SOLVERS": ("euler:2",),
        "SHOWN": 4,
    }.items():
        monkeypatch.setattr(TABLES, name, value)
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests, in another precision
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


OPTIONS = (
    "--steps", 6, "--lr", 0.5, "--checkpoint-every", 2, "--batch-size", 20, "--classifier-epochs", 2,
    "--flow-samples", 12, "--flow-steps", 3, "--samples", 20, "--seeds", 2, "--minutes", 1000,
)  # fmt: skip


def run(data, output, *options):
    arguments = [str(word) for word in (data, "--output", output, *OPTIONS, *options)]
    return CliRunner().invoke(RUN.main, arguments, catch_exceptions=True)


def fails_after(function, calls: int):
    """The function, interrupted instead of called once it has been called so often."""
    left = iter(range(calls))

    def interrupted(*args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted


@pytest.mark.slow
def test_all_tables_come_out_and_an_interrupted_run_gives_the_same(data, small, tmp_path, monkeypatch):
    result = run(data, tmp_path / "once")
    assert result.exit_code == 0, result.output
    once = json.loads((tmp_path / "once/tables.json").read_text())
    assert {title: len(rows) for title, rows in once["tables"].items()} == {
        "boost": 4, "guidance": 3, "guiders": 5, "flow": 4
    }  # fmt: skip
    for title, rows in once["tables"].items():
        assert (tmp_path / f"once/{title}.png").stat().st_size > 1000
        for name, numbers in rows.items():
            assert set(TABLES.METRICS[title]) <= set(numbers), (title, name)
            for metric, value in numbers.items():
                if metric != "rarity":  # of samples inside of the real manifold, where there may be none
                    assert all(math.isfinite(number) for number in value.values()), (title, name, metric)
    guided = once["tables"]["guidance"]
    assert len({guided[name]["frechet"]["mean"] for name in guided}) == 3
    evaluations = {name: row["evaluations"]["mean"] for rows in once["tables"].values() for name, row in rows.items()}
    assert evaluations["stock sampler"] == 4 and evaluations["boost and skip, gamma 2"] == 2
    assert evaluations["weight 1"] == 3 and evaluations["weight 3"] == 6
    assert 3 < evaluations["weight 3 in (0.3, 3]"] < 6
    assert evaluations["guidance 4, repaired by euler:2"] == 6 + 2

    for place, name, calls in (
        ("diffusers_ext.runs.checkpoints.Checkpoints", "save", 1),  # the classifier's
        ("diffusers_ext.runs.checkpoints.Checkpoints", "save", 2),  # the transformer's second
        ("result_rows.ResultRows", "put", 7),
    ):
        with monkeypatch.context() as patch:
            module, cls = place.rsplit(".", 1)
            owner = getattr(sys.modules[module], cls)
            patch.setattr(owner, name, fails_after(getattr(owner, name), calls))
            assert run(data, tmp_path / "often").exit_code == 1
    assert len(json.loads((tmp_path / "often/results.json").read_text())) == 7
    assert run(data, tmp_path / "often").exit_code == 0
    often = json.loads((tmp_path / "often/tables.json").read_text())
    for rows in (*once["tables"].values(), *often["tables"].values()):
        for numbers in rows.values():
            del numbers["seconds"]
    assert often["tables"] == once["tables"]
    for file in ("classifier", "base/unet", "flow/pipeline/model"):
        weights = [load_file(tmp_path / name / file / FILE) for name in ("once", "often")]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]), file
    pipe = BoostAndSkipPipeline.from_pretrained(tmp_path / "often/base")
    assert type(pipe.unet).__name__ == "PatchTransformer" and pipe.config.null_class == 10
