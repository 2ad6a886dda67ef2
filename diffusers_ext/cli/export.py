"""`diffusers-ext export`."""

from pathlib import Path

import click

from .options import PIPELINE, TRUST_REMOTE_CODE


@click.command()
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@PIPELINE
@click.option("--license", default=None, help='SPDX identifier for the model card, such as "apache-2.0".')
@click.option("--push-to-hub", "repo_id", metavar="REPO_ID", default=None, help="Push OUTPUT to this repository.")
@click.option("--private", is_flag=True, help="Make a private repository, where there is none.")
@TRUST_REMOTE_CODE
def export(model, output, pipeline, license, repo_id, private, trust_remote_code):
    """Write MODEL as a folder that loads with diffusers alone, and push it to the Hub if asked to.

    MODEL is the name of a shipped model, a folder or a Hub id; or that of a pipeline of this package, whose code is
    exported without weights. OUTPUT is a new folder.
    """
    from ..hub.push import check_push, push_folder
    from ..runs.files import write_once
    from ..shipped import check_name

    if private and repo_id is None:
        raise click.UsageError("--private is for --push-to-hub")
    check_name(model, _pipelines())
    if repo_id is not None:
        check_push(repo_id)
    written = write_once(output, lambda folder: _export(model, folder, pipeline, license, repo_id, trust_remote_code))
    click.echo(f"{output} was finished before, nothing to do" if written[1] else f"wrote {written[0]}")
    if repo_id is not None:
        click.echo(f"pushed {push_folder(output, repo_id, private or None)}")


def _export(model, output, pipeline, license, repo_id, trust_remote_code) -> Path:
    from .. import pipelines
    from ..hub import export_code, export_model, export_pipeline
    from ..shipped import load_network, load_pipeline, network_class, resolve_model

    codes = _pipelines()
    if model in codes and not Path(resolve_model(model)).is_dir():
        return export_code(getattr(pipelines, codes[model]), output, repo_id)
    if pipeline is None and network_class(model) is not None:
        return export_model(load_network(model, trust_remote_code), output, license, repo_id)
    return export_pipeline(load_pipeline(model, pipeline, trust_remote_code), output, license, repo_id)


def _pipelines() -> dict[str, str]:
    """The class of each pipeline of the package by the name of its file, with hyphens; none is imported for it."""
    from .. import pipelines

    names = [name for name in pipelines.__all__ if name.endswith("Pipeline")]
    files = [pipelines.LAZY[name] if name in pipelines.LAZY else getattr(pipelines, name).__module__ for name in names]
    return {file.split(".")[-1].replace("_", "-"): name for file, name in zip(files, names, strict=True)}
