r"""Train two small EDM2 networks on MNIST, one with labels and one without, and join them in a pipeline.

    python recipes/train_edm2_mnist.py train --data mnist.npz --output out/cond
    python recipes/train_edm2_mnist.py train --data mnist.npz --output out/uncond --unconditional
    python recipes/train_edm2_mnist.py join out/cond out/uncond out/mnist-edm2

Training is that of EDM2 (Karras et al., CVPR 2024, arXiv 2312.02696): forced weight normalisation, Adam, a learning
rate that falls with the inverse square root of the step, a power-function average of the weights, and the loss

.. math:: \frac{\lambda(\sigma)}{e^{u(\sigma)}} \|D(y + n; \sigma, c) - y\|^2 + u(\sigma), \quad
    \lambda = \frac{\sigma^2 + \sigma_{data}^2}{(\sigma \sigma_{data})^2}, \quad \ln \sigma \sim N(P_{mean}, P_{std}^2)

with the network's uncertainty u and the norm as a mean over pixels. Pixels are in [-1, 1] and sigma_data is their root
mean square, for which the preconditioning's input and target have magnitude 1. `--data` is an .npz with `x_train`
(60000, 28, 28) uint8 and `y_train`. An interrupted run goes on from its last checkpoint.
"""

import math
import time
from pathlib import Path

import click
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.swa_utils import AveragedModel

from diffusers_ext import EDM2Pipeline, EDM2UNet2DModel, EDMHeunScheduler
from diffusers_ext.runs.bar import steps_left
from diffusers_ext.runs.checkpoints import Checkpoints
from diffusers_ext.runs.processes import end_processes
from diffusers_ext.runs.provenance import hash_of

# 28x28, 14x14 and 7x7 pixels; attention at 7x7, once. Activations of so small a network need no limit.
SHARED = {
    "img_resolution": 28,
    "img_channels": 1,
    "model_channels": 16,
    "channel_mult_noise": 2,
    "num_blocks": 1,
    "attn_resolutions": (),
    "channels_per_head": 32,
    "logvar_channels": 32,
    "clip_act": None,
}
CONDITIONAL = {**SHARED, "label_dim": 10, "channel_mult": (1, 2, 4)}  # 0.7 million parameters
UNCONDITIONAL = {**SHARED, "label_dim": 0, "channel_mult": (1, 2, 2)}  # 0.3 million parameters


