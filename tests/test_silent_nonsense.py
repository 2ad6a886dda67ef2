"""Inputs that would give a wrong picture without a word: read right, or refused."""

import io

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image

from diffusers_ext import CTMCScheduler, DiscreteDiffusionPipeline, FlowPostprocessingPipeline, SEDDTransformer
from diffusers_ext.evaluation import evaluate_digits
from diffusers_ext.pipelines.pixel_space import checked_generator, image_tensor
from diffusers_ext.pipelines.stable_diffusion_xl_guidance_interval import StableDiffusionXLGuidanceIntervalPipeline
from diffusers_ext.schedulers import BoostAndSkipEulerDiscreteScheduler
from diffusers_ext.shipped import load_pipeline

VALUES = np.random.default_rng(0).random((4, 4))
COLOURS = Image.fromarray((np.random.default_rng(1).random((4, 4, 3)) * 255).astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_more_than_8_bits(channels):
    wide = Image.fromarray((VALUES * 65535).astype(np.uint16))
    assert wide.mode.startswith("I;16")
    for picture in (wide, Image.fromarray(VALUES.astype(np.float32))):
        read = image_tensor("image", picture, channels)
        assert read.shape == (1, channels, 4, 4)
        torch.testing.assert_close(read[0, 0].double(), torch.from_numpy(VALUES), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.fromarray((VALUES * 255).astype(np.float32)), r"in \[0, 1\]"),
        (Image.fromarray((VALUES * 255).astype(np.int32)), "mode 'I'"),
        (Image.new("LAB", (4, 4)), "mode 'LAB'"),
    ],
)
def test_pictures_without_a_range(picture, message):
    with pytest.raises(ValueError, match=message):
        image_tensor("image", picture, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency(mode):
    picture = COLOURS.copy()
    picture.putalpha(255)
    opaque = {"La": lambda p: p.convert("LA").convert("La"), "PA": lambda p: p.convert("P").convert("PA")}
    convert = opaque.get(mode, lambda p: p.convert(mode))
    assert image_tensor("image", convert(picture), 3).shape == (1, 3, 4, 4)
    picture.putalpha(Image.fromarray(np.full((4, 4), 200, np.uint8)))
    picture = convert(picture)
    if mode == "PA":  # the way through "P" loses it
        picture.putalpha(200)
    with pytest.raises(ValueError, match="transparent in places"):
        image_tensor("image", picture, 3)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour(mode):
    """As PNG files have it, also after a trip through one."""
    picture = COLOURS.convert(mode)
    colour = picture.getpixel((0, 0))
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=colour)
    with pytest.raises(ValueError, match="transparent in places"):
        image_tensor("image", Image.open(file), 3)


def test_lists():
    batch = torch.rand(3, 3, 4, 4)
    arrays = list(batch.permute(0, 2, 3, 1).numpy())
    for images in (list(batch), arrays, [batch[:2], batch[2]], tuple(batch)):
        assert torch.equal(image_tensor("image", images, 3), batch)
    with pytest.raises(ValueError, match="different sizes"):
        image_tensor("image", [batch[0], torch.rand(3, 4, 5)], 3)
    for wrong in ([], [[]], [batch[0], "x"]):
        with pytest.raises(ValueError, match="image must be"):
            image_tensor("image", wrong, 3)


@pytest.mark.parametrize("generator", ["x", 3, ["x"], [torch.Generator(), None]])
def test_generators(generator):
    with pytest.raises(ValueError, match=r"generator must be a torch\.Generator"):
        checked_generator(generator, 1)


