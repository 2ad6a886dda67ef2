"""`diffusers-ext train-postprocessing`."""

from pathlib import Path

import click

from ..runs.lists import INTEGERS, NUMBERS, ListsCommand
from .options import DEVICE, DTYPE, MIXED_PRECISION, PIPELINE, SEED, TRUST_REMOTE_CODE, Finite, Model, Steps
from .sample import prompts_of_file


@click.command("train-postprocessing", cls=ListsCommand)
@click.option(
    "--base", type=Model(), required=True, help="The pipeline to repair: a shipped model, a folder or a Hub id."
)
@click.option(
    "--real", type=click.Path(path_type=Path, exists=True), required=True,
    help="Real images of the base's size: a folder, a zip or an .npz with arr_0 and, for --within-class, arr_1.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="Folder for samples, checkpoints, curves and pipeline/; one that was begun with the same settings goes on.",
)  # fmt: skip
@PIPELINE
@click.option(
    "--guidance-scales", type=NUMBERS, default=[1.0, 2.0, 3.0], show_default="1,2,3",
    help="Of the samples; the flow learns to repair all of them.",
)  # fmt: skip
@click.option(
    "--keep-scales",
    type=NUMBERS,
    default=[],
    help="Guidance scales that need no repair: the flow learns to leave such samples alone.",
)
@click.option(
    "--num-samples", type=click.IntRange(min=2), default=10_000, show_default=True, help="Of each guidance scale."
)
@click.option(
    "--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False), default=None, callback=prompts_of_file,
    help="File of prompts to go through in turn, one a line, for text-to-image models.",
)  # fmt: skip
@click.option("--num-inference-steps", type=Steps(), default=50, show_default=True, help="Of the base.")
@click.option(
    "--features", type=click.Choice(["pixel", "cls", "patch", "classifier", "pixel+classifier"]), default="patch",
    show_default=True,
    help="Where neighbours are sought: pixels, DINOv2's class token or mean of patches, the shipped classifier, or"
    " pixels and classifier together.",
)  # fmt: skip
@click.option(
    "--features-model", default="facebook/dinov2-with-registers-base", show_default=True,
    help="DINOv2 network for cls and patch: a folder or a Hub id.",
)  # fmt: skip
@click.option(
    "--k", type=click.IntRange(min=1), default=20, show_default=True, help="Nearest neighbours to draw from."
)
@click.option(
    "--balance", is_flag=True, help="Draw from the k nearest so that real images are visited evenly, hubs too."
)
@click.option("--within-class", is_flag=True, help="Seek neighbours among the real images of the sample's class.")
@click.option(
    "--block-out-channels", type=INTEGERS, default=[24, 64, 96], show_default="24,64,96",
    help="Of the flow's network, one a resolution.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=10_000, show_default=True, help="Of training, in all.")
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True, help="Of each process.")
@click.option("--sample-batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Of the base.")
@click.option("--learning-rate", type=Finite(min=0, min_open=True), default=2e-4, show_default=True)
@click.option(
    "--ema-decay",
    type=Finite(0, 1, max_open=True),
    default=0.999,
    show_default=True,
    help="Of the average of the weights.",
)
@DTYPE
@MIXED_PRECISION
@click.option(
    "--checkpoint-every", type=click.IntRange(min=1), default=1000, show_default=True, help="Training steps."
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@DEVICE
@TRUST_REMOTE_CODE
def train_postprocessing(
    base, real, output, pipeline, guidance_scales, keep_scales, num_samples, prompts, num_inference_steps, features,
    features_model, k, balance, within_class, block_out_channels, steps, batch_size, sample_batch_size, learning_rate,
    ema_decay, dtype, mixed_precision, checkpoint_every, seed, device, trust_remote_code,
):  # fmt: skip
    """Train a flow that repairs the samples of a base pipeline.

    Samples the base at each guidance scale, finds their nearest real neighbours, trains, and writes OUTPUT/pipeline, a
    FlowPostprocessingPipeline. The same command goes on after an interruption. On many processes: torchrun
    --nproc_per_node N -m diffusers_ext.cli train-postprocessing ...
    """
    import torch

    from ..evaluation import read_images
    from ..flow import (
        channels_first,
        check_base,
        check_flow_folder,
        check_output,
        draw_base_samples,
        train_postprocessing_flow,
        velocity_network,
        write_flow,
    )  # fmt: skip
    from ..machine.versions import best_device
    from ..runs.processes import end_processes, start_accelerator
    from .loading import load_on_processes

    if not set(keep_scales) < set(guidance_scales):
        raise click.UsageError(f"--keep-scales must be some of --guidance-scales {guidance_scales}, got {keep_scales}")
    training, result, record = output / "training", output / "pipeline", output / "training" / "pipeline.json"
    check_output(training)  # before anything is loaded
    check_flow_folder(result, record, begun=(training / "settings.json").exists())
    accelerator = start_accelerator(device or best_device(), mixed_precision)
    device = accelerator.device
    images, real_labels = read_images(real)
    if within_class and real_labels is None:
        raise click.UsageError(f"--within-class needs the classes of the real images; {real} has none (arr_1)")
    extractor = _neighbour_features(features, features_model, device, images)
    images = channels_first(images)
    real_labels = torch.from_numpy(real_labels) if within_class else None

    pipe = load_on_processes(base, pipeline, device, dtype, trust_remote_code, accelerator)
    check_base(
        pipe, images, k, real_labels, prompts, num_inference_steps, guidance_scales[0], extractor, block_out_channels
    )
    samples, labels = draw_base_samples(
        pipe, output / "samples", guidance_scales, num_samples, prompts, num_inference_steps, seed, sample_batch_size,
        accelerator,
    )  # fmt: skip
    del pipe
    keep = torch.tensor([scale in keep_scales for scale in guidance_scales]).repeat_interleave(num_samples)  # as drawn
    torch.manual_seed(seed)
    network = velocity_network(samples, None if labels is None else int(labels.max()) + 1, block_out_channels)
    trained = train_postprocessing_flow(
        samples, images, k, model=network, steps=steps, output=training, sample_labels=labels, real_labels=real_labels,
        features=extractor, balance=balance, keep=keep if keep_scales else None, batch_size=batch_size,
        learning_rate=learning_rate, ema_decay=ema_decay,
        checkpoint_every=checkpoint_every, seed=seed,
    )  # fmt: skip
    if accelerator.is_main_process:
        finished = write_flow(trained.model, result, record)
        said = f"{result} was finished before, after {steps} steps, nothing to do" if finished else f"wrote {result}"
        loss = next(name for name in ("loss.png", "history.json") if (training / name).exists())
        click.echo(f"{said}; the loss is in {training / loss}")
    end_processes(accelerator)


def _neighbour_features(name: str, model: str, device, real):
    """ "pixel", or a function of images in [-1, 1], as train_postprocessing_flow takes them.

    real: uint8 (count, height, width, channels), whose variance sets the scales of pixels and classifier together.
    """
    from ..flow import DINOv2Features, channels_first, classifier_features, combined_features, pixel_features
    from ..flow.features import CLASSIFIER_WEIGHT

    if name == "pixel":
        return name
    if name in ("cls", "patch"):
        return DINOv2Features(model, pooling=name, device=device)
    classifier = classifier_features(device)
    if name == "classifier":
        return classifier
    return combined_features([(pixel_features, 1.0), (classifier, CLASSIFIER_WEIGHT)], channels_first(real[:10_000]))
