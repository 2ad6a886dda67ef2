"""EDM2Pipeline: the authors' recorded samples; off is the network alone; each network runs only where needed."""

import inspect
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from contracts import PipelineContract
from conventions import newer_torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from diffusers_ext import EDM2Pipeline, EDM2UNet2DModel, EDMHeunScheduler
from diffusers_ext.checkpoints import load_edm2
from diffusers_ext.cli import main
from diffusers_ext.evaluation import read_images
from diffusers_ext.models.edm2_unet import MPLayer
from diffusers_ext.pipelines import edm2 as module
from diffusers_ext.sampling import cycled_labels, sample_to_folder

GOLDENS = Path(__file__).parent / "goldens"
SAMPLERS = sorted(path.stem for path in GOLDENS.glob("edm_sampler_*.json"))


def tiny_unet(label_dim: int = 4, channels: int = 3, seed: int = 0) -> EDM2UNet2DModel:
    torch.manual_seed(seed)
    model = EDM2UNet2DModel(
        img_resolution=8, img_channels=channels, label_dim=label_dim, model_channels=8, channel_mult=(1, 2),
        num_blocks=1, attn_resolutions=(4,), channels_per_head=8,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.5)
    return model.eval()


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, layers_per_block=1,
    ).eval()  # fmt: skip


def pipeline(guide: int | None = 0, scheduler=None, channels: int = 3, **components) -> EDM2Pipeline:
    """guide: classes of the second network; None for no second network."""
    second = None if guide is None else tiny_unet(guide, channels, seed=1)
    scheduler = scheduler or EDMHeunScheduler()
    pipe = EDM2Pipeline(tiny_unet(channels=channels), scheduler, guidance_unet=second, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **options) -> torch.Tensor:
    generator = options.pop("generator", None) or torch.Generator().manual_seed(3)
    call = {"class_labels": [1, 2], "num_inference_steps": 6, "output_type": "latent", "generator": generator}
    return pipe(**{**call, **options}).images


