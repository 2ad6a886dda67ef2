"""The small trained models that ship with the package, and how a model's name becomes something to load."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from .models import ImageClassifier
from .pipelines import BoostAndSkipPipeline

ASSETS = Path(__file__).parent / "assets"
PIPELINES = {"boost-and-skip": BoostAndSkipPipeline}


@dataclass(frozen=True)
class Reference:
    """Features of the training images under a shipped classifier.

    mean (dim,) and covariance (dim, dim): float64, over the whole training set. features (count, dim) float32 and
    labels (count,): of its first images.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    features: torch.Tensor
    labels: torch.Tensor


def shipped_models() -> dict[str, Path]:
    """Name and folder of each model that ships, in Hub layout."""
    return {path.name: path for path in sorted(ASSETS.iterdir()) if (path / "README.md").is_file()}


def resolve_model(name: str) -> str:
    """The folder of a shipped model by its name; anything else (a path, a Hub id) as it is."""
    return str(shipped_models().get(name, name))


def load_shipped_classifier(name: str = "mnist-classifier") -> tuple[ImageClassifier, Reference]:
    """A shipped classifier in float32 and eval mode, with the reference features of its training set."""
    folder = ASSETS / name
    reference = load_file(folder / "reference.safetensors")
    reference["features"] = reference["features"].float()
    return ImageClassifier.from_pretrained(folder).eval(), Reference(**reference)


def load_pipeline(model: str, pipeline: str | None = None, **kwargs) -> DiffusionPipeline:
    """Load a shipped model by name, or any folder or Hub id, as one of our pipelines or as its own.

    pipeline: a name of `PIPELINES`; None loads the class that the model's index names.
    kwargs: further arguments of `from_pretrained`, such as torch_dtype.

    Raises ValueError for an unknown pipeline name.
    """
    if pipeline is not None and pipeline not in PIPELINES:
        raise ValueError(f"pipeline must be one of {sorted(PIPELINES)}, got {pipeline!r}")
    cls = DiffusionPipeline if pipeline is None else PIPELINES[pipeline]
    return cls.from_pretrained(resolve_model(model), **kwargs)
