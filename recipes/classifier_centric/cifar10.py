"""Study 4: CIFAR-10 with the paper's settings (arXiv 2503.10638). Made for a GPU, and days of it at full length.

    python recipes/classifier_centric/cifar10.py images CIFAR10.npz out/real.npz
    accelerate launch recipes/classifier_centric/cifar10.py train-base out/real.npz out/base
    accelerate launch recipes/classifier_centric/cifar10.py train-flow out/real.npz out/base out/flow
    python recipes/classifier_centric/cifar10.py measure out/real.npz out/base out/flow/pipeline out/measured

Networks as in the paper: 128 channels, multipliers 1, 2, 2, 2, attention at half the resolution with heads of 64; 2
residual blocks a resolution for the base and 4 for the flow; Adam, batch 128, 400,000 iterations, EMA 0.9999. Targets
are drawn from the 20 nearest real images by the mean of DINOv2's patch tokens, and dopri5 repairs. The base is not the
paper's: v prediction on a cosine schedule with ten per cent of labels dropped, in place of the published EDM network.
Any class-conditional pipeline of 32 x 32 images can be given as BASE.

Every command goes on after an interruption. FIDs of the paper, EDM base, before and after, at scales 1.75, 2.25, 2.5,
2.75, 3.25, 3.5, 3.75 and 4: 5.096, 8.016, 9.402, 10.75, 13.23, 14.31, 15.37, 16.34, and 5.718, 5.821, 5.936, 6.176,
6.675, 6.957, 7.202, 7.490. They are of 50,000 images and lossless data.
"""

import io
import sys
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipe whose training loop this one shares
from train_mnist_unet import NULL_CLASS, train

from diffusers_ext import FlowPostprocessingPipeline
from diffusers_ext.evaluation import evaluate_images, print_evaluation, read_images
from diffusers_ext.flow import DINOv2Features, channels_first, draw_base_samples, save_flow, train_postprocessing_flow
from diffusers_ext.machine.versions import best_device
from diffusers_ext.runs.lists import NUMBERS, ListsCommand
from diffusers_ext.sampling import to_uint8
from diffusers_ext.shipped import load_pipeline

SCALES = (1.75, 2.25, 2.5, 2.75, 3.25, 3.5, 3.75, 4.0)
SEED_OF_MEASURE = 10_000_000  # the flow was trained on samples whose seeds start at 0


def build_unet(width: int, layers: int, num_classes: int) -> UNet2DModel:
    """The paper's network at width 128: 32 x 32 RGB, attention at 16 x 16 with heads of 64 channels."""
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        layers_per_block=layers,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=min(64, 2 * width),
        norm_num_groups=min(32, width),
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=num_classes,
    )


