"""FlowPostprocessingPipeline: zero velocity is the identity, ODEs with known answers, bases, latents, bad input."""

import inspect
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from contracts import PipelineContract, ddpm_gives_tensors
from conventions import newer_torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from fresh_process import run_fresh
from PIL import Image
from tiny_pipelines import tiny_stable_diffusion
from torch import nn

from diffusers_ext import BoostAndSkipDDIMScheduler, BoostAndSkipPipeline, FlowPostprocessingPipeline
from diffusers_ext.hub import export_pipeline
from diffusers_ext.pipelines import flow_postprocessing as module

SCHEDULERS = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler}
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def tiny_unet(channels: int = 3, classes: int | None = None, seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4, num_class_embeds=classes,
    ).eval()  # fmt: skip


class Field(ModelMixin, ConfigMixin):
    """v = rate x + slope t + shift_c, and a note of every call."""

    @register_to_config
    def __init__(self, rate=0.0, slope=0.0, shifts=None, in_channels: int = 3, sample_size: int | None = None):
        super().__init__()
        self.register_to_config(num_class_embeds=None if shifts is None else len(shifts))
        self.register_buffer("one", torch.ones(1))
        self.unused = nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, sample, timestep, class_labels=None):
        self.seen.append(timestep.clone())
        t = timestep.view(-1, 1, 1, 1) / 1000
        v = self.config.rate * sample + self.config.slope * t * self.one
        if class_labels is not None:
            v = v + torch.tensor(self.config.shifts)[class_labels].view(-1, 1, 1, 1)
        return UNet2DOutput(sample=v)


def pipeline(model=None, scheduler="euler", **components) -> FlowPostprocessingPipeline:
    pipe = FlowPostprocessingPipeline(tiny_unet() if model is None else model, SCHEDULERS[scheduler](), **components)
    pipe.set_progress_bar_config(disable=True)
    if pipe.base is not None:
        pipe.base.set_progress_bar_config(disable=True)
    return pipe


def zero_unet(**options) -> UNet2DModel:
    unet = tiny_unet(**options)
    nn.init.zeros_(unet.conv_out.weight), nn.init.zeros_(unet.conv_out.bias)
    return unet


def run(pipe, images=IMAGES, **options):
    return pipe(images, **{"output_type": "pt", **options}).images


class TestContract(PipelineContract):
    variants = tuple(SCHEDULERS)
    batch = 2
    steps = 3
    file = Path(inspect.getsourcefile(module))

    def build(self, variant):
        base = tiny_unet(seed=1)
        base.conv_out.weight.data *= 0.2
        pipe = pipeline(tiny_unet(), variant, base=DDPMPipeline(base, DDPMScheduler(prediction_type="sample")))
        pipe.model.conv_out.weight.data *= 0.2
        pipe.set_progress_bar_config(disable=False)
        return pipe

    def options(self, variant):
        return {
            "num_inference_steps": 3 if variant == "euler" else 2,
            "base_kwargs": {"batch_size": 2, "num_inference_steps": 3},
        }

    def several(self, variant, count):
        return {"base_kwargs": {"batch_size": count, "num_inference_steps": 3}}

    def without_optional(self, pipe, variant):
        return {"images": IMAGES, "base_kwargs": None}

    @pytest.mark.parametrize("form", ["pickled", "variant"])
    def test_other_forms_of_weights(self, form, tmp_path, monkeypatch):
        """Without the base: diffusers cannot look for variants where a component is a pipeline."""
        build = self.build

        def alone(variant):
            pipe = build(variant)
            pipe.base = None
            return pipe

        monkeypatch.setattr(self, "build", alone)
        monkeypatch.setattr(self, "options", lambda variant: {"images": IMAGES, "num_inference_steps": 2})
        super().test_other_forms_of_weights(form, tmp_path)

    @ddpm_gives_tensors
    def test_reduced_precision(self, variant, monkeypatch):
        super().test_reduced_precision(variant, monkeypatch)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("options", [{}, {"num_inference_steps": 1}, {"strength": 0.3}, {"strength": 0}])
def test_zero_velocity_is_the_identity(scheduler, options):
    pipe = pipeline(zero_unet(), scheduler)
    assert torch.equal(run(pipe, **options), IMAGES)
    array = IMAGES.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(run(pipe, array, output_type="np", **options), array)
    pictures = [Image.fromarray(pixels) for pixels in PIXELS]
    for given in (pictures, PIXELS):
        for picture, pixels in zip(run(pipe, given, output_type="pil", **options), PIXELS, strict=True):
            assert np.array_equal(np.asarray(picture), pixels)
    latents = torch.randn(2, 3, 8, 8)
    assert torch.equal(run(pipe, None, latents=latents, output_type="latent", **options), latents)


