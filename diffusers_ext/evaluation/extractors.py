"""Networks that turn images into features, by name: the spaces in which sets of images are compared."""

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..hub.downloads import check_source
from ..machine.versions import best_device
from ..metrics.features import as_features
from ..pipelines.call_arguments import checked_arguments

EXTRACTORS = ("classifier", "dinov2", "inception")
DINOV2 = "facebook/dinov2-large"
DINOV2_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FeatureExtractor:
    """A feature space.

    Attributes:
        name: shown beside the numbers.
        identity: a string that changes whenever the features of an image would (weights, preprocessing), under which
            features may be kept; None if that is not known, and they are computed every time.
        compute: uint8 images (batch, height, width, 1 or 3 channels), NumPy, to features (batch, dimensions).
    """

    name: str
    identity: str | None
    compute: Callable[[np.ndarray], torch.Tensor | np.ndarray]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features (batch, dimensions) on the CPU.

        Args:
            images: a batch of them, as `compute` takes it.

        Raises:
            ValueError: unless they are that many rows, and finite.
        """
        with torch.no_grad():
            features = as_features(f"features of {self.name}", self.compute(images))
        if len(features) != len(images):
            raise ValueError(
                f"{self.name} must give one row of features an image, got {len(features)} for {len(images)}"
            )
        return features


@checked_arguments
def load_extractor(
    features: str | Callable | FeatureExtractor = "classifier",
    model: str | Path | None = None,
    device: str | torch.device | None = None,
) -> FeatureExtractor:
    """A feature extractor by name, or made of a callable.

    Args:
        features: one of

            - "classifier": the shipped MNIST classifier, 64 features of 28 x 28 grey images;
            - "dinov2": see `dinov2_extractor`;
            - "inception": see `inception_extractor`;
            - "module:function" or "path/to/file.py:function": imports that code, and takes what it names as below;
            - a callable: gets uint8 images (batch, channels, height, width) on the device, gives (batch, dimensions).
              An nn.Module must be in eval mode, and without a device it is run where it lies. Its features are never
              kept;
            - a `FeatureExtractor`: taken as it is.
        model: of "dinov2" a folder or Hub id; of "inception" a file of weights.
        device: by default the fastest one here.

    Raises:
        ValueError: for an unknown name, a model that the extractor does not take, a module in training mode.
        ImportError: for missing packages and modules.
        OSError: for weights that cannot be found.
    """
    if isinstance(features, FeatureExtractor) or callable(features):
        if model is not None:
            raise ValueError(f"a model ({str(model)!r}) goes with dinov2 and inception only; leave it out")
        return features if isinstance(features, FeatureExtractor) else callable_extractor(features, device)
    if ":" in features:
        return load_extractor(_imported(features), model, device)
    device = device or best_device()
    if features == "dinov2":
        return dinov2_extractor(DINOV2 if model is None else model, device)
    if features == "inception":
        return inception_extractor(model, device)
    if features != "classifier":
        raise ValueError(f"features must be one of {', '.join(EXTRACTORS)} or module:function, got {features!r}")
    if model is not None:
        raise ValueError(f"the classifier is the shipped one and takes no model, got {str(model)!r}")
    return classifier_extractor(device)


def classifier_extractor(device: str | torch.device) -> FeatureExtractor:
    """The 64 penultimate activations of the shipped MNIST classifier, for white digits on black of 28 x 28 pixels.

    RGB images pass if their channels are equal. The extractor raises ValueError for images of another kind.
    """
    from ..shipped import load_shipped_classifier

    classifier = load_shipped_classifier()[0].to(device)

    def compute(images: np.ndarray) -> torch.Tensor:
        grey = images[..., :1]
        if images.shape[1:3] != (28, 28) or not (images == grey).all():
            raise ValueError(
                f"the classifier knows grey digits of 28 x 28 pixels, got {_shape_text(images)}; choose other features"
            )
        return classifier(_nchw(grey, device).float() / 127.5 - 1).features

    return FeatureExtractor("classifier", weights_identity(classifier), compute)


def dinov2_extractor(model: str | Path = DINOV2, device: str | torch.device = "cpu") -> FeatureExtractor:
    """The CLS token of DINOv2 (arXiv 2304.07193, with registers 2309.16588), after the last layer norm.

    Images are resized to 224 x 224 by Pillow's bicubic filter, rounded to bytes by it, scaled to [0, 1] and normalised
    with ImageNet's mean and standard deviation; grey images are repeated over the channels, and the aspect ratio is
    not kept. With "facebook/dinov2-large" and 50,000 images the Fréchet distance is FD_DINOv2 (arXiv 2306.04675).

    Args:
        model: a folder or Hub id of transformers' dinov2 or dinov2_with_registers, of any size. float32.
        device: of the network.

    Raises:
        ValueError: for a model of another kind, or with weights missing.
        OSError: for one that is not found.
    """
    from transformers import AutoConfig, AutoModel

    check_source(model)
    kind = AutoConfig.from_pretrained(model).model_type
    if kind not in ("dinov2", "dinov2_with_registers"):
        raise ValueError(f"dinov2 features need a dinov2 or dinov2_with_registers model, '{model}' is {kind}")
    network, loading = AutoModel.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(set(loading["missing_keys"]) - {"embeddings.mask_token"}):  # a token for training alone
        raise ValueError(f"'{model}' lacks weights of its network, {missing[0]} first: {len(missing)} in all")
    network = network.to(device).eval()
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def compute(images: np.ndarray) -> torch.Tensor:
        resized = np.stack([_resize(image, DINOV2_SIZE) for image in images])
        pixels = (_nchw(resized, device).float() / 255 - mean) / std
        return network(pixel_values=pixels).last_hidden_state[:, 0]

    return FeatureExtractor("dinov2", weights_identity(network, config=_architecture(network.config)), compute)


def inception_extractor(weights: str | Path | None = None, device: str | torch.device = "cpu") -> FeatureExtractor:
    """The 2048 pooled features of the Inception-v3 of FID (arXiv 1706.08500), from torch-fidelity.

    torch-fidelity resizes to 299 x 299 and normalises; grey images are repeated over the channels.

    Args:
        weights: file of its weights; None downloads them.
        device: of the network.

    Raises:
        ImportError: without torch-fidelity.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("inception features need torch-fidelity: pip install torch-fidelity") from error
    path = None if weights is None else str(weights)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    network = network.to(device).eval()

    def compute(images: np.ndarray) -> torch.Tensor:
        return network(_nchw(_rgb(images), device))[0]

    return FeatureExtractor("inception", weights_identity(network), compute)


