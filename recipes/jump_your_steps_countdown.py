"""Measure timestep tables on a CountDown model: even steps, the paper's objective, ours.

    python recipes/jump_your_steps_countdown.py countdown-sedd --output out/jump-your-steps

MODEL is a shipped model, a folder or a Hub id of a DiscreteDiffusionPipeline trained on CountDown (2410.07761). One
pass of the network over a grid gives all tables (statistics.safetensors). Then sequences are drawn with each of them.
results.json keeps, for each table, number of steps and seed, the strict error rate, the one that the authors count,
the entropy of the tokens within a sequence, and how far the tokens' shares are from those of true sequences (total
variation, pooled); results.md is the table of it. The same command goes on after an interruption, and further steps,
seeds and tables add to what is there.

Tables: "even"; "even, denoising as a step", whose n steps and the final denoising are n + 1 even steps; "paper", the
paper's objective at its exact maximum, level by level, for 2, 4, 8, ... steps; and by dynamic programming, of what a
step holds, "kl" and "alpha ..." with a free last edge, "kl, last edge fixed", "alpha ... of rates, last edge fixed".
n steps are n + 1 network calls for all of them.
"""

import json
from functools import cache
from hashlib import sha256
from pathlib import Path

import click
import torch
from rich.progress import Progress

from diffusers_ext.jump_your_steps import Cost, RateStatistics
from diffusers_ext.jump_your_steps.costs import Grid, cheapest_schedules
from diffusers_ext.jump_your_steps.golden import best_hierarchy
from diffusers_ext.jump_your_steps.statistics import accumulate
from diffusers_ext.machine.versions import best_device, package_versions
from diffusers_ext.metrics import countdown_errors, countdown_errors_original, countdown_sequences, unigram_entropy
from diffusers_ext.runs.files import write_json
from diffusers_ext.runs.kept import Kept
from diffusers_ext.runs.processes import Processes
from diffusers_ext.shipped import load_pipeline

KLUB = Cost("klub", held="rates")
MEASURES = ("strict", "original", "entropy", "shares")


def optimise(pipe, output: Path, samples: int, grid_size: int, alphas: list[float], steps: list[int], batch_size: int):
    """Edges by name of the table and number of steps."""
    length, tokens = pipe.model.config.sequence_length, pipe.scheduler.config.vocab_size - 1
    data = countdown_sequences(samples, length, tokens, torch.Generator().manual_seed(1))
    costs = (KLUB, Cost(), *(Cost("alpha", a) for a in alphas), *(Cost("alpha", a, "rates") for a in alphas[:1]))
    statistics = RateStatistics(pipe.model, pipe.scheduler, data, costs, grid_size=grid_size)
    settings = {"samples": samples, "grid_size": grid_size, "batch_size": batch_size, "costs": list(map(str, costs))}
    kept = Kept(output / "statistics.safetensors", settings, statistics.is_sum)
    with Progress() as progress:
        bar = progress.add_task("one pass over the grid", total=samples)
        [(means, _)] = accumulate(
            statistics, batch_size, Processes(None), kept, lambda done, _: progress.update(bar, completed=done)
        )
    return tables_of(means, statistics.grid, steps)


def tables_of(means: dict[Cost, torch.Tensor], grid: Grid, steps: list[int]) -> dict[str, dict[int, list[float]]]:
    powers = [n for n in steps if n > 1 and n & (n - 1) == 0]
    indices = {"even": {n: grid.even(n) for n in steps}}
    indices["even, denoising as a step"] = {n: grid.even(n + 1)[:-1] for n in steps}
    indices["paper"] = best_hierarchy(grid.points, means[KLUB], powers) if powers else {}
    for cost, divergence in means.items():
        if cost == KLUB:
            continue
        costs, name = grid.step_costs(divergence), cost.objective + ("" if cost.alpha is None else f" {cost.alpha:g}")
        if cost.held == "prediction":
            indices[name] = {n: path for n, (path, _) in cheapest_schedules(costs, steps, True).items()}
        if cost.held == "rates" or cost == Cost():
            fixed = cheapest_schedules(costs, steps, False)
            further = " of rates" if cost.held == "rates" else ""
            indices[f"{name}{further}, last edge fixed"] = {n: path for n, (path, _) in fixed.items()}
    return {name: {n: [grid.points[i] for i in path] for n, path in by.items()} for name, by in indices.items()}


@torch.no_grad()
def draw(pipe, edges: list[float], samples: int, seed: int, batch_size: int, autocast: bool) -> torch.Tensor:
    generator, drawn = torch.Generator().manual_seed(seed), []
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=autocast):
        for size in map(len, torch.arange(samples).split(batch_size)):
            drawn.append(
                pipe(batch_size=size, timesteps=edges, generator=generator, output_type="tokens").tokens.cpu()
            )
    return torch.cat(drawn).cpu()


def measure(sequences: torch.Tensor, tokens: int) -> dict:
    """Mean and variance of each measure over the sequences, and the counts of the tokens."""
    values = {
        "strict": countdown_errors(sequences),
        "original": countdown_errors_original(sequences),
        "entropy": unigram_entropy(sequences),
    }
    measured = {name: [float(v.double().mean()), float(v.double().var())] for name, v in values.items()}
    return {
        **measured,
        "samples": len(sequences),
        "counts": torch.bincount(sequences.flatten(), minlength=tokens).tolist(),
    }


