"""Stock pipelines with random weights and a few thousand parameters, one of every family that guides, for tests.

No text encoder and no VAE where a pipeline can do without: prompts are random embeddings, outputs are latents.
`CASES` holds a builder for each; it returns a `Case`.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import NamedTuple

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from packaging.version import Version
from PIL import Image
from tiny_pipelines import LATENT_SCHEDULE, tiny_sdxl, tiny_stable_diffusion
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

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


# UNets with a doubled batch, unconditional first.


def _unet(**changes) -> diffusers.UNet2DConditionModel:
    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (4, 8), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2, "norm_num_groups": 2,
        "cross_attention_dim": 8,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**config, **changes})


def _images(size: int = 16) -> torch.Tensor:
    return torch.rand(BATCH, 3, size, size)


WORDS = {"prompt": ["a cat", "a dog"], "negative_prompt": ["blurry", "dark"]}
UNET = {"networks": ("unet",)}


@case
def stable_diffusion() -> Case:
    return Case(tiny_stable_diffusion(), options(**WORDS), **UNET)


@case
def stable_diffusion_img2img() -> Case:
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        **tiny_stable_diffusion().components, requires_safety_checker=False
    )
    return Case(pipe, options(**WORDS, image=_images(), strength=1.0), **UNET)


@case
def stable_diffusion_inpaint() -> Case:
    pipe = diffusers.StableDiffusionInpaintPipeline(
        **tiny_stable_diffusion().components, requires_safety_checker=False
    )
    mask = torch.zeros(BATCH, 1, 16, 16)
    mask[..., 4:12] = 1
    sizes = {"height": 16, "width": 16}
    return Case(pipe, options(**WORDS, image=_images(), mask_image=mask, strength=1.0, **sizes), **UNET)


@case
def stable_diffusion_controlnet() -> Case:
    components = tiny_stable_diffusion().components
    controlnet = diffusers.ControlNetModel.from_unet(
        components["unet"], conditioning_embedding_out_channels=(4, 8), load_weights_from_unet=False
    )
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **components, controlnet=controlnet, requires_safety_checker=False
    )
    return Case(pipe, options(**WORDS, image=_images()), networks=("unet", "controlnet"))


@case
def stable_diffusion_controlnet_guess_mode() -> Case:
    built = stable_diffusion_controlnet()
    return Case(built.pipe, {**built.options, "guess_mode": True}, **UNET)


@case
def stable_diffusion_xl() -> Case:
    return Case(tiny_sdxl(), options(**WORDS), **UNET)


@case
def stable_diffusion_xl_img2img() -> Case:
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**tiny_sdxl().components, add_watermarker=False)
    return Case(pipe, options(**WORDS, image=_images(), strength=1.0), **UNET)


@case
def stable_diffusion_xl_refiner() -> Case:
    components = tiny_sdxl().components
    components["text_encoder"] = components["tokenizer"] = None
    components["unet"] = _unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=5 * 4 + 8,  # the aesthetic score in place of a size
    )
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        **components, add_watermarker=False, requires_aesthetics_score=True
    )
    return Case(pipe, options(**WORDS, image=_images(), strength=1.0), **UNET)


@case
def stable_diffusion_xl_inpaint() -> Case:
    pipe = diffusers.StableDiffusionXLInpaintPipeline(**tiny_sdxl().components, add_watermarker=False)
    mask = torch.zeros(BATCH, 1, 16, 16)
    mask[..., 4:12] = 1
    sizes = {"height": 16, "width": 16}
    return Case(pipe, options(**WORDS, image=_images(), mask_image=mask, strength=1.0, **sizes), **UNET)


@case
def stable_diffusion_xl_controlnet() -> Case:
    components = tiny_sdxl().components
    controlnet = diffusers.ControlNetModel.from_unet(
        components["unet"], conditioning_embedding_out_channels=(4, 8), load_weights_from_unet=False
    )
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**components, controlnet=controlnet, add_watermarker=False)
    return Case(pipe, options(**WORDS, image=_images()), networks=("unet", "controlnet"))


@case
def stable_diffusion_controlnet_xs() -> Case:
    """One network of a UNet and a ControlNet."""
    components = tiny_stable_diffusion().components
    components["unet"] = _unet(layers_per_block=2)
    controlnet = diffusers.ControlNetXSAdapter.from_unet(
        components["unet"], size_ratio=1.0, conditioning_embedding_out_channels=(4, 8)
    )
    components.pop("image_encoder")
    pipe = diffusers.StableDiffusionControlNetXSPipeline(
        **components, controlnet=controlnet, requires_safety_checker=False
    )
    return Case(pipe, options(**WORDS, image=_images()), **UNET)


@case
def stable_diffusion_xl_controlnet_union() -> Case:
    """Several kinds of control in one network, whose numbers are rows as well."""
    controlnet = diffusers.ControlNetUnionModel(
        block_out_channels=(4, 8), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=2, norm_num_groups=2, cross_attention_dim=16, transformer_layers_per_block=1,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8, conditioning_embedding_out_channels=(4, 8),
        num_trans_channel=4, num_trans_head=1, num_trans_layer=1, num_proj_channel=4,
    )  # fmt: skip
    components = tiny_sdxl().components
    pipe = diffusers.StableDiffusionXLControlNetUnionPipeline(
        **components, controlnet=controlnet, add_watermarker=False
    )
    given = {"control_image": [_images(), _images()], "control_mode": [0, 3]}
    return Case(pipe, options(**WORDS, **given), networks=("unet", "controlnet"))


@case
def kolors() -> Case:
    unet = _unet(
        encoder_hid_dim=8, encoder_hid_dim_type="text_proj", addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 8,
    )  # fmt: skip
    components = {"vae": tiny_sdxl().vae, "text_encoder": None, "tokenizer": None}
    # diffusers.KolorsPipeline wants sentencepiece; in older versions this module as well
    module = pytest.importorskip("diffusers.pipelines.kolors.pipeline_kolors")
    pipe = module.KolorsPipeline(
        **components, unet=unet, scheduler=diffusers.EulerDiscreteScheduler(**LATENT_SCHEDULE)
    )
    return Case(pipe, options(**prompts(8), **pooled(8), height=16, width=16), **UNET)


@case
def stable_diffusion_upscale() -> Case:
    components = tiny_stable_diffusion().components
    components["unet"] = _unet(in_channels=7, num_class_embeds=100)
    keep = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    pipe = diffusers.StableDiffusionUpscalePipeline(
        **{name: components[name] for name in keep}, low_res_scheduler=DDPMScheduler(), max_noise_level=50
    )
    return Case(pipe, options(**WORDS, image=_images(8)), **UNET)


@case
def stable_diffusion_instruct_pix2pix() -> Case:
    components = tiny_stable_diffusion().components
    components["unet"] = _unet(in_channels=8)
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**components, requires_safety_checker=False)
    return Case(pipe, options(**WORDS, image=_images()), order="cond, image, uncond", **UNET)


@case
def animatediff() -> Case:
    unet = diffusers.UNetMotionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), norm_num_groups=2, num_attention_heads=2,
        motion_num_attention_heads=2, cross_attention_dim=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(**LATENT_SCHEDULE, clip_sample=False)
    pipe = build("AnimateDiffPipeline", *TEXT, "motion_adapter", unet=unet, scheduler=scheduler)
    return Case(pipe, options(**prompts(8), num_frames=3, height=64, width=64), **UNET)


@case
def text_to_video() -> Case:
    unet = diffusers.UNet3DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        norm_num_groups=2, attention_head_dim=2, cross_attention_dim=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(**LATENT_SCHEDULE, clip_sample=False)
    pipe = build("TextToVideoSDPipeline", *TEXT, unet=unet, scheduler=scheduler)
    return Case(pipe, options(**prompts(8), num_frames=3, height=64, width=64), **UNET)


@case
def stable_video_diffusion() -> Case:
    """A weight for each frame, between two scales."""
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=8,
        num_attention_heads=2, addition_time_embed_dim=4, projection_class_embeddings_input_dim=12,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002,
        sigma_max=700.0, beta_schedule="scaled_linear",
    )  # fmt: skip
    missing = ("image_encoder", "feature_extractor")
    pipe = build("StableVideoDiffusionPipeline", *missing, vae=vae, unet=unet, scheduler=scheduler)
    encoded = torch.cat([torch.zeros(BATCH, 1, 8), torch.randn(BATCH, 1, 8)])
    pipe._encode_image = lambda image, device, count, guided: encoded[0 if guided else BATCH :]
    pipe._encode_vae_image = lambda image, device, num_videos_per_prompt, do_classifier_free_guidance: latents[
        0 if do_classifier_free_guidance else BATCH :
    ]
    latents = torch.cat([torch.zeros(BATCH, 4, 8, 8), torch.randn(BATCH, 4, 8, 8)])
    given = options(image=_images(), num_frames=3, height=16, width=16, min_guidance_scale=2.0, max_guidance_scale=4.0)
    del given["guidance_scale"]
    return Case(pipe, given, off={"min_guidance_scale": 1.0, "max_guidance_scale": 1.0}, **UNET)


@case
def kandinsky_2_2() -> Case:
    unet = _unet(
        out_channels=8, cross_attention_dim=8, encoder_hid_dim=8, encoder_hid_dim_type="image_proj",
        addition_embed_type="image", down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    movq = diffusers.VQModel(block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2, num_vq_embeddings=8)
    pipe = diffusers.KandinskyV22Pipeline(unet=unet, scheduler=DDPMScheduler(variance_type="learned_range"), movq=movq)
    given = {"image_embeds": embeds(8), "negative_image_embeds": embeds(8), "height": 16, "width": 16}
    return Case(pipe, options(**given), **UNET)


@case
def kandinsky_3() -> Case:
    unet = diffusers.Kandinsky3UNet(
        time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3, block_out_channels=(32, 64),
        cross_attention_dim=4, encoder_hid_dim=8,
    )  # fmt: skip
    pipe = build("Kandinsky3Pipeline", "tokenizer", "text_encoder", "movq", unet=unet, scheduler=DDPMScheduler())
    given = {"attention_mask": masks()["prompt_attention_mask"], "negative_attention_mask": torch.ones(BATCH, TOKENS)}
    return Case(pipe, options(**prompts(8), **given, height=64, width=64), **UNET)


@case
def deepfloyd_if() -> Case:
    unet = _unet(
        in_channels=3, out_channels=6, encoder_hid_dim=8, addition_embed_type="text", addition_embed_type_num_heads=2
    )
    scheduler = DDPMScheduler(variance_type="learned_range")
    missing = ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
    pipe = build("IFPipeline", *missing, unet=unet, scheduler=scheduler, requires_safety_checker=False)
    return Case(pipe, options(**prompts(8), output_type="pt", height=8, width=8), **UNET)


# Perturbed attention: three rows a prompt, of which guidance interval leaves out the first.


@case
def stable_diffusion_pag() -> Case:
    components = tiny_stable_diffusion().components
    pipe = diffusers.StableDiffusionPAGPipeline(**components, pag_applied_layers="mid", requires_safety_checker=False)
    return Case(pipe, options(**WORDS, pag_scale=1.0), order="uncond, cond, perturbed", **UNET)


@case
def stable_diffusion_xl_pag() -> Case:
    pipe = diffusers.StableDiffusionXLPAGPipeline(**tiny_sdxl().components, add_watermarker=False)
    return Case(pipe, options(**WORDS, pag_scale=1.0), order="uncond, cond, perturbed", **UNET)


# Transformers with a doubled batch, unconditional first.


SD3_CONFIG = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 4,
    "num_attention_heads": 2, "joint_attention_dim": 8, "caption_projection_dim": 8, "pooled_projection_dim": 8,
    "pos_embed_max_size": 8,
}  # fmt: skip


@case
def stable_diffusion_3() -> Case:
    transformer = diffusers.SD3Transformer2DModel(**SD3_CONFIG)
    missing = (*TEXT, "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = build("StableDiffusion3Pipeline", *missing, transformer=transformer, scheduler=flow())
    return Case(pipe, options(**prompts(8), **pooled(8), height=64, width=64))


def _pixart(**config) -> diffusers.PixArtTransformer2DModel:
    return diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=4, num_attention_heads=2, cross_attention_dim=8,
        caption_channels=8, **config,
    )  # fmt: skip


@case
def pixart_alpha() -> Case:
    pipe = build("PixArtAlphaPipeline", *TEXT, transformer=_pixart(), scheduler=DPMSolverMultistepScheduler())
    given = {"negative_prompt": None, "use_resolution_binning": False, "height": 64, "width": 64}
    return Case(pipe, options(**prompts(8), **masks(), **given))


@case
def pixart_sigma() -> Case:
    pipe = build("PixArtSigmaPipeline", *TEXT, transformer=_pixart(), scheduler=DPMSolverMultistepScheduler())
    given = {"negative_prompt": None, "use_resolution_binning": False, "height": 64, "width": 64}
    return Case(pipe, options(**prompts(8), **masks(), **given))


@case
def auraflow() -> Case:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pos_embed_max_size=64,
    )  # fmt: skip
    pipe = build("AuraFlowPipeline", *TEXT, transformer=transformer, scheduler=flow())
    return Case(pipe, options(**prompts(8), **masks(), height=64, width=64))


@case
def sana() -> Case:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    pipe = build("SanaPipeline", *TEXT, transformer=transformer, scheduler=flow())
    given = {"negative_prompt": None, "use_resolution_binning": False, "height": 256, "width": 256}
    return Case(pipe, options(**prompts(8), **masks(), **given))


@case
def hunyuan_dit() -> Case:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8, in_channels=4, patch_size=2, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        hidden_size=16, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=8, text_len=TOKENS,
        text_len_t5=TOKENS, activation_fn="gelu-approximate",
    )  # fmt: skip
    missing = (*TEXT, "safety_checker", "feature_extractor", "text_encoder_2", "tokenizer_2")
    pipe = build("HunyuanDiTPipeline", *missing, transformer=transformer, scheduler=DDPMScheduler())
    second = {f"{name}_2": value for name, value in {**prompts(8), **masks()}.items()}
    given = {"use_resolution_binning": False, "height": 64, "width": 64}
    return Case(pipe, options(**prompts(8), **masks(), **second, **given))


@case
def cogview3_plus() -> Case:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, text_embed_dim=8,
        time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler()
    pipe = build("CogView3PlusPipeline", *TEXT, transformer=transformer, scheduler=scheduler)
    return Case(pipe, options(**prompts(8), height=64, width=64))


@case
def ltx_video() -> Case:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=8,
    )  # fmt: skip
    pipe = build("LTXPipeline", *TEXT, transformer=transformer, scheduler=flow())
    return Case(pipe, options(**prompts(8), **masks(), height=64, width=64, num_frames=9))


@case
def mochi() -> Case:
    transformer = diffusers.MochiTransformer3DModel(
        in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, pooled_projection_dim=8,
        text_embed_dim=8, time_embed_dim=4, max_sequence_length=TOKENS,
    )  # fmt: skip
    pipe = build("MochiPipeline", *TEXT, transformer=transformer, scheduler=flow(invert_sigmas=True))
    return Case(pipe, options(**prompts(8), **masks(torch.bool), height=32, width=32, num_frames=7))


@case
def cogvideox() -> Case:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=1, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=TOKENS,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler()
    pipe = build("CogVideoXPipeline", *TEXT, transformer=transformer, scheduler=scheduler)
    return Case(pipe, options(**prompts(8), height=64, width=64, num_frames=9, max_sequence_length=TOKENS))


@case
def latte() -> Case:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8, in_channels=4, out_channels=8, patch_size=2, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, cross_attention_dim=8, caption_channels=8, video_length=2, norm_type="ada_norm_single",
        num_embeds_ada_norm=1000, norm_elementwise_affine=False,
    )  # fmt: skip
    pipe = build("LattePipeline", *TEXT, transformer=transformer, scheduler=DDIMScheduler(clip_sample=False))
    given = {"negative_prompt": None, "video_length": 2, "height": 64, "width": 64}
    return Case(pipe, options(**prompts(8), **given))


@case
def allegro() -> Case:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=1, cross_attention_dim=24, caption_channels=8,
        sample_height=8, sample_width=8, sample_frames=2,
    )  # fmt: skip
    pipe = build("AllegroPipeline", *TEXT, transformer=transformer, scheduler=DDIMScheduler(clip_sample=False))
    given = {"negative_prompt": None, "num_frames": 8, "height": 64, "width": 64}
    return Case(pipe, options(**prompts(8), **masks(), **given))


@case
def bria() -> Case:
    transformer = diffusers.BriaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, shift_factor=0.0, **VAE_BLOCKS)
    pipe = build("BriaPipeline", *TEXT[1:], vae=vae, transformer=transformer, scheduler=flow())
    return Case(pipe, options(**prompts(8), height=64, width=64))


@case
def easyanimate() -> Case:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=8,
        sample_height=8, num_layers=1, mmdit_layers=1, time_embed_dim=2, text_embed_dim=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMagvit(latent_channels=4, block_out_channels=(8,) * 4, norm_num_groups=2)
    pipe = build("EasyAnimatePipeline", *TEXT[1:], vae=vae, transformer=transformer, scheduler=flow())
    return Case(pipe, options(**prompts(8), **masks(torch.bool), height=64, width=64, num_frames=5))


@case
def sana_video() -> Case:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=12,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
        sample_size=8, rope_max_seq_len=32,
    )  # fmt: skip
    pipe = build("SanaVideoPipeline", *TEXT, transformer=transformer, scheduler=flow())
    given = {"negative_prompt": None, "use_resolution_binning": False, "height": 32, "width": 32, "frames": 5}
    return Case(pipe, options(**prompts(8), **masks(), **given))


@case
def hidream() -> Case:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_channels=[8, 8], text_emb_dim=8, axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8), llama_layers=(0, 0), force_inference_output=True,
    )  # fmt: skip
    missing = (*TEXT, *(f"{name}_{i}" for i in (2, 3, 4) for name in ("text_encoder", "tokenizer")))
    pipe = build("HiDreamImagePipeline", *missing, transformer=transformer, scheduler=flow())
    pipe.default_sample_size = 8  # else it would work at its own size whatever it is asked for
    given = {f"{name}_t5": value for name, value in prompts(8).items()}
    llama = {"prompt_embeds_llama3": torch.randn(1, BATCH, TOKENS, 8)}
    llama["negative_prompt_embeds_llama3"] = torch.randn(1, BATCH, TOKENS, 8)
    return Case(pipe, options(**given, **llama, **pooled(8), height=64, width=64))


@case
def stable_audio() -> Case:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        num_key_value_attention_heads=2, cross_attention_dim=8, time_proj_dim=4, global_states_input_dim=16,
        cross_attention_input_dim=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4, decoder_channels=4, decoder_input_channels=4, downsampling_ratios=[2, 4],
        channel_multiples=[1, 2], audio_channels=2, sampling_rate=16,
    )  # fmt: skip
    projection = StableAudioProjectionModel(text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=4)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler()
    pipe = build(
        "StableAudioPipeline", "text_encoder", "tokenizer", vae=vae, projection_model=projection,
        transformer=transformer, scheduler=scheduler,
    )  # fmt: skip
    given = {"attention_mask": torch.ones(BATCH, TOKENS), "negative_attention_mask": torch.ones(BATCH, TOKENS)}
    return Case(pipe, options(**prompts(8), **given, audio_end_in_s=2.0))


@case
def ernie_image() -> Case:
    module_of("ErnieImagePipeline")
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=16, num_attention_heads=2, num_layers=1, ffn_hidden_size=16, in_channels=4, out_channels=4,
        text_in_dim=8, rope_axes_dim=(4, 2, 2),
    )  # fmt: skip
    pipe = build("ErnieImagePipeline", *TEXT, transformer=transformer, scheduler=flow())
    given = {name: [value[0], value[1, :4]] for name, value in prompts(8).items()}
    return Case(pipe, options(**given, height=64, width=64))


class _Latents(torch.nn.Module):
    """Stands in for a VAE whose sizes and statistics alone are asked for."""

    def __init__(self, **attributes):
        super().__init__()
        vars(self).update(attributes, dtype=torch.float32, device=torch.device("cpu"))


class _Connectors(torch.nn.Module):
    """Embeddings of a prompt for video and audio."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.video, self.audio = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)

    def forward(self, embeds, mask, padding_side):
        return self.video(embeds), self.audio(embeds), mask


