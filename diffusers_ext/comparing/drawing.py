"""One image of a comparison: the methods of its settings around the pipeline's call, its seconds and network rows."""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline, guiders
from diffusers.guiders import BaseGuidance

from ..guidance import guiders as own_guiders
from ..guidance.rows import counted_rows
from ..pipelines.guidance_interval import apply_guider, remove_guider
from ..pipelines.guided_run import make_plans
from ..pipelines.interval import FLOW_SCHEDULER
from ..sampling.arguments import check_call, weight_of
from ..sampling.draw import draw, is_discrete, to_uint8
from ..sampling.image_files import check_channels
from ..sampling.labels import cycled_labels
from ..sampling.methods import BOOST, applied, boosted_scheduler
from .settings import GUIDERS, Settings


@dataclass(frozen=True)
class Drawn:
    """An image, uint8 (height, width, channels), and what it cost."""

    image: np.ndarray
    network_rows: int
    seconds: float


class Painter:
    """Draws images of a pipeline, each with settings of its own.

    Args:
        pipe: one that makes images.
        call: further arguments of its call, JSON-able; negative_prompt among them.

    Raises:
        ValueError: for pipelines that make something else, and for one that is limited or guided already.
    """

    def __init__(self, pipe: DiffusionPipeline, call: dict[str, Any]):
        self.pipe, self.call = pipe, {name: value for name, value in call.items() if value is not None}
        self.takes = inspect.signature(pipe.__call__).parameters
        name = type(pipe).__name__
        if is_discrete(pipe) or "num_frames" in self.takes or "output_type" not in self.takes:
            raise ValueError(f"{name} makes no images; compare draws images alone")
        if "_guidance_interval" in vars(pipe):
            raise ValueError(
                f"{name} has a guidance interval or a guider in force; remove_guidance_interval(pipe) first"
            )
        steps = self.takes.get("num_inference_steps")
        self.steps = self.call.get("num_inference_steps", None if steps is None else steps.default)
        self.guiders: dict[tuple[str, Any], BaseGuidance] = {}
        self.weight = weight_of(pipe)

    def check_axes(self, axes: Mapping[str, tuple]) -> None:
        """Check that every axis is one that an image would show.

        Args:
            axes: of `Grid`.

        Raises:
            ValueError: naming the axis, for settings that no image would show.
        """
        name, scales = type(self.pipe).__name__, axes["guidance_scale"]
        if scales != (None,) and self.weight is None:
            raise ValueError(f"guidance_scale: {name} takes none; leave it out")
        for axis, plain in (("guider", "cfg"), ("guidance_interval", None)):
            if any(value != plain for value in axes[axis]) and not any(map(self.is_guided, scales)):
                if self.weight is None:
                    raise ValueError(f"{axis}: {name} takes no guidance scale; leave it out")
                raise ValueError(
                    f"{axis}: {name} is not guided at {self.weight}={self._scale(scales[0])}; give guidance scales > 1"
                )

    def check(self, settings: Settings) -> None:
        """Check the settings of one image; draws nothing.

        Args:
            settings: of the image.

        Raises:
            ValueError: naming the setting, for what the pipeline does not take.
        """
        if settings.class_label is not None:
            with _naming("class_label"):
                cycled_labels(self.pipe, 1, [settings.class_label])
        if settings.guider != "cfg":
            with _naming("guider"), self._guidance(settings):
                pass
        elif settings.guidance_interval is not None:
            with _naming("guidance_interval"):
                applied(self.pipe, {"guidance_interval": settings.guidance_interval})
        if boost := self._boost(settings):
            with _naming(next(iter(boost))):
                boosted_scheduler(self.pipe, boost, self.steps)
                applied(self.pipe, boost)
        _, call = self._applied(settings)
        check_call(self.pipe, self._inputs(settings), call)

    def is_guided(self, guidance_scale: float | None) -> bool:
        """Whether a weight, None for the call's default, makes two predictions; 1 is off, or 0 where it counts so."""
        scale = self._scale(guidance_scale)
        if not isinstance(scale, int | float):
            return self.weight is not None
        return scale != (0 if self.counts_from_zero else 1)

    def _scale(self, guidance_scale: float | None) -> Any:
        """A weight, or the one that the call has without."""
        if guidance_scale is not None or self.weight is None:
            return guidance_scale
        return self.call.get(self.weight, self.takes[self.weight].default)

    def same_as(self, settings: Settings) -> Settings:
        """The plainest settings that give the same image: without guidance neither guider nor interval counts."""
        if self.weight is None or self.is_guided(settings.guidance_scale):
            return settings
        return Settings(**{**vars(settings), "guider": "cfg", "guidance_interval": None})

    def draw(self, settings: Settings, on_step: Callable[[int], None]) -> Drawn:
        """Draw one image.

        Args:
            settings: of the image.
            on_step: called with the number of finished steps, where the pipeline tells them.

        Raises:
            ValueError: for an image that is not finite.
        """
        context, call = self._applied(settings)
        if "callback_on_step_end" in self.takes:
            call["callback_on_step_end"] = lambda pipe, step, timestep, tensors: on_step(step + 1) or {}
        started = time.perf_counter()
        with self._guidance(settings), context, counted_rows(self.pipe) as rows:
            images = draw(self.pipe, range(1), settings.seed, self._inputs(settings), {**call, "output_type": "pt"})
        image = to_uint8(images, range(1))[0]
        check_channels(image.shape[-1], "png")
        return Drawn(image, sum(rows), time.perf_counter() - started)

    def _inputs(self, settings: Settings) -> dict[str, list]:
        """The arguments that have one value an image."""
        inputs = {"prompt": settings.prompt, "class_labels": settings.class_label}
        inputs["negative_prompt"] = self.call.get("negative_prompt")
        needs_one = self.weight == "true_cfg_scale" and settings.prompt is not None
        if needs_one and "negative_prompt" in self.takes and inputs["negative_prompt"] is None:
            inputs["negative_prompt"] = ""  # without one there is no second prediction
        return {name: [value] for name, value in inputs.items() if value is not None}

    def _applied(self, settings: Settings) -> tuple[AbstractContextManager, dict]:
        """What boosts, and an interval that is an argument or the pipeline's own guidance in one; the call's rest."""
        call = {name: value for name, value in self.call.items() if name != "negative_prompt"}
        call |= self._boost(settings)
        if settings.guider != "cfg":
            call[self.weight] = max(settings.guidance_scale or 0.0, 2.0)  # two predictions; the guider's own counts
        elif settings.guidance_scale is not None:
            call[self.weight] = settings.guidance_scale
        if settings.guider == "cfg" and settings.guidance_interval is not None:
            call["guidance_interval"] = list(settings.guidance_interval)
        return applied(self.pipe, call)

    def _boost(self, settings: Settings) -> dict[str, Any]:
        boost = {name: getattr(settings, name) for name in BOOST}
        return {name: value for name, value in boost.items() if value is not None}

    def _guidance(self, settings: Settings) -> AbstractContextManager:
        """A guider, in its interval; nothing for the pipeline's own guidance."""
        bounds = settings.guidance_interval
        bounds = {} if bounds is None else {"sigma_lo": bounds[0], "sigma_hi": bounds[1]}
        return nullcontext() if settings.guider == "cfg" else _guided(self.pipe, self._guider(settings), bounds)

    def _guider(self, settings: Settings) -> BaseGuidance:
        """diffusers' guider of the name, with the weight in the pipeline's own convention."""
        options: dict[str, Any] = {"use_original_formulation": self.counts_from_zero}
        if settings.guider == "apg":
            options["eta"] = 0.0  # what is parallel to the prediction is left out, the method's point
        if settings.guider == "cfg-zero":  # a first step without any velocity, which is for flows
            options["zero_init_steps"] = int(bool(FLOW_SCHEDULER.search(type(self.pipe.scheduler).__name__)))
        scale = self._scale(settings.guidance_scale)
        if (settings.guider, scale) not in self.guiders:  # each that is made says that guiders are experimental
            name = GUIDERS[settings.guider]
            guider = getattr(own_guiders, name, None) or getattr(guiders, name)
            self.guiders[settings.guider, scale] = guider(guidance_scale=scale, **options)
        return self.guiders[settings.guider, scale]

    @cached_property
    def counts_from_zero(self) -> bool:
        """Whether the weight w of the pipeline's call means c + w (c - u), so that 0 is off."""
        try:
            plans = make_plans(self.pipe, None)
        except ValueError:
            return False
        return any(plan.layout is not None and plan.layout.plus_one for plan in plans)


@contextmanager
def _guided(pipe: DiffusionPipeline, guider: BaseGuidance, bounds: dict[str, float]) -> Iterator[None]:
    apply_guider(pipe, guider, **bounds)
    try:
        yield
    finally:
        remove_guider(pipe)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let an error in the block say which setting it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
