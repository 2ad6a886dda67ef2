"""ADMUpsamplerPipeline: the authors' recorded loop, the equation, every kind of input, and bad ones."""

import inspect
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from contracts import PipelineContract
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from diffusers_ext.checkpoints import guided_diffusion_scheduler, load_guided_diffusion
from diffusers_ext.pipelines import ADMUpsamplerPipeline
from diffusers_ext.pipelines import adm_upsampler as module

GOLDENS = Path(__file__).parent / "goldens"
FOLDER = tempfile.TemporaryDirectory()
SMALL = (np.random.default_rng(0).random((2, 4, 4, 3)) * 255).astype(np.uint8)
LABELS = np.array([1, 3])
np.savez(Path(FOLDER.name) / "two.npz", SMALL, LABELS)


def pipeline(scheduler=None, out_channels: int = 6) -> ADMUpsamplerPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=6, out_channels=out_channels, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4, num_class_embeds=5,
    ).eval()  # fmt: skip
    unet.conv_out.weight.data *= 0.3
    scheduler = scheduler or DDPMScheduler(prediction_type="sample", variance_type="learned_range")
    pipe = ADMUpsamplerPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, image=SMALL, class_labels=(1, 3), **options):
    options = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(5), **options}
    return pipe(image, class_labels=None if class_labels is None else list(class_labels), **options).images


class TestContract(PipelineContract):
    variants = ("ancestral", "ddim")
    batch = 2
    steps = 4
    file = Path(inspect.getsourcefile(module))

    def build(self, variant):
        pipe = pipeline(None if variant == "ancestral" else DDIMScheduler(prediction_type="sample"))
        pipe.set_progress_bar_config(disable=False)
        return pipe

    def options(self, variant):
        return {"image": f"{FOLDER.name}/two.npz", "class_labels": [1, 1], "num_inference_steps": 4}

    def several(self, variant, count):
        return {"image": SMALL[[0, 1, 1][:count]], "class_labels": [1] * count}

    def test_generators(self, variant):
        """As in the contract, with the images turned round along with the generators."""
        pipe = self.quiet(variant)
        seeded = [[torch.Generator().manual_seed(seed) for seed in order] for order in ((0, 1), (1, 0), (0,))]
        together = run(pipe, generator=seeded[0])
        turned = run(pipe, SMALL[::-1].copy(), (3, 1), generator=seeded[1])
        torch.testing.assert_close(together, turned.flip(0), atol=1e-4, rtol=0)
        alone = run(pipe, SMALL[:1], (1,), generator=seeded[2])
        torch.testing.assert_close(alone, together[:1], atol=1e-4, rtol=0)


def replay(monkeypatch, noises):
    noises = iter(noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(noises))


