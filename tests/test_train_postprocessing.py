"""diffusers-ext train-postprocessing: from a base pipeline to a flow that repairs its images."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from cli_on_processes import run_on_two
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention

from diffusers_ext.cli import main
from diffusers_ext.flow import draw_base_samples, velocity_network
from diffusers_ext.runs.lists import INTEGERS, NUMBERS, ListsCommand
from diffusers_ext.shipped import load_pipeline

SMALL = [
    "--base", "mnist-unet", "--guidance-scales", "1", "3", "--num-samples", "12", "--num-inference-steps", "2",
    "--k", "3", "--block-out-channels", "8", "8", "--steps", "3", "--batch-size", "4", "--device", "cpu",
]  # fmt: skip


def invoke(*arguments):
    return CliRunner().invoke(main, ["train-postprocessing", *map(str, arguments)])


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "real.npz"
    digits = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 1), np.uint8)
    np.savez(path, arr_0=digits, arr_1=np.arange(40) % 10)
    return path


@pytest.mark.slow
def test_trains_a_pipeline_and_goes_on_after_an_interruption(real, tmp_path):
    common = ("--real", real, "--features", "classifier", *SMALL, "--output", tmp_path / "out")
    result = invoke(*common)
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "out/training/settings.json").read_text())
    assert settings["samples"][:4] == [24, 1, 28, 28] and settings["real"][:4] == [40, 1, 28, 28]
    for scale in (1, 3):
        manifest = json.loads((tmp_path / f"out/samples/guidance-{scale}/manifest.json").read_text())
        assert manifest["settings"]["call"]["guidance_scale"] == scale
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out/pipeline")
    assert pipe.model.config.num_class_embeds == 10 and pipe.model.config.block_out_channels == [8, 8]
    images = torch.rand(2, 1, 28, 28)
    repaired = pipe(images, class_labels=[1, 2], num_inference_steps=1, output_type="pt").images
    assert repaired.shape == images.shape and not torch.equal(repaired, images)

    again = invoke(*common)
    assert again.exit_code == 0 and "pipeline was finished before, after 3 steps, nothing to do" in again.output
    for option, value, message in (
        ("--steps", "2", "steps: 3 before, 2 now"),
        ("--batch-size", "5", "batch_size: 4 before, 5 now"),
        ("--mixed-precision", "bf16", "mixed_precision: None before, 'bf16' now"),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        changed = invoke(*common, option, value)
        assert changed.exit_code == 1 and message in changed.output.replace("\n", " "), changed.output
    AcceleratorState._reset_state(reset_partial_state=True)
    longer = [*common]
    longer[longer.index("--steps") + 1] = "5"
    assert invoke(*longer).exit_code == 0
    history = json.loads((tmp_path / "out/training/history.json").read_text())
    assert [row["step"] for row in history] == [3, 5]

    weights = tmp_path / "out/pipeline/model/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    damaged = invoke(*longer)
    assert damaged.exit_code == 1 and "model.safetensors is gone or not as it was written" in damaged.output


def test_foreign_files_stay(real, tmp_path):
    """A folder of somebody's, wherever the command would write."""
    for name in ("training/checkpoint-best/weights", "pipeline/notes.txt", "samples/guidance-1/000000.png"):
        mine = tmp_path / name.split("/")[0] / name
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        result = invoke("--real", real, "--features", "pixel", *SMALL, "--output", tmp_path / name.split("/")[0])
        assert result.exit_code == 1 and "is not empty" in result.output, result.output
        assert mine.read_text() == "mine"


@pytest.mark.slow
def test_a_kill_in_the_last_save_changes_nothing(real, tmp_path):
    """The checkpoint is there, history.json and loss.png are not yet."""
    common = ("--real", real, "--features", "pixel", *SMALL, "--output", tmp_path / "out")
    assert invoke(*common).exit_code == 0
    training = tmp_path / "out/training"
    whole = {name: (training / name).read_bytes() for name in ("history.json", "loss.png")}
    (training / "history.json").write_text("[]")
    (training / "loss.png").unlink()
    assert invoke(*common).exit_code == 0
    assert {name: (training / name).read_bytes() for name in whole} == whole


@pytest.mark.slow
def test_only_a_picture_that_was_written_is_named(real, tmp_path, monkeypatch):
    common = ("--real", real, "--features", "pixel", *SMALL, "--output", tmp_path)
    monkeypatch.setattr("diffusers_ext.flow.training_run.find_spec", lambda name: None)
    done = invoke(*common)
    assert done.exit_code == 0 and not (tmp_path / "training/loss.png").exists()
    assert done.output.strip().endswith(f"the loss is in {tmp_path / 'training/history.json'}")
    monkeypatch.undo()
    assert invoke(*common).output.strip().endswith(f"the loss is in {tmp_path / 'training/loss.png'}")


