"""Classifier guidance: off equals the network; with Gaussians and the exact classifier, the analytic guided score."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from diffusers_ext import BoostAndSkipDDIMScheduler, BoostAndSkipPipeline, ClassifierGuidance, NoiseAwareClassifier
from diffusers_ext.models.classifier_guidance import classifier_gradient

TYPES = ("epsilon", "v_prediction", "sample")
MEANS, STD = torch.tensor([-0.6, 0.5, 0.1], dtype=torch.float64), 0.3
ALPHAS = torch.cumprod(1 - DDPMScheduler().betas.double(), dim=0)


def log_densities(x, timestep):
    """log N(x_t; sqrt(abar) mu_c, abar std^2 + 1 - abar), independent in every pixel: (batch, classes)."""
    abar = ALPHAS[timestep.long()].view(-1, 1, 1, 1, 1)
    variance = abar * STD**2 + 1 - abar
    pixels = -((x[:, None] - abar.sqrt() * MEANS.view(1, -1, 1, 1, 1)) ** 2) / (2 * variance)
    return pixels.flatten(2).sum(-1)


def score(x, timestep, labels=None, scale=0.0):
    """grad log p(x_t) + scale grad log p(c | x_t), by hand: log p(c | x) = log p(x | c) - log sum_c p(x | c)."""
    abar = ALPHAS[timestep.long()].view(-1, 1, 1, 1)
    variance = abar * STD**2 + 1 - abar
    of_class = torch.stack([-(x - abar.sqrt() * mean) / variance for mean in MEANS], dim=1)
    posterior = log_densities(x, timestep).softmax(dim=1)
    mixture = (posterior.view(*posterior.shape, 1, 1, 1) * of_class).sum(1)
    if labels is None:
        return mixture
    return mixture + scale * (of_class[torch.arange(len(x)), labels] - mixture)


def prediction(x, timestep, score, kind):
    """Epsilon, v or x_0 of a score (Tweedie)."""
    abar = ALPHAS[timestep.long()].view(-1, 1, 1, 1)
    epsilon = -(1 - abar).sqrt() * score
    x0 = (x - (1 - abar).sqrt() * epsilon) / abar.sqrt()
    v = abar.sqrt() * epsilon - (1 - abar).sqrt() * x0
    return {"epsilon": epsilon, "v_prediction": v, "sample": x0}[kind]


class Exact(ModelMixin, ConfigMixin):
    """The ideal network of the mixture, or, with conditional, of one class."""

    @register_to_config
    def __init__(self, kind="epsilon", conditional=False, in_channels=1, sample_size=2):
        super().__init__()
        self.register_to_config(num_class_embeds=3 if conditional else None)
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, sample, timestep, class_labels=None):
        timestep = torch.as_tensor(timestep).expand(len(sample))
        exact = score(sample.double(), timestep, class_labels, 1.0)
        return UNet2DOutput(sample=prediction(sample.double(), timestep, exact, self.config.kind).to(sample.dtype))


class ExactClassifier(nn.Module):
    forward = staticmethod(log_densities)


def guided(kind="epsilon", scale=1.0):
    return ClassifierGuidance(
        Exact(kind), ExactClassifier(), DDPMScheduler(prediction_type=kind), scale, num_classes=3
    )


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_guided_score_is_the_analytic_one(kind, scale):
    x, labels = torch.randn(6, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    timestep = torch.tensor([0, 40, 200, 500, 800, 950])
    expected = prediction(x, timestep, score(x, timestep, labels, scale), kind)
    result = guided(kind, scale)(x, timestep, class_labels=labels).sample
    torch.testing.assert_close(result, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", TYPES)
def test_sampling_with_scale_one_is_conditional_sampling(kind):
    scheduler = BoostAndSkipDDIMScheduler(prediction_type=kind, clip_sample=False)
    noise, labels = torch.randn(4, 1, 2, 2, dtype=torch.float64), [0, 1, 2, 1]
    images = []
    for unet in (Exact(kind, conditional=True), guided(kind)):
        pipe = BoostAndSkipPipeline(unet.double(), scheduler)
        pipe.set_progress_bar_config(disable=True)
        options = {"latents": noise, "num_inference_steps": 20, "output_type": "latent"}
        images.append(pipe(class_labels=labels, **options).images)
    torch.testing.assert_close(images[1], images[0], atol=1e-6, rtol=0)
    assert (images[0].mean((1, 2, 3)) - MEANS[labels]).abs().max() < 0.4


def tiny_unet(classes=None, out_channels=1) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=out_channels, layers_per_block=1, block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2, num_class_embeds=classes,
    ).eval()  # fmt: skip


def run(unet, **options):
    pipe = BoostAndSkipPipeline(unet, DDPMScheduler(), null_class=options.pop("null_class", None))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**options, num_inference_steps=4, output_type="pt", generator=generator).images


@pytest.mark.parametrize("hidden", [(), (16, 16)], ids=["linear", "nonlinear"])
def test_off_is_the_network(hidden):
    classifier = NoiseAwareClassifier(64, 3, hidden)
    wrapped = ClassifierGuidance(tiny_unet(4), classifier, DDPMScheduler(), 0)
    expected = run(tiny_unet(4), class_labels=[1, 2], null_class=3)
    assert torch.equal(run(wrapped, class_labels=[1, 2], null_class=3), expected)
    wrapped.guidance_scale = 50.0
    assert not torch.equal(run(wrapped, class_labels=[1, 2], null_class=3), expected)


def test_it_guides_in_inference_mode_too():
    classifier = NoiseAwareClassifier(64, 3, (16,))
    wrapped = ClassifierGuidance(tiny_unet(4), classifier, DDPMScheduler(), 5.0)
    expected = run(wrapped, class_labels=[1, 2], null_class=3)
    with torch.inference_mode():
        assert torch.equal(run(wrapped, class_labels=[1, 2], null_class=3), expected)


def test_the_null_class_is_not_guided():
    classifier = NoiseAwareClassifier(64, 3, (16,))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([10, 500, 900])
    gradient = classifier_gradient(classifier, x, t, torch.tensor([1, 3, 2]))
    assert (gradient[1] == 0).all() and (gradient[0] != 0).any() and (gradient[2] != 0).any()
    guided = run(
        ClassifierGuidance(tiny_unet(4), classifier, DDPMScheduler(), 5.0),
        class_labels=[1, 2], null_class=3, guidance_scale=2.0,
    )  # fmt: skip
    assert torch.isfinite(guided).all()


@pytest.mark.parametrize("kind", TYPES)
def test_pure_noise_stays_finite(kind):
    scheduler = DDIMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
    wrapped = ClassifierGuidance(tiny_unet(), NoiseAwareClassifier(64, 3), scheduler, 2.0, num_classes=3)
    assert torch.isfinite(wrapped(torch.randn(2, 1, 8, 8), 999, torch.tensor([0, 1])).sample).all()


def test_learned_variance_and_labels_are_left_alone():
    unet, classifier = tiny_unet(3, out_channels=2), NoiseAwareClassifier(64, 3)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([10, 500]), torch.tensor([0, 2])
    plain = unet(x, t, class_labels=labels).sample
    output = ClassifierGuidance(unet, classifier, DDPMScheduler(), 2.0)(x, t, labels, return_dict=False)[0]
    assert torch.equal(output[:, 1:], plain[:, 1:]) and not torch.equal(output[:, :1], plain[:, :1])


def test_reduced_precision():
    wrapped = ClassifierGuidance(tiny_unet(), NoiseAwareClassifier(64, 3, (8,)), DDPMScheduler(), 2.0, num_classes=3)
    exact = run(wrapped, class_labels=[0, 1])
    rough = run(wrapped.to(torch.bfloat16), class_labels=[0, 1])
    assert rough.dtype == torch.bfloat16 and torch.isfinite(rough).all() and exact.shape == rough.shape


def test_classifier_sees_the_timestep_and_saves(tmp_path):
    classifier = NoiseAwareClassifier(4, 3, (8,))
    x = torch.randn(2, 1, 2, 2)
    assert not torch.equal(classifier(x, torch.tensor([1, 1])).logits, classifier(x, torch.tensor([1, 900])).logits)
    classifier.save_pretrained(tmp_path)
    again = NoiseAwareClassifier.from_pretrained(tmp_path)
    torch.testing.assert_close(again(x, torch.tensor(5)).logits, classifier(x, torch.tensor(5)).logits)
    with pytest.raises(ValueError, match="sample must hold 4 numbers each"):
        classifier(torch.randn(2, 5), torch.tensor(5))


def test_bad_input(tmp_path):
    unet, classifier = tiny_unet(), NoiseAwareClassifier(64, 3)
    with pytest.raises(ValueError, match="alphas_cumprod"):
        ClassifierGuidance(unet, classifier, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
        ClassifierGuidance(unet, classifier, DDIMScheduler(), float("nan"))
    with pytest.raises(ValueError, match="for an unconditional network"):
        ClassifierGuidance(tiny_unet(3), classifier, DDIMScheduler(), num_classes=3)
    wrapped = ClassifierGuidance(unet, classifier, DDIMScheduler(), num_classes=3)
    with pytest.raises(ValueError, match="class_labels must be given"):
        wrapped(torch.randn(1, 1, 8, 8), 3)
    with pytest.raises(ValueError, match=r"save its \.unet"):
        BoostAndSkipPipeline(wrapped, DDPMScheduler()).save_pretrained(tmp_path)
