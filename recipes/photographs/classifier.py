"""The classifier of photographs: how it is trained, and what samples are measured with."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from diffusers_ext.evaluation import METRICS, measure_features
from diffusers_ext.flow import combined_features, pixel_features
from diffusers_ext.flow.features import CLASSIFIER_WEIGHT
from diffusers_ext.models import ImageClassifier

CLASSIFIER = {"in_channels": 3, "channels": (64, 128, 256)}  # 1.2 million weights, 64 features
SHIFT = 4  # pixels


def build_classifier() -> ImageClassifier:
    """For photographs of ten classes."""
    return ImageClassifier(**CLASSIFIER)


def flip_and_shift(images: torch.Tensor) -> torch.Tensor:
    """Mirror an image or not and shift it by up to 4 pixels, at random; what lies outside is reflected."""
    batch, size = len(images), images.shape[-1]
    theta = torch.zeros(batch, 2, 3, device=images.device)
    theta[:, 0, 0] = torch.randint(0, 2, (batch,), device=images.device) * 2.0 - 1
    theta[:, 1, 1] = 1
    theta[:, :, 2] = torch.randint(-SHIFT, SHIFT + 1, (batch, 2), device=images.device) * (2 / size)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


class Judge:
    """The trained classifier of a folder and its reference features, as train_mnist_classifier writes them."""

    def __init__(self, folder: Path, device: torch.device):
        self.classifier = ImageClassifier.from_pretrained(folder).to(device).eval()
        self.reference = load_file(folder / "reference.safetensors", device=str(device))

    @torch.no_grad()
    def outputs(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (count, 64) and classes (count,) of images (count, 3, 32, 32) in [-1, 1], on the device."""
        found = [self.classifier(batch.to(self.classifier.device)) for batch in images.split(500)]
        return torch.cat([one.features for one in found]), torch.cat([one.logits for one in found]).argmax(1)

    def flow_features(self, real: torch.Tensor):
        """The space in which a flow seeks neighbours: pixels and the classifier's features, as for the digits."""
        parts = [(pixel_features, 1.0), (lambda images: self.outputs(images)[0], CLASSIFIER_WEIGHT)]
        return combined_features(parts, real)

    def measure(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float | None]:
        """The numbers of `evaluate_digits`, of images (count, 3, 32, 32) in [0, 1]."""
        features, classes = self.outputs(images * 2 - 1)
        real, statistics = self.reference["features"].float(), (self.reference["mean"], self.reference["covariance"])
        others = [name for name in METRICS if name != "precision_recall"]
        return {
            "recognised": (classes.cpu() == labels).double().mean().item(),
            **measure_features(features, real, statistics, others),
            **measure_features(features, real[: len(features)], metrics=["precision_recall"]),
        }