@case
def ltx_2() -> Case:
    """Video and audio, split apart; without its other two kinds of guidance."""
    module_of("LTX2Pipeline", "audio_stg_scale")
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, perturbed_attn=True,
    )  # fmt: skip
    statistics = {"latents_mean": torch.zeros(4), "latents_std": torch.ones(4)}
    video = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8, **statistics}
    vae = _Latents(**video, config=SimpleNamespace(scaling_factor=1.0))
    config = SimpleNamespace(mel_bins=4, latent_channels=4, sample_rate=16000, mel_hop_length=160)
    audio_vae = _Latents(mel_compression_ratio=4, temporal_compression_ratio=4, **statistics, config=config)
    pipe = build(
        "LTX2Pipeline", "text_encoder", "tokenizer", "vocoder", vae=vae, audio_vae=audio_vae,
        connectors=_Connectors(), transformer=transformer, scheduler=flow(),
    )  # fmt: skip
    other = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    given = {**prompts(8), **masks(), **other, "audio_guidance_scale": 3.0, "spatio_temporal_guidance_blocks": [1]}
    off = {"guidance_scale": 1.0, "audio_guidance_scale": 1.0}
    return Case(pipe, options(**given, height=64, width=64, num_frames=9), off=off)


@case
def dream_lite_edit() -> Case:
    unet = module_of("DreamLitePipeline").DreamLiteUNetModel(
        sample_size=8, block_out_channels=(32, 32, 32), layers_per_block=1, cross_attention_dim=8, norm_num_groups=2,
        attention_head_dim=8, addition_embed_type="time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8, transformer_layers_per_block=1,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4, **VAE_BLOCKS)
    missing = ("tokenizer", "processor")
    text_encoder = _clip()["text_encoder"]
    pipe = build("DreamLitePipeline", *missing, text_encoder=text_encoder, vae=vae, unet=unet, scheduler=flow())
    encoded = torch.randn(3, TOKENS, 8), torch.ones(3, TOKENS, dtype=torch.long)
    pipe.encode_prompt = lambda **_: encoded
    given = options(prompt="a cat", image=Image.new("RGB", (64, 64), "red"), height=64, width=64)
    off = {"guidance_scale": 1.0, "image_guidance_scale": 1.0}
    return Case(pipe, given, order="uncond, image, cond", off=off, batch=1, **UNET)


@case
def stable_diffusion_3_controlnet() -> Case:
    built = stable_diffusion_3()
    controlnet = diffusers.SD3ControlNetModel(**SD3_CONFIG)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, shift_factor=0.0, **VAE_BLOCKS)
    components = {**built.pipe.components, "vae": vae}
    components.pop("image_encoder"), components.pop("feature_extractor")
    pipe = diffusers.StableDiffusion3ControlNetPipeline(**components, controlnet=controlnet)
    given = {**built.options, "control_image": _images(64)}
    return Case(pipe, given, networks=("transformer", "controlnet"))


