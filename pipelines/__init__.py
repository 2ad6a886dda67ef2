"""Diffusion pipelines, one file a method; each file also loads by path through custom_pipeline=."""

from .adm_upsampler import ADMUpsamplerPipeline
from .boost_and_skip import BoostAndSkipPipeline
from .edm2 import EDM2Pipeline
from .respacing import respaced_timesteps

__all__ = ["ADMUpsamplerPipeline", "BoostAndSkipPipeline", "EDM2Pipeline", "respaced_timesteps"]
