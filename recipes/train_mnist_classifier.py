"""Train the MNIST classifier of diffusers_ext/assets/mnist-classifier and record its reference features.

    accelerate launch recipes/train_mnist_classifier.py --data mnist.npz --output out/mnist-classifier

The folder holds the classifier (fp16), and reference.safetensors: mean and covariance (float64) of the
penultimate features over all 60,000 training images, and the features (fp16) and labels of the first 10,000,
against which the demo measures neighbour distances. The features are those of the weights as saved.

Metric reached by the shipped run: see diffusers_ext/assets/mnist-classifier/README.md.
"""

import math
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import Progress
from safetensors.torch import save_file

from diffusers_ext.models import ImageClassifier

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
    outputs = [model(chunk.to(model.device)) for chunk in images.split(500)]
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


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="mnist.npz")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--epochs", default=8, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--lr", default=3e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(data, output, epochs, batch_size, lr, seed):
    """Train a small classifier on MNIST and record its reference features."""
    accelerator = Accelerator()
    set_seed(seed)
    images, labels = load_split(data, "train")
    model = ImageClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    model, optimizer = accelerator.prepare(model, optimizer)

    bar = Progress(disable=not accelerator.is_main_process)
    bar.start()
    task = bar.add_task("training", total=steps)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(images)).split(batch_size)[: steps // epochs]:
            logits = model(jitter(images[rows].to(accelerator.device))).logits
            loss = F.cross_entropy(logits, labels[rows].to(accelerator.device), label_smoothing=0.05)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.advance(task)
    bar.stop()

    accelerator.unwrap_model(model).half().save_pretrained(output)
    saved = ImageClassifier.from_pretrained(output).to(accelerator.device)
    save_reference(saved, images, labels, output / "reference.safetensors")
    test_images, test_labels = load_split(data, "test")
    accuracy = (predict(saved, test_images)[0].argmax(1) == test_labels).double().mean().item()
    accelerator.print(f"test accuracy {accuracy:.4f}, {sum(p.numel() for p in saved.parameters())} parameters")


if __name__ == "__main__":
    main()
