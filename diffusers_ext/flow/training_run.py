"""A training as it goes on: its folder, checkpoints, averaged weights, curves, and the processes that share it."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from ..checkpoints.tensor_files import read_json
from ..processes import Processes
from ..shards import lock, replacing
from .features import extract_features, pixel_features
from .neighbours import Neighbours, find_neighbours
from .pairs import Pairs, flow_loss


@dataclass(frozen=True)
class TrainedFlow:
    """model: the given one, with averaged weights, in eval mode. history: step, loss, and where held-out samples were
    measured, validation_loss."""

    model: torch.nn.Module
    history: list[dict]


class TrainingRun:
    """The state of a training run in memory and in its folder, which it holds, as a context, while it goes on."""

    def __init__(self, accelerator: Accelerator, output: str | Path | None, settings: dict):
        self.accelerator, self.folder = accelerator, None if output is None else Path(output)
        self.settings = settings
        self.history: list[dict] = []
        self.saved = 0
        self._held = ExitStack()

    def __enter__(self) -> "TrainingRun":
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
        begun = (self.folder / "neighbours.safetensors").exists() or self._checkpoints()
        if begun and (old := read_json(path)) != self.settings:
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
        """The iterations that are left of so many, with a progress bar in the main process."""
        from tqdm import tqdm

        hidden = not show or not self.accelerator.is_main_process
        with tqdm(total=steps, initial=self.saved, disable=hidden, desc="training the flow") as bar:
            for step in range(self.saved, steps):
                yield step
                bar.update()
                if self.history:
                    bar.set_postfix(loss=f"{self.history[-1]['loss']:.4f}", refresh=False)

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
        """The network with the averaged weights, without what accelerate put around it."""
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.ema.copy_to(model.parameters())
        return TrainedFlow(model.eval(), self.history)


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(f"{text}\n".encode())


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