@cache
def true_shares(length: int, tokens: int) -> torch.Tensor:
    data = countdown_sequences(20_000, length, tokens, torch.Generator().manual_seed(0))
    return torch.bincount(data.flatten(), minlength=tokens).double() / data.numel()


def summary(runs: list[dict], length: int) -> dict[str, tuple[float, float]]:
    """Mean and standard error of each measure over all sequences of some seeds."""
    number = sum(run["samples"] for run in runs)
    found = {}
    for name in MEASURES[:3]:
        mean = sum(run["samples"] * run[name][0] for run in runs) / number
        spread = sum((run["samples"] - 1) * run[name][1] + run["samples"] * (run[name][0] - mean) ** 2 for run in runs)
        found[name] = mean, (spread / (number - 1) / number) ** 0.5
    shares = torch.tensor([run["counts"] for run in runs], dtype=torch.float64)
    truth = true_shares(length, shares.shape[1])
    each = (shares / shares.sum(dim=1, keepdim=True) - truth).abs().sum(dim=1) / 2
    pooled = (shares.sum(dim=0) / shares.sum() - truth).abs().sum() / 2
    found["shares"] = float(pooled), float(each.std() / len(runs) ** 0.5) if len(runs) > 1 else float("nan")
    return found


def markdown(results: dict, length: int) -> str:
    """A row for each number of steps and table: mean ± standard error over all sequences of all seeds."""
    rows = {}
    for run in results["runs"].values():
        for name in run["tables"]:
            rows.setdefault((run["steps"], name), []).append(run)
    lines = ["| steps | table | sequences | strict error | original | entropy | token shares |", "|" + "---|" * 7]
    for (steps, name), runs in sorted(rows.items(), key=lambda row: row[0][0]):
        values = " | ".join(f"{mean:.4f} ± {error:.4f}" for mean, error in summary(runs, length).values())
        lines.append(f"| {steps} | {name} | {sum(run['samples'] for run in runs)} | {values} |")
    return "\n".join(lines) + "\n"


def save(results: dict, output: Path, length: int) -> None:
    write_json(output / "results.json", results)
    (output / "results.md").write_text(markdown(results, length))


@click.command()
@click.argument("model")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--steps", multiple=True, type=int, default=[2, 3, 4, 6, 8, 12, 16, 24, 32, 64], show_default=True)
@click.option("--samples", default=4096, show_default=True, help="Of each seed.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--search-samples", default=256, show_default=True, help="Sequences from which the tables are made.")
@click.option("--grid-size", default=256, show_default=True)
@click.option("--alpha", "alphas", multiple=True, type=float, default=[0.1, 0.5], show_default=True)
@click.option("--only", multiple=True, help="Measure this table only; repeat it for more.")
@click.option("--batch-size", default=128, show_default=True)
@click.option("--autocast", is_flag=True, help="Draw in bfloat16 (the tables are made in float32).")
@click.option("--compile", "compiled", is_flag=True, help="Compile the network before drawing.")
@click.option("--device", default=None)
def main(
    model,
    output,
    steps,
    samples,
    seeds,
    search_samples,
    grid_size,
    alphas,
    only,
    batch_size,
    autocast,
    compiled,
    device,
):
    output.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(model, dtype=torch.float32).to(device or best_device())
    pipe.set_progress_bar_config(disable=True)
    pipe.model.eval()
    tables = optimise(pipe, output, search_samples, grid_size, list(alphas), sorted(steps), min(batch_size, 32))
    if compiled:
        pipe.model.compile()
    length, tokens = pipe.model.config.sequence_length, pipe.scheduler.config.vocab_size - 1
    path = output / "results.json"
    settings = {
        "model": model,
        "samples": samples,
        "autocast": autocast,
        "batch_size": batch_size,
        "compiled": compiled,
    }
    results = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": {}}
    if results["settings"] != settings:
        raise click.UsageError(f"{path} was begun with {results['settings']}; choose another --output")
    results |= {"versions": package_versions(), "tables": tables}
    jobs: dict[str, dict] = {}  # tables with the same edges are drawn from once
    for n in sorted(steps):
        for seed in range(seeds):
            for name in only or tables:
                if n in tables[name]:
                    job = {"steps": n, "seed": seed, "edges": tables[name][n]}
                    key = sha256(json.dumps(job).encode()).hexdigest()[:16]
                    jobs.setdefault(key, {**job, "tables": []})["tables"].append(name)
    with Progress() as progress:
        bar = progress.add_task("drawing", total=sum(job["steps"] + 1 for job in jobs.values()))
        for key, job in jobs.items():
            if key in results["runs"]:
                results["runs"][key]["tables"] = sorted({*results["runs"][key]["tables"], *job["tables"]})
            else:
                sequences = draw(pipe, job["edges"], samples, job["seed"], batch_size, autocast)
                results["runs"][key] = {**job, **measure(sequences, tokens)}
                save(results, output, length)
            progress.advance(bar, job["steps"] + 1)
    save(results, output, length)
    click.echo(markdown(results, length))


if __name__ == "__main__":
    main()
