"""Export a pipeline as a folder, or Hub repository, that loads with diffusers alone.

diffusers saves weights and configs but no code, and records classes of other packages by their module's path.
An export adds the code: each class of ours is copied beside its component and recorded by file stem.
"""

import ast
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile

from diffusers import DiffusionPipeline

LIBRARIES = ("diffusers", "transformers")  # whose classes need no code of ours
INSTALLED = {"accelerate", "diffusers", "huggingface_hub", "numpy", "PIL", "safetensors", "torch", "transformers"}


def export_pipeline(pipeline: DiffusionPipeline, folder: str | Path, license: str | None = None) -> Path:
    """Write weights, configs, our code files, model_index.json and a model card to a new folder; returns it.

    Loads with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` where only diffusers is installed.
    license: an SPDX identifier for the model card, such as "apache-2.0"; the licence of the weights is yours to know.
    Paths of this machine, which diffusers notes in the configs, are left out.

    Raises ValueError if the folder exists and is not empty, or if a component's class cannot be shipped as a file: it
    was defined in no file, or that file imports, outside of functions, what a machine with diffusers may not have, or
    it is a component of a nested pipeline.
    The folder appears whole or not at all.
    """
    folder = new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        staged = Path(temporary) / "export"
        pipeline.save_pretrained(staged)
        _drop_paths(staged)
        _add_code(pipeline, staged)
        (staged / "README.md").write_text(model_card(pipeline, license), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(staged, folder)
    return folder


def new_folder(folder: str | Path) -> Path:
    """The resolved path of a folder that does not exist or is empty. Raises ValueError for any other."""
    folder = Path(folder).resolve()
    if folder == Path.cwd():
        raise ValueError("output folder must not be the current one; choose a new one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output folder {str(folder)!r} is not empty; choose a new one or remove it first")
    return folder


def _drop_paths(folder: Path) -> None:
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
        if component is not None and not _from_library(type(component)):
            index[name] = _copy_class(type(component), folder / name)
    if not _from_library(type(pipeline)):
        index["_class_name"] = _copy_class(type(pipeline), folder)
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_nested(name: str, pipeline: DiffusionPipeline) -> None:
    """Raises ValueError for components of ours in a pipeline that is itself a component.

    diffusers loads the class of a nested pipeline from the repository, but does not hand trust_remote_code on to it.
    """
    ours = {key: type(part).__name__ for key, part in pipeline.components.items() if part is not None}
    ours = {key: cls for key, cls in ours.items() if not _from_library(type(pipeline.components[key]))}
    if ours:
        raise ValueError(
            f"{name} holds components with code of their own, {ours}, which diffusers cannot load inside another"
            f" pipeline; export {name} by itself and pass {name}= when loading, or use diffusers' classes in it"
        )


def _from_library(cls: type) -> bool:
    return cls.__module__.split(".")[0] in LIBRARIES


def _copy_class(cls: type, folder: Path) -> list[str]:
    """Copy the file that defines a class, and its siblings, into a folder; returns [file stem, class name]."""
    source = _source_of(cls)
    for path in _with_siblings(source):
        copyfile(path, folder / path.name)
    return [source.stem, cls.__name__]


def _source_of(cls: type) -> Path:
    """The file whose top level defines a class."""
    try:
        source = Path(inspect.getsourcefile(cls) or "")
    except TypeError:
        source = Path()
    if source.is_file():
        statements = ast.parse(source.read_text(encoding="utf-8")).body
        if any(isinstance(node, ast.ClassDef) and node.name == cls.__name__ for node in statements):
            return source
    raise ValueError(
        f"{cls.__name__} was defined in no file, so it cannot be exported; move it to a module of its own"
    )


def _with_siblings(source: Path) -> list[Path]:
    """A file and those that it imports by `from .name import x`, the one form that diffusers' loader follows."""
    names = [module for level, module in _imports(source) if level == 1 and module]
    files = [source, *(source.parent / f"{name}.py" for name in dict.fromkeys(names))]
    for file in files:
        for level, module in _imports(file) if file.is_file() else [(1, file.stem)]:
            library = module.split(".")[0]
            beside = level == 1 and source.parent / f"{module}.py" in files and file.is_file()
            installed = level == 0 and (library in INSTALLED or library in sys.stdlib_module_names)
            if not beside and not installed:
                raise ValueError(
                    f"{file} imports {'.' * level + module!r}, which a Hub repository does not hold; import only the"
                    " standard library, what diffusers needs and, in the class's own file, siblings by"
                    " `from .name import x`; optional packages go inside functions"
                )
    return files


def _imports(source: Path) -> Iterator[tuple[int, str]]:
    """(level, module) of each import of a file that runs when it is loaded, and of relative ones in functions."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source.read_text(encoding="utf-8")), False)]
    while pending:
        node, lazy = pending.pop()
        if isinstance(node, ast.ImportFrom) and (node.level or not lazy or node.module.startswith("diffusers_ext")):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from ((0, name) for name in names if not lazy or name.split(".")[0] == "diffusers_ext")
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        pending.extend((child, lazy) for child in ast.iter_child_nodes(node))


def model_card(pipeline: DiffusionPipeline, license: str | None = None) -> str:
    """A README.md for the exported pipeline: metadata, usage, components and where they came from."""
    name = type(pipeline).__name__
    summary = (inspect.getdoc(type(pipeline)) or name).split("\n", 1)[0]
    classes = {key: type(value) for key, value in pipeline.components.items() if value is not None}
    components = "\n".join(
        f"| `{key}` | {cls.__name__} | {cls.__module__.split('.')[0] if _from_library(cls) else 'this repository'} |"
        for key, cls in classes.items()
    )
    origin = pipeline.config.get("_name_or_path") or "a pipeline in memory"
    origin = Path(origin).name if Path(origin).exists() else origin
    needs_code = not all(_from_library(cls) for cls in [type(pipeline), *classes.values()])
    trust = ", trust_remote_code=True" if needs_code else ""
    metadata = ["library_name: diffusers", *([f"license: {license}"] if license else [])]
    return "\n".join(
        [
            "---",
            *metadata,
            "---",
            f"# {name}",
            "",
            summary,
            "",
            "```python",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("path/to/this/repository"{trust})',
            "```",
            "",
            *(["`trust_remote_code=True` runs the `.py` files of this repository; read them first.", ""] * needs_code),
            "| component | class | code |",
            "|---|---|---|",
            components,
            "",
            f"Exported from `{origin}` with diffusers_ext."
            + ("" if license else " The licence of the weights is that of their source."),
            "",
        ]
    )
