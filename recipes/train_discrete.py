"""Train a discrete diffusion model on CountDown or on token sequences of a file.

    accelerate launch recipes/train_discrete.py --output out/countdown --steps 4000
    accelerate launch recipes/train_discrete.py --data tokens.npz --output out/own --kernel uniform

A `SEDDTransformer` and a `CTMCScheduler`, saved together as a DiscreteDiffusionPipeline in fp16; the weights are an
exponential moving average. The objective is the score entropy (`--objective score`), or for networks of x_0 the cross
entropy (`--objective x0`). `--data` is an .npz with `tokens`, (count, length) integers from 0, and perhaps `valid`,
others of the same length, whose likelihood is measured at the end; recipes/jsb_chorales.py and recipes/shakespeare.py
make one. Without it
CountDown sequences (2410.07761) are drawn anew at every step, and the strict error rate of samples is printed at the
end. An interrupted run goes on from its last checkpoint; a finished one measures again.

The defaults of the sizes are those of the paper's CountDown model: 32 tokens, length 256, 4 blocks of width 128. Its
training there: Adam, learning rate 1e-3 after 5000 warm-up steps, clipping at 1, batch 2048, `--weighting none`, times
uniform in [1e-3, 1]. SEDD small on text: AdamW 3e-4, warm-up 2500, batch 512, 1.3 million steps, average 0.9999,
`--hidden-size 768 --num-blocks 12 --num-heads 12`, length 1024, 50,257 tokens.

Metric reached: diffusers_ext/assets/countdown-sedd/README.md and diffusers_ext/assets/jsb-sedd/README.md.
"""

from copy import deepcopy
from pathlib import Path

import click
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from transformers import AutoTokenizer

from diffusers_ext import CTMCScheduler, DiscreteDiffusionPipeline, SEDDTransformer
from diffusers_ext.discrete.losses import likelihood_bound, score_entropy_loss, x0_cross_entropy
from diffusers_ext.metrics import countdown_errors, countdown_errors_original, countdown_sequences
from diffusers_ext.runs.bar import steps_left
from diffusers_ext.runs.checkpoints import Checkpoints
from diffusers_ext.runs.processes import end_processes
from diffusers_ext.runs.provenance import hash_of

FIRST_TIME = 1e-3  # training times are uniform in [FIRST_TIME, 1]