def test_the_authors_loop(monkeypatch):
    """Checkpoint, respacing, conditioning and sampler together."""
    case = json.loads((GOLDENS / "gd_network_loop_upsampler_ancestral_r10.json").read_text())
    tensors = load_file(GOLDENS / "gd_network_loop_upsampler_ancestral_r10.safetensors")
    flags = {**case["model_flags"], "noise_schedule": case["noise_schedule"]}
    checkpoint = GOLDENS / case["model_checkpoint"]
    unet, scheduler = (read(checkpoint, **flags) for read in (load_guided_diffusion, guided_diffusion_scheduler))
    pipe = ADMUpsamplerPipeline(unet, scheduler)
    seen = []
    replay(monkeypatch, tensors["step_noise"])
    final = pipe(
        (tensors["low_res"] + 1) / 2,
        class_labels=tensors["y"],
        num_inference_steps=case["timestep_respacing"],
        latents=tensors["init_noise"],
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, _: seen.append(int(t)) or {},
    ).images
    assert seen == tensors["network_t"][:, 0].tolist()
    torch.testing.assert_close(final, tensors["final"], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_one_step_is_the_equation():
    """The network sees x_t and, after it, the image in [-1, 1], enlarged bilinearly with corners not aligned."""
    pipe = pipeline(DDPMScheduler(prediction_type="sample"))
    noise = torch.randn(2, 3, 8, 8)
    low_res = torch.from_numpy(SMALL).permute(0, 3, 1, 2).float() / 127.5 - 1
    enlarged = F.interpolate(low_res, (8, 8), mode="bilinear", align_corners=False)
    expected = pipe.unet(torch.cat([noise, enlarged], 1), 0, class_labels=torch.tensor([1, 3])).sample[:, :3]
    result = run(pipe, latents=noise, timesteps=[0], output_type="latent")
    torch.testing.assert_close(result, expected.clamp(-1, 1), atol=1e-5, rtol=0)


def test_every_kind_of_image_gives_the_same():
    pipe = pipeline()
    pictures = [Image.fromarray(array) for array in SMALL]
    tensor = torch.from_numpy(SMALL).permute(0, 3, 1, 2)
    expected = run(pipe)
    for image in (pictures, tensor, tensor / 255, SMALL / 255, (SMALL / 255).astype(np.float32)):
        torch.testing.assert_close(run(pipe, image), expected, atol=1e-5, rtol=0)
    for path in (f"{FOLDER.name}/two.npz", Path(FOLDER.name) / "two.npz"):
        assert torch.equal(run(pipe, path, None), expected)
    single = run(pipe, SMALL[:1], (1,))
    for image in (pictures[0], tensor[0], SMALL[0]):
        torch.testing.assert_close(run(pipe, image, (1,)), single, atol=1e-5, rtol=0)


def test_labels_of_the_file_give_way_to_given_ones():
    pipe = pipeline()
    path = f"{FOLDER.name}/two.npz"
    assert torch.equal(run(pipe, path, (2, 0)), run(pipe, SMALL, (2, 0)))
    assert not torch.equal(run(pipe, path, (2, 0)), run(pipe, path, None))


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), EulerDiscreteScheduler()], ids=["ddim", "euler"])
def test_schedulers_that_read_no_variance(scheduler):
    """The variance half is dropped: a network that differs there alone gives the same."""
    pipe = pipeline(scheduler)
    expected = run(pipe)
    pipe.unet.conv_out.weight.data[3:] += 1
    assert torch.equal(run(pipe), expected)
    assert expected.shape == (2, 3, 8, 8) and expected.std() > 0.01


def test_the_size_is_that_of_the_latents():
    assert run(pipeline(), latents=torch.randn(2, 3, 16, 12)).shape == (2, 3, 16, 12)


def test_respacing_is_not_the_spacing_of_the_scheduler():
    seen = []
    note = lambda pipe, i, t, _: seen.append(int(t)) or {}  # noqa: E731
    run(pipeline(), num_inference_steps="3,2", callback_on_step_end=note)
    assert seen == [999, 500, 499, 250, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": SMALL[..., :1]}, "image must have 3 channels"),
        ({"image": SMALL.astype(np.float32)}, r"in \[0, 1\].*255|in \[0, 1\], got"),
        ({"image": SMALL.astype(np.int64)}, "uint8 or floating point"),
        ({"image": SMALL / 255 * np.nan}, "uint8 or floating point"),
        ({"image": "no.npz"}, "path of an .npz"),
        ({"image": []}, "image must be a PIL image"),
        ({"image": torch.zeros(0, 3, 4, 4)}, "image must have 3 channels"),
        ({"image": [Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))]}, "different sizes"),
        ({"class_labels": None}, "class_labels must be given"),
        ({"class_labels": (1, 5)}, r"class_labels must be in \[0, 5\)"),
        ({"class_labels": (1, 2, 3)}, "class_labels must hold 1 or batch_size=2"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, "latents must have shape"),
        ({"generator": [torch.Generator()]}, "generator is a list of 1"),
        ({"output_type": "jpg"}, "output_type must be"),
        ({"num_inference_steps": "ten"}, "respacing 'ten'"),
        ({"timesteps": [1, 5]}, "strictly decreasing"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        run(pipeline(), **options)


def test_an_npz_without_images(tmp_path):
    np.savez(tmp_path / "other.npz", pictures=SMALL)
    with pytest.raises(ValueError, match="as arr_0"):
        run(pipeline(), tmp_path / "other.npz")
