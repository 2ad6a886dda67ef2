"""Reading guided-diffusion checkpoints: goldens of the authors' networks, structures they do not cover, bad files."""

import json
import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from adm_checkpoints import adm_state, save_adm
from adm_source_network import SourceNetwork
from click.testing import CliRunner
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from diffusers_ext import ADMUNet2DModel, ADMUpsamplerPipeline, BoostAndSkipDDIMScheduler, BoostAndSkipPipeline
from diffusers_ext.checkpoints import (
    PRESETS,
    convert_guided_diffusion,
    guided_diffusion_scheduler,
    load_guided_diffusion,
)
from diffusers_ext.checkpoints.guided_diffusion import ADMLayout, parse_flags, read_network, unet_config
from diffusers_ext.cli import main

GOLDENS = Path(__file__).parent / "goldens"
NETWORKS = ("celeba", "upsampler")  # the second of the old order and the old file format
# num_heads is not to be seen in the tensors; told, so that no warning is due.
TOLD = {"num_heads": 4, "noise_schedule": "cosine", "image_size": 16, "use_new_attention_order": True}


def golden(name):
    """The case, its tensors, and the flags to load its checkpoint."""
    case = json.loads((GOLDENS / f"gd_{name}_like_io.json").read_text())
    tensors = load_file(GOLDENS / f"gd_{name}_like_io.safetensors")
    return case, tensors, {**case["flags"], "noise_schedule": case["noise_schedule"]}


def network_input(tensors, case):
    x = tensors[f"{case}.x"]
    if f"{case}.low_res" in tensors:
        low_res = F.interpolate(tensors[f"{case}.low_res"], x.shape[2:], mode="bilinear", align_corners=False)
        x = torch.cat([x, low_res], dim=1)
    return x, tensors[f"{case}.t"], tensors.get(f"{case}.y")


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks_equal_the_authors(name, tmp_path):
    case, tensors, flags = golden(name)
    unet = load_guided_diffusion(GOLDENS / case["checkpoint"], **flags)
    scheduler = guided_diffusion_scheduler(GOLDENS / case["checkpoint"], **flags)
    assert type(unet) is UNet2DModel and not unet.training
    unet.save_pretrained(tmp_path)
    again = type(unet).from_pretrained(tmp_path)
    source = SourceNetwork(*read_network(GOLDENS / case["checkpoint"], None, flags)[:3])
    for size, atol in (("small", "recommended_atol"), ("flat", "recommended_atol_flat")):
        x, t, labels = network_input(tensors, size)
        bounds = {"atol": case["tolerance"][atol], "rtol": case["tolerance"]["recommended_rtol"]}
        for network in (unet, again):
            output = network(x, t, class_labels=labels).sample
            torch.testing.assert_close(output, tensors[f"{size}.output"], **bounds)
        torch.testing.assert_close(source(x, t, labels), tensors[f"{size}.output"], **bounds)
    assert type(scheduler) is DDPMScheduler
    assert len(scheduler.betas) == 1000 and scheduler.config.variance_type == "learned_range"


@pytest.mark.parametrize("name", ["celeba_ancestral_g4_dt3_r10", "celeba_ddim_eta0_g4_dt3_r25"])
@pytest.mark.parametrize("saved", [False, True])
def test_loops_of_the_authors(name, saved, tmp_path, monkeypatch):
    """Checkpoint, respacing, boost, skip and sampler together, also after saving and loading the pipeline."""
    case = json.loads((GOLDENS / f"gd_network_loop_{name}.json").read_text())
    tensors = load_file(GOLDENS / f"gd_network_loop_{name}.safetensors")
    flags = {**case["model_flags"], "noise_schedule": case["noise_schedule"]}
    unet = load_guided_diffusion(GOLDENS / case["model_checkpoint"], **flags)
    scheduler = guided_diffusion_scheduler(GOLDENS / case["model_checkpoint"], **flags)
    if case["loop"] == "ddim":
        scheduler = BoostAndSkipDDIMScheduler.from_config(scheduler.config)
    pipe = BoostAndSkipPipeline(unet, scheduler)
    if saved:
        pipe.save_pretrained(tmp_path)
        pipe = BoostAndSkipPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    noises = iter(tensors.get("step_noise", ()))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(noises))
    final = pipe(
        batch_size=len(tensors["init_noise"]),
        num_inference_steps=case["timestep_respacing"],
        gamma=case["gamma"],
        skip_steps=case["Delta_t"],
        latents=tensors["init_noise"],
        output_type="latent",
    ).images
    torch.testing.assert_close(final, tensors["final"], atol=2e-5, rtol=1e-4)


