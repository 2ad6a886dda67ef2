"""Two calls of the network."""

import diffusers
import pytest
import torch
from diffusers import (
    UniPCMultistepScheduler,
)
from packaging.version import Version

from .case import (
    BATCH,
    STEPS,
    TEXT,
    TOKENS,
    VAE_BLOCKS,
    Case,
    build,
    case,
    embeds,
    flow,
    masks,
    module_of,
    options,
    pooled,
    prompts,
)
from .unets import _images

TWO = "cond; uncond"


@case
def flux() -> Case:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(0, 4, 4),
    )  # fmt: skip
    missing = (*TEXT, "text_encoder_2", "tokenizer_2")
    pipe = build("FluxPipeline", *missing, transformer=transformer, scheduler=flow())
    given = {**prompts(8), **pooled(8), "height": 64, "width": 64, "true_cfg_scale": 4.0}
    return Case(pipe, options(**given), order=TWO, off={"true_cfg_scale": 1.0})


@case
def chroma() -> Case:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(0, 4, 4), approximator_num_channels=8, approximator_hidden_dim=8,
        approximator_layers=1,
    )  # fmt: skip
    pipe = build("ChromaPipeline", *TEXT, transformer=transformer, scheduler=flow())
    return Case(pipe, options(**prompts(8), **masks(torch.bool), height=64, width=64), order=TWO)


def _wan(cls=diffusers.WanTransformer3DModel, **config):
    return cls(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
        ffn_dim=8, num_layers=1, **config,
    )  # fmt: skip


WAN_SCHEDULE = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@case
def wan() -> Case:
    scheduler = UniPCMultistepScheduler(**WAN_SCHEDULE)
    pipe = build("WanPipeline", *TEXT, transformer=_wan(), scheduler=scheduler)
    return Case(pipe, options(**prompts(8), height=32, width=32, num_frames=5), order=TWO)


@case
def wan_2_2() -> Case:
    scheduler = UniPCMultistepScheduler(**WAN_SCHEDULE)
    pipe = build(
        "WanPipeline", *TEXT, transformer=_wan(), transformer_2=_wan(), scheduler=scheduler, boundary_ratio=0.7
    )
    given = options(**prompts(8), height=32, width=32, num_frames=5)
    return Case(pipe, given, order=TWO, networks=("transformer", "transformer_2"))


@case
def skyreels_v2() -> Case:
    transformer = _wan(diffusers.SkyReelsV2Transformer3DModel)
    scheduler = UniPCMultistepScheduler(**WAN_SCHEDULE)
    pipe = build("SkyReelsV2Pipeline", *TEXT, transformer=transformer, scheduler=scheduler)
    return Case(pipe, options(**prompts(8), height=32, width=32, num_frames=5), order=TWO)


@case
def qwen_image() -> Case:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(0, 4, 4),
    )  # fmt: skip
    pipe = build("QwenImagePipeline", *TEXT, transformer=transformer, scheduler=flow())
    given = {**prompts(8), **masks(name="prompt_embeds_mask"), "height": 64, "width": 64, "true_cfg_scale": 4.0}
    return Case(pipe, {**options(**given), "guidance_scale": None}, order=TWO, off={"true_cfg_scale": 1.0})


@case
def cogview4() -> Case:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, text_embed_dim=8,
        time_embed_dim=8, condition_dim=4, sample_size=8, rope_axes_dim=(64, 64),
    )  # fmt: skip
    pipe = build("CogView4Pipeline", *TEXT, transformer=transformer, scheduler=flow())
    return Case(pipe, options(**prompts(8), height=64, width=64), order=TWO)


@case
def lumina2() -> Case:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64), cap_feat_dim=8,
    )  # fmt: skip
    pipe = build("Lumina2Pipeline", *TEXT, transformer=transformer, scheduler=flow())
    return Case(pipe, options(**prompts(8), **masks(), height=64, width=64), order=TWO)


@case
def hunyuan_video() -> Case:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(2, 4, 2),
    )  # fmt: skip
    missing = (*TEXT, "text_encoder_2", "tokenizer_2")
    pipe = build("HunyuanVideoPipeline", *missing, transformer=transformer, scheduler=flow())
    given = {**prompts(8), **pooled(8), **masks(), "true_cfg_scale": 4.0, "guidance_scale": 1.0}
    given |= {"height": 32, "width": 32, "num_frames": 5}
    return Case(pipe, options(**given), order=TWO, off={"true_cfg_scale": 1.0})


