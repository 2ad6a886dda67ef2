"""The settings of an image, the axes that they are taken from, and the grid that these make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import isfinite
from numbers import Integral, Real
from typing import Any

from ..pipelines.interval import Interval, interval_bounds

# Names of guiders, diffusers' or those of `diffusers_ext.guidance.guiders`. "cfg" is the pipeline's own guidance.
GUIDERS = {
    "cfg": "",
    "apg": "AdaptiveProjectedGuidance",
    "cfg-zero": "ClassifierFreeZeroStarGuidance",
    "tcfg": "TangentialClassifierFreeGuidance",
    "mag": "MagnitudeAwareGuidance",
}
AXES = (
    "prompt", "class_label", "seed", "guider", "guidance_scale", "guidance_interval", "gamma", "skip_steps",
    "skip_to_sigma",
)  # fmt: skip
COLUMNS = ("prompt", "class_label", "seed")
LARGEST_SEED = 2**62


@dataclass(frozen=True)
class Settings:
    """What an image is drawn with; None leaves a setting to the pipeline. The fields are the `AXES`."""

    prompt: str | None = None
    class_label: int | None = None
    seed: int = 0
    guider: str = "cfg"
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    gamma: float | None = None
    skip_steps: int | None = None
    skip_to_sigma: float | None = None

    def given(self) -> dict[str, Any]:
        """The settings by name, JSON-able, without those that are left to the pipeline."""
        values = {name: getattr(self, name) for name in AXES}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Grid:
    """The axes, each with its values, of which those named in `columns` make the columns and the others the rows.

    Raises:
        ValueError: for columns that are no axes.
    """

    axes: Mapping[str, tuple]
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        if unknown := [name for name in self.columns if name not in AXES]:
            raise ValueError(f"columns must be among {', '.join(AXES)}, got {', '.join(map(repr, unknown))}")

    def side(self, columns: bool) -> list[dict[str, Any]]:
        """The values of each column, or of each row, by axis; the last axis varies fastest."""
        names = [name for name in self.axes if (name in self.columns) == columns]
        return [dict(zip(names, values, strict=True)) for values in product(*(self.axes[name] for name in names))]

    def varied(self) -> list[str]:
        """The axes with more than one value."""
        return [name for name, values in self.axes.items() if len(values) > 1]

    def cells(self) -> list[tuple[int, int, Settings]]:
        """Row, column and settings of each cell, row by row."""
        return [
            (i, j, Settings(**row, **column))
            for i, row in enumerate(self.side(columns=False))
            for j, column in enumerate(self.side(columns=True))
        ]


def interval_of(text: str) -> tuple[float, float] | None:
    """A guidance interval as it is written, "none" for every step, or LO:HI.

    Raises:
        ValueError: for anything else.
    """
    if text.strip() == "none":
        return None
    try:
        sigma_lo, sigma_hi = map(float, text.split(":"))
        Interval(sigma_lo, sigma_hi)
    except ValueError as error:
        raise ValueError(f'{text!r} is neither "none" nor LO:HI with 0 <= LO < HI, such as 0.28:5.42') from error
    return sigma_lo, sigma_hi


def label_of(name: str, value: Any) -> str:
    """A value of an axis in words, for a reader of the picture."""
    if name == "prompt":
        return value or '""'
    if name == "guidance_interval":
        return "interval none" if value is None else f"interval ({value[0]:g}, {value[1]:g}]"
    if name == "guider":
        return value
    words = {"guidance_scale": "guidance scale", "class_label": "class", "skip_to_sigma": "skip to sigma"}
    text = "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return f"{words.get(name, name.replace('_', ' '))} {text}"


def axis(name: str, values: Any) -> tuple:
    """The values of an axis as plain ones: a list of them, one, or None for the pipeline's default.

    Raises:
        ValueError: for an empty axis, a value twice, and what is no value of this axis.
    """
    values = values.tolist() if hasattr(values, "tolist") else values  # of arrays, tensors and their scalars
    is_pair = isinstance(values, tuple | list) and len(values) == 2 and all(isinstance(one, Real) for one in values)
    if values is None or isinstance(values, str | Real) or (name == "guidance_interval" and is_pair):
        values = [values]
    if not isinstance(values, Sequence) or len(values) == 0:
        raise ValueError(f"{name}: give at least one value, got {values!r}")
    checked = tuple(_value(name, value) for value in values)
    if twice := [value for value in checked if checked.count(value) > 1]:
        raise ValueError(f"{name}: {twice[0]!r} is there more than once; each image is drawn once")
    return checked


def _value(name: str, value: Any) -> Any:
    if name == "guider":
        if value not in GUIDERS:
            raise ValueError(f"guider: must be one of {', '.join(GUIDERS)}, got {value!r}")
        return value
    if name == "prompt":
        if value is not None and not isinstance(value, str):
            raise ValueError(f"prompt: must be a text, got {value!r}")
        return value
    if value is None and name != "seed":
        return None
    if name == "guidance_interval":
        sigma_lo, sigma_hi = interval_bounds(value)
        interval = Interval(sigma_lo, sigma_hi)  # which says what bounds are allowed
        return interval.sigma_lo, interval.sigma_hi
    kind = Integral if name in ("class_label", "seed", "skip_steps") else Real
    if isinstance(value, bool) or not isinstance(value, kind) or not isfinite(value):
        raise ValueError(f"{name}: must be {'an integer' if kind is Integral else 'a finite number'}, got {value!r}")
    if name in ("gamma", "skip_to_sigma") and value <= 0:
        raise ValueError(f"{name}: must be > 0, got {value!r}")
    if name in ("seed", "skip_steps") and not 0 <= value <= LARGEST_SEED:
        raise ValueError(f"{name}: must be >= 0 and at most {LARGEST_SEED}, got {value!r}")
    return int(value) if kind is Integral else float(value)