STRUCTURES = {
    "one number of heads at widths that differ": (
        {"widths": (32, 64), "attention": (True, True)}, {"num_heads": 4}, {"num_attention_heads": 4},
    ),
    "the same in the old order": (
        {"widths": (32, 64), "attention": (True, True)},
        {"num_heads": 4, "use_new_attention_order": False},
        {"num_attention_heads": 4},
    ),
    "a narrow start": (
        {"widths": (32, 64), "num_channels": 64}, {"num_head_channels": 16}, {"timestep_dim": 64},
    ),
    "pooling": ({"resampling": "pool"}, {"num_head_channels": 16}, {"conv_resample": False}),
    "convolutions": ({"resampling": "conv"}, {"num_head_channels": 16}, None),
    "no scale": ({"scale_shift": False}, {"num_head_channels": 16}, None),
    "no variance": ({"learn_sigma": False}, {"num_head_channels": 32}, None),
    "classes": ({"classes": 7, "num_res_blocks": 2}, {"num_head_channels": 64}, None),
    "one level": ({"widths": (32,), "attention": (True,)}, {"num_head_channels": 8}, None),
    "equal widths without attention": (
        {"widths": (32, 32, 32), "attention": (False, False, False), "num_res_blocks": 2},
        {"num_head_channels": 8},
        None,
    ),
    "old order": ({}, {"num_head_channels": 16, "use_new_attention_order": False}, None),
}  # fmt: skip


def difference(source: SourceNetwork, unet: UNet2DModel) -> float:
    """Largest difference of outputs, at early, middle and late timesteps of random input."""
    layout, generator = source.layout, torch.Generator().manual_seed(0)
    size, timesteps = 2 * 2 ** (len(layout.widths) - 1), torch.tensor([0, 10, 999])
    x = torch.randn(3, layout.in_channels, size, size, generator=generator)
    labels = None if layout.num_classes is None else torch.randint(layout.num_classes, (3,), generator=generator)
    return (unet(x, timesteps, class_labels=labels).sample - source(x, timesteps, labels)).abs().max().item()


@pytest.mark.parametrize("name", STRUCTURES)
@torch.no_grad()
def test_structures_beside_the_goldens(name, tmp_path):
    """The converted network equals the checkpoint's own tensors, and is a plain UNet2DModel where that suffices."""
    structure, flags, own = STRUCTURES[name]
    path = save_adm(tmp_path / "checkpoint.pt", **structure)
    state, layout, choices, unet, _ = read_network(path, None, {**TOLD, **flags})
    assert type(unet) is (UNet2DModel if own is None else ADMUNet2DModel)
    assert all(unet.config[key] == value for key, value in (own or {}).items())
    source = SourceNetwork(state, layout, choices)
    assert difference(source, unet) < 5e-5
    unet.save_pretrained(tmp_path / "unet")
    again = type(unet).from_pretrained(tmp_path / "unet")
    assert difference(source, again) < 5e-5


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_head_channels": 32},
        {"use_new_attention_order": False},
        {"num_head_channels": -1, "num_heads": 16},
    ],
)
@torch.no_grad()
def test_the_oracle_sees_a_wrong_network(wrong, tmp_path):
    """Heads of another size or order change the output by far more than rounding."""
    path = save_adm(tmp_path / "checkpoint.pt", attention=(True, True))
    right = {**TOLD, "num_head_channels": 16}
    state, layout, choices, *_ = read_network(path, None, right)
    unet = read_network(path, None, {**right, **wrong})[3]
    assert difference(SourceNetwork(state, layout, choices), unet) > 1e-2


