"""Pairing of generated with real samples: find_neighbours against brute-force torch, in seconds and peak memory.

    python benchmarks/pairing.py --points 50000 --dimension 384

Each measurement runs in a fresh process; its memory is the peak resident size of that process, which includes the
libraries (the line "nothing") and the features. The other side is torch.cdist in float32, everything against
everything and then topk; where the matrix needs more than --memory-limit, the same in blocks of 1,000 queries.
"recall" is the share of the exact neighbours that a search found.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from diffusers_ext.flow import Neighbours, find_neighbours

SIDES = ("exact", "ivf", "torch")


def features(points: int, dimension: int, clusters: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of clustered points whose dimensions spread unevenly, as those of networks do."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -1, dimension)
    centres = torch.randn(clusters, dimension, generator=generator) * spread

    def draw():
        chosen = torch.randint(clusters, (points,), generator=generator)
        return centres[chosen] + 0.5 * spread * torch.randn(points, dimension, generator=generator)

    return draw(), draw()


def brute_force(queries: torch.Tensor, reference: torch.Tensor, k: int, memory_limit: float) -> torch.Tensor:
    """Indices (n, k) by distance matrices, whole ones where two of them fit into the limit (GB)."""
    rows = len(queries) if 8 * len(queries) * len(reference) <= memory_limit * 1e9 else 1000
    found = [torch.cdist(block, reference).topk(k, largest=False).indices for block in queries.split(rows)]
    return torch.cat(found)


def measure(side: str, points: int, dimension: int, k: int, memory_limit: float, folder: str) -> None:
    """Print seconds and peak memory of one search as JSON, and leave its result in the folder."""
    queries, reference = features(points, dimension)
    start = time.perf_counter()
    if side == "torch":
        indices = brute_force(queries, reference, k, memory_limit)
    elif side == "nothing":
        indices = torch.zeros(1, 1, dtype=torch.int64)
    else:
        indices = find_neighbours(queries, reference, k, method=side).indices
    seconds = time.perf_counter() - start
    Neighbours(indices, torch.zeros(indices.shape)).save(Path(folder) / f"{side}.safetensors")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
    click.echo(json.dumps({"seconds": seconds, "peak": peak}))


def in_fresh_process(*arguments) -> dict:
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def recall(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Share of the exact neighbours among those found."""
    blocks = zip(found.split(1000), exact.split(1000), strict=True)
    return torch.cat([(a[:, :, None] == b[:, None]).any(1).float().mean(1) for a, b in blocks]).mean().item()


@click.command(help=__doc__.split("\n")[0])
@click.option("--points", type=click.IntRange(50), default=50_000, show_default=True)
@click.option("--dimension", type=click.IntRange(1), default=384, show_default=True)
@click.option("--k", type=click.IntRange(1), default=20, show_default=True)
@click.option("--memory-limit", type=click.FloatRange(0), default=8.0, show_default=True, help="GB of one matrix.")
@click.option("--measure", "single", type=(str, int, int, int, float, str), hidden=True)
def main(points, dimension, k, memory_limit, single):
    if single:
        return measure(*single)
    with TemporaryDirectory() as folder:
        rest = (points, dimension, k, memory_limit, folder)
        nothing = in_fresh_process("nothing", *rest)
        rows = {side: in_fresh_process(side, *rest) for side in SIDES}
        indices = {side: Neighbours.load(Path(folder) / f"{side}.safetensors").indices for side in SIDES}
    click.echo(f"{points} x {points}, dimension {dimension}, k {k}, {torch.get_num_threads()} threads")
    click.echo(f"nothing: {nothing['peak']:.2f} GB")
    click.echo(f"{'':<8}{'seconds':>9}{'peak':>10}{'faster':>9}{'recall':>9}")
    for side, row in rows.items():
        faster, share = rows["torch"]["seconds"] / row["seconds"], recall(indices[side], indices["exact"])
        click.echo(f"{side:<8}{row['seconds']:>9.1f}{row['peak']:>7.2f} GB{faster:>8.2f}x{share:>9.4f}")


if __name__ == "__main__":
    main()
