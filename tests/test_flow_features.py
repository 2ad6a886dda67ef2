"""Features: pixels as they are, DINOv2 tokens against transformers' own output, batches, and bad extractors."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from diffusers_ext.flow import DINOv2Features, combined_features, extract_features, pixel_features

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
IMAGES = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL)).save_pretrained(folder / "plain")
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4)).save_pretrained(
        folder / "registers"
    )
    return folder


@torch.no_grad()
def tokens(folder, cls, size=28):
    """The last layer as transformers gives it, on images normalised by ImageNet's statistics."""
    x = F.interpolate(IMAGES / 2 + 0.5, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return cls.from_pretrained(folder).eval()(x).last_hidden_state


@pytest.mark.parametrize(
    ("name", "cls", "extra"), [("plain", Dinov2Model, 0), ("registers", Dinov2WithRegistersModel, 4)]
)
def test_dinov2_tokens(checkpoints, name, cls, extra):
    expected = tokens(checkpoints / name, cls)
    assert expected.shape[1] == 1 + extra + 4
    found = DINOv2Features(str(checkpoints / name), "patch", image_size=28)(IMAGES)
    torch.testing.assert_close(found, expected[:, 1 + extra :].mean(1), atol=1e-5, rtol=0)
    found = DINOv2Features(str(checkpoints / name), "cls", image_size=28)(IMAGES)
    torch.testing.assert_close(found, expected[:, 0], atol=1e-5, rtol=0)


def test_grey_images_are_three_equal_channels(checkpoints):
    extractor = DINOv2Features(str(checkpoints / "plain"), image_size=42)
    torch.testing.assert_close(extractor(IMAGES[:, :1]), extractor(IMAGES[:, :1].repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match=r"\(n, 1 or 3, height, width\)"):
        extractor(IMAGES[:, :2])


def test_bad_networks(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="pooling must be"):
        DINOv2Features(str(checkpoints / "plain"), "mean")
    with pytest.raises(ValueError, match="multiple of the patch, 14, got 30"):
        DINOv2Features(str(checkpoints / "plain"), image_size=30)
    ViTModel(ViTConfig(**SMALL, intermediate_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a DINOv2 network, got a vit"):
        DINOv2Features(str(tmp_path), image_size=28)


def test_extraction_in_batches():
    pixels = (torch.rand(7, 3, 4, 4) * 255).byte()
    sizes = []
    found = extract_features(pixels, batch_size=3, on_batch=sizes.append)
    torch.testing.assert_close(found, pixels.flatten(1) / 127.5 - 1)
    assert sizes == [3, 3, 1] and found.dtype == torch.float32
    assert torch.equal(extract_features(IMAGES), pixel_features(IMAGES))  # floating point as it is
    doubled = extract_features(IMAGES, lambda images: images.mean((2, 3)).double(), batch_size=2)
    torch.testing.assert_close(doubled, IMAGES.mean((2, 3)))


@pytest.mark.parametrize("extractor", [lambda x: x, lambda x: x.flatten(1)[:1], lambda x: x.flatten(1).numpy()])
def test_extractors_must_give_one_row_a_sample(extractor):
    with pytest.raises(ValueError, match="one row a sample"):
        extract_features(IMAGES, extractor)


def test_combined_features_add_squared_distances_in_units_of_their_variance():
    real = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def bright(images):
        return images.flatten(1).sum(1, keepdim=True) * 100

    combined = combined_features([(pixel_features, 1.0), (bright, 3.0)], real)
    a, b = combined(real[:5]), combined(real[5:10])
    pixels = (real[:5] - real[5:10]).flatten(1).square().sum(1) / real.flatten(1).var(0).sum()
    brightness = (bright(real[:5]) - bright(real[5:10])).square().sum(1) / bright(real).var(0).sum()
    torch.testing.assert_close((a - b).square().sum(1), pixels + 3 * brightness)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "one or more"),
        ([(pixel_features, 0.0)], "weight > 0"),
        ([(lambda images: torch.ones(len(images), 2), 1.0)], "must vary"),
    ],
)
def test_combined_features_refuse(parts, message):
    with pytest.raises(ValueError, match=message):
        combined_features(parts, torch.rand(5, 1, 2, 2))
