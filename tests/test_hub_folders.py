"""Damaged folders of models are refused in one line that names the file, before or while they are loaded."""

import inspect
import json
import random
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from click.testing import CliRunner
from diffusers import ModelMixin, SchedulerMixin
from safetensors.torch import load_file, save_file

from diffusers_ext.cli import main
from diffusers_ext.hub.folders import check_config
from diffusers_ext.shipped import ASSETS, load_network, load_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of a shipped model."""

    def copy(name):
        return shutil.copytree(ASSETS / name, tmp_path / name)

    return copy


def change(path, **entries):
    """Entries of a JSON object; ... takes one out."""
    content = {**json.loads(path.read_text()), **entries}
    content = {name: value for name, value in content.items() if value is not ...}
    path.write_text(json.dumps(content).replace("Infinity", "1e400"))


def change_weights(path, name, change):
    state = load_file(path)
    if (value := change(state.get(name))) is None:
        del state[name]
    else:
        state[name] = value
    save_file(state, path)


def refused(path, message, load=load_pipeline):
    with pytest.raises(ValueError, match=message) as error:
        load(str(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


INDEX = [
    ({"unet": None}, "unet must be .library, class., a component that BoostAndSkipPipeline needs"),
    ({"unet": ...}, "unet must be"),
    ({"unet": "x"}, "unet must be"),
    ({"unet": [None, None]}, "unet must be"),
    ({"unet": ["diffusers", "NoSuchNet"]}, "cannot be loaded"),
    ({"unet": ["diffusers", "UNet2DConditionModel"]}, "configuration of a UNet2DModel, not of a UNet2DConditionModel"),
    ({"_class_name": None}, "names no class"),
    ({"_class_name": []}, "names no class"),
    ({"_class_name": "NoSuchPipeline"}, "cannot be loaded"),
]


@pytest.mark.parametrize(("entries", "message"), INDEX)
def test_an_index_that_is_none(entries, message, folder):
    path = folder("mnist-unet")
    change(path / "model_index.json", **entries)
    refused(path, message)


CONFIGS = [
    ("mnist-unet", "unet/config.json", {"block_out_channels": "x"}, "block_out_channels must be a list"),
    ("mnist-unet", "unet/config.json", {"block_out_channels": [1e400, 2, 3]}, "must be finite"),
    ("mnist-unet", "unet/config.json", {"layers_per_block": 10**9}, r"layers_per_block must be a number in \[0, 1000"),
    ("mnist-unet", "unet/config.json", {"sample_size": -1}, "sample_size must be at least 1"),
    ("mnist-unet", "unet/config.json", {"norm_eps": []}, "norm_eps must be a number"),
    ("mnist-unet", "unet/config.json", {"norm_num_groups": -1}, "norm_num_groups must be at least 0"),
    ("mnist-unet", "unet/config.json", {"_class_name": []}, "_class_name must be the name of a class"),
    ("mnist-unet", "scheduler/scheduler_config.json", {"trained_betas": -1}, "trained_betas must be a list or null"),
    ("mnist-unet", "unet/config.json", {"act_fn": 3}, "act_fn must be text"),
    ("mnist-unet", "scheduler/scheduler_config.json", {"num_train_timesteps": None}, "must be an integer, got None"),
    ("mnist-unet", "scheduler/scheduler_config.json", {"num_train_timesteps": 10**30}, "within"),
    (
        "mnist-unet",
        "scheduler/scheduler_config.json",
        {"_class_name": "UNet2DModel"},
        "is the configuration of a UNet2",
    ),
    ("mnist-unet", "scheduler/scheduler_config.json", {"beta_schedule": "x"}, "cannot be loaded"),
    ("mnist-edm2", "unet/config.json", {"resample_filter": 0}, "resample_filter must be a list"),
    ("mnist-edm2", "scheduler/scheduler_config.json", {"rho": "x"}, "rho must be a number"),
    ("countdown-sedd", "model/config.json", {"vocab_size": "x"}, "vocab_size must be an integer"),
    ("countdown-sedd", "model/config.json", {"sequence_length": 0}, "sequence_length must be at least 1"),
    ("countdown-sedd", "model/config.json", {"num_blocks": 10**9}, "num_blocks must be a number"),
    *[
        ("countdown-sedd", "scheduler/scheduler_config.json", {"timestep_tables": tables}, message)
        for tables, message in [
            ({"2": 3}, r"timestep_tables\['2'\] must be at least two"),
            ({"2": None}, r"timestep_tables\['2'\] must be at least two"),
            ({"2": [0.9, 0.5, 0.1]}, "must begin at 1"),
            ({"02": [1, 0.5, 0.1]}, "must be named by its number of steps"),
            ({"²": [1, 0.5, 0.1]}, "must be named by its number of steps"),
            ({"2": [1, None, 0.1]}, "must be at least two"),
            ([], "timestep_tables must be"),
            ("x", "timestep_tables must be"),
        ]
    ],
]


@pytest.mark.parametrize(("model", "file", "entries", "message"), CONFIGS)
def test_a_config_of_other_kinds(model, file, entries, message, folder):
    path = folder(model)
    change(path / file, **entries)
    refused(path, message)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"<html></html>", None])
def test_a_json_file_that_is_none(file, content, folder):
    path = folder("mnist-unet")
    (path / file).unlink() if content is None else (path / file).write_bytes(content)
    refused(path, file if content is not None or "/" in file else "no model_index.json")


WRONG_WEIGHTS = {
    "lacks a key": (lambda _: None, "lack conv_in.bias"),
    "of another shape": (lambda value: value[:-1].clone(), "cannot be loaded"),
    "of integers": (lambda value: value.int(), "conv_in.bias is of I32"),
    "of NaN": (lambda value: value * torch.nan, "conv_in.bias holds numbers that are not finite"),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_that_do_not_belong(case, folder):
    path, (how, message) = folder("mnist-unet"), WRONG_WEIGHTS[case]
    change_weights(path / "unet" / WEIGHTS, "conv_in.bias", how)
    refused(path, message)


def test_weights_that_nobody_asked_for(folder):
    path = folder("mnist-classifier")
    change_weights(path / WEIGHTS, "extra.weight", lambda _: torch.ones(2))
    refused(path, "hold what ImageClassifier does not have, extra.weight", load=load_network)


def test_files_of_weights_that_are_none(folder):
    path = folder("mnist-unet")
    weights = path / "unet" / WEIGHTS
    whole = weights.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    for content in (b"", whole[:100], whole[:-1], b"\xff" * 8 + whole[8:], pointer, b"<html>" + bytes(600)):
        weights.write_bytes(content)
        refused(path, f"{WEIGHTS}' cannot be read")
    weights.unlink()
    refused(path, "holds no weights")
    (path / "unet/config.json").unlink()
    refused(path, "config.json' is missing")


@pytest.mark.parametrize("name", ["../../other.safetensors", "missing.safetensors", 3, None])
def test_an_index_of_weights_stays_in_its_folder(name, folder):
    path = folder("mnist-unet")
    index = {"metadata": {}, "weight_map": {"conv_in.bias": name}}
    (path / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    refused(path, "names '.*', which is no file beside it|is no index of weights")


def test_weights_in_shards_are_read(folder):
    path = folder("mnist-unet")
    pipe = load_pipeline(str(path))
    (path / "unet" / WEIGHTS).unlink()
    pipe.unet.save_pretrained(path / "unet", max_shard_size="1MB")
    again = load_pipeline(str(path))
    assert len(list((path / "unet").glob("*-of-*.safetensors"))) > 1
    assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), again.unet.parameters(), strict=True))


@pytest.mark.slow
def test_what_diffusers_itself_writes_is_taken():
    """The defaults of every network and scheduler, as they stand in a config."""
    checked = 0
    for name in dir(diffusers):
        try:
            cls = getattr(diffusers, name, None)
        except RuntimeError as error:  # older versions import torchvision for some pipelines
            assert "No module named" in str(error)
            continue
        if isinstance(cls, type) and issubclass(cls, ModelMixin | SchedulerMixin):
            parameters = inspect.signature(cls.__init__).parameters.values()
            config = {one.name: one.default for one in parameters if one.default is not one.empty}
            check_config(Path(name), json.loads(json.dumps(config, default=lambda _: None)), cls)
            checked += 1
    assert checked > 100


VALUES = [None, -1, "x", [], {}, float("inf"), 10**30, 10**9]


@pytest.mark.parametrize("model", ["mnist-unet", "countdown-sedd", "mnist-flow", "mnist-edm2"])
def test_any_field_of_any_kind(model, folder):
    """Refused, or taken and then sampled from, as a field that nobody reads may be."""
    path, rng = folder(model), random.Random(model)
    files = sorted(path.rglob("*.json"))
    for _ in range(12):
        file = rng.choice(files)
        whole = file.read_text()
        name = rng.choice(list(json.loads(whole)))
        change(file, **{name: rng.choice(VALUES)})
        try:
            load_pipeline(str(path))
        except ValueError as error:
            assert "\n" not in str(error)
        file.write_text(whole)


def test_the_command_says_it_in_one_line(folder, tmp_path):
    path = folder("mnist-unet")
    change(path / "model_index.json", unet=None)
    result = CliRunner().invoke(main, ["sample", str(path), "--output", str(tmp_path / "out")])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("Error: ")