def load_tokens(path: Path, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`tokens` and, if there, `valid` of an .npz, (count, length) integers of the file's type; int32 for uint16."""
    with np.load(path) as data:
        arrays = [data["tokens"], *([data["valid"]] if "valid" in data else [])]
    for array in arrays:
        fits = array.ndim == 2 and array.shape[1:] == arrays[0].shape[1:]
        if not fits or array.dtype.kind not in "iu" or array.min() < 0:
            got = [f"{array.dtype} {array.shape}" for array in arrays]
            raise click.BadParameter(f"tokens and valid must be (count, length) integers >= 0, got {got}")
        if array.max() >= num_tokens:
            raise click.BadParameter(f"--num-tokens is {num_tokens}, the data has token {array.max()}")
    # torch 2.6 has no indexing for uint16
    tokens, *valid = (torch.from_numpy(a.astype(np.int32) if a.dtype == np.uint16 else a) for a in arrays)
    return tokens, valid[0] if valid else None


def build(kernel, objective, num_tokens, length, hidden_size, num_blocks, num_heads, num_streams=1):
    """The network and the scheduler that belong together; the absorbing kernel adds its mask to the tokens."""
    vocab_size = num_tokens + (kernel == "absorbing")
    scheduler = CTMCScheduler(
        kernel=kernel, vocab_size=vocab_size, prediction_type="log_score" if objective == "score" else "x0"
    )
    model = SEDDTransformer(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_blocks=num_blocks,
        num_heads=num_heads,
        scale_by_sigma=kernel == "absorbing" and objective == "score",
        sequence_length=length,
        num_streams=num_streams,
    )
    return model, scheduler


def loss_of(model, scheduler: CTMCScheduler, original: torch.Tensor, weighting: str) -> torch.Tensor:
    """Mean loss a position at uniform times; original: (batch, length) int64."""
    timesteps = FIRST_TIME + (1 - FIRST_TIME) * torch.rand(len(original), device=original.device)
    noisy = scheduler.add_noise(original, None, timesteps)
    output = model(noisy, scheduler.model_time(timesteps, len(original))).sample.float()
    if scheduler.config.prediction_type == "x0":
        return x0_cross_entropy(scheduler, output, noisy, original).mean()
    loss = score_entropy_loss(scheduler, output, noisy, original, timesteps, weighting)
    return loss.mean() / original.shape[1]


def save_pipeline(model: SEDDTransformer, ema: EMAModel, scheduler: CTMCScheduler, output: Path, tokenizer=None):
    """Write the averaged weights in fp16 as a Hub-layout folder; returns the pipeline in float32."""
    averaged = deepcopy(model)
    ema.copy_to(averaged.parameters())
    DiscreteDiffusionPipeline(averaged.half(), scheduler, tokenizer).save_pretrained(output)
    return DiscreteDiffusionPipeline(averaged.float().eval(), scheduler, tokenizer)


def report_countdown(pipe: DiscreteDiffusionPipeline, samples: int, steps: int) -> str:
    """Strict and original error rates of samples of the Euler sampler."""
    generator = torch.Generator().manual_seed(0)
    tokens = pipe(batch_size=samples, num_inference_steps=steps, generator=generator).tokens.cpu()
    strict, original = countdown_errors(tokens), countdown_errors_original(tokens)
    return f"strict error {strict.mean():.4f}, original {original.mean():.4f} ({samples} samples, {steps} steps)"


def report_validation(pipe: DiscreteDiffusionPipeline, valid: torch.Tensor, batch_size: int) -> str:
    """Mean bound on the negative log likelihood of validation sequences."""
    generator = torch.Generator(pipe.device).manual_seed(0)
    bound = likelihood_bound(pipe.model, pipe.scheduler, valid, batch_size=batch_size, generator=generator)
    error = bound.std() / len(bound) ** 0.5
    return f"validation bound {bound.mean():.4f} ± {error:.4f} nats a token ({len(bound)} sequences)"


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="tokens.npz; default: CountDown.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--tokenizer", default=None, help="Folder or Hub id of the tokenizer of --data, saved with the model.")
@click.option("--kernel", type=click.Choice(["absorbing", "uniform"]), default="absorbing", show_default=True)
@click.option("--objective", type=click.Choice(["score", "x0"]), default="score", show_default=True)
@click.option("--weighting", type=click.Choice(["sigma", "none"]), default="sigma", show_default=True)
@click.option("--num-tokens", default=32, show_default=True, help="Without the mask.")
@click.option("--length", default=256, show_default=True, help="Of CountDown; that of --data otherwise.")
@click.option("--hidden-size", default=128, show_default=True)
@click.option("--num-blocks", default=4, show_default=True)
@click.option("--num-heads", default=4, show_default=True)
@click.option("--num-streams", default=1, show_default=True, help="Voices that take turns in the sequences.")
@click.option("--steps", default=4000, show_default=True)
@click.option("--batch-size", default=128, show_default=True, help="Sequences a step and process.")
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--warmup", default=200, show_default=True)
@click.option("--ema-decay", default=0.999, show_default=True)
@click.option("--mixed-precision", type=click.Choice(["no", "bf16"]), default="no", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--checkpoint-every", default=500, show_default=True, help="Steps between checkpoints.")
@click.option("--eval-samples", default=256, show_default=True, help="CountDown only; 0 samples none.")
@click.option("--eval-steps", default=256, show_default=True)
def main(
    data,
    output,
    tokenizer,
    kernel,
    objective,
    weighting,
    num_tokens,
    length,
    hidden_size,
    num_blocks,
    num_heads,
    num_streams,
    steps,
    batch_size,
    lr,
    warmup,
    ema_decay,
    mixed_precision,
    seed,
    checkpoint_every,
    eval_samples,
    eval_steps,
):
    """Train a discrete diffusion model."""
    tokenizer = None if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    set_seed(seed, device_specific=True)
    tokens, valid = (None, None) if data is None else load_tokens(data, num_tokens)
    length = length if tokens is None else tokens.shape[1]
    model, scheduler = build(kernel, objective, num_tokens, length, hidden_size, num_blocks, num_heads, num_streams)
    ema = EMAModel(model.parameters(), decay=ema_decay, model_cls=SEDDTransformer, model_config=model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    settings = {
        "data": hash_of(tokens), "kernel": kernel, "objective": objective, "weighting": weighting,
        "num_tokens": num_tokens, "length": length, "hidden_size": hidden_size, "num_blocks": num_blocks,
        "num_heads": num_heads, "num_streams": num_streams, "batch_size": batch_size, "lr": lr, "warmup": warmup,
        "ema_decay": ema_decay, "mixed_precision": mixed_precision, "seed": seed,
    }  # fmt: skip
    checkpoints = Checkpoints(accelerator, output, settings)
    first, _ = checkpoints.load(steps)

    running = None
    for step in steps_left(first, steps, accelerator.is_main_process, lambda: running):  # noqa: B023, the latest
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup)
        if tokens is None:
            batch = countdown_sequences(batch_size, length, num_tokens)
        else:
            batch = tokens[torch.randint(0, len(tokens), (batch_size,))].long()
        loss = loss_of(model, scheduler, batch.to(accelerator.device), weighting)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            checkpoints.save(step + 1)
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model)
        pipe = save_pipeline(trained, ema, scheduler, output, tokenizer).to(accelerator.device)
        if valid is not None:
            accelerator.print(report_validation(pipe, valid, batch_size))
        if tokens is None and eval_samples:
            accelerator.print(report_countdown(pipe, eval_samples, eval_steps))
    accelerator.print(f"{steps - first} steps, running loss {running}")
    end_processes(accelerator)


if __name__ == "__main__":
    main()
