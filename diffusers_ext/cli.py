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


class Steps(click.ParamType):
    """A number of steps >= 1, or a respacing such as "10,10,5" or "ddim25", which goes to the pipeline as it is."""

    name = "N|RESPACING"

    def convert(self, value, param, ctx):
        try:
            steps = int(value)
        except ValueError:
            return value
        if steps < 1:
            self.fail(f"{steps} is not >= 1", param, ctx)
        return steps


class Listed(click.ParamType):
    """Numbers of one type between commas."""

    def __init__(self, number: type, name: str):
        self.number, self.name = number, name

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        try:
            return [self.number(part) for part in value.split(",")]
        except ValueError:
            kind = "integers" if self.number is int else "numbers"
            self.fail(f"{value!r} is not {kind} between commas", param, ctx)


INTEGERS, NUMBERS = Listed(int, "0,1,..."), Listed(float, "1.5,2,...")


def _prompts(ctx, param, path: Path | None) -> list[str] | None:
    """The lines of a file that hold anything."""
    if path is None:
        return None
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise click.BadParameter(f"{path} holds no prompt")
    return lines


@main.command()
@click.argument("model")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="Folder for the images and manifest.json; new, or one to go on in.",
)  # fmt: skip
@click.option("--format", type=click.Choice(["png", "zip", "npz"]), default="png", show_default=True)
@click.option(
    "--pipeline", type=click.Choice(["boost-and-skip"]), default=None,
    help="Sample the model with this pipeline; by default with its own.",
)  # fmt: skip
@click.option("--gamma", type=float, default=None, help="Boost-and-Skip: factor on the initial noise.")
@click.option("--skip-steps", type=int, default=None, help="Boost-and-Skip: first steps to drop.")
@click.option("--num-samples", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--num-inference-steps", type=Steps(), default=50, show_default=True,
    help='Or a respacing, "10,10,5" or "ddim25", for pipelines that take one.',
)  # fmt: skip
@click.option(
    "--class-labels", type=INTEGERS, default=None,
    help="Labels to go through in turn; by default every class of a conditional model.",
)  # fmt: skip
@click.option("--random-labels", is_flag=True, help="A random class for each image, from its seed.")
@click.option("--prompt", default=None, metavar="TEXT", help="For text-to-image models.")
@click.option(
    "--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False), default=None, callback=_prompts,
    help="File of prompts to go through in turn, one a line.",
)  # fmt: skip
@click.option("--guidance-scale", type=float, default=None, help="1 is off.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Image i is drawn with seed + i.")
@click.option("--device", default=None, help="torch device; by default the fastest one here.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
@click.option(
    "--cpu-threads", type=click.IntRange(min=1), default=1, show_default=True,
    help="Of each process on a CPU; round-off depends on it. Many processes use many cores better.",
)  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run the .py files of MODEL's repository while loading it.")
def sample(
    model, output, format, pipeline, gamma, skip_steps, num_samples, num_inference_steps, class_labels, random_labels,
    prompt, prompts, guidance_scale, batch_size, seed, device, dtype, cpu_threads, trust_remote_code,
):  # fmt: skip
    """Draw images from MODEL into a folder.

    MODEL is the name of a shipped model, a folder or a Hub id. The same command goes on after an interruption. On many
    processes: torchrun --nproc_per_node N -m diffusers_ext.cli sample MODEL ...
    """
    if class_labels is not None and random_labels:
        raise click.UsageError("give --class-labels or --random-labels, not both")
    if prompt is not None and prompts is not None:
        raise click.UsageError("give --prompt or --prompts, not both")
    call = {"gamma": gamma, "skip_steps": skip_steps, "guidance_scale": guidance_scale}
    call = {name: value for name, value in call.items() if value is not None}
    _sample_model(
        model, pipeline, output, device, dtype, trust_remote_code, count=num_samples,
        labels="random" if random_labels else class_labels, prompts=[prompt] if prompt is not None else prompts,
        seed=seed, batch_size=batch_size, format=format, cpu_threads=cpu_threads,
        num_inference_steps=num_inference_steps, **call,
    )  # fmt: skip


def _sample_model(model, pipeline, output, device, dtype, trust_remote_code, **arguments) -> None:
    """Load a pipeline on every process that was started, sample it into a folder and say what was done."""
    from contextlib import nullcontext

    import torch

    from .info import best_device
    from .processes import start_processes
    from .sampling import sample_to_folder
    from .shards import check_folder
    from .shipped import load_pipeline

    check_folder(output)  # before a large model is loaded
    device = device or best_device()
    accelerator = start_processes(device)
    if accelerator is not None and accelerator.num_processes > 1:
        device = accelerator.device
    # one after the other, since the first may download the model and copy its code
    with nullcontext() if accelerator is None else accelerator.main_process_first():
        pipe = load_pipeline(model, pipeline, trust_remote_code=trust_remote_code)
    pipe.to(device, getattr(torch, dtype))
    done = sample_to_folder(pipe, output, accelerator=accelerator, **arguments)
    if accelerator is None or accelerator.is_main_process:
        if done.was_finished:
            click.echo(f"{done.result} was finished before: {done.count} images, nothing to do")
        else:
            click.echo(f"wrote {done.count} images to {done.result}, {done.drawn} of them drawn by this start")
    if accelerator is not None:
        accelerator.end_training()


@main.command()
@click.argument("model")
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
@click.option("--seed", default=0, show_default=True, help="Image i is drawn with seed + i.")
@click.option("--device", default=None, help="torch device; by default the fastest one here.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
@click.option(
    "--cpu-threads", type=click.IntRange(min=1), default=1, show_default=True,
    help="Of each process on a CPU; round-off depends on it. Many processes use many cores better.",
)  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run the .py files of MODEL's repository while loading it.")
def upsample(
    model, images, output, format, class_labels, num_inference_steps, batch_size, seed, device, dtype, cpu_threads,
    trust_remote_code,
):  # fmt: skip
    """Enlarge IMAGES with MODEL, an upsampler, into a folder.

    MODEL is a folder or a Hub id, as `convert guided-diffusion` writes it; IMAGES an .npz, a folder or a zip, as
    `sample` writes them. The same command goes on after an interruption, and runs on many processes as `sample` does.
    """
    from .image_sets import read_images

    small, labels = read_images(images)
    _sample_model(
        model, "adm-upsampler", output, device, dtype, trust_remote_code, count=len(small),
        labels=labels if class_labels is None else class_labels, images=small, seed=seed, batch_size=batch_size,
        format=format, cpu_threads=cpu_threads, num_inference_steps=num_inference_steps,
    )  # fmt: skip


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


@main.command()
@click.argument("generated", type=click.Path(path_type=Path))
@click.option(
    "--reference", type=click.Path(path_type=Path), required=True,
    help="The real images, or an .npz with mu and sigma for the Fréchet distance alone.",
)  # fmt: skip
@click.option(
    "--metric", "metrics", multiple=True,
    type=click.Choice(["frechet", "precision_recall", "knn_distance", "lof", "rarity"]),
    help="Compute this one; repeat it for more. By default all that the reference allows.",
)  # fmt: skip
@click.option(
    "--k", "neighbours", multiple=True, metavar="METRIC=K",
    help="Neighbours of a metric; by default 5 for knn_distance, 20 for lof, 3 for rarity and precision_recall.",
)  # fmt: skip
@click.option(
    "--features", default="classifier", show_default=True, metavar="NAME",
    help="classifier (MNIST digits), dinov2, inception, or module:function, which imports and runs that code.",
)  # fmt: skip
@click.option(
    "--features-model", default=None, metavar="MODEL",
    help="dinov2: folder or Hub id, by default facebook/dinov2-large; inception: file of weights.",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--device", default=None, help="torch device; by default the fastest one here.")
@click.option(
    "--cache", type=click.Path(path_type=Path, file_okay=False), default=None,
    help="Folder for computed features; by default below DIFFUSERS_EXT_CACHE or the user's cache folder.",
)  # fmt: skip
@click.option("--no-cache", is_flag=True, help="Compute all features anew and keep none.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), default=None,
    help="File for the numbers and what they stand for.",
)  # fmt: skip
def evaluate(
    generated, reference, metrics, neighbours, features, features_model, batch_size, device, cache, no_cache,
    json_file,
):  # fmt: skip
    """Compare GENERATED images with real ones.

    GENERATED and the reference are each a folder of images, a zip of images or an .npz with arr_0.
    """
    import json

    from rich.console import Console
    from rich.progress import Progress

    from .evaluation import evaluate_images, print_evaluation
    from .feature_cache import default_cache
    from .info import package_versions

    if no_cache and cache is not None:
        raise click.UsageError("--cache and --no-cache exclude each other")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)  # before the networks run
    console = Console()
    with Progress(console=console, transient=True) as progress:
        tasks = {}

        def on_progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(f"features of {name}", total=total)
            progress.update(tasks[name], completed=done)

        result = evaluate_images(
            generated, reference, features, list(metrics) or None, _neighbours(neighbours), features_model, device,
            batch_size, None if no_cache else cache or default_cache(), on_progress,
        )  # fmt: skip
    print_evaluation(result, console)
    if json_file is not None:
        json_file.write_text(json.dumps({**result, "versions": package_versions()}, indent=2) + "\n")
        click.echo(f"wrote {json_file}")


@main.command("tune-interval")
@click.argument("model")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="Folder for what is found; one that was begun with the same settings goes on.",
)  # fmt: skip
@click.option(
    "--reference", type=click.Path(path_type=Path), default=None,
    help="Real images (folder, zip, .npz), or an .npz with mu and sigma; by default the shipped classifier's digits.",
)  # fmt: skip
@click.option("--guidance-scales", type=NUMBERS, default=[1.5, 2.0, 3.0], show_default="1.5,2,3")
@click.option(
    "--pipeline", type=click.Choice(["boost-and-skip"]), default=None,
    help="Sample the model with this pipeline; by default with its own.",
)  # fmt: skip
@click.option("--num-samples", type=click.IntRange(min=2), default=2000, show_default=True, help="Of each candidate.")
@click.option("--num-inference-steps", type=click.IntRange(min=2), default=30, show_default=True)
@click.option("--features", default="classifier", show_default=True, help="As for evaluate.")
@click.option("--features-model", default=None, help="As for evaluate.")
@click.option("--batch-size", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Image i of each candidate is drawn with seed + i.")
@click.option("--device", default=None, help="torch device; by default the fastest one here.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
@click.option("--trust-remote-code", is_flag=True, help="Run the .py files of MODEL's repository while loading it.")
def tune_interval_command(
    model, output, reference, guidance_scales, pipeline, num_samples, num_inference_steps, features, features_model,
    batch_size, seed, device, dtype, trust_remote_code,
):  # fmt: skip
    """Search the guidance interval and weight of MODEL, class-conditional, with the least Fréchet distance.

    For each weight: guided everywhere; then where guidance should begin, then where it should end. Every distance is
    kept, and the same command goes on after an interruption.
    """
    import torch
    from rich.progress import Progress

    from .features import load_extractor
    from .info import best_device
    from .interval_tuning import plot_search, print_search, reference_statistics, tune_interval
    from .sampling import cycled_labels
    from .shipped import load_pipeline

    device = device or best_device()
    extractor = load_extractor(features, features_model, device)
    real = reference_statistics(reference, extractor, batch_size)
    pipe = load_pipeline(model, pipeline, trust_remote_code=trust_remote_code).to(device, getattr(torch, dtype))
    labels = cycled_labels(pipe, num_samples)
    if labels is None:
        raise click.UsageError(f"{model} takes no class labels; tune text-to-image models through the Python function")
    with Progress() as progress:
        tasks = {}

        def note(candidate, done):
            if candidate not in tasks:
                tasks[candidate] = progress.add_task(candidate.key, total=num_samples)
            progress.update(tasks[candidate], completed=done, visible=done < num_samples)

        found = tune_interval(
            pipe, extractor, real, guidance_scales, labels, output, num_inference_steps, seed, batch_size, note
        )
    print_search(found, output)
    plot_search(found, output / "interval.png")


def _neighbours(settings: tuple[str, ...]) -> dict[str, int]:
    """ "lof=10" and others as a dictionary."""
    k = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if not value.isdecimal() or name in k:
            raise click.BadParameter(
                f"{setting!r} must be METRIC=K with a whole number, once a metric", param_hint="--k"
            )
        k[name] = int(value)
    return k


if __name__ == "__main__":
    main()