def callable_extractor(function: Callable, device: str | torch.device | None = None) -> FeatureExtractor:
    """Features by a function or module of the caller's; see load_extractor.

    Raises:
        ValueError: in training mode.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if isinstance(function, nn.Module):
        if function.training:
            raise ValueError(f"{name} is in training mode, where features are not reproducible; call .eval() first")
        parameter = next(function.parameters(), None)
        device = device or (None if parameter is None else parameter.device)
    device = device or best_device()
    return FeatureExtractor(name, None, lambda images: function(_nchw(images, device)))


def weights_identity(network: nn.Module, config: Mapping | None = None) -> str:
    """SHA-256 over the names, shapes, types and bytes of a network's state, and its configuration."""
    digest = hashlib.sha256(json.dumps([type(network).__name__, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _architecture(config) -> dict:
    """A transformers config without where it was loaded from, by which version and in which dtype."""
    ignored = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
    return {name: value for name, value in config.to_dict().items() if name not in ignored}


def _imported(target: str) -> Callable | FeatureExtractor:
    """What "module:function" or "file.py:function" names."""
    source, _, name = target.rpartition(":")
    if source.endswith(".py"):
        if not Path(source).is_file():
            raise FileNotFoundError(f"features {target!r}: there is no file '{source}'")
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"features {target!r}: '{source}' has no function {name!r}")
    return found


def _shape_text(images: np.ndarray) -> str:
    _, height, width, channels = images.shape
    return f"{'grey' if channels == 1 else 'RGB'} images of {width} x {height}"


def _rgb(images: np.ndarray) -> np.ndarray:
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """(height, width, 1 or 3) to (size, size, 3), bicubic, bytes."""
    picture = Image.fromarray(_rgb(image)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _nchw(images: np.ndarray, device: str | torch.device) -> torch.Tensor:
    """(batch, height, width, channels) to a tensor (batch, channels, height, width) on a device."""
    return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C")).to(device)
