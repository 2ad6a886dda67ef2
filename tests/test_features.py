"""Feature extractors by name: what they compute, how they are told apart, what they refuse."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from fresh_process import ended, start_fresh
from PIL import Image
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from diffusers_ext.evaluation.extractors import FeatureExtractor, callable_extractor, load_extractor, weights_identity
from diffusers_ext.shipped import load_shipped_classifier

RNG = np.random.default_rng(0)
DIGITS = RNG.integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
COLOUR = np.stack([RNG.integers(low, low + 56, (20, 30, 3), dtype=np.uint8) for low in (0, 100, 200)])
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 14}


def tiny_dinov2(folder, seed=0, cls=Dinov2Model, config=Dinov2Config, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config(**{**TINY, "image_size": 56, **settings})).eval()
        for parameter in model.parameters():  # no layer scale or bias may hide what it multiplies
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def hidden(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)


# The shipped classifier


def test_classifier_is_the_shipped_one():
    classifier, _ = load_shipped_classifier()
    sample = torch.from_numpy(DIGITS).permute(0, 3, 1, 2) / 255 * 2 - 1
    with torch.no_grad():
        expected = classifier(sample).features
    extractor = load_extractor("classifier", device="cpu")
    assert expected.shape == (5, 64) and extractor.name == "classifier"
    np.testing.assert_allclose(extractor(DIGITS), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(extractor(np.repeat(DIGITS, 3, axis=-1)), extractor(DIGITS))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (DIGITS[:, :27], "grey digits of 28 x 28 pixels, got grey images of 28 x 27"),
        (RNG.integers(0, 256, (2, 28, 28, 3), dtype=np.uint8), "got RGB images of 28 x 28; choose other features"),
    ],
)
def test_classifier_knows_digits_alone(images, message):
    with pytest.raises(ValueError, match=message):
        load_extractor(device="cpu")(images)


# DINOv2


@pytest.mark.parametrize(
    ("cls", "config", "settings"),
    [
        (Dinov2Model, Dinov2Config, {}),
        (Dinov2Model, Dinov2Config, {"image_size": 224, "use_swiglu_ffn": True}),
        (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"num_register_tokens": 3}),
    ],
    ids=["plain", "swiglu", "registers"],
)
def test_dinov2_is_the_cls_token_of_the_resized_image(tmp_path, cls, config, settings):
    model = tiny_dinov2(tmp_path, cls=cls, config=config, **settings)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    rows = []
    for image in COLOUR:
        pixels = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) / 255
        sample = torch.tensor((pixels - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            embedded = model.embeddings(sample)
            last = model.encoder(embedded).last_hidden_state
            rows.append(model.layernorm(last)[0, 0])
    features = load_extractor("dinov2", tmp_path, "cpu")(COLOUR)
    assert features.shape == (3, 16) and np.ptp(features, axis=0).max() > 0.05  # the images count
    np.testing.assert_allclose(features, torch.stack(rows), rtol=1e-5, atol=1e-5)


def test_dinov2_sees_grey_images_in_three_channels(tmp_path):
    tiny_dinov2(tmp_path)
    extractor = load_extractor("dinov2", tmp_path, "cpu")
    np.testing.assert_array_equal(extractor(DIGITS[:2]), extractor(np.repeat(DIGITS[:2], 3, axis=-1)))


def test_dinov2_reads_the_backbone_of_a_classifier(tmp_path):
    model = tiny_dinov2(tmp_path, cls=Dinov2ForImageClassification)
    model.dinov2.save_pretrained(tmp_path / "backbone")
    whole, alone = (load_extractor("dinov2", folder, "cpu") for folder in (tmp_path, tmp_path / "backbone"))
    np.testing.assert_array_equal(whole(COLOUR), alone(COLOUR))
    assert whole.identity == alone.identity


def test_dinov2_does_without_the_mask_token_of_training(tmp_path):
    model = tiny_dinov2(tmp_path)
    expected = load_extractor("dinov2", tmp_path, "cpu")(COLOUR)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "embeddings.mask_token"}
    model.save_pretrained(tmp_path, state_dict=state)
    first, second = (load_extractor("dinov2", tmp_path, "cpu") for _ in range(2))
    np.testing.assert_array_equal(first(COLOUR), expected)
    assert first.identity == second.identity


def test_identity_is_that_of_weights_and_architecture(tmp_path):
    tiny_dinov2(tmp_path / "a")
    tiny_dinov2(tmp_path / "b", seed=0)
    tiny_dinov2(tmp_path / "c", seed=1)
    tiny_dinov2(tmp_path / "d", seed=0, num_attention_heads=4)
    a, b, c, d = (load_extractor("dinov2", tmp_path / name, "cpu").identity for name in "abcd")
    assert a == b and len({a, c, d}) == 3


def test_identity_sees_every_weight():
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    seen = {weights_identity(network)}
    for tensor in network.state_dict().values():
        tensor.view(-1)[0] += 1
        seen.add(weights_identity(network))
    assert len(seen) == 1 + len(network.state_dict())
    assert weights_identity(network.bfloat16()) not in seen


def test_dinov2_refuses_other_and_incomplete_models(tmp_path):
    CLIPVisionConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"need a dinov2 or dinov2_with_registers model, .* is clip_vision_model"):
        load_extractor("dinov2", tmp_path / "clip", "cpu")
    model = tiny_dinov2(tmp_path / "part")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("layernorm")}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights of its network, layernorm\.bias first: 2 in all"):
        load_extractor("dinov2", tmp_path / "part", "cpu")
    with pytest.raises(ValueError, match=r"missing.* is no folder, and no Hub id"):
        load_extractor("dinov2", tmp_path / "missing", "cpu")


# Inception, with a stand-in for torch-fidelity


class StandIn(nn.Module):
    """What torch-fidelity's extractor promises: uint8 RGB (batch, 3, height, width) in, a tuple of features out."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        self.asked = (name, features_list, feature_extractor_weights_path)
        self.scale = nn.Parameter(torch.tensor(2.0 if feature_extractor_weights_path is None else 3.0))

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        assert self.asked[:2] == ("inception-v3-compat", ["2048"])
        return (x.float().mean((2, 3)) * self.scale,)