def test_zero_velocity_is_the_identity_in_reduced_precision():
    assert torch.equal(run(pipeline(zero_unet()).to(torch.bfloat16)), IMAGES)


def test_strength_zero_is_the_identity_for_any_network():
    for scheduler in SCHEDULERS:
        assert torch.equal(run(pipeline(scheduler=scheduler), strength=0), IMAGES)
        assert not torch.equal(run(pipeline(scheduler=scheduler)), IMAGES)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_constant_velocity_moves_by_velocity_times_time(scheduler, strength):
    """In any number of steps, and along the velocity, not against it."""
    pipe = pipeline(Field(shifts=[0.1, -0.2]), scheduler)
    start = IMAGES * 0.5 + 0.2
    for steps in (1, 2, 5):
        result = run(pipe, start, class_labels=[0, 1], num_inference_steps=steps, strength=strength)
        moved = start + strength * torch.tensor([0.1, -0.2]).view(2, 1, 1, 1) / 2  # [-1, 1] is twice as wide
        torch.testing.assert_close(result, moved, atol=3e-5, rtol=0)


@pytest.mark.parametrize(("scheduler", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(scheduler, order):
    """dx/dt = -x + t from x_0: x(s) = s - 1 + (x_0 + 1) exp(-s)."""
    x0, strength = torch.full((1, 3, 2, 2), 0.4), 0.8
    exact = strength - 1 + (x0 + 1) * np.exp(-strength)
    pipe, errors = pipeline(Field(rate=-1.0, slope=1.0), scheduler), []
    for steps in (5, 9, 17):
        x = run(pipe, None, latents=x0, output_type="latent", num_inference_steps=steps, strength=strength)
        errors.append((x - exact).abs().max().item())
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    assert (slopes > order - 0.25).all() and errors[-1] < (0.02 if order == 1 else 1e-3), (errors, slopes)


def test_the_network_sees_flow_time_and_how_often():
    pipe = pipeline(Field())
    run(pipe, num_inference_steps=4)
    torch.testing.assert_close(torch.stack(pipe.model.seen)[:, 0], torch.tensor([0.0, 250, 500, 750]))
    assert pipe.num_timesteps == 4 and pipe.model.seen[0].shape == (2,)
    pipe.model.seen.clear()
    run(pipe, num_inference_steps=2, strength=0.5)
    torch.testing.assert_close(torch.stack(pipe.model.seen)[:, 0], torch.tensor([0.0, 250]))
    pipe = pipeline(Field(), "heun")
    run(pipe, num_inference_steps=3)
    assert len(pipe.model.seen) == pipe.num_timesteps == 5


def fake_torchdiffeq(monkeypatch, calls: list):
    """A module whose odeint takes 20 midpoint steps, and notes its arguments."""

    def odeint(func, y0, t, *, rtol, atol, method):
        calls.append((y0.dtype, t.tolist(), rtol, atol, method))
        y, step = y0, (t[1] - t[0]) / 20
        for i in range(20):
            middle = y + step / 2 * func(t[0] + i * step, y)
            y = y + step * func(t[0] + (i + 0.5) * step, middle)
        return torch.stack([y0, y])

    fake = types.ModuleType("torchdiffeq")
    fake.odeint = odeint
    monkeypatch.setitem(sys.modules, "torchdiffeq", fake)


def test_dopri5_is_called_with_the_field_and_the_tolerances(monkeypatch):
    calls = []
    fake_torchdiffeq(monkeypatch, calls)
    options = {"solver": "dopri5", "strength": 0.8, "rtol": 1e-3, "atol": 1e-4}
    x0 = torch.full((1, 3, 2, 2), 0.4)
    x = run(pipeline(Field(rate=-1.0, slope=1.0)), None, latents=x0, output_type="latent", **options)
    torch.testing.assert_close(x, -0.2 + (x0 + 1) * np.exp(-0.8), atol=1e-3, rtol=0)
    assert calls == [(torch.float32, [0.0, pytest.approx(0.8)], 1e-3, 1e-4, "dopri5")]
    moved = run(pipeline(Field(shifts=[0.1, -0.2])), IMAGES / 2 + 0.2, class_labels=[0, 1], solver="dopri5")
    expected = IMAGES / 2 + 0.2 + torch.tensor([0.05, -0.1]).view(2, 1, 1, 1)
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)
    assert torch.equal(run(pipeline(zero_unet()), solver="dopri5"), IMAGES)
    before = len(calls)
    assert torch.equal(run(pipeline(), solver="dopri5", strength=0), IMAGES) and len(calls) == before
    low = pipeline().to(torch.bfloat16)
    assert torch.isfinite(run(low, solver="dopri5")).all() and calls[-1][0] == torch.float32


def test_dopri5_of_torchdiffeq():
    pytest.importorskip("torchdiffeq")
    x0 = torch.full((1, 3, 2, 2), 0.4)
    pipe = pipeline(Field(rate=-1.0, slope=1.0))
    x = run(pipe, None, latents=x0, output_type="latent", solver="dopri5", strength=0.8)
    torch.testing.assert_close(x, -0.2 + (x0 + 1) * np.exp(-0.8), atol=1e-4, rtol=0)


def test_dopri5_without_torchdiffeq(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="pip install torchdiffeq"):
        run(pipeline(), solver="dopri5")


def test_every_kind_of_image_gives_the_same():
    pipe = pipeline()
    tensor = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    expected = run(pipe, tensor)
    for images in ([Image.fromarray(pixels) for pixels in PIXELS], PIXELS, tensor / 255, (PIXELS / 255.0)):
        torch.testing.assert_close(run(pipe, images), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(run(pipe, Image.fromarray(PIXELS[0])), expected[:1], atol=1e-5, rtol=0)
    latent = run(pipe, tensor, output_type="latent")
    torch.testing.assert_close((latent / 2 + 0.5).clamp(0, 1), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(run(pipe, None, latents=tensor / 127.5 - 1), expected, atol=1e-6, rtol=0)


def test_labels_reach_the_network():
    pipe = pipeline(tiny_unet(classes=4))
    one = run(pipe, class_labels=1)
    assert torch.equal(one, run(pipe, class_labels=[1, 1]))
    mixed = run(pipe, class_labels=torch.tensor([1, 3]))
    torch.testing.assert_close(mixed[0], one[0], atol=1e-6, rtol=0)
    assert not torch.allclose(mixed[1], one[1], atol=1e-4)


def digits_base(null_class=3) -> BoostAndSkipPipeline:
    return BoostAndSkipPipeline(tiny_unet(classes=4, seed=1), DDPMScheduler(prediction_type="sample"), null_class)


def test_a_conditional_base_and_flow_share_their_labels():
    pipe = pipeline(tiny_unet(classes=4), base=digits_base())
    base_kwargs = {"num_inference_steps": 2, "guidance_scale": 3.0}
    drawn = pipe.base(
        class_labels=[1, 2], generator=torch.Generator().manual_seed(0), output_type="pt", **base_kwargs
    ).images
    expected = run(pipe, drawn, class_labels=[1, 2])
    options = {"class_labels": [1, 2], "base_kwargs": base_kwargs, "generator": torch.Generator().manual_seed(0)}
    assert torch.equal(run(pipe, None, **options), expected)
    unconditional = pipeline(base=pipe.base)
    options["generator"] = torch.Generator().manual_seed(0)
    assert torch.equal(run(unconditional, None, **options), run(unconditional, drawn))


def test_labels_are_the_networks_alone_where_the_base_takes_none():
    base = DDPMPipeline(tiny_unet(seed=1), DDPMScheduler())
    result = run(
        pipeline(tiny_unet(classes=4), base=base), None, class_labels=2, base_kwargs={"num_inference_steps": 2}
    )
    assert result.shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="DDPMPipeline does not take class_labels"):
        run(pipeline(base=base), None, class_labels=2)


def test_labels_are_checked_before_the_base_draws(monkeypatch):
    base = DDPMPipeline(tiny_unet(seed=1), DDPMScheduler())
    monkeypatch.setattr(base.unet, "forward", lambda *_, **__: pytest.fail("the base draws"))
    for labels, message in ((None, "class_labels must be given"), ([4], r"class_labels must be in \[0, 4\)")):
        with pytest.raises(ValueError, match=message):
            run(pipeline(tiny_unet(classes=4), base=base), None, class_labels=labels)


def test_a_tuple_of_generators_goes_to_the_base_as_a_list():
    pipe = pipeline(base=DDPMPipeline(tiny_unet(seed=1), DDPMScheduler()))
    kwargs = {"base_kwargs": {"batch_size": 2, "num_inference_steps": 2}}
    generators = [[torch.Generator().manual_seed(seed) for seed in (1, 2)] for _ in range(2)]
    listed = run(pipe, None, generator=generators[0], **kwargs)
    assert torch.equal(run(pipe, None, generator=tuple(generators[1]), **kwargs), listed)


def test_prompts_go_through_the_base_in_both_spaces():
    base = tiny_stable_diffusion()
    call = {"num_inference_steps": 2, "guidance_scale": 2.0}

    def seeded():
        return torch.Generator().manual_seed(0)

    latents = base(["a b", "c"], generator=seeded(), output_type="latent", **call).images
    images = base(["a b", "c"], generator=seeded(), output_type="pt", **call).images
    field = Field(in_channels=3, shifts=[0.1])
    pixel = pipeline(field, base=base)
    result = run(pixel, None, prompt=["a b", "c"], class_labels=0, base_kwargs=call, generator=seeded())
    torch.testing.assert_close(result, (images + 0.05).clamp(0, 1), atol=1e-6, rtol=0)

    latent = pipeline(zero_unet(channels=4), base=base, space="latent")
    kwargs = {"prompt": ["a b", "c"], "base_kwargs": call}
    assert torch.equal(run(latent, None, **kwargs, generator=seeded(), output_type="latent"), latents)
    assert torch.equal(run(latent, None, **kwargs, generator=seeded()), images)  # the base's own decoding


@torch.no_grad()
def test_images_go_through_the_autoencoder_in_latent_space():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 8), up_block_types=("UpDecoderBlock2D",) * 2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=2, scaling_factor=0.5, shift_factor=0.1,
    ).eval()  # fmt: skip
    pipe = pipeline(Field(shifts=[0.3], in_channels=4), vae=vae, space="latent")
    images = torch.rand(2, 3, 16, 16)
    z = (vae.encode(images * 2 - 1).latent_dist.mode() - 0.1) * 0.5
    torch.testing.assert_close(run(pipe, images, class_labels=0, output_type="latent"), z + 0.3, atol=1e-5, rtol=0)
    decoded = vae.decode((z + 0.3) / 0.5 + 0.1).sample
    result = run(pipe, images, class_labels=0)
    torch.testing.assert_close(result, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    vae.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(ValueError, match="channel by channel"):
        run(pipe, images, class_labels=0)
    pipe.vae = None
    with pytest.raises(ValueError, match=r"needs an autoencoder; assign pipe\.vae, or pipe\.base with one"):
        run(pipe, images, class_labels=0)


def test_the_base_moves_along():
    pipe = pipeline(base=digits_base())
    assert pipe.to(torch.float64) is pipe
    assert pipe.model.dtype == pipe.base.unet.dtype == torch.float64
    assert pipe.to("meta", dtype=torch.float16).base.unet.device.type == "meta"


def run_base(pipe):
    options = {"generator": torch.Generator().manual_seed(0), "base_kwargs": {"num_inference_steps": 2}}
    return run(pipe, None, **options)


def test_the_base_is_offloaded_along():
    """On the CPU, the one device here; the hooks are the same."""
    pipe = pipeline(base=DDIMPipeline(tiny_unet(seed=1), DDIMScheduler()))
    expected = run_base(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert hasattr(pipe.base.unet, "_hf_hook") and hasattr(pipe.model, "_hf_hook")
        assert torch.equal(run_base(pipe), expected)
    pipe.remove_all_hooks()
    assert not hasattr(pipe.base.unet, "_hf_hook") and not hasattr(pipe.model, "_hf_hook")


@newer_torch
def test_the_base_is_offloaded_along_in_groups():
    pipe = pipeline(base=DDIMPipeline(tiny_unet(seed=1), DDIMScheduler()))
    expected = run_base(pipe)
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(run_base(pipe), expected)
    assert pipe._maybe_raise_error_if_group_offload_active(module=pipe.base.unet)


def test_sequential_offload_reaches_the_base(monkeypatch):
    called = []
    monkeypatch.setattr(
        DiffusionPipeline, "enable_sequential_cpu_offload", lambda self, *args: called.append((type(self), args))
    )
    pipe = pipeline(base=digits_base())
    pipe.enable_sequential_cpu_offload(device="cuda:0")
    assert called == [(FlowPostprocessingPipeline, (None, "cuda:0")), (BoostAndSkipPipeline, (None, "cuda:0"))]


def test_a_nested_base_of_ours_is_saved_and_loaded(tmp_path):
    pipe = pipeline(tiny_unet(classes=4), base=digits_base())
    pipe.save_pretrained(tmp_path)
    loaded = FlowPostprocessingPipeline.from_pretrained(tmp_path)
    assert type(loaded.base) is BoostAndSkipPipeline and loaded.base.config.null_class == 3
    assert loaded.vae is None and loaded.config.space == "pixel"
    for name, value in pipe.base.unet.state_dict().items():
        assert torch.equal(value, loaded.base.unet.state_dict()[name])
    for name, value in pipe.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name])


