"""`diffusers-ext sample`, and how a model is sampled into a folder."""

from pathlib import Path

import click

from ..runs.lists import INTERVAL, LABELS, ListsCommand
from .options import (
    CPU_THREADS,
    DEVICE,
    DTYPE,
    MODEL,
    PIPELINE,
    SEED,
    TRUST_REMOTE_CODE,
    Finite,
    Names,
    Schedule,
    Steps,
)


def prompts_of_file(ctx, param, path: Path | None) -> list[str] | None:
    """The lines of a file that hold anything, for an option's callback."""
    if path is None:
        return None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{path} is no text in UTF-8: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise click.BadParameter(f"{path} holds no prompt")
    return lines


@click.command(cls=ListsCommand)
@MODEL
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="Folder for the samples and manifest.json; new, or one to go on in.",
)  # fmt: skip
@click.option(
    "--format", type=click.Choice(["png", "zip", "npz", "txt", "jsonl"]), default=None,
    help="By default png for images, txt for texts, npz for tokens.",
)  # fmt: skip
@PIPELINE
@click.option(
    "--gamma", type=Finite(min=0, min_open=True), default=None, help="Boost-and-Skip: factor on the initial noise."
)
@click.option("--skip-steps", type=click.IntRange(min=0), default=None, help="Boost-and-Skip: first steps to drop.")
@click.option(
    "--skip-to-sigma", type=Finite(min=0, min_open=True), default=None,
    help="Instead: the noise level sigma (of EDM) to start from, whatever the number of steps.",
)  # fmt: skip
@click.option("--num-samples", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--num-inference-steps", type=Steps(), default=50, show_default=True,
    help='Or a respacing, "10,10,5" or "ddim25", for pipelines that take one.',
)  # fmt: skip
@click.option(
    "--class-labels", type=LABELS, default=None,
    help="Labels to go through in turn, none for no label; by default every class of a conditional model.",
)  # fmt: skip
@click.option("--random-labels", is_flag=True, help="A random class for each image, from its seed.")
@click.option("--prompt", default=None, metavar="TEXT", help="For text-to-image models, or where a text begins.")
@click.option(
    "--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False), default=None, callback=prompts_of_file,
    help="File of prompts to go through in turn, one a line.",
)  # fmt: skip
@click.option("--guidance-scale", type=Finite(), default=None, help="1 is off.")
@click.option(
    "--true-cfg-scale", type=Finite(), default=None,
    help="Flux, Qwen-Image: weight of two predictions, 1 is off; Flux's --guidance-scale is an input of its network.",
)  # fmt: skip
@click.option(
    "--negative-prompt", default=None, metavar="TEXT",
    help="Of all samples; with --true-cfg-scale an empty one where none is given, which makes the second prediction.",
)  # fmt: skip
@click.option(
    "--guidance-interval", type=INTERVAL, default=None,
    help="Guide in steps that start at noise levels sigma (of EDM) in (LO, HI]; by default in all.",
)  # fmt: skip
@click.option(
    "--sampler", type=Names("schedulers.ctmc_samplers.SAMPLERS", "euler|tweedie|...", single=True), default=None,
    help="Of discrete diffusion; by default the scheduler's.",
)  # fmt: skip
@click.option(
    "--timesteps", type=Schedule(), default=None,
    help="Of discrete diffusion: the scheduler's table for the number of steps, even ones, or all edges from 1 down.",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--decode-batch-size", type=click.IntRange(min=1), default=None,
    help="EDM2: images that its VAE decodes at once; by default the batch size.",
)  # fmt: skip
@click.option("--seed", type=SEED, default=0, show_default=True, help="Sample i is drawn with seed + i.")
@DEVICE
@DTYPE
@CPU_THREADS
@TRUST_REMOTE_CODE
def sample(
    model, output, format, pipeline, gamma, skip_steps, skip_to_sigma, num_samples, num_inference_steps, class_labels,
    random_labels, prompt, prompts, guidance_scale, true_cfg_scale, negative_prompt, guidance_interval, sampler,
    timesteps, batch_size, decode_batch_size, seed, device, dtype, cpu_threads, trust_remote_code,
):  # fmt: skip
    """Draw images, texts or token sequences from MODEL into a folder.

    MODEL is the name of a shipped model, a folder or a Hub id. The same command goes on after an interruption. On many
    processes: torchrun --nproc_per_node N -m diffusers_ext.cli sample MODEL ...
    """
    if class_labels is not None and random_labels:
        raise click.UsageError("give --class-labels or --random-labels, not both")
    if prompt is not None and prompts is not None:
        raise click.UsageError("give --prompt or --prompts, not both")
    call = {
        "gamma": gamma,
        "skip_steps": skip_steps,
        "skip_to_sigma": skip_to_sigma,
        "guidance_scale": guidance_scale,
        "true_cfg_scale": true_cfg_scale,
        "negative_prompt": negative_prompt,
        "guidance_interval": guidance_interval,
        "decode_batch_size": decode_batch_size,
        "sampler": sampler,
    }
    has_edges = isinstance(timesteps, list)
    call |= {"timesteps": timesteps} if has_edges else {"num_inference_steps": num_inference_steps}
    call = {name: value for name, value in call.items() if value is not None}
    spacing = None if timesteps is None else (timesteps, num_inference_steps)
    sample_model(
        model, pipeline, output, device, dtype, trust_remote_code, spacing=spacing, count=num_samples,
        labels="random" if random_labels else class_labels, prompts=[prompt] if prompt is not None else prompts,
        seed=seed, batch_size=batch_size, format=format, cpu_threads=cpu_threads, **call,
    )  # fmt: skip