def decode(source: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 32, 32, 3) uint8 and labels of an .npz: x_{split} and y_{split}, or files in {split}_bytes."""
    with np.load(source, allow_pickle=False) as data:
        if f"x_{split}" in data:
            return data[f"x_{split}"], data[f"y_{split}"].reshape(-1)
        files, offsets, labels = (data[f"{split}_{name}"] for name in ("bytes", "offsets", "labels"))
    pictures = (Image.open(io.BytesIO(files[a:b].tobytes())) for a, b in pairwise(offsets))
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]), labels.reshape(-1)


@click.group()
def main():
    """CIFAR-10: a base, a flow for it, and the Fréchet distance before and after."""


@main.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--split", default="train", show_default=True)
def images(source, output, split):
    """Write the images of SOURCE as the .npz that the other commands take.

    SOURCE is an .npz with x_train (50000, 32, 32, 3) and y_train, as Keras has it, or with encoded files one after the
    other in train_bytes, their bounds in train_offsets (count + 1,) and train_labels.
    """
    pixels, labels = decode(source, split)
    output.parent.mkdir(parents=True, exist_ok=True)
    np.savez(output, arr_0=pixels, arr_1=labels.astype(np.int64))
    click.echo(f"wrote {len(pixels)} images to {output}")


@main.command("train-base")
@click.argument("real", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--steps", default=400_000, show_default=True)
@click.option("--batch-size", default=128, show_default=True, help="Of each process.")
@click.option("--width", default=128, show_default=True)
@click.option("--mixed-precision", type=click.Choice(["no", "bf16"]), default="no", show_default=True)
@click.option("--seed", default=0, show_default=True)
def train_base(real, output, steps, batch_size, width, mixed_precision, seed):
    """Train a class-conditional pipeline on REAL."""
    pixels, labels = read_images(real)
    train(
        lambda: build_unet(width, 2, NULL_CLASS + 1), channels_first(pixels), torch.from_numpy(labels), output,
        steps=steps, batch_size=batch_size, lr=2e-4, label_dropout=0.1, ema_decay=0.9999,
        mixed_precision=mixed_precision, seed=seed, checkpoint_every=min(steps, 5000),
    )  # fmt: skip


@main.command("train-flow", cls=ListsCommand)
@click.argument("real", type=click.Path(path_type=Path, exists=True))
@click.argument("base")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--guidance-scales", type=NUMBERS, default=SCALES, show_default=True, help="One flow for all of them.")
@click.option("--samples", default=50_000, show_default=True, help="Of each scale.")
@click.option("--sampling-steps", default=50, show_default=True, help="Of the base.")
@click.option("--features", default="patch", show_default=True, type=click.Choice(["pixel", "cls", "patch"]))
@click.option("--features-model", default="facebook/dinov2-with-registers-base", show_default=True)
@click.option("--k", default=20, show_default=True)
@click.option("--steps", default=400_000, show_default=True)
@click.option("--batch-size", default=128, show_default=True, help="Of each process.")
@click.option("--width", default=128, show_default=True)
@click.option("--layers", default=4, show_default=True, help="Residual blocks a resolution.")
@click.option("--mixed-precision", type=click.Choice(["no", "fp16", "bf16"]), default="no", show_default=True)
@click.option("--seed", default=0, show_default=True)
def train_flow(
    real, base, output, guidance_scales, samples, sampling_steps, features, features_model, k, steps, batch_size,
    width, layers, mixed_precision, seed,
):  # fmt: skip
    """Sample BASE, pair its images with REAL ones, train a flow and write OUTPUT/pipeline."""
    accelerator = Accelerator(mixed_precision=mixed_precision)
    pixels, _ = read_images(real)
    pipe = load_pipeline(base).to(accelerator.device)
    drawn, labels = draw_base_samples(
        pipe, output / "samples", guidance_scales, samples, None, sampling_steps, seed, 256, accelerator
    )
    del pipe
    torch.manual_seed(seed)
    extractor = (
        features if features == "pixel" else DINOv2Features(features_model, features, device=accelerator.device)
    )
    trained = train_postprocessing_flow(
        drawn, channels_first(pixels), k, model=build_unet(width, layers, NULL_CLASS), steps=steps,
        output=output / "training", sample_labels=labels, features=extractor, batch_size=batch_size,
        mixed_precision=mixed_precision, checkpoint_every=min(steps, 5000), seed=seed,
    )  # fmt: skip
    if accelerator.is_main_process:
        save_flow(trained.model, output / "pipeline")


@main.command(cls=ListsCommand)
@click.argument("real", type=click.Path(path_type=Path, exists=True))
@click.argument("base")
@click.argument("flow")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--guidance-scales", type=NUMBERS, default=SCALES, show_default=True)
@click.option("--samples", default=50_000, show_default=True)
@click.option("--sampling-steps", default=50, show_default=True, help="Of the base.")
@click.option("--features", default="inception", show_default=True, help="As diffusers-ext evaluate takes them.")
@click.option("--device", default=None, help="torch device; by default the fastest one here.")
def measure(real, base, flow, output, guidance_scales, samples, sampling_steps, features, device):
    """Fréchet distance to REAL of BASE's samples, before and after FLOW repairs them with dopri5."""
    device, console = device or best_device(), Console(width=120)
    pipe, repair = load_pipeline(base).to(device), load_pipeline(flow).to(device)
    repair.set_progress_bar_config(disable=True)
    for scale in guidance_scales:
        drawn, labels = draw_base_samples(
            pipe, output / "samples", [scale], samples, None, sampling_steps, SEED_OF_MEASURE, 256
        )
        sets = {"before": output / f"before-{scale:g}.npz", "after": output / f"after-{scale:g}.npz"}
        if not sets["after"].exists():
            np.savez(sets["before"], arr_0=drawn.permute(0, 2, 3, 1).numpy())
            np.savez(sets["after"], arr_0=repaired(repair, drawn, labels))
        for name, path in sets.items():
            console.print(f"scale {scale:g}, {name}")
            print_evaluation(
                evaluate_images(path, real, features, ["frechet"], device=device, cache=output / "features"), console
            )


def repaired(flow: FlowPostprocessingPipeline, images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """uint8 (count, 32, 32, 3) of uint8 (count, 3, 32, 32) after the flow."""
    parts = []
    for batch, classes in zip(images.split(250), labels.split(250), strict=True):
        out = flow(batch, class_labels=classes, solver="dopri5", rtol=1e-4, atol=1e-4, output_type="pt").images
        parts.append(to_uint8(out, range(len(out))))
    return np.concatenate(parts)


if __name__ == "__main__":
    main()
