"""What survives a kill: the lock, files, what is kept, checkpoints; and runs that the version before began."""

import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from fresh_process import start_fresh, wait_until
from old_runs import FIXTURES, sampled, saved_digits, tables, trained, tuned

from diffusers_ext.jump_your_steps import search
from diffusers_ext.runs import kept, lock
from diffusers_ext.runs.bar import steps_left
from diffusers_ext.runs.checkpoints import Checkpoints
from diffusers_ext.runs.files import check_folder, staged_folder, write_once
from diffusers_ext.runs.kept import Kept, differences
from diffusers_ext.sampling import folder as sampling


@pytest.fixture
def said(tmp_path_factory):
    return tmp_path_factory.mktemp("said") / "log"


def lockable(path: Path) -> bool:
    try:
        with lock.lock(path):
            return True
    except ValueError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_the_lock_is_its_owner_s_for_as_long_as_it_lives(tmp_path, said):
    script = """
import sys, time
from pathlib import Path
from diffusers_ext.runs.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""
    owner = start_fresh(script, tmp_path, said=said)
    wait_until(lambda: said.exists() and said.read_text() == "held\n", owner)
    with (
        pytest.raises(ValueError, match=f"in use by process {owner.pid} on {socket.gethostname()}"),
        lock.lock(tmp_path),
    ):
        pass
    for content in ("", '{"pid": 1, "host": "elsewhere"}'):  # whatever the file says
        (tmp_path / "lock.json").write_text(content)
        assert not lockable(tmp_path)
    owner.kill()
    owner.join()
    assert (tmp_path / "lock.json").exists() and lockable(tmp_path) and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
def test_children_do_not_keep_the_lock(tmp_path, said):
    script = """
import multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path
from diffusers_ext.runs.lock import lock
with lock(Path(sys.argv[1])):
    forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,))
    forked.start()
    started = subprocess.Popen(["sleep", "300"], close_fds=False)
    print(forked.pid, started.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    owner = start_fresh(script, tmp_path, said=said)
    owner.join()
    children = [int(pid) for pid in said.read_text().split()]
    try:
        assert owner.exitcode == -signal.SIGKILL and len(children) == 2
        for child in children:
            os.kill(child, 0)  # lives
        assert lockable(tmp_path)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_a_file_is_held_by_a_lock_beside_it(tmp_path):
    with lock.lock(tmp_path / "kept"):
        assert [path.name for path in tmp_path.iterdir()] == ["kept.lock.json"] and not lockable(tmp_path / "kept")
        assert lockable(tmp_path / "other")
    assert not list(tmp_path.iterdir())


def test_somebody_s_lock_json_is_left_alone(tmp_path):
    (tmp_path / "lock.json").write_text('{"dependencies": {}}')
    with pytest.raises(ValueError, match="was not written by this command"), lock.lock(tmp_path):
        pass
    assert (tmp_path / "lock.json").read_text() == '{"dependencies": {}}'


def test_no_locks_on_the_file_system_is_an_error(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def missing(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with (
        pytest.raises(OSError, match=r"cannot be locked .* a file system with locks \(flock\)"),
        lock.lock(tmp_path),
    ):
        pass


def test_every_difference_is_named():
    old = {"a": 1, "b": {"c": [1, 2, 3], "d": None}, **{f"e{i}": i for i in range(8)}}
    new = {"a": 2, "b": {"c": [1, 5, 6], "d": 0.5}, **{f"e{i}": -i for i in range(8)}}
    named = list(differences(old, new))
    assert named[:3] == [
        "a: 1 before, 2 now",
        "b.c[1]: 2 before, 5 now (and 1 more of its entries)",
        "b.d: None before, 0.5 now",
    ]
    assert [line.split(":")[0] for line in named[3:]] == [f"e{i}" for i in range(1, 8)]


def test_what_is_kept_comes_back(tmp_path):
    for content in ({"rows": [[1, 2.5]], "done": 3}, {"sum": torch.arange(4.0).view(2, 2), "done": 3}):
        path = tmp_path / "deep" / "kept"
        Kept(path, {"seed": 1}, lambda content: content["done"] > 0).save(**content)
        (path.parent / ".unfinished-7-kept").write_text("half")
        found = Kept(path, {"seed": 1}, lambda content: content["done"] > 0).load()
        assert found.pop("settings") == {"seed": 1} and found.keys() == content.keys()
        assert all(np.array_equal(found[name], value) for name, value in content.items())
        assert [entry.name for entry in path.parent.iterdir()] == ["kept"]
        with pytest.raises(ValueError, match="other settings: seed: 1 before, 2 now"):
            Kept(path, {"seed": 2}, lambda content: True).load()
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", b"[1]", b'{"settings": {}}', b'{"settings": 3, "done": 1}'):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="was not written by this command"):
                Kept(path, {}, lambda content: content["done"] > 0).load()


def test_only_folders_of_one_s_own_are_gone_on_in(tmp_path):
    folder = tmp_path / "out"
    assert check_folder(folder, "marker") == folder
    folder.mkdir()
    (folder / "lock.json").write_text("")
    (folder / ".unfinished-1-marker").write_text("")
    assert check_folder(folder, "marker") == folder
    (folder / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        check_folder(folder, "marker")
    (folder / "marker").write_text("")
    assert check_folder(folder, "marker") == folder


@pytest.mark.slow
def test_a_staged_folder_appears_whole_and_nothing_stays_beside_it(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: (
            synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            if sys.platform == "linux"
            else None or fsync(descriptor)
        ),
    )
    (tmp_path / ".unfinished-out/staged").mkdir(parents=True)  # of a killed start
    (tmp_path / ".unfinished-out/staged/half").write_text("")
    (tmp_path / ".unfinished-out/lock.json").write_text("")
    with staged_folder(tmp_path / "out") as (folder, staged):
        assert not staged.exists()
        (staged / "deep").mkdir(parents=True)
        (staged / "deep/file").write_text("whole")
        with pytest.raises(ValueError, match="in use"), staged_folder(folder):
            pass
    assert (tmp_path / "out/deep/file").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if sys.platform == "linux":
        assert {str(staged / "deep/file"), str(staged / "deep"), str(tmp_path)} <= set(synced)
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "other") as (_, staged):
        staged.mkdir()
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_writing_the_same_model_again_changes_nothing(tmp_path):
    def write(folder: Path, text: str = "{}") -> str:
        with staged_folder(folder) as (_, staged):
            staged.mkdir()
            (staged / "config.json").write_text(text)
        return text

    assert write_once(tmp_path / "out", write) == ("{}", False)
    assert write_once(tmp_path / "out", write) == ("{}", True)
    with pytest.raises(ValueError, match="is not empty"):
        write_once(tmp_path / "out", lambda folder: write(folder, "[]"))
    assert (tmp_path / "out/config.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        write_once(tmp_path / "mine", write)


# Checkpoints


def training(folder, settings=None):
    """A training of one number, and its checkpoints."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    model = accelerator.prepare(model)
    return model, Checkpoints(accelerator, folder, settings or {"seed": 0})


def saved(folder, steps: int, **settings):
    model, states = training(folder, settings)
    with torch.no_grad():
        model.weight.fill_(float(steps))
    states.save(steps, [{"step": steps}])


def test_the_newest_checkpoint_counts_and_older_ones_go(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()  # somebody's
    (tmp_path / "checkpoint-best/weights").write_text("mine")
    saved(tmp_path, 2, seed=0)
    saved(tmp_path, 4, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-best"]
    model, states = training(tmp_path)
    assert states.load(6) == (4, [{"step": 4}]) and model.weight.item() == 4
    with pytest.raises(ValueError, match="other settings: steps: 4 before, 3 now"):
        states.load(3)
    with pytest.raises(ValueError, match="other settings: seed: 0 before, 1 now"):
        training(tmp_path, {"seed": 1})[1].load(6)
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match="checkpoint-7 was not written by this command"):
        states.load(6)


@pytest.mark.parametrize("name", ["model.safetensors", "random_states_0.pkl", "history.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_half_a_checkpoint_is_an_error_or_gives_way_to_the_one_before(tmp_path, name, damage):
    if (name, damage) == ("checkpoint.json", "gone"):
        pytest.skip("as those of earlier versions, which had none")
    saved(tmp_path / "older", 2, seed=0)
    saved(tmp_path, 4, seed=0)
    path = tmp_path / "checkpoint-4" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(data if damage == "flipped" else data[:10])
    model, states = training(tmp_path)
    if (name, damage) == ("checkpoint.json", "flipped"):
        with pytest.raises(ValueError, match=r"is damaged|other settings"):
            states.load(6)
        return
    with pytest.raises(ValueError, match=r"checkpoint-4 is damaged .*remove it to begin anew"):
        states.load(6)
    shutil.move(tmp_path / "older/checkpoint-2", tmp_path)
    with pytest.warns(UserWarning, match=f"checkpoint-4 is damaged .*{name}"):
        assert states.load(6) == (2, [{"step": 2}]) and model.weight.item() == 2
    states.save(4)
    assert training(tmp_path)[1].load(4)[0] == 4


def test_a_checkpoint_of_an_earlier_recipe_is_refused_by_name(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/step.json").write_text('{"step": 3}')
    with pytest.raises(ValueError, match="checkpoint was written by an earlier version"):
        training(tmp_path)[1].load(6)


# What the version before began


@pytest.fixture
def before(tmp_path):
    shutil.copytree(FIXTURES, tmp_path / "before")
    return tmp_path / "before"


def versions_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["versions"]


@pytest.fixture
def other_modules(monkeypatch):
    """Modules of exports for one test alone, since diffusers keeps those of one name, from whatever folder."""
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]


def test_a_saved_pipeline_and_an_export_still_load(before, other_modules):
    one = saved_digits(before)
    other = DiffusionPipeline.from_pretrained(before / "export", trust_remote_code=True)
    assert type(other).__name__ == "BoostAndSkipPipeline" and type(other) is not type(one)
    for a, b in zip(one.unet.parameters(), other.unet.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_sampling_goes_on(before, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "drawing_versions", lambda: versions_of(before / "sampling"))
    pipe = saved_digits(before)
    assert sampled(pipe, before / "sampling").drawn == 2
    whole = np.load(sampled(pipe, tmp_path / "whole").result)["arr_0"].astype(int)
    assert abs(np.load(before / "sampling/samples_6x4x4x1.npz")["arr_0"] - whole).max() <= 1  # drawn on two machines
    assert sampled(pipe, before / "finished").was_finished
    (before / "finished/samples_6x4x4x1.npz").unlink()
    with pytest.raises(ValueError, match="1 of its files are gone"):
        sampled(pipe, before / "finished")


def test_a_training_goes_on(before):
    assert trained(before / "training").history[-1]["step"] == 6
    assert trained(before / "training").history[0]["step"] == 2
    with pytest.raises(ValueError, match="other settings: batch_size: 4 before, 5 now"):
        trained(before / "training", batch_size=5)
    with pytest.raises(ValueError, match="steps: 6 before, 4 now"):
        trained(before / "training", steps=4)


def test_half_a_checkpoint_of_the_version_before_is_an_error(before):
    path = before / "training/checkpoint-4/optimizer.bin"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="checkpoint-4 is damaged"):
        trained(before / "training")


def test_a_search_for_an_interval_goes_on(before):
    drawn = []
    found = tuned(saved_digits(before), before / "tuning", lambda candidate, done: drawn.append(candidate.key))
    begun = json.loads((FIXTURES / "tuning/distances.json").read_text())["distances"]
    assert begun and not set(drawn) & set(begun)
    assert set(begun) < {candidate.key for candidate in found.distances}


@pytest.mark.parametrize("method", ["exact", "golden"])
def test_a_search_for_tables_goes_on(before, method, monkeypatch):
    path = before / f"tables-{method}"
    settings = kept._read(path)["settings"]
    monkeypatch.setattr(search, "drawing_versions", lambda: settings["versions"])
    if method == "exact":  # which reported on the sequences that it chose by
        with pytest.raises(ValueError, match="other settings: num_report_samples: None before, 2 now"):
            tables(path, method)
        return
    resumed, whole = tables(path, method), tables(None, method)
    assert resumed.tables == whole.tables
    monkeypatch.setattr(search, "drawing_versions", lambda: {**settings["versions"], "torch": "1.0"})
    with pytest.raises(ValueError, match=r"other settings: versions.torch: '.*' before, '1.0' now"):
        tables(path, method)


def test_a_training_tells_its_steps_where_there_is_no_terminal(capsys):
    assert list(steps_left(2, 60, True, lambda: 0.5)) == [*range(2, 60)]
    said = capsys.readouterr().out
    assert "training, loss 0.5000, 60 of 60 steps" in said and said.count(" of 60 steps") == 20
    list(steps_left(0, 60, False, lambda: 0.5))
    assert capsys.readouterr().out == ""
