"""What the configuration of CTMCScheduler may hold."""

import math
from collections.abc import Collection, Mapping

from diffusers.configuration_utils import FrozenDict

from .scheduler_arguments import is_of_kind, short


def check_config(config: FrozenDict, samplers: tuple[str, ...]) -> None:
    """Raise ValueError for values that are not allowed and for combinations without a meaning.

    samplers: the names that there are.
    """
    choices = {
        "kernel": ("absorbing", "uniform", "gaussian", "birth_death"),
        "noise_schedule": ("loglinear", "cosine", "arccos", "geometric", "exponential", "constant"),
        "sampler": samplers,
        "prediction_type": ("log_score", "x0", "probabilities"),
        "jumps": (None, "categorical", "poisson"),
        "time_conditioning": ("sigma_bar", "timestep"),
        "timestep_spacing": ("table", "uniform"),
    }
    for name, allowed in choices.items():
        if config[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {config[name]!r}")
    for name in ("vocab_size", "num_corrector_steps"):
        least = 2 if name == "vocab_size" else 0
        if not is_of_kind(config[name], int) or config[name] < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {short(config[name])}")
    unit = ("min_timestep", "eps", "corrector_entry_time")
    positive = (
        "corrector_step_size_multiplier",
        "eps_ratio",
        "sigma_min",
        "sigma_max",
        "time_base",
        "time_exponential",
    )
    positive += ("constant_rate", "rate_sigma", "Q_sigma")
    for name in (*unit, *positive):
        value = config[name]
        inside = is_of_kind(value, float) and math.isfinite(value) and value > 0
        if not inside or (name in unit and not value <= 1) or (name in ("min_timestep", "eps") and value == 1):
            end = "in (0, 1]" if name == "corrector_entry_time" else "in (0, 1)" if name in unit else "> 0"
            raise ValueError(f"{name} must be a finite number {end}, got {short(value)}")
    if config.sigma_max <= config.sigma_min:
        raise ValueError(f"sigma_max must be > sigma_min={config.sigma_min}, got {config.sigma_max}")
    if not config.time_exponential > 1:
        raise ValueError(f"time_exponential must be > 1, got {config.time_exponential}")
    if refusal := _refusal(config):
        raise ValueError(refusal)


def check_source(config: Mapping, changes: dict, known: Collection[str]) -> None:
    """Raise ValueError for the config of another scheduler, which says nothing of a kernel and a vocabulary.

    changes: what is given beside it. known: names of the settings of this scheduler.
    """
    missing = [name for name in ("kernel", "vocab_size") if name not in {**config, **changes}]
    foreign = sorted(name for name in config if not name.startswith("_") and name not in known)
    if missing and foreign:
        raise ValueError(
            f"this is the config of {config.get('_class_name', 'another scheduler')}, with {foreign[0]} and without"
            f" {' and '.join(missing)}, whose defaults would mean another model; pass the config of a CTMCScheduler,"
            " or build CTMCScheduler(kernel=..., vocab_size=...)"
        )


def _refusal(config) -> str | None:
    """Why this combination of kernel, sampler, prediction type and jumps has no meaning; None if it has."""
    ordered = config.kernel in ("gaussian", "birth_death")
    if config.sampler == "gillespie" and config.kernel != "absorbing":
        return (
            f"sampler='gillespie' decodes a number of masks a step, and kernel={config.kernel!r} has none; use"
            " sampler='euler' or 'tweedie', or kernel='absorbing'"
        )
    if config.prediction_type == "log_score" and ordered:
        return (
            f"prediction_type='log_score' with kernel={config.kernel!r}: clean tokens would need the inverse of an"
            " ill-conditioned transition matrix; use prediction_type='x0' or 'probabilities'"
        )
    if config.jumps == "poisson" and (config.kernel == "absorbing" or config.sampler != "euler"):
        return (
            f"jumps='poisson' adds numbers of tokens, with kernel={config.kernel!r} and sampler={config.sampler!r}"
            " there is nothing to add; use sampler='euler' with kernel='uniform', 'gaussian' or 'birth_death', or"
            " jumps='categorical'"
        )
    if config.sampler == "gillespie" and config.num_corrector_steps:
        return (
            f"num_corrector_steps={config.num_corrector_steps}: a corrector step masks tokens again, and"
            " sampler='gillespie' counts them; use num_corrector_steps=0 or sampler='euler'"
        )
    return None
