"""The conventions of diffusers on the pipelines that make no images, or extend one of diffusers; and all have them."""

import inspect

import pytest
import test_pipeline_adm_upsampler
import test_pipeline_boost_and_skip
import test_pipeline_edm2
import test_pipeline_flow_postprocessing
import tiny_discrete
import torch
from conventions import PipelineConventions
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel
from tiny_pipelines import tiny_sdxl

from diffusers_ext import pipelines
from diffusers_ext.pipelines import DiTGuidanceIntervalPipeline, StableDiffusionXLGuidanceIntervalPipeline

ELSEWHERE = (
    test_pipeline_adm_upsampler,
    test_pipeline_boost_and_skip,
    test_pipeline_edm2,
    test_pipeline_flow_postprocessing,
)


class TestDiscreteDiffusion(PipelineConventions):
    variants = ("sequence", "text", "image")
    output_type = raw = "tokens"

    def build(self, variant):
        return tiny_discrete.build(variant)

    def options(self, variant):
        return {"batch_size": 2, "num_inference_steps": 3}

    def several(self, variant, count):
        return {"batch_size": count}

    @pytest.mark.parametrize("output_type", ["pt", "np", "tokens"])
    def test_the_tuple_begins_with_what_was_asked_for(self, output_type):
        pipe = self.quiet("image")
        output = self.call(pipe, "image", output_type=output_type)
        asked = output.tokens if output_type == "tokens" else output.images
        (alone,) = self.call(pipe, "image", output_type=output_type, return_dict=False)
        assert output[0] is asked and alone.shape == asked.shape

    def test_text_comes_first_where_it_was_asked_for(self):
        output = self.call(self.quiet("text"), "text", output_type="text")
        assert output[0] is output.text and output[1] is output.tokens


class TestDiTGuidanceInterval(PipelineConventions):
    variants = ("stock", "interval")

    def build(self, variant):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
            patch_size=2, norm_num_groups=2, num_embeds_ada_norm=1000,
        )  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)
        return DiTGuidanceIntervalPipeline(transformer.eval(), vae.eval(), DDIMScheduler())

    def options(self, variant):
        interval = {"guided_steps": (1, 1)} if variant == "interval" else {}
        return {"class_labels": [3, 7], "num_inference_steps": 3, "guidance_scale": 4.0, **interval}

    def several(self, variant, count):
        return {"class_labels": [3, 7, 5][:count]}


class TestStableDiffusionXLGuidanceInterval(PipelineConventions):
    variants = ("stock", "interval")

    def build(self, variant):
        return StableDiffusionXLGuidanceIntervalPipeline(**tiny_sdxl().components, add_watermarker=False)

    def options(self, variant):
        interval = {"guidance_interval": (0.1, 4.0)} if variant == "interval" else {}
        return {"prompt": ["a cat", "a dog"], "num_inference_steps": 3, "guidance_scale": 4.0, **interval}

    def several(self, variant, count):
        return {"prompt": ["a cat", "a dog", "a bird"][:count]}

    def without_optional(self, pipe, variant):
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        given = dict(zip(names, pipe.encode_prompt(["a cat", "a dog"]), strict=True))
        return {"prompt": None, **given}


def public_pipelines() -> list[type]:
    values = [getattr(pipelines, name) for name in pipelines.__all__]
    return [value for value in values if inspect.isclass(value) and issubclass(value, DiffusionPipeline)]


def test_every_public_pipeline_is_covered():
    """Each has a test class here, or a contract in its own file."""
    here = [value for name, value in globals().items() if name.startswith("Test")]
    tests = [*here, *(module.TestContract for module in ELSEWHERE)]
    assert all(issubclass(cls, PipelineConventions) for cls in tests)
    assert {type(cls().build(cls.variants[0])) for cls in tests} == set(public_pipelines())
