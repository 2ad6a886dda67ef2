"""`diffusers-ext evaluate`."""

from pathlib import Path

import click

from .options import DEVICE, Words


@click.command()
@click.argument("generated", type=click.Path(path_type=Path))
@click.option(
    "--reference", type=click.Path(path_type=Path), required=True,
    help="The real images; or statistics for the Fréchet distance alone: .npz with mu and sigma, NVIDIA's .pkl.",
)  # fmt: skip
@click.option(
    "--metrics", "--metric", "metrics", multiple=True,
    type=Words(["frechet", "precision_recall", "knn_distance", "lof", "rarity", "fid", "fd_dinov2"]),
    help="Compute these, with commas between them. By default all that the reference allows, of the first five.",
)  # fmt: skip
@click.option(
    "--k", "neighbours", multiple=True, metavar="METRIC=K,...",
    help="Neighbours of a metric; by default 5 for knn_distance, 20 for lof, 3 for rarity and precision_recall.",
)  # fmt: skip
@click.option(
    "--features", default=None, metavar="NAME",
    help="classifier (MNIST digits), dinov2, inception, or module:function, which imports and runs that code. By"
    " default those of fid or fd_dinov2, else classifier.",
)  # fmt: skip
@click.option(
    "--features-model", default=None, metavar="MODEL",
    help="dinov2: folder or Hub id, by default facebook/dinov2-large; inception: file of weights.",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@DEVICE
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
    from rich.console import Console
    from rich.progress import Progress

    from ..evaluation import evaluate_images, print_evaluation
    from ..evaluation.cache import default_cache
    from ..machine.versions import package_versions
    from ..runs.files import check_file, write_json

    if no_cache and cache is not None:
        raise click.UsageError("--cache and --no-cache exclude each other")
    if json_file is not None:
        check_file(json_file, {"metrics", "features", "generated"})  # before the networks run
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks = {}

        def on_progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(f"features of {name}", total=total)
            progress.update(tasks[name], completed=done)

        wanted = [name for names in metrics for name in names] or None
        result = evaluate_images(
            generated, reference, features, wanted, _neighbours(neighbours), features_model, device, batch_size,
            None if no_cache else cache or default_cache(), on_progress,
        )  # fmt: skip
    print_evaluation(result, console)
    if json_file is not None:
        write_json(json_file, {**result, "versions": package_versions()})
        click.echo(f"wrote {json_file}")


def _neighbours(settings: tuple[str, ...]) -> dict[str, int]:
    """ "lof=10" and others as a dictionary."""
    k = {}
    for setting in (one for some in settings for one in some.split(",")):
        name, _, value = setting.partition("=")
        if not value.isdecimal() or name in k:
            raise click.BadParameter(
                f"{setting!r} must be METRIC=K with a whole number, once a metric", param_hint="--k"
            )
        k[name] = int(value)
    return k