# Conditional first.


@case
def dit() -> Case:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, out_channels=8, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler(clip_sample=False))
    return Case(pipe, {**options(class_labels=[3, 7]), "output_type": "np"}, order="cond, uncond")


@case
def lumina() -> Case:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=8, hidden_size=24, num_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=8,
        cross_attention_dim=8,
    )  # fmt: skip
    pipe = build("LuminaPipeline", *TEXT, transformer=transformer, scheduler=flow())
    return Case(pipe, options(**prompts(8), **masks(), height=64, width=64), order="cond, uncond")


def _cascade(**config) -> diffusers.StableCascadeUNet:
    return diffusers.StableCascadeUNet(
        conditioning_dim=8, timestep_ratio_embedding_dim=4, block_out_channels=(8, 8), num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), dropout=(0.0, 0.0), **config,
    )  # fmt: skip


def _clip() -> dict:
    """A text encoder with projection, and its tokenizer."""
    components = tiny_sdxl().components
    return {name: components[f"{name}_2"] for name in ("text_encoder", "tokenizer")}


@case
def ace_step() -> Case:
    """Adaptive projected guidance."""
    module = module_of("AceStepPipeline")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    small |= {"head_dim": 8, "sliding_window": 4}
    transformer = diffusers.AceStepTransformer1DModel(
        **small, num_hidden_layers=1, in_channels=12, audio_acoustic_hidden_dim=4
    )
    encoder = module.AceStepConditionEncoder(
        **small, text_hidden_dim=8, timbre_hidden_dim=4, num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    )  # fmt: skip
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4, decoder_channels=4, decoder_input_channels=4, downsampling_ratios=[2, 4],
        channel_multiples=[1, 2], audio_channels=2, sampling_rate=200,
    )  # fmt: skip
    scheduler = flow(num_train_timesteps=1, shift=1.0)
    pipe = build(
        "AceStepPipeline", *TEXT[1:], vae=vae, transformer=transformer, condition_encoder=encoder, scheduler=scheduler
    )
    encoded = (embeds(TOKENS, 8), torch.ones(BATCH, TOKENS), embeds(TOKENS, 8), torch.ones(BATCH, TOKENS))
    pipe.encode_prompt = lambda **_: encoded
    return Case(pipe, options(prompt=["a cat", "a dog"], audio_duration=1.0), order="cond, uncond")