def layout_of(preset: dict) -> ADMLayout:
    size = preset.get("image_size", preset.get("large_size"))
    mult = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}[size]
    mult = (1, 1, 2, 2, 4, 4) if "large_size" in preset else mult
    at = {size // int(resolution) for resolution in preset["attention_resolutions"].split(",")}
    return ADMLayout(
        in_channels=6 if "large_size" in preset else 3,
        out_channels=6,
        num_channels=preset["num_channels"],
        widths=tuple(int(m * preset["num_channels"]) for m in mult),
        attention=tuple(2**level in at for level in range(len(mult))),
        num_res_blocks=preset["num_res_blocks"],
        resampling="resblock",
        use_scale_shift_norm=True,
        num_classes=1000 if preset["class_cond"] else None,
    )


# Millions of parameters in the papers: Dhariwal & Nichol 2021, table 11 and 12.
PUBLISHED = {"imagenet64": 296, "imagenet128": 422, "imagenet256": 554, "imagenet512": 559}
OURS = {"imagenet128", "imagenet512", "imagenet64_256_upsampler"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_the_published_networks(name):
    preset = PRESETS[name]
    choices = {"num_heads": 4, "num_head_channels": -1, "dropout": 0.0, "diffusion_steps": 1000, "image_size": 64}
    cls, config = unet_config(layout_of(preset), {**choices, **preset})
    assert (cls is ADMUNet2DModel) == (name in OURS)
    with torch.device("meta"):
        unet = cls(**config)
    if name in PUBLISHED:
        assert round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6) == PUBLISHED[name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "imagenet512")) for name in PRESETS]
)
@torch.no_grad()
def test_small_networks_of_each_preset_equal_the_oracle(name, tmp_path):
    """The published structure and flags, at an eighth of the width or a quarter, with eight channels a head."""
    preset = {**PRESETS[name], "num_channels": 64 if name == "imagenet512" else 32}
    preset |= {"num_head_channels": 8} if PRESETS[name]["num_head_channels"] != -1 else {}
    layout = layout_of(preset)
    path = save_adm(
        tmp_path / "checkpoint.pt", widths=layout.widths, attention=layout.attention, classes=layout.num_classes,
        num_channels=layout.num_channels, num_res_blocks=layout.num_res_blocks, image_channels=layout.in_channels,
    )  # fmt: skip
    state, found, choices, unet, _ = read_network(path, None, preset)
    assert found == layout
    assert difference(SourceNetwork(state, layout, choices), unet) < 5e-5


def test_flags_are_inferred_and_the_rest_is_named(tmp_path, caplog):
    """Without flags all that shapes show is right, and a warning names what they do not."""
    path = save_adm(tmp_path / "checkpoint.pt", classes=5, num_res_blocks=2)
    with caplog.at_level("WARNING", logger="diffusers_ext"):
        unet = load_guided_diffusion(path)
        scheduler = guided_diffusion_scheduler(path)
    assert unet.config.num_class_embeds == 5 and unet.config.layers_per_block == 2
    assert unet.config.block_out_channels == (32, 64) and unet.config.out_channels == 6
    assert unet.config.down_block_types == ("ResnetDownsampleBlock2D", "AttnDownBlock2D")
    assert unet.config.sample_size == 64 and unet.config.attention_head_dim == 64 // 4
    assert scheduler.config.beta_schedule == "linear"
    text = caplog.text
    assert all(f"{name}=" in text for name in ("num_heads", "noise_schedule", "use_new_attention_order", "image_size"))
    caplog.clear()
    with caplog.at_level("WARNING", logger="diffusers_ext"):
        load_guided_diffusion(path, **TOLD)
    assert not caplog.text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}),
        ({"diffusion_steps": 4000}, {"beta_start": 0.000025, "beta_end": 0.005, "num_train_timesteps": 4000}),
        ({"noise_schedule": "cosine"}, {"beta_schedule": "squaredcos_cap_v2"}),
        ({"predict_xstart": "True"}, {"prediction_type": "sample"}),
    ],
)
def test_schedulers(flags, expected, tmp_path):
    scheduler = guided_diffusion_scheduler(save_adm(tmp_path / "checkpoint.pt"), **flags)
    for name, value in expected.items():
        assert scheduler.config[name] == (pytest.approx(value) if isinstance(value, float) else value), name


def test_fixed_variance_and_respacing(tmp_path):
    path = save_adm(tmp_path / "checkpoint.pt", learn_sigma=False)
    scheduler = guided_diffusion_scheduler(path, timestep_respacing="10,5", use_fp16=False)
    assert scheduler.config.variance_type == "fixed_large"
    assert len(scheduler.timesteps) == 15 and scheduler.timesteps[0] == 999 and len(scheduler.betas) == 1000


def test_half_precision(tmp_path):
    unet = load_guided_diffusion(save_adm(tmp_path / "checkpoint.pt"), use_fp16=True)
    assert unet.dtype == torch.float16


@pytest.mark.parametrize("style", ["zip", "old", "parameters", "views"])
def test_ways_of_saving(style, tmp_path):
    state = adm_state()
    if style == "parameters":
        state = {name: torch.nn.Parameter(value) for name, value in state.items()}
    if style == "views":
        flat = torch.cat([value.flatten() for value in state.values()]).requires_grad_()
        pieces = flat.split([value.numel() for value in state.values()])
        state = {name: piece.view_as(value) for (name, value), piece in zip(state.items(), pieces, strict=True)}
    torch.save(state, tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=style != "old")
    unet = load_guided_diffusion(tmp_path / "checkpoint.pt", **TOLD)
    assert torch.equal(unet.conv_in.weight, adm_state()["input_blocks.0.0.weight"])
    assert not any(parameter.requires_grad and parameter.is_leaf is False for parameter in unet.parameters())
    unet.save_pretrained(tmp_path / "unet")  # shared memory would be refused


