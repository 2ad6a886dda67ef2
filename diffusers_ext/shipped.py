"""The front door: a shipped model, a folder or a Hub id becomes a pipeline or a network."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoModel, DiffusionPipeline, ModelMixin
from diffusers.utils import logging
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from . import models
from .casting import dtype_option
from .hub.damage import read_json, refusing
from .hub.downloads import download_pipeline
from .hub.folders import check_model, check_model_folder, check_pipeline, check_pipeline_folder
from .model_names import ASSETS, check_name, resolve_model
from .model_names import shipped_models as shipped_models  # asked for here as well
from .models import ImageClassifier
from .pipelines import ADMUpsamplerPipeline, FlowPostprocessingPipeline
from .pipelines.boost_and_skip import BOOST_AND_SKIP_CLASSES, BoostAndSkipPipeline
from .pipelines.call_arguments import checked_arguments
from .schedulers import boost_and_skip

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


@checked_arguments
def load_shipped_classifier(name: str = "mnist-classifier") -> tuple[ImageClassifier, Reference]:
    """A shipped classifier in float32 and eval mode, with the reference features of its training set.

    Raises:
        ValueError: for another name.
    """
    folder = ASSETS / name
    if not (folder / "reference.safetensors").is_file():
        names = [one for one, path in shipped_models().items() if (path / "reference.safetensors").is_file()]
        raise ValueError(f"name must be one of {names}, got {name!r}")
    reference = load_file(folder / "reference.safetensors")
    reference["features"] = reference["features"].float()
    return ImageClassifier.from_pretrained(folder).eval(), Reference(**reference)


@checked_arguments
def load_pipeline(
    model: str | Path,
    pipeline: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    **kwargs,
) -> DiffusionPipeline:
    """Load a shipped model by name, or any folder or Hub id, as one of our pipelines or as its own.

    Args:
        model: name of a shipped model, a folder or a Hub id.
        pipeline: a name of `PIPELINES`; None loads the class that the model's index names. Under "boost-and-skip" a
            stock scheduler that the pipeline cannot boost itself becomes the Boost-and-Skip one of its kind.
        trust_remote_code: run the .py files that lie in the model's repository.
        dtype: of the parameters; None leaves it to `from_pretrained`.
        **kwargs: further arguments of `from_pretrained`.

    Raises:
        ValueError: for an unknown pipeline name, one that leaves parts of the model out, what `check_name` refuses, a
            shipped model that is no pipeline, code that is not trusted, a folder whose files are damaged or do not
            belong together, and what `download_pipeline` refuses.
        OSError: as `download_pipeline`.
    """
    if pipeline is not None and pipeline not in PIPELINES:
        raise ValueError(f"pipeline must be one of {sorted(PIPELINES)}, got {pipeline!r}")
    cls = DiffusionPipeline if pipeline is None else PIPELINES[pipeline]
    if dtype is not None:
        kwargs |= dtype_option(dtype)
    folder = Path(resolve_model(model))
    if not folder.is_dir() or not str(model):
        check_name(str(model))
        folder = download_pipeline(str(model), cls, trust_remote_code=trust_remote_code, **kwargs)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"model {model!r} is no pipeline: {folder} has no model_index.json")
    _check_trust(model, folder, trust_remote_code)
    if (
        pipeline is None
        and read_json(folder / "model_index.json").get("_class_name") == FlowPostprocessingPipeline.__name__
    ):
        cls = FlowPostprocessingPipeline  # which takes dtype and variant to a pipeline within it
    if trust_remote_code:  # some versions note an argument that they do not know, also where it is False
        kwargs["trust_remote_code"] = True
    if pipeline == "boost-and-skip":
        _check_parts(model, folder, pipeline, cls)
    check_pipeline_folder(folder, cls)
    with _no_bars_of_components(), refusing(f"model {model!r} cannot be loaded"):
        pipe = cls.from_pretrained(folder, **kwargs)
    check_pipeline(pipe, folder, kwargs.get("variant"))
    pipe.register_to_config(_name_or_path=resolve_model(model))
    if pipeline == "boost-and-skip" and type(pipe.scheduler).__name__ in BOOST_AND_SKIP_CLASSES:
        pipe.scheduler = boost_and_skip(pipe.scheduler)
    return pipe


@contextmanager
def _no_bars_of_components() -> Iterator[None]:
    """Without the bars that diffusers and transformers show for each pipeline that is read from a folder."""
    shown = [library for library in (logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


@checked_arguments
def load_network(model: str | Path, trust_remote_code: bool = False) -> ModelMixin:
    """A shipped network by name, or the one in a folder, such as `ImageClassifier.save_pretrained` or an export wrote.

    Raises:
        ValueError: for a folder that holds no network or a damaged one, and for code that must run and is not trusted.
    """
    folder = Path(resolve_model(model))
    name = network_class(model)
    if name is None:
        raise ValueError(f"model {model!r} is no network: {folder} has no config.json that names a class")
    if name not in models.__all__:
        _check_trust(model, folder, trust_remote_code)
    check_model_folder(folder)
    with refusing(f"model {model!r} cannot be loaded"):
        if name in models.__all__:
            network = getattr(models, name).from_pretrained(folder)
        else:
            # AutoModel refuses trust where there is no code, and takes no Path.
            network = AutoModel.from_pretrained(str(folder), trust_remote_code=any(folder.rglob("*.py")))
    check_model(network, folder)
    return network


def network_class(model: str) -> str | None:
    """The class of a shipped network, or of the one that a folder holds; None for pipelines and whatever else."""
    folder = Path(resolve_model(model))
    config = folder / "config.json"
    if (folder / "model_index.json").is_file() or not config.is_file():
        return None
    name = read_json(config).get("_class_name")
    return name if isinstance(name, str) else None


def _check_parts(model: str, folder: Path, pipeline: str, cls: type[DiffusionPipeline]) -> None:
    """Raise ValueError where a pipeline has no use for parts of a model, such as a VAE and text encoders."""
    index = read_json(folder / "model_index.json")
    parts = [
        name for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_") and entry[1:]
    ]
    unused = [name for name in parts if index[name][1] and name not in inspect.signature(cls.__init__).parameters]
    if unused:
        raise ValueError(
            f"model {model!r} is a {index.get('_class_name')} with {', '.join(unused)}, for which pipeline"
            f" {pipeline!r} has no use; leave the pipeline out: gamma and skip_steps then go through the scheduler of"
            " pipelines that multiply their noise by it"
        )


def _check_trust(model: str, folder: Path, trust_remote_code: bool) -> None:
    code = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
    if code and not trust_remote_code:  # diffusers before 0.38 would run it
        raise ValueError(f"model {model!r} holds code, {', '.join(code)}; read it, then pass trust_remote_code=True")