@case
def ovis_image() -> Case:
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=(0, 4, 4),
    )  # fmt: skip
    pipe = build("OvisImagePipeline", *TEXT, transformer=transformer, scheduler=flow())
    return Case(pipe, options(**prompts(8), negative_prompt=None, height=64, width=64), order=TWO)


@case
def flux_controlnet() -> Case:
    if Version(diffusers.__version__) < Version("0.39"):
        pytest.skip("FluxControlNetPipeline ignores negative_prompt_embeds before diffusers 0.39")
    built = flux()
    controlnet = diffusers.FluxControlNetModel.from_transformer(
        built.pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4, norm_num_groups=2, shift_factor=0.0, latent_channels=4, **VAE_BLOCKS
    )
    components = {**built.pipe.components, "vae": vae}
    pipe = diffusers.FluxControlNetPipeline(**components, controlnet=controlnet)
    return Case(pipe, {**built.options, "control_image": _images(64)}, order=TWO, off=built.off)


@case
def hunyuan_image() -> Case:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=8, text_embed_2_dim=8, rope_axes_dim=(4, 4),
    )  # fmt: skip
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    missing = (*TEXT, "text_encoder_2", "tokenizer_2")
    pipe = build(
        "HunyuanImagePipeline", *missing, transformer=transformer, scheduler=flow(), guider=guider, ocr_guider=guider
    )
    given = {**prompts(8), **masks(name="prompt_embeds_mask")}
    given |= {f"{name}_2": value for name, value in given.items()}
    given |= {"height": 256, "width": 256, "num_inference_steps": STEPS, "output_type": "latent"}
    return Case(pipe, given, order=TWO, off={})


@case
def kandinsky_5() -> Case:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=8, out_visual_dim=4, model_dim=16, ff_dim=16,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(2, 2, 4),
    )  # fmt: skip
    missing = (*TEXT, "text_encoder_2", "tokenizer_2")
    pipe = build("Kandinsky5T2VPipeline", *missing, transformer=transformer, scheduler=flow())
    given = {f"{sign}prompt_embeds_qwen": embeds(TOKENS, 8) for sign in ("", "negative_")}
    given |= {f"{sign}prompt_embeds_clip": embeds(8) for sign in ("", "negative_")}
    lengths = torch.arange(BATCH + 1, dtype=torch.int32) * TOKENS
    given |= {f"{sign}prompt_cu_seqlens": lengths for sign in ("", "negative_")}
    return Case(pipe, options(**given, height=64, width=64, num_frames=5), order=TWO)


@case
def skyreels_v2_diffusion_forcing() -> Case:
    transformer = _wan(diffusers.SkyReelsV2Transformer3DModel)
    scheduler = UniPCMultistepScheduler(**WAN_SCHEDULE)
    pipe = build("SkyReelsV2DiffusionForcingPipeline", *TEXT, transformer=transformer, scheduler=scheduler)
    given = {"prompt": None, "height": 32, "width": 32, "num_frames": 5, "base_num_frames": 5}
    return Case(pipe, options(**prompts(8), **given), order=TWO)


@case
def ideogram_4() -> Case:
    """Two networks; the output of the conditional one has the text in front."""
    module_of("Ideogram4Pipeline")
    config = {
        "in_channels": 16, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "intermediate_size": 16, "adaln_dim": 8, "llm_features_dim": 8, "mrope_section": (2, 1, 1),
    }  # fmt: skip
    networks = ("transformer", "unconditional_transformer")
    transformers = {name: diffusers.Ideogram4Transformer2DModel(**config) for name in networks}
    pipe = build("Ideogram4Pipeline", *TEXT, **transformers, scheduler=flow())
    size = TOKENS + 16  # and a grid of 4 x 4
    places = torch.arange(size)[None, :, None].repeat(BATCH, 1, 3)
    kinds = torch.cat([torch.full((BATCH, TOKENS), 3), torch.full((BATCH, 16), 2)], dim=1)
    encoded = (embeds(size, 8), places, torch.zeros(BATCH, size, dtype=torch.long), kinds)
    pipe.encode_prompt = lambda **_: encoded
    given = {"prompt": ["a cat", "a dog"], "guidance_schedule": None, "max_sequence_length": TOKENS}
    return Case(pipe, options(**given, height=64, width=64), order=TWO, networks=networks)
