"""Boost-and-Skip by target: how far can one boost while enough of the samples are still valid."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..guidance.objective import number_of_images, per_image
from ..pipelines.call_arguments import checked_arguments
from ..runs.lock import lock
from ..sampling.draw import check_sizes
from ..sampling.labels import cycled_labels
from ..sampling.methods import applied, boosted_scheduler
from .shares import Judge, MeasuredBoost, Shares, Z, at_least, setting_of

LEVELS = (3.0, 6.0, 12.0)  # noise over signal; below, a sampler is too near the image, above, it forgets the boost
FINENESS = 32  # gammas that are told apart, in equal ratios from 1 to the largest
SEEDS_APART = 1_000_000


@dataclass(frozen=True)
class BoostChoice:
    """The rarest setting of which enough samples are valid.

    Attributes:
        chosen: what it was chosen by.
        confirmed: the same setting on samples of other seeds.
        stock: without boost and skip.
        largest: of each noise level that was tried, the largest gamma found, None where not even gamma 1 is good
            enough.
        measured: everything, in the order in which it was asked for.
    """

    chosen: MeasuredBoost
    confirmed: MeasuredBoost
    stock: MeasuredBoost
    largest: dict[float, float | None]
    measured: list[MeasuredBoost]

    @property
    def settings(self) -> dict[str, float]:
        """gamma and skip_to_sigma, as `BoostAndSkipPipeline`, `boost_and_skip` and `sample_to_folder` take them."""
        return setting_of(self.chosen.gamma, self.chosen.skip_to_sigma)


@checked_arguments(but="judge inputs")
def choose_boost(
    pipe: DiffusionPipeline,
    judge: Judge,
    recognised: float = 0.9,
    inputs: torch.Tensor | Mapping[str, Sequence] | None = None,
    num_samples: int = 500,
    num_inference_steps: int = 50,
    skip_to_sigma: float | Sequence[float] = LEVELS,
    max_gamma: float = 8.0,
    rarity: Callable | None = None,
    seed: int = 0,
    batch_size: int = 50,
    call: Mapping | None = None,
    resume: str | Path | None = None,
    on_batch: Callable[[dict, int], None] | None = None,
) -> BoostChoice:
    """Find gamma and the noise level to start from: the rarest samples of which a share that one can afford is valid.

    For each noise level, the largest gamma: since fewer samples are valid the larger gamma is, it is found by
    bisection among 33 gammas in equal ratios from 1 to max_gamma, with 7 of them measured at most. A gamma is good
    enough if the share is at least `recognised` with a confidence of 95 % (the lower end of Wilson's interval), so
    that no share is claimed which the number of samples cannot show; every gamma is judged on the same seeds. Of the
    levels, each at its largest gamma, the one whose samples are rarest is chosen, and measured again on other seeds.

    Args:
        pipe: any that takes gamma and skip_to_sigma or whose scheduler `boost_and_skip` knows.
        judge: a classifier, a module in eval mode called with images in [-1, 1], whose logits (batch, classes) say the
            class that was asked for where a sample is valid; or score(images, inputs), True or False or a number in
            [0, 1] for each of the images, (batch, channels, height, width) in [0, 1], inputs by name.
        recognised: the share that is to be valid, between 0 and 1.
        inputs: labels (count,), or arguments of the pipeline's call with one value a sample, {"prompt": [...]}; by
            default every class in turn, or nothing for an unconditional model, num_samples of them.
        num_samples: how many samples each setting is measured on, where inputs do not say it.
        num_inference_steps: of the schedule, before the skip.
        skip_to_sigma: the levels to try, noise over signal. Those that would start at the same step are tried once.
        max_gamma: the largest gamma to try.
        rarity: of images, one number each, larger for rarer ones, such as the distance to your training data; by
            default the mean distance to the 5 nearest of num_samples samples of the stock sampler, in the features of
            the classifier where it has such, else in pixels of at most 32 x 32.
        seed: sample i is drawn with seed + i.
        batch_size: samples that are drawn together.
        call: further arguments of the call.
        resume: a file in which each setting is kept as soon as it is measured, where a second start, also one with
            another target or other levels, finds it.
        on_batch: called with the setting and the number of its samples so far.

    Raises:
        ValueError: for arguments out of range, for a share that so many samples cannot show, a level that the schedule
            does not have, schedulers and pipelines that cannot be boosted, a file of something else or begun with
            other settings, and where not enough samples of the stock sampler are valid, or none of any level.
    """
    levels = [skip_to_sigma] if isinstance(skip_to_sigma, int | float) else list(skip_to_sigma)
    inputs, count = _checked_inputs(pipe, judge, inputs, num_samples)
    check_sizes(count, batch_size)
    _check_target(recognised, count, max_gamma, levels)
    call = dict(call or {})
    levels = _different_starts(pipe, levels, num_inference_steps, max_gamma, call)
    pipe.set_progress_bar_config(disable=True)
    with nullcontext() if resume is None else lock(Path(resume)):
        shares = Shares(
            pipe, judge, inputs, count, num_inference_steps, seed, batch_size, call, rarity, resume, on_batch
        )
        return _search(shares, recognised, levels, max_gamma)


def _search(shares: Shares, recognised: float, levels: list[float], max_gamma: float) -> BoostChoice:
    measured = [shares.of(1.0, None, shares.seed + 2 * SEEDS_APART)]
    if measured[0].at_least < recognised:
        raise ValueError(
            f"recognised={recognised:g}: of the stock sampler's own samples {_told(measured[0], shares.count)}; ask"
            " for a smaller share, or draw more samples"
        )
    gammas = [float(f"{max_gamma ** (i / FINENESS):.4g}") for i in range(FINENESS + 1)]
    best: dict[float, MeasuredBoost | None] = {}
    for level in levels:

        def measure(i: int) -> MeasuredBoost:
            measured.append(shares.of(gammas[i], level, shares.seed))  # noqa: B023
            return measured[-1]

        best[level] = largest(measure, FINENESS, recognised)
    found = [one for one in best.values() if one is not None]
    if not found:
        closest = max(measured[1:], key=lambda one: one.recognised)
        raise ValueError(
            f"recognised={recognised:g}: even with gamma 1 the skip costs too much, at sigma"
            f" {closest.skip_to_sigma:g} {_told(closest, shares.count)}; ask for a smaller share, draw more samples,"
            " or try a higher skip_to_sigma"
        )
    chosen = max(found, key=lambda one: one.rarity)
    confirmed = shares.of(chosen.gamma, chosen.skip_to_sigma, shares.seed + SEEDS_APART)
    gamma_of = {level: None if one is None else one.gamma for level, one in best.items()}
    return BoostChoice(chosen, confirmed, measured[0], gamma_of, measured)


def largest(measure: Callable[[int], MeasuredBoost], end: int, recognised: float) -> MeasuredBoost | None:
    """The last of 0, ..., end that is good enough, by bisection for those that get worse; None if 0 is not."""
    low = measure(0)
    if low.at_least < recognised:
        return None
    high = measure(end)
    if high.at_least >= recognised:
        return high
    left, right = 0, end
    while right - left > 1:
        middle = (left + right) // 2
        found = measure(middle)
        if found.at_least >= recognised:
            left, low = middle, found
        else:
            right = middle
    return low


def _told(one: MeasuredBoost, count: int) -> str:
    return f"{one.recognised:.3f} ± {one.error:.3f} of {count} are valid, which shows no more than {one.at_least:.3f}"


def _checked_inputs(pipe, judge, inputs, num_samples: int) -> tuple[Mapping[str, Sequence], int]:
    """Arguments of the call with one value a sample, none for an unconditional model, and their number."""
    if inputs is None:
        labels = cycled_labels(pipe, num_samples)
        inputs, count = ({}, num_samples) if labels is None else (per_image(labels), num_samples)
    else:
        inputs = per_image(inputs)
        count = number_of_images(inputs)
    if not callable(judge):
        raise ValueError(f"judge must be a classifier or a function, got {type(judge).__name__}")
    if isinstance(judge, torch.nn.Module) and judge.training:
        raise ValueError(f"judge: {type(judge).__name__} is in training mode; call eval() first")
    if isinstance(judge, torch.nn.Module) and "class_labels" not in inputs:
        raise ValueError(
            f"judge: a classifier says the class that was asked for, and {type(pipe).__name__} is asked for none here;"
            " give a function score(images, inputs)"
        )
    return inputs, count


def _check_target(recognised: float, count: int, max_gamma: float, levels: list[float]) -> None:
    if not 0 < recognised < 1:
        raise ValueError(f"recognised must be a share between 0 and 1, got {recognised}")
    if not (isfinite(max_gamma) and max_gamma > 1):
        raise ValueError(f"max_gamma must be a finite number > 1, got {max_gamma}")
    if not levels or not all(isfinite(level) and level > 0 for level in levels):
        raise ValueError(f"skip_to_sigma must be finite numbers > 0, at least one, got {levels}")
    if at_least(1.0, count) < recognised:
        needed = ceil(Z**2 * recognised / (1 - recognised))  # at_least(1, n) = n / (n + z^2)
        raise ValueError(
            f"recognised={recognised:g} cannot be shown with {count} samples, even if all of them are valid"
            f" (at least {at_least(1.0, count):.3f}); take {needed}, better some times as many"
        )


def _different_starts(pipe, levels: list[float], steps: int, max_gamma: float, call: dict) -> list[float]:
    """The levels, of those that start at the same step the first. Raises ValueError for what cannot be boosted."""
    starts: dict[int, float] = {}
    for level in levels:
        given = {"gamma": max_gamma, "skip_to_sigma": level}
        applied(pipe, {**call, "num_inference_steps": steps, **given})  # says what it refuses
        scheduler = boosted_scheduler(pipe, given)
        scheduler.set_timesteps(steps)
        starts.setdefault(len(scheduler.timesteps), level)
    return [*starts.values()]
