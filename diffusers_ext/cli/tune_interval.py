"""`diffusers-ext tune-interval`."""

from pathlib import Path

import click

from ..runs.lists import NUMBERS, ListsCommand
from .options import DEVICE, DTYPE, MODEL, PIPELINE, SEED, TRUST_REMOTE_CODE, Finite
from .sample import prompts_of_file


@click.command("tune-interval", cls=ListsCommand)
@MODEL
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="Folder for what is found; one that was begun with the same settings goes on.",
)  # fmt: skip
@click.option(
    "--reference", type=click.Path(path_type=Path), default=None,
    help="Real images (folder, zip, .npz), or .npz or .pkl statistics; by default the shipped classifier's digits.",
)  # fmt: skip
@click.option("--guidance-scales", type=NUMBERS, default=[1.5, 2.0, 3.0], show_default="1.5,2,3")
@PIPELINE
@click.option(
    "--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False), default=None, callback=prompts_of_file,
    help="For text-to-image models: file of prompts to go through in turn, one a line.",
)  # fmt: skip
@click.option("--num-samples", type=click.IntRange(min=2), default=2000, show_default=True, help="Of each candidate.")
@click.option("--num-inference-steps", type=click.IntRange(min=2), default=30, show_default=True)
@click.option("--features", default="classifier", show_default=True, help="As for evaluate.")
@click.option("--features-model", default=None, help="As for evaluate.")
@click.option("--batch-size", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Image i of each candidate is drawn with seed + i."
)
@click.option(
    "--memory", type=Finite(min=0), default=4.0, show_default=True,
    help="GiB for outputs of networks, which candidates share; 0 remembers nothing.",
)  # fmt: skip
@DEVICE
@DTYPE
@TRUST_REMOTE_CODE
def tune_interval(
    model, output, reference, guidance_scales, pipeline, prompts, num_samples, num_inference_steps, features,
    features_model, batch_size, seed, memory, device, dtype, trust_remote_code,
):  # fmt: skip
    """Search the guidance interval and weight of MODEL with the least Fréchet distance.

    For each weight: guided everywhere; then where guidance should begin, then where it should end. Every distance is
    kept, and the same command goes on after an interruption.
    """
    from importlib.util import find_spec

    import torch
    from rich.progress import Progress

    from ..evaluation import load_extractor
    from ..evaluation.notes import few_images
    from ..guidance.tuning import RESULT, check_output, plot_search, print_search, reference_statistics
    from ..guidance.tuning import tune_interval as tune
    from ..machine.versions import best_device
    from ..sampling import cycled_labels
    from ..shipped import load_pipeline

    output = check_output(output, guidance_scales, num_inference_steps)  # before anything is loaded
    finished = (output / RESULT).exists()
    device = device or best_device()
    extractor = load_extractor(features, features_model, device)
    real = reference_statistics(reference, extractor, batch_size)
    pipe = load_pipeline(model, pipeline, trust_remote_code, dtype=getattr(torch, dtype)).to(device)
    labels = None if prompts else cycled_labels(pipe, num_samples)
    if labels is None and not prompts:
        raise click.UsageError(f"{model} takes no class labels; give --prompts, a file with one a line")
    inputs = labels if prompts is None else {"prompt": [prompts[i % len(prompts)] for i in range(num_samples)]}
    with Progress() as progress:
        tasks = {}

        def note(candidate, done):
            if candidate not in tasks:
                tasks[candidate] = progress.add_task(candidate.key, total=num_samples)
            progress.update(tasks[candidate], completed=done, visible=done < num_samples)

        found = tune(
            pipe, extractor, real, guidance_scales, inputs, output, num_inference_steps, seed, batch_size, note,
            memory=int(memory * 2**30),
        )  # fmt: skip
    print_search(found, output)
    if (note := few_images(num_samples, len(real[0]))) is not None:
        click.echo(f"Note: {note}.")
    if found.rows_asked:
        click.echo(
            f"{found.rows_run} network rows were run in this start; {found.rows_asked - found.rows_run} more were"
            " remembered"
        )
    if finished and not tasks:
        click.echo(f"{output / RESULT} was finished before, nothing to do")
    if find_spec("matplotlib") is not None:
        plot_search(found, output / "interval.png")
