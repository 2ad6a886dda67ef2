"""The states of a training in its folder: checkpoint-STEP, of which the newest whole one counts.

A checkpoint holds what accelerate saves, history.json, and checkpoint.json with the settings and the hash of every
file. It gets its name when all of that is on the disk; only then do older ones go.
"""

import json
import re
import shutil
import warnings
from pathlib import Path

from accelerate import Accelerator

from .files import TEMPORARY, changed_files, hash_files, naming, put_in_place, write_json
from .kept import check_same
from .processes import Processes

NOTES, HISTORY = "checkpoint.json", "history.json"


class Checkpoints:
    """The checkpoints of one training.

    Args:
        accelerator: with everything prepared and registered that is to be saved.
        folder: of the training.
        settings: JSON-able, all that may not change when the training goes on; None where the caller compares them.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, settings: dict | None = None):
        self.accelerator, self.folder = accelerator, Path(folder)
        self.settings = json.loads(json.dumps(settings))
        self.processes = Processes(accelerator)

    def __len__(self) -> int:
        return len(self._found())

    def load(self, steps: int) -> tuple[int, list]:
        """Go back to the newest whole checkpoint; its step and history, or 0 and [].

        Args:
            steps: of the training in all.

        Raises:
            ValueError: for other settings, each by name, for a training that has gone further than steps, and where
                every checkpoint is damaged.
        """
        step = self.processes.agreed(lambda: self._newest(steps))
        if step == 0:
            return 0, []
        path = self.folder / f"checkpoint-{step}"
        try:
            self.accelerator.load_state(str(path))
            return step, json.loads((path / HISTORY).read_text())
        except Exception as error:  # whatever damaged content raises
            raise ValueError(_damaged(path, str(error).split("\n", 1)[0])) from error

    def save(self, step: int, history: list | None = None) -> None:
        """Write a checkpoint, then remove the older ones.

        Args:
            step: iterations done.
            history: JSON-able, of the training so far.
        """
        fresh = self.folder / f"{TEMPORARY}checkpoint-{step}"
        with naming(fresh):
            self.accelerator.save_state(str(fresh))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(fresh / HISTORY, history or [])
            write_json(fresh / NOTES, {"settings": self.settings, "files": hash_files(fresh)})
            path = self.folder / f"checkpoint-{step}"
            if path.exists():  # damaged: a whole one would have been gone on from
                self._remove(path)
            put_in_place(fresh, path)
            for number, older in self._found():
                if number != step:
                    self._remove(older)
        self.accelerator.wait_for_everyone()

    def _found(self) -> list[tuple[int, Path]]:
        """Step and folder of each checkpoint, the newest first. Raises ValueError for one of something else."""
        found = []
        for path in self.folder.glob("checkpoint-*"):
            if re.fullmatch(r"checkpoint-\d+", path.name):
                if not (path / HISTORY).exists() and not (path / NOTES).exists():
                    raise ValueError(f"{path} was not written by this command; choose another output")
                found.append((int(path.name.split("-")[1]), path))
        return sorted(found, reverse=True)

    def _newest(self, steps: int) -> int:
        """The step of the newest whole checkpoint, 0 where there is none; what killed starts left is removed."""
        for pattern in (f"{TEMPORARY}checkpoint-*", "checkpoint-*[0-9].new"):  # the second of earlier versions
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover)
        if (self.folder / "checkpoint" / "step.json").exists():
            raise ValueError(f"{self.folder / 'checkpoint'} was written by an earlier version; choose another output")
        found = self._found()
        for step, path in found:
            settings, files = _notes(path)
            if changed := changed_files(path, files):
                warnings.warn(_damaged(path, ", ".join(changed)))
                continue
            if settings is not None and self.settings is not None:
                check_same(self.folder, settings, self.settings)
            if step > steps:
                raise ValueError(f"{self.folder} was begun with other settings: steps: {step} before, {steps} now")
            for number, older in found:
                if number < step:
                    self._remove(older)
            return step
        if found:
            raise ValueError(_damaged(found[0][1], "there is no other one"))
        return 0

    def _remove(self, path: Path) -> None:
        """A kill meanwhile leaves no half checkpoint under its name."""
        gone = path.rename(path.with_name(f"{TEMPORARY}checkpoint-gone-{path.name}"))
        shutil.rmtree(gone)


def _notes(path: Path) -> tuple[dict | None, dict[str, str]]:
    """The settings and the hashes of a checkpoint; (None, {}) of earlier versions, which noted none."""
    if not (path / NOTES).exists():
        return None, {}
    try:
        notes = json.loads((path / NOTES).read_text(encoding="utf-8"))
        return notes["settings"], dict(notes["files"])
    except (ValueError, KeyError, TypeError):
        return None, {NOTES: "damaged"}


def _damaged(path: Path, what: str) -> str:
    return f"{path} is damaged ({what}); remove it to begin anew"
