"""What text-to-image models take beside the numbers of a tab: texts, a size, a scheduler and a dtype."""

import inspect
from dataclasses import asdict, dataclass, replace

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..sampling import is_discrete
from ..sampling.arguments import weight_of

DTYPES = ("float32", "bfloat16", "float16")
OWN = "the model's own"
SCHEDULERS = (  # those of diffusers that need no other library
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
)  # fmt: skip


@dataclass(frozen=True)
class TextToImage:
    """What a text-to-image model draws, and with what; the defaults leave it to the model.

    Attributes:
        prompt: of all images.
        negative_prompt: of all images.
        height: of an image in pixels.
        width: likewise.
        scheduler: a class of diffusers, one of `SCHEDULERS`, made from the config of the model's own.
        dtype: of the parameters, one of `DTYPES`.

    Raises:
        ValueError: for a size below 1, and other schedulers and dtypes.
    """

    prompt: str = ""
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    scheduler: str = ""
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be > 0 pixels, or 0 for the model's own, got {getattr(self, name)}")
        if self.scheduler and self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {self.scheduler!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def check(self, pipe: DiffusionPipeline) -> None:
        """Check that a pipeline takes what is given here.

        Raises:
            ValueError: naming what it does not take, for a prompt that it needs, and for a scheduler of another kind.
        """
        name = type(pipe).__name__
        if not is_text_to_image(pipe):
            others = asdict(replace(self, dtype="float32"))
            if given := [field.replace("_", " ") for field, value in others.items() if value != getattr(NONE, field)]:
                raise ValueError(f"{name} is no text-to-image model: leave out {', '.join(given)}")
            return
        if not self.prompt:
            raise ValueError(f"{name} needs a prompt")
        if unknown := [field for field in self.call() if not takes(pipe, field)]:
            raise ValueError(f"{name} does not take {', '.join(unknown)}; leave it out or choose another model")
        self.scheduler_of(pipe)

    def call(self) -> dict[str, int]:
        """The size, as far as it is given, as arguments of a call."""
        return {name: value for name, value in (("height", self.height), ("width", self.width)) if value is not None}

    def inputs(self, pipe: DiffusionPipeline, count: int) -> dict:
        """The arguments of a call that draws `count` images; {} for pipelines that take no prompt.

        The negative prompt is an empty one where guidance needs one (Flux, Qwen-Image).
        """
        if not is_text_to_image(pipe):
            return {}
        texts = {"prompt": [self.prompt] * count}
        if self.negative_prompt or (weight_of(pipe) == "true_cfg_scale" and takes(pipe, "negative_prompt")):
            texts["negative_prompt"] = [self.negative_prompt] * count
        return {**texts, **self.call()}

    def scheduler_of(self, pipe: DiffusionPipeline) -> SchedulerMixin:
        """The scheduler that is chosen, with the config of the pipeline's own.

        Raises:
            ValueError: for one that is not of the same kind, such as a flow's for a diffusion.
        """
        if not self.scheduler:
            return pipe.scheduler
        cls = getattr(diffusers, self.scheduler)
        kinds = {kind.__name__ for kind in pipe.scheduler.compatibles}
        if self.scheduler not in {*kinds, type(pipe.scheduler).__name__}:
            known = ", ".join(name for name in SCHEDULERS if name in kinds) or OWN
            raise ValueError(
                f"scheduler must be one that {type(pipe.scheduler).__name__} can be exchanged for, {known},"
                f" got {self.scheduler!r}"
            )
        return cls.from_config(pipe.scheduler.config)


NONE = TextToImage()


def takes(pipe: DiffusionPipeline | type, name: str) -> bool:
    """Whether the call of a pipeline, or of a class of them, has an argument of that name."""
    return name in inspect.signature(pipe.__call__).parameters


def is_text_to_image(pipe: DiffusionPipeline | type) -> bool:
    """Whether it draws images of prompts; discrete diffusion goes on from one, and a flow's is its base's."""
    return takes(pipe, "prompt") and not takes(pipe, "images") and not is_discrete(pipe)


@dataclass(frozen=True)
class Source:
    """Where a pipeline comes from, as code.

    Attributes:
        model: shipped, a folder or a Hub id.
        text: whose scheduler and dtype it has.
        device: of the app.
    """

    model: str
    text: TextToImage = NONE
    device: str = "cpu"

    def imports(self) -> list[str]:
        """Lines beside the import of load_pipeline and torch."""
        return [f"from diffusers import {self.text.scheduler}"] if self.text.scheduler else []

    def lines(self, name: str = "pipe", pipeline: str | None = None) -> list[str]:
        """The lines that make it."""
        given = [repr(self.model)] + ([] if pipeline is None else [f'"{pipeline}"'])
        if self.text != NONE:  # else float32, which `from_pretrained` reads
            given.append(f"dtype={getattr(torch, self.text.dtype)}")
        moved = "" if self.device == "cpu" else f".to({self.device!r})"
        made = [f"{name} = load_pipeline({', '.join(given)}){moved}"]
        if self.text.scheduler:
            made.append(f"{name}.scheduler = {self.text.scheduler}.from_config({name}.scheduler.config)")
        return made
