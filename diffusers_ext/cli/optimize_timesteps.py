"""`diffusers-ext optimize-timesteps`."""

from pathlib import Path

import click

from ..runs.lists import INTEGERS, ListsCommand
from .options import DEVICE, MODEL, SEED, TRUST_REMOTE_CODE, Finite


@click.command("optimize-timesteps", cls=ListsCommand)
@MODEL
@click.option(
    "--data", required=True, metavar="FILE|countdown",
    help="Sequences like those to generate: .npz with tokens, .npy, .txt for models with a tokenizer, or countdown.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="New folder for a copy of the model with the tables in its scheduler, timestep_tables.json and a plot.",
)  # fmt: skip
@click.option("--num-inference-steps", type=INTEGERS, default=[4, 8, 16, 32], show_default="4,8,16,32")
@click.option(
    "--method", type=click.Choice(["exact", "hierarchical", "golden"]), default="exact", show_default=True,
    help="exact: any numbers of steps, one pass of the network over a grid. hierarchical, golden: the paper's"
    " objective, for powers of two.",
)  # fmt: skip
@click.option("--objective", type=click.Choice(["klub", "kl", "alpha"]), default=None, help="Of exact; by default kl.")
@click.option(
    "--alpha", type=Finite(0, 1, min_open=True, max_open=True), default=None, help="Of the objective alpha, in (0, 1)."
)
@click.option(
    "--held", type=click.Choice(["prediction", "rates"]), default=None,
    help="What a step holds; by default the prediction of clean tokens, for klub the rates.",
)  # fmt: skip
@click.option(
    "--last-edge", type=click.Choice(["free", "min_timestep"]), default=None,
    help="free: the final denoising is a step like the others; the default where it draws tokens.",
)  # fmt: skip
@click.option(
    "--sampler", type=click.Choice(["euler", "tweedie", "gillespie"]), default=None,
    help="Optimise for this sampler, and set it; by default the model's own.",
)  # fmt: skip
@click.option(
    "--num-samples", type=click.IntRange(min=1), default=256, show_default=True, help="Sequences of the data."
)
@click.option(
    "--num-report-samples", type=click.IntRange(min=0), default=None,
    help="Of them, those that do not choose the tables and say what they cost; by default a quarter.",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--grid-size", type=click.IntRange(min=2), default=None, help="By default 4 a step, at least 128.")
@click.option(
    "--num-positions", type=click.IntRange(min=1), default=None,
    help="Of each sequence, drawn at random; by default as many as fit into 1 GiB.",
)  # fmt: skip
@click.option(
    "--given-prefix", type=click.IntRange(min=0), default=0, show_default=True, help="Tokens that are given."
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@DEVICE
@TRUST_REMOTE_CODE
def optimize_timesteps(
    model, data, output, num_inference_steps, method, objective, alpha, held, last_edge, sampler, num_samples,
    num_report_samples, batch_size, grid_size, num_positions, given_prefix, seed, device, trust_remote_code,
):  # fmt: skip
    """Optimise the timesteps of MODEL, a discrete diffusion model, once for each number of steps.

    MODEL is the name of a shipped model, a folder or a Hub id. The network runs in float32. The same command goes on
    after an interruption. On many processes: torchrun --nproc_per_node N -m diffusers_ext.cli optimize-timesteps ...
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from ..jump_your_steps import optimize_timesteps as optimize
    from ..jump_your_steps.model_folder import (
        TABLES,
        check_data,
        check_discrete,
        finished_tables,
        read_sequences,
        write_model,
    )  # fmt: skip
    from ..jump_your_steps.report import print_tables
    from ..machine.versions import best_device
    from ..model_names import resolve_model
    from ..runs.files import check_folder
    from ..runs.processes import end_processes, start_processes
    from ..runs.provenance import describe_component, drawing_versions, hash_of
    from .loading import load_on_processes

    output = check_folder(output, TABLES)  # before a large model is loaded
    check_data(data)
    device = device or best_device()
    accelerator = start_processes(device)
    main = accelerator is None or accelerator.is_main_process
    pipe = load_on_processes(model, None, device, "float32", trust_remote_code, accelerator)
    check_discrete(pipe)
    if sampler is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, sampler=sampler)
    sequences = read_sequences(data, pipe, num_samples, seed)
    given = torch.arange(sequences.shape[1]) < given_prefix if given_prefix else None
    options = {
        "num_inference_steps": num_inference_steps, "method": method, "objective": objective, "alpha": alpha,
        "held": held, "last_edge": last_edge, "batch_size": batch_size, "grid_size": grid_size, "seed": seed,
        "num_report_samples": num_report_samples,
    }  # fmt: skip
    settings = {
        **options, "num_positions": num_positions, "given_prefix": given_prefix, "data": hash_of(sequences),
        "model": describe_component(pipe.model), "scheduler": describe_component(pipe.scheduler),
        "versions": drawing_versions(),
    }  # fmt: skip
    if (tables := finished_tables(output, settings)) is not None:
        if main:
            print_tables(tables, Console())
            click.echo(f"{output} was finished before, nothing to do")
        return end_processes(accelerator)
    console = Console()
    unfinished = output.with_name(f"{output.name}.unfinished")
    with Progress(console=console, disable=not (main and console.is_terminal)) as progress:
        bar = progress.add_task("network" if method != "golden" else "intervals", total=None)
        tables = optimize(
            pipe.model, pipe.scheduler, sequences, **options, num_positions=num_positions, given=given,
            resume=unfinished, accelerator=accelerator,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )  # fmt: skip
    if main:
        write_model(pipe, resolve_model(model), tables, output, settings)
        unfinished.unlink(missing_ok=True)
        print_tables(tables, console)
        click.echo(f"wrote {output}")
    end_processes(accelerator)