class _OmniGenInputs:
    """Stands in for OmniGen's processor of prompts and images, which wants torchvision."""

    max_image_size = 1024

    def __init__(self, tokenizer, max_image_size):
        self.collate = import_module("diffusers.pipelines.omnigen.processor_omnigen").OmniGenCollator(hidden_size=16)

    def __call__(self, prompts, images, height, width, **_):
        placeholder = [0] * (height * width // 256)
        place = {"pixel_values": [torch.zeros(3, height, width)], "image_sizes": [[1, 1 + len(placeholder)]]}
        inputs = []
        for i in range(len(prompts)):
            whole = {"input_ids": [5, *placeholder, 6 + i], **place}
            nothing = {"input_ids": [9, 3], "pixel_values": None, "image_sizes": None}
            inputs.append((whole, nothing, {"input_ids": [8, *placeholder], **place}, [height, width]))
        return self.collate(inputs)


@case
def omnigen() -> Case:
    """Images in a list, and their places in a dict by number of the row."""
    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16, num_layers=1,
        pad_token_id=0, vocab_size=20, max_position_embeddings=1000, original_max_position_embeddings=500,
        time_step_dim=8, rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4, **VAE_BLOCKS)
    module_of("OmniGenPipeline").OmniGenMultiModalProcessor = _OmniGenInputs
    scheduler = flow(invert_sigmas=True)
    pipe = build("OmniGenPipeline", "tokenizer", transformer=transformer, vae=vae, scheduler=scheduler)
    latents = [torch.randn(1, 4, 8, 8) for _ in range(2 * BATCH)]
    pipe.encode_input_images = lambda images, device: latents
    image = Image.new("RGB", (64, 64), "red")
    given = {"prompt": [f"a {word} <img><|image_1|></img>" for word in ("cat", "dog")], "input_images": [[image]] * 2}
    given |= {"height": 64, "width": 64, "img_guidance_scale": 1.6}
    off = {"guidance_scale": 1.0, "img_guidance_scale": 1.0}
    return Case(pipe, options(**given), order="cond, uncond, image", off=off)


