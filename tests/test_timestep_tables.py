"""Timestep tables on disk, in the scheduler's config, from the authors' files, and what is refused."""

import json
import math
from itertools import pairwise

import pytest
import torch

from diffusers_ext import CTMCScheduler
from diffusers_ext.jump_your_steps import TimestepTables
from diffusers_ext.jump_your_steps.tables import chain_of, times_of_counts
from diffusers_ext.shipped import shipped_models

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
    assert SCHEDULER.config.timestep_tables is None
    filled.save_pretrained(tmp_path)
    loaded = CTMCScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(4)
    assert loaded.edges.tolist() == EDGES[4]
    assert TimestepTables.of(loaded) == tables()
    assert TimestepTables.of(loaded).info[2] == {"chain": chain_of(SCHEDULER)}


def test_tables_join_those_that_are_there():
    first = TimestepTables({2: [1.0, 0.3, 0.1], 8: torch.linspace(1, 0.1, 9).tolist()}, {}, {2: {"method": "golden"}})
    both = TimestepTables.of(tables().apply_to(first.apply_to(SCHEDULER)))
    assert sorted(both.tables) == [2, 4, 8] and both[2] == tuple(EDGES[2])
    assert both.info[4]["bound"] == 1.25 and "method" not in both.info[2]  # the old table for 2, and its provenance


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


def test_tables_of_another_chain_in_a_config():
    """A config that was changed after the tables were made: refused where they would be used."""
    changed = CTMCScheduler.from_config(tables().apply_to(SCHEDULER).config, eps=1e-2)
    with pytest.raises(ValueError, match=r"made for eps=0.001, not 0.01 .*timestep_spacing=\"uniform\""):
        changed.set_timesteps(4)
    changed.set_timesteps(timesteps=[1.0, 0.5])
    CTMCScheduler.from_config(changed.config, timestep_spacing="uniform").set_timesteps(4)
    other = {"chain": {"vocab_size": SCHEDULER.config.vocab_size + 1}}
    for named, known in ((2, "2"), ("2", 2), (2, 2)):  # JSON makes strings of numbers
        mixed = CTMCScheduler.from_config(
            SCHEDULER.config, timestep_tables={named: [1.0, 0.5, 0.1]}, timestep_table_info={known: other}
        )
        with pytest.raises(ValueError, match="made for vocab_size="):
            mixed.set_timesteps(2)


def masks_left(scheduler: CTMCScheduler, length: int) -> list[int]:
    """Of a sequence of masks, after each of gillespie's steps along the schedule as set."""
    left, x = [], torch.full((1, length), scheduler.mask_token_id)
    for index in range(len(scheduler.timesteps)):
        x[0, : length - int((x == scheduler.mask_token_id).sum()) + scheduler.num_decode(x, index)[0]] = 0
        left.append(int((x == scheduler.mask_token_id).sum()))
    return left


@pytest.mark.parametrize("sampler", ["euler", "tweedie", "theta_trapezoidal", "gillespie"])
def test_a_free_last_edge_is_one_for_every_sampler(sampler):
    """What is left there is removed by one more network call."""
    made = tables(info={4: {"sampler": "euler"}}).apply_to(SCHEDULER)
    scheduler = CTMCScheduler.from_config(made.config, sampler=sampler)
    scheduler.set_timesteps(4)
    assert scheduler.edges.tolist() == EDGES[4]
    assert len(scheduler.timesteps) == (9 if sampler == "theta_trapezoidal" else 5)
    if sampler == "gillespie":
        assert masks_left(scheduler, 100) == [70, 40, 10, 5, 0]
        scheduler.set_timesteps(2)  # its last edge is the end of time, where nothing is left
        assert len(scheduler.timesteps) == 2 and masks_left(scheduler, 100) == [40, 0]


