"""How many of a pipeline's boosted samples are valid and how rare they are, each setting measured once and kept."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch.nn.functional import adaptive_avg_pool2d

from ..guidance.objective import as_json
from ..metrics import average_knn_distance
from ..metrics.features import as_features
from ..runs.kept import Kept
from ..runs.provenance import describe_component, describe_pipeline
from ..sampling.draw import batches_of, draw
from ..sampling.methods import applied

Z = 1.645  # of a one-sided bound that holds in 95 of 100 cases
NEIGHBOURS = 5
SIDE = 32  # of images whose pixels stand for features

Judge = torch.nn.Module | Callable[[torch.Tensor, dict], Sequence[float] | torch.Tensor]


@dataclass(frozen=True)
class MeasuredBoost:
    """A setting, and what was measured of it.

    Attributes:
        gamma: of the setting.
        skip_to_sigma: None for no skip.
        recognised: the share of valid samples.
        error: its standard error.
        at_least: what the share is at least, with a confidence of 95 %.
        rarity: mean over the samples.
    """

    gamma: float
    skip_to_sigma: float | None
    recognised: float
    error: float
    at_least: float
    rarity: float


def at_least(share: float, count: int) -> float:
    r"""The lower end of Wilson's interval for a share among count samples, one-sided, 95 %.

    .. math:: \frac{p + z^2 / 2n - z \sqrt{p (1 - p) / n + z^2 / 4 n^2}}{1 + z^2 / n}, \quad z = 1.645

    For numbers in [0, 1] in place of yes and no it is too low, never too high.
    """
    square = Z**2 / count
    spread = Z * (share * (1 - share) / count + square / (4 * count)) ** 0.5
    return (share + square / 2 - spread) / (1 + square)


class Shares:
    """Measures settings of a pipeline, and keeps what it has measured in a file, where a second start finds it.

    The stock sampler's samples, of seeds of their own, are those that rarity is measured from.

    Args:
        pipe: as of `choose_boost`.
        judge: as of `choose_boost`.
        inputs: as of `choose_boost`, by name, of count samples.
        count: samples of a setting.
        steps: of the schedule, before the skip.
        seed: as of `choose_boost`.
        batch_size: samples that are drawn together.
        call: as of `choose_boost`.
        rarity: as of `choose_boost`.
        resume: the file, or None.
        on_batch: as of `choose_boost`.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        judge: Judge,
        inputs: Mapping[str, Sequence],
        count: int,
        steps: int,
        seed: int,
        batch_size: int,
        call: Mapping,
        rarity: Callable | None,
        resume: str | Path | None,
        on_batch: Callable[[dict, int], None] | None,
    ):
        self.pipe: DiffusionPipeline = pipe
        self.judge: Judge = judge
        self.inputs: Mapping[str, Sequence] = inputs
        self.count, self.steps, self.seed, self.batch_size = count, steps, seed, batch_size
        self.call, self.rarity, self.on_batch = call, rarity, on_batch
        self.features: torch.Tensor | None = None
        self.measured: dict[str, dict] = {}
        self.kept = None if resume is None else Kept(Path(resume), self._settings(), _is_whole)
        if self.kept is not None and (content := self.kept.load()) is not None:
            self.measured, self.features = content["measured"], content.get("features")

    def of(self, gamma: float, skip_to_sigma: float | None, first_seed: int) -> MeasuredBoost:
        """Measure a setting on samples of the seeds from first_seed, or find what was measured of it."""
        key = f"gamma {gamma!r}, skip to sigma {skip_to_sigma!r}, seed {first_seed}"
        if key not in self.measured:
            self.measured[key] = asdict(self._measure(gamma, skip_to_sigma, first_seed))
            if self.kept is not None:
                tensors = {} if self.features is None else {"features": self.features}
                self.kept.save(measured=self.measured, **tensors)
        return MeasuredBoost(**self.measured[key])

    def _measure(self, gamma: float, skip_to_sigma: float | None, first_seed: int) -> MeasuredBoost:
        settings = setting_of(gamma, skip_to_sigma)
        given = {"output_type": "pt", **self.call, "num_inference_steps": self.steps, **settings}
        boosted, call = applied(self.pipe, given) if settings else (nullcontext(), given)
        valid, rare = [], []
        with boosted:
            for rows in batches_of(self.count, self.batch_size):
                images = draw(self.pipe, rows, first_seed, self.inputs, call).detach().float()
                batch = {name: values[rows.start : rows.stop] for name, values in self.inputs.items()}
                judged, features = self._judged(images, batch)
                valid.append(judged)
                rare.append(features if self.rarity is None else numbers("rarity", self.rarity(images), len(rows)))
                if self.on_batch is not None:
                    self.on_batch(settings, rows.stop)
        share = torch.cat(valid).double()
        recognised, error = share.mean().item(), (share.std(correction=1) / len(share) ** 0.5).item()
        rarity = self._rarity(torch.cat(rare), is_stock=not settings)
        return MeasuredBoost(gamma, skip_to_sigma, recognised, error, at_least(recognised, len(share)), rarity)

    def _rarity(self, values: torch.Tensor, is_stock: bool) -> float:
        """The rarity by the samples' features (count, dim), or the mean of what the user's function gave."""
        if self.rarity is not None:
            return values.double().mean().item()
        k = min(NEIGHBOURS, self.count - 1)
        if is_stock:  # among themselves: the nearest is each one itself, at no distance
            self.features = values
            return average_knn_distance(values, values, k + 1) * (k + 1) / k
        return average_knn_distance(values, self.features, k)

    def _judged(self, images: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether samples are valid (batch,), in [0, 1], and features (batch, dim), both on the CPU."""
        features = adaptive_avg_pool2d(images, SIDE).flatten(1) if max(images.shape[2:]) > SIDE else images.flatten(1)
        if not isinstance(self.judge, torch.nn.Module):
            return numbers("the score", self.judge(images, batch), len(images), highest=1), features.cpu()
        place = next(self.judge.parameters())
        with torch.no_grad():
            output = self.judge((images * 2 - 1).to(place.device, place.dtype))
        logits = output if isinstance(output, torch.Tensor) else output.logits
        found = getattr(output, "features", None)
        labels = torch.as_tensor(batch["class_labels"])
        if logits.ndim != 2 or len(logits) != len(labels):
            raise ValueError(
                f"the classifier must give logits (batch, classes), got {tuple(logits.shape)} for {len(labels)} images"
            )
        valid = (logits.argmax(1).cpu() == labels).float()
        return valid, features.cpu() if found is None else found.detach().float().cpu()

    def _settings(self) -> dict:
        module = isinstance(self.judge, torch.nn.Module)
        return {
            **describe_pipeline(self.pipe),
            "judge": describe_component(self.judge) if module else getattr(self.judge, "__qualname__", "score"),
            "rarity": None if self.rarity is None else getattr(self.rarity, "__qualname__", "rarity"),
            "inputs": {name: as_json(name, values) for name, values in self.inputs.items()},
            "num_samples": self.count,
            "num_inference_steps": self.steps,
            "call": {name: as_json(name, value) for name, value in self.call.items()},
        }


def setting_of(gamma: float, skip_to_sigma: float | None) -> dict[str, float]:
    """The arguments that stand for a setting; none for the stock sampler."""
    if skip_to_sigma is None:
        return {} if gamma == 1 else {"gamma": gamma}
    return {"gamma": gamma, "skip_to_sigma": skip_to_sigma}


def numbers(name: str, values: Any, count: int, highest: float = float("inf")) -> torch.Tensor:
    """One number a sample (count,).

    Raises:
        ValueError: for another number of them, not finite, or out of [0, highest] where that is given.
    """
    values = values.cpu() if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values, np.float64))
    if values.numel() != count:
        raise ValueError(f"{name} must give one number a sample, {count}, got shape {tuple(values.shape)}")
    values = torch.as_tensor(as_features(name, values.double().reshape(count, 1)))[:, 0]
    if highest < float("inf") and not (values.min() >= 0 and values.max() <= highest):
        raise ValueError(
            f"{name} must say whether a sample is valid, True or False or a number in [0, 1], got {values.min():g} to"
            f" {values.max():g}"
        )
    return values


def _is_whole(content: dict) -> bool:
    return all(asdict(MeasuredBoost(**one)) == one for one in content["measured"].values())
