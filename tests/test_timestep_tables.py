"""Timestep tables on disk, in the scheduler's config, from the authors' files, and what is refused."""

import json
from itertools import pairwise

import pytest
import torch

from diffusers_ext import CTMCScheduler
from diffusers_ext.jump_your_steps import TimestepTables
from diffusers_ext.jump_your_steps.tables import chain_of, times_of_counts

SCHEDULER = CTMCScheduler(vocab_size=17)
EDGES = {2: [1.0, 0.4, 1e-5], 4: [1.0, 0.7, 0.4, 0.1, 0.05]}


def tables(**changes) -> TimestepTables:
    info = {4: {"method": "exact", "bound": 1.25}}
    return TimestepTables(**{"tables": EDGES, "chain": chain_of(SCHEDULER), "info": info, **changes})


def test_json_round_trip(tmp_path):
    path = tables().save(tmp_path / "new" / "tables.json")
    assert TimestepTables.load(path) == tables()
    assert json.loads(path.read_text())["chain"]["vocab_size"] == 17
    assert [file.name for file in path.parent.iterdir()] == ["tables.json"]


def test_edges_by_number_of_steps():
    assert tables()[4] == (1.0, 0.7, 0.4, 0.1, 0.05)
    with pytest.raises(ValueError, match=r"no table for 3 steps, only for \[2, 4\]"):
        tables()[3]


def test_into_a_scheduler_and_back(tmp_path):
    filled = tables().apply_to(SCHEDULER)
    assert SCHEDULER.config.timestep_tables is None and SCHEDULER.config.timestep_spacing == "uniform"
    filled.save_pretrained(tmp_path)
    loaded = CTMCScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(4)
    assert loaded.edges.tolist() == EDGES[4]
    assert TimestepTables.of(loaded) == tables()
    loaded.set_timesteps(3)
    assert loaded.edges.tolist() == torch.linspace(1, 1e-5, 4, dtype=torch.float64).tolist()


def test_tables_join_those_that_are_there():
    first = TimestepTables({2: [1.0, 0.3, 0.1], 8: torch.linspace(1, 0.1, 9).tolist()}, {}, {2: {"method": "golden"}})
    both = TimestepTables.of(tables().apply_to(first.apply_to(SCHEDULER)))
    assert sorted(both.tables) == [2, 4, 8] and both[2] == tuple(EDGES[2])
    assert both.info == {4: {"method": "exact", "bound": 1.25}}  # the old table for 2 is gone, and its provenance


OTHERS = {
    "vocab_size=17, not 33": CTMCScheduler(vocab_size=33),
    "kernel='absorbing', not 'uniform'": CTMCScheduler(vocab_size=17, kernel="uniform"),
    "noise_schedule='loglinear', not 'cosine'": CTMCScheduler(vocab_size=17, noise_schedule="cosine"),
    "eps=0.001, not 0.01": CTMCScheduler(vocab_size=17, eps=1e-2),
}


@pytest.mark.parametrize("message", OTHERS)
def test_tables_of_another_chain(message):
    with pytest.raises(ValueError, match=f"made for .*{message}.* as this CTMCScheduler has"):
        tables().apply_to(OTHERS[message])


def test_the_sampler_does_not_matter():
    scheduler = CTMCScheduler(vocab_size=17, sampler="tweedie", min_timestep=1e-4)
    assert tables().apply_to(scheduler).config.sampler == "tweedie"


def test_ordered_tokens_depend_on_their_rates():
    settings = {"kernel": "gaussian", "vocab_size": 9, "prediction_type": "x0"}
    made = TimestepTables({1: [1.0, 0.1]}, chain_of(CTMCScheduler(**settings)))
    with pytest.raises(ValueError, match=r"rate_sigma=6.0, not 3.0"):
        made.apply_to(CTMCScheduler(**settings, rate_sigma=3.0))


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ({2: [1.0, 0.4]}, "one edge more, got 2 edges"),
        ({2: [1.0, 0.4, 0.4]}, "strictly decreasing"),
        ({2: [1.0, 0.2, 0.4]}, r"tables\[2\] must be at least two strictly decreasing"),
        ({2: [1.1, 0.2, 0.1]}, r"in \(0, 1\]"),
        ({2: [1.0, 0.2, 0.0]}, r"in \(0, 1\]"),
        ({1: [1.0, float("nan")]}, "strictly decreasing"),
        ({0: [1.0]}, "at least two"),
    ],
)
def test_refused_edges(edges, message):
    with pytest.raises(ValueError, match=message):
        tables(tables=edges, info={})


def test_info_without_a_table():
    with pytest.raises(ValueError, match=r"info is about \[3\] steps, but there are tables for \[2, 4\] only"):
        tables(info={3: {}})


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "another"}', '{"format": 1, "tables": {}}'])
def test_other_files(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match=r"'.*other.json' is not a file of timestep tables"):
        TimestepTables.load(tmp_path / "other.json")


