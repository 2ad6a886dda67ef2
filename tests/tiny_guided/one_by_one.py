"""Of a shape of their own; tested one by one."""

from types import SimpleNamespace

import diffusers
import torch
from tiny_pipelines import tiny_stable_diffusion
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from .calls import TWO, _wan
from .case import BATCH, STEPS, TEXT, TOKENS, Case, build, embeds, flow, module_of, options, prompts
from .transformers import _clip, _Latents
from .unets import UNET, WORDS, kandinsky_2_2


def qwen_image_2_1(**given) -> Case:
    """The first call with each prompt fills a cache of its keys and values, which the others read."""
    module_of("QwenImage21Pipeline")
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=2, context_in_dim=8,
        mlp_ratio=2, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    vae = _Latents(config=SimpleNamespace(z_dim=16))
    pipe = build(
        "QwenImage21Pipeline", "text_encoder", vae=vae, processor=_Processor(), transformer=transformer,
        scheduler=flow(),
    )  # fmt: skip
    encoded = {None: embeds(TOKENS, 8), "dark": embeds(TOKENS - 2, 8)}

    def encode(prompt, **_):
        tokens = encoded["dark" if prompt[0] == "dark" else None]
        return tokens, None, torch.zeros(BATCH, tokens.shape[1], dtype=torch.bool)

    pipe.encode_prompt = encode
    pipe.set_progress_bar_config(disable=True)
    given = {**options(prompt=["a cat", "a dog"], negative_prompt=["dark"] * BATCH, true_cfg_scale=4.0), **given}
    del given["guidance_scale"]
    return Case(pipe, {**given, "height": 64, "width": 64}, order=TWO, off={"true_cfg_scale": 1.0})


class _Processor:
    """Counts the tokens of a template."""

    tokenizer = SimpleNamespace(encode=lambda text: [1])

    def apply_chat_template(self, *_, **__):
        return [[1, 2]]


def any_flow_far() -> Case:
    """Keeps keys and values from chunk to chunk of the video, here of three, with rows in the second dimension."""
    module_of("AnyFlowFARPipeline")
    transformer = _wan(
        diffusers.AnyFlowFARTransformer3DModel, chunk_partition=(1, 1, 1), compressed_patch_size=(1, 4, 4)
    )
    scheduler = diffusers.FlowMapEulerDiscreteScheduler()
    pipe = build("AnyFlowFARPipeline", *TEXT, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    given = options(**prompts(8), prompt=None, height=64, width=64, num_frames=9)
    return Case(pipe, given, off={"guidance_scale": 1.0, "negative_prompt_embeds": None})


def kandinsky_2_2_combined() -> Case:
    """Two pipelines in one, each with guidance of its own."""
    decoder = kandinsky_2_2().pipe.components
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=4, embedding_dim=8, num_layers=1, num_embeddings=16
    )
    config = {"hidden_size": 8, "intermediate_size": 16, "projection_dim": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    size = {"height": 16, "width": 16}
    parts = {
        "prior": prior,
        "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**config)),
        "image_processor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size),
        "scheduler": diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        **_clip(),
    }
    pipe = diffusers.KandinskyV22CombinedPipeline(
        **decoder, **{f"prior_{name}": part.eval() if hasattr(part, "eval") else part for name, part in parts.items()}
    )
    pipe.set_progress_bar_config(disable=True)
    scales = {"prior_guidance_scale": 4.0, "prior_num_inference_steps": STEPS}
    off = {"guidance_scale": 1.0, "prior_guidance_scale": 1.0}
    return Case(pipe, options(**WORDS, **scales, **size), off=off, networks=("prior_prior", "unet"))


def text_to_video_zero() -> Case:
    """Attention to the first frame of each prompt."""
    components = tiny_stable_diffusion().components
    components.pop("image_encoder")
    pipe = diffusers.TextToVideoZeroPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": "a cat", "negative_prompt": "dark", "video_length": 2, "t0": 2, "t1": 3}
    return Case(pipe, options(**given, height=16, width=16), batch=1, **UNET)


ONE_BY_ONE = (qwen_image_2_1, any_flow_far, kandinsky_2_2_combined, text_to_video_zero)
