"""Started by a test: kills each kind of work at random moments, lets it go on, and compares with work left in peace.

    python killed_at_random.py FOLDER SEED TRIALS [WORK ...]

A moment lies before or after a call that changes the disk. Each start is a fork of this process, which thus need not
import everything again. Ends with 1 and says what differs where a file has other bytes, is missing or is left over.
"""

import os
import random
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch
from old_runs import sampled, saved_digits, tables, trained, tuned

from diffusers_ext.flow import write_flow
from diffusers_ext.hub import export_pipeline
from diffusers_ext.runs.checkpoints import Checkpoints  # noqa: F401  # before the forks
from diffusers_ext.runs.files import write_once

CHANGING = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")


def train(folder: Path) -> None:
    model = trained(folder).model
    torch.save(model.state_dict(), folder / "weights.pt")


def search(method: str):
    def work(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tables(folder / "kept", method).save(folder / "tables.json")

    return work


def export(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_once(folder / "out", lambda out: export_pipeline(saved_digits(), out))


def flow(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_flow(saved_digits().unet, folder / "pipeline", folder / "pipeline.json")


WORKS = {
    "sampling": lambda folder: sampled(saved_digits(), folder),
    "pictures": lambda folder: sampled(saved_digits(), folder, "png"),
    "training": train,
    "exact": search("exact"),
    "golden": search("golden"),
    "tuning": lambda folder: tuned(saved_digits(), folder),
    "export": export,
    "flow": flow,
}


def fork(work, folder: Path, moment: int | None) -> tuple[int, int]:
    """Exit status of the work, killed at a moment or not, and how many moments it had."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        moments = [0]

        def counted(call):
            def counting(*arguments, **options):
                for after in (False, True):
                    if moments[0] == moment:
                        os.kill(os.getpid(), signal.SIGKILL)
                    moments[0] += 1
                    if not after:
                        result = call(*arguments, **options)
                return result

            return counting

        status = 1
        try:
            for name in CHANGING:
                setattr(os, name, counted(getattr(os, name)))
            work(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        os.write(write, str(moments[0]).encode())
        os._exit(status)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(status), int(said or -1)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file. The names alone of a checkpoint's global random numbers, which no training here draws, and of what a
    search has kept, since safetensors writes metadata in any order."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    aside = ("random_states_0.pkl", "checkpoint.json", "kept")
    return {name: b"" if path.name in aside else path.read_bytes() for name, path in files.items()}


def main(folder: Path, seed: int, trials: int, works: list[str]) -> int:
    torch.set_num_threads(1)
    number, wrong = random.Random(seed), 0
    for name in works or WORKS:
        status, moments = fork(WORKS[name], folder / name / "whole", None)
        assert status == 0 and moments > 0, (name, status, moments)
        whole = contents(folder / name / "whole")
        for trial in range(trials):
            place, killed = folder / name / str(trial), []
            place.parent.mkdir(exist_ok=True)
            while len(killed) < number.choice((1, 2, 3)):
                killed.append(number.randrange(moments))
                if fork(WORKS[name], place, killed[-1])[0] == 0:  # what was left had fewer moments
                    break
            status, _ = fork(WORKS[name], place, None)
            found = contents(place)
            names = sorted(key for key in {**whole, **found} if whole.get(key) != found.get(key))
            if status or names:
                wrong += 1
                print(f"{name}, killed at {killed} of {moments}: status {status}, other {names}")
            shutil.rmtree(place)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
