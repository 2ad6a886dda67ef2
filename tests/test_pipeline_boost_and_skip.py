"""BoostAndSkipPipeline: off equals stock, on equals the equations and the authors' recorded loops."""

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from contracts import PipelineContract
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from fresh_process import run_fresh
from safetensors.torch import load_file

from diffusers_ext.pipelines import boost_and_skip as module
from diffusers_ext.pipelines.boost_and_skip import BoostAndSkipPipeline
from diffusers_ext.schedulers.scheduling_boost_and_skip import (
    BoostAndSkipDDIMScheduler,
    BoostAndSkipDDPMScheduler,
    BoostAndSkipDPMSolverMultistepScheduler,
    BoostAndSkipEulerDiscreteScheduler,
)

GOLDENS = Path(__file__).parent / "goldens"
OURS = {
    "ddpm": BoostAndSkipDDPMScheduler,
    "ddim": BoostAndSkipDDIMScheduler,
    "euler": BoostAndSkipEulerDiscreteScheduler,
    "dpm": BoostAndSkipDPMSolverMultistepScheduler,
}
STOCK = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm": DPMSolverMultistepScheduler,
}


def tiny_unet(classes: int | None = None, out_channels: int = 3, seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=out_channels, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4, num_class_embeds=classes,
    ).eval()  # fmt: skip


def pipeline(scheduler, null_class: int | None = None, **unet) -> BoostAndSkipPipeline:
    pipe = BoostAndSkipPipeline(tiny_unet(**unet), scheduler, null_class)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **options) -> torch.Tensor:
    generator = options.pop("generator", None) or torch.Generator().manual_seed(3)
    return pipe(**{"generator": generator, "output_type": "pt", "num_inference_steps": 10, **options}).images


def to_image(x: torch.Tensor) -> torch.Tensor:
    return (x / 2 + 0.5).clamp(0, 1)


class TestContract(PipelineContract):
    variants = ("stock", *OURS)
    batch = 2
    steps = 4
    file = Path(inspect.getsourcefile(module))

    def build(self, variant):
        scheduler = DDPMScheduler if variant == "stock" else OURS[variant]
        boost = {} if variant == "stock" else {"gamma": 2.0, "skip_steps": 2}
        unet = tiny_unet(classes=4)
        unet.conv_out.weight.data *= 0.3  # an image prediction well within [-1, 1], so that nothing is clipped
        return BoostAndSkipPipeline(unet, scheduler(prediction_type="sample", **boost), null_class=3)

    def options(self, variant):
        own = {"gamma": 2.0, "skip_steps": 2} if variant == "stock" else {}
        return {"class_labels": [1, 1], "num_inference_steps": 6, "guidance_scale": 2.0, **own}

    def several(self, variant, count):
        return {"class_labels": [1] * count}


