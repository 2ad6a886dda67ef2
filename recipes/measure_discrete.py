"""Sample discrete diffusion models and measure what comes out: the shipped ones, and the papers' runs.

    python recipes/measure_discrete.py countdown countdown-sedd --steps 256 --samples 1024
    python recipes/measure_discrete.py continue jsb-sedd jsb_tokens.npz --steps 256
    python recipes/measure_discrete.py likelihood jsb-sedd jsb_tokens.npz
    python recipes/measure_discrete.py words shakespeare-sedd out/shakespeare --steps 16 --steps 64

MODEL is a shipped model, a folder or a Hub id. Samples lie in OUTPUT, a folder for each number of steps, and the
numbers in OUTPUT/results.json; started again, it goes on, and on many processes with torchrun in place of python.

For those who have the authors' checkpoints (the values are theirs; none was measured here):

CountDown (2410.07761): 2 to 64 euler steps, 16,384 samples.

    diffusers-ext convert countdown ckpt.pt out/countdown
    python recipes/measure_discrete.py countdown out/countdown --samples 16384 --batch-size 1024 \\
        --steps 2 --steps 4 --steps 8 --steps 16 --steps 32 --steps 64

Text (2410.07761): SEDD small under GPT-2 large; 1,024 samples. Perplexity 423, 216, 73, 56 at 8, 16, 32, 64 steps.

    diffusers-ext convert sedd louaaron/sedd-small out/sedd-small --tokenizer gpt2
    python recipes/measure_discrete.py text out/sedd-small --samples 1024 --batch-size 16 \\
        --steps 8 --steps 16 --steps 32 --steps 64

CIFAR-10: 16 to 256 steps, 16,384 samples (2410.07761), or tauLDR's predictor-corrector (2205.14987). FID 18.31 at 512
steps. The checkpoint is tauLDR's; --features-model is the file of the Inception that docs/evaluate.md describes.

    diffusers-ext convert tauldr ckpt.pt config.yaml out/cifar10
    python recipes/measure_discrete.py images out/cifar10 CIFAR10 --samples 16384 --batch-size 512 \\
        --features inception --features-model INCEPTION --steps 16 --steps 32 --steps 64 --steps 128 --steps 256
    python recipes/measure_discrete.py images out/cifar10 CIFAR10 --samples 50000 --batch-size 512 \\
        --features inception --features-model INCEPTION --steps 500 \\
        --corrector-steps 10 --corrector-size 1.5 --corrector-entry-time 0.1

Piano (2205.14987): test.npy of tauLDR, continued after 32 tokens, 1000 steps, without and with correctors.

    diffusers-ext convert tauldr ckpt.pt config.yaml out/piano
    python recipes/measure_discrete.py continue out/piano test.npy --steps 1000
    python recipes/measure_discrete.py continue out/piano test.npy --steps 1000 --output out/piano-corrected \\
        --corrector-steps 2 --corrector-size 0.1 --corrector-entry-time 0.9
"""

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from result_rows import ResultRows

from diffusers_ext.discrete.losses import likelihood_bound
from diffusers_ext.evaluation import evaluate_images
from diffusers_ext.machine.versions import best_device
from diffusers_ext.metrics import (
    countdown_errors,
    countdown_errors_original,
    generative_perplexity,
    histogram_distance,
    ngram_divergence,
    real_word_share,
    unigram_entropy,
)
from diffusers_ext.runs.processes import end_processes, start_processes
from diffusers_ext.sampling import sample_to_folder
from diffusers_ext.schedulers.ctmc_samplers import SAMPLERS
from diffusers_ext.shipped import load_pipeline

Measure = Callable[[Path], dict[str, float]]

OPTIONS = (
    click.option("--output", type=click.Path(path_type=Path), default=None, help="By default out/NAME-of-the-model."),
    click.option(
        "--steps", "step_counts", type=click.IntRange(min=1), multiple=True, default=(64,), show_default=True
    ),
    click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True),
    click.option("--sampler", type=click.Choice(list(SAMPLERS)), default=None),
    click.option("--timestep-spacing", type=click.Choice(["uniform", "table"]), default=None),
    click.option("--corrector-steps", type=click.IntRange(min=0), default=None, help="After each step."),
    click.option("--corrector-size", type=float, default=None, help="In lengths of the step."),
    click.option("--corrector-entry-time", type=float, default=None, help="Correct steps that start at or below it."),
    click.option("--seed", default=0, show_default=True, help="Sample i is drawn with seed + i."),
    click.option(
        "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True
    ),
    click.option("--compile", "compiled", is_flag=True, help="Compile the network before drawing."),
    click.option("--device", default=None, help="By default the fastest one here."),
)
SAMPLES = click.option("--samples", type=click.IntRange(min=1), default=1024, show_default=True)


