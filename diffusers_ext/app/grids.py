"""The grid of the app: `compare` with its axes as texts, values between commas."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ..comparing import compare
from ..comparing.settings import interval_of
from .models import Models

MOST_CELLS = 100


@dataclass(frozen=True)
class Sheet:
    """The grid as a picture, the network rows and seconds of its cells as a table in Markdown, and the code."""

    grid: Image.Image
    table: str
    code: str


@dataclass(frozen=True)
class Axes:
    """Texts of the page; an empty one leaves the setting to the pipeline. prompt, negative_prompt: one text."""

    prompt: str = ""
    negative_prompt: str = ""
    class_labels: str = ""
    seeds: str = "0"
    guidance_scales: str = ""
    guidance_intervals: str = ""
    guiders: str = "cfg"
    gammas: str = ""
    skip_steps: str = ""

    def arguments(self) -> dict:
        """Of `compare`.

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
        texts = {"prompt": self.prompt.strip(), "negative_prompt": self.negative_prompt.strip()}
        return {name: value for name, value in {**texts, **given}.items() if value}


def _values(name: str, text: str, kind: Callable) -> list:
    try:
        return [kind(part.strip()) for part in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise ValueError(f"{name.replace('_', ' ')}: values between commas, got {text!r} ({error})") from error


def compare_grid(
    models: Models, model: str, axes: Axes, num_inference_steps: int, height: int | None, width: int | None
) -> Sheet:
    """A grid of a model's images. height, width: None leaves them to the pipeline.

    Raises:
        ValueError: as `Axes.arguments` and `compare`.
    """
    arguments = axes.arguments() | {"num_inference_steps": num_inference_steps, "height": height, "width": width}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    with models.lock:
        found = compare(models.load(model), **arguments)
    words = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    code = (
        f"from diffusers_ext import compare, load_pipeline\n\npipe = load_pipeline({model!r})\n"
        f"found = compare(\n    pipe,\n{words})\ngrid = found.grid\n"
    )
    return Sheet(found.grid, found.table, code)