def test_a_stock_repository_loads_with_custom_pipeline_alone(tmp_path):
    """google/ddpm-* style: DDPMPipeline.save_pretrained, no null class, nothing but diffusers."""
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "repository")
    run_fresh("load_stock_repository.py", str(tmp_path / "repository"), inspect.getsourcefile(module), cache=tmp_path)
    pipe = pipeline(DDPMScheduler())
    boosted = run(pipe, gamma=4.0, skip_steps=3, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(
        torch.from_numpy(np.load(tmp_path / "repository/boosted.npy")), boosted, atol=1e-4, rtol=0
    )


def test_off_is_the_stock_pipeline():
    unet = tiny_unet()
    stock = DDPMPipeline(unet, DDPMScheduler())
    stock.set_progress_bar_config(disable=True)
    call = {"batch_size": 2, "output_type": "np"}  # in diffusers 0.37 stock gives an array for "pt" as well
    expected = run(stock, **call)
    for scheduler in (DDPMScheduler(), BoostAndSkipDDPMScheduler()):
        ours = BoostAndSkipPipeline(unet, scheduler)
        ours.set_progress_bar_config(disable=True)
        assert np.array_equal(run(ours, **call), expected)
        assert np.array_equal(run(ours, **call, gamma=1, skip_steps=0), expected)
        assert not np.array_equal(run(ours, **call, gamma=2), expected)
        assert not np.array_equal(run(ours, **call, skip_steps=1), expected)


@pytest.mark.parametrize("timesteps", [None, [999, 700, 650, 20, 3]])
def test_stock_scheduler_is_a_loop_over_the_kept_steps(timesteps):
    pipe = pipeline(DDPMScheduler())
    scheduler, generator = DDPMScheduler(), torch.Generator().manual_seed(3)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)  # as the authors' tables
    if timesteps is None:
        scheduler.set_timesteps(10)
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    x = 3.0 * torch.randn(2, 3, 8, 8, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps[2:]:
            x = scheduler.step(pipe.unet(x, t).sample, t, x, generator=generator).prev_sample
    assert torch.equal(run(pipe, batch_size=2, gamma=3.0, skip_steps=2, timesteps=timesteps), to_image(x))
    ours = BoostAndSkipPipeline(pipe.unet, BoostAndSkipDDPMScheduler(gamma=3.0, skip_steps=2))
    ours.set_progress_bar_config(disable=True)
    if timesteps is None:
        assert torch.equal(run(ours, batch_size=2), to_image(x))
    else:  # a list runs as given, but for steps that the call itself skips
        assert torch.equal(run(ours, batch_size=2, timesteps=timesteps, skip_steps=2), to_image(x))
        assert torch.equal(run(ours, batch_size=2, timesteps=timesteps[2:]), to_image(x))


@pytest.mark.parametrize("name", OURS)
def test_call_arguments_override_the_scheduler_for_the_call(name):
    pipe = pipeline(OURS[name](gamma=2.0, skip_steps=1))
    own = pipe.scheduler
    during = []

    def note(pipeline, step, timestep, tensors):
        during.append((pipeline.scheduler.config.gamma, pipeline.scheduler.config.skip_steps))
        return {}

    overridden = run(pipe, batch_size=1, gamma=3.5, skip_steps=4, callback_on_step_end=note)
    assert during == [(3.5, 4)] * 6
    assert pipe.num_timesteps == 6
    assert pipe.scheduler is own and own.config.gamma == 2.0 and own.config.skip_steps == 1
    fixed = BoostAndSkipPipeline(pipe.unet, OURS[name](gamma=3.5, skip_steps=4))
    fixed.set_progress_bar_config(disable=True)
    assert torch.equal(run(fixed, batch_size=1), overridden)
    assert not torch.equal(run(pipe, batch_size=1), overridden)


def test_the_scheduler_comes_back_after_an_error():
    pipe = pipeline(BoostAndSkipDDIMScheduler())
    own = pipe.scheduler
    with pytest.raises(ValueError, match="skip_steps"):
        run(pipe, skip_steps=10)
    assert pipe.scheduler is own


@pytest.mark.parametrize("steps", [10, 50])
def test_a_skip_to_a_noise_level_is_a_number_of_steps(steps):
    """Through the call, of a stock scheduler and of one that skips itself, whose own skip it replaces."""
    pipe = pipeline(DDPMScheduler())
    pipe.scheduler.set_timesteps(steps)
    alphas = pipe.scheduler.alphas_cumprod.double()[pipe.scheduler.timesteps]
    levels = ((1 - alphas) / alphas).sqrt().tolist()
    for first in (0, 1, 4):
        expected = run(pipe, num_inference_steps=steps, gamma=2.0, skip_steps=first)
        call = {"num_inference_steps": steps, "gamma": 2.0, "skip_to_sigma": levels[first] * 1.001}
        assert torch.equal(run(pipe, **call), expected)
        ours = BoostAndSkipPipeline(pipe.unet, BoostAndSkipDDPMScheduler(gamma=4.0, skip_steps=2))
        ours.set_progress_bar_config(disable=True)
        assert torch.equal(run(ours, **call), expected)
        assert ours.scheduler.config.skip_steps == 2


def test_euler_starts_from_gamma_times_the_first_kept_sigma():
    pipe, seen = pipeline(BoostAndSkipEulerDiscreteScheduler(timestep_spacing="leading")), []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    run(pipe, latents=noise, gamma=2.5, skip_steps=3)
    stock = EulerDiscreteScheduler(timestep_spacing="leading")
    stock.set_timesteps(10)
    sigma = stock.sigmas[3]
    start = 2.5 * noise * (sigma**2 + 1) ** 0.5
    torch.testing.assert_close(seen[0], start / (sigma**2 + 1) ** 0.5)


def test_ddim_derives_the_noise_from_the_clipped_image_by_default():
    pipe = pipeline(BoostAndSkipDDIMScheduler())
    default = run(pipe, gamma=4.0, skip_steps=2)
    assert torch.equal(default, run(pipe, gamma=4.0, skip_steps=2, use_clipped_model_output=True))
    assert not torch.allclose(default, run(pipe, gamma=4.0, skip_steps=2, use_clipped_model_output=False), atol=1e-3)


def test_eta_reaches_ddim():
    pipe = pipeline(BoostAndSkipDDIMScheduler())
    assert not torch.allclose(run(pipe, eta=1.0), run(pipe), atol=1e-3)


def test_guidance_is_extrapolation_from_the_null_class():
    pipe = pipeline(DDPMScheduler(), null_class=3, classes=4)
    labels, rows = torch.tensor([0, 2]), []
    scheduler, generator = DDPMScheduler(), torch.Generator().manual_seed(3)
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond = pipe.unet(x, t, class_labels=labels).sample
            null = pipe.unet(x, t, class_labels=torch.full_like(labels, 3)).sample
            x = scheduler.step(null + 2.5 * (cond - null), t, x, generator=generator).prev_sample
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    torch.testing.assert_close(run(pipe, class_labels=[0, 2], guidance_scale=2.5), to_image(x), atol=1e-4, rtol=0)
    assert rows == [4] * 10
    rows.clear()
    run(pipe, class_labels=[0, 2], guidance_scale=1.0)
    assert rows == [2] * 10


def test_without_labels_a_conditional_model_samples_its_null_class():
    pipe = pipeline(DDPMScheduler(), null_class=3, classes=4)
    assert torch.equal(run(pipe, batch_size=2), run(pipe, class_labels=[3, 3]))
    assert torch.equal(run(pipe, batch_size=2, class_labels=1), run(pipe, class_labels=[1, 1]))
    assert torch.equal(run(pipe, class_labels=torch.tensor([1, 2])), run(pipe, class_labels=[1, 2]))


@pytest.mark.parametrize("name", OURS)
def test_learned_variance_is_dropped_for_schedulers_that_do_not_read_it(name):
    pipe = pipeline(OURS[name](), out_channels=6)
    half = pipeline(OURS[name](), out_channels=3)
    half.unet.load_state_dict({**pipe.unet.state_dict(), **{
        key: pipe.unet.state_dict()[key][:3] for key in ("conv_out.weight", "conv_out.bias")
    }})  # fmt: skip
    torch.testing.assert_close(run(pipe), run(half), atol=1e-5, rtol=0)


def test_learned_variance_reaches_ddpm_and_comes_from_the_conditional_half():
    pipe = pipeline(DDPMScheduler(variance_type="learned_range"), null_class=3, classes=4, out_channels=6)
    labels = torch.tensor([1])
    scheduler, generator = DDPMScheduler(variance_type="learned_range"), torch.Generator().manual_seed(3)
    scheduler.set_timesteps(10)
    x = torch.randn(1, 3, 8, 8, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond = pipe.unet(x, t, class_labels=labels).sample
            null = pipe.unet(x, t, class_labels=torch.full_like(labels, 3)).sample
            guided = null[:, :3] + 2.0 * (cond[:, :3] - null[:, :3])
            x = scheduler.step(torch.cat([guided, cond[:, 3:]], 1), t, x, generator=generator).prev_sample
    torch.testing.assert_close(run(pipe, class_labels=1, guidance_scale=2.0), to_image(x), atol=1e-4, rtol=0)


def test_latents_are_unit_noise_that_gamma_multiplies():
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    pipe, seen = pipeline(DDPMScheduler()), []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run(pipe, latents=noise, gamma=4.0)
    assert torch.equal(seen[0], 4.0 * noise)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm"])
def test_a_stock_scheduler_is_refused_with_the_class_to_use(name):
    with pytest.raises(ValueError, match=OURS[name].__name__):
        run(pipeline(STOCK[name]()))


@pytest.mark.parametrize("cls", [PNDMScheduler, LCMScheduler])
def test_unknown_schedulers_are_refused(cls):
    with pytest.raises(ValueError, match=f"does not know {cls.__name__}; use a DDPMScheduler"):
        run(pipeline(cls()))


def test_a_stock_scheduler_made_from_ours_is_still_stock():
    with pytest.raises(ValueError, match="BoostAndSkipDDIMScheduler"):
        run(pipeline(DDIMScheduler.from_config(BoostAndSkipDDIMScheduler(gamma=2.0).config)))


BAD = [
    ({"gamma": 0}, "gamma"),
    ({"gamma": -1.0}, "gamma"),
    ({"gamma": float("nan")}, "gamma"),
    ({"gamma": float("inf")}, "gamma"),
    ({"skip_steps": -1}, "skip_steps"),
    ({"skip_to_sigma": 0.0}, "skip_to_sigma.*must be a finite number > 0"),
    ({"skip_to_sigma": float("inf")}, "skip_to_sigma.*must be a finite number > 0"),
    ({"skip_to_sigma": 1e6}, "outside of the noise levels"),
    ({"skip_to_sigma": 3.0, "skip_steps": 1}, "both say where"),
    ({"skip_steps": 10}, "skip_steps"),
    ({"skip_steps": 1.5}, "skip_steps"),
    ({"skip_steps": True}, "skip_steps"),
    ({"batch_size": 0}, "batch_size"),
    ({"batch_size": 2.0}, "batch_size"),
    ({"output_type": "jpeg"}, "output_type"),
    ({"class_labels": [4]}, r"class_labels must be in \[0, 4\), got \[4\]"),
    ({"class_labels": [-1, 0]}, "class_labels"),
    ({"class_labels": [0.5]}, "class_labels"),
    ({"class_labels": []}, "class_labels"),
    ({"class_labels": [1, 2], "batch_size": 3}, "batch_size=3"),
    ({"guidance_scale": float("nan"), "class_labels": [1]}, "guidance_scale"),
    ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs class_labels"),
    ({"latents": torch.zeros(1, 2, 8, 8)}, "latents"),
    ({"latents": torch.zeros(2, 3, 8, 8), "batch_size": 1}, "latents"),
    ({"gamma": "4"}, "gamma"),
    ({"gamma": True}, "gamma"),
    ({"batch_size": True}, "batch_size"),
    ({"eta": -0.5}, "eta"),
    ({"timesteps": []}, "timesteps"),
    ({"timesteps": [5, -1]}, "timesteps"),
    ({"timesteps": [5, 5]}, "timesteps"),
    ({"timesteps": [1000, 5]}, "timesteps"),
    ({"generator": [torch.Generator()], "batch_size": 2}, "generator"),
    ({"eta": 0.5}, "eta"),
    ({"use_clipped_model_output": True}, "use_clipped_model_output"),
]


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "ours"])
@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)))
def test_bad_input_is_refused(options, message, ours):
    scheduler = BoostAndSkipDDPMScheduler() if ours else DDPMScheduler()
    with pytest.raises(ValueError, match=message):
        run(pipeline(scheduler, null_class=3, classes=4), **options)


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "ours"])
def test_numpy_numbers_are_numbers(ours):
    pipe = pipeline(BoostAndSkipDDPMScheduler() if ours else DDPMScheduler())
    given = run(pipe, batch_size=np.int64(2), gamma=np.float64(2), skip_steps=np.int64(1))
    assert torch.equal(given, run(pipe, batch_size=2, gamma=2.0, skip_steps=1))
    seeds = tuple(torch.Generator().manual_seed(seed) for seed in (1, 2))
    assert run(pipe, batch_size=2, generator=seeds).shape == (2, 3, 8, 8)


