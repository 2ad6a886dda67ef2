"""Modular pipelines of diffusers that have a guider, with random weights and a few thousand parameters, for tests.

They are the blocks between text encoder and VAE: prompts are random embeddings, outputs are latents. `MODULAR_CASES`
holds a builder for each; it returns a `ModularCase`, or skips the test where diffusers has no such blocks. Flux is not
among them: its modular blocks have no guider.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import diffusers
import pytest
import torch
from tiny_guided_pipelines import BATCH, CASES, STEPS, TOKENS, _fill, embeds, flow, masks, prompts


class ModularCase(NamedTuple):
    """A modular pipeline and a call of it.

    options: keyword arguments of a call of STEPS steps. output: what to ask for. runs: denoising loops in one call.
    rows: prompts. classic: name in `CASES` of the pipeline with the same networks, if there is one, and the guidance
    scale that is 4 here.
    """

    pipe: diffusers.ModularPipeline
    options: dict
    output: str = "latents"
    runs: int = 1
    rows: int = BATCH
    classic: tuple[str, float] | None = None

    @property
    def guiders(self) -> dict[str, diffusers.guiders.guider_utils.BaseGuidance]:
        return {name: part for name, part in self.pipe.components.items() if name in GUIDERS}

    @property
    def networks(self) -> list[torch.nn.Module]:
        return [part for name, part in self.pipe.components.items() if name in ("transformer", "transformer_2")]


GUIDERS = ("guider", "guider_2", "audio_guider")
MODULAR_CASES: dict[str, Callable[[], ModularCase]] = {}


def case(build: Callable[[], ModularCase]) -> Callable[[], ModularCase]:
    """Register a builder, whose weights are then the same at every call, under its name."""

    def seeded() -> ModularCase:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build()

    MODULAR_CASES[build.__name__] = seeded
    return seeded


def modular(module: str, name: str, **components) -> diffusers.ModularPipeline:
    """The pipeline of a block of diffusers.modular_pipelines, with these components."""
    try:
        blocks = getattr(importlib.import_module(f"diffusers.modular_pipelines.{module}"), name)()
    except (ImportError, AttributeError):
        missing(name)
    pipe = blocks.init_pipeline()
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            _fill(component)
    expected = {part.name for part in blocks.expected_components}
    pipe.update_components(**{name: part for name, part in components.items() if name in expected})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def model(name: str, **config) -> torch.nn.Module:
    return getattr(diffusers, name)(**config) if hasattr(diffusers, name) else missing(name)


def missing(name: str):
    pytest.skip(f"diffusers {diffusers.__version__} has no {name}")


def options(**changes) -> dict:
    return {"num_inference_steps": STEPS, "height": 64, "width": 64, **changes}


def like(classic: str, module: str, name: str, scale: float = 4.0, **changes) -> ModularCase:
    """Blocks for the networks, the schedule and the prompts of a classic pipeline."""
    built = CASES[classic]()
    pipe = modular(module, name, **{key: part for key, part in built.pipe.components.items() if part is not None})
    known = {part.name for part in pipe.blocks.inputs}
    given = {key: value for key, value in built.options.items() if key in known}
    return ModularCase(pipe, {**given, **changes}, classic=(classic, scale))


@case
def stable_diffusion_3() -> ModularCase:
    module = "stable_diffusion_3.modular_blocks_stable_diffusion_3"
    return like("stable_diffusion_3", module, "StableDiffusion3T2ICoreDenoiseStep")


@case
def wan() -> ModularCase:
    return like("wan", "wan.modular_blocks_wan", "WanCoreDenoiseStep", latents=embeds(4, 2, 4, 4))


@case
def wan_2_2() -> ModularCase:
    built = like("wan_2_2", "wan.modular_blocks_wan22", "Wan22CoreDenoiseStep", latents=embeds(4, 2, 4, 4))
    built.pipe.update_components(boundary_ratio=0.7)
    return built


@case
def qwen_image() -> ModularCase:
    return like("qwen_image", "qwenimage.modular_blocks_qwenimage", "QwenImageCoreDenoiseStep")


@case
def z_image() -> ModularCase:
    """Its classic pipeline adds the weight to the conditional prediction, and so is 1 lower.

    Sigmas are given, because those that the blocks choose are others before diffusers 0.41.
    """
    sigmas = [1 - step / STEPS for step in range(STEPS)]
    return like("z_image", "z_image.modular_blocks_z_image", "ZImageCoreDenoiseStep", scale=3.0, sigmas=sigmas)


@case
def ltx_video() -> ModularCase:
    return like("ltx_video", "ltx.modular_blocks_ltx", "LTXCoreDenoiseStep")


@case
def flux_2_klein() -> ModularCase:
    transformer = model(
        "Flux2Transformer2DModel", in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )  # fmt: skip
    module = "flux2.modular_blocks_flux2_klein_base"
    pipe = modular(module, "Flux2KleinBaseCoreDenoiseStep", transformer=transformer, scheduler=flow())
    return ModularCase(pipe, options(**prompts(8)))


@case
def flux_3() -> ModularCase:
    transformer = model(
        "Flux3Transformer2DModel", in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8, timestep_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    module, scheduler = "flux3.modular_blocks_flux3", flow(shift=6.93)
    pipe = modular(module, "Flux3CoreDenoiseStep", transformer=transformer, scheduler=scheduler)
    return ModularCase(pipe, options(**prompts(8)))


@case
def krea_2() -> ModularCase:
    transformer = model(
        "Krea2Transformer2DModel", in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=16, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(0, 4, 4),
    )  # fmt: skip
    pipe = modular("krea2.modular_blocks_krea2", "Krea2CoreDenoiseStep", transformer=transformer, scheduler=flow())
    given = {"prompt_embeds": embeds(TOKENS, 2, 16), "negative_prompt_embeds": embeds(TOKENS, 2, 16)}
    return ModularCase(pipe, options(**given, **masks(torch.bool, "prompt_embeds_mask")))


@case
def ernie_image() -> ModularCase:
    transformer = model(
        "ErnieImageTransformer2DModel", hidden_size=16, num_attention_heads=2, num_layers=1, ffn_hidden_size=16,
        in_channels=16, out_channels=16, text_in_dim=8, rope_axes_dim=(4, 2, 2),
    )  # fmt: skip
    module = "ernie_image.modular_blocks_ernie_image"
    pipe = modular(module, "ErnieImageCoreDenoiseStep", transformer=transformer, scheduler=flow())
    return ModularCase(pipe, options(**{name: list(value) for name, value in prompts(8).items()}))


@case
def anima() -> ModularCase:
    transformer = model(
        "CosmosTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=1,
        text_embed_dim=8,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        extra_pos_embed_type=None,
        concat_padding_mask=False,  # for which diffusers wants torchvision
    )
    conditioner = model(
        "AnimaTextConditioner", source_dim=8, target_dim=8, model_dim=8, num_layers=1, num_attention_heads=2,
        mlp_ratio=1, target_vocab_size=32, min_sequence_length=8,
    )  # fmt: skip
    components = {"transformer": transformer, "text_conditioner": conditioner, "scheduler": flow()}
    pipe = modular("anima.modular_blocks_anima", "AnimaCoreDenoiseStep", **components)
    if not hasattr(pipe, "vae_scale_factor"):
        pytest.skip(f"Anima of diffusers {diffusers.__version__} does not run without a VAE")
    given = {}
    for sign in ("", "negative_"):
        given[f"{sign}qwen_prompt_embeds"] = embeds(TOKENS, 8)
        given[f"{sign}qwen_attention_mask"] = torch.ones(BATCH, TOKENS)
        given[f"{sign}t5_input_ids"] = torch.randint(0, 32, (BATCH, TOKENS))
        given[f"{sign}t5_attention_mask"] = torch.ones(BATCH, TOKENS)
    return ModularCase(pipe, options(**given))


@case
def hunyuan_video_1_5() -> ModularCase:
    transformer = model(
        "HunyuanVideo15Transformer3DModel",
        in_channels=65,  # twice the latent's, which the blocks fix, and a mask
        out_channels=32,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(2, 4, 2),
        task_type="t2v",
    )
    module = "hunyuan_video1_5.modular_blocks_hunyuan_video1_5"
    pipe = modular(module, "HunyuanVideo15CoreDenoiseStep", transformer=transformer, scheduler=flow())
    given = {**prompts(8), **masks(name="prompt_embeds_mask")}
    given |= {f"{name}_2": value for name, value in given.items()}
    return ModularCase(pipe, options(**given, num_frames=5, batch_size=BATCH))


@case
def qwen_image_2_1() -> ModularCase:
    """It keeps what it computed from each prompt from step to step."""
    transformer = model(
        "QwenImage21Transformer2DModel", in_channels=16, out_channels=16, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, context_in_dim=8, axes_dims_rope=(0, 4, 4),
    )  # fmt: skip
    module = "qwenimage21.modular_blocks_qwenimage21"
    pipe = modular(module, "QwenImage21CoreDenoiseStep", transformer=transformer, scheduler=flow())
    no_image = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    given = {**prompts(8), **masks(name="prompt_embeds_mask")}
    return ModularCase(pipe, options(**given, image_pad_mask=no_image, negative_image_pad_mask=no_image))


def _helios() -> torch.nn.Module:
    return model(
        "HeliosTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=8, ffn_dim=8, num_layers=1, rope_dim=(4, 4, 4),
    )  # fmt: skip


@case
def helios() -> ModularCase:
    """Chunks of the video, one after the other."""
    scheduler = model("HeliosScheduler", stages=1, stage_range=[0, 1])
    pipe = modular("helios.modular_blocks_helios", "HeliosCoreDenoiseStep", transformer=_helios(), scheduler=scheduler)
    return ModularCase(pipe, options(**prompts(8), num_frames=9, num_latent_frames_per_chunk=2), runs=2)


def helios_pyramid() -> ModularCase:
    """Three stages of growing size, whose scheduler counts its sigmas anew in each: no case like the others."""
    module, scheduler = "helios.modular_blocks_helios_pyramid", model("HeliosScheduler", gamma=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = modular(module, "HeliosPyramidCoreDenoiseStep", transformer=_helios(), scheduler=scheduler)
        given = {**prompts(8), "height": 64, "width": 64, "num_frames": 9}
    return ModularCase(pipe, {**given, "pyramid_num_inference_steps_list": [STEPS] * 3}, runs=3)


@case
def ltx_2() -> ModularCase:
    """Video and sound, each with a guider of four passes."""
    if not hasattr(diffusers, "LTX2Guidance"):
        missing("LTX2Guidance")
    transformer = model(
        "LTX2VideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=1, caption_channels=16,
        perturbed_attn=True,
    )  # fmt: skip
    vae = model(
        "AutoencoderKLLTX2Audio", base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2,
        mel_bins=8,
    )  # fmt: skip
    module, components = "ltx2.modular_blocks_ltx2", {"transformer": transformer, "audio_vae": vae}
    pipe = modular(module, "LTX2CoreDenoiseStep", **components, scheduler=flow())
    weights = {"stg_scale": 1.0, "modality_scale": 3.0, "spatio_temporal_guidance_blocks": [0]}
    pipe.update_components(
        guider=diffusers.LTX2Guidance(guidance_scale=3.0, **weights),
        audio_guider=diffusers.LTX2Guidance(guidance_scale=7.0, **weights),
    )
    given = {}
    for sign in ("", "negative_"):
        given[f"{sign}connector_prompt_embeds"] = embeds(TOKENS, 16)
        given[f"{sign}connector_audio_prompt_embeds"] = embeds(TOKENS, 16)
        given[f"{sign}connector_attention_mask"] = torch.ones(BATCH, TOKENS)
    return ModularCase(pipe, options(**given, num_frames=9, batch_size=BATCH, dtype=torch.float32))


@case
def minimax_music_3() -> ModularCase:
    """Windows of the song, one after the other."""
    transformer = model(
        "MiniMaxMusic3Transformer1DModel", in_channels=4, condition_dim=8, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, ff_inner_dim=8, rotary_dim=4, fourier_embedding_dim=8,
    )  # fmt: skip
    encoder = model("MiniMaxMusic3ConditionEncoder", condition_hidden_dim=8, num_condition_layers=2, out_dim=8)
    module = "minimax_music3.modular_blocks_minimax_music3"
    components = {"transformer": transformer, "condition_encoder": encoder, "scheduler": flow()}
    pipe = modular(module, "MiniMaxMusic3CoreDenoiseStep", **components)
    given = {"frame_hiddens": torch.randn(1, 201, 16), "num_inference_steps": STEPS}
    return ModularCase(pipe, given, output="latent_chunks", runs=2, rows=1)
