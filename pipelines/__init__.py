"""Diffusion pipelines, one file a method; each file also loads by path through custom_pipeline=."""

from .adm_upsampler import ADMUpsamplerPipeline
from .boost_and_skip import BoostAndSkipPipeline
from .respacing import respaced_timesteps

__all__ = ["ADMUpsamplerPipeline", "BoostAndSkipPipeline", "respaced_timesteps"]
