"""Names of models: shipped ones, folders and Hub ids. Needs the standard library alone, so a typo is told at once."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def shipped_models() -> dict[str, Path]:
    """Name and folder of each model that ships, in Hub layout."""
    return {path.name: path for path in sorted(ASSETS.iterdir()) if (path / "README.md").is_file()}


def resolve_model(name: str | Path) -> str:
    """The folder of a shipped model by its name; anything else (a path, a Hub id) as it is."""
    return str(shipped_models().get(str(name), name))


def check_name(model: str, others: Iterable[str] = ()) -> None:
    """Raise ValueError for a model that is neither shipped nor a folder nor of a Hub id's form, owner/name.

    Args:
        model: the name.
        others: names that are meant for something else.
    """
    path, known = Path(model), [*shipped_models(), *others]
    if model in known or (model and path.is_dir()) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        return
    near = get_close_matches(model.lower(), known, 1)
    told = "a file, not a folder" if path.is_file() else "no folder"
    raise ValueError(
        f"model {model!r} is {told}, no Hub id (owner/name) and none of {', '.join(known)}"
        + (f"; did you mean {near[0]}?" if near else "")
    )
