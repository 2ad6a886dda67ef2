"""Diffusion pipelines, one file a method; each file also loads by path through custom_pipeline=."""

from importlib import import_module

from .adm_upsampler import ADMUpsamplerPipeline
from .boost_and_skip import BoostAndSkipPipeline
from .discrete_diffusion import DiscreteDiffusionPipeline, DiscreteDiffusionPipelineOutput
from .dit_guidance_interval import DiTGuidanceIntervalPipeline
from .edm2 import EDM2Pipeline
from .flow_postprocessing import FlowPostprocessingPipeline
from .guidance_interval import (
    GuidanceInterval,
    GuidanceReport,
    apply_guidance_interval,
    apply_guider,
    guidance_report,
    remove_guidance_interval,
    remove_guider,
)
from .respacing import respaced_timesteps

__all__ = [
    "ADMUpsamplerPipeline",
    "BoostAndSkipPipeline",
    "DiTGuidanceIntervalPipeline",
    "DiscreteDiffusionPipeline",
    "DiscreteDiffusionPipelineOutput",
    "EDM2Pipeline",
    "FlowPostprocessingPipeline",
    "GuidanceInterval",
    "GuidanceReport",
    "StableDiffusionXLGuidanceIntervalPipeline",
    "apply_guidance_interval",
    "apply_guider",
    "guidance_report",
    "remove_guidance_interval",
    "remove_guider",
    "respaced_timesteps",
]

# Imported when asked for: its base imports the image processors of transformers, which takes seconds and prints a
# warning where torchvision is missing.
LAZY = {"StableDiffusionXLGuidanceIntervalPipeline": ".stable_diffusion_xl_guidance_interval"}


def __getattr__(name: str):
    if name in LAZY:
        return getattr(import_module(LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
