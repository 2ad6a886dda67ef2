"""Which steps of each family's default schedule lie in a guidance interval, and the network rows that this saves.

No weights are needed. The schedulers' settings are those of the repositories on the Hub as we know them, not read from
there: compare with `pipe.scheduler.config`. The numbers of steps are the defaults of diffusers' pipelines.

    python benchmarks/starting_values.py

The interval is the paper's for SDXL, for EDM2-S (best FID, before rounding) and, by its steps, for DiT; the other
families have SDXL's, by the noise level. A guided step is counted as two rows a sample, another one as one.
"""

import argparse
import inspect
from collections.abc import Callable
from typing import NamedTuple

import diffusers
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_ext import EDM2Pipeline, EDMHeunScheduler
from diffusers_ext.pipelines.interval import Interval, StepStart, read_step

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


class Family(NamedTuple):
    """A pipeline class, whose default number of steps counts, and what sets its schedule for so many."""

    pipeline: type
    schedule: Callable[[int], SchedulerMixin]
    note: str
    interval: tuple[float, float] = (0.28, 5.42)


def stock(name: str, **config) -> Callable[[int], SchedulerMixin]:
    def schedule(steps: int) -> SchedulerMixin:
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(steps)
        return scheduler

    return schedule


def shifted_by_size(tokens: int, **config) -> Callable[[int], SchedulerMixin]:
    """Flow matching whose shift depends on the number of the image's tokens, as in Flux and Qwen-Image."""

    def schedule(steps: int) -> SchedulerMixin:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **config)
        sizes = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(tokens, *(scheduler.config[size] for size in sizes))
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
        return scheduler

    return schedule


def edm(steps: int) -> SchedulerMixin:
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


FAMILIES = {
    "SD 1.5": Family(
        diffusers.StableDiffusionPipeline,
        stock("PNDMScheduler", **LATENT, skip_prk_steps=True, set_alpha_to_one=False),
        "PNDM",
    ),
    "SDXL": Family(
        diffusers.StableDiffusionXLPipeline,
        stock("EulerDiscreteScheduler", **LATENT, timestep_spacing="leading"),
        "Euler, leading",
    ),
    "SD3": Family(
        diffusers.StableDiffusion3Pipeline, stock("FlowMatchEulerDiscreteScheduler", shift=3.0), "flow, shift 3"
    ),
    "Flux.1 dev": Family(
        diffusers.FluxPipeline,
        shifted_by_size(4096, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096),
        "flow, shift of 1024 x 1024",
    ),
    "Wan 2.1": Family(
        diffusers.WanPipeline,
        stock(
            "UniPCMultistepScheduler",
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=3.0,
        ),
        "UniPC on flow sigmas, shift 3",
    ),
    "Qwen-Image": Family(
        diffusers.QwenImagePipeline,
        shifted_by_size(
            83 * 83, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02
        ),
        "flow, shift of 1328 x 1328",
    ),
    "PixArt": Family(diffusers.PixArtAlphaPipeline, stock("DPMSolverMultistepScheduler", **LINEAR), "DPM-Solver++"),
    "DiT": Family(
        diffusers.DiTPipeline, stock("DDIMScheduler", **LINEAR, clip_sample=False), "DDIM, linear", (0.75, 3.39)
    ),
    "EDM2": Family(EDM2Pipeline, edm, "EDM's Heun, rho 7", (0.284, 2.91)),
}


def steps_of(family: Family) -> list[StepStart]:
    """Where each step of the default schedule starts, once a step whatever its number of evaluations."""
    scheduler = family.schedule(inspect.signature(family.pipeline.__call__).parameters["num_inference_steps"].default)
    if isinstance(scheduler, EDMHeunScheduler):  # its sigmas are for both evaluations of a step
        levels = list(dict.fromkeys(scheduler.sigmas[scheduler.sigmas > 0].tolist()))
        return [StepStart(i, len(levels), level, type(scheduler).__name__) for i, level in enumerate(levels)]
    starts: dict[int, StepStart] = {}
    for t in scheduler.timesteps:
        start = read_step(scheduler, t.clone())  # by its value; a view would be found by its place
        starts.setdefault(start.index, start)
    return list(starts.values())


def row(name: str, interval: Interval) -> str:
    """A line of the table."""
    steps = steps_of(FAMILIES[name])
    guided = [step.index for step in steps if step in interval]
    which = f"{guided[0]} to {guided[-1]} ({len(guided)})" if guided else "none"
    saved = (len(steps) - len(guided)) / (2 * len(steps))
    flow = [sigma / (1 + sigma) for sigma in (interval.sigma_lo, interval.sigma_hi)]
    cells = (
        name, FAMILIES[name].note, str(len(steps)), f"{steps[0].sigma:.3g} to {steps[-1].sigma:.2g}", str(interval),
        f"({flow[0]:.2f}, {flow[1]:.2f}]", which, f"{saved:.0%}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| family | default schedule | steps | their sigma | interval | in flow sigmas | guided | rows saved |")
    print("|---|---|---|---|---|---|---|---|")
    for name, family in FAMILIES.items():
        print(row(name, Interval(*family.interval)))


if __name__ == "__main__":
    main()
