"""The `diffusers-ext` command. Each command imports what it needs when it runs."""

from pathlib import Path

import click

from . import __version__


class FriendlyGroup(click.Group):
    """Shows bad input, missing files and missing optional packages as one line; the rest keeps its traceback."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (ValueError, ImportError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=FriendlyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="diffusers-ext")
def main():
    """Research methods for diffusers, on shipped models and on yours."""


@main.command()
def info():
    """Versions, devices, usable attention backends and shipped models of this machine."""
    from .info import print_info

    print_info()


@main.command()
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("out"), show_default=True,
    help="Folder for the picture and the numbers.",
)  # fmt: skip
@click.option("--device", default=None, help="torch device; by default the fastest one here.")
def demo(output, device):
    """Sample the shipped MNIST model plainly and with Boost-and-Skip; picture and numbers."""
    from .demo import run_demo

    run_demo(output, device)


@main.command()
@click.argument("model")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="New folder for the PNG files and settings.json.",
)  # fmt: skip
@click.option(
    "--pipeline", type=click.Choice(["boost-and-skip"]), default=None,
    help="Sample the model with this pipeline; by default with its own.",
)  # fmt: skip
@click.option("--gamma", type=float, default=None, help="Boost-and-Skip: factor on the initial noise.")
@click.option("--skip-steps", type=int, default=None, help="Boost-and-Skip: first steps to drop.")
@click.option("--num-samples", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--num-inference-steps", type=click.IntRange(min=1), default=50, show_default=True)
@click.option(
    "--class-labels", default=None, metavar="0,1,...",
    help="Labels to go through in turn; by default every class of a conditional model.",
)  # fmt: skip
@click.option("--guidance-scale", type=float, default=None, help="1 is off.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Image i is drawn with seed + i.")
@click.option("--device", default=None, help="torch device; by default the fastest one here.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
@click.option("--trust-remote-code", is_flag=True, help="Run the .py files of MODEL's repository while loading it.")
def sample(
    model, output, pipeline, gamma, skip_steps, num_samples, num_inference_steps, class_labels, guidance_scale,
    batch_size, seed, device, dtype, trust_remote_code,
):  # fmt: skip
    """Draw images from MODEL into a folder.

    MODEL is the name of a shipped model, a folder or a Hub id.
    """
    import torch

    from .hub import new_folder
    from .info import best_device
    from .sampling import cycled_labels, sample_to_folder
    from .shipped import load_pipeline

    new_folder(output)  # before a large model is loaded
    pipe = load_pipeline(model, pipeline, trust_remote_code=trust_remote_code)
    pipe.to(device or best_device(), getattr(torch, dtype))
    asked = None if class_labels is None else [int(label) for label in class_labels.split(",")]
    call = {"gamma": gamma, "skip_steps": skip_steps, "guidance_scale": guidance_scale}
    call = {name: value for name, value in call.items() if value is not None}
    sample_to_folder(
        pipe, output, num_samples, cycled_labels(pipe, num_samples, asked), seed, batch_size,
        num_inference_steps=num_inference_steps, **call,
    )  # fmt: skip
    click.echo(f"wrote {num_samples} images and settings.json to {output}")


@main.command()
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--pipeline", type=click.Choice(["boost-and-skip"]), default=None,
    help="Export the model under this pipeline; by default under its own.",
)  # fmt: skip
@click.option("--license", default=None, help='SPDX identifier for the model card, such as "apache-2.0".')
@click.option("--trust-remote-code", is_flag=True, help="Run the .py files of MODEL's repository while loading it.")
def export(model, output, pipeline, license, trust_remote_code):
    """Write MODEL as a folder that loads with diffusers alone.

    MODEL is the name of a shipped model, a folder or a Hub id; OUTPUT a new folder.
    """
    from .hub import export_pipeline, new_folder
    from .shipped import load_pipeline

    new_folder(output)  # before a large model is loaded
    loaded = load_pipeline(model, pipeline, trust_remote_code=trust_remote_code)
    click.echo(f"wrote {export_pipeline(loaded, output, license)}")


@main.group()
def convert():
    """Turn original checkpoints into folders that diffusers loads."""


@convert.command(
    "guided-diffusion", context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
)
@click.argument("checkpoint", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--preset", default=None, help="Flags of a published checkpoint; an unknown name lists them.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True, help="Of the weights."
)
@click.option(
    "--check-steps", type=click.IntRange(min=0), default=3, show_default=True,
    help="Steps to sample with the checkpoint's own tensors and with the result; 0 checks nothing.",
)  # fmt: skip
def convert_guided_diffusion_command(checkpoint, output, flags, preset, dtype, check_steps):
    """Write CHECKPOINT, a guided-diffusion .pt file, to the new folder OUTPUT.

    FLAGS are those of the original command line, as they stand there: --image_size 64 --num_channels 192 ... What the
    tensors show may be left out.
    """
    import torch

    from .checkpoints import convert_guided_diffusion
    from .checkpoints.guided_diffusion import parse_flags

    weights = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    pipeline, error = convert_guided_diffusion(checkpoint, output, preset, weights, check_steps, **parse_flags(flags))
    if error is not None:
        click.echo(f"largest difference to the checkpoint over {check_steps} steps in float32: {error:.1e}")
    click.echo(f"wrote {type(pipeline).__name__} with {type(pipeline.unet).__name__} to {output}")


if __name__ == "__main__":
    main()
