"""One sampling step at SEDD's vocabulary against the authors' formulation, written plainly with dense matrices.

    python benchmarks/ctmc_step.py

The network is left out: both get the same log scores (batch, length, 50,258) and the same share of masks. The two are
timed in turn; printed are medians over the rounds, and the peak of the memory that a step allocates beside its inputs,
counted by torch's profiler on the CPU and by the allocator on CUDA, also in units of one float32 tensor of that size.
"""

import statistics
import time

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from diffusers_ext import CTMCScheduler

T, STEP = 0.6, 0.1


def dense_euler_step(log_score, sample, rate: float, step: float, generator) -> torch.Tensor:
    """Score, one-hot rows of the rate matrix, reverse rates with their diagonal, Gumbel draw, all in full size."""
    size = log_score.shape[-1]
    score = log_score.exp()
    into_mask = (sample == size - 1).unsqueeze(-1).float()
    transposed_rates = into_mask - F.one_hot(sample, size).float()
    reverse = transposed_rates * score
    reverse.scatter_(-1, sample.unsqueeze(-1), 0)
    reverse.scatter_(-1, sample.unsqueeze(-1), -reverse.sum(dim=-1, keepdim=True))
    weights = F.one_hot(sample, size).float() + step * rate * reverse
    uniforms = torch.rand(weights.shape, generator=generator, device=weights.device)
    return (weights / (1e-10 - (uniforms + 1e-10).log())).argmax(dim=-1)


def peak_bytes(function, device: torch.device) -> int:
    """Peak of what a call allocates beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    level = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def seconds(function, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@click.command()
@click.option("--batch-size", default=1, show_default=True)
@click.option("--length", default=1024, show_default=True)
@click.option("--vocab-size", default=50258, show_default=True)
@click.option("--masked", default=[1.0, 0.5, 0.1], multiple=True, show_default=True, help="Shares of masks.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(batch_size, length, vocab_size, masked, rounds, device):
    """Time and memory of one step at several shares of masked positions."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)
    log_score = torch.randn(batch_size, length, vocab_size, generator=generator, device=device) - 10
    unit, rate = log_score.numel() * 4, float(CTMCScheduler().sigma(T))
    table = Table("masked", "formulation", "ms", "ratio", "memory, MB", "of one tensor", "ratio")
    for share in masked:
        sample = torch.randint(vocab_size - 1, (batch_size, length), generator=generator, device=device)
        sample[:, : round(share * length)] = vocab_size - 1
        calls = {"dense": lambda x=sample: dense_euler_step(log_score, x, rate, STEP, generator)}
        for sampler in ("euler", "tweedie"):
            scheduler = CTMCScheduler(vocab_size=vocab_size, sampler=sampler)
            calls[sampler] = lambda x=sample, s=scheduler: s.step(log_score, T, x, generator, next_timestep=T - STEP)
        times = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(seconds(call, device))
        peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
        for name in calls:
            median = statistics.median(times[name])
            speed = statistics.median(a / b for a, b in zip(times["dense"], times[name], strict=True))
            row = (f"{share:.0%}", name, f"{median * 1e3:.0f}", f"{speed:.2f}x", f"{peaks[name] / 1e6:.0f}")
            table.add_row(*row, f"{peaks[name] / unit:.2f}", f"{peaks['dense'] / peaks[name]:.1f}x")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
