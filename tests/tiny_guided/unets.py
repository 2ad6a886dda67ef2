"""UNets with a doubled batch, unconditional first; with perturbed attention three rows a prompt."""

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
)
from tiny_pipelines import LATENT_SCHEDULE, tiny_sdxl, tiny_stable_diffusion

from .case import BATCH, TEXT, TOKENS, Case, build, case, embeds, masks, options, pooled, prompts


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