class TestContract(PipelineContract):
    variants = ("alone", "interval", "stochastic")
    batch = 2
    steps = 4
    file = Path(inspect.getsourcefile(module))

    def build(self, variant):
        churn = {"S_churn": 0.5} if variant == "stochastic" else {}
        networks = [tiny_unet()] if variant == "alone" else [tiny_unet(), tiny_unet(0, seed=1)]
        for network in networks:
            network.out_conv.gain.data.fill_(0.1)  # samples well within [-1, 1], so that nothing is clipped
        scheduler = EDMHeunScheduler(sigma_min=0.05, sigma_max=2.0, **churn)
        return EDM2Pipeline(networks[0], scheduler, guidance_unet=[*networks, None][1])

    def options(self, variant):
        guided = {} if variant == "alone" else {"guidance_scale": 1.5, "guided_steps": [1, 2]}
        return {"class_labels": [1, 1], "num_inference_steps": self.steps, **guided}

    def several(self, variant, count):
        return {"class_labels": [1] * count}

    def test_reduced_precision(self, variant, monkeypatch):
        """The networks run in bfloat16, the state stays float64, as the method asks."""
        exact = self.run(self.quiet(variant), variant)
        pipe, types = self.quiet(variant).to(torch.bfloat16), []
        pipe.unet.out_conv.register_forward_pre_hook(lambda _, args: types.append(args[0].dtype))

        def note(pipeline, step, sigma, tensors):
            types.append(tensors["latents"].dtype)
            return {}

        rough = self.run(pipe, variant, callback_on_step_end=note)
        assert set(types) == {torch.float64, torch.bfloat16}
        assert rough.dtype == np.float32
        np.testing.assert_allclose(rough, exact, atol=0.1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_the_authors(name, monkeypatch):
    case = json.loads((GOLDENS / f"{name}.json").read_text())
    record, settings = load_file(GOLDENS / f"{name}.safetensors"), dict(case["sampler_kwargs"])
    steps = settings.pop("num_steps")
    weights = load_file(GOLDENS / "edm2_cond_weights.safetensors")
    second = load_edm2(GOLDENS / "edm2_uncond_ema_fp32_nosource.pkl") if case["G"] != 1 else None
    unet = EDM2UNet2DModel.from_edm2_state_dict(weights, **case["cond_config"])
    pipe = EDM2Pipeline(unet, EDMHeunScheduler(**settings), guidance_unet=second)
    pipe.set_progress_bar_config(disable=True)
    asked, guided = [], []
    pipe.unet.register_forward_pre_hook(lambda _, args: asked.append(args[1].item()))
    if second is not None:
        second.register_forward_pre_hook(lambda _, args: guided.append(len(asked) - 1))
    if "step_noise" in record:
        noises = iter(record["step_noise"])
        monkeypatch.setattr(torch, "randn", lambda *size, dtype, **_: next(noises).to(dtype))
    image = pipe(
        class_labels=record["class_labels"], latents=record["latents"], num_inference_steps=steps,
        guidance_scale=case["G"], guided_steps=case["guidance_interval_steps_inclusive"], output_type="latent",
    ).images  # fmt: skip
    assert image.dtype == torch.float32
    tolerance = case["tolerance"]
    torch.testing.assert_close(
        image, record["output"], atol=tolerance["recommended_atol"], rtol=tolerance["recommended_rtol"]
    )
    np.testing.assert_allclose(asked, record["eval_sigma"], rtol=1e-6)
    assert guided == record["eval_guided"].nonzero().flatten().tolist()


def test_the_recorded_samples_are_there():
    assert len(SAMPLERS) == 6


def test_the_second_network_runs_in_guided_steps_only():
    """The setting of EDM2-XXL in the paper: 32 steps, 6 of them guided."""
    pipe, calls = pipeline(), {"unet": 0, "guidance_unet": 0}
    for name in calls:
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    run(pipe, num_inference_steps=32, guidance_scale=2.0, guided_steps=(17, 22))
    assert calls == pipe.num_evaluations == {"unet": 63, "guidance_unet": 12}
    assert pipe.guided_steps == [17, 18, 19, 20, 21, 22] and pipe.num_timesteps == 32 and pipe.guidance_scale == 2.0


def test_off_is_the_conditional_network_alone():
    alone = run(pipeline(guide=None))
    pipe = pipeline()
    for options in ({}, {"guidance_interval": (0.1, 10)}, {"guided_steps": (1, 2)}):
        assert torch.equal(run(pipe, guidance_scale=1.0, **options), alone)
        assert pipe.num_evaluations == {"unet": 11, "guidance_unet": 0} and pipe.guided_steps == []
    assert not torch.equal(run(pipe, guidance_scale=2.0, guided_steps=(1, 2)), alone)


def test_a_full_interval_is_plain_guidance():
    pipe = pipeline()
    plain = run(pipe, guidance_scale=2.0)
    assert pipe.num_evaluations == {"unet": 11, "guidance_unet": 11}
    with pytest.warns(UserWarning, match="all of the 6 steps"):
        assert torch.equal(run(pipe, guidance_scale=2.0, guidance_interval=(0, float("inf"))), plain)


def test_the_loop_is_algorithm_2_with_guidance():
    """Written out once more, without the scheduler."""
    pipe, w = pipeline(), 1.7
    sigmas = (80 ** (1 / 7) + torch.arange(6).double() / 5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    sigmas = [*sigmas.tolist(), 0.0]
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def slope(x, sigma, guide):
        cond = pipe.unet(x, sigma, torch.tensor([1, 2])).sample.double()
        null = pipe.guidance_unet(x, sigma).sample.double()
        return (x - (null + w * (cond - null) if guide else cond)) / sigma

    x = noise.double() * sigmas[0]
    with torch.no_grad():
        for i in range(6):
            h, guide = sigmas[i + 1] - sigmas[i], i in (2, 3)
            first = slope(x, sigmas[i], guide)
            if sigmas[i + 1] > 0:
                x = x + h * (first + slope(x + h * first, sigmas[i + 1], guide)) / 2
            else:
                x = x + h * first
    ours = run(pipe, latents=noise, guidance_scale=w, guided_steps=(2, 3))
    torch.testing.assert_close(ours, x.float(), atol=1e-5, rtol=1e-5)


def test_interval_and_steps_are_the_same_thing():
    """Steps first to last are the levels in (sigma_{last + 1}, sigma_first], bounds as in the paper."""
    pipe = pipeline()
    pipe.scheduler.set_timesteps(32)
    edges = pipe.scheduler.sigmas.tolist()
    for interval, steps in (((0.19, 1.61), (17, 22)), ((0.60, 5.00), (13, 19))):
        pipe._guidance_scale = 2.0
        assert pipe._steps_to_guide(edges, interval, None) == pipe._steps_to_guide(edges, None, steps)
        exact = (edges[steps[1] + 1], edges[steps[0]])
        assert pipe._steps_to_guide(edges, exact, None) == pipe._steps_to_guide(edges, None, steps)
    # The published (0.28, 2.90] means steps 15 to 21, whose bounds 0.2830 and 2.9015 were rounded the wrong way.
    assert pipe._steps_to_guide(edges, (0.28, 2.90), None) == range(16, 23)
    a = run(pipe, guidance_scale=3.0, guidance_interval=(0.5, 20.0), num_inference_steps=8)
    assert torch.equal(a, run(pipe, guidance_scale=3.0, guided_steps=(2, 4), num_inference_steps=8))
    assert pipe.guided_steps == [2, 3, 4]


def test_the_interval_is_decided_by_the_start_of_the_step_without_churn():
    pipe = pipeline(scheduler=EDMHeunScheduler(S_churn=100))
    run(pipe, guidance_scale=2.0, guidance_interval=(10, 80))
    quiet = pipeline()
    run(quiet, guidance_scale=2.0, guidance_interval=(10, 80))
    assert pipe.guided_steps == quiet.guided_steps == [0, 1]


def test_an_interval_without_steps_warns():
    pipe = pipeline()
    with pytest.warns(UserWarning, match="no step is guided"):
        assert torch.equal(run(pipe, guidance_scale=2.0, guidance_interval=(0.0001, 0.001)), run(pipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(pipe, guidance_scale=2.0, guidance_interval=(0.1, 10))


def test_autoguidance_gives_both_networks_the_labels():
    pipe, seen = pipeline(guide=4), []
    pipe.guidance_unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    guided = run(pipe, guidance_scale=2.0, guided_steps=(1, 1))
    assert seen == [[1, 2], [1, 2]]
    assert not torch.equal(guided, run(pipe))
    unconditional = pipeline(guide=0)
    unconditional.guidance_unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    run(unconditional, guidance_scale=2.0, guided_steps=(1, 1))
    assert seen[2:] == [None, None]


def test_weights_are_normalised_once_a_call(monkeypatch):
    """Of both networks, whatever the number of steps, and anew at the next call; a failed call leaves nothing open."""
    pipe, count = pipeline(), []
    original = MPLayer.normalised_weight
    monkeypatch.setattr(MPLayer, "normalised_weight", lambda layer: count.append(layer) or original(layer))
    for steps in (2, 5):
        count.clear()
        run(pipe, num_inference_steps=steps, guidance_scale=2.0)
        assert len(count) == len(set(count)) > 90
    with pytest.raises(ZeroDivisionError):
        run(pipe, callback_on_step_end=lambda *_: 1 / 0)
    count.clear()
    for _ in range(2):
        pipe.unet(torch.zeros(1, 3, 8, 8), 1.0, 0)
    assert len(count) == 2 * len(set(count))


def test_raw_and_averaged_weights_are_told_apart():
    """A comparison of the two swaps the weights with EMAModel, through `.data`, between calls."""
    pipe, other = pipeline(guide=None), pipeline(guide=None)
    for parameter in other.unet.parameters():
        parameter.data.mul_(1.5).add_(0.1)
    raw, averaged = run(pipe), run(other)
    average = EMAModel(other.unet.parameters())
    average.store(pipe.unet.parameters())
    average.copy_to(pipe.unet.parameters())
    assert torch.equal(run(pipe), averaged) and not torch.equal(averaged, raw)
    average.restore(pipe.unet.parameters())
    assert torch.equal(run(pipe), raw)


def test_latents_are_unit_noise():
    pipe, noise = pipeline(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(run(pipe, latents=noise), run(pipe))
    assert torch.equal(run(pipe, latents=noise.double()), run(pipe))
    assert run(pipe, latents=torch.randn(1, 3, 16, 16), class_labels=1).shape == (1, 3, 16, 16)


def test_sigmas_replace_the_number_of_steps():
    pipe = pipeline()
    table = EDMHeunScheduler()
    table.set_timesteps(6)
    assert torch.equal(run(pipe, sigmas=table.sigmas.tolist(), num_inference_steps=99), run(pipe))


def test_labels_and_batch_sizes():
    pipe = pipeline()
    noise = torch.randn(3, 3, 8, 8)
    same = run(pipe, class_labels=2, latents=noise)
    torch.testing.assert_close(run(pipe, class_labels=[2, 2, 2], latents=noise), same)
    torch.testing.assert_close(run(pipe, class_labels=torch.eye(4)[2:3], latents=noise), same)
    assert run(pipe, class_labels=None).shape[0] == 1 and run(pipe, class_labels=1, batch_size=3).shape[0] == 3


def test_decoding():
    """(latents - bias) / scale through the VAE, whose output is in [0, 1] already."""
    vae = tiny_vae()
    pipe = pipeline(channels=4, vae=vae)
    latents = run(pipe)
    scale = torch.tensor([0.11990407, 0.10822511, 0.13477089, 0.15243903]).reshape(1, 4, 1, 1)
    bias = torch.tensor([-0.69664264, -0.3517316, -0.016172506, 0.32774392]).reshape(1, 4, 1, 1)
    with torch.no_grad():
        expected = vae.decode((latents - bias) / scale).sample.clamp(0, 1)
    torch.testing.assert_close(run(pipe, output_type="pt"), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pipe.decode(latents[:1]), expected[:1], atol=1e-5, rtol=1e-5)
    assert expected.shape == (2, 3, 16, 16)
    sizes = []
    vae.post_quant_conv.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    parts = run(pipe, class_labels=[0, 1, 2], output_type="pt", decode_batch_size=2)
    assert sizes == [2, 1]
    whole = run(pipe, class_labels=[0, 1, 2], output_type="pt")
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="decode_batch_size must be an integer >= 1, got 0"):
        run(pipe, output_type="pt", decode_batch_size=0)
    pictures = run(pipe, output_type="pil")
    assert pictures[0].size == (16, 16)
    wrong = pipeline(channels=4, vae=vae, latent_scale=(1.0,), latent_bias=(0.0,))
    wrong.unet.register_forward_pre_hook(lambda *_: pytest.fail("it is refused before the first step"))
    with pytest.raises(ValueError, match="must have one number for each of the 4 channels"):
        run(wrong, output_type="pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_scale": (0.5, 0.0)}, "latent_scale must not be 0"),
        ({"latent_scale": (0.5, math.nan)}, "latent_scale must be a list of finite numbers"),
        ({"latent_bias": (math.inf, 0.0)}, "latent_bias must be a list of finite numbers"),
        ({"latent_bias": "x"}, "latent_bias must be a list of finite numbers"),
    ],
)
def test_scales_of_latents(options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(channels=4, vae=tiny_vae(), **options)


def test_a_decoder_that_overflows():
    pipe = pipeline(channels=4, vae=tiny_vae(), latent_scale=(1e-30,) * 4, latent_bias=(0.0,) * 4)
    assert run(pipe, output_type="latent").isfinite().all()
    with pytest.raises(ValueError, match="the VAE's image of sample 0 is not finite"):
        run(pipe, output_type="pt")


def test_saving_with_a_vae(tmp_path):
    pipe = pipeline(channels=4, vae=tiny_vae(), latent_scale=(0.5,) * 4, latent_bias=(0.1,) * 4)
    pipe.save_pretrained(tmp_path)
    again = EDM2Pipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert list(again.config.latent_scale) == [0.5] * 4
    torch.testing.assert_close(run(again, output_type="pt"), run(pipe, output_type="pt"), atol=1e-4, rtol=1e-4)


def test_grey_pictures():
    pipe = pipeline(channels=1)
    assert run(pipe, output_type="pil")[0].mode == "L"
    assert run(pipe, output_type="np").shape == (2, 8, 8, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["enable_model_cpu_offload", pytest.param("enable_group_offload", marks=newer_torch)]
)
def test_offload(method):
    expected = run(pipeline(), guidance_scale=2.0)
    pipe = pipeline()
    device = "onload_device" if method == "enable_group_offload" else "device"
    more = {"offload_type": "leaf_level"} if method == "enable_group_offload" else {}
    getattr(pipe, method)(**{device: torch.device("cpu")}, **more)
    for _ in range(2):
        assert torch.equal(run(pipe, guidance_scale=2.0), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"guidance_scale": 2.0, "guidance_interval": (0, 1), "guided_steps": (0, 1)},
            "give either sigma_lo and sigma_hi, or guided_steps",
        ),
        ({"guidance_interval": (2, 1)}, "0 <= sigma_lo < sigma_hi"),
        ({"guidance_interval": 3}, "guidance_interval must be"),
        ({"guidance_interval": (float("nan"), 1)}, "need 0 <= sigma_lo < sigma_hi"),
        ({"guided_steps": (2, 6)}, "reaches beyond the schedule, whose 6 steps"),
        ({"guided_steps": (0.5, 2)}, "guided_steps must be"),
        ({"guided_steps": (3, 2)}, "guided_steps must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"guidance_scale": "2"}, "guidance_scale must be a finite number"),
        ({"class_labels": 4}, r"class_labels must be in \[0, 4\), got \[4\]"),
        ({"class_labels": []}, "non-empty list"),
        ({"class_labels": [0.5]}, "list of integers"),
        ({"class_labels": torch.zeros(2, 5)}, "rows must have 4 numbers"),
        ({"class_labels": [1, 2], "batch_size": 3}, "must hold 1 or batch_size=3"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents must have shape \(2, 3, height, width\)"),
        ({"generator": [torch.Generator()]}, "a list of 1, but batch_size is 2"),
        ({"output_type": "jpg"}, "output_type must be"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"sigmas": [1.0, 2.0]}, "strictly decreasing"),
    ],
)
def test_inputs_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        run(pipeline(), **options)


