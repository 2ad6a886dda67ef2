"""Nearest-neighbour metrics: diffusers_ext against the full distance matrix, in seconds and peak memory.

    python benchmarks/neighbour_metrics.py --points 10000 --points 50000 --dimension 64

The other side is what one writes first: torch.cdist in float32 of everything against everything. Each measurement
runs in a fresh process; its memory is the peak resident size of that process, which includes the libraries (the line
"nothing") and the features. A full matrix that needs more than --memory-limit is not run, and the table says so.
"""

import json
import resource
import subprocess
import sys
import time

import click
import torch

from diffusers_ext import metrics

K = 3
METRICS = ["average_knn_distance", "rarity_score", "precision_recall"]
# Bytes per pair of points at the peak of the functions below, as measured: float32 distances, and copies in kthvalue.
MATRIX_BYTES = {"average_knn_distance": 4, "rarity_score": 16, "precision_recall": 20}


def naive_radii(points):
    return torch.cdist(points, points).kthvalue(K + 1, dim=1).values


def naive_average_knn_distance(features, reference):
    return torch.cdist(features, reference).topk(K, largest=False).values.mean().item()


def naive_rarity_score(features, reference):
    radii = naive_radii(reference)
    distances = torch.cdist(features, reference)
    scores = torch.where(distances <= radii, radii, torch.inf).min(dim=1).values
    return scores[scores.isfinite()].mean().item()


def naive_precision_recall(features, reference):
    precision = (torch.cdist(features, reference) <= naive_radii(reference)).any(dim=1).float().mean().item()
    return precision, (torch.cdist(reference, features) <= naive_radii(features)).any(dim=1).float().mean().item()


def ours(metric, features, reference):
    result = getattr(metrics, metric)(features, reference, K)
    return result.mean if metric == "rarity_score" else result


def measure(metric: str, side: str, points: int, dimension: int) -> None:
    """Print seconds, peak memory and the value of one metric as JSON. Runs in its own process."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -1, dimension)  # features of networks spread unevenly, too
    reference = torch.randn(points, dimension, generator=generator) * spread
    features = torch.randn(points, dimension, generator=generator) * spread * 0.95
    start = time.perf_counter()
    if side == "ours":
        value = ours(metric, features, reference)
    elif side == "naive":
        value = globals()[f"naive_{metric}"](features, reference)
    else:
        value = None
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
    click.echo(json.dumps({"seconds": seconds, "peak": peak, "value": value}))


def in_fresh_process(*arguments) -> dict:
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def largest_difference(a, b) -> float:
    """Largest relative difference between two values, or two pairs of values."""
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    return ((a - b).abs() / b.abs()).max().item()


def compare(metric: str, points: int, dimension: int, memory_limit: float) -> str:
    """One row of the table."""
    mine = in_fresh_process(metric, "ours", points, dimension)
    row = f"{metric:<22}{points:>8}{mine['seconds']:>9.1f} s{mine['peak']:>8.2f} GB"
    needed = MATRIX_BYTES[metric] * points**2 / 1e9
    if needed > memory_limit:
        return f"{row}   full matrix needs {needed:.0f} GB, not run"
    naive = in_fresh_process(metric, "naive", points, dimension)
    faster, smaller = naive["seconds"] / mine["seconds"], naive["peak"] / mine["peak"]
    difference = largest_difference(mine["value"], naive["value"])
    return f"{row}{naive['seconds']:>9.1f} s{naive['peak']:>8.2f} GB{faster:>9.2f}x{smaller:>8.2f}x{difference:>12.0e}"


@click.command(help=__doc__.split("\n")[0])
@click.option("--points", type=click.IntRange(10), multiple=True, default=[10_000, 50_000], show_default=True)
@click.option("--dimension", type=click.IntRange(1), default=64, show_default=True)
@click.option("--memory-limit", type=click.FloatRange(0), default=8.0, show_default=True, help="GB per full matrix.")
@click.option("--measure", "single", type=(str, str, int, int), hidden=True)
def main(points, dimension, memory_limit, single):
    if single:
        return measure(*single)
    nothing = in_fresh_process("none", "nothing", points[0], dimension)
    click.echo(f"dimension {dimension}, k {K}, {torch.get_num_threads()} threads; nothing: {nothing['peak']:.2f} GB")
    click.echo(f"{'':<30}{'diffusers_ext':>22}{'full matrix':>22}{'faster':>10}{'smaller':>9}{'difference':>12}")
    for n in points:
        for metric in METRICS:
            click.echo(compare(metric, n, dimension, memory_limit))


if __name__ == "__main__":
    main()
