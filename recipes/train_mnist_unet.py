"""Train the class-conditional MNIST UNet that ships in diffusers_ext/assets/mnist-unet.

    accelerate launch recipes/train_mnist_unet.py --data mnist.npz --output out/mnist-unet --mixed-precision bf16

A diffusers `UNet2DModel` on 28x28 pixels in [-1, 1], v prediction on the cosine DDPM schedule. One label in
ten is replaced by the null class (index 10), which is what classifier-free guidance needs. The saved weights
are an exponential moving average. `--data` is an .npz with `x_train` (60000, 28, 28) uint8 and `y_train`, as
Keras and many mirrors distribute it. An interrupted run goes on from its last checkpoint.

Metric reached by the shipped run: see diffusers_ext/assets/mnist-unet/README.md.
"""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, ModelMixin, UNet2DModel
from diffusers.training_utils import EMAModel

from diffusers_ext import BoostAndSkipPipeline
from diffusers_ext.flow.features import as_unit
from diffusers_ext.runs.bar import steps_left
from diffusers_ext.runs.checkpoints import Checkpoints
from diffusers_ext.runs.processes import Processes, end_processes
from diffusers_ext.runs.provenance import hash_of

NULL_CLASS = 10


def build_unet() -> UNet2DModel:
    """A UNet of 1.7 million parameters: 28x28 pixels at 24 channels, 14x14 at 64, 7x7 at 96."""
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=NULL_CLASS + 1,
    )


def load_images(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 28, 28) in [-1, 1] float32 and labels (N,) int64 of the training set."""
    with np.load(path) as data:
        images, labels = data["x_train"], data["y_train"]
    return torch.from_numpy(images).unsqueeze(1) / 127.5 - 1, torch.from_numpy(labels).long()


class Budget:
    """How many steps a training has room for: so many, or what minutes allow, where they end sooner.

    The minutes are those of all starts together, by the clock of the main process, as each needs the same answer.
    """

    def __init__(self, steps: int, minutes: float | None, seconds: float, processes: Processes):
        self.most, self.minutes, self.processes = steps, minutes, processes
        self.began = time.monotonic() - seconds  # of earlier starts

    @property
    def seconds(self) -> float:
        """Used so far."""
        return time.monotonic() - self.began

    def steps(self, done: int) -> float:
        """In all, at the pace of those that are done."""
        if self.minutes is None or done == 0:
            return self.most
        return min(self.most, self.processes.agreed(lambda: done * 60 * self.minutes / self.seconds))


def learning_rate(step: int, steps: float, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def loss_of(unet, scheduler: DDPMScheduler, images: torch.Tensor, labels: torch.Tensor, drop: float) -> torch.Tensor:
    """Mean squared error of the velocity v = sqrt(abar) eps - sqrt(1 - abar) x0 at uniform timesteps."""
    noise = torch.randn_like(images)
    timesteps = torch.randint(0, len(scheduler), (len(images),), device=images.device)
    dropped = torch.rand(len(labels), device=labels.device) < drop
    labels = labels.masked_fill(dropped, NULL_CLASS)
    target = scheduler.get_velocity(images, noise, timesteps)
    prediction = unet(scheduler.add_noise(images, noise, timesteps), timesteps, class_labels=labels).sample
    return F.mse_loss(prediction.float(), target)


def save_pipeline(unet: ModelMixin, ema: EMAModel, scheduler: DDPMScheduler, output: Path) -> None:
    """Write the averaged weights in fp16 as a Hub-layout folder: unet/, scheduler/, model_index.json."""
    averaged = deepcopy(unet)
    ema.copy_to(averaged.parameters())
    BoostAndSkipPipeline(averaged.half(), scheduler, null_class=NULL_CLASS).save_pretrained(output)


def train(
    build: Callable[[], ModelMixin], images: torch.Tensor, labels: torch.Tensor, output: Path, *, steps: int,
    batch_size: int, lr: float, label_dropout: float, ema_decay: float, mixed_precision: str, seed: int,
    checkpoint_every: int, minutes: float | None = None,
) -> None:  # fmt: skip
    """Train a network of ten classes and the null class, and write the pipeline; goes on from the last checkpoint.

    build: makes the network, after seeding. images: (count, channels, size, size), uint8 or in [-1, 1]. labels:
    (count,) int64. minutes: end after so many, if that is before `steps`; the learning rate falls with the sooner one.
    """
    accelerator = Accelerator(mixed_precision=mixed_precision)
    set_seed(seed, device_specific=True)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    unet = build()
    ema = EMAModel(unet.parameters(), decay=ema_decay, foreach=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)

    settings = {
        "data": hash_of(images, labels), "batch_size": batch_size, "lr": lr, "label_dropout": label_dropout,
        "ema_decay": ema_decay, "mixed_precision": mixed_precision, "seed": seed,
    }  # fmt: skip
    checkpoints = Checkpoints(accelerator, output, settings)
    first, history = checkpoints.load(steps)
    budget = Budget(steps, minutes, history[0] if history else 0.0, Processes(accelerator))
    if first >= budget.steps(first):
        steps = first

    done, running = first, None
    for step in steps_left(first, steps, accelerator.is_main_process, lambda: running):  # noqa: B023, the latest
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, budget.steps(step), lr)
        rows = torch.randint(0, len(images), (batch_size,))
        batch, classes = as_unit(images[rows].to(accelerator.device)), labels[rows].to(accelerator.device)
        loss = loss_of(unet, scheduler, batch, classes, label_dropout)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        now = loss.item()
        running = now if running is None else 0.99 * running + 0.01 * now
        done, over = step + 1, step + 1 >= budget.steps(step + 1)
        if done % checkpoint_every == 0 or over:
            checkpoints.save(done, [budget.seconds])
        if over:
            break
    if accelerator.is_main_process:
        save_pipeline(accelerator.unwrap_model(unet), ema, scheduler, output)
    seconds = budget.seconds - (history[0] if history else 0.0)
    accelerator.print(f"{done - first} steps in {seconds:.0f} s, running loss {running}")
    end_processes(accelerator)


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="mnist.npz")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--steps", default=4500, show_default=True)
@click.option("--batch-size", default=128, show_default=True, help="Images a step and process.")
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--label-dropout", default=0.1, show_default=True)
@click.option("--ema-decay", default=0.999, show_default=True)
@click.option("--mixed-precision", type=click.Choice(["no", "bf16"]), default="no", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--checkpoint-every", default=250, show_default=True, help="Steps between checkpoints.")
def main(data, output, steps, batch_size, lr, label_dropout, ema_decay, mixed_precision, seed, checkpoint_every):
    """Train a class-conditional UNet on MNIST."""
    images, labels = load_images(data)
    train(
        build_unet, images, labels, output, steps=steps, batch_size=batch_size, lr=lr, label_dropout=label_dropout,
        ema_decay=ema_decay, mixed_precision=mixed_precision, seed=seed, checkpoint_every=checkpoint_every,
    )  # fmt: skip


if __name__ == "__main__":
    main()