def test_components_are_checked():
    with pytest.raises(ValueError, match="use an EDMHeunScheduler"):
        run(pipeline(scheduler=EulerDiscreteScheduler()))
    with pytest.raises(ValueError, match="needs a second network"):
        run(pipeline(guide=None), guidance_scale=2.0)
    with pytest.raises(ValueError, match="classes equal or 0"):
        run(pipeline(guide=3), guidance_scale=2.0)
    with pytest.raises(ValueError, match="latents of 4 channels and the pipeline has no vae"):
        run(pipeline(channels=4), output_type="pt")
    unconditional = EDM2Pipeline(tiny_unet(0), EDMHeunScheduler())
    with pytest.raises(ValueError, match="the model is unconditional"):
        run(unconditional)


def test_in_bulk_every_class_in_turn(tmp_path):
    """Labels left out are every class; a conditional network is not sampled without a label by mistake."""
    done = sample_to_folder(pipeline(), tmp_path / "out", 6, format="npz", batch_size=4, num_inference_steps=2)
    arrays = np.load(done.result)
    assert arrays["arr_1"].tolist() == [0, 1, 2, 3, 0, 1]
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    images = pipeline()(
        class_labels=[0, 1, 2, 3], num_inference_steps=2, generator=generators, output_type="np"
    ).images
    assert np.abs(arrays["arr_0"][:4] / 255 - images).max() < 1.5 / 255
    assert cycled_labels(EDM2Pipeline(tiny_unet(0), EDMHeunScheduler()), 3) is None


