"""Training of a postprocessing flow: rectified flow from generated samples to their nearest real neighbours."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from ..pipelines.call_arguments import checked_arguments
from ..runs.provenance import hash_of
from .features import as_unit, feature_name
from .neighbours import Neighbours, balanced_weights
from .pairs import Pairs, flow_loss
from .training_run import TrainedFlow, TrainingRun

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@checked_arguments
def train_postprocessing_flow(
    samples: torch.Tensor,
    real: torch.Tensor,
    k: int = 20,
    *,
    model: torch.nn.Module,
    steps: int,
    output: str | Path | None = None,
    sample_labels: torch.Tensor | None = None,
    real_labels: torch.Tensor | None = None,
    features: str | Callable[[torch.Tensor], torch.Tensor] = "pixel",
    neighbours: Neighbours | None = None,
    balance: bool = False,
    keep: torch.Tensor | None = None,
    batch_size: int = 128,
    learning_rate: float = 2e-4,
    optimizer: str = "adam",
    weight_decay: float = 0.0,
    ema_decay: float = 0.9999,
    max_grad_norm: float | None = 1.0,
    mixed_precision: str | None = None,
    validation_samples: int | None = None,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> TrainedFlow:
    """Train the velocity network of `FlowPostprocessingPipeline` (arXiv 2503.10638).

    In every iteration each sample x_0 of the batch gets, anew, one of its k nearest real neighbours as x_1. Samples of
    several guidance scales together make one flow for all of them.

    Runs on one process or, under `accelerate launch`, on many. A continued run draws what an uninterrupted one would
    have drawn.

    Args:
        samples: what the base model generated, (n, ...), in [-1, 1], or uint8 pixels, or scaled latents.
        real: real samples (m, ...) of the same form.
        k: neighbours to draw from.
        model: the network, float32, called like a `UNet2DModel`; it is trained in place.
        steps: iterations in all, those of an interrupted run included.
        output: folder of checkpoints, from which a second call goes on, and of neighbours.safetensors, history.json
            and loss.png (with matplotlib). None: nothing is written.
        sample_labels: class indices (n,), for a network whose config has num_class_embeds, or for real_labels.
        real_labels: class indices (m,); if given, neighbours are of the sample's class.
        features: "pixel", or a function of samples (b, ...) that returns the vectors (b, dim) to compare, such as
            `DINOv2Features`.
        neighbours: found before, with at least k of them; features are not used then.
        balance: draw from the k nearest with `balanced_weights`, so that real samples are visited evenly. False, as in
            the paper, draws uniformly and favours hubs.
        keep: (n,) bool, samples that need no repair, such as those of the best guidance scale: they are their own
            targets, so that the flow learns to leave their like alone. None, as in the paper, repairs all.
        batch_size: samples an iteration and process.
        learning_rate: of the optimizer.
        optimizer: "adam" or "adamw".
        weight_decay: of "adamw".
        ema_decay: of the average of the weights, which is what counts in the end.
        max_grad_norm: gradients are clipped to it; None does not clip.
        mixed_precision: "no", "fp16" or "bf16"; None is what `accelerate launch` was told.
        validation_samples: how many samples are held out to measure the averaged weights; by default a twentieth, at
            most 1000. 0 holds out none.
        log_every: iterations between two losses in the history.
        checkpoint_every: iterations between two checkpoints.
        seed: of everything that is drawn.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for data or arguments that do not fit, and for an output folder of another run or in use by one.
        FloatingPointError: when the loss or the weights stop being finite, with the last good checkpoint kept.
    """
    _check_choices(optimizer, features)
    _check_counts(steps=steps, batch_size=batch_size, log_every=log_every, checkpoint_every=checkpoint_every)
    _check_rates(learning_rate, weight_decay, ema_decay, max_grad_norm)
    sample_labels = _check_data(model, samples, real, sample_labels)
    held_out = _number_held_out(validation_samples, len(samples))
    accelerator = Accelerator(mixed_precision=mixed_precision)
    keep = _check_keep(keep, len(samples))
    settings = {
        "k": k, "batch_size": batch_size, "processes": accelerator.num_processes, "optimizer": optimizer,
        "learning_rate": learning_rate, "weight_decay": weight_decay, "ema_decay": ema_decay, "seed": seed,
        "balance": balance, "keep": _summary(keep), "max_grad_norm": max_grad_norm, "held_out": held_out,
        "samples": _summary(samples), "real": _summary(real), "sample_labels": _summary(sample_labels),
        "real_labels": _summary(real_labels), "features": feature_name(features),
        "neighbours": None if neighbours is None else _summary(neighbours.indices),
        "mixed_precision": None if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
    }  # fmt: skip
    with TrainingRun(accelerator, output, settings, steps) as run:
        neighbours = neighbours or run.neighbours(samples, real, k, features, sample_labels, real_labels)
        indices = _checked_indices(neighbours, len(samples), len(real), k)
        weights = _weights_of_repaired(indices, len(real), keep) if balance else None
        pairs = Pairs(samples, real, indices, None if _classes(model) is None else sample_labels, weights, keep)

        decay = {"weight_decay": weight_decay} if optimizer == "adamw" else {}
        optimizer = OPTIMIZERS[optimizer](model.parameters(), lr=learning_rate, **decay)
        run.prepare(model, optimizer, EMAModel(model.parameters(), decay=ema_decay))
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
        validation, training = order[:held_out], order[held_out:]
        total, since = torch.zeros((), device=accelerator.device), 0
        for step in run.bar(progress):
            loss = flow_loss(run.model, *_draw(pairs, training, batch_size, seed, step, accelerator))
            run.update(loss, max_grad_norm)
            total, since, done = total + loss.detach(), since + 1, step + 1
            if done % log_every == 0 or done % checkpoint_every == 0 or done == steps:
                run.log(total / since, done, pairs, validation, batch_size)
                total, since = torch.zeros_like(total), 0
            if done % checkpoint_every == 0 or done == steps:
                run.save(done)
        return run.finish()


def _draw(pairs: Pairs, rows: torch.Tensor, batch_size: int, seed: int, step: int, accelerator) -> tuple:
    """Pairs of an iteration: they depend on the seed, the process and the iteration only, so a run can go on."""
    generator = _generator(seed, accelerator.process_index, step)
    drawn = rows[torch.randint(len(rows), (batch_size,), generator=generator)]
    return pairs.draw(drawn, generator, accelerator.device)


def _check_choices(optimizer: str, features) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {sorted(OPTIMIZERS)}, got {optimizer!r}")
    if features != "pixel" and not callable(features):
        raise ValueError(f'features must be "pixel" or a function of samples, got {features!r}')


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")


def _check_rates(learning_rate: float, weight_decay: float, ema_decay: float, max_grad_norm: float | None) -> None:
    for name, value, fine, allowed in (
        ("learning_rate", learning_rate, learning_rate > 0, "> 0"),
        ("weight_decay", weight_decay, weight_decay >= 0, ">= 0"),
        ("ema_decay", ema_decay, 0 <= ema_decay <= 1, "in [0, 1]"),
        ("max_grad_norm", max_grad_norm or 1.0, max_grad_norm is None or max_grad_norm > 0, "> 0 or None"),
    ):
        if not (math.isfinite(value) and fine):
            raise ValueError(f"{name} must be a finite number {allowed}, got {value}")


def _number_held_out(wanted: int | None, samples: int) -> int:
    held_out = min(1000, samples // 20) if wanted is None else wanted
    if not 0 <= held_out < samples:
        raise ValueError(f"validation_samples must be in [0, {samples}), got {held_out}")
    return held_out


def _check_data(model, samples, real, labels) -> torch.Tensor | None:
    """Labels as int64; raises ValueError for data that do not fit each other or the network."""
    for name, data in (("samples", samples), ("real", real)):
        if not isinstance(data, torch.Tensor) or data.ndim < 2 or not len(data):
            raise ValueError(f"{name} must be a tensor (number, ...), got {getattr(data, 'shape', type(data))}")
        if data.dtype != torch.uint8 and not data.is_floating_point():
            raise ValueError(f"{name} must be uint8 pixels or floating point in [-1, 1], got {data.dtype}")
        if not all(torch.isfinite(part).all() for part in data.split(4096)):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if samples.shape[1:] != real.shape[1:]:
        raise ValueError(f"samples and real must have one shape, got {tuple(samples.shape)} and {tuple(real.shape)}")
    for name, data in (("samples", samples), ("real", real)):
        low, high = as_unit(data[:4096]).aminmax()
        if data.ndim == 4 and data.shape[1] in (1, 3) and (low >= 0 or high > 8):
            raise ValueError(
                f"{name} must be images in [-1, 1] or uint8, got values from {low:.3g} to {high:.3g}; images in [0, 1]"
                " become so by 2 x - 1"
            )
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError("model must be float32; pass mixed_precision= for a faster forward pass")
    conditional = _classes(model)
    if labels is None:
        if conditional is not None:
            raise ValueError(f"sample_labels must be given: the model is conditional on {conditional} classes")
        return None
    labels = torch.as_tensor(labels).cpu()
    if labels.shape != (len(samples),) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"sample_labels must be {len(samples)} integers, got {labels.dtype} {tuple(labels.shape)}")
    if conditional is not None and not 0 <= labels.min() <= labels.max() < conditional:
        raise ValueError(f"sample_labels must be in [0, {conditional}), got {labels.min()} to {labels.max()}")
    return labels.long()


def _check_keep(keep, number: int) -> torch.Tensor | None:
    if keep is None:
        return None
    keep = torch.as_tensor(keep).cpu()
    if keep.shape != (number,) or keep.dtype != torch.bool or keep.all():
        raise ValueError(f"keep must be {number} booleans, not all true, got {keep.dtype} {tuple(keep.shape)}")
    return keep


def _weights_of_repaired(indices: torch.Tensor, num_real: int, keep: torch.Tensor | None) -> torch.Tensor:
    """Balanced among the samples that are to be repaired; of the others no neighbour is ever used."""
    if keep is None:
        return balanced_weights(indices, num_real)
    weights = torch.ones(indices.shape)
    weights[~keep] = balanced_weights(indices[~keep], num_real)
    return weights


def _classes(model: torch.nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "num_class_embeds", None)


def _checked_indices(neighbours: Neighbours, samples: int, real: int, k: int) -> torch.Tensor:
    indices = neighbours.indices
    if len(indices) != samples or indices.shape[1] < k or not 0 <= indices.min() <= indices.max() < real:
        raise ValueError(
            f"neighbours must hold {k} or more indices below {real} for each of {samples} samples, got"
            f" {tuple(indices.shape)} up to {indices.max()}; they are of other data or another k, search again"
        )
    return indices[:, :k]


def _summary(data: torch.Tensor | None) -> list | None:
    """Shape and a hash of the values: other data, and the same in another order, are other."""
    if data is None:
        return None
    data = torch.as_tensor(data)
    return [*data.shape, hash_of(data)[:16]]


def _generator(*numbers: int) -> torch.Generator:
    """A stream of its own for every step and process, so that a continued run repeats nothing and skips nothing."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)
