"""The files that define a class, copied to where diffusers loads code from a repository."""

import ast
import inspect
import sys
from functools import lru_cache
from pathlib import Path
from shutil import copyfile

LIBRARIES = ("diffusers", "transformers")  # whose classes need no code of ours
INSTALLED = {"accelerate", "diffusers", "huggingface_hub", "numpy", "PIL", "safetensors", "torch", "transformers"}


def from_library(cls: type) -> bool:
    """Whether a class is one of diffusers or transformers, which every reader of the repository has."""
    return cls.__module__.split(".")[0] in LIBRARIES


def copy_class(cls: type, folder: Path, name: str | None = None) -> list[str]:
    """Copy the file that defines a class, and its siblings, into a folder; returns [file stem, class name].

    name: of the copy, without .py; by default that of the file.

    Raises:
        ValueError: as `source_of` and `with_siblings`.
    """
    source, *siblings = with_siblings(source_of(cls))
    for path in siblings:
        copyfile(path, folder / path.name)
    copyfile(source, folder / f"{name or source.stem}.py")
    return [name or source.stem, cls.__name__]


def source_of(cls: type) -> Path:
    """The file whose top level defines a class.

    Raises:
        ValueError: where there is none.
    """
    try:
        source = Path(inspect.getsourcefile(cls) or "")
    except (TypeError, OSError):  # OSError: of a notebook, or of python -c
        source = Path()
    if source.is_file():
        statements = ast.parse(_text(source)).body
        if any(isinstance(node, ast.ClassDef) and node.name == cls.__name__ for node in statements):
            return source
    raise ValueError(
        f"{cls.__name__} was defined in no file, so it cannot be exported; move it to a module of its own"
    )


def with_siblings(source: Path) -> list[Path]:
    """A file and those that it imports by `from .name import x`, the one form that diffusers' loader follows.

    Raises:
        ValueError: for an import, outside of functions, that a machine with diffusers may not have.
    """
    names = [module for level, module in _imports(_text(source)) if level == 1 and module]
    files = [source, *(source.parent / f"{name}.py" for name in dict.fromkeys(names))]
    for file in files:
        for level, module in _imports(_text(file)) if file.is_file() else [(1, file.stem)]:
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


def _text(source: Path) -> str:
    return source.read_text(encoding="utf-8")


@lru_cache(maxsize=64)
def _imports(text: str) -> list[tuple[int, str]]:
    """(level, module) of each import of a file that runs when it is loaded, and of relative ones in functions."""
    found: list[tuple[int, str]] = []
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(text), False)]
    while pending:
        node, lazy = pending.pop()
        if isinstance(node, ast.ImportFrom) and (node.level or not lazy or node.module.startswith("diffusers_ext")):
            found.append((node.level, node.module or ""))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found.extend((0, name) for name in names if not lazy or name.split(".")[0] == "diffusers_ext")
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        pending.extend((child, lazy) for child in ast.iter_child_nodes(node))
    return found
