"""What a run keeps in a file, and the comparison of the settings that it was begun with."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .files import remove_leftovers, replacing, sync_folder, write_json


class Kept:
    """A file with all that a run has so far, and with the settings that it was begun with.

    Args:
        path: JSON, or safetensors where tensors are kept.
        settings: JSON-able, all else that the content depends on.
        is_whole: whether the content has the form that the run needs.
        versions: of the packages that it depends on, where they are told apart from the settings.
    """

    def __init__(
        self, path: Path, settings: Mapping, is_whole: Callable[[dict], bool], versions: Mapping | None = None
    ):
        self.path, self.is_whole = path, is_whole
        begun_with = {"settings": settings} if versions is None else {"settings": settings, "versions": versions}
        self.begun_with = json.loads(json.dumps(begun_with))

    def load(self) -> dict | None:
        """What an earlier start kept; None where there is nothing.

        Raises:
            ValueError: as `read` and `check`.
        """
        content = self.read()
        if content is not None:
            self.check(content)
        return content

    def read(self) -> dict | None:
        """The content, whatever it was begun with. Only under `lock`: what killed starts left of it is removed.

        Raises:
            ValueError: for a file of something else, and as `check` for one without the form that the run needs.
        """
        remove_leftovers(self.path.parent, self.path.name)
        if not self.path.exists():
            return None
        content, whole = None, False
        try:
            content = _read(self.path)
            whole = all(isinstance(content[name], dict) for name in self.begun_with) and self.is_whole(content)
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError):
            pass
        if whole:
            return content
        kinds = [isinstance(content, dict) and content.get(name) for name in self.begun_with]
        if all(kind and isinstance(kind, dict) for kind in kinds):
            self.check(content)  # an earlier version may have kept another form
        raise ValueError(f"{self.path} was not written by this command; choose another output folder")

    def check(self, content: Mapping) -> None:
        """Check that content was begun with what is asked for now.

        Args:
            content: what `read` returned.

        Raises:
            ValueError: naming every setting or version that is not that of the content, with both values.
        """
        for name, now in self.begun_with.items():
            check_same(self.path, content[name], now, name)

    def save(self, **content) -> None:
        """Replace what is kept: JSON-able values, and tensors on the CPU."""
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        values = {**self.begun_with, **{name: value for name, value in content.items() if name not in tensors}}
        if not tensors:
            write_json(self.path, values)
            return
        data = save(tensors, metadata={name: json.dumps(value) for name, value in values.items()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            file.write(data)
        sync_folder(self.path.parent)


def _read(path: Path) -> dict:
    with path.open("rb") as file:
        is_json = file.read(9)[8:] != b"{"  # safetensors: 8 bytes with the length of a JSON header
    if is_json:
        return json.loads(path.read_text(encoding="utf-8"))
    with safe_open(path, framework="pt") as file:
        values = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
        return {**values, **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


def check_same(path: Path, old: Mapping, new: Mapping, kind: str = "settings") -> None:
    """Check that a file or folder was begun with what is asked for now.

    Args:
        path: of the file or folder.
        old: what it was begun with.
        new: what is asked for now.
        kind: what the two are, for the message.

    Raises:
        ValueError: naming every entry in which what a file or folder was begun with differs from now.
    """
    if changed := "; ".join(differences(old, new)):
        raise ValueError(
            f"{str(path)!r} was begun with other {kind}: {changed}; go on with the old ones, or choose another output"
            " folder"
        )


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """ "name: old before, new now" for each value in which two JSON values differ; of a list the first that does."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = (list(differences(a, b, f"{name}[{i}]")) for i, (a, b) in enumerate(zip(old, new, strict=True)))
        if changed := [part for part in parts if part]:
            more = f" (and {len(changed) - 1} more of its entries)" if len(changed) > 1 else ""
            yield "; ".join(changed[0]) + more
    elif old != new or type(old) is not type(new):
        yield f"{name}: {_short(old)} before, {_short(new)} now"


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
