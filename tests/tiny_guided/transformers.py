"""Transformers with a batch of several parts."""

import inspect
from importlib import import_module
from types import SimpleNamespace

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
)
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from PIL import Image
from tiny_pipelines import tiny_sdxl

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
from .unets import UNET, WORDS, _images

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
