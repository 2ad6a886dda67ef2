"""Training of a postprocessing flow: rectified flow from generated samples to their nearest real neighbours."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from ..pipelines.flow_postprocessing import velocity
from ..processes import Processes
from ..shards import lock
from .features import as_unit, extract_features, pixel_features
from .neighbours import Neighbours, balanced_weights, find_neighbours

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class TrainedFlow:
    """model: the given one, with averaged weights, in eval mode. history: step, loss, and where held-out samples were
    measured, validation_loss."""

    model: torch.nn.Module
    history: list[dict]


@dataclass(frozen=True)
class Pairs:
    """Generated samples and their neighbours. draw gives pairs of the given rows, each neighbour drawn anew, uniformly
    or with the probabilities weights (n, k). Those that keep (n,) marks are their own x_1."""

    samples: torch.Tensor
    real: torch.Tensor
    indices: torch.Tensor
    labels: torch.Tensor | None
    weights: torch.Tensor | None = None
    keep: torch.Tensor | None = None

    def draw(self, rows: torch.Tensor, generator: torch.Generator, device: torch.device):
        """On device: x_0 and x_1 (batch, ...) float32, flow times t (batch,), labels (batch,) or None."""
        if self.weights is None:
            ranks = torch.randint(self.indices.shape[1], rows.shape, generator=generator)
        else:
            ranks = torch.multinomial(self.weights[rows], 1, generator=generator)[:, 0]
        chosen = self.indices[rows, ranks]
        t = torch.rand(len(rows), generator=generator).to(device)
        x0, x1 = (
            as_unit(data[index.to(data.device)].to(device))
            for data, index in ((self.samples, rows), (self.real, chosen))
        )
        if self.keep is not None:
            x1 = torch.where(self.keep[rows].to(device).view(-1, *[1] * (x0.ndim - 1)), x0, x1)
        return x0, x1, t, None if self.labels is None else self.labels[rows].to(device)


def flow_loss(
    model, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None
) -> torch.Tensor:
    r"""The rectified-flow loss (arXiv 2209.03003; as used in arXiv 2503.10638), a scalar.

    .. math:: \| v_\theta(x_t, c, t) - (x_1 - x_0) \|^2,\quad x_t = (1 - t) x_0 + t x_1

    averaged over all entries. x0, x1: generated and real samples (batch, ...). t: (batch,) in [0, 1]. class_labels:
    (batch,) for a conditional model.
    """
    time = t.view(-1, *[1] * (x0.ndim - 1))
    return F.mse_loss(velocity(model, (1 - time) * x0 + time * x1, t, class_labels).float(), x1 - x0)


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
        optimizer: "adam" or "adamw"; weight_decay is for the latter.
        ema_decay: of the average of the weights, which is what counts in the end.
        max_grad_norm: gradients are clipped to it; None does not clip.
        mixed_precision: "no", "fp16" or "bf16"; None is what `accelerate launch` was told.
        validation_samples: how many samples are held out to measure the averaged weights; by default a twentieth, at
            most 1000. 0 holds out none.
        log_every, checkpoint_every: in iterations.

    Runs on one process or, under `accelerate launch`, on many. A continued run draws what an uninterrupted one would
    have drawn.

    Raises ValueError for data or arguments that do not fit, and for an output folder of another run or in use by one;
    FloatingPointError when the loss or the weights stop being finite, with the last good checkpoint kept.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {sorted(OPTIMIZERS)}, got {optimizer!r}")
    counts = {"steps": steps, "batch_size": batch_size, "log_every": log_every, "checkpoint_every": checkpoint_every}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    sample_labels = _check_data(model, samples, real, sample_labels)
    held_out = min(1000, len(samples) // 20) if validation_samples is None else validation_samples
    if not 0 <= held_out < len(samples):
        raise ValueError(f"validation_samples must be in [0, {len(samples)}), got {held_out}")
    accelerator = Accelerator(mixed_precision=mixed_precision)
    settings = {"k": k, "batch_size": batch_size, "processes": accelerator.num_processes, "optimizer": optimizer}
    settings |= {"learning_rate": learning_rate, "weight_decay": weight_decay, "ema_decay": ema_decay, "seed": seed}
    keep = _check_keep(keep, len(samples))
    settings |= {"balance": balance, "kept": 0 if keep is None else int(keep.sum())}
    settings |= {"held_out": held_out, "samples": _summary(samples), "real": _summary(real)}
    with _Run(accelerator, output, settings) as run:
        neighbours = neighbours or run.neighbours(samples, real, k, features, sample_labels, real_labels)
        indices = _checked_indices(neighbours, len(samples), len(real), k)
        weights = torch.ones(indices.shape) if balance else None
        if balance:
            repaired = torch.ones(len(samples), dtype=torch.bool) if keep is None else ~keep
            weights[repaired] = balanced_weights(indices[repaired], len(real))
        pairs = Pairs(samples, real, indices, None if _classes(model) is None else sample_labels, weights, keep)

        decay = {"weight_decay": weight_decay} if optimizer == "adamw" else {}
        optimizer = OPTIMIZERS[optimizer](model.parameters(), lr=learning_rate, **decay)
        run.prepare(model, optimizer, EMAModel(model.parameters(), decay=ema_decay))
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
        validation, training = order[:held_out], order[held_out:]
        total, since = torch.zeros((), device=accelerator.device), 0
        for step in run.bar(steps, progress):
            generator = _generator(seed, accelerator.process_index, step)
            rows = training[torch.randint(len(training), (batch_size,), generator=generator)]
            loss = flow_loss(run.model, *pairs.draw(rows, generator, accelerator.device))
            run.update(loss, max_grad_norm)
            total, since = total + loss.detach(), since + 1
            done = step + 1
            if done % log_every == 0 or done % checkpoint_every == 0 or done == steps:
                mean = accelerator.reduce(total / since, "mean").item()
                run.check_finite(mean, done)
                total, since = torch.zeros_like(total), 0
                measured = {"validation_loss": run.validate(pairs, validation, batch_size)} if held_out else {}
                run.history.append({"step": done, "loss": mean, **measured})
            if done % checkpoint_every == 0 or done == steps:
                run.save(done)
        return run.finish()


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


def _summary(data: torch.Tensor) -> list:
    """Shape and, to six digits, the sum: enough to notice other data."""
    return [*data.shape, float(f"{sum(part.double().sum().item() for part in data.split(4096)):.6g}")]


def _generator(*numbers: int) -> torch.Generator:
    """A stream of its own for every step and process, so that a continued run repeats nothing and skips nothing."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)


