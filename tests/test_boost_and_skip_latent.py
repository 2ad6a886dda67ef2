"""Boost-and-Skip in latent text-to-image pipelines, against loops written out by hand."""

import math

import pytest
import torch
from boost_and_skip_loops import PAIRS, ancestral_loop, both, coefficients, ddim_loop, dpm_loop, euler_loop, gaussians
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DModel,
)
from tiny_pipelines import LATENT_SCHEDULE, tiny_sdxl, tiny_stable_diffusion

from diffusers_ext.schedulers.scheduling_boost_and_skip import (
    BoostAndSkipDDIMScheduler,
    boost_and_skip,
)

LATENTS = (1, 4, 8, 8)


def embeddings(width, names=("prompt_embeds", "negative_prompt_embeds")):
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(1, 6, width, generator=generator) for name in names}


def guided(unet, text, scale, **conditions):
    """Classifier-free guidance as one network of (latents, t)."""

    def model(x, t):
        negative, positive = unet(torch.cat([x, x]), t, encoder_hidden_states=text, **conditions).sample.chunk(2)
        return negative + scale * (positive - negative)

    return model


def latent_loop(name, model, gamma, skip, steps, seed):
    """The sampler written out on SD's schedule: boosted noise at the first kept step, no cut tables involved."""
    noise = gaussians(seed, torch.float32, LATENTS)
    eps = noise()
    alphas = coefficients({k: v for k, v in LATENT_SCHEDULE.items() if k.startswith("beta")})
    if name in ("ddpm", "ddim"):
        table = [1 + i * (1000 // steps) for i in reversed(range(steps))][skip:]
        if name == "ddim":
            return ddim_loop(model, gamma * eps, table, alphas, last=alphas[0], clip=math.inf)
        return ancestral_loop(model, gamma * eps, table, alphas, "fixed_small", noise, clip=math.inf)
    stock = PAIRS[name][0](**LATENT_SCHEDULE)
    stock.set_timesteps(steps)
    timesteps, sigmas = stock.timesteps[skip:], stock.sigmas[skip:].tolist()
    if name == "euler":
        return euler_loop(model, gamma * math.sqrt(1 + sigmas[0] ** 2) * eps, timesteps, sigmas)
    return dpm_loop(model, gamma * eps, timesteps, sigmas)


@pytest.fixture(scope="module")
def stable_diffusion():
    return tiny_stable_diffusion()


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


@both
@pytest.mark.parametrize(("gamma", "skip"), [(1.0, 0), (2.5, 3)])
@torch.no_grad()
def test_stable_diffusion_equals_the_loop_written_out(stable_diffusion, name, gamma, skip):
    pipe, texts = stable_diffusion, embeddings(8)
    pipe.scheduler = boost_and_skip(PAIRS[name][0].from_config(pipe.scheduler.config), gamma=gamma, skip_steps=skip)
    latents = pipe(
        **texts,
        num_inference_steps=8,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(9),
        output_type="latent",
    ).images
    model = guided(pipe.unet, torch.cat([texts["negative_prompt_embeds"], texts["prompt_embeds"]]), 3.0)
    expected = latent_loop(name, model, gamma, skip, 8, seed=9)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["euler", "dpm"])
@torch.no_grad()
def test_sdxl_equals_the_loop_written_out(sdxl, name):
    """SDXL calls set_begin_index(0) before its loop."""
    pipe, texts = sdxl, embeddings(16)
    pooled = {f"{k}pooled_prompt_embeds": torch.full((1, 8), v) for k, v in [("", 0.5), ("negative_", -0.5)]}
    pipe.scheduler = boost_and_skip(PAIRS[name][0].from_config(pipe.scheduler.config), gamma=2.5, skip_steps=3)
    calls = []
    for _ in range(2):  # the second call meets a used scheduler
        latents = pipe(
            **texts,
            **pooled,
            num_inference_steps=8,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(9),
            output_type="latent",
        ).images
        calls.append(latents)
    assert torch.equal(*calls)
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)
    pooled = torch.cat([pooled["negative_pooled_prompt_embeds"], pooled["pooled_prompt_embeds"]])
    model = guided(
        pipe.unet,
        torch.cat([texts["negative_prompt_embeds"], texts["prompt_embeds"]]),
        3.0,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
    )
    expected = latent_loop(name, model, 2.5, 3, 8, seed=9)
    torch.testing.assert_close(calls[0], expected, atol=1e-4, rtol=1e-4)


def test_pipelines_run_from_prompt_to_image_and_take_custom_timesteps(stable_diffusion, sdxl):
    options = {"prompt": "a cat", "negative_prompt": "dog", "output_type": "np", "num_inference_steps": 4}
    for pipe, width in ((stable_diffusion, 16), (sdxl, 16)):
        pipe.scheduler = boost_and_skip(EulerDiscreteScheduler(**LATENT_SCHEDULE), gamma=2.0, skip_steps=1)
        assert pipe(**options).images.shape == (1, width, width, 3)
    stable_diffusion.scheduler = boost_and_skip(
        DDIMScheduler(**LATENT_SCHEDULE, clip_sample=False), gamma=2.0, skip_steps=1
    )
    del options["num_inference_steps"]
    seen = []
    stable_diffusion(
        **options, timesteps=[900, 500, 100], callback_on_step_end=lambda _, i, t, kw: seen.append(int(t)) or kw
    )
    assert seen == [900, 500, 100]


def test_pipeline_saves_and_loads_with_the_scheduler(stable_diffusion, tmp_path):
    stable_diffusion.scheduler = boost_and_skip(
        DDIMScheduler(**LATENT_SCHEDULE, clip_sample=False), gamma=2.0, skip_steps=1
    )
    stable_diffusion.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is BoostAndSkipDDIMScheduler
    assert (loaded.scheduler.config.gamma, loaded.scheduler.config.skip_steps) == (2.0, 1)


def test_unconditional_pipeline_skips():
    """DDIMPipeline ignores init_noise_sigma, and replaces a scheduler given to its constructor by a stock one."""
    unet = UNet2DModel(
        sample_size=4,
        block_out_channels=(4,),
        norm_num_groups=2,
        layers_per_block=1,
        add_attention=False,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = boost_and_skip(pipe.scheduler, gamma=4.0, skip_steps=3)
    count = []
    unet.register_forward_hook(lambda *_: count.append(1))
    pipe(num_inference_steps=5)
    assert len(count) == 2
