"""The small trained models that ship with the package, and how a model's name becomes something to load."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from .models import ImageClassifier
from .pipelines import ADMUpsamplerPipeline
from .pipelines.boost_and_skip import BOOST_AND_SKIP_CLASSES, BoostAndSkipPipeline
from .schedulers import boost_and_skip

ASSETS = Path(__file__).parent / "assets"
PIPELINES = {"adm-upsampler": ADMUpsamplerPipeline, "boost-and-skip": BoostAndSkipPipeline}


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


def load_pipeline(
    model: str, pipeline: str | None = None, trust_remote_code: bool = False, **kwargs
) -> DiffusionPipeline:
    """Load a shipped model by name, or any folder or Hub id, as one of our pipelines or as its own.

    pipeline: a name of `PIPELINES`; None loads the class that the model's index names. Under "boost-and-skip" a stock
    scheduler that the pipeline cannot boost itself becomes the Boost-and-Skip one of its kind. trust_remote_code: run
    the .py files that lie in the model's repository. kwargs: further arguments of `from_pretrained`.

    Raises ValueError for an unknown pipeline name, a shipped model that is no pipeline, and a local folder with code
    that is not trusted.
    """
    if pipeline is not None and pipeline not in PIPELINES:
        raise ValueError(f"pipeline must be one of {sorted(PIPELINES)}, got {pipeline!r}")
    folder = Path(resolve_model(model))
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(f"model {model!r} is no pipeline: {folder} has no model_index.json")
    code = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py")) if folder.is_dir() else []
    if code and not trust_remote_code:  # diffusers before 0.38 would run it
        raise ValueError(f"model {model!r} holds code, {', '.join(code)}; read it, then pass trust_remote_code=True")
    cls = DiffusionPipeline if pipeline is None else PIPELINES[pipeline]
    pipe = cls.from_pretrained(resolve_model(model), trust_remote_code=trust_remote_code, **kwargs)
    if pipeline == "boost-and-skip" and type(pipe.scheduler).__name__ in BOOST_AND_SKIP_CLASSES:
        pipe.scheduler = boost_and_skip(pipe.scheduler)
    return pipe
