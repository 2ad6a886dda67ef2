"""Train the MNIST classifier of diffusers_ext/assets/mnist-classifier and record its reference features.

    accelerate launch recipes/train_mnist_classifier.py --data mnist.npz --output out/mnist-classifier

The folder holds the classifier (fp16), and reference.safetensors: mean and covariance (float64) of the
penultimate features over all 60,000 training images, and the features (fp16) and labels of the first 10,000,
against which the demo measures neighbour distances. The features are those of the weights as saved. An interrupted
run goes on after its last whole epoch.

Metric reached by the shipped run: see diffusers_ext/assets/mnist-classifier/README.md.
"""

import math
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_file

from diffusers_ext.flow.features import as_unit
from diffusers_ext.models import ImageClassifier
from diffusers_ext.runs.bar import steps_left
from diffusers_ext.runs.checkpoints import Checkpoints
from diffusers_ext.runs.processes import end_processes
from diffusers_ext.runs.provenance import hash_of

REFERENCE_IMAGES = 10_000


def load_split(path: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 28, 28) in [-1, 1] and labels (N,) of the split "train" or "test"."""
    with np.load(path) as data:
        images, labels = data[f"x_{split}"], data[f"y_{split}"]
    return torch.from_numpy(images).unsqueeze(1) / 127.5 - 1, torch.from_numpy(labels).long()


def jitter(images: torch.Tensor) -> torch.Tensor:
    """Rotate by up to 10 degrees, scale by up to 10 % and shift by up to 2 pixels, each image on its own."""
    batch, size = len(images), images.shape[-1]
    angle = (torch.rand(batch, device=images.device) * 2 - 1) * math.radians(10)
    scale = 1 + (torch.rand(batch, device=images.device) * 2 - 1) * 0.1
    shift = (torch.rand(batch, 2, device=images.device) * 2 - 1) * (4 / size)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


@torch.no_grad()
def predict(model: ImageClassifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and features of many images, in batches."""
    model.eval()
    outputs = [model(as_unit(chunk.to(model.device))) for chunk in images.split(500)]
    return torch.cat([o.logits for o in outputs]).cpu(), torch.cat([o.features for o in outputs]).cpu()


def save_reference(model: ImageClassifier, images: torch.Tensor, labels: torch.Tensor, path: Path) -> None:
    """Feature statistics of the training set and the features of its first images."""
    features = predict(model, images)[1].double()
    reference = {
        "mean": features.mean(0),
        "covariance": torch.cov(features.T),
        "features": features[:REFERENCE_IMAGES].half(),
        "labels": labels[:REFERENCE_IMAGES].to(torch.uint8),
    }
    save_file({name: tensor.contiguous() for name, tensor in reference.items()}, path)


def train(
    build: Callable[[], ImageClassifier], images: torch.Tensor, labels: torch.Tensor, output: Path, *, epochs: int,
    batch_size: int, lr: float, seed: int, augment: Callable[[torch.Tensor], torch.Tensor] = jitter,
    mixed_precision: str | None = None,
) -> ImageClassifier:  # fmt: skip
    """Train a classifier, and write it and the reference features; goes on after the last whole epoch.

    build: makes the network, after seeding. images: (count, channels, height, width), uint8 or in [-1, 1]. labels:
    (count,) int64. augment: gives other images (batch, ...) in [-1, 1] of the same classes. mixed_precision: None is
    what the launcher was told.
    """
    if len(images) < batch_size:
        raise ValueError(
            f"{len(images)} images do not fill a batch of {batch_size}; give a smaller one, or more images"
        )
    accelerator = Accelerator(mixed_precision=mixed_precision)
    set_seed(seed)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = len(images) // batch_size  # of an epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)

    settings = {
        "data": hash_of(images, labels), "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed,
        "mixed_precision": accelerator.mixed_precision,
    }  # fmt: skip
    checkpoints = Checkpoints(accelerator, output, settings)
    first, _ = checkpoints.load(epochs)
    for step in steps_left(first * steps, epochs * steps, accelerator.is_main_process):
        if step % steps == 0:
            model.train()
            epoch = torch.randperm(len(images)).split(batch_size)
        rows = epoch[step % steps]
        logits = model(augment(as_unit(images[rows].to(accelerator.device)))).logits
        loss = F.cross_entropy(logits, labels[rows].to(accelerator.device), label_smoothing=0.05)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % steps == 0:
            checkpoints.save((step + 1) // steps)

    accelerator.unwrap_model(model).half().save_pretrained(output)
    saved = ImageClassifier.from_pretrained(output).to(accelerator.device)
    save_reference(saved, images, labels, output / "reference.safetensors")
    end_processes(accelerator)
    return saved


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="mnist.npz")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--epochs", default=8, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--lr", default=3e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(data, output, epochs, batch_size, lr, seed):
    """Train a small classifier on MNIST and record its reference features."""
    images, labels = load_split(data, "train")
    model = train(ImageClassifier, images, labels, output, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    test_images, test_labels = load_split(data, "test")
    accuracy = (predict(model, test_images)[0].argmax(1) == test_labels).double().mean().item()
    click.echo(f"test accuracy {accuracy:.4f}, {sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    main()