def sampling_options(command):
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def load(model: str, device: str | torch.device, dtype: str = "float32", **changes):
    """The pipeline, with those changes of the scheduler's configuration that are not None."""
    pipe = load_pipeline(model, dtype=getattr(torch, dtype))
    changes = {name: value for name, value in changes.items() if value is not None}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    return pipe.to(device)


def run(
    model, measure: Measure, samples, output, step_counts, batch_size, sampler, timestep_spacing, corrector_steps,
    corrector_size, corrector_entry_time, seed, dtype, compiled, device, format: str = "npz", **inputs,
) -> None:  # fmt: skip
    """Draw samples at each number of steps, measure the file, print the numbers and keep them."""
    device = device or best_device()
    accelerator = start_processes(device)
    is_main = accelerator is None or accelerator.is_main_process
    output = output or Path("out") / f"{Path(model).name}-measured"
    pipe = load(
        model,
        device if accelerator is None or accelerator.num_processes == 1 else accelerator.device,
        dtype,
        sampler=sampler,
        timestep_spacing=timestep_spacing,
        num_corrector_steps=corrector_steps,
        corrector_step_size_multiplier=corrector_size,
        corrector_entry_time=corrector_entry_time,
    )
    if compiled:
        pipe.model.compile()
    for steps in step_counts:
        done = sample_to_folder(
            pipe, output / f"{steps}", samples, seed=seed, batch_size=batch_size, format=format,
            accelerator=accelerator, num_inference_steps=steps, **inputs,
        )  # fmt: skip
        if is_main:
            row = {"samples": samples, **measure(done.result)}
            ResultRows(output / "results.json").put(f"{steps}", row)
            click.echo(f"{steps} steps: " + ", ".join(f"{name} {value:.6g}" for name, value in row.items()))
    end_processes(accelerator)


def summary(name: str, values: torch.Tensor) -> dict[str, float]:
    """Mean over the sequences and its standard error."""
    values = values.double()
    return {name: float(values.mean()), f"{name}_error": float(values.std() / len(values) ** 0.5)}


def read_tokens(path: Path) -> torch.Tensor:
    """(count, length) int64: an .npy, or of an .npz `valid` if it is there, else `tokens`."""
    with np.load(path) if path.suffix == ".npz" else path.open("rb") as data:
        array = np.load(data) if path.suffix != ".npz" else data["valid" if "valid" in data else "tokens"]
    return torch.from_numpy(array.astype(np.int64))


def read_training_tokens(path: Path) -> torch.Tensor:
    with np.load(path) as data:
        return torch.from_numpy(data["tokens"].astype(np.int64))


def chords(tokens: torch.Tensor, voices: int) -> torch.Tensor:
    """(count, length) tokens to (count, length / voices) numbers, the same for the same tokens at once."""
    if tokens.shape[1] % voices:
        raise click.UsageError(f"--voices {voices} must divide the {tokens.shape[1]} tokens that it is to group")
    return (tokens.unflatten(1, (-1, voices)) * 4096 ** torch.arange(voices)).sum(dim=2)


@click.group()
def main():
    """Sample a discrete diffusion model and measure what comes out."""


@main.command()
@click.argument("model")
@SAMPLES
@sampling_options
def countdown(model, samples, **options):
    """Strict error rate of CountDown sequences, and that which the authors' code counts."""

    def measure(path: Path) -> dict[str, float]:
        tokens = read_tokens(path)
        strict, original = countdown_errors(tokens), countdown_errors_original(tokens)
        return {**summary("strict", strict), **summary("original", original)}

    run(model, measure, samples, **options)


@main.command("continue")
@click.argument("model")
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--prefix-length", type=click.IntRange(min=1), default=32, show_default=True, help="Tokens given.")
@click.option(
    "--voices", type=click.IntRange(2, 5), default=None, help="Tokens that sound together; counts new chords."
)
@sampling_options
def continue_command(model, data, prefix_length, voices, **options):
    """Continue the sequences of DATA and compare the token histograms with those of the true continuations.

    DATA: an .npz with `valid` or `tokens`, or an .npy, (count, length). For scale, `other` has the same numbers of the
    continuation of the next sequence in its place. With --voices, `new_chords` is the share of chords after the prefix
    that no sequence of `tokens` holds, and `true_new_chords` that of the true continuations.
    """
    truth = read_tokens(data)
    known = None if voices is None else chords(read_training_tokens(data), voices).unique()

    def measure(path: Path) -> dict[str, float]:
        tokens, row = read_tokens(path), {}
        for name, sequences in (("", tokens), ("other_", truth.roll(1, 0))):
            size = int(max(tokens.max(), truth.max())) + 1
            distance = histogram_distance(sequences, truth, size, prefix_length)
            row |= summary(f"{name}hellinger", distance.hellinger)
            row |= summary(f"{name}outliers", distance.outlier_share)
        for name, sequences in (("", tokens), ("true_", truth)) if voices else ():
            continued = chords(sequences[:, prefix_length:], voices)
            row |= summary(f"{name}new_chords", (~torch.isin(continued, known)).double().mean(dim=1))
        return row

    given = np.arange(truth.shape[1]) < prefix_length
    run(model, measure, len(truth), tokens=truth.numpy(), given=given, **options)


