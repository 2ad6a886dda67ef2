"""What a Boost-and-Skip scheduler costs over the stock one: microseconds a step, with a network that does nothing.

    python benchmarks/boost_and_skip_step.py

The two are timed in turn, stock, ours, stock, ours, over whole loops of the same number of steps (ours sets more and
skips them). Printed are medians over the rounds, and of the ratios round by round.
"""

import statistics
import time

import click
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from rich.console import Console
from rich.table import Table

from diffusers_ext import boost_and_skip

STOCK = (DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler)


def microseconds_a_step(scheduler, steps: int, x: torch.Tensor, output: torch.Tensor) -> float:
    """One loop without a network, set_timesteps included, divided by the steps that it took."""
    started = time.perf_counter()
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x).prev_sample
    return (time.perf_counter() - started) * 1e6 / len(scheduler.timesteps)


@click.command()
@click.option("--steps", default=50, show_default=True, help="Steps that both walk.")
@click.option("--skip-steps", default=3, show_default=True)
@click.option("--rounds", default=40, show_default=True)
@click.option("--size", default=32, show_default=True, help="Height and width; batch 1, 3 channels.")
def main(steps, skip_steps, rounds, size):
    """Time the four schedulers against their parents."""
    x = torch.randn(1, 3, size, size)
    output = torch.zeros_like(x)
    table = Table("scheduler", "stock, µs/step", "ours, µs/step", "ours - stock, µs", "ratio")
    for cls in STOCK:
        stock, ours = cls(), boost_and_skip(cls(), gamma=4.0, skip_steps=skip_steps)
        pairs = []
        for _ in range(rounds + 1):
            pairs.append(
                (
                    microseconds_a_step(stock, steps, x, output),
                    microseconds_a_step(ours, steps + skip_steps, x, output),
                )
            )
        del pairs[0]  # the first round warms up
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(y / x for x, y in pairs)
        table.add_row(cls.__name__, f"{a:.0f}", f"{b:.0f}", f"{b - a:+.0f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
