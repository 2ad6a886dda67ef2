"""ADMUNet2DModel: the parent where nothing is asked for, each addition by itself, bad values, and the Hub."""

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention
from fresh_process import run_fresh

from diffusers_ext import ADMUNet2DModel, BoostAndSkipPipeline
from diffusers_ext.hub import export_pipeline

CONFIG = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    "attn_norm_num_groups": 32,
}
OWN = {"num_attention_heads": 4, "timestep_dim": 16, "time_embedding_dim": 64, "conv_resample": False}


def build(cls=ADMUNet2DModel, **config):
    torch.manual_seed(0)
    return cls(**{**CONFIG, **config}).eval()


@torch.no_grad()
def test_off_is_the_parent():
    sample = torch.randn(2, 3, 8, 8)
    assert torch.equal(build()(sample, 5).sample, build(UNet2DModel)(sample, 5).sample)
    assert build().state_dict().keys() == build(UNet2DModel).state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("name", ["num_attention_heads", "timestep_dim", "conv_resample"])
def test_each_addition_changes_the_network(name):
    sample = torch.randn(2, 3, 8, 8)
    assert not torch.allclose(build(**{name: OWN[name]})(sample, 5).sample, build()(sample, 5).sample, atol=1e-4)


@torch.no_grad()
def test_heads_divide_every_width():
    unet = build(num_attention_heads=2)
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    assert {(layer.heads, layer.inner_dim) for layer in layers} == {(2, 32), (2, 64)}
    assert {layer.scale for layer in layers} == {16**-0.5, 32**-0.5}
    # at one width it is what the parent builds from the channels of a head
    same = {"block_out_channels": (32, 32)}
    sample = torch.randn(1, 3, 8, 8)
    by_heads, by_width = build(num_attention_heads=2, **same), build(UNet2DModel, attention_head_dim=16, **same)
    torch.testing.assert_close(by_heads(sample, 5).sample, by_width(sample, 5).sample, atol=1e-5, rtol=0)


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    unet, sample = build(**OWN), torch.randn(1, 3, 8, 8)
    unet.save_pretrained(tmp_path)
    again = ADMUNet2DModel.from_pretrained(tmp_path)
    assert {name: again.config[name] for name in OWN} == OWN
    assert again.config.block_out_channels == [32, 64]
    torch.testing.assert_close(again(sample, 5).sample, unet(sample, 5).sample, atol=1e-5, rtol=0)
    assert ADMUNet2DModel.from_config(unet.config).config.num_attention_heads == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads=5 must be at least 1 and divide the 32 channels of down"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"timestep_dim": 15}, "timestep_dim=15 must be even"),
        ({"conv_resample": False, "downsample_type": "resnet"}, "conv_resample=False needs"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(ValueError, match=message):
        build(**wrong)


def test_gradients_reach_every_weight():
    unet = build(**OWN).train()
    unet(torch.randn(1, 3, 8, 8), torch.tensor([7])).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_an_export_loads_without_the_package(tmp_path):
    pipe = BoostAndSkipPipeline(build(**OWN), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "gamma": 2.0, "skip_steps": 1}
    expected = pipe(**options, generator=torch.Generator().manual_seed(7), output_type="np").images
    export_pipeline(pipe, tmp_path / "out")
    (tmp_path / "out/options.json").write_text(json.dumps(options))
    file = inspect.getsourcefile(BoostAndSkipPipeline)
    run_fresh("load_without_package.py", file, str(tmp_path), "out", cache=tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "out/export.npy"), expected, atol=1e-4)