def test_kept_scales_are_marked_in_the_order_of_the_samples(real, tmp_path, monkeypatch):
    given = {}

    def train(*_, **options):
        given.update(options)
        raise RuntimeError("far enough")

    monkeypatch.setattr("diffusers_ext.flow.train_postprocessing_flow", train)
    options = ("--real", real, "--features", "pixel", *SMALL, "--output", tmp_path / "out")
    result = invoke(*options, "--balance", "--keep-scales", 3)
    assert "far enough" in str(result.exception)
    assert given["keep"].tolist() == [False] * 12 + [True] * 12 and given["balance"]


@pytest.mark.parametrize("scales", [("2",), ("1", "3")], ids=" ".join)
def test_kept_scales_must_be_some_of_the_sampled_ones(real, tmp_path, scales):
    result = invoke("--real", real, *SMALL, "--output", tmp_path / "out", "--keep-scales", *scales)
    assert result.exit_code == 2 and "--keep-scales must be some of" in result.output and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes(real, tmp_path):
    """Two train one network and write one pipeline."""
    command = ("train-postprocessing", "--real", real, "--features", "pixel", *SMALL, "--output", tmp_path)
    assert run_on_two(tmp_path / "notes", *command).count(f"wrote {tmp_path / 'pipeline'}") == 1
    assert json.loads((tmp_path / "training/settings.json").read_text())["processes"] == 2
    assert len(list((tmp_path / "training").glob("checkpoint-3/random_states_*.pkl"))) == 2  # one a process
    assert not list(tmp_path.rglob("lock.json"))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert all(torch.isfinite(parameter).all() for parameter in pipe.model.parameters())
    assert any(parameter.any() for parameter in pipe.model.conv_out.parameters())


@pytest.mark.slow
def test_neighbours_within_the_class(real, tmp_path):
    result = invoke("--real", real, "--features", "pixel+classifier", *SMALL, "--within-class", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    from diffusers_ext.flow import Neighbours

    found = Neighbours.load(tmp_path / "training/neighbours.safetensors")
    labels = json.loads((tmp_path / "samples/guidance-1/manifest.json").read_text())["labels"]
    assert (found.indices[:12] % 10 == torch.tensor(labels)[:, None]).all()


def test_what_does_not_fit_is_refused(real, tmp_path):
    np.savez(tmp_path / "plain.npz", arr_0=np.zeros((40, 28, 28, 1), np.uint8))
    result = invoke("--real", tmp_path / "plain.npz", *SMALL, "--within-class", "--output", tmp_path / "a")
    assert result.exit_code == 2 and "arr_1" in result.output and not (tmp_path / "a").exists()
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((40, 14, 14, 1), np.uint8))
    result = invoke("--real", tmp_path / "small.npz", "--features", "pixel", *SMALL, "--output", tmp_path / "b")
    assert result.exit_code == 1 and "one shape" in result.output
    for options, message in (
        (("--k", 41), "got k=41"),
        (("--k", 5, "--within-class"), "number of real images of class 0"),
        (("--block-out-channels", "8,8,8,8"), "multiple of 8"),
        (("--num-inference-steps", "foo"), "neither a number of steps nor a respacing"),
    ):
        result = invoke("--real", real, "--features", "pixel", *SMALL, *options, "--output", tmp_path / "b")
        assert result.exit_code in (1, 2) and message in result.output.replace("\n", " "), result.output
    assert not (tmp_path / "b").exists()  # before any sample was drawn
    with pytest.raises(ValueError, match="different numbers"):
        draw_base_samples(load_pipeline("mnist-unet"), tmp_path / "c", [2, 2.0], 4)
    for shape, channels, message in (((1, 1, 28, 24), (8,), "square"), ((1, 1, 6, 6), (8, 8, 8), "multiple of 4"),
                                     ((1, 1, 8, 8), (4,), "multiples of 8")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            velocity_network(torch.zeros(shape), block_out_channels=channels)


def test_the_network_starts_without_attention_and_takes_classes():
    model = velocity_network(torch.zeros(2, 3, 8, 8), num_classes=4, block_out_channels=(8, 16))
    out = model(torch.zeros(2, 3, 8, 8), 0, class_labels=torch.tensor([0, 3])).sample
    assert out.shape == (2, 3, 8, 8)
    assert not any(isinstance(module, Attention) for module in model.modules())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--scales", "1", "2.5", "3", "name"], ([1.0, 2.5, 3.0], [], "name")),
        (["--scales", "1,2", "--labels", "4", "5", "--", "name"], ([1.0, 2.0], [4, 5], "name")),
        (["name", "--scales=1,2"], ([1.0, 2.0], [], "name")),
    ],
)
def test_lists_with_commas_or_spaces(words, expected):
    import click

    @click.command(cls=ListsCommand)
    @click.option("--scales", type=NUMBERS)
    @click.option("--labels", type=INTEGERS, default=[])
    @click.argument("model")
    def command(scales, labels, model):
        got.append((scales, labels, model))

    got = []
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output
    assert got == [expected]
    assert CliRunner().invoke(command, ["--scales", "name"]).exit_code == 2