@main.command()
@click.argument("model")
@SAMPLES
@click.option("--language-model", default="gpt2-large", show_default=True, help="Folder or Hub id.")
@sampling_options
def text(model, samples, language_model, **options):
    """Perplexity of generated texts under a language model that has the same tokens, and their entropy."""
    from transformers import AutoModelForCausalLM

    judge = AutoModelForCausalLM.from_pretrained(language_model).eval().to(options["device"] or best_device())

    def measure(path: Path) -> dict[str, float]:
        tokens = read_tokens(path)
        perplexity = {name: generative_perplexity(judge, tokens, average=name) for name in ("tokens", "batches")}
        return {
            "perplexity": perplexity["tokens"],
            "perplexity_of_batches": perplexity["batches"],
            **summary("entropy", unigram_entropy(tokens)),
        }

    run(model, measure, samples, **options)


@main.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@SAMPLES
@sampling_options
def words(model, folder, samples, **options):
    """Share of words that occur in FOLDER/train.txt, and the divergence of 5-grams from FOLDER/valid.txt.

    FOLDER: as recipes/shakespeare.py writes it. For scale, `chance_` has both for tokens drawn by their frequency,
    and `train_divergence` is that of as many stretches of train.txt.
    """
    train, valid = ((folder / name).read_text() for name in ("train.txt", "valid.txt"))
    tokenizer, pool = load_pipeline(model).tokenizer, read_training_tokens(folder / "tokens.npz").flatten()

    def measure(path: Path) -> dict[str, float]:
        tokens = read_tokens(path)
        texts = tokenizer.batch_decode(tokens)
        drawn = torch.randint(len(pool), tokens.shape, generator=torch.Generator().manual_seed(0))
        chance = tokenizer.batch_decode(pool[drawn])
        size = sum(map(len, texts)) // len(texts)
        starts = np.linspace(0, len(train) - size, len(texts)).astype(int)
        real = [train[start : start + size] for start in starts]
        held_out = [valid[start : start + size] for start in range(0, len(valid) - size, size)]
        return {
            **summary("real_words", torch.tensor(real_word_share(texts, train))),
            **summary("chance_real_words", torch.tensor(real_word_share(chance, train))),
            "divergence": ngram_divergence(texts, held_out),
            "chance_divergence": ngram_divergence(chance, held_out),
            "train_divergence": ngram_divergence(real, held_out),
        }

    run(model, measure, samples, **options)


@main.command()
@click.argument("model")
@click.argument("reference", type=click.Path(path_type=Path, exists=True))
@SAMPLES
@click.option("--features", default="inception", show_default=True, help="As of diffusers-ext evaluate.")
@click.option("--features-model", default=None, help="File or folder of its weights.")
@sampling_options
def images(model, reference, samples, features, features_model, **options):
    """Fréchet distance of images to those of REFERENCE, a folder, a zip or an .npz."""

    def measure(path: Path) -> dict[str, float]:
        result = evaluate_images(path, reference, features, ["frechet"], features_model=features_model)
        return {"frechet": result["metrics"]["frechet"]}

    run(model, measure, samples, **options)


@main.command()
@click.argument("model")
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--times", default=64, show_default=True, help="Noise levels a sequence.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--device", default=None, help="By default the fastest one here.")
def likelihood(model, data, times, batch_size, device):
    """Upper bound on the negative log likelihood of the sequences of DATA, in nats a token."""
    pipe = load(model, device or best_device())
    generator = torch.Generator(pipe.device).manual_seed(0)
    bound = likelihood_bound(
        pipe.model, pipe.scheduler, read_tokens(data), num_times=times, batch_size=batch_size, generator=generator
    )
    numbers = summary("bound", bound)
    click.echo(f"bound {numbers['bound']:.4f} ± {numbers['bound_error']:.4f} nats a token, {len(bound)} sequences")


if __name__ == "__main__":
    main()