CONTRADICTIONS = {
    "class_cond": (True, "label_emb.weight"),
    "num_channels": (64, "time_embed.0.weight"),
    "num_res_blocks": (3, "output_blocks"),
    "learn_sigma": (False, "out.2.weight"),
    "use_scale_shift_norm": (False, "input_blocks.1.0.emb_layers.1.weight"),
    "resblock_updown": (False, "output_blocks"),
    "channel_mult": ("1,1", "out_layers.3.weight"),
    "attention_resolutions": ("16", "input_blocks.1.1.qkv.weight"),
    "num_heads": (5, "middle_block.1.qkv.weight"),
    "num_head_channels": (48, "middle_block.1.qkv.weight"),
    "large_size": (64, "input_blocks.0.0.weight"),
}


@pytest.mark.parametrize("flag", CONTRADICTIONS)
def test_a_flag_that_contradicts_the_tensors(flag, tmp_path):
    value, tensor = CONTRADICTIONS[flag]
    path = save_adm(tmp_path / "checkpoint.pt")
    told = {"image_size": 16} if flag != "large_size" else {}
    with pytest.raises(ValueError, match=tensor.replace(".", r"\.")) as error:
        load_guided_diffusion(path, **told, **{flag: value})
    assert flag in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_sise": 64}, "unknown flags.*image_sise"),
        ({"image_size": "big"}, "image_size='big'"),
        ({"class_cond": "maybe"}, "class_cond='maybe'"),
        ({"preset": "imagenet"}, "preset must be one of.*celeba64"),
        ({"noise_schedule": "quadratic"}, "noise_schedule must be"),
        ({"timestep_respacing": "ddim999"}, "respacing 'ddim999'"),
        ({"rescale_timesteps": True, "diffusion_steps": 4000}, "rescale_timesteps=True"),
        ({"num_heads_upsample": 8}, "num_heads_upsample=8"),
    ],
)
def test_bad_flags(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_guided_diffusion(save_adm(tmp_path / "checkpoint.pt"), **flags)


def test_an_upsampler_has_sizes_and_an_order_of_its_own(tmp_path):
    path = save_adm(tmp_path / "checkpoint.pt", image_channels=6)
    unet = load_guided_diffusion(path, large_size=64, small_size=16)
    assert unet.config.in_channels == 6 and unet.config.sample_size == 64
    with pytest.raises(ValueError, match="give large_size and small_size"):
        load_guided_diffusion(path, image_size=64)
    with pytest.raises(ValueError, match="upsamplers always have the old order"):
        load_guided_diffusion(path, large_size=64, use_new_attention_order=True)


def test_files_that_are_no_checkpoints(tmp_path):
    whole = save_adm(tmp_path / "checkpoint.pt").read_bytes()
    files = {
        "missing.pt": None,
        "empty.pt": b"",
        "text.pt": b"hello",
        "cut.pt": whole[: len(whole) // 2],
        "page.pt": b"<!DOCTYPE html><html></html>",
    }
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_guided_diffusion(tmp_path / name)
    for content in ([1, 2], {"a": 1}, {1: torch.zeros(1)}, torch.zeros(3), {}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"other\.pt|no guided-diffusion network"):
            load_guided_diffusion(tmp_path / "other.pt")


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched-by-a-checkpoint"),))


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**adm_state(), "extra": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_guided_diffusion(tmp_path / "evil.pt")
    assert not (tmp_path / "touched-by-a-checkpoint").exists()


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_changed_set_of_tensors_is_refused_by_name(data):
    """A tensor left out, added, or of another shape gives a ValueError that names a tensor, never a wrong network."""
    state = adm_state()
    name = data.draw(st.sampled_from(sorted(state)))
    change = data.draw(st.sampled_from(["drop", "add", "transpose", "grow"]))
    if change == "drop":
        del state[name]
    elif change == "add":
        state[f"{name}.more"] = torch.zeros(1)
    elif change == "transpose":
        if state[name].ndim < 2 or state[name].shape[0] == state[name].shape[1]:
            return
        state[name] = state[name].transpose(0, 1)
    else:
        state[name] = torch.cat([state[name], state[name]])
    folder = Path(__file__).parent / "unused"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError):
        patch.setattr("diffusers_ext.checkpoints.guided_diffusion.read_state_dict", lambda path: state)
        load_guided_diffusion(folder, **TOLD)


def test_bit_flips_and_cuts_give_clear_errors(tmp_path):
    """Damaged files: a ValueError, or, where only a weight's value changed, a network."""
    whole = save_adm(tmp_path / "checkpoint.pt").read_bytes()
    source = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        if source.random() < 0.5:
            damaged = damaged[: source.randrange(len(damaged))]
        else:
            for _ in range(20):
                damaged[source.choice([source.randrange(2000), source.randrange(len(damaged))])] ^= (
                    1 << source.randrange(8)
                )
        (tmp_path / "damaged.pt").write_bytes(damaged)
        with suppress(ValueError):
            load_guided_diffusion(tmp_path / "damaged.pt", **TOLD)


def test_flags_as_on_the_original_command_line():
    words = ["--image_size", "64", "--class_cond=True", "--attention-resolutions", "32,16,8"]
    words += ["--num_head_channels", "-1"]
    assert parse_flags(words) == {
        "image_size": "64", "class_cond": "True", "attention_resolutions": "32,16,8", "num_head_channels": "-1",
    }  # fmt: skip
    for wrong in (["image_size", "64"], ["--image_size"]):
        with pytest.raises(ValueError, match="pairs"):
            parse_flags(wrong)


@pytest.mark.parametrize(
    ("structure", "flags", "cls"),
    [
        ({}, {"image_size": 16}, DDPMPipeline),
        ({"classes": 5}, {"image_size": 16}, BoostAndSkipPipeline),
        ({"attention": (True, True)}, {"image_size": 16}, BoostAndSkipPipeline),
        ({"image_channels": 6, "classes": 5}, {"large_size": 16}, ADMUpsamplerPipeline),
    ],
)
def test_conversion_writes_a_pipeline(structure, flags, cls, tmp_path):
    path = save_adm(tmp_path / "checkpoint.pt", **structure)
    pipe, error = convert_guided_diffusion(path, tmp_path / "out", num_heads=4, dtype=torch.float16, **flags)
    assert type(pipe) is cls and 0 < error < 0.1
    loaded = cls.from_pretrained(tmp_path / "out")
    assert loaded.unet.config.in_channels == structure.get("image_channels", 3)
    assert len((tmp_path / "out/unet/diffusion_pytorch_model.safetensors").read_bytes()) < 1.2 * sum(
        2 * value.numel() for value in adm_state(**structure).values()
    )
    if cls is DDPMPipeline:
        kept = BoostAndSkipPipeline.from_pretrained(tmp_path / "out")
        kept.set_progress_bar_config(disable=True)
        assert kept(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
        loaded.set_progress_bar_config(disable=True)
        assert loaded(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("spoiled", ["the network", "the folder"])
def test_a_failed_check_writes_nothing(spoiled, tmp_path, monkeypatch):
    """Weights that are finite but overflow within the network, and a folder that loads as another network."""
    path, plain = save_adm(tmp_path / "checkpoint.pt"), UNet2DModel.from_pretrained.__func__
    if spoiled == "the network":
        torch.save({name: 1e30 * value for name, value in adm_state().items()}, path)
    monkeypatch.setattr(UNet2DModel, "from_pretrained", classmethod(lambda cls, *a, **k: shifted(plain(cls, *a, **k))))
    words = "not finite" if spoiled == "the network" else "gives other outputs than the checkpoint"
    with pytest.raises(ValueError, match=words):
        convert_guided_diffusion(path, tmp_path / "out", **TOLD)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def shifted(unet: UNet2DModel) -> UNet2DModel:
    unet.conv_out.bias.data += 1
    return unet


def test_the_command(tmp_path):
    """The original's flags as they stand, half precision, and what went wrong in one line."""
    path = save_adm(tmp_path / "checkpoint.pt", classes=5)
    flags = ["--image_size", "16", "--num_head_channels", "16", "--class_cond", "True", "--noise_schedule", "cosine"]
    arguments = ["convert", "guided-diffusion", str(path), str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*arguments, "--dtype", "fp16", *flags])
    assert done.exit_code == 0, done.output
    assert "largest difference" in done.output and "wrote BoostAndSkipPipeline with UNet2DModel" in done.output
    pipe = BoostAndSkipPipeline.from_pretrained(tmp_path / "out")
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2" and pipe.unet.config.attention_head_dim == 16
    again = CliRunner().invoke(main, [*arguments, *flags])
    assert again.exit_code == 1 and "is not empty" in again.output
    arguments[-1] += "2"
    wrong = CliRunner().invoke(main, [*arguments, "--preset", "imagenet64"])
    assert wrong.exit_code == 1 and "num_channels=192 contradicts the checkpoint" in wrong.output
    assert not (tmp_path / "out2").exists()