class _Run:
    """The state of a training run in memory and in its folder, which it holds, as a context, while it goes on."""

    def __init__(self, accelerator: Accelerator, output: str | Path | None, settings: dict):
        self.accelerator, self.folder = accelerator, None if output is None else Path(output)
        self.settings = settings
        self.history: list[dict] = []
        self.saved = 0
        self._held = ExitStack()

    def __enter__(self) -> "_Run":
        try:
            if self.folder is not None:
                Processes(self.accelerator).agreed(self._open)
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._held.close()

    def _open(self) -> None:
        """In the main process: lock the folder, and begin it or go on with what it holds."""
        path = self.folder / "settings.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(lock(self.folder))
        if path.exists() and (old := json.loads(path.read_text())) != self.settings:
            changed = sorted(name for name in self.settings if old.get(name) != self.settings[name])
            raise ValueError(
                f"output {str(self.folder)!r} holds a run with other {', '.join(changed)}; go on with the same, or"
                " choose a new folder"
            )
        _write(path, json.dumps(self.settings, indent=2))

    def neighbours(self, samples, real, k: int, features, sample_labels, real_labels) -> Neighbours:
        """Those of the folder, or found by the main process, which the others wait for."""
        path = None if self.folder is None else self.folder / "neighbours.safetensors"
        with self.accelerator.main_process_first():
            if path is not None and path.exists():
                return Neighbours.load(path)
            if features != "pixel" and not callable(features):
                raise ValueError(f'features must be "pixel" or a function of samples, got {features!r}')
            extractor = pixel_features if features == "pixel" else features
            points = extract_features(samples, extractor), extract_features(real, extractor)
            labels = (None, None) if real_labels is None else (sample_labels, real_labels)
            found = find_neighbours(*points, k, *labels)
            if path is not None:
                found.save(path)
            return found

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel) -> None:
        """Hand everything to accelerate and go back to the newest checkpoint, if there is one."""
        self.model, self.optimizer = self.accelerator.prepare(model.train(), optimizer)
        self.ema = ema
        ema.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(ema)
        if self.folder is not None and (checkpoints := self._checkpoints()):
            self.saved, newest = max(checkpoints)
            self.accelerator.load_state(str(newest))
            self.history = json.loads((newest / "history.json").read_text())

    def bar(self, steps: int, show: bool) -> Iterator[int]:
        from tqdm import tqdm

        hidden = not show or not self.accelerator.is_main_process
        with tqdm(total=steps, initial=self.saved, disable=hidden, desc="training the flow") as bar:
            for step in range(self.saved, steps):
                yield step
                bar.update()
                if self.history:
                    bar.set_postfix(loss=f"{self.history[-1]['loss']:.4f}", refresh=False)

    def update(self, loss: torch.Tensor, max_grad_norm: float | None) -> None:
        self.accelerator.backward(loss)
        if max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())

    def check_finite(self, loss: float, step: int) -> None:
        """Raises FloatingPointError for a loss, or weights after the last step, that are not finite."""
        weights = [*self.accelerator.unwrap_model(self.model).parameters(), *self.ema.shadow_params]
        if np.isfinite(loss) and all(torch.isfinite(weight).all() for weight in weights):
            return
        kept = f"the checkpoint of step {self.saved} in {self.folder}" if self.saved else "no checkpoint yet"
        raise FloatingPointError(
            f"loss {loss} or weights stopped being finite by step {step}; kept is {kept}; use a lower learning_rate, a"
            " smaller max_grad_norm, or mixed_precision='bf16' in place of 'fp16'"
        )

    @torch.no_grad()
    def validate(self, pairs: Pairs, rows: torch.Tensor, batch_size: int) -> float:
        """Mean loss of the averaged weights on the held-out samples, always with the same neighbours and times."""
        generator = torch.Generator().manual_seed(0)
        total = 0.0
        with self._averaged():
            for part in rows.split(batch_size):
                drawn = pairs.draw(part, generator, self.accelerator.device)
                total += flow_loss(self.model, *drawn).item() * len(part)
        return total / len(rows)

    @contextmanager
    def _averaged(self):
        """The model with its averaged weights, in eval mode."""
        self.model.eval()
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.model.parameters())
            self.model.train()

    def _checkpoints(self) -> list[tuple[int, Path]]:
        paths = self.folder.glob("checkpoint-*")
        return [(int(path.name.split("-")[1]), path) for path in paths if path.name.split("-")[1].isdigit()]

    def save(self, step: int) -> None:
        """Write a checkpoint, complete before it gets its name, then remove the older ones."""
        if self.folder is None:
            return
        path = self.folder / f"checkpoint-{step}"
        fresh = path.with_name(path.name + ".new")
        self.accelerator.save_state(str(fresh))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (fresh / "history.json").write_text(json.dumps(self.history))
            os.replace(fresh, path)
            for other in self.folder.glob("checkpoint-*"):
                if other != path:
                    rmtree(other, ignore_errors=True)
            _write(self.folder / "history.json", json.dumps(self.history, indent=1))
            if find_spec("matplotlib") is not None:
                _plot(self.history, self.folder / "loss.png")
        self.accelerator.wait_for_everyone()
        self.saved = step

    def finish(self) -> TrainedFlow:
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.ema.copy_to(model.parameters())
        return TrainedFlow(model.eval(), self.history)


def _write(path: Path, text: str) -> None:
    """Beside the file, then in its place."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text + "\n")
    os.replace(fresh, path)


def _plot(history: list[dict], path: Path) -> None:
    """The curves of the loss and, where there is one, of the validation loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("validation_loss", "held out, averaged weights")):
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
    axes.set(xlabel="iteration", ylabel="rectified-flow loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
