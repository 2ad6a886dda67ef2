"""`convert edm2`: pickles become folders that sample as recorded; an oracle evaluates the files' own tensors."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL
from diffusers.models.unets.unet_2d import UNet2DOutput
from edm2_source_network import EDM2SourceNetwork
from safetensors.torch import load_file

from diffusers_ext import EDM2Pipeline, EDM2UNet2DModel
from diffusers_ext.checkpoints import convert_edm2
from diffusers_ext.checkpoints.edm2 import read_edm2
from diffusers_ext.cli import main
from diffusers_ext.models.edm2_unet import _RENAMED

GOLDENS = Path(__file__).parent / "goldens"
COND, UNCOND = (GOLDENS / f"edm2_{case}_ema_fp16_nosource.pkl" for case in ("cond", "uncond"))


def their_names(model: EDM2UNet2DModel) -> dict[str, torch.Tensor]:
    """The state dict under the authors' names."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in _RENAMED.items():
            name = name.replace(ours, theirs)
        renamed[name if name.startswith("logvar") else f"unet.{name}"] = tensor
    return renamed


def random_network(label_dim: int, **config) -> EDM2UNet2DModel:
    torch.manual_seed(1)
    shape = {"img_resolution": 8, "img_channels": 2, "channel_mult": (1, 2), "channels_per_head": 8}
    model = EDM2UNet2DModel(label_dim=label_dim, model_channels=8, **{**shape, **config})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.copy_(torch.rand([]) + 0.3)
    return model.eval()


@pytest.fixture
def vae(tmp_path) -> Path:
    AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize("case", ["cond", "uncond"])
def test_the_source_network_gives_the_recorded_outputs(case):
    """As the authors evaluate the float16 file, which is what our network is held to."""
    record = load_file(GOLDENS / f"edm2_{case}_io.safetensors")
    tolerance = json.loads((GOLDENS / f"edm2_{case}_io.json").read_text())["tolerance"]
    checkpoint = read_edm2(GOLDENS / f"edm2_{case}_ema_fp16_nosource.pkl")
    source = EDM2SourceNetwork(checkpoint.state_dict, checkpoint.config)
    labels = record["class_labels"].argmax(1) if "class_labels" in record else None
    for i, sigma in enumerate(record["sigma"].flatten().tolist()):
        rows = slice(i, i + 1)
        torch.testing.assert_close(
            source(record["x"][rows], sigma, None if labels is None else labels[rows]),
            record["output_ema_fp16_as_loaded"][rows],
            atol=tolerance["recommended_atol"], rtol=tolerance["recommended_rtol"],
        )  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {"channel_mult": (1, 2, 4), "attn_resolutions": (4, 2), "num_blocks": 2},
        {"resample_filter": (1, 3, 3, 1), "clip_act": None, "sigma_data": 0.9},
        {"channel_mult": (2, 1), "concat_balance": 0.3, "res_balance": 0.4, "attn_balance": 0.6},
        {"channel_mult_noise": 3, "channel_mult_emb": 2, "label_balance": 0.8, "clip_act": 0.7},
    ],
)
def test_structures_that_no_recorded_network_has(config):
    model = random_network(5, **config)
    source, x = EDM2SourceNetwork(their_names(model), dict(model.config)), torch.randn(2, 2, 8, 8)
    labels = torch.tensor([4, 0])
    with torch.no_grad():
        for sigma in (0.1, 2.0, 50.0):
            torch.testing.assert_close(
                source(x * sigma, sigma, labels), model(x * sigma, sigma, labels).sample, atol=1e-5, rtol=1e-4
            )


def test_a_converted_folder_samples_as_the_files_do(tmp_path, vae):
    """Read again in float16, every number is the one of the pickle; so are scale and bias of the latents."""
    pipe, error = convert_edm2(COND, tmp_path / "out", UNCOND, vae)
    assert 0 <= error < 1e-4
    saved = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for name, tensor in saved.items() if "fourier" not in name} == {torch.float16}
    again = EDM2Pipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float16)
    again.set_progress_bar_config(disable=True)
    for name in ("unet", "guidance_unet"):
        theirs = read_edm2({"unet": COND, "guidance_unet": UNCOND}[name]).state_dict
        ours = their_names(getattr(again, name))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key].to(ours[key].dtype)) for key in theirs)
    assert again.config.latent_scale == pytest.approx([0.11990407, 0.10822511, 0.13477089, 0.15243903], rel=1e-6)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    first, second = (p([3, 1], generator=torch.Generator().manual_seed(0), **call).images for p in (pipe, again))
    assert torch.equal(first, second)
    assert again([3], num_inference_steps=1).images[0].size == (16, 16)

    assert difference(COND, again.unet) < 1e-4 and difference(UNCOND, again.guidance_unet) < 1e-4
    assert difference(COND, again.unet.float()) > 1e-4, "float32 is the other reading of the gains"


