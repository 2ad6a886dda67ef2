"""How good the samples of a guidance interval and weight are: drawn, measured, and kept batch by batch."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ..evaluation.extractors import FeatureExtractor
from ..metrics import FeatureStatistics, frechet_distance
from ..metrics.features import as_features
from ..pipelines.guidance_interval import GuidanceInterval
from ..runs.kept import Kept
from ..runs.provenance import hash_of
from ..sampling.arguments import weight_of
from ..sampling.draw import batches_of, draw, to_uint8
from .memory import OutputMemory, remembering
from .search import GuidedSteps

Inputs = torch.Tensor | Mapping[str, Sequence]
Judge = FeatureExtractor | Callable[[torch.Tensor, dict], Sequence[float] | torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """The distance of candidates, lower is better; the fields are the arguments of `tune_interval`.

    With a reference it is the Fréchet distance of features; without, minus the mean score.
    """

    pipe: DiffusionPipeline
    judge: Judge
    reference: tuple[torch.Tensor, torch.Tensor] | None
    inputs: Inputs
    num_inference_steps: int
    seed: int
    batch_size: int
    on_batch: Callable[[GuidedSteps, int], None] | None = None
    call: Mapping = field(default_factory=dict)

    def __call__(self, candidate: GuidedSteps) -> float:
        """The distance of a candidate, which is drawn for it."""
        with remembering(self.pipe, 0) as memory, TemporaryDirectory() as folder:
            return next(self.together([candidate], Path(folder), memory))[1]

    def together(
        self, candidates: Sequence[GuidedSteps], folder: Path, memory: OutputMemory, backwards: bool = False
    ) -> Iterator[tuple[GuidedSteps, float, int]]:
        """Each candidate with its distance and the network rows that its samples take, all drawn side by side.

        Where rounds are drawn forwards and backwards in turns, each finds in memory what was used last.

        A batch is drawn for one candidate after the other, first for those that stay unguided for longest, so that
        what they share need be remembered for one batch alone.

        Args:
            candidates: to draw.
            folder: keeps what has been measured of each batch, where a second start finds it; it is emptied of a
                candidate once the next one is asked for.
            memory: what the networks' answers are remembered in.
            backwards: draw the last batch first; results are the same.
        """
        inputs = per_image(self.inputs)
        batches = batches_of(number_of_images(inputs), self.batch_size)
        order = sorted(candidates, key=lambda one: (-one.first, one.guidance_scale, -one.last))
        done = dict.fromkeys(order, 0)
        for rows in reversed(batches) if backwards else batches:
            for candidate in order:
                kept = _kept(folder, candidate, rows)
                if kept.load() is None:
                    features, network_rows = self._measured(candidate, rows, inputs, memory)
                    kept.save(features=features, network_rows=network_rows)
                    done[candidate] += len(rows)
                    if self.on_batch is not None:
                        self.on_batch(candidate, done[candidate])
                else:
                    done[candidate] += len(rows)
        for candidate in order:
            kept = [_kept(folder, candidate, rows) for rows in batches]
            found = [one.load() for one in kept]
            distance = self._distance([batch["features"] for batch in found])
            yield candidate, distance, sum(batch["network_rows"] for batch in found)
            for one in kept:
                one.path.unlink()

    def _measured(self, candidate, rows: range, inputs: Mapping, memory: OutputMemory) -> tuple[torch.Tensor, int]:
        """Features or scores (batch, dim) of a batch, and the network rows that it takes."""
        before = memory.rows_asked
        with guided_call(self.pipe, candidate, self.num_inference_steps) as call:
            images = draw(self.pipe, rows, self.seed, inputs, {"output_type": "pt", **self.call, **call})
        if self.reference is not None:
            measured = self.judge(to_uint8(images, rows))
        else:
            batch = {name: values[rows.start : rows.stop] for name, values in inputs.items()}
            measured = checked_scores(self.judge(images, batch), len(rows))
        return torch.as_tensor(measured), memory.rows_asked - before

    def _distance(self, features: list[torch.Tensor]) -> float:
        if self.reference is None:
            return -torch.cat(features).double().mean().item()
        statistics = FeatureStatistics()
        for batch in features:
            statistics.update(batch)
        return frechet_distance(statistics.mean, statistics.covariance, *self.reference)

    def settings(self) -> dict:
        """What the distances depend on besides the pipeline, JSON-able."""
        if self.reference is None:
            judged = {"score": getattr(self.judge, "__qualname__", type(self.judge).__qualname__)}
        else:
            reference = hash_of(*(np.asarray(part, dtype=np.float64) for part in self.reference))
            judged = {"features": [self.judge.name, self.judge.identity], "reference": reference}
        steps = {"num_inference_steps": self.num_inference_steps}
        if isinstance(self.inputs, torch.Tensor):
            return {**judged, **steps, "labels": self.inputs.tolist(), "seed": self.seed}
        inputs = {name: as_json(name, values) for name, values in self.inputs.items()}
        call = {"call": {name: as_json(name, value) for name, value in self.call.items()}} if self.call else {}
        return {**judged, **steps, "inputs": inputs, **call, "seed": self.seed}


def _kept(folder: Path, candidate: GuidedSteps, rows: range) -> Kept:
    """What has been measured of a batch of a candidate."""
    name = f"{candidate.guidance_scale!r}-{candidate.first}-{candidate.last}-{rows.start}-{rows.stop}.safetensors"
    settings = {"candidate": candidate.key, "rows": [rows.start, rows.stop]}
    return Kept(
        folder / name,
        settings,
        lambda content: len(content["features"]) == len(rows) and type(content["network_rows"]) is int,
    )


def checked_scores(scores: np.ndarray | torch.Tensor | Sequence[float], count: int) -> np.ndarray:
    """Scores (count,) as (count, 1).

    Raises:
        ValueError: for another number of them, and where one is not finite.
    """
    scores = scores if isinstance(scores, torch.Tensor) else torch.as_tensor(np.asarray(scores, dtype=np.float64))
    if scores.numel() != count:
        raise ValueError(f"the score must give one number an image, {count}, got shape {tuple(scores.shape)}")
    return as_features("scores", scores.reshape(count, 1))


def per_image(inputs: Inputs) -> Mapping[str, Sequence]:
    """Arguments of the pipeline's call with one value an image, by name; labels are its class_labels."""
    return {"class_labels": inputs.tolist()} if isinstance(inputs, torch.Tensor) else inputs


