"""The grid of the app: `compare` with its axes as texts, values between commas."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ..comparing import compare
from ..comparing.settings import interval_of
from ..sampling.methods import scheduled
from . import code_of
from .models import Models
from .text_to_image import Source, TextToImage

MOST_CELLS = 100


@dataclass(frozen=True)
class Sheet:
    """The grid as a picture, the network rows and seconds of its cells as a table in Markdown, and the code."""

    grid: Image.Image
    table: str
    code: str


@dataclass(frozen=True)
class Axes:
    """Texts of the page; an empty one leaves the setting to the pipeline."""

    class_labels: str = ""
    seeds: str = "0"
    guidance_scales: str = ""
    guidance_intervals: str = ""
    guiders: str = "cfg"
    gammas: str = ""
    skip_steps: str = ""

    def arguments(self) -> dict:
        """The arguments of `compare`.

        Raises:
            ValueError: naming the axis, for what is no value of it and for too many cells.
        """
        kinds: dict[str, Callable] = {
            "class_labels": int, "seeds": int, "guidance_scales": float, "guidance_intervals": interval_of,
            "guiders": str, "gammas": float, "skip_steps": int,
        }  # fmt: skip
        given = {name: _values(name, getattr(self, name), kind) for name, kind in kinds.items()}
        cells = 1
        for values in given.values():
            cells *= max(1, len(values))
        if cells > MOST_CELLS:
            raise ValueError(
                f"this grid has {cells} images, at most {MOST_CELLS} here; `diffusers-ext compare` has more"
            )
        return {name: value for name, value in given.items() if value}


def _values(name: str, text: str, kind: Callable) -> list:
    try:
        return [kind(part.strip()) for part in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise ValueError(f"{name.replace('_', ' ')}: values between commas, got {text!r} ({error})") from error


def compare_grid(models: Models, model: str, axes: Axes, num_inference_steps: int, text: TextToImage) -> Sheet:
    """A grid of a model's images.

    Raises:
        ValueError: as `Axes.arguments`, `TextToImage.check` and `compare`.
    """
    texts = {
        name: value for name, value in (("prompt", text.prompt), ("negative_prompt", text.negative_prompt)) if value
    }
    arguments = {**texts, **axes.arguments(), "num_inference_steps": num_inference_steps, **text.call()}
    with models.lock:
        pipe = models.load(model, dtype=text.dtype)
        text.check(pipe)
        with scheduled(pipe, text.scheduler_of(pipe)):
            found = compare(pipe, **arguments)
    return Sheet(found.grid, found.table, code_of.grid(Source(model, text, models.device), arguments))