def test_size_comes_from_the_model_or_from_the_latents():
    pipe = pipeline(DDPMScheduler())
    assert run(pipe, latents=torch.zeros(1, 3, 4, 12)).shape == (1, 3, 4, 12)
    pipe.unet.register_to_config(sample_size=(4, 12))
    assert run(pipe).shape == (1, 3, 4, 12)
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="sample_size"):
        run(pipe)


def test_latent_output_is_the_sample_itself():
    pipe = pipeline(BoostAndSkipEulerDiscreteScheduler())
    latents = run(pipe, output_type="latent", gamma=3.0, skip_steps=1)
    assert torch.equal(to_image(latents), run(pipe, gamma=3.0, skip_steps=1))


@pytest.mark.parametrize(("classes", "null_class"), [(4, 4), (4, -1), (4, 1.0), (None, 3)])
def test_the_null_class_must_be_one_of_the_model(classes, null_class):
    with pytest.raises(ValueError, match="null_class must be one of"):
        run(pipeline(DDPMScheduler(), null_class=null_class, classes=classes))


def test_labels_and_models_must_fit():
    with pytest.raises(ValueError, match="the model is unconditional"):
        run(pipeline(DDPMScheduler()), class_labels=[0])
    with pytest.raises(ValueError, match="class_labels must be given"):
        run(pipeline(DDPMScheduler(), classes=4))
    with pytest.raises(ValueError, match="null class"):
        run(pipeline(DDPMScheduler(), classes=4), class_labels=[0], guidance_scale=2.0)


