"""`diffusers-ext compare`."""

from collections.abc import Callable
from pathlib import Path

import click

from ..runs.lists import INTEGERS, LABELS, NUMBERS, ListsCommand
from .options import DEVICE, DTYPE, MODEL, PIPELINE, TRUST_REMOTE_CODE, Names


class Intervals(click.ParamType):
    """Guidance intervals between commas: "none", every step, or LO:HI, noise levels sigma in (LO, HI]."""

    name = "none,LO:HI,..."

    def convert(self, value, param, ctx):
        """A list of pairs and None; fails as click does for anything else."""
        from ..comparing.settings import interval_of

        if isinstance(value, list):
            return value
        try:
            return [interval_of(part) for part in value.split(",")]
        except ValueError as error:
            self.fail(str(error), param, ctx)


def axis_of(name: str) -> Callable:
    """An option's callback that refuses values which are none of an axis, before a model is loaded."""

    def check(ctx, param, value):
        from ..comparing.settings import axis

        try:
            if value:
                axis(name, list(value))
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from error
        return value

    return check


@click.command(cls=ListsCommand)
@MODEL
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="Folder for grid.png, images/ and comparison.json; new, or one to go on in.",
)  # fmt: skip
@click.option(
    "--prompt",
    callback=axis_of("prompt"),
    multiple=True,
    metavar="TEXT",
    help="For text-to-image models; more than one make an axis.",
)
@click.option(
    "--class-labels",
    callback=axis_of("class_label"),
    type=LABELS,
    default=None,
    help="For class-conditional models.",
)
@click.option(
    "--seeds",
    callback=axis_of("seed"),
    type=INTEGERS,
    default=[0],
    show_default="0",
    help="The noise of each column is equal in all rows.",
)
@click.option(
    "--guidance-scales",
    callback=axis_of("guidance_scale"),
    type=NUMBERS,
    default=None,
    help="1 is off; Flux's and Qwen-Image's true_cfg_scale.",
)
@click.option(
    "--guidance-intervals", callback=axis_of("guidance_interval"), type=Intervals(), default=None,
    help="Guide in steps that start at noise levels sigma (of EDM) in (LO, HI]; none: in all steps.",
)  # fmt: skip
@click.option(
    "--guiders", callback=axis_of("guider"), type=Names("comparing.GUIDERS", "cfg,apg,..."), default=["cfg"],
    show_default="cfg",
    help="Also cfg-zero, tcfg, mag.",
)  # fmt: skip
@click.option(
    "--gammas",
    callback=axis_of("gamma"),
    type=NUMBERS,
    default=None,
    help="Boost-and-Skip: factors on the initial noise; 1 is off.",
)
@click.option(
    "--skip-steps",
    callback=axis_of("skip_steps"),
    type=INTEGERS,
    default=None,
    help="Boost-and-Skip: first steps to drop.",
)
@click.option(
    "--skip-to-sigma",
    callback=axis_of("skip_to_sigma"),
    type=NUMBERS,
    default=None,
    help="Instead: noise levels sigma to start from.",
)
@click.option(
    "--columns", type=Names("comparing.AXES", "seed,..."), default=None,
    help="Axes that make the columns; by default prompt, class_label and seed. The others make the rows.",
)  # fmt: skip
@click.option(
    "--num-inference-steps", type=click.IntRange(min=1), default=None, help="By default the pipeline's own number."
)
@click.option(
    "--negative-prompt", default=None, metavar="TEXT",
    help="For text-to-image models; an empty one where true guidance (Flux, Qwen-Image) needs one.",
)  # fmt: skip
@click.option("--height", type=click.IntRange(min=1), default=None, help="In pixels; by default the pipeline's own.")
@click.option("--width", type=click.IntRange(min=1), default=None, help="In pixels; by default the pipeline's own.")
@PIPELINE
@DEVICE
@DTYPE
@click.option(
    "--offload", type=click.Choice(["model", "sequential"]), default=None,
    help="Keep on the device what is computing alone: a network, or a layer (slow, least memory).",
)  # fmt: skip
@TRUST_REMOTE_CODE
def compare(
    model, output, prompt, class_labels, seeds, guidance_scales, guidance_intervals, guiders, gammas, skip_steps,
    skip_to_sigma, columns, num_inference_steps, negative_prompt, height, width, pipeline, device, dtype, offload,
    trust_remote_code,
):  # fmt: skip
    """Draw MODEL's images for each combination of settings, with equal seeds, into a grid with named axes.

    Any setting that is given several values is an axis. The same command goes on after an interruption. grid.png and
    the images hold their settings in a text chunk; comparison.json has them all, and the network rows of each.
    """
    import torch
    from rich.progress import Progress

    from ..comparing import COLUMNS
    from ..comparing import compare as compare_settings
    from ..comparing.comparison import KEPT, PICTURE
    from ..machine.versions import best_device
    from ..runs.files import check_folder
    from ..shipped import load_pipeline

    if skip_steps is not None and skip_to_sigma is not None:
        raise click.UsageError("--skip-steps and --skip-to-sigma both say where the sampler starts; give one")
    check_folder(output, KEPT)  # before a large model is loaded
    device = device or best_device()
    if offload is not None and torch.device(device).type == "cpu":
        raise click.UsageError("--offload keeps networks off an accelerator; on a CPU leave it out")
    pipe = load_pipeline(model, pipeline, trust_remote_code, dtype=getattr(torch, dtype))
    if offload is None:
        pipe = pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
    call = {
        "num_inference_steps": num_inference_steps, "negative_prompt": negative_prompt, "height": height,
        "width": width,
    }  # fmt: skip
    with Progress() as progress:
        task = progress.add_task("drawing")

        def note(image: int, images: int, steps: int) -> None:
            share = min(steps / num_inference_steps, 1) if num_inference_steps else 0
            words = f"image {image + 1} of {images}, step {steps}"
            progress.update(task, description=words, completed=image + share, total=images)

        found = compare_settings(
            pipe, list(prompt) or None, class_labels, seeds, guidance_scales, guidance_intervals, guiders, gammas,
            skip_steps, skip_to_sigma, columns or COLUMNS, output, note,
            **{name: value for name, value in call.items() if value is not None},
        )  # fmt: skip
        progress.update(task, completed=progress.tasks[0].total)
    click.echo(found.table)
    if found.drawn:
        click.echo(f"wrote {output / PICTURE}, {len(found.cells)} cells; {found.drawn} images drawn by this start")
    else:
        click.echo(f"{output / PICTURE} was finished before: {len(found.cells)} cells, nothing to do")
