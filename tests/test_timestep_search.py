"""The search for timestep tables against the authors' schedules, closed forms, enumerated chains and itself."""

import math
from itertools import combinations, pairwise

import pytest
import torch
from discrete_goldens import GOLDENS, golden, tauldr_model
from exact_chains import (
    ExactNetwork,
    exact_scheduler,
    law_of_denoising,
    law_of_euler_steps,
    markov_chain,
    noised_law,
    sequences,
    smooth_chain,
    total_correlation,
    total_variation,
)
from fresh_process import ended, start_two
from test_klub import TAULDR

from diffusers_ext import CTMCScheduler
from diffusers_ext.checkpoints import load_countdown
from diffusers_ext.jump_your_steps import KLUB, Cost, RateStatistics, TimestepTables, klub, optimize_timesteps
from diffusers_ext.jump_your_steps import statistics as statistics_module
from diffusers_ext.jump_your_steps.costs import Grid, cheapest_schedules, total_cost
from diffusers_ext.jump_your_steps.golden import Bracket, golden_middle, hierarchical_tables, spread
from diffusers_ext.jump_your_steps.tables import chain_of

# The authors' schedules

SYNTHETIC = golden("jys_search_synthetic").runs
FUNCTIONS = {
    "(v2-v3)*(v1-v2)": lambda a, b, c: (b - c) * (a - b),
    "(v2-v3)**2*(v1-v2)": lambda a, b, c: (b - c) ** 2 * (a - b),
    "(v2-v3)*(v1-v2)**3": lambda a, b, c: (b - c) * (a - b) ** 3,
    "v2-v3": lambda a, b, c: b - c,
    "v1-v2": lambda a, b, c: a - b,
    "(v2-v3)*(v1-v2)*(1+0.5*sin(37*v2))": lambda a, b, c: (b - c) * (a - b) * (1 + 0.5 * math.sin(37 * b)),
    "-abs(v2-(v3+0.07*(v1-v3)))": lambda a, b, c: -abs(b - (c + 0.07 * (a - c))),
}


@pytest.mark.parametrize(
    "run", SYNTHETIC, ids=lambda run: f"{run['klub_function']}-{run['scheduler']}-{run['src_nfe']}"
)
def test_golden_section_of_analytic_objectives(run):
    size, function, evaluated = run["src_nfe"], FUNCTIONS[run["klub_function"]], []
    if run["scheduler"] == "euler":
        grid, bracket = torch.linspace(1, 1e-5, size + 1).tolist(), Bracket.of_times(size, run["eps"])

        def objective(a, b, c):
            evaluated.append([b, function(a, b, c)])
            return evaluated[-1][1]
    else:
        grid, bracket = list(range(size + 1)), Bracket.of_counts()

        def objective(a, b, c):
            evaluated.append([b, function(*(-round(v) / size for v in (a, b, c)))])
            return evaluated[-1][1]

    levels = run["tgt_nfe"].bit_length() - 1
    tables = hierarchical_tables(lambda i, j: golden_middle(objective, grid, i, j, bracket), size, levels)
    assert run["schedules"] or run["run_status"] != "ok"
    for schedule in run["schedules"]:  # of a run that ended in an IndexError, those before it
        assert tables[len(schedule) - 1] == schedule
    recorded = [point for interval in run["evaluated"] for point in interval]
    if run["run_status"] == "ok":
        torch.testing.assert_close(
            torch.tensor(evaluated[: len(recorded)]), torch.tensor(recorded), rtol=0, atol=1e-12
        )
    assert all(a < b for table in tables.values() for a, b in pairwise(table))
    assert {(table[0], table[-1]) for table in tables.values()} == {(0, size)}