def test_in_bulk_with_a_decoder_and_an_interval(tmp_path):
    """The command: latents in batches of 3, decoded two at a time, guided in an interval, PNG files in a zip."""
    pipe = pipeline(channels=4, vae=tiny_vae())
    pipe.save_pretrained(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--format", "zip"]
    command += [
        "--num-samples",
        "5",
        "--batch-size",
        "3",
        "--decode-batch-size",
        "2",
        "--seed",
        "7",
        "--device",
        "cpu",
    ]
    command += ["--num-inference-steps", "4", "--guidance-scale", "2.5", "--guidance-interval", "0.1,10"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    images, _ = read_images(tmp_path / "out/images.zip")
    settings = json.loads((tmp_path / "out/manifest.json").read_text())["settings"]
    assert settings["call"]["guidance_interval"] == [0.1, 10.0] and settings["call"]["decode_batch_size"] == 2

    generator = [torch.Generator().manual_seed(7 + i) for i in range(5)]
    call = {"num_inference_steps": 4, "generator": generator, "output_type": "np"}
    expected = pipe([0, 1, 2, 3, 0], guidance_scale=2.5, guidance_interval=(0.1, 10), **call).images
    assert pipe.guided_steps == [1, 2] and pipe.num_evaluations == {"unet": 7, "guidance_unet": 4}
    assert np.abs(images / 255 - expected).max() < 1.5 / 255
    generator[:] = [torch.Generator().manual_seed(7 + i) for i in range(5)]
    plain = pipe([0, 1, 2, 3, 0], **call).images
    assert np.abs(images / 255 - plain).max() > 5 / 255, "the interval shows"
    wrong = CliRunner().invoke(main, [*command[:-1], "0.1"])
    assert wrong.exit_code == 1 and "guidance_interval must be two noise levels" in wrong.output
