"""The space that nearest neighbours are sought in: pixels, or tokens of DINOv2, or any function of images."""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from ..evaluation.extractors import IMAGENET_MEAN, IMAGENET_STD, load_extractor
from ..hub.downloads import check_source
from ..pipelines.call_arguments import checked_arguments

POOLINGS = ("patch", "cls")
CLASSIFIER_WEIGHT = 3.0  # of its squared distance beside that of pixels; docs/flow_postprocessing.md has the search


@checked_arguments
def pixel_features(images: torch.Tensor) -> torch.Tensor:
    """The samples themselves, flattened: (n, ...) to (n, d).

    Args:
        images: (n, ...).

    Raises:
        ValueError: for fewer dimensions.
    """
    if images.ndim < 2:
        raise ValueError(f"images must be (n, ...), got {tuple(images.shape)}")
    return images.flatten(1)


@checked_arguments
def classifier_features(device: str | torch.device | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The 64 features of the shipped digit classifier, of images (n, 1, 28, 28) in [-1, 1], as (n, 64) on the CPU.

    Args:
        device: of the classifier.
    """
    extractor = load_extractor("classifier", device=device)

    def features(images: torch.Tensor) -> torch.Tensor:
        pixels = images.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1)
        return torch.as_tensor(extractor(pixels.cpu().numpy()))

    return features


@checked_arguments
def combined_features(
    parts: Sequence[tuple[Callable[[torch.Tensor], torch.Tensor], float]], real: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    r"""Features whose squared distance is a weighted sum of those of several spaces.

    .. math:: d^2(a, b) = \sum_s w_s \, |f_s(a) - f_s(b)|^2 / \mathrm{var}_s

    with var_s the variance of f_s over real images, summed over dimensions, so that weights compare. Pixels alone lead
    samples to other styles than theirs, and features alone to images that look different; together they do neither.

    Args:
        parts: pairs of a function of images (n, ...) that returns (n, dim_s), and w_s > 0.
        real: images (m, ...), uint8 or as the functions take them.

    Raises:
        ValueError: for no parts, a weight that is not positive, and features that do not vary.
    """
    if not parts or any(not weight > 0 for _, weight in parts):
        raise ValueError(f"parts must be one or more (features, weight > 0), got weights {[w for _, w in parts]}")
    variances = [extract_features(real, extractor).cpu().double().var(dim=0).sum().item() for extractor, _ in parts]
    if not all(variance > 0 for variance in variances):
        raise ValueError(f"features must vary over the real images, got variances {variances}")
    scales = [(weight / variance) ** 0.5 for (_, weight), variance in zip(parts, variances, strict=True)]

    def features(images: torch.Tensor) -> torch.Tensor:
        each = zip(parts, scales, strict=True)
        return torch.cat([extractor(images).float().cpu() * scale for (extractor, _), scale in each], dim=1)

    return features


class DINOv2Features:
    """Tokens of the last layer of a DINOv2 network, after its layer norm.

    Args:
        checkpoint: folder or Hub id of a DINOv2 model, with or without registers, such as
            "facebook/dinov2-with-registers-base".
        pooling: "patch", the mean of the patch tokens, which the paper found best; registers and the class token stay
            out. "cls", the class token.
        image_size: side that images are resized to, bicubic; a multiple of the network's patch.
        device: of the network.
        dtype: of the network.

    Raises:
        ValueError: for an unknown pooling, another kind of network, and an image_size that patches do not fill.
    """

    def __init__(
        self,
        checkpoint: str,
        pooling: str = "patch",
        image_size: int = 224,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        from transformers import AutoModel

        if pooling not in POOLINGS:
            raise ValueError(f'pooling must be "patch" or "cls", got {pooling!r}')
        check_source(checkpoint)
        self.model = AutoModel.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
        config = self.model.config
        if config.model_type not in ("dinov2", "dinov2_with_registers"):
            raise ValueError(f"checkpoint {checkpoint!r} must be a DINOv2 network, got a {config.model_type}")
        if image_size < 1 or image_size % config.patch_size:
            raise ValueError(f"image_size must be a multiple of the patch, {config.patch_size}, got {image_size}")
        self.pooling, self.image_size = pooling, image_size
        self.name = f"{checkpoint}, {pooling} at {image_size}"
        self.prefix = 1 + getattr(config, "num_register_tokens", 0)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features (n, dim), float32 on the CPU.

        Args:
            images: (n, 1 or 3, height, width) in [-1, 1].

        Raises:
            ValueError: for images of another form.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must have shape (n, 1 or 3, height, width), got {tuple(images.shape)}")
        images = images.to(self.model.device, torch.float32).expand(-1, 3, -1, -1) / 2 + 0.5
        size = (self.image_size, self.image_size)
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        tokens = self.model(((images - mean) / std).to(self.model.dtype)).last_hidden_state.float()
        pooled = tokens[:, 0] if self.pooling == "cls" else tokens[:, self.prefix :].mean(dim=1)
        return pooled.cpu()


def feature_name(features: str | Callable[[torch.Tensor], torch.Tensor]) -> str:
    """What tells one feature space from another, where a run is taken up again: a name, or what an extractor says."""
    if isinstance(features, str):
        return features
    return getattr(features, "name", None) or getattr(features, "__qualname__", type(features).__qualname__)


@checked_arguments
def extract_features(
    images: torch.Tensor,
    extractor: Callable[[torch.Tensor], torch.Tensor] = pixel_features,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Features (n, d), float32 on the CPU, of samples (n, ...), a batch at a time.

    Args:
        images: uint8 in [0, 255], then shown to the extractor in [-1, 1], or floating point as they are.
        extractor: what gives the features of a batch.
        batch_size: samples of a batch.
        on_batch: called with the number of samples of each finished batch.

    Raises:
        ValueError: for no images, a batch_size below 1 and an extractor that does not return one row a sample.
    """
    if batch_size < 1 or not images.ndim or not len(images):
        raise ValueError(f"batch_size must be >= 1 and images (n, ...), got {batch_size} and {tuple(images.shape)}")
    features = []
    for batch in images.split(batch_size):
        found = extractor(as_unit(batch))
        if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != len(batch):
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found)
            raise ValueError(f"features must be a tensor ({len(batch)}, dimensions), one row a sample, got {shape}")
        features.append(found.detach().float().cpu())
        if on_batch is not None:
            on_batch(len(batch))
    return torch.cat(features)


def as_unit(samples: torch.Tensor) -> torch.Tensor:
    """Samples (n, ...): uint8 pixels as float32 in [-1, 1], floating point as float32."""
    return samples.float() / 127.5 - 1 if samples.dtype == torch.uint8 else samples.float()