def number_of_images(inputs: Mapping[str, Sequence]) -> int:
    """How many images the inputs are for: the length of each.

    Args:
        inputs: arguments of the pipeline's call with one value an image, by name.

    Raises:
        ValueError: for inputs that are no lists of equal lengths, at least 1.
    """
    texts = [name for name, values in inputs.items() if isinstance(values, str) or not hasattr(values, "__len__")]
    lengths = {} if texts else {name: len(values) for name, values in inputs.items()}
    if len({*lengths.values()}) != 1 or 0 in lengths.values():
        raise ValueError(
            "inputs must be labels (count,) or arguments of the pipeline's call with one value an image, such as"
            f" {{'prompt': [...]}}, got {texts or lengths or inputs}"
        )
    return next(iter(lengths.values()))


def as_json(name: str, value: Any) -> Any:
    """A value, or the hash of a tensor or array.

    Raises:
        ValueError: for what a second start could not recognise.
    """
    if isinstance(value, torch.Tensor | np.ndarray):
        return hash_of(value)
    try:
        return json.loads(json.dumps(list(value) if isinstance(value, tuple | range) else value))
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be of texts, numbers or tensors, got {type(value).__name__}") from None


@contextmanager
def guided_call(pipe: DiffusionPipeline, candidate: GuidedSteps, num_inference_steps: int) -> Iterator[dict]:
    """Arguments of the pipeline's call that guide as the candidate says, within the block.

    A pipeline that takes guided_steps is given them; to any other a `GuidanceInterval` is applied. Neither happens to
    one that is guided in all of its steps. The weight is true_cfg_scale where the pipeline has that.

    Raises:
        ValueError: for a pipeline without either weight.
    """
    weight = weight_of(pipe)
    if weight is None:
        raise ValueError(f"{type(pipe).__name__} takes no guidance_scale; there is nothing to tune")
    call = {weight: candidate.guidance_scale, "num_inference_steps": num_inference_steps}
    steps = (candidate.first, candidate.last)
    if steps == (0, num_inference_steps - 1):
        yield call
    elif "guided_steps" in inspect.signature(pipe.__call__).parameters:
        yield {**call, "guided_steps": steps}
    else:
        with GuidanceInterval(pipe, guided_steps=steps):
            yield call


def step_sigmas(
    pipe: DiffusionPipeline, inputs: Inputs, num_inference_steps: int, call: Mapping | None = None
) -> list[float | None]:
    """The noise level (EDM's ratio) at which each step starts, and 0 after the last, as a call for one image shows.

    None for each step of a scheduler without noise levels, or of another number of steps.

    Args:
        pipe: of which a call is made.
        inputs: of one image.
        num_inference_steps: of the call.
        call: further arguments of the call.
    """
    if hasattr(pipe.scheduler, "churn"):  # of EDM2, whose schedule is these levels
        pipe.scheduler.set_timesteps(num_inference_steps)
        return pipe.scheduler.sigmas.tolist()
    with (
        GuidanceInterval(pipe, guided_steps=(0, 0)) as interval,
        guided_call(pipe, GuidedSteps(2.0, 0, num_inference_steps - 1), num_inference_steps) as weight,
    ):
        draw(pipe, range(1), 0, per_image(inputs), {"output_type": "pt", **(call or {}), **weight})
    sigmas = [step.sigma for step in interval.report.steps]
    known = len(sigmas) == num_inference_steps and None not in sigmas
    return [*(sigmas if known else [None] * num_inference_steps), 0.0]
