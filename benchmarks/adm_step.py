"""One ancestral step of the ImageNet-64 network of guided-diffusion, random weights: ways to run it, side by side.

    python benchmarks/adm_step.py                       # 1 image on the CPU
    python benchmarks/adm_step.py --device cuda --batch-size 64 --compile

Baseline: a `UNet2DModel` of the same shape, float32, which is also what converting `64x64_diffusion.pt` gives. Against
it: our subclass with nothing switched on, channels-last, bfloat16, float16 on GPUs, compiled. Rounds are interleaved
and the median is reported. Memory is that of weights and, on GPUs, the peak of a step.

Measured: see docs/guided_diffusion.md.
"""

import statistics
import time

import click
import torch
from diffusers import DDPMScheduler, UNet2DModel
from rich.console import Console
from rich.table import Table

from diffusers_ext import ADMUNet2DModel
from diffusers_ext.checkpoints import PRESETS
from diffusers_ext.checkpoints.guided_diffusion import ADMLayout, unet_config

IMAGENET64 = ADMLayout(
    in_channels=3,
    out_channels=6,
    num_channels=192,
    widths=(192, 384, 576, 768),
    attention=(False, True, True, True),
    num_res_blocks=3,
    resampling="resblock",
    use_scale_shift_norm=True,
    num_classes=1000,
)


def build(cls, config: dict, weights: dict | None, device: str, dtype: torch.dtype):
    with torch.device(device):
        unet = cls(**config)
    if weights is not None:
        unet.load_state_dict(weights)
    return unet.to(dtype).eval().requires_grad_(False)


def step_of(unet, scheduler, batch_size: int, device: str, dtype: torch.dtype, channels_last: bool):
    """A function that does one step and waits for it."""
    sample = torch.randn(batch_size, 3, 64, 64, device=device, dtype=dtype)
    labels = torch.arange(batch_size, device=device) % 1000
    t = scheduler.timesteps[100]
    if channels_last:
        sample = sample.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def step():
        scheduler.step(unet(sample, t, class_labels=labels).sample, t, sample)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--batch-size", default=1, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Compile as well; takes minutes on a CPU.")
def main(device, batch_size, rounds, compiled):
    """Seconds of a step, and the ratio to the baseline."""
    choices = {"num_heads": 4, "dropout": 0.0, "diffusion_steps": 1000, **PRESETS["imagenet64"], "image_size": 64}
    _, config = unet_config(IMAGENET64, choices)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    scheduler.set_timesteps(250, device=device)
    plain = build(UNet2DModel, config, None, device, torch.float32)
    weights = plain.state_dict()
    low = torch.float16 if device == "cuda" else torch.bfloat16
    ways = {
        "UNet2DModel, float32": (plain, torch.float32, False),
        "ADMUNet2DModel, float32": (
            build(ADMUNet2DModel, config, weights, device, torch.float32),
            torch.float32,
            False,
        ),
        "channels-last, float32": (
            build(UNet2DModel, config, weights, device, torch.float32).to(memory_format=torch.channels_last),
            torch.float32,
            True,
        ),
        "bfloat16": (build(UNet2DModel, config, weights, device, torch.bfloat16), torch.bfloat16, False),
    }
    if device == "cuda":
        ways["float16"] = (build(UNet2DModel, config, weights, device, low), low, False)
    if compiled:
        ways[f"compiled, {low}".replace("torch.", "")] = (
            torch.compile(build(UNet2DModel, config, weights, device, low)), low, False,
        )  # fmt: skip
    steps = {
        name: step_of(unet, scheduler, batch_size, device, dtype, last) for name, (unet, dtype, last) in ways.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, 0)
    for warm in [True] + [False] * rounds:
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            step()
            if not warm:
                seconds[name].append(time.perf_counter() - started)
            if device == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    table = Table("way", "s a step", "ratio", "images/s", "weights, MB", "step's memory, MB")
    base = statistics.median(seconds["UNet2DModel, float32"])
    for name, (unet, _, _) in ways.items():
        median = statistics.median(seconds[name])
        megabytes = sum(p.numel() * p.element_size() for p in unet.parameters()) / 1e6
        peak = f"{peaks[name] / 1e6:.0f}" if device == "cuda" else "-"
        table.add_row(
            name, f"{median:.3f}", f"{median / base:.2f}", f"{batch_size / median:.2f}", f"{megabytes:.0f}", peak
        )
    Console().print(table)


if __name__ == "__main__":
    main()