def of_case(case, folder):
    """model, scheduler, and the recorded data and uniforms."""
    if "graph" in case.config:
        kernel = case.config["graph"]
        weights = {"gaussian": "ctmc_unet_model", "uniform": "ctmc_seq_model"}[kernel]
        model = tauldr_model(folder, f"ctmc_scheduler_{kernel}", weights)
        further = {"prediction_type": "x0", "time_conditioning": "timestep", "eps_ratio": 1e-6}
        return model, CTMCScheduler(**TAULDR[kernel], **further), case.t["x0"].long(), case.t["u"]
    model = load_countdown(GOLDENS / "count_model.safetensors", num_heads=4)
    return model, CTMCScheduler(vocab_size=17), case.t["x0"].long(), case.t["u"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ctmc_uniform", "ctmc_gaussian", "euler_corrections"])
def test_golden_search_of_the_authors(name, tmp_path):
    case = golden(f"jys_search_{name}")
    model, scheduler, data, noise = of_case(case, tmp_path)
    size, batch_size = case.config["src_nfe"], case.config["batch_size"]
    stages = {stage["nfe"]: stage for stage in case.stages if stage["nfe"] <= (8 if "euler" in name else 64)}
    tables = optimize_timesteps(
        model, scheduler, data, list(stages), "golden", grid_size=size, batch_size=batch_size, noise=noise,
        average="batches", progress=False,
    )  # fmt: skip
    for steps, stage in stages.items():
        assert [round((1 - t) / (1 - 1e-5) * size) for t in tables[steps]] == stage["schedule"], steps
    klub = KLUB(model, scheduler, data, noise=noise, batch_size=batch_size, average="batches")
    for middle, value in stages[2]["klub_of_first_interval"][:4]:
        tolerance = 2e-4 if name == "euler_corrections" else 2e-3
        assert klub(stages[2]["v1"], middle, stages[2]["v3"]) == pytest.approx(value, rel=tolerance, abs=1e-5)


def test_each_level_keeps_its_own_table():
    """In the authors' files the tables of fewer steps are changed by later levels."""
    tables = hierarchical_tables(lambda i, j: j - 1, 16, 3)
    assert tables[2] == [0, 15, 16] and tables[4] == [0, 13, 14, 15, 16]
    assert spread([0, 15, 16], 2, 16) == [0, 14, 16]


def test_a_bracket_without_room_gives_the_middle():
    grid = [1 - i / 100 for i in range(101)]
    seen = []

    def objective(a, b, c):
        seen.append(b)
        return b

    assert golden_middle(objective, grid, 40, 42, Bracket.of_times(100, 0.06)) == 41
    assert all(grid[42] < b < grid[40] for b in seen)


# Dynamic programming


@pytest.mark.parametrize("free_end", [False, True])
def test_cheapest_of_all_schedules(free_end):
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(9, 9, dtype=torch.float64, generator=generator).triu(1)
    costs[torch.ones(9, 9).tril(-1).bool()] = math.inf
    found = cheapest_schedules(costs, [1, 2, 3, 5, 7], free_end)
    for n, (path, cost) in found.items():
        inner = combinations(range(1, 8), n) if free_end else combinations(range(1, 8), n - 1)
        every = [(0, *some) if free_end else (0, *some, 8) for some in inner]
        best = min(every, key=lambda some: total_cost(costs, list(some), free_end))
        assert path == list(best) and cost == pytest.approx(total_cost(costs, list(best), free_end), rel=1e-12)


def test_more_steps_than_the_grid():
    costs = torch.zeros(5, 5, dtype=torch.float64)
    assert cheapest_schedules(costs, [4], False)[4][0] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"numbers of steps must be in \[1, 3\] on a grid of 4, got \[4\]"):
        cheapest_schedules(costs, [4], True)


def test_costs_of_steps_are_integrals():
    grid = Grid(tuple(torch.linspace(1, 0.2, 9, dtype=torch.float64).tolist()), counts=False)
    t = torch.tensor(grid.points, dtype=torch.float64)
    costs = grid.step_costs((t[None, :] - t[:, None]).clamp(min=0))  # d(k, i) = t_i - t_k
    assert float(costs[2, 7]) == pytest.approx(float((t[2] - t[7]) ** 2 / 2), rel=1e-12)
    assert costs[3, 3] == 0 and costs[4, 2] == math.inf


def test_costs_of_counts_are_sums():
    sparse, full = Grid((0, 3, 4, 8), counts=True), Grid(tuple(range(9)), counts=True)
    k = torch.tensor(full.points, dtype=torch.float64)
    d = (k[:, None] - k[None, :]).clamp(min=0)
    exact = full.step_costs(d)
    assert float(exact[1, 6]) == sum(range(5))
    chosen = [0, 3, 4, 8]
    torch.testing.assert_close(sparse.step_costs(d[chosen][:, chosen]).triu(), exact[chosen][:, chosen].triu())


