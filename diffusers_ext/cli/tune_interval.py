"""`diffusers-ext tune-interval`."""

from pathlib import Path

import click

from ..runs.lists import NUMBERS, ListsCommand
from .options import DEVICE, DTYPE, MODEL, PIPELINE, SEED, TRUST_REMOTE_CODE


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
@click.option("--num-samples", type=click.IntRange(min=2), default=2000, show_default=True, help="Of each candidate.")
@click.option("--num-inference-steps", type=click.IntRange(min=2), default=30, show_default=True)
@click.option("--features", default="classifier", show_default=True, help="As for evaluate.")
@click.option("--features-model", default=None, help="As for evaluate.")
@click.option("--batch-size", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Image i of each candidate is drawn with seed + i."
)
@DEVICE
@DTYPE
@TRUST_REMOTE_CODE
def tune_interval(
    model, output, reference, guidance_scales, pipeline, num_samples, num_inference_steps, features, features_model,
    batch_size, seed, device, dtype, trust_remote_code,
):  # fmt: skip
    """Search the guidance interval and weight of MODEL, class-conditional, with the least Fréchet distance.

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
    labels = cycled_labels(pipe, num_samples)
    if labels is None:
        raise click.UsageError(
            f"{model} takes no class labels; of text-to-image models compare candidates: `sample --guidance-interval`,"
            " then `evaluate` (docs/first_hour.md)"
        )
    with Progress() as progress:
        tasks = {}

        def note(candidate, done):
            if candidate not in tasks:
                tasks[candidate] = progress.add_task(candidate.key, total=num_samples)
            progress.update(tasks[candidate], completed=done, visible=done < num_samples)

        found = tune(
            pipe, extractor, real, guidance_scales, labels, output, num_inference_steps, seed, batch_size, note
        )
    print_search(found, output)
    if (note := few_images(num_samples, len(real[0]))) is not None:
        click.echo(f"Note: {note}.")
    if finished and not tasks:
        click.echo(f"{output / RESULT} was finished before, nothing to do")
    if find_spec("matplotlib") is not None:
        plot_search(found, output / "interval.png")