def load_images(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 28, 28) in [-1, 1] float32 and labels (N,) int64 of the training set."""
    with np.load(path) as data:
        images, labels = data["x_train"], data["y_train"]
    return torch.from_numpy(images).unsqueeze(1) / 127.5 - 1, torch.from_numpy(labels).long()


def learning_rate(step: int, peak: float, reference: int, warmup: int = 200) -> float:
    """Linear warm-up to the peak, constant until the reference step, then as 1 / sqrt(step)."""
    return peak * min(1.0, (step + 1) / warmup) / math.sqrt(max(1.0, step / reference))


def power_exponent(width: float) -> float:
    r"""gamma of the averaging profile t^gamma whose standard deviation is `width` of the run (equations 121 to 126).

    .. math:: width^2 = (\gamma + 1) (\gamma + 2)^{-2} (\gamma + 3)^{-1}
    """
    inverse = width**-2
    return np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max().item()


def power_average(gamma: float):
    """Update of the averaged weights for `AveragedModel`: beta_t = (1 - 1/t)^(gamma + 1), t counted from 1."""

    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor) -> None:
        beta = (1 - 1 / (count.item() + 1)) ** (gamma + 1)
        torch._foreach_lerp_(averaged, current, 1 - beta)

    return update


def loss_of(unet, sigma_data: float, images: torch.Tensor, labels, p_mean: float, p_std: float) -> torch.Tensor:
    """The loss above for a batch of images (batch, 1, height, width); labels (batch,) or None."""
    sigma = (p_mean + p_std * torch.randn(len(images), 1, 1, 1, device=images.device)).exp()
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    noisy = images + sigma * torch.randn_like(images)
    denoised, logvar = unet(noisy, sigma.flatten(), labels, return_logvar=True, return_dict=False)
    error = (denoised - images).square().mean(dim=(1, 2, 3), keepdim=True)
    return (weight / logvar.exp() * error + logvar).mean()


@click.group()
def main():
    """Train small EDM2 networks on MNIST and join them in a pipeline."""


@main.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="mnist.npz")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--unconditional", is_flag=True, help="The smaller network without labels, for guidance.")
@click.option("--steps", default=6000, show_default=True)
@click.option("--batch-size", default=64, show_default=True, help="Images a step and process.")
@click.option("--lr", default=1e-2, show_default=True)
@click.option("--lr-reference", default=1000, show_default=True, help="Step from which the learning rate falls.")
@click.option("--p-mean", default=-0.4, show_default=True, help="Mean of ln sigma.")
@click.option("--p-std", default=1.0, show_default=True, help="Standard deviation of ln sigma.")
@click.option("--ema-std", default=0.1, show_default=True, help="Width of the weights' average, as part of the run.")
@click.option("--mixed-precision", type=click.Choice(["no", "bf16"]), default="no", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--checkpoint-every", default=250, show_default=True, help="Steps between checkpoints.")
def train(
    data, output, unconditional, steps, batch_size, lr, lr_reference, p_mean, p_std, ema_std, mixed_precision, seed,
    checkpoint_every,
):  # fmt: skip
    """Train one network; OUTPUT/unet holds its averaged weights in float32."""
    accelerator = Accelerator(mixed_precision=mixed_precision)
    set_seed(seed, device_specific=True)
    images, labels = load_images(data)
    sigma_data = round(images.square().mean().sqrt().item(), 4)
    unet = EDM2UNet2DModel(**(UNCONDITIONAL if unconditional else CONDITIONAL), sigma_data=sigma_data)
    unet = unet.to(accelerator.device, memory_format=torch.channels_last).train()
    averaged = AveragedModel(unet, multi_avg_fn=power_average(power_exponent(ema_std)))
    optimizer = torch.optim.Adam(unet.parameters(), lr=lr, betas=(0.9, 0.99))
    unet, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(averaged)

    settings = {
        "data": hash_of(images, labels), "unconditional": unconditional, "batch_size": batch_size, "lr": lr,
        "lr_reference": lr_reference, "p_mean": p_mean, "p_std": p_std, "ema_std": ema_std,
        "mixed_precision": mixed_precision, "seed": seed,
    }  # fmt: skip
    checkpoints = Checkpoints(accelerator, output, settings)
    first, _ = checkpoints.load(steps)

    started, running = time.monotonic(), None
    for step in steps_left(first, steps, accelerator.is_main_process, lambda: running):  # noqa: B023, the latest
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, lr, lr_reference)
        rows = torch.randint(0, len(images), (batch_size,))
        batch = images[rows].to(accelerator.device)
        classes = None if unconditional else labels[rows].to(accelerator.device)
        loss = loss_of(unet, sigma_data, batch, classes, p_mean, p_std)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(accelerator.unwrap_model(unet))
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            checkpoints.save(step + 1)
    if accelerator.is_main_process:
        averaged.module.to(memory_format=torch.contiguous_format).eval().save_pretrained(output / "unet")
    accelerator.print(f"{steps - first} steps in {time.monotonic() - started:.0f} s, running loss {running}")
    end_processes(accelerator)


@main.command()
@click.argument("conditional", type=click.Path(path_type=Path, exists=True))
@click.argument("unconditional", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
def join(conditional, unconditional, output):
    """Write the two trained networks of the folders CONDITIONAL and UNCONDITIONAL as an EDM2Pipeline in float16."""
    unet, guidance_unet = (
        EDM2UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float16)
        for folder in (conditional, unconditional)
    )
    pipe = EDM2Pipeline(unet, EDMHeunScheduler(), guidance_unet=guidance_unet)
    pipe.save_pretrained(output)
    click.echo(f"{sum(p.numel() for net in (unet, guidance_unet) for p in net.parameters()):,} parameters in {output}")


if __name__ == "__main__":
    main()
