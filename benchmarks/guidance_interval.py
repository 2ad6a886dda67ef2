"""What a guidance interval costs and saves: its overhead a step, network rows, and time beside plain guidance.

    python benchmarks/guidance_interval.py [--rounds 15] [--steps 32]

The overhead is measured on Stable Diffusion with a denoiser that does nothing, so that only the pipeline's own work is
left; "plain" and the two intervals take turns, and medians are compared. Rows and seconds are those of a small
Stable Diffusion with random weights, half of whose steps are guided.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import diffusers
import torch

from diffusers_ext.pipelines import GuidanceInterval

warnings.filterwarnings("ignore", message="the guidance interval")
WIDTH = 32


def stable_diffusion(channels: tuple[int, ...]) -> diffusers.StableDiffusionPipeline:
    """A UNet with random weights in the stock pipeline, without text encoder and VAE."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        attention_head_dim=8,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
    )
    missing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipe = diffusers.StableDiffusionPipeline(
        **missing, unet=unet.eval(), scheduler=scheduler, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, steps: int) -> Callable[[], torch.Tensor]:
    size = 8 * pipe.unet.config.sample_size
    embeds = {name: torch.randn(1, 8, WIDTH) for name in ("prompt_embeds", "negative_prompt_embeds")}
    options = {"num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "latent"}
    return lambda: pipe(**embeds, **options, height=size, width=size).images


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(pipe, steps: int, rounds: int, intervals: dict[str, dict]) -> dict[str, tuple[float, int]]:
    """Median seconds of a call and network rows: plain, and with each interval, in turns."""
    run = call(pipe, steps)
    times: dict[str, list[float]] = {name: [] for name in ("plain", *intervals)}
    rows = {"plain": 2 * steps}
    for number in range(rounds + 1):
        for name in times:
            if name == "plain":
                took = seconds(run)
            else:
                with GuidanceInterval(pipe, **intervals[name]) as interval:
                    took = seconds(run)
                rows[name] = interval.report.rows
            if number:  # the first round warms up
                times[name].append(took)
    return {name: (statistics.median(values), rows[name]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=32)
    arguments = parser.parse_args()
    steps, rounds = arguments.steps, arguments.rounds

    pipe = stable_diffusion((8, 8))
    pipe.unet.forward = lambda sample, *args, **kwargs: (sample,)
    found = compare(pipe, steps, rounds, {"whole line": {"sigma_lo": 0.0}, "empty": {"sigma_hi": 1e-9}})
    plain = found.pop("plain")[0]
    print(f"no-op denoiser, {steps} steps, medians of {rounds}: plain guidance {1e6 * plain / steps:.0f} us a step")
    for name, (took, _) in found.items():
        print(f"  {name:11s} {1e6 * (took - plain) / steps:+.0f} us a step")

    half = (steps // 4, steps // 4 + steps // 2 - 1)
    found = compare(stable_diffusion((32, 64)), steps, max(3, rounds // 3), {"half": {"guided_steps": half}})
    (plain, all_rows), (took, rows) = found["plain"], found["half"]
    print(
        f"random UNet, {steps} steps, {steps // 2} guided: rows {rows} of {all_rows} ({rows / all_rows:.3f}),", end=" "
    )
    print(f"seconds {took:.3f} of {plain:.3f} ({took / plain:.3f})")


if __name__ == "__main__":
    main()
