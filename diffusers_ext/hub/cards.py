"""The model cards of exported folders: metadata, usage, components and where they came from."""

import inspect
from pathlib import Path

import diffusers
import yaml
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .. import __version__
from .sources import from_library

PLACE = "path/to/this/repository"
TRUST = (
    "`trust_remote_code=True` runs the `.py` files of this repository; read them first. `save_pretrained` copies none."
)


def license_of(origin: str | None) -> str | None:
    """The licence that the card of a folder states; None where there is no folder, no card or no licence in it."""
    card = Path(origin or "nowhere") / "README.md"
    if not card.is_file():
        return None
    try:
        return ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.license
    except (ValueError, yaml.YAMLError):
        return None


def pipeline_card(pipeline: DiffusionPipeline, license: str | None, repo_id: str | None) -> str:
    """A README.md for an exported pipeline."""
    classes = {key: type(value) for key, value in pipeline.components.items() if value is not None}
    needs_code = not all(from_library(cls) for cls in [type(pipeline), *classes.values()])
    rows = [
        f"| `{key}` | {cls.__name__} | {cls.__module__.split('.')[0] if from_library(cls) else 'this repository'} |"
        for key, cls in classes.items()
    ]
    body = [
        *_usage("DiffusionPipeline", "pipe", repo_id, needs_code),
        *["| component | class | code |", "|---|---|---|", *rows, ""],
    ]
    ours = [cls for cls in [type(pipeline), *classes.values()] if _is_ours(cls)]
    return _card(type(pipeline), body, license, pipeline.config.get("_name_or_path"), ours)


def model_card(model: ModelMixin, license: str | None, repo_id: str | None) -> str:
    """A README.md for an exported network."""
    cls = type(model)
    body = _usage("AutoModel", "model", repo_id, not from_library(cls))
    return _card(cls, body, license, model.config.get("_name_or_path"), [cls] if _is_ours(cls) else [])


def code_card(cls: type[DiffusionPipeline], repo_id: str | None) -> str:
    """A README.md for the code of a pipeline alone."""
    arguments = f'"MODEL", custom_pipeline="{repo_id or PLACE}"'
    body = _block("DiffusionPipeline", "pipe", f"{arguments}, trust_remote_code=True")
    note = "MODEL has the components that the pipeline takes; `custom_revision=` pins a commit of this repository."
    license = "apache-2.0" if _is_ours(cls) else None
    head = [*_metadata(license, None), *_title(cls)]
    return "\n".join([*head, *body, note, TRUST, "", f"Exported with diffusers_ext {__version__}.", ""])


def _is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "diffusers_ext"


def _is_on_hub(origin: str) -> bool:
    try:
        validate_repo_id(origin)
    except HFValidationError:
        return False
    return not Path(origin).exists()


def _metadata(license: str | None, base_model: str | None) -> list[str]:
    data = ModelCardData(library_name="diffusers", license=license, base_model=base_model)
    return ["---", data.to_yaml(), "---"]


def _title(cls: type) -> list[str]:
    return [f"# {cls.__name__}", "", (inspect.getdoc(cls) or cls.__name__).split("\n", 1)[0], ""]


def _block(loader: str, name: str, arguments: str) -> list[str]:
    code = [f"from diffusers import {loader}", "", f"{name} = {loader}.from_pretrained({arguments})"]
    return ["```python", *code, "```", ""]


def _usage(loader: str, name: str, repo_id: str | None, needs_code: bool) -> list[str]:
    trust = ", trust_remote_code=True" if needs_code else ""
    return [*_block(loader, name, f'"{repo_id or PLACE}"{trust}'), *([TRUST, ""] if needs_code else [])]


def _card(cls: type, body: list[str], license: str | None, origin: str | None, ours: list[type]) -> str:
    """origin: a folder, of which the name alone is told, or a repository on the Hub. ours: classes of this package."""
    on_hub = bool(origin) and _is_on_hub(origin)
    source = f"`{origin if on_hub else Path(origin).name}`" if origin else "memory"
    made = f"Exported from {source} with diffusers_ext {__version__} and diffusers {diffusers.__version__}."
    weights = "" if license else " The licence of the weights is that of their source."
    code = f" The code of {', '.join(sorted({one.__name__ for one in ours}))} is Apache-2.0." if ours else ""
    head = [*_metadata(license, origin if on_hub else None), *_title(cls)]
    return "\n".join([*head, *body, made + weights + code, ""])
