"""Export a pipeline, a network or the code of a pipeline as a folder that loads with diffusers alone.

diffusers saves weights and configs but no code, and records classes of other packages by their module's path.
An export adds the code: each class of ours is copied beside its component and recorded by file stem.
"""

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin

from ..pipelines.call_arguments import checked_arguments
from ..runs.files import staged_folder
from .cards import code_card, license_of, model_card, pipeline_card
from .sources import copy_class, from_library, source_of, with_siblings


@checked_arguments
def export_pipeline(
    pipeline: DiffusionPipeline, folder: str | Path, license: str | None = None, repo_id: str | None = None
) -> Path:
    """Write weights, configs, our code files, model_index.json and a model card to a new folder; returns it.

    Loads with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` where only diffusers is installed.
    Paths of this machine, which diffusers notes in the configs, are left out. Loaded from there and saved again with
    `save_pretrained`, it loses its code. The folder appears whole or not at all.

    Args:
        pipeline: what is exported.
        folder: new or empty.
        license: an SPDX identifier for the model card, such as "apache-2.0"; by default the one that the card beside a
            pipeline loaded from a folder states. The licence of the weights is yours to know.
        repo_id: of the Hub repository that the folder is for, to be named in the card's example.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder exists and is not empty, or if a component's class cannot be shipped as a file: it
            was defined in no file, or that file imports, outside of functions, what a machine with diffusers may not
            have, or it is a network whose file imports a sibling, or it is a component of a nested pipeline.
    """
    origin = pipeline.config.get("_name_or_path")
    with staged_folder(folder) as (folder, staged):
        pipeline.save_pretrained(staged)
        drop_paths(staged)
        _add_code(pipeline, staged)
        _write_card(staged, pipeline_card(pipeline, license or license_of(origin), repo_id))
    return folder


@checked_arguments
def export_model(
    model: ModelMixin, folder: str | Path, license: str | None = None, repo_id: str | None = None
) -> Path:
    """Write a network's weights, config, code and card to a new folder; returns it.

    Loads with `AutoModel.from_pretrained(folder, trust_remote_code=True)` where only diffusers is installed.

    Args:
        model: the network.
        folder: new or empty.
        license: as `export_pipeline`.
        repo_id: as `export_pipeline`.

    Raises:
        ValueError: as `export_pipeline`.
    """
    origin = model.config.get("_name_or_path")
    with staged_folder(folder) as (folder, staged):
        model.save_pretrained(staged)
        drop_paths(staged)
        if not from_library(type(model)):
            _map_class(type(model), staged)
        _write_card(staged, model_card(model, license or license_of(origin), repo_id))
    return folder


@checked_arguments
def export_code(cls: type[DiffusionPipeline], folder: str | Path, repo_id: str | None = None) -> Path:
    """Write a pipeline's code, without weights, and a card to a new folder; returns it.

    Pushed to the Hub, it runs the models of other repositories, as `custom_pipeline="org/name"`.

    Args:
        cls: class of the pipeline.
        folder: new or empty.
        repo_id: as `export_pipeline`.

    Raises:
        ValueError: as `export_pipeline`.
    """
    with staged_folder(folder) as (folder, staged):
        staged.mkdir()
        copy_class(cls, staged, "pipeline")  # the name that diffusers looks for in such a repository
        _write_card(staged, code_card(cls, repo_id))
    return folder


def _write_card(folder: Path, card: str) -> None:
    (folder / "README.md").write_text(card, encoding="utf-8")


def drop_paths(folder: Path) -> None:
    """Remove from every config where the model was loaded from."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _add_code(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Copy the source of every class that diffusers or transformers does not have; record it by file stem."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    for name, component in pipeline.components.items():
        if isinstance(component, DiffusionPipeline):
            _check_nested(name, component)
        if component is not None and not from_library(type(component)):
            if isinstance(component, torch.nn.Module):
                _check_alone(type(component))
            index[name] = copy_class(type(component), folder / name)
    if not from_library(type(pipeline)):
        index["_class_name"] = copy_class(type(pipeline), folder)
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _map_class(cls: type, folder: Path) -> None:
    """Copy the source of a network's class and name it in the config, where diffusers' AutoModel looks for it."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModel": ".".join(copy_class(cls, folder))}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_nested(name: str, pipeline: DiffusionPipeline) -> None:
    """Raises ValueError for components of ours in a pipeline that is itself a component.

    diffusers loads the class of a nested pipeline from the repository, but does not hand trust_remote_code on to it.
    """
    ours = {key: type(part).__name__ for key, part in pipeline.components.items() if part is not None}
    ours = {key: cls for key, cls in ours.items() if not from_library(type(pipeline.components[key]))}
    if ours:
        raise ValueError(
            f"{name} holds components with code of their own, {ours}, which diffusers cannot load inside another"
            f" pipeline; export {name} by itself and pass {name}= when loading, or use diffusers' classes in it"
        )


def _check_alone(cls: type) -> None:
    """Raises ValueError for siblings of a network's file.

    From a folder with weights diffusers downloads weights, config and the class's own file, and nothing else.
    """
    source, *siblings = with_siblings(source_of(cls))
    if siblings:
        raise ValueError(
            f"{source} imports {', '.join(path.stem for path in siblings)} beside it, which diffusers does not"
            f" download from the folder of a network; move what {cls.__name__} needs into its own file"
        )
