"""EDM2's forward pass with weights normalised once, against normalising them at each forward; and images per second.

    python benchmarks/edm2_forward.py                                           # CPU, EDM2-XS, batch 1
    python benchmarks/edm2_forward.py --device cuda --dtype float16 --compile --batch-size 32
    python benchmarks/edm2_forward.py --device cuda --dtype float16 --compile --batch-size 32 --images
    python benchmarks/edm2_forward.py --batch-size 32 --rounds 2 --images --from-evaluations       # a slow machine

The two networks have the same random weights and differ in their layers alone: the plain one computes
w / (rms(w) + 1e-4) * gain / sqrt(fan-in) each time, as in the equations; ours is timed inside of `constant_weights`,
as in a call of `EDM2Pipeline`, after a forward that fills it. Compiled, both normalise in the graph. They are timed in
turn; printed are medians over the rounds, and of the ratios round by round. `--images` samples 32 steps without
guidance, with guidance in every step, and with guidance in 6 steps (17 to 22); `--from-evaluations` times an
evaluation of each network instead and multiplies by the evaluations of such a sampling, which leaves out the
scheduler's arithmetic.
"""

import copy
import math
import statistics
import time
from functools import partial

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from diffusers_ext import EDM2Pipeline, EDM2UNet2DModel, EDMHeunScheduler
from diffusers_ext.models import EDM2_PRESETS
from diffusers_ext.models.edm2_unet import MPLayer


class PlainLayer(nn.Module):
    """Linear layer or convolution from the equations, with nothing kept between calls."""

    def __init__(self, layer: MPLayer):
        super().__init__()
        self.weight, self.gain = layer.weight, layer.gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight.float()
        rms = w.flatten(1).norm(dim=1) / math.sqrt(w[0].numel())
        w = w / (rms + 1e-4).reshape(-1, *[1] * (w.ndim - 1))
        w = (w * ((1 if self.gain is None else self.gain) / math.sqrt(w[0].numel()))).to(x.dtype)
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


def plain_copy(model: EDM2UNet2DModel) -> EDM2UNet2DModel:
    """The same network with PlainLayers."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, MPLayer):
            parent, _, last = name.rpartition(".")
            parent = model.get_submodule(parent)
            (parent.__setitem__ if isinstance(parent, nn.ModuleDict) else parent.__setattr__)(last, PlainLayer(module))
    return model


def random_network(preset: str, device: str, dtype: torch.dtype, **config) -> EDM2UNet2DModel:
    """Random weights, and gains that are not 0 as before training."""
    torch.manual_seed(0)
    with torch.device(device):
        model = EDM2UNet2DModel.from_preset(preset, **config)
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            parameter.data.fill_(0.5)
    return model.to(dtype).eval().requires_grad_(False)


def seconds(function, device: str) -> float:
    started = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def compare_forward(preset, device, dtype, compiled, batch_size, rounds, console):
    """Print seconds a forward of both networks, and their ratio."""
    model = random_network(preset, device, dtype)
    networks = [plain_copy(model), model]
    x = torch.randn(batch_size, model.config.img_channels, 64, 64, device=device)
    sigma, labels = torch.ones(1, device=device), torch.zeros(batch_size, dtype=torch.long, device=device)
    outputs = [network(x, sigma, labels).sample for network in networks]
    difference = (outputs[0] - outputs[1]).abs().max().item()
    if compiled:
        networks = [torch.compile(network) for network in networks]
    calls = [lambda network=network: network(x, sigma, labels).sample for network in networks]
    with model.constant_weights():
        for call in calls * 3:  # warms up, compiles, and fills the block
            seconds(call, device)
        pairs = [[seconds(call, device) for call in calls] for _ in range(rounds)]
    each, once = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    console.print(
        f"{preset}, batch {batch_size}, {dtype}, {device}{', compiled' if compiled else ''}:"
        f" each time {each * 1e3:.1f} ms, once {once * 1e3:.1f} ms, ratio {ratio:.2f};"
        f" outputs differ by at most {difference:.1e}"
    )


@torch.no_grad()
def count_from_evaluations(preset, device, networks, batch_size, rounds, console):
    """Print images per second as the evaluations of 32 Heun steps take them."""
    x, sigma = torch.randn(batch_size, networks[0].config.img_channels, 64, 64, device=device), torch.ones(1)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    conditional, other = networks
    calls = [lambda: conditional(x, sigma.to(device), labels).sample, lambda: other(x, sigma.to(device)).sample]
    with conditional.constant_weights(), other.constant_weights():
        times = [[seconds(call, device) for call in calls] for _ in range(rounds + 1)][1:]
    main_time, guidance_time = (statistics.median(column) for column in zip(*times, strict=True))
    console.print(f"{preset}: an evaluation of {batch_size} takes {main_time:.2f} s, the other {guidance_time:.2f} s")
    for name, guided in {"no guidance": 0, "guidance in every step": 63, "guidance in steps 17 to 22": 12}.items():
        images = batch_size / (63 * main_time + guided * guidance_time)
        console.print(f"{preset}, {name}: {images:.4f} images/s from 63 + {guided} evaluations")


def count_images(preset, device, dtype, compiled, batch_size, rounds, console, from_evaluations):
    """Print images per second of the sampler, without decoding."""
    smallest = "edm2-img512-xs" if "img512" in preset else "edm2-img64-s"
    networks = [random_network(preset, device, dtype), random_network(smallest, device, dtype, label_dim=0)]
    if compiled:
        for network in networks:
            network.compile()
    if from_evaluations:
        return count_from_evaluations(preset, device, networks, batch_size, rounds, console)
    pipe = EDM2Pipeline(networks[0], EDMHeunScheduler(), guidance_unet=networks[1])
    pipe.set_progress_bar_config(disable=True)
    for name, options in {
        "no guidance": {},
        "guidance in every step": {"guidance_scale": 1.4},
        "guidance in steps 17 to 22": {"guidance_scale": 2.0, "guided_steps": (17, 22)},
    }.items():
        call = lambda options=options: pipe(  # noqa: E731
            class_labels=list(range(batch_size)), output_type="latent", num_inference_steps=32, **options
        )
        times = [seconds(call, device) for _ in range(rounds + 1)][1:]
        console.print(
            f"{preset}, {name}: {batch_size / statistics.median(times):.2f} images/s, {pipe.num_evaluations}"
        )


@click.command()
@click.option("--preset", type=click.Choice(list(EDM2_PRESETS)), default="edm2-img512-xs", show_default=True)
@click.option("--batch-size", default=1, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile both.")
@click.option("--images", is_flag=True, help="Images per second instead.")
@click.option("--from-evaluations", is_flag=True, help="With --images: from the time of one evaluation.")
def main(preset, batch_size, rounds, device, dtype, compiled, images, from_evaluations):
    """Time EDM2 with random weights."""
    measure = partial(count_images, from_evaluations=from_evaluations) if images else compare_forward
    measure(preset, device, getattr(torch, dtype), compiled, batch_size, rounds, Console(soft_wrap=True))


if __name__ == "__main__":
    main()
