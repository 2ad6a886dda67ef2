"""Guidance in an interval in subclasses that are in no list: understood, or refused with the reason."""

from contextlib import nullcontext

import diffusers
import pytest
import torch
from guided_runs import MIDDLE, assert_same, sample, shared_stable_diffusion
from tiny_guided_pipelines import STEPS

from diffusers_ext.pipelines.guidance_interval import (
    GuidanceInterval,
    apply_guidance_interval,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:the guidance interval:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class _Custom(diffusers.StableDiffusionPipeline):
    """A pipeline that nobody listed; each subclass guides in its own way."""

    @torch.no_grad()
    def __call__(self, guidance_scale=4.0, generator=None, return_dict=True):
        self.guidance_scale_ = guidance_scale
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        text = self.encode_prompt(["a cat", "a dog"], "cpu", 1, True, ["bad", "dark"])
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.predict(latents, t, *text), t, latents).prev_sample
        return (latents,)


class _Helpers(_Custom):
    """Network and split in methods, the conditional half first."""

    def predict(self, latents, t, text, negative):
        both = self.network(torch.cat([latents] * 2), t, torch.cat([text, negative]))
        return self.combine(both, self.guidance_scale_)

    def network(self, sample, t, text):
        return self.unet(sample, t, encoder_hidden_states=text).sample

    def combine(self, both, weight):
        predicted, predicted_null = both.chunk(2)
        return predicted_null + weight * (predicted - predicted_null)


class _TwoCalls(_Custom):
    def predict(self, latents, t, text, negative):
        cond = self.unet(latents, t, text).sample
        if self.guidance_scale_ > 1:
            cond = self.mixed(cond, self.unet(latents, t, negative, return_dict=False)[0])
        return cond

    def mixed(self, cond, other):
        return other + self.guidance_scale_ * (cond - other)


class _UnconditionalFirst(_Custom):
    def predict(self, latents, t, text, negative):
        negative = self.unet(latents, t, negative).sample
        text = self.unet(latents, t, text).sample
        return negative + self.guidance_scale_ * (text - negative)


class _Anonymous(_Custom):
    def predict(self, latents, t, text, negative):
        a, b = self.unet(torch.cat([latents] * 2), t, torch.cat([negative, text])).sample.chunk(2)
        return a + self.guidance_scale_ * (b - a)


class _Reassigned(_Custom):
    """Guides by what is known only after the network was called."""

    def predict(self, latents, t, text, negative):
        noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative, text])).sample
        large = noise.abs().max() > 0
        if large:
            noise_uncond, noise_text = noise.chunk(2)
            noise = noise_uncond + self.guidance_scale_ * (noise_text - noise_uncond)
        return noise


class _Again(_Custom):
    """Self-attention guidance."""

    def predict(self, latents, t, text, negative):
        noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative, text])).sample
        noise_uncond, noise_text = noise.chunk(2)
        degraded = self.unet(latents - noise_uncond, t, encoder_hidden_states=negative).sample
        degraded_uncond = self.unet(latents - noise_uncond, t, negative).sample
        return noise_uncond + self.guidance_scale_ * (noise_text - noise_uncond) + degraded - degraded_uncond


class _Halves(_Custom):
    """Conditional and unconditional predictions from batches of their own."""

    def predict(self, latents, t, text, negative):
        _, noise_text = self.unet(torch.cat([latents] * 2), t, torch.cat([negative, text])).sample.chunk(2)
        noise_uncond, _ = self.unet(torch.cat([latents] * 2), t, torch.cat([negative, text])).sample.chunk(2)
        return noise_uncond + self.guidance_scale_ * (noise_text - noise_uncond)


class _Gradient(_Custom):
    def predict(self, latents, t, text, negative):
        with torch.enable_grad():
            both = torch.cat([latents] * 2).requires_grad_()
            noise = self.unet(both, t, torch.cat([negative, text])).sample
            noise_uncond, noise_text = noise.chunk(2)
            (slope,) = torch.autograd.grad(noise_text.square().sum(), both)
        noise_uncond, noise_text = noise_uncond.detach(), noise_text.detach() - slope.chunk(2)[0]
        return noise_uncond + self.guidance_scale_ * (noise_text - noise_uncond)


class _Cached(_Custom):
    """Hands its network what it keeps of all rows."""

    def predict(self, latents, t, text, negative):
        noise = self.unet(torch.cat([latents] * 2), t, text_cache={"keys": torch.cat([negative, text])})
        noise_uncond, noise_text = noise.chunk(2)
        return noise_uncond + self.guidance_scale_ * (noise_text - noise_uncond)


