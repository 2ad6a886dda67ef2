"""What a guidance interval costs and saves: its overhead a step, network rows, and time beside plain guidance.

    python benchmarks/guidance_interval.py [--rounds 15] [--steps 32]
    python benchmarks/guidance_interval.py --device cuda    # besides, a UNet of SDXL's size, eager and compiled

The overhead is measured on SDXL with a denoiser that does nothing, so that only the pipeline's own work is left, in
CPU time of the thread, in turns with the stock loop. The time is that of the shipped MNIST model and of a small Stable
Diffusion XL with random weights, half of whose steps are guided; on a GPU also of a network of SDXL's size with random
weights, in bfloat16, at 1024 x 1024. Plain guidance and the intervals take turns; medians are compared.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import diffusers
import torch

from diffusers_ext.pipelines import GuidanceInterval
from diffusers_ext.shipped import load_pipeline

warnings.filterwarnings("ignore", message="the guidance interval")
TOKENS = 77
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}
SMALL_SDXL_UNET = {
    **SDXL_UNET,
    "sample_size": 32,
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + 64,
}


def unet_of(config: dict, device: str, dtype: torch.dtype) -> diffusers.UNet2DConditionModel:
    """Random weights, made on the device in the type that they are run in."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return diffusers.UNet2DConditionModel(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)


def stable_diffusion(config: dict, device: str, dtype: torch.dtype = torch.float32) -> diffusers.DiffusionPipeline:
    """A UNet with random weights in the stock pipeline, without text encoder and VAE; SDXL's if it takes sizes."""
    parts = {"unet": unet_of(config, device, dtype), "scheduler": diffusers.EulerDiscreteScheduler(**SCHEDULE)}
    missing = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if "addition_embed_type" in config:
        missing |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        pipe = diffusers.StableDiffusionXLPipeline(**missing, **parts, add_watermarker=False)
    else:
        missing |= dict.fromkeys(("safety_checker", "feature_extractor"))
        pipe = diffusers.StableDiffusionPipeline(**missing, **parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampling(pipe: diffusers.DiffusionPipeline, steps: int) -> Callable[[], object]:
    """One call of a pipeline of `stable_diffusion`."""
    config = pipe.unet.config
    options = {"num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "latent"}
    options |= dict.fromkeys(("height", "width"), 8 * config.sample_size)
    widths = {"prompt_embeds": (TOKENS, config.cross_attention_dim)}
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        widths["pooled_prompt_embeds"] = (pooled,)
    for sign in ("", "negative_"):
        for name, shape in widths.items():
            options[sign + name] = torch.randn(1, *shape, device=pipe.unet.device, dtype=pipe.unet.dtype)
    return lambda: pipe(**options)


def digits(device: str, steps: int) -> tuple[diffusers.DiffusionPipeline, Callable[[], object]]:
    """The shipped MNIST model, and a call that draws ten digits."""
    pipe = load_pipeline("mnist-unet", "boost-and-skip").to(device)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "pt"}
    return pipe, lambda: pipe(class_labels=list(range(10)), **options)


def seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    pipe: diffusers.DiffusionPipeline, run: Callable[[], object], rounds: int, intervals: dict[str, dict]
) -> dict[str, tuple[float, int]]:
    """Median seconds of a call and network rows: plain, and with each interval, in turns."""
    device = pipe.unet.device.type
    times: dict[str, list[float]] = {name: [] for name in ("plain", *intervals)}
    rows = {}
    for number in range(rounds + 1):
        for name in times:
            if name == "plain":
                took = seconds(run, device)
            else:
                with GuidanceInterval(pipe, **intervals[name]) as interval:
                    took = seconds(run, device)
                rows[name] = interval.report.rows
                rows["plain"] = interval.report.rows + interval.report.rows_saved
            if number:  # the first round warms up, and compiles
                times[name].append(took)
    return {name: (statistics.median(values), rows[name]) for name, values in times.items()}


def report_overhead(device: str, steps: int, rounds: int) -> None:
    """Thread time that an interval adds to a step of the stock loop, which runs in turns with it."""
    pipe, outputs = stable_diffusion(SMALL_SDXL_UNET, device), {}

    def nothing(sample, *args, **kwargs):
        return (outputs.setdefault(len(sample), torch.zeros_like(sample)),)

    pipe.unet.forward = nothing
    run = sampling(pipe, steps)
    times: dict[str, list[float]] = {"stock": [], "guided": [], "unguided": []}
    for number in range(rounds + 1):
        for name, bounds in (("stock", None), ("guided", {"sigma_lo": 0.0}), ("unguided", {"sigma_hi": 1e-9})):
            with nullcontext() if bounds is None else GuidanceInterval(pipe, **bounds):
                start = time.thread_time()
                run()
                took = time.thread_time() - start
            if number:
                times[name].append(took / steps)
    stock = statistics.median(times["stock"])
    print(f"no-op SDXL network, {steps} steps, medians of {rounds}: a stock step takes {1e6 * stock:.0f} us")
    for name in ("guided", "unguided"):
        added = statistics.median(ours - plain for ours, plain in zip(times[name], times["stock"], strict=True))
        print(f"  the interval adds {1e6 * added:+.0f} us to a step that is {name} ({added / stock:.0%})")


def report_saving(title: str, pipe, run: Callable[[], object], steps: int, rounds: int) -> None:
    """Rows and seconds with the middle half of the steps guided."""
    half = (steps // 4, steps // 4 + steps // 2 - 1)
    found = compare(pipe, run, rounds, {"half": {"guided_steps": half}})
    (plain, all_rows), (took, rows) = found["plain"], found["half"]
    print(
        f"{title}, {steps} steps, {steps // 2} guided, medians of {rounds}: rows {rows} of {all_rows}"
        f" ({rows / all_rows:.3f}), seconds {took:.3f} of {plain:.3f} ({took / plain:.3f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    steps, rounds, device = arguments.steps, arguments.rounds, arguments.device

    report_overhead(device, max(steps, 100), rounds)
    fewer = max(3, rounds // 3)
    report_saving("mnist-unet, 10 digits", *digits(device, steps), steps, fewer)
    pipe = stable_diffusion(SMALL_SDXL_UNET, device)
    report_saving("small SDXL, random weights", pipe, sampling(pipe, steps), steps, fewer)
    if device.startswith("cuda"):
        pipe = stable_diffusion(SDXL_UNET, device, torch.bfloat16)
        report_saving("SDXL's size, bfloat16, eager", pipe, sampling(pipe, steps), steps, fewer)
        pipe.unet.compile(dynamic=False)  # once for two rows, once for one
        report_saving("SDXL's size, bfloat16, compiled", pipe, sampling(pipe, steps), steps, fewer)


if __name__ == "__main__":
    main()
