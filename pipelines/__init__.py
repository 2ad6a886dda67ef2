"""Diffusion pipelines, one file a method; each file also loads by path through custom_pipeline=."""

from .boost_and_skip import BoostAndSkipPipeline

__all__ = ["BoostAndSkipPipeline"]
