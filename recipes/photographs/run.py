"""The four image methods on photographs: CIFAR-10, class-conditional at 32 x 32, in one command. Made for a GPU.

    python recipes/photographs/run.py cifar10.npz --output out/photographs

DATA is an .npz with encoded files one after the other, train_bytes, train_offsets (count + 1,) and train_labels, and
the same of test; or x_train (50000, 32, 32, 3), y_train and so on, as Keras has it. The data name no licence, so
neither they nor weights trained on them are part of this repository.

Trained, one after the other: a classifier, whose features and classes the tables need; a transformer of 10.7 million
weights on patches of 4 x 4 pixels, v prediction on the cosine DDPM schedule with a tenth of the labels dropped; and a
flow that repairs its guided samples. `--minutes` is the budget of the transformer, with the learning rate falling as
it is used up; the defaults are meant for ten minutes of a large GPU in all, which nobody has measured.

Everything goes on after an interruption: training from its last checkpoint, tables after the last row. In OUTPUT:
tables.json (mean and standard error over the seeds, the command, the seconds), results.json (every row), a picture of
each table, and the trained networks. Fréchet distance, precision, recall and neighbours are in the features of the
classifier trained here, so compare within one OUTPUT only.
"""

import sys
import time
from pathlib import Path

import click
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipes whose pieces this one shares
import train_mnist_classifier
import train_mnist_unet
from classifier_centric.cifar10 import decode
from photographs.classifier import Judge, build_classifier, flip_and_shift
from photographs.network import build_network
from photographs.tables import SCALES, STEPS, Studio, measured_tables

from diffusers_ext import BoostAndSkipPipeline, FlowPostprocessingPipeline
from diffusers_ext.flow import (
    channels_first,
    draw_base_samples,
    save_flow,
    train_postprocessing_flow,
    velocity_network,
)
from diffusers_ext.machine.versions import package_versions
from diffusers_ext.runs.files import write_json

FLOW_CHANNELS = (64, 128, 192)


def read_split(data: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (count, 3, 32, 32) and labels int64 (count,)."""
    pixels, labels = decode(data, split)
    return channels_first(pixels), torch.from_numpy(labels).long()


def train_flow(base, judge: Judge, real: torch.Tensor, output: Path, accelerator, *, samples, batch_size, steps, seed):
    """A flow for all scales of the table, with samples of the first one kept; the pipeline."""
    with accelerator.autocast():
        drawn, labels = draw_base_samples(
            base, output / "samples", SCALES, samples, None, STEPS["guidance"], seed, batch_size
        )
    torch.manual_seed(seed)
    trained = train_postprocessing_flow(
        drawn, real, min(20, len(real)), model=velocity_network(real[:1], 10, FLOW_CHANNELS), steps=steps,
        output=output / "training", sample_labels=labels, features=judge.flow_features(real[:10_000]), balance=True,
        keep=torch.arange(len(drawn)) < samples, batch_size=min(128, batch_size), learning_rate=1e-3, ema_decay=0.999,
        mixed_precision=accelerator.mixed_precision, seed=seed,
    )  # fmt: skip
    save_flow(trained.model, output / "pipeline")
    return FlowPostprocessingPipeline.from_pretrained(output / "pipeline").to(accelerator.device)


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--minutes", default=4.0, show_default=True, help="Budget of the transformer's training.")
@click.option("--steps", default=100_000, show_default=True, help="Its steps, if they end before the minutes.")
@click.option(
    "--batch-size", default=512, show_default=True, help="Of training and of sampling; at most 128 for the flow."
)
@click.option("--lr", default=5e-4, show_default=True, help="Of the transformer.")
@click.option("--classifier-epochs", default=10, show_default=True)
@click.option("--flow-samples", default=4000, show_default=True, help="Of each scale, that the flow is trained on.")
@click.option("--flow-steps", default=2000, show_default=True)
@click.option("--samples", default=2000, show_default=True, help="Images of a row.")
@click.option("--seeds", default=3, show_default=True, help="Rows of a setting.")
@click.option("--checkpoint-every", default=1000, show_default=True, help="Steps of the transformer.")
@click.option("--mixed-precision", type=click.Choice(["no", "bf16"]), default="bf16", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the trainings.")
def main(
    data, output, minutes, steps, batch_size, lr, classifier_epochs, flow_samples, flow_steps, samples, seeds,
    checkpoint_every, mixed_precision, seed,
):  # fmt: skip
    """Train on the photographs of DATA, draw and measure every table."""
    accelerator = Accelerator(mixed_precision=mixed_precision)
    if accelerator.num_processes > 1:
        raise click.UsageError("one process draws all tables; start it without a launcher, or with one process")
    started = time.monotonic()
    images, labels = read_split(data, "train")
    train_mnist_classifier.train(
        build_classifier, images, labels, output / "classifier", epochs=classifier_epochs,
        batch_size=min(256, batch_size), lr=3e-3, seed=seed, augment=flip_and_shift, mixed_precision=mixed_precision,
    )  # fmt: skip
    judge = Judge(output / "classifier", accelerator.device)
    test, test_labels = read_split(data, "test")
    accuracy = (judge.outputs(test / 127.5 - 1)[1].cpu() == test_labels).double().mean().item()
    click.echo(f"classifier: test accuracy {accuracy:.4f}")

    train_mnist_unet.train(
        build_network, images, labels, output / "base", steps=steps, batch_size=batch_size, lr=lr, label_dropout=0.1,
        ema_decay=0.999, mixed_precision=mixed_precision, seed=seed, checkpoint_every=checkpoint_every,
        minutes=minutes,
    )  # fmt: skip
    base = BoostAndSkipPipeline.from_pretrained(output / "base").to(accelerator.device)
    flow = train_flow(
        base, judge, images, output / "flow", accelerator, samples=flow_samples, batch_size=batch_size,
        steps=flow_steps, seed=seed,
    )  # fmt: skip
    for pipe in (base, flow):
        pipe.set_progress_bar_config(disable=True)

    studio = Studio(base, flow, judge, accelerator, batch_size)
    tables = dict(measured_tables(studio, samples, seeds, output))
    facts = {
        "command": sys.argv, "samples": samples, "seeds": seeds, "steps": STEPS, "classifier_accuracy": accuracy,
        "device": str(accelerator.device), "seconds_of_this_start": time.monotonic() - started,
        "versions": package_versions(),
    }  # fmt: skip
    write_json(output / "tables.json", {**facts, "tables": tables})
    click.echo(f"tables and pictures in {output}, {facts['seconds_of_this_start']:.0f} s")


if __name__ == "__main__":
    main()
