"""One tiny pipeline for each pair of a pipeline with a scheduler, and with a network, that the package knows."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DModel,
)
from tiny_discrete import build as tiny_discrete
from tiny_pipelines import tiny_sdxl, tiny_stable_diffusion

import diffusers_ext as ext

GUIDED = {"class_labels": [1, 2], "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
BOOST = {"gamma": 2.0, "skip_steps": 1}
TEXT = {"prompt": ["a cat", "a dog"], "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
SHORT = {"num_inference_steps": 2, "output_type": "np"}
TOKENS = {"batch_size": 2, "num_inference_steps": 3}


@dataclass
class Case:
    """build: the pipeline, with the same weights each time. call: draws from it, as JSON."""

    build: Callable[[], DiffusionPipeline]
    call: dict = field(default_factory=dict)

    def sample(self) -> np.ndarray:
        pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        output = pipe(**self.call, generator=torch.Generator().manual_seed(7))
        return np.asarray(output.tokens if hasattr(output, "tokens") else output.images)


def unet(cls=UNet2DModel, channels: int = 3, out_channels: int = 3, classes: int | None = 4, seed: int = 0, **own):
    torch.manual_seed(seed)
    network = cls(
        sample_size=8, in_channels=channels, out_channels=out_channels, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4, num_class_embeds=classes, **own,
    ).eval()  # fmt: skip
    network.conv_out.weight.data *= 0.3  # samples well within [-1, 1], where clipping hides no difference
    return network


def adm(**options):
    return unet(ext.ADMUNet2DModel, timestep_dim=8, attn_norm_num_groups=4, **options)


def edm2_unet(label_dim: int = 4, channels: int = 3, seed: int = 0) -> ext.EDM2UNet2DModel:
    torch.manual_seed(seed)
    network = ext.EDM2UNet2DModel(
        img_resolution=8, img_channels=channels, label_dim=label_dim, model_channels=8, channel_mult=(1, 2),
        num_blocks=1, attn_resolutions=(4,), channels_per_head=8,
    )  # fmt: skip
    for name, parameter in network.named_parameters():
        if name.endswith("gain"):
            parameter.data.fill_(0.1 if name == "out_conv.gain" else 0.5)
    return network.eval()


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, layers_per_block=1,
    ).eval()  # fmt: skip


def boost(network, scheduler, **options) -> ext.BoostAndSkipPipeline:
    return ext.BoostAndSkipPipeline(network, scheduler(prediction_type="sample", **options), null_class=3)


def flow(scheduler, base: DiffusionPipeline) -> ext.FlowPostprocessingPipeline:
    return ext.FlowPostprocessingPipeline(unet(classes=None, seed=1), scheduler(), base=base)


def flow_over_latents() -> ext.FlowPostprocessingPipeline:
    base = tiny_stable_diffusion()
    network = unet(channels=4, out_channels=4, classes=None, seed=1)
    return ext.FlowPostprocessingPipeline(
        network, FlowMatchEulerDiscreteScheduler(), vae=base.vae, base=base, space="latent"
    )


def sdxl(boosted: bool) -> ext.StableDiffusionXLGuidanceIntervalPipeline:
    pipe = tiny_sdxl()
    components = {**pipe.components}
    if boosted:
        components["scheduler"] = ext.boost_and_skip(pipe.scheduler, **BOOST)
    return ext.StableDiffusionXLGuidanceIntervalPipeline(**components, add_watermarker=False)


def dit(scheduler) -> ext.DiTGuidanceIntervalPipeline:
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "num_embeds_ada_norm": 1000}
    transformer = DiTTransformer2DModel(sample_size=8, out_channels=8, **sizes).eval()
    return ext.DiTGuidanceIntervalPipeline(transformer, vae(), scheduler)


def stable_diffusion() -> DiffusionPipeline:
    """A pipeline of diffusers with a scheduler of ours."""
    pipe = tiny_stable_diffusion()
    pipe.scheduler = ext.boost_and_skip(pipe.scheduler, **BOOST)
    return pipe


def cases(image: str) -> dict[str, Case]:
    """image: path of an npz with two small images and their labels, for pipelines that take images."""
    upsample = {"image": image, "class_labels": [1, 2], "num_inference_steps": 3, "output_type": "np"}
    six = {"channels": 6, "classes": 5}
    interval = {"guidance_interval": (0.05, 4.0)}
    return {
        "boost-stock": Case(lambda: boost(unet(), DDPMScheduler), {**GUIDED, **BOOST}),
        "boost-ddpm": Case(lambda: boost(adm(), ext.BoostAndSkipDDPMScheduler, **BOOST), GUIDED),
        "boost-ddim": Case(lambda: boost(unet(), ext.BoostAndSkipDDIMScheduler, **BOOST), GUIDED),
        "boost-euler": Case(lambda: boost(unet(), ext.BoostAndSkipEulerDiscreteScheduler, **BOOST), GUIDED),
        "boost-dpm": Case(lambda: boost(unet(), ext.BoostAndSkipDPMSolverMultistepScheduler, **BOOST), GUIDED),
        "upsampler-ddpm": Case(
            lambda: ext.ADMUpsamplerPipeline(unet(**six), DDPMScheduler(prediction_type="sample")), upsample
        ),
        "upsampler-ddim": Case(
            lambda: ext.ADMUpsamplerPipeline(adm(**six), DDIMScheduler(prediction_type="sample")), upsample
        ),
        "edm2-guided": Case(
            lambda: ext.EDM2Pipeline(
                edm2_unet(), ext.EDMHeunScheduler(sigma_min=0.05, sigma_max=1.0, S_churn=0.5),
                guidance_unet=edm2_unet(0, seed=1),
            ),
            {**GUIDED, "guided_steps": (1, 2)},
        ),
        "edm2-latent": Case(
            lambda: ext.EDM2Pipeline(
                edm2_unet(channels=4), ext.EDMHeunScheduler(sigma_min=0.05, sigma_max=1.0), vae=vae(),
                latent_scale=(0.5,) * 4, latent_bias=(0.0,) * 4,
            ),
            {**SHORT, "class_labels": [1, 2]},
        ),
        "discrete-text": Case(lambda: tiny_discrete("text"), TOKENS),
        "discrete-sequence": Case(lambda: tiny_discrete("sequence"), TOKENS),
        "discrete-image": Case(lambda: tiny_discrete("image"), TOKENS),
        "flow-euler": Case(
            lambda: flow(FlowMatchEulerDiscreteScheduler, boost(unet(), DDPMScheduler)),
            {**SHORT, "base_kwargs": {"class_labels": [1, 2], "num_inference_steps": 2, **BOOST}},
        ),
        "flow-heun": Case(
            lambda: flow(
                FlowMatchHeunDiscreteScheduler,
                DDPMPipeline(unet(classes=None), DDPMScheduler(prediction_type="sample")),
            ),
            {**SHORT, "base_kwargs": {"batch_size": 2, "num_inference_steps": 2}},
        ),
        "flow-latent": Case(
            flow_over_latents, {**SHORT, "base_kwargs": {"prompt": "a cat", "num_inference_steps": 2}}
        ),
        "sdxl-euler": Case(lambda: sdxl(boosted=False), {**TEXT, **interval}),
        "sdxl-boost": Case(lambda: sdxl(boosted=True), {**TEXT, **interval}),
        "dit-ddim": Case(lambda: dit(DDIMScheduler(clip_sample=False)), {**GUIDED, **interval}),
        "dit-boost": Case(
            lambda: dit(ext.BoostAndSkipDDIMScheduler(clip_sample=False, **BOOST)), {**GUIDED, "guided_steps": (1, 1)}
        ),
        "stock-boost": Case(stable_diffusion, TEXT),
    }  # fmt: skip