def test_without_a_base(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = FlowPostprocessingPipeline.from_pretrained(tmp_path)
    assert loaded.base is None
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run(loaded), run(pipe), atol=1e-4, rtol=0)
    with_base = FlowPostprocessingPipeline.from_pretrained(tmp_path, base=digits_base())
    assert type(with_base.base) is BoostAndSkipPipeline


def test_the_scheduler_can_be_exchanged():
    pipe = pipeline()
    expected = run(pipeline(scheduler="heun"))
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    assert torch.equal(run(pipe), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": None}, "images must be given: the pipeline has no base"),
        ({"images": IMAGES[:, :1]}, "images must have 3 channels"),
        ({"images": IMAGES[..., :7]}, "images must be 8 x 8 in the network's space"),
        ({"images": IMAGES * 2 - 1}, r"images must be uint8 or floating point in \[0, 1\]"),
        ({"images": IMAGES * 255}, r"images must be uint8 or floating point in \[0, 1\]"),
        ({"images": "picture.png"}, "images must be a PIL image"),
        ({"latents": IMAGES}, "images leaves nothing to draw"),
        ({"prompt": "a cat"}, "images leaves nothing to draw"),
        ({"base_kwargs": {}}, "images leaves nothing to draw"),
        ({"images": None, "latents": IMAGES[0]}, "latents must have shape"),
        ({"images": None, "latents": IMAGES * float("nan")}, "latents must be finite"),
        ({"class_labels": 1}, "the model is unconditional"),
        ({"strength": 1.5}, r"strength must be in \[0, 1\]"),
        ({"num_inference_steps": 0}, "num_inference_steps must be"),
        ({"solver": "rk4"}, 'solver must be "scheduler" or "dopri5"'),
        ({"solver": "dopri5", "rtol": -1}, "rtol and atol"),
        ({"solver": "dopri5", "callback_on_step_end": lambda *_: {}}, "dopri5 has no steps to show"),
        ({"generator": [torch.Generator()]}, "generator is a list of 1"),
        ({"output_type": "jpg"}, "output_type must be"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        run(pipeline(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": [1, 2, 3]}, "class_labels must hold 1 or batch_size=2"),
        ({"class_labels": 4}, r"class_labels must be in \[0, 4\)"),
        ({}, "class_labels must be given"),
    ],
)
def test_labels_of_a_conditional_flow(options, message):
    with pytest.raises(ValueError, match=message):
        run(pipeline(tiny_unet(classes=4)), **options)


@pytest.mark.parametrize(
    ("base_kwargs", "message"),
    [
        ({"output_type": "np"}, r"base_kwargs must not hold \['output_type'\]"),
        ({"class_labels": 1}, r"base_kwargs must not hold \['class_labels'\]"),
        ({"guidance": 2.0}, "BoostAndSkipPipeline does not take guidance"),
    ],
)
def test_bad_base_kwargs(base_kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(pipeline(base=digits_base()), None, class_labels=1, base_kwargs=base_kwargs)


def test_schedulers_that_solve_something_else():
    pipe = pipeline()
    for scheduler, message in (
        (DDPMScheduler(), "got DDPMScheduler"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=True"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True"),
    ):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=message):
            run(pipe)


def test_spaces():
    with pytest.raises(ValueError, match='space must be "pixel" or "latent"'):
        pipeline(space="pixels")
    with pytest.raises(ValueError, match="needs an autoencoder"):
        pipeline(space="latent", base=digits_base())


def test_an_export_holds_the_code_of_the_base(tmp_path):
    """In a fresh process without the package; load_flow_export.py checks the classes and draws."""
    pipe = pipeline(tiny_unet(classes=4), base=digits_base())
    options = {"class_labels": [1, 2], "base_kwargs": {"num_inference_steps": 2, "guidance_scale": 2.0}}
    expected = run(pipe, None, **options, generator=torch.Generator().manual_seed(7))
    export_pipeline(pipe, tmp_path / "export")
    (tmp_path / "export/options.json").write_text(json.dumps(options))
    run_fresh("load_flow_export.py", str(tmp_path / "export"), cache=tmp_path)
    drawn = torch.from_numpy(np.load(tmp_path / "export/drawn.npy"))
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)


def test_an_export_refuses_a_base_that_would_not_load(tmp_path):
    base = digits_base()
    base.scheduler = BoostAndSkipDDIMScheduler()
    with pytest.raises(ValueError, match=r"base holds components .*'scheduler': 'BoostAndSkipDDIMScheduler'"):
        export_pipeline(pipeline(base=base), tmp_path / "export")
    assert not list(tmp_path.iterdir())