def test_a_damaged_table_says_what_is_wrong(tmp_path):
    path = tables().save(tmp_path / "tables.json")
    path.write_text(path.read_text().replace("0.05", "0.5"))
    with pytest.raises(ValueError, match="strictly decreasing"):
        TimestepTables.load(path)


# The authors' files


def test_index_lists_are_times(tmp_path):
    torch.save([[0, 64], [0, 16, 64], [0, 6, 16, 43, 64]], tmp_path / "schedule.pt")
    imported = TimestepTables.from_index_lists(tmp_path / "schedule.pt", SCHEDULER)
    grid = torch.linspace(1, 1e-5, 65)
    assert imported[4] == pytest.approx(grid[[0, 6, 16, 43, 64]].tolist(), rel=1e-5)
    assert sorted(imported.tables) == [1, 2, 4] and imported.info[2]["grid_size"] == 64
    imported.apply_to(SCHEDULER).set_timesteps(4)


def test_index_lists_are_counts_for_gillespie(tmp_path):
    counts = [0, 2, 4, 7, 11, 21, 32, 42, 48]
    torch.save([[0, 48], counts], tmp_path / "schedule.pt")
    scheduler = CTMCScheduler(vocab_size=17, sampler="gillespie")
    scheduler = TimestepTables.from_index_lists(tmp_path / "schedule.pt", scheduler).apply_to(scheduler)
    scheduler.set_timesteps(8)
    masked, decoded = torch.full((1, 48), 16), []
    for step in range(8):
        (number,) = scheduler.num_decode(masked, step)
        masked[0, sum(decoded) : sum(decoded) + number] = 0
        decoded.append(number)
    assert decoded == torch.tensor(counts).diff().tolist()


@pytest.mark.parametrize("length", [7, 48, 100, 1000, 1024])
def test_times_of_counts_are_read_back(length):
    counts = [0, 1, length // 3, length // 2, length - 1, length]
    scheduler = CTMCScheduler(vocab_size=3, sampler="gillespie")
    scheduler.set_timesteps(timesteps=times_of_counts(counts, 1e-5))
    masked, left = torch.full((1, length), 2), []
    for step in range(len(counts) - 1):
        (number,) = scheduler.num_decode(masked, step)
        masked[0, : counts[step + 1]] = 0
        left.append(number)
    assert left == torch.tensor(counts).diff().tolist()


class Forbidden:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("content", [[], {"a": 1}, [[0, 1.5, 2]], [[0, -1, 2]], [[1, 4]], [[0, 8], [0, 2, 16]], [[]]])
def test_other_pt_files(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"'.*other.pt'"):
        TimestepTables.from_index_lists(tmp_path / "other.pt", SCHEDULER)


def test_nothing_in_a_pt_file_is_executed(tmp_path, capsys):
    torch.save([[0, 64], Forbidden()], tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"'.*other.pt' cannot be read; is it whole, and a torch file"):
        TimestepTables.from_index_lists(tmp_path / "other.pt", SCHEDULER)
    assert "run" not in capsys.readouterr().out


# Interpolation, only where it is asked for


def interpolating(steps: int, **edges) -> list[float]:
    named = {"timestep_tables": edges or {str(n): list(e) for n, e in EDGES.items()}}
    scheduler = CTMCScheduler(vocab_size=17, timestep_spacing="interpolated_table", **named)
    scheduler.set_timesteps(steps)
    return scheduler.edges.tolist()


def test_interpolation_keeps_what_is_there():
    assert interpolating(4) == EDGES[4] and interpolating(2) == EDGES[2]


def test_interpolation_between_two_tables():
    near, far = (torch.tensor(EDGES[n], dtype=torch.float64) for n in (2, 4))
    share = (torch.tensor(3.0).log() - torch.tensor(2.0).log()) / torch.tensor(2.0).log()
    thirds = torch.stack([near[0], near[0] / 3 + 2 * near[1] / 3, 2 * near[1] / 3 + near[2] / 3, near[2]])
    fine = torch.stack([far[0], 2 * far[1] / 3 + far[2] / 3, far[2] / 3 + 2 * far[3] / 3, far[4]])
    expected = (1 - share) * thirds + share * fine
    assert interpolating(3) == pytest.approx(expected.tolist(), rel=1e-6)


def test_interpolation_beyond_the_tables():
    assert interpolating(1) == [1.0, 1e-5]
    assert interpolating(8)[::2] == pytest.approx(EDGES[4], rel=1e-12)
    for steps in (1, 3, 5, 7, 64):
        edges = interpolating(steps)
        assert len(edges) == steps + 1 and all(a > b for a, b in pairwise(edges))


def test_without_tables_the_steps_are_even():
    scheduler = CTMCScheduler(timestep_spacing="interpolated_table")
    scheduler.set_timesteps(2)
    assert scheduler.edges.tolist() == [1.0, (1 + 1e-5) / 2, 1e-5]