class Replay(ModelMixin, ConfigMixin):
    """A network that gives recorded outputs (steps, batch, 6, height, width) and notes the timesteps it was asked."""

    @register_to_config
    def __init__(self, sample_size: int, in_channels: int = 3, num_class_embeds: int | None = None):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample, timestep, class_labels=None):
        self.asked.append(int(timestep))
        return UNet2DOutput(sample=self.outputs[len(self.asked) - 1])


def loops(kind: str) -> list[str]:
    return sorted(path.stem for path in GOLDENS.glob(f"gd_loop_*_{kind}_*.json"))


def replay(name: str, scheduler_class, monkeypatch, **options):
    """The sample after each step of our pipeline on a recorded loop, and the record."""
    case = json.loads((GOLDENS / f"{name}.json").read_text())
    record = load_file(GOLDENS / f"{name}.safetensors")
    schedule = {"cosine": "squaredcos_cap_v2", "linear": "linear"}[case["noise_schedule"]]
    variance = {"variance_type": "learned_range"} if "ancestral" in name else {}
    network = Replay(sample_size=record["init_noise"].shape[-1], num_class_embeds=1000 if "y" in record else None)
    network.outputs, network.asked, samples = record["model_output"], [], []
    noises = iter(record.get("step_noise", []))
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: next(noises))
    pipe = BoostAndSkipPipeline(network, scheduler_class(beta_schedule=schedule, **variance))
    pipe.set_progress_bar_config(disable=True)

    def note(pipeline, step, timestep, tensors):
        samples.append(tensors["latents"])
        return {}

    pipe(
        class_labels=record.get("y"), timesteps=record["timestep_map"].flip(0).tolist(),
        gamma=case["gamma"], skip_steps=case["Delta_t"], latents=record["init_noise"], output_type="pt",
        callback_on_step_end=note, **options,
    )  # fmt: skip
    assert network.asked == record["network_t"][:, 0].tolist()
    tolerance = case["tolerance"]
    torch.testing.assert_close(
        torch.stack(samples), record["x_after_step"],
        atol=tolerance["recommended_atol"], rtol=tolerance["recommended_rtol"],
    )  # fmt: skip


@pytest.mark.parametrize("cls", [DDPMScheduler, BoostAndSkipDDPMScheduler])
@pytest.mark.parametrize("name", loops("ancestral"))
def test_ancestral_loops_of_the_authors(name, cls, monkeypatch):
    replay(name, cls, monkeypatch)


@pytest.mark.parametrize("name", loops("ddim"))
def test_ddim_loops_of_the_authors(name, monkeypatch):
    eta = json.loads((GOLDENS / f"{name}.json").read_text())["eta"]
    replay(name, BoostAndSkipDDIMScheduler, monkeypatch, eta=eta)


def test_the_recorded_loops_are_there():
    assert len(loops("ancestral")) >= 3 and len(loops("ddim")) >= 3