def test_gillespie_takes_times_of_other_noise_as_shares():
    """At a time of the cosine schedule as many tokens are masked as euler would have masked there, on average."""
    euler = CTMCScheduler(vocab_size=17, noise_schedule="cosine")
    made = TimestepTables({2: [1.0, 0.4, 0.2]}, chain_of(euler), {2: {"sampler": "euler"}}).apply_to(euler)
    scheduler = CTMCScheduler.from_config(made.config, sampler="gillespie")
    scheduler.set_timesteps(2)
    masked = 1 - torch.exp(-euler.sigma_bar(torch.tensor([1.0, 0.4, 0.2], dtype=torch.float64)))
    assert masks_left(scheduler, 1000)[:2] == pytest.approx((1000 * masked / masked[0])[1:].tolist(), abs=1.01)
    back = TimestepTables({2: [1.0, 0.4, 0.2]}, chain_of(euler), {2: {"sampler": "gillespie"}})
    with pytest.raises(ValueError, match=r"timestep_tables\['2'\] was made for sampler='gillespie'.*use 'gillespie'"):
        back.apply_to(euler).set_timesteps(2)


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
        ({2: [0.9, 0.4, 0.1]}, "must begin at 1"),
        ({2: None}, r"tables\[2\] must be at least two"),
        ({"²": [1.0, 0.4, 0.1]}, "named by its number of steps"),
        ({None: [1.0, 0.4]}, "named by its number of steps"),
        (3, "timestep_tables must be a dictionary"),
    ],
)
def test_refused_edges(edges, message):
    with pytest.raises(ValueError, match=message):
        tables(tables=edges, info={})


@pytest.mark.parametrize("info", [{4: None}, {4: [1]}, {4: {"chain": 3}}, 3])
def test_refused_info(info):
    with pytest.raises(ValueError, match="timestep_table_info"):
        tables(info=info)


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


# Interpolation


def edges_of(steps: int, tables=EDGES, **settings) -> list[float]:
    named = {str(n): list(edges) for n, edges in tables.items()}
    scheduler = CTMCScheduler(vocab_size=17, timestep_tables=named, **settings)
    scheduler.set_timesteps(steps)
    return scheduler.edges.tolist()


def test_a_table_is_taken_as_it_is_by_default():
    assert edges_of(4) == EDGES[4] and edges_of(2) == EDGES[2]
    assert edges_of(2, timestep_spacing="uniform") == [1.0, (1 + 1e-5) / 2, 1e-5]
    assert edges_of(2, {}) == [1.0, (1 + 1e-5) / 2, 1e-5]


def test_interpolation_between_two_tables():
    """A free last edge stands before one more step, to the end of time."""
    near = torch.tensor([1.0, 0.7, 0.4, 1e-5], dtype=torch.float64)  # of 2 steps and the denoising: 3 pieces
    far = torch.tensor([1.0, 0.8, 0.6, 0.3, 0.1, 1e-5], dtype=torch.float64)  # 5 pieces
    share = math.log(4 / 3) / math.log(5 / 3)
    at_quarters = [
        torch.tensor([1.0, 0.775, 0.55, 0.3 + 0.25e-5, 1e-5]),
        torch.tensor([1.0, 0.75, 0.45, 0.15, 1e-5]),
    ]
    expected = (1 - share) * at_quarters[0] + share * at_quarters[1]
    found = edges_of(3, {2: near[:3].tolist(), 4: far[:5].tolist()})
    assert found == pytest.approx(expected[:4].tolist(), rel=1e-4)


def test_interpolation_beyond_the_tables():
    free = {2: [1.0, 0.7, 0.4], 4: [1.0, 0.8, 0.6, 0.3, 0.1]}
    assert edges_of(1, free) == pytest.approx([1.0, 0.55], rel=1e-12)  # in the middle of three pieces
    assert edges_of(9, free)[::2] == pytest.approx(free[4], rel=1e-12)  # ten pieces are five cut in two
    assert edges_of(8, {2: EDGES[2]})[::4] == pytest.approx(EDGES[2], rel=1e-12)
    assert edges_of(1, {2: EDGES[2]}) == [1.0, 1e-5]
    for steps in (1, 3, 5, 7, 64, 1000):
        for some in (free, EDGES, {4: free[4]}):
            edges = edges_of(steps, some)
            assert len(edges) == steps + 1 and all(a > b > 0 for a, b in pairwise(edges)) and edges[0] == 1


SHIPPED = ("countdown-sedd", "jsb-sedd", "shakespeare-sedd")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tables(name):
    """Any number of steps has edges, and the provenance of each table has chain, sampler and both bounds."""
    path = shipped_models()[name] / "scheduler"
    scheduler = CTMCScheduler.from_pretrained(path)
    for steps in range(1, 130):
        scheduler.set_timesteps(steps)
        assert all(a > b > 0 for a, b in pairwise(scheduler.edges.tolist()))
    for info in scheduler.config.timestep_table_info.values():
        assert info["chain"] == chain_of(scheduler) and info["sampler"] == "euler"
        assert 0 < info["bound"] < info["bound_of_even_steps"] and info["bound_where_chosen"] > 0
