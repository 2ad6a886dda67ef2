"""What a tiny pipeline that guides is, and what its builders share.

No text encoder and no VAE where a pipeline can do without: prompts are random embeddings, outputs are latents.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import diffusers
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)

STEPS = 4
BATCH = 2  # prompts a call
TOKENS = 6  # tokens a prompt


class Case(NamedTuple):
    """A pipeline and how it guides.

    options: keyword arguments of a call of `STEPS` steps with guidance on. off: what of them turns guidance off; empty
        where the pipeline's guider does.
    order: of the rows of a batch, "uncond, cond" and so on, or of the calls, "cond; uncond".
    networks: names of the denoisers, and of a ControlNet that sees as many rows. batch: samples a call.
    """

    pipe: DiffusionPipeline
    options: dict
    order: str = "uncond, cond"
    off: dict = {"guidance_scale": 1.0}  # noqa: RUF012
    networks: tuple[str, ...] = ("transformer",)
    batch: int = BATCH


CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    """Register a builder, whose weights are then the same at every call, under its name."""

    def seeded() -> Case:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            built = build()
            for component in built.pipe.components.values():
                if isinstance(component, torch.nn.Module):
                    _fill(component)
        built.pipe.set_progress_bar_config(disable=True)
        return built

    CASES[build.__name__] = seeded
    return seeded


def _fill(module: torch.nn.Module) -> None:
    """Random values where a network starts from zeros, so that its output depends on its condition."""
    for parameter in module.eval().requires_grad_(False).parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)


def embeds(*shape: int) -> torch.Tensor:
    return torch.randn(BATCH, *shape)


def prompts(width: int) -> dict[str, torch.Tensor]:
    """Embeddings of prompts and negative prompts (BATCH, TOKENS, width)."""
    return {"prompt_embeds": embeds(TOKENS, width), "negative_prompt_embeds": embeds(TOKENS, width)}


def masks(dtype: torch.dtype = torch.long, name: str = "prompt_attention_mask") -> dict[str, torch.Tensor]:
    """Masks (BATCH, TOKENS) that differ between prompt and negative prompt."""
    positive, negative = torch.ones(BATCH, TOKENS), torch.ones(BATCH, TOKENS)
    negative[:, TOKENS // 2 :] = 0
    return {name: positive.to(dtype), f"negative_{name}": negative.to(dtype)}


def pooled(width: int) -> dict[str, torch.Tensor]:
    return {"pooled_prompt_embeds": embeds(width), "negative_pooled_prompt_embeds": embeds(width)}


def options(**changes) -> dict:
    """Options that most calls share."""
    return {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent", **changes}


def build(name: str, *missing: str, **components) -> DiffusionPipeline:
    """A pipeline of diffusers without the components named in missing."""
    return getattr(diffusers, name)(**dict.fromkeys(missing), **components)


def module_of(name: str, argument: str = "output_type"):
    """The module of a pipeline of diffusers; the test is skipped where there is none whose call has the argument."""
    if not hasattr(diffusers, name) or argument not in inspect.signature(getattr(diffusers, name).__call__).parameters:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name} that takes {argument}")
    return inspect.getmodule(getattr(diffusers, name))


VAE_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TEXT = ("vae", "text_encoder", "tokenizer")


def flow(**config) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)