# The divergences


def chain_statistics(kernel: str, *costs: Cost, **options):
    """Statistics of all sequences of a chain of three tokens and length four."""
    chain = markov_chain(3, 4, 0) if kernel != "gaussian" else smooth_chain(3, 4)
    ordered = {"rate_sigma": 1.5, "Q_sigma": 2.0} if kernel == "gaussian" else {}
    scheduler = exact_scheduler(kernel, 3, sampler=options.pop("sampler", "euler"), **ordered)
    return RateStatistics(ExactNetwork(chain, scheduler), scheduler, sequences(chain), costs, **options)


ALL_COSTS = (
    Cost("kl"), Cost("alpha", 0.3), Cost("klub", held="rates"), Cost("kl", held="rates"), Cost("alpha", 0.3, "rates"),
)  # fmt: skip


def divergence(cost: Cost, true: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """The definition, in float64, where nothing is 0."""
    if cost.objective == "alpha":
        a = cost.alpha
        return (a * true + (1 - a) * held - true**a * held ** (1 - a)) / (a * (1 - a))
    gain = true * (true / held).log()
    return gain if cost.objective == "klub" else gain - true + held


@pytest.mark.parametrize("cost", ALL_COSTS, ids=str)
def test_products_are_the_divergence_of_absorbing_rates(cost):
    statistics = chain_statistics("absorbing", cost, grid_size=6, seed=5)
    rows = torch.arange(len(statistics.data.data))
    found = statistics.of(rows)[cost]
    scheduler, network = statistics.scheduler, statistics.network.model
    for k, i in ((0, 0), (3, 1), (4, 0), (5, 4), (6, 2)):
        rates, tokens = {}, {}
        for point in (k, i):
            time = statistics.grid.points[point]
            tokens[point] = statistics.data.at(time, rows, "cpu")[0]
            output = network(tokens[point], torch.full((len(rows),), time))
            rates[point] = scheduler.reverse_rates(output, time, tokens[point])[..., :-1].double()
        held, masked = rates[i], tokens[k] == scheduler.mask_token_id
        if cost.held == "prediction":  # masks are decoded at the rate 1 / t, whenever the step began
            held = rates[i] * statistics.grid.points[i] / statistics.grid.points[k]
        expected = divergence(cost, rates[k][masked], held[masked]).sum()
        assert float(found[k, i]) == pytest.approx(float(expected), rel=2e-5, abs=2e-4), (k, i)


def test_klub_is_looked_up():
    cost = Cost("klub", held="rates")
    statistics = chain_statistics("absorbing", cost, grid_size=8, seed=3)
    d = statistics.of(torch.arange(81))[cost] / 81 / 4
    t = statistics.grid.points
    klub = KLUB(statistics.network.model, statistics.scheduler, statistics.data.data, seed=3)
    for i, k, j in ((0, 3, 8), (1, 2, 4), (4, 7, 8)):
        assert (t[k] - t[j]) * float(d[k, i]) == pytest.approx(klub(t[i], t[k], t[j]), rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_klub_of_counts_is_looked_up():
    """Up to the smallest time where the end is the whole length; else with the expectation over the times between."""
    cost = Cost("klub", held="rates")
    chain = markov_chain(3, 4, 0)
    scheduler = exact_scheduler("absorbing", 3, sampler="gillespie")
    network, data = ExactNetwork(chain, scheduler), chain.draw(1500)
    noise = torch.rand(data.shape, generator=torch.Generator().manual_seed(0))
    statistics = RateStatistics(network, scheduler, data, (cost,), noise=noise)
    d = statistics.of(torch.arange(len(data)))[cost] / len(data) / 4
    klub = KLUB(network, scheduler, data, noise=noise, batch_size=1500)
    for i, k, j in ((0, 2, 4), (1, 3, 4), (0, 1, 4)):
        assert (j - k) * float(d[k, i]) == pytest.approx(klub(i, k, j), rel=5e-3)
    assert float(d[1, 0]) == pytest.approx(klub(0, 1, 2), rel=0.05)


@pytest.mark.parametrize("kernel", ["uniform", "gaussian"])
@pytest.mark.parametrize("cost", ALL_COSTS[:2], ids=str)
def test_held_predictions_of_other_kernels(kernel, cost):
    """Against rates of a network that knows the other positions at the step's start, and its own now."""
    statistics = chain_statistics(kernel, cost, grid_size=5, seed=2)
    rows = torch.arange(81)
    found, t, scheduler = statistics.of(rows)[cost], statistics.grid.points, statistics.scheduler
    matrices = [scheduler.transition_matrix(time) for time in t]
    x = [statistics.data.at(time, rows, "cpu")[0] for time in t]
    laws = [statistics.network.model(x[k], torch.full((81,), t[k])).double() for k in range(6)]
    others = [laws[k] / matrices[k].T[x[k]] for k in range(6)]  # p(x_0 of a position | the other positions)
    for k, i in ((0, 0), (1, 0), (3, 1), (4, 0), (4, 3)):
        rates = []
        for start in (k, i):
            seen = others[start] @ matrices[k]
            ratio = seen / seen.gather(-1, x[k].unsqueeze(-1))
            rates.append(scheduler.rate_matrix(t[k]).T[x[k]] * ratio)
        off = torch.ones_like(rates[0]).scatter(-1, x[k].unsqueeze(-1), 0).bool()
        expected = divergence(cost, rates[0][off], rates[1][off]).sum()
        assert float(found[k, i]) == pytest.approx(float(expected), rel=2e-3, abs=2e-3), (k, i)
        true = scheduler.reverse_rates(laws[k].float(), t[k], x[k]).double()[off]
        torch.testing.assert_close(rates[0][off], true, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_one_step_costs_the_total_correlation():
    """All tokens drawn at once from their own laws: the samples' KL divergence is the data's total correlation."""
    chain = markov_chain(3, 4, 0)
    scheduler = exact_scheduler("absorbing", 3)
    network, data = ExactNetwork(chain, scheduler), chain.draw(4000)
    noise = torch.rand(data.shape, generator=torch.Generator().manual_seed(1))
    statistics = RateStatistics(network, scheduler, data, grid_size=64, noise=noise)
    costs = statistics.grid.step_costs(statistics.of(torch.arange(4000))[Cost()] / 4000)
    assert float(costs[0, -1]) == pytest.approx(total_correlation(chain), rel=0.03)

    counts = exact_scheduler("absorbing", 3, sampler="gillespie")
    statistics = RateStatistics(ExactNetwork(chain, counts), counts, data, noise=noise)
    costs = statistics.grid.step_costs(statistics.of(torch.arange(4000))[Cost()] / 4000)
    assert float(costs[0, -1]) == pytest.approx(total_correlation(chain), rel=0.03)


@pytest.mark.parametrize("kernel", ["absorbing", "uniform", "gaussian"])
def test_parts_change_nothing(kernel, monkeypatch):
    """However little fits into memory at once, over positions, over sequences and over the vocabulary."""
    rows = torch.arange(81)
    whole = chain_statistics(kernel, *ALL_COSTS, grid_size=4, num_positions=4).of(rows)
    monkeypatch.setattr(statistics_module, "PART", 7)
    monkeypatch.setattr(statistics_module, "STORE_BYTES", 3000)
    split = chain_statistics(kernel, *ALL_COSTS, grid_size=4, num_positions=4).of(rows)
    for cost in ALL_COSTS:
        scale = float(whole[cost].abs().max())
        torch.testing.assert_close(split[cost], whole[cost], rtol=1e-4, atol=1e-5 * scale)


def test_positions_are_limited_by_memory(monkeypatch):
    assert chain_statistics("absorbing", Cost()).num_positions == 4
    monkeypatch.setattr(statistics_module, "STORE_BYTES", 2 * 4 * 257 * 4)
    assert chain_statistics("absorbing", Cost()).num_positions == 2
    monkeypatch.setattr(statistics_module, "STORE_BYTES", 1)
    assert chain_statistics("absorbing", Cost()).num_positions == 1
    for number in (0, 5):
        with pytest.raises(ValueError, match=rf"num_positions must be in \[1, 4\], .* got {number}"):
            chain_statistics("absorbing", Cost(), num_positions=number)


@pytest.mark.slow
@pytest.mark.parametrize("given", [None, torch.tensor([True, False, False, True])], ids=["free", "given"])
@pytest.mark.parametrize("kernel", ["absorbing", "uniform"])
def test_some_positions_stand_for_all(kernel, given):
    chain = markov_chain(3, 4, 0)
    scheduler = exact_scheduler(kernel, 3)
    data = chain.draw(3000)
    means = {}
    for positions in (4, 1):
        statistics = RateStatistics(
            ExactNetwork(chain, scheduler), scheduler, data, grid_size=4, given=given, num_positions=positions
        )
        means[positions] = statistics.of(torch.arange(3000))[Cost()][1:4, 0] / 3000
    torch.testing.assert_close(means[1], means[4], rtol=0.1, atol=0.01)


def test_given_tokens_cost_nothing():
    given = torch.ones(4, dtype=torch.bool)
    for kernel in ("absorbing", "uniform"):
        statistics = chain_statistics(kernel, Cost(), grid_size=4, given=given)
        assert float(statistics.of(torch.arange(81))[Cost()].abs().max()) < 1e-6


def test_one_evaluation_a_grid_point():
    statistics = chain_statistics("absorbing", *ALL_COSTS, grid_size=16)
    statistics.of(torch.arange(81))
    assert statistics.network.model.calls in (16, 17)  # at the last time there may be no mask left


# Tables


def error_of(edges: tuple[float, ...], network: ExactNetwork, chain) -> float:
    """Total variation of samples with these edges from the chain; nothing is sampled."""
    scheduler = network.scheduler
    start = noised_law(chain, scheduler, 1.0)
    law = law_of_euler_steps(network, edges, start)
    if scheduler.config.kernel == "absorbing":
        return total_variation(law_of_denoising(network, edges[-1], law), noised_law(chain, scheduler, 1e-12))
    return total_variation(law, noised_law(chain, scheduler, edges[-1]))


ERRORS = {  # settings, chain, numbers of steps, and the error with our table over that with even steps, at most
    "absorbing": ({}, markov_chain(3, 4, 1, sharpness=2.5), (2, 4), 0.8),
    "uniform": ({}, markov_chain(3, 4, 1, sharpness=2.5), (2, 4), 0.7),
    "gaussian": (
        {"noise_schedule": "exponential", "time_base": 0.1, "rate_sigma": 1.5, "Q_sigma": 2.5, "jumps": "categorical"},
        smooth_chain(5, 3),
        (4, 8),
        0.7,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ERRORS)
def test_tables_err_less_by_enumeration(kernel):
    """Less than even steps, and than the best tables by the paper's objective (not so for 2 steps of "gaussian")."""
    settings, chain, numbers, ratio = ERRORS[kernel]
    scheduler = exact_scheduler(kernel, chain.num_tokens, min_timestep=1e-3, **settings)
    network = ExactNetwork(chain, scheduler)
    ours, paper = (
        optimize_timesteps(network, scheduler, chain.draw(600), numbers, method, grid_size=32, progress=False)
        for method in ("exact", "hierarchical")
    )
    for steps in numbers:
        even = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64).tolist()
        errors = [error_of(tuple(edges), network, chain) for edges in (ours[steps], paper[steps], even)]
        assert errors[0] < errors[1] and errors[0] < ratio * errors[2], (steps, errors)


def countdown_tables(**options) -> TimestepTables:
    model = load_countdown(GOLDENS / "count_model.safetensors", num_heads=4)
    data = golden("jys_search_euler_corrections").t["x0"].long()[:6]
    scheduler = CTMCScheduler(vocab_size=17, sampler=options.pop("sampler", "euler"))
    defaults = {"num_inference_steps": [4], "grid_size": 16, "progress": False}
    return optimize_timesteps(model, scheduler, data, **{**defaults, **options})


def test_tables_for_any_number_of_steps():
    tables = countdown_tables(num_inference_steps=[3, 1, 8, 15, 3])
    assert list(tables.tables) == [1, 3, 8, 15]
    assert tables[15] == tuple(torch.linspace(1, 1e-5, 17, dtype=torch.float64).tolist()[:16])
    bounds = [tables.info[n]["bound"] for n in tables.tables]
    assert all(a > b > 0 for a, b in pairwise(bounds))
    for n, entry in tables.info.items():
        assert entry["bound"] <= entry["bound_of_even_steps"] + 1e-9 and len(tables[n]) == n + 1
    assert tables.info[8]["network_evaluations"] in (16 * 6, 17 * 6)
    assert tables.info[8] | {
        "method": "exact", "objective": "kl", "alpha": None, "held": "prediction", "last_edge": "free", "seed": 0,
        "grid_size": 16, "num_samples": 6, "num_report_samples": 2, "num_positions": 48, "sampler": "euler",
    } == tables.info[8]  # fmt: skip
    assert tables.info[8]["chain"] == chain_of(CTMCScheduler(vocab_size=17))
    assert len(tables.info[8]["model"]["sha256"]) == 64 and tables.info[8]["versions"]["torch"]


@pytest.mark.parametrize(("most", "intervals"), [(4, 128), (40, 160)])
def test_the_grid_grows_with_the_steps(most, intervals):
    info = countdown_tables(num_inference_steps=[2, most], grid_size=None, num_samples=2).info[2]
    assert info["grid_size"] == intervals and info["network_evaluations"] <= 2 * (intervals + 1)


def test_chosen_on_one_part_and_reported_on_the_other():
    """As if each part were all of the data; and what chose the table finds it better than what did not."""
    both = countdown_tables(num_report_samples=3)
    alone = countdown_tables(num_samples=3, num_report_samples=0)
    assert both.tables == alone.tables and "bound" not in alone.info[4]
    assert both.info[4]["bound_where_chosen"] == pytest.approx(alone.info[4]["bound_where_chosen"], rel=1e-4)
    statistics = RateStatistics(
        load_countdown(GOLDENS / "count_model.safetensors", num_heads=4),
        CTMCScheduler(vocab_size=17),
        golden("jys_search_euler_corrections").t["x0"].long()[:6],
        grid_size=16,
    )
    costs = statistics.grid.step_costs(statistics.of(torch.arange(3, 6))[Cost()] / 3)
    path = [statistics.grid.points.index(edge) for edge in both[4]]
    assert both.info[4]["bound"] == pytest.approx(total_cost(costs, path, True), rel=1e-3)
    assert both.info[4]["bound_of_even_steps"] == pytest.approx(
        total_cost(costs, statistics.grid.even(4), True), rel=1e-3
    )
    counted = [tables.info[4]["network_evaluations"] for tables in (both, alone)]
    assert counted[0] - both.info[4]["report_evaluations"] == counted[1] == 16 * 3


def test_the_last_edge():
    free, fixed = (countdown_tables(num_inference_steps=[4], last_edge=end) for end in ("free", "min_timestep"))
    assert fixed[4][-1] == 1e-5 < free[4][-1]
    assert free.info[4]["bound"] < fixed.info[4]["bound"]


@pytest.mark.parametrize("method", ["hierarchical", "golden"])
def test_hierarchical_tables(method):
    tables = countdown_tables(num_inference_steps=[2, 8], method=method)
    assert list(tables.tables) == [2, 8] and tables.info[8]["objective"] == "klub"
    assert tables[2][1] in tables[8] and tables[8][-1] == 1e-5
    assert ("coupling" in tables.info[2]) == (method == "golden")


def test_the_lookup_is_at_least_as_good_as_the_search():
    model = load_countdown(GOLDENS / "count_model.safetensors", num_heads=4)
    data = golden("jys_search_euler_corrections").t["x0"].long()[:6]
    klub = KLUB(model, CTMCScheduler(vocab_size=17), data)
    found = {
        method: countdown_tables(num_inference_steps=[2], method=method)[2] for method in ("hierarchical", "golden")
    }
    assert klub(*found["hierarchical"]) >= klub(*found["golden"])


def test_counts_of_gillespie():
    tables = countdown_tables(num_inference_steps=[4, 7], sampler="gillespie", grid_size=48)
    counts = tables.info[7]["token_counts"]
    assert counts[0] == 0 and counts[-1] == 48 and all(a < b for a, b in pairwise(counts)) and len(counts) == 8
    scheduler = tables.apply_to(CTMCScheduler(vocab_size=17, sampler="gillespie"))
    scheduler.set_timesteps(7)
    tokens = torch.full((1, 48), 16)
    for step, (now, then) in enumerate(pairwise(counts)):
        assert scheduler.num_decode(tokens, step) == [then - now]
        tokens[0, now:then] = 0


def test_it_ends_in_the_scheduler():
    scheduler = countdown_tables(num_inference_steps=[5]).apply_to(CTMCScheduler(vocab_size=17))
    scheduler.set_timesteps(5)
    assert len(scheduler.timesteps) == 6 and scheduler.edges[-1] > 1e-3
    again = CTMCScheduler.from_config(scheduler.config)
    assert TimestepTables.of(again).info[5]["method"] == "exact"


def test_the_network_is_put_back_into_its_mode():
    model = load_countdown(GOLDENS / "count_model.safetensors", num_heads=4).train()
    data = golden("jys_search_euler_corrections").t["x0"].long()[:2]
    same = [
        optimize_timesteps(one, CTMCScheduler(vocab_size=17), data, [2], grid_size=8, progress=False)
        for one in (model, load_countdown(GOLDENS / "count_model.safetensors", num_heads=4))
    ]
    assert model.training and same[0][2] == same[1][2] and same[0].info[2]["bound"] == same[1].info[2]["bound"]


def test_a_progress_bar_by_default(capfd):
    countdown_tables(num_inference_steps=[2], progress=True)
    assert "6/6" in capfd.readouterr().err
    countdown_tables(num_inference_steps=[2], progress=False)
    assert "6/6" not in capfd.readouterr().err


# Interruptions, processes and threads


def same_info(one: dict, other: dict) -> bool:
    """All that is recorded with a table; costs up to the last of their five digits, see `optimize_timesteps`."""
    costs = {"bound", "bound_of_even_steps", "bound_where_chosen"} & set(one)
    rest = [{name: value for name, value in info.items() if name not in costs} for info in (one, other)]
    return rest[0] == rest[1] and all(one[name] == pytest.approx(other[name], rel=1.1e-4) for name in costs)


def test_threads_make_the_same_tables():
    threads, found = torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        try:
            found.append(countdown_tables(num_inference_steps=[2, 4, 8]))
        finally:
            torch.set_num_threads(threads)
    assert found[0].tables == found[1].tables
    assert all(same_info(found[0].info[n], found[1].info[n]) for n in (2, 4, 8))
    costs = [entry[name] for entry in found[0].info.values() for name in ("bound", "bound_of_even_steps")]
    assert all(float(f"{cost:.5g}") == cost for cost in costs)


class Stopped(Exception):
    pass


def stopping_after(number: int):
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == number:
            raise Stopped

    return progress, calls


@pytest.mark.parametrize("method", ["exact", "golden"])
def test_interrupted_work_goes_on(method, tmp_path, monkeypatch):
    options = {"num_inference_steps": [4], "method": method, "batch_size": 2}
    whole = countdown_tables(**options)
    for done in (1, 2):  # after the first interval of golden its network outputs would have been used again
        kept = tmp_path / f"kept-{done}"
        progress, calls = stopping_after(done)
        with pytest.raises(Stopped):
            countdown_tables(**options, resume=kept, progress=progress)
        assert calls == ([(2, 6), (4, 6)] if method == "exact" else [(1, 3), (2, 3)])[:done]
        assert countdown_tables(**options, resume=kept) == whole  # with the number of evaluations of the whole
        with monkeypatch.context() as patch:
            patch.setattr(klub.RateNetwork, "output", None)
            assert countdown_tables(**options, resume=kept) == whole


@pytest.mark.parametrize("method", ["exact", "golden"])
def test_kept_work_of_other_settings(method, tmp_path):
    options = {"num_inference_steps": [2], "method": method, "resume": tmp_path / "kept"}
    countdown_tables(**options)
    with pytest.raises(ValueError, match="was begun with other settings: seed: 0 before, 1 now"):
        countdown_tables(**options, seed=1)
    if method == "golden":
        for name, before, now in (("coupling", "data", "path"), ("average", "sequences", "batches")):
            with pytest.raises(ValueError, match=f"other settings: {name}: '{before}' before, '{now}' now"):
                countdown_tables(**options, **{name: now})
    (tmp_path / "kept").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"kept was not written by this command; choose another output folder"):
        countdown_tables(**options)


@pytest.mark.slow
def test_two_processes_make_the_same_tables(tmp_path):
    for rank, process in enumerate(start_two("optimize_on_processes.py", tmp_path, folder=tmp_path)):
        ended(process, tmp_path / f"{rank}.log")
    for method in ("exact", "golden"):
        alone = countdown_tables(num_inference_steps=[4], method=method, batch_size=2)
        for process in (0, 1):
            both = TimestepTables.load(tmp_path / f"{method}-{process}.json")
            assert both.tables == alone.tables
            assert same_info(both.info[4], alone.info[4])


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method must be one of .*'golden'.*, got 'best'"),
        ({"objective": "tv"}, 'objective must be "klub", "kl" or "alpha", got \'tv\''),
        ({"objective": "alpha"}, 'alpha belongs to objective="alpha"'),
        ({"alpha": 0.5}, 'alpha belongs to objective="alpha"'),
        ({"objective": "alpha", "alpha": 1.0}, r"alpha must be in \(0, 1\), got 1.0"),
        ({"held": "tokens"}, 'held must be "prediction" or "rates"'),
        ({"objective": "klub", "held": "prediction"}, 'pass held="rates"'),
        ({"method": "golden", "objective": "kl"}, "method='golden' is about objective=\"klub\", got 'kl'"),
        ({"method": "golden", "num_inference_steps": [4, 6]}, r"makes tables for 2, 4, 8, ... steps, not \[6\]"),
        ({"method": "golden", "last_edge": "free"}, 'last_edge="free" needs method="exact"'),
        ({"last_edge": "late"}, 'last_edge must be "free" or "min_timestep"'),
        ({"sampler": "gillespie", "last_edge": "free"}, "final denoising draws no tokens"),
        (
            {"sampler": "gillespie", "method": "golden", "grid_size": 24},
            "gillespie counts every token, 48",
        ),
        ({"num_inference_steps": []}, "num_inference_steps must be integers >= 1, at least one"),
        ({"num_inference_steps": [2, 0]}, "num_inference_steps must be integers >= 1"),
        ({"num_inference_steps": [16]}, "16 steps do not fit on a grid of 16 intervals"),
        ({"num_inference_steps": [32], "method": "golden"}, "= 32 steps need a grid of as many intervals"),
        ({"num_samples": 7}, r"num_samples must be in \[1, 6\], .* got 7"),
        ({"grid_size": 1}, "grid_size must be >= 2"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"num_report_samples": 6}, r"num_report_samples must be an integer in \[0, 6\), got 6"),
        ({"num_report_samples": 2, "method": "golden"}, "golden records no bound"),
        ({"sampler": "theta_trapezoidal"}, "tables are about steps that hold one prediction"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        countdown_tables(**options)


def test_final_denoising_by_the_most_probable_token_is_no_step():
    scheduler = exact_scheduler("uniform", 3)
    chain = markov_chain(3, 4, 0)
    arguments = (ExactNetwork(chain, scheduler), scheduler, chain.draw(4), [2])
    with pytest.raises(ValueError, match="final denoising draws no tokens"):
        optimize_timesteps(*arguments, last_edge="free", progress=False)
    assert optimize_timesteps(*arguments, grid_size=8, progress=False)[2][-1] == 1e-5


@pytest.mark.parametrize("kernel", ["absorbing", "uniform", "gaussian"])
def test_outputs_that_are_not_finite(kernel):
    class Broken(ExactNetwork):
        def forward(self, tokens, time):
            output = super().forward(tokens, time)
            if float(time[0]) < 0.6:
                output[2, 1] = float("nan")
            return output

    chain = markov_chain(3, 4, 0)
    scheduler = exact_scheduler(kernel, 3)
    data = torch.zeros(4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"rates at time 0.50\d+ are not finite at position 1 of sequence 2"):
        optimize_timesteps(
            Broken(chain, scheduler), scheduler, data, [2], grid_size=4, progress=False,
            noise=torch.zeros(4, 4) if kernel == "absorbing" else None,
        )  # fmt: skip