@torch.no_grad()
def difference(path: Path, network: EDM2UNet2DModel) -> float:
    """Largest difference of denoised samples between a pickle's own tensors and a network."""
    source, config = EDM2SourceNetwork(read_edm2(path).state_dict, read_edm2(path).config), network.config
    x = torch.randn(2, config.img_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 1]) if config.label_dim else None
    both = [(network(s * x, s, labels).sample, source(s * x, s, labels)) for s in (0.1, 2.0, 50.0)]
    return max((ours - theirs).abs().max().item() for ours, theirs in both)


@pytest.mark.parametrize("break_it", ["tensor", "gain", "channels_per_head", "none"])
def test_the_oracle_sees_what_is_wrong(break_it):
    checkpoint = read_edm2(COND)
    unet = EDM2UNet2DModel.from_edm2_state_dict(checkpoint.state_dict, **checkpoint.config)
    if break_it == "tensor":
        weight = unet.dec["16x16_block0"].conv_res1.weight
        weight.data = weight.data.flip(0)
    elif break_it == "gain":
        unet.enc["8x8_block0"].emb_linear.gain.data += 0.5
    elif break_it == "channels_per_head":
        unet.dec["8x8_in0"].attn.heads = 1
    found = difference(COND, unet)
    assert (found < 1e-4) if break_it == "none" else (found > 1e-3), found


def test_what_is_refused_leaves_no_folder(tmp_path, monkeypatch):
    wrong = AutoencoderKL(latent_channels=3, block_out_channels=(8,), norm_num_groups=4)
    wrong.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="decodes latents of 3 channels, the network makes 4"):
        convert_edm2(COND, tmp_path / "out", vae=tmp_path / "vae")
    with pytest.raises(ValueError, match="guidance_unet has 4 channels and 10 classes"):
        convert_edm2(UNCOND, tmp_path / "out", COND)
    plain = EDM2UNet2DModel.from_pretrained.__func__
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="gives other outputs than the checkpoint"):
        patch.setattr(EDM2UNet2DModel, "from_pretrained", classmethod(lambda *a, **k: spoiled(plain(*a, **k))))
        convert_edm2(COND, tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="not finite"):
        patch.setattr(EDM2UNet2DModel, "forward", lambda self, x, *_, **__: UNet2DOutput(x * torch.nan))
        convert_edm2(COND, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert convert_edm2(COND, tmp_path / "out").error < 1e-6
    with pytest.raises(ValueError, match="is not empty"):
        convert_edm2(COND, tmp_path / "out")


def spoiled(network: EDM2UNet2DModel) -> EDM2UNet2DModel:
    network.out_conv.gain.data += 0.5
    return network


@pytest.mark.parametrize("scale", [[1.0, 2.0], [float("nan")] * 4, "text", None])
def test_encoders_without_numbers_are_refused(scale, tmp_path, monkeypatch):
    from diffusers_ext.checkpoints import edm2

    data = edm2.safe_load(COND)
    data["encoder"].state["scale"] = scale
    monkeypatch.setattr(edm2, "safe_load", lambda path: data)
    with pytest.raises(ValueError, match="scale of the encoder must be a finite number for each of the 4 channels"):
        read_edm2(COND)
    data["encoder"].class_name = "StandardRGBEncoder"
    assert read_edm2(COND).latent_scale is None


def test_the_command(tmp_path, vae):
    arguments = ["convert", "edm2", str(COND), str(tmp_path / "out"), "--uncond", str(UNCOND), "--vae", str(vae)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "largest difference" in done.output and "wrote EDM2Pipeline with EDM2UNet2DModel in float16" in done.output
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"ema": print}))
    refused = CliRunner().invoke(main, ["convert", "edm2", str(tmp_path / "bad.pkl"), str(tmp_path / "other")])
    assert refused.exit_code == 1 and "builtins.print, which is not on the allow-list" in refused.output
    assert not (tmp_path / "other").exists()