@pytest.fixture
def fidelity(monkeypatch):
    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_inception_is_torch_fidelitys(fidelity):
    extractor = load_extractor("inception", device="cpu")
    np.testing.assert_allclose(extractor(COLOUR), 2 * COLOUR.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(extractor(DIGITS), 2 * DIGITS.mean((1, 2)).repeat(3, axis=1), rtol=1e-5)
    other = load_extractor("inception", "weights.pth", "cpu")
    np.testing.assert_allclose(other(COLOUR), 3 * COLOUR.mean((1, 2)), rtol=1e-5)
    assert extractor.identity != other.identity


def test_inception_says_what_to_install(monkeypatch):
    hidden(monkeypatch, "torch_fidelity")
    hidden(monkeypatch, "torch_fidelity.feature_extractor_inceptionv3")
    with pytest.raises(ImportError, match="torch-fidelity: pip install torch-fidelity"):
        load_extractor("inception", device="cpu")


def test_nothing_optional_is_imported_with_the_modules(tmp_path):
    code = (
        "from hidden_package import forget; forget('torch_fidelity', 'torchvision', 'sklearn', 'faiss')\n"
        "import diffusers_ext.cli, diffusers_ext.evaluation"
    )
    ended(start_fresh(code, said=tmp_path / "said"), tmp_path / "said")


# Callables


def means(images):
    return images.float().mean((2, 3))


def test_a_callable_gets_bytes_channels_first():
    def check(images):
        assert images.dtype == torch.uint8 and images.shape == (3, 3, 20, 30) and images.device.type == "cpu"
        np.testing.assert_array_equal(images.permute(0, 2, 3, 1), COLOUR)
        return images.flatten(1).double()

    extractor = load_extractor(check, device="cpu")
    assert extractor.identity is None and extractor.name.endswith("check")
    np.testing.assert_array_equal(extractor(COLOUR), COLOUR.transpose(0, 3, 1, 2).reshape(3, -1))


def test_no_gradient_is_kept():
    weight = torch.ones(3, requires_grad=True)
    extractor = load_extractor(lambda images: (kept.append(means(images) * weight), kept[0])[1], device="cpu")
    kept = []
    extractor(COLOUR)
    assert not kept[0].requires_grad


def test_a_module_runs_where_it_lies_and_in_eval_mode():
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).to("meta")
    with pytest.raises(ValueError, match=r"Sequential is in training mode, .* call \.eval\(\) first"):
        callable_extractor(module)
    seen = []
    module.eval().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].device.type))
    with pytest.raises((RuntimeError, NotImplementedError)):  # nothing can be read back from the meta device
        callable_extractor(module)(COLOUR[:, :2, :2])
    assert seen == ["meta"]


def test_a_feature_extractor_is_taken_as_it_is():
    extractor = FeatureExtractor("means", "1", lambda images: images.mean((1, 2)))
    assert load_extractor(extractor) is extractor
    np.testing.assert_array_equal(extractor(COLOUR), COLOUR.mean((1, 2)))


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda images: images.float().mean((2, 3))[:2], "must give one row of features an image, got 2 for 3"),
        (lambda images: images.float(), r"features of .*lambda.* must be 2-D, \(samples, dimensions\)"),
        (lambda images: images.float().mean((2, 3)) / 0, "must be finite"),
    ],
)
def test_what_is_no_features_is_named(compute, message):
    with pytest.raises(ValueError, match=message):
        load_extractor(compute, device="cpu")(COLOUR)


def test_code_is_imported_by_name_or_file(tmp_path, monkeypatch):
    code = "import numpy as np\ndef means(images):\n    return images.float().mean((2, 3))\nnumber = 3\n"
    (tmp_path / "my_own_features.py").write_text(code)
    expected = COLOUR.mean((1, 2))
    by_file = load_extractor(f"{tmp_path}/my_own_features.py:means", device="cpu")
    np.testing.assert_allclose(by_file(COLOUR), expected, rtol=1e-5)
    monkeypatch.syspath_prepend(tmp_path)
    by_name = load_extractor("my_own_features:means", device="cpu")
    np.testing.assert_allclose(by_name(COLOUR), expected, rtol=1e-5)
    for name in ("number", "other", ""):
        with pytest.raises(ValueError, match=f"'my_own_features' has no function '{name}'"):
            load_extractor(f"my_own_features:{name}")
    with pytest.raises(ImportError, match="no_such_module_anywhere"):
        load_extractor("no_such_module_anywhere:means")
    with pytest.raises(FileNotFoundError, match=r"there is no file 'missing\.py'"):
        load_extractor("missing.py:means")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg",), "features must be one of classifier, dinov2, inception or module:function, got 'vgg'"),
        (("classifier", "folder"), "the classifier is the shipped one and takes no model, got 'folder'"),
        ((means, "folder"), r"a model \('folder'\) goes with dinov2 and inception only"),
    ],
)
def test_wrong_names_and_models_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_extractor(*arguments)
