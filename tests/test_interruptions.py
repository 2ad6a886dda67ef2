"""Training, searches of tables and of intervals: full disks and kills lose nothing finished; one at a time."""

import errno
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fresh_process import ended, start_fresh
from old_runs import sampled, saved_digits, tables, trained
from result_rows import ResultRows
from test_sampling import tiny_ddpm

from diffusers_ext.flow import training_run
from diffusers_ext.guidance import tuning
from diffusers_ext.guidance.search import DistanceTable, GuidedSteps
from diffusers_ext.runs.lock import lock
from diffusers_ext.runs.processes import Processes
from diffusers_ext.sampling import folder as sampling_folder


def full_disk(monkeypatch, name: str, after: int = 0):
    """A path of this name is put in place so often, and then no more."""
    replace, done = os.replace, []

    def replacing(source, target):
        done.extend([target] * (Path(target).name == name))
        if len(done) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replacing)


def assert_same_weights(one, other):
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, "checkpoint-4")
        with pytest.raises(OSError, match="No space left"):
            trained(tmp_path)
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "checkpoint-4").exists()
    assert not (tmp_path / "lock.json").exists()
    assert_same_weights(trained(tmp_path), trained(None))
    assert not list(tmp_path.glob("*.new")) + list(tmp_path.glob(".unfinished-*"))


@pytest.mark.parametrize("method", ["exact", "golden"])
def test_a_full_disk_keeps_what_a_search_for_tables_has(method, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, "kept", after=2)
        with pytest.raises(OSError, match="No space left"):
            tables(tmp_path / "kept", method)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    whole, resumed = tables(None, method), tables(tmp_path / "kept", method)
    assert resumed.tables == whole.tables
    evaluations = [found.info[4]["network_evaluations"] for found in (whole, resumed)]
    assert 0 < evaluations[1] == evaluations[0]


def test_a_full_disk_keeps_the_distances_of_intervals(tmp_path, monkeypatch):
    asked = []

    def distance(candidate):
        asked.append(candidate)
        return 1.0

    first, second = GuidedSteps(2.0, 0, 3), GuidedSteps(2.0, 1, 3)
    table = DistanceTable(tmp_path / "distances.json", {}, distance)
    with monkeypatch.context() as patch:
        full_disk(patch, "distances.json", after=1)
        table(first)
        with pytest.raises(OSError, match="No space left"):
            table(second)
    again = DistanceTable(tmp_path / "distances.json", {}, distance)
    assert again(first) == again(second) == 1.0
    assert asked == [first, second, second]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize(("work", "name", "number"), [("training", "checkpoint-4", 1), ("tables", "kept", 3)])
def test_a_kill_loses_nothing_finished(work, name, number, tmp_path, tmp_path_factory):
    """Killed the moment before a finished checkpoint, or round of batches, gets its name; then taken up again."""
    said = tmp_path_factory.mktemp("said") / "log"
    killed = start_fresh("killed_at_work.py", work, tmp_path, name, number, said=said)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL, said.read_text()
    assert len(list(tmp_path.glob("*lock.json"))) == 1  # of the dead process, which the next start takes over
    if work == "training":
        assert json.loads((tmp_path / "checkpoint-2/history.json").read_text())[-1]["step"] == 2
        assert_same_weights(trained(tmp_path), trained(None))
    else:
        assert tables(tmp_path / "kept", "exact") == tables(None, "exact")
    assert not list(tmp_path.glob("*lock.json"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
def test_kills_at_random_moments_change_no_byte(tmp_path):
    """Before and after calls that change the disk, up to three times in a row; nothing is left over either."""
    said = tmp_path / "log"
    ended(start_fresh("killed_at_random.py", tmp_path, 0, 2, said=said), said)
    said.unlink()
    assert {path.name for path in tmp_path.iterdir()} == {
        "sampling", "pictures", "training", "exact", "golden", "tuning", "export", "flow",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("module", "work"), [(sampling_folder, lambda folder: sampled(saved_digits(), folder)), (training_run, trained)]
)
def test_one_process_judges_a_folder_for_all(module, work, tmp_path, monkeypatch):
    """Another, a little later, may find there what the first has begun."""
    agreed, check, agreeing, judged = Processes.agreed, module.check_folder, [], []

    def noting(self, task):
        agreeing.append(task)
        try:
            return agreed(self, task)
        finally:
            agreeing.pop()

    monkeypatch.setattr(Processes, "agreed", noting)
    monkeypatch.setattr(module, "check_folder", lambda *given: judged.append(bool(agreeing)) or check(*given))
    work(tmp_path)
    assert judged == [True]


def tuned(folder):
    extractor = SimpleNamespace(name="none", identity="none")
    return tuning.tune_interval(
        tiny_ddpm(), extractor, (torch.zeros(1), torch.ones(1, 1)), [2.0], torch.zeros(2, dtype=torch.int64), folder
    )


def test_two_starts_on_one_table_keep_each_other_s_rows(tmp_path):
    one, other = ResultRows(tmp_path / "rows.json"), ResultRows(tmp_path / "rows.json")
    one.row("a", lambda: {"n": 1})
    other.row("b", lambda: one.row("c", lambda: {"n": 3}) and {"n": 2})
    asked = []
    again = ResultRows(tmp_path / "rows.json")
    assert [again.row(key, lambda: asked.append(1) or {})["n"] for key in "abc"] == [1, 2, 3] and not asked
    (tmp_path / "rows.json").write_text("[1")
    with pytest.raises(ValueError, match=r"rows.json' is no JSON object"):
        ResultRows(tmp_path / "rows.json")


@pytest.mark.slow
def test_one_start_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "step_sigmas", lambda *_: [1.0, 0.0])
    work = {
        tmp_path / "training": trained,
        tmp_path / "tuning": tuned,
        tmp_path / "kept": lambda path: tables(path, "exact"),
    }
    for path, start in work.items():
        if path.name != "kept":
            path.mkdir()
        with lock(path), pytest.raises(ValueError, match=rf"'{path}' is in use by process {os.getpid()}"):
            start(path)
        if path.name != "kept":
            assert not list(path.iterdir())  # neither touched by the refused start nor left locked
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training", "tuning"]