DIGITS, LABELS = torch.rand(6, 1, 28, 28), torch.arange(6)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (DIGITS * 255, LABELS, "images must be floating point in"),
        (DIGITS * 2 - 1, LABELS, "images must be floating point in"),
        ((DIGITS * 255).byte(), LABELS, "images must be floating point in"),
        (DIGITS[..., :14], LABELS, r"images must be a tensor \(count, 1, 28, 28\)"),
        (DIGITS * float("nan"), LABELS, "images must be floating point in"),
        (DIGITS, LABELS + 72, r"labels must be integers in \[0, 9\]"),
        (DIGITS, LABELS[:5], "labels must be integers"),
        (DIGITS, LABELS.float(), "labels must be integers"),
    ],
)
def test_digits(images, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate_digits(images, labels, ["knn_distance"])


@pytest.mark.parametrize("noise", [torch.randn(2, 500), torch.ones(2, 500), torch.full((2, 500), -1e-3)])
def test_recorded_noise_is_uniform(noise):
    scheduler, tokens = CTMCScheduler(vocab_size=7), torch.zeros(2, 500, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"noise must hold uniforms in \[0, 1\)"):
        scheduler.add_noise(tokens, noise, 0.1)
    with pytest.raises(ValueError, match=r"noise must hold uniforms in \[0, 1\)"):
        scheduler.add_noise_by_count(tokens, noise, 3)


def test_targets_of_recorded_noise():
    scheduler, tokens = CTMCScheduler(vocab_size=7, kernel="uniform"), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"target tokens in \[0, 7\)"):
        scheduler.add_noise(tokens, (torch.rand(2, 5), tokens + 7), 0.1)


def unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, add_attention=False,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip


def test_a_base_has_the_dtype_and_variant_asked_for(tmp_path):
    base = DDPMPipeline(unet(), DDPMScheduler())
    pipe = FlowPostprocessingPipeline(unet(), FlowMatchEulerDiscreteScheduler(), base=base)
    pipe.save_pretrained(tmp_path / "plain")
    pipe.save_pretrained(tmp_path / "variant", variant="fp16")
    half = {"torch_dtype": torch.bfloat16}
    for loaded in (
        DiffusionPipeline.from_pretrained(tmp_path / "plain", **half),
        FlowPostprocessingPipeline.from_pretrained(tmp_path / "plain", **half),
        FlowPostprocessingPipeline.from_pretrained(tmp_path / "variant", variant="fp16", **half),
        load_pipeline(str(tmp_path / "plain"), dtype=torch.bfloat16),
        load_pipeline(str(tmp_path / "variant"), dtype=torch.bfloat16, variant="fp16"),
    ):
        assert loaded.model.dtype == loaded.base.unet.dtype == torch.bfloat16
        expected = base.unet.conv_in.weight.bfloat16()
        assert torch.equal(loaded.base.unet.conv_in.weight, expected)
    assert FlowPostprocessingPipeline.from_pretrained(tmp_path / "plain", base=None).base is None
    mixed = FlowPostprocessingPipeline(unet().bfloat16(), FlowMatchEulerDiscreteScheduler(), base=base)
    assert mixed.base.unet.dtype == torch.float32


def test_the_progress_bar_of_a_boosted_run_ends():
    pipe = StableDiffusionXLGuidanceIntervalPipeline.__new__(StableDiffusionXLGuidanceIntervalPipeline)
    object.__setattr__(pipe, "scheduler", BoostAndSkipEulerDiscreteScheduler(gamma=2.0, skip_steps=2))
    object.__setattr__(pipe, "_progress_bar_config", {"disable": True})
    pipe.scheduler.set_timesteps(6)
    assert pipe.progress_bar(total=6).total == 4


class Tokenizer:
    """Adds [CLS] 4 and [SEP] 5 unless told not to."""

    def __call__(self, text: str, add_special_tokens: bool = True):
        ids = [int(letter) for letter in text]
        return type("Encoding", (), {"input_ids": [4, *ids, 5] if add_special_tokens else ids})


def test_texts_have_no_special_tokens_in_the_middle():
    model = SEDDTransformer(vocab_size=7, hidden_size=8, cond_dim=4, num_blocks=1, num_heads=2).eval()
    pipe = DiscreteDiffusionPipeline(model, CTMCScheduler(vocab_size=7))
    pipe.set_progress_bar_config(disable=True)
    pipe.tokenizer = Tokenizer()
    tokens = pipe("12", suffix="3", sequence_length=6, num_inference_steps=2, output_type="tokens").tokens
    assert tokens[0, :2].tolist() == [1, 2] and tokens[0, -1] == 3