def _space_steps(pipe, spacing: str | list[float], steps: int | str) -> None:
    """Let the scheduler take its table for so many steps, or even ones; raises ValueError where it has no table.

    Edges themselves are an argument of the pipeline's call; here it is only seen that they are meant for it.
    """
    if "timestep_tables" not in pipe.scheduler.config:
        name = type(pipe.scheduler).__name__
        raise ValueError(f"--timesteps is for discrete diffusion with a CTMCScheduler; this model has a {name}")
    if isinstance(spacing, list):
        return
    tables = pipe.scheduler.config.timestep_tables or {}
    if spacing == "table" and str(steps) not in tables:
        known = ", ".join(sorted(tables, key=int)) or "none"
        raise ValueError(f"--timesteps table: the model has no table for {steps} steps; it has for: {known}")
    spacing = {"table": "table", "even": "uniform"}[spacing]
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing=spacing)


def sample_model(
    model, pipeline, output, device, dtype, trust_remote_code, spacing: tuple | None = None, **arguments
) -> None:
    """Load a pipeline on every process that was started, sample it into a folder and say what was done.

    spacing: how the steps of discrete diffusion are spaced, and their number.
    """
    from ..machine.versions import best_device
    from ..runs.files import check_folder
    from ..runs.processes import end_processes, start_processes
    from ..sampling import MANIFEST, sample_to_folder
    from .loading import load_on_processes

    check_folder(output, MANIFEST)  # before a large model is loaded
    device = device or best_device()
    accelerator = start_processes(device)
    pipe = load_on_processes(model, pipeline, device, dtype, trust_remote_code, accelerator)
    if spacing is not None:
        _space_steps(pipe, *spacing)
    done = sample_to_folder(pipe, output, accelerator=accelerator, **arguments)
    if accelerator is None or accelerator.is_main_process:
        if done.was_finished:
            click.echo(f"{done.result} was finished before: {done.count} {done.kind}, nothing to do")
        else:
            click.echo(f"wrote {done.count} {done.kind} to {done.result}, {done.drawn} of them drawn by this start")
    end_processes(accelerator)
