"""Stock latent text-to-image pipelines with random weights and some 30,000 parameters, for tests."""

from string import ascii_lowercase

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# The schedule of Stable Diffusion 1.x, 2.x and XL.
LATENT_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
# Letters inside a word, and at its end.
TOKENS = ["<|startoftext|>", "<|endoftext|>", *ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase)]


def tiny_stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:
    """Latents (batch, 4, 8, 8), images of 16 x 16, prompts of at most 14 lower-case letters, SD's DDIM."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        components = {
            "vae": _vae(),
            "text_encoder": CLIPTextModel(clip_config()),
            "tokenizer": _tokenizer(),
            "unet": _unet(cross_attention_dim=8),
        }
    scheduler = DDIMScheduler(**LATENT_SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    pipe = StableDiffusionPipeline(
        **_evaluating(components),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """Latents (batch, 4, 8, 8), images of 16 x 16, prompts of at most 14 lower-case letters, SDXL's Euler."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        components = {
            "vae": _vae(),
            "text_encoder": CLIPTextModel(clip_config()),
            "text_encoder_2": CLIPTextModelWithProjection(clip_config()),
            "tokenizer": _tokenizer(),
            "tokenizer_2": _tokenizer(),
            "unet": _unet(
                cross_attention_dim=16,  # the two text encoders side by side
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 * 4 + 8,  # six sizes and the pooled text
            ),
        }
    pipe = StableDiffusionXLPipeline(
        **_evaluating(components), scheduler=EulerDiscreteScheduler(**LATENT_SCHEDULE), add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _evaluating(components: dict) -> dict:
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return components


def _unet(**conditioning) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=2,
        **conditioning,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )


def clip_config() -> CLIPTextConfig:
    """Of a text encoder for the tokenizer that knows letters alone."""
    return CLIPTextConfig(
        vocab_size=len(TOKENS),
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _tokenizer() -> CLIPTokenizer:
    """One token a letter."""
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[], model_max_length=16)
