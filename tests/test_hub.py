"""Exported folders: what they hold, and what is refused. That they load elsewhere is in contracts.py."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from diffusers_ext import BoostAndSkipPipeline
from diffusers_ext.hub import _with_siblings, export_pipeline
from diffusers_ext.schedulers import BoostAndSkipDDIMScheduler


def tiny_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip


def test_an_export_holds_code_and_file_stems(tmp_path):
    folder = export_pipeline(BoostAndSkipPipeline(tiny_unet(), BoostAndSkipDDIMScheduler()), tmp_path / "out", "mit")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["boost_and_skip", "BoostAndSkipPipeline"]
    assert index["scheduler"] == ["scheduling_boost_and_skip", "BoostAndSkipDDIMScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "boost_and_skip.py",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "scheduler/scheduling_boost_and_skip.py",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    card = (folder / "README.md").read_text()
    assert "license: mit" in card and "trust_remote_code=True" in card and "BoostAndSkipDDIMScheduler" in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing staged is left over


def test_an_export_of_a_stock_pipeline_needs_no_code(tmp_path):
    folder = export_pipeline(DDPMPipeline(tiny_unet(), DDPMScheduler()), tmp_path / "out")
    assert not list(folder.rglob("*.py"))
    assert type(DDPMPipeline.from_pretrained(folder)) is DDPMPipeline
    assert "licence of the weights is that of their source" in (folder / "README.md").read_text()


def test_a_full_folder_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export_pipeline(DDPMPipeline(tiny_unet(), DDPMScheduler()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_class_without_a_file_is_refused_and_nothing_is_written(tmp_path):
    scheduler = type("Homeless", (DDPMScheduler,), {"__module__": "__main__"})()
    with pytest.raises(ValueError, match="Homeless was defined in no file"):
        export_pipeline(BoostAndSkipPipeline(tiny_unet(), scheduler), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_siblings_travel_and_upward_imports_are_refused(tmp_path):
    (tmp_path / "top.py").write_text("import torch\nfrom .near import x\n")
    (tmp_path / "near.py").write_text("x = 1\n")
    assert [path.name for path in _with_siblings(tmp_path / "top.py")] == ["top.py", "near.py"]
    for line in (
        "from ..up import x",
        "from diffusers_ext.hub import x",
        "import diffusers_ext",
        "from .gone import x",
    ):
        (tmp_path / "top.py").write_text(line + "\n")
        with pytest.raises(ValueError, match="which a Hub repository does not hold"):
            _with_siblings(tmp_path / "top.py")


def test_half_precision_weights_stay_half(tmp_path):
    pipe = BoostAndSkipPipeline(tiny_unet().half(), DDPMScheduler())
    folder = export_pipeline(pipe, tmp_path / "out")
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