@case
def stable_cascade_prior() -> Case:
    prior = _cascade(
        in_channels=4, out_channels=4, clip_image_in_channels=8, clip_text_in_channels=8,
        clip_text_pooled_in_channels=8, switch_level=(False,),
    )  # fmt: skip
    scheduler = diffusers.DDPMWuerstchenScheduler()
    pipe = diffusers.StableCascadePriorPipeline(**_clip(), prior=prior, scheduler=scheduler)
    given = {**options(**WORDS, height=128, width=128), "output_type": "pt"}
    return Case(pipe, given, order="cond, uncond", networks=("prior",))


@case
def wuerstchen_prior() -> Case:
    prior_class = inspect.getmodule(diffusers.WuerstchenPriorPipeline).WuerstchenPrior  # which has moved
    prior = prior_class(c_in=2, c=8, depth=1, c_cond=8, c_r=8, nhead=2)
    pipe = diffusers.WuerstchenPriorPipeline(**_clip(), prior=prior, scheduler=diffusers.DDPMWuerstchenScheduler())
    given = {**options(**WORDS, height=128, width=128), "output_type": "pt"}
    return Case(pipe, given, order="cond, uncond", networks=("prior",))


# Lists of rows.


@case
def z_image() -> Case:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.zero_()  # for _fill; diffusers once left them uninitialised
    pipe = build("ZImagePipeline", *TEXT, transformer=transformer, scheduler=flow())
    given = {name: list(value) for name, value in prompts(8).items()}
    given["sigmas"] = [1 - step / STEPS for step in range(STEPS)]  # before diffusers 0.39 the last one would be 0
    return Case(pipe, options(**given, height=64, width=64), order="cond, uncond", off={"guidance_scale": 0.0})


@case
def z_image_controlnet() -> Case:
    """Residuals in a dict by number of the layer."""
    built = z_image()
    controlnet = diffusers.ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=4, dim=32, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, shift_factor=0.0, **VAE_BLOCKS)
    pipe = diffusers.ZImageControlNetPipeline(**{**built.pipe.components, "vae": vae}, controlnet=controlnet)
    return Case(pipe, {**built.options, "control_image": _images(64)}, order=built.order, off=built.off)


# Two calls.

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


# Of a shape of their own; tested one by one.


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
