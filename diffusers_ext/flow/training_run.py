"""A training as it goes on: its folder, checkpoints, averaged weights, curves, and the processes that share it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from ..checkpoints.tensor_files import read_json
from ..runs.bar import steps_left
from ..runs.checkpoints import Checkpoints
from ..runs.files import check_folder, remove_leftovers, replacing, write_json
from ..runs.kept import check_same
from ..runs.lock import lock
from ..runs.processes import Processes
from .features import extract_features, pixel_features
from .neighbours import Neighbours, find_neighbours
from .pairs import Pairs, flow_loss

SETTINGS, NEIGHBOURS = "settings.json", "neighbours.safetensors"


@dataclass(frozen=True)
class TrainedFlow:
    """What a training returns.

    Attributes:
        model: the given one, with averaged weights, in eval mode.
        history: step, loss, and where held-out samples were measured, validation_loss.
    """

    model: torch.nn.Module
    history: list[dict]


def check_output(folder: str | Path) -> Path:
    """The resolved path of a folder for a training: new, empty, or begun by one.

    Args:
        folder: of the run.

    Raises:
        ValueError: for others.
    """
    folder = check_folder(folder, SETTINGS)
    path = folder / SETTINGS
    if path.exists() and not {"k", "ema_decay", "samples", "real", "neighbours"} <= set(read_json(path)):
        raise ValueError(f"{path} was not written by this command; choose another output folder")
    return folder


class TrainingRun:
    """The state of a training run in memory and in its folder, which it holds, as a context, while it goes on."""

    def __init__(self, accelerator: Accelerator, output: str | Path | None, settings: dict, steps: int):
        self.accelerator, self.processes = accelerator, Processes(accelerator)
        # Judged by one process, since another may find what the first has begun there.
        self.folder = None if output is None else self.processes.agreed(lambda: check_output(output))
        self.settings, self.steps = settings, steps
        self.checkpoints = None if output is None else Checkpoints(accelerator, self.folder)
        self.history: list[dict] = []
        self.saved = 0
        self._held = ExitStack()

    def __enter__(self) -> "TrainingRun":
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as held:
                held.enter_context(lock(self.folder, self.processes))
                self.processes.agreed(self._open)
                self._held = held.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._held.close()

    def _open(self) -> None:
        """In the main process: begin the folder, or go on with what it holds. Without neighbours and checkpoints it is
        begun anew, whatever its settings."""
        path = self.folder / SETTINGS
        remove_leftovers(self.folder)
        if (self.folder / NEIGHBOURS).exists() or len(self.checkpoints):
            check_same(self.folder, read_json(path), self.settings)
        write_json(path, self.settings)

    def neighbours(
        self,
        samples: torch.Tensor,
        real: torch.Tensor,
        k: int,
        features: str | Callable,
        sample_labels: torch.Tensor | None,
        real_labels: torch.Tensor | None,
    ) -> Neighbours:
        """Those of the folder, or found by the main process, which others wait for; images (n, ...), labels (n,)."""
        path = None if self.folder is None else self.folder / NEIGHBOURS
        with self.accelerator.main_process_first():
            if path is not None and path.exists():
                return Neighbours.load(path)
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
        if self.checkpoints is not None:
            self.saved, self.history = self.checkpoints.load(self.steps)

    def bar(self, show: bool) -> Iterator[int]:
        """The iterations that are left, with a progress bar in the main process."""
        shown = show and self.accelerator.is_main_process
        return steps_left(self.saved, self.steps, shown, lambda: self.history[-1]["loss"] if self.history else None)

    def update(self, loss: torch.Tensor, max_grad_norm: float | None) -> None:
        """One step down the gradient of the loss (), and of the average of the weights."""
        self.accelerator.backward(loss)
        if max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())

    def log(self, loss: torch.Tensor, step: int, pairs: Pairs, held_out: torch.Tensor, batch_size: int) -> None:
        """Add the mean of the processes' losses () to the history, with that of the rows held out (n,), if any."""
        mean = self.accelerator.reduce(loss, "mean").item()
        self._check_finite(mean, step)
        measured = {"validation_loss": self.validate(pairs, held_out, batch_size)} if len(held_out) else {}
        self.history.append({"step": step, "loss": mean, **measured})

    def _check_finite(self, loss: float, step: int) -> None:
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
        """Mean loss of the averaged weights on the samples of rows (n,), always with the same neighbours and times."""
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

    def save(self, step: int) -> None:
        """Write a checkpoint, and the curves so far."""
        if self.checkpoints is not None:
            self.checkpoints.save(step, self.history)
            self._show()
        self.saved = step

    def _show(self) -> None:
        """Write history.json and loss.png."""
        if self.accelerator.is_main_process:
            write_json(self.folder / "history.json", self.history)
            if find_spec("matplotlib") is not None:
                _plot(self.history, self.folder / "loss.png")

    def finish(self) -> TrainedFlow:
        """The network with the averaged weights, without what accelerate put around it."""
        if self.folder is not None:
            self._show()  # a start that was killed after its last checkpoint has not
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.ema.copy_to(model.parameters())
        return TrainedFlow(model.eval(), self.history)


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
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
