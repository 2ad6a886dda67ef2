"""`diffusers-ext upsample`."""

from pathlib import Path

import click

from ..runs.lists import INTEGERS, ListsCommand
from .options import CPU_THREADS, DEVICE, DTYPE, MODEL, SEED, TRUST_REMOTE_CODE, Steps
from .sample import sample_model


@click.command(cls=ListsCommand)
@MODEL
@click.argument("images", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="Folder for the images and manifest.json; new, or one to go on in.",
)  # fmt: skip
@click.option("--format", type=click.Choice(["png", "zip", "npz"]), default="png", show_default=True)
@click.option(
    "--class-labels", type=INTEGERS, default=None,
    help="Of the images, gone through in turn; by default those of the npz.",
)  # fmt: skip
@click.option(
    "--num-inference-steps", type=Steps(), default=250, show_default=True,
    help='Or a respacing, "10,10,5" or "ddim25".',
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Image i is drawn with seed + i.")
@DEVICE
@DTYPE
@CPU_THREADS
@TRUST_REMOTE_CODE
def upsample(
    model, images, output, format, class_labels, num_inference_steps, batch_size, seed, device, dtype, cpu_threads,
    trust_remote_code,
):  # fmt: skip
    """Enlarge IMAGES with MODEL, an upsampler, into a folder.

    MODEL is a folder or a Hub id, as `convert guided-diffusion` writes it; IMAGES an .npz, a folder or a zip, as
    `sample` writes them. The same command goes on after an interruption, and runs on many processes as `sample` does.
    """
    from ..evaluation import read_images

    small, labels = read_images(images)
    sample_model(
        model, "adm-upsampler", output, device, dtype, trust_remote_code, count=len(small),
        labels=labels if class_labels is None else class_labels, images=small, seed=seed, batch_size=batch_size,
        format=format, cpu_threads=cpu_threads, num_inference_steps=num_inference_steps,
    )  # fmt: skip