class _Reads(torch.nn.Module):
    def forward(self, sample, timestep, text_cache):
        return sample * text_cache["keys"].mean(dim=(1, 2), keepdim=True)[..., None]


class _TupleOfOutputs(_Custom):
    """UniDiffuser's outputs of a call, all without the condition."""

    def predict(self, latents, t, text, negative):
        noise, size = self.measured(latents, t, text)
        if self.guidance_scale_ > 1:
            noise_uncond, size_uncond = self.measured(latents, t, negative)
            noise = noise_uncond + self.guidance_scale_ * (noise - noise_uncond) * size / size_uncond
        return noise

    def measured(self, latents, t, text):
        noise = self.unet(latents, t, text).sample
        return noise, noise.square().mean()


def custom(cls):
    pipe = cls(**shared_stable_diffusion().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestUnlistedPipelines:
    @pytest.mark.parametrize("cls", [_Helpers, _TwoCalls, _TupleOfOutputs, _Reassigned])
    def test_understood(self, cls):
        pipe = custom(cls)
        plain, off = sample(pipe, {}), sample(pipe, {"guidance_scale": 1.0})
        with GuidanceInterval(pipe, sigma_lo=0):
            assert torch.equal(sample(pipe, {}), plain)
        with GuidanceInterval(pipe, sigma_lo=100) as interval:
            assert_same(sample(pipe, {}), off)
        # to prove the layout, all rows are run in the first step, and of a batch the fewer ones besides
        first = 6 if cls in (_Helpers, _Reassigned) else 4
        assert [step.rows for step in interval.report.steps] == [first, 2, 2, 2]
        with GuidanceInterval(pipe, guided_steps=MIDDLE) as interval:
            sample(pipe, {})
        assert [step.rows for step in interval.report.steps] == [first, 4, 4, 2]

    @pytest.mark.parametrize(
        ("cls", "message"),
        [
            (_UnconditionalFirst, "calls the network without the condition before it calls it with"),
            (_Anonymous, r"in unclear parts: .\(?a, b\)? = self.unet\("),
            (_Again, "calls the network once more without the condition: .degraded = self.unet"),
            (_Halves, r"splits a prediction in unclear parts: .\(?_, noise_text"),
        ],
    )
    def test_refused(self, cls, message):
        """Before it is called, and with what to do."""
        pipe = custom(cls)
        with pytest.raises(ValueError, match=message) as error:
            apply_guidance_interval(pipe, guided_steps=MIDDLE)
        assert 'layout="uncond, cond"' in str(error.value)
        assert type(pipe) is cls

    @pytest.mark.parametrize(
        ("cls", "message"),
        [
            (_Gradient, "takes the gradient of a batch of 2 parts"),
            (_Cached, r"keeps .'keys'. of all rows from call to call"),
        ],
    )
    def test_refused_in_the_first_step(self, cls, message):
        pipe = custom(cls)
        pipe.unet = _Reads() if cls is _Cached else pipe.unet
        with GuidanceInterval(pipe, guided_steps=MIDDLE) as interval, pytest.raises(ValueError, match=message):
            sample(pipe, {})
        assert len(interval.report.steps) == 1
        assert "_compiled_call_impl" not in vars(pipe.unet)

    def test_what_a_row_is_must_be_clear(self):
        """An unknown argument as long as the batch: compared with all rows once, refused if it makes a difference."""

        class Conditioned(torch.nn.Module):
            def __init__(self, depends):
                super().__init__()
                self.depends = depends

            def forward(self, sample, timestep, table, text):
                condition = text.mean(dim=(1, 2)).view(-1, 1, 1, 1)
                return sample * condition + (table[0, : len(sample)].view(-1, 1, 1, 1) if self.depends else 0.0)

        for depends in (False, True):

            class Pipeline(_Custom):
                def predict(self, latents, t, text, negative):
                    noise = self.unet(
                        torch.cat([latents] * 2), t, torch.arange(12.0).view(3, 4), torch.cat([negative, text])
                    )
                    noise_uncond, noise_text = noise.chunk(2)
                    return noise_uncond + self.guidance_scale_ * (noise_text - noise_uncond)

            pipe = custom(Pipeline)
            pipe.unet = Conditioned(depends)
            refused = pytest.raises(
                ValueError, match="gives its conditional rows another prediction without the others"
            )
            with GuidanceInterval(pipe, guided_steps=(1, 1)) as interval, refused if depends else nullcontext():
                sample(pipe, {})
            if not depends:
                assert [step.rows for step in interval.report.steps] == [6, 4, 2, 2]  # the first tried out
