"""Two calls of the network, and pipelines that guide in some of their steps."""

import math

import torch

from .base import STEPS, WEIGHT, Stranger
from .one_batch import PlusOne, Scaled


class TwoCalls(Stranger):
    layout = "cond; uncond"

    def predict(self, x, t, text, negative):
        cond = self.unet(x, t, text)
        if self.w > 1:
            uncond = self.unet(x, t, negative)
            cond = uncond + self.w * (cond - uncond)
        return cond


class UncondCallFirst(Stranger):
    layout = None

    def predict(self, x, t, text, negative):
        uncond = self.unet(x, t, negative)
        cond = self.unet(x, t, text)
        return uncond + self.w * (cond - uncond)


class MisnamedCalls(Stranger):
    layout = None

    def predict(self, x, t, text, negative):
        cond = self.unet(x, t, negative)
        uncond = self.unet(x, t, text)
        return cond + self.w * (uncond - cond)


class CallsOfOtherSamples(Stranger):
    """The unconditional prediction at another sample."""

    layout = None

    def predict(self, x, t, text, negative):
        cond = self.unet(x, t, text)
        uncond = self.unet(0.5 * x, t, negative)
        return uncond + self.w * (cond - uncond)

    def oracle(pipe, guided, **given):
        return torch.full_like(given["latents"], math.inf)  # nothing is right but a refusal


class LoopOfParts(Stranger):
    """Both calls are one statement in a loop."""

    layout = "cond; uncond"

    def predict(self, x, t, text, negative):
        parts = []
        for embeds in (text, negative):
            parts.append(self.unet(x, t, embeds))
        return parts[1] + self.w * (parts[0] - parts[1])


class Comprehension(Stranger):
    layout = None

    def predict(self, x, t, text, negative):
        uncond, cond = [self.unet(x, t, embeds) for embeds in (negative, text)]
        return uncond + self.w * (cond - uncond)


class SampleBySample(Stranger):
    """Each sample has a doubled batch of its own."""

    def predict(self, x, t, text, negative):
        rows = []
        for i in range(len(x)):
            noise = self.unet(x[[i, i]], t, torch.stack([negative[i], text[i]]))
            uncond, cond = noise.chunk(2)
            rows.append(uncond + self.w * (cond - uncond))
        return torch.cat(rows)


# --- when it guides


class SkipsTheChunk(Stranger):
    """Without guidance the loop goes on before it splits."""

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished, cfg = False, guidance_scale > 1
        text = torch.cat([negative_prompt_embeds, prompt_embeds]) if cfg else prompt_embeds
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(torch.cat([latents] * 2) if cfg else latents, t, text)
            if not cfg:
                latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
                continue
            noise_uncond, noise_text = noise.chunk(2)
            noise = noise_uncond + guidance_scale * (noise_text - noise_uncond)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)


class FlagAfterTheCall(Stranger):
    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        cfg = False
        for t in self.scheduler.timesteps:
            text = torch.cat([negative_prompt_embeds, prompt_embeds]) if guidance_scale > 1 else prompt_embeds
            noise = self.unet(torch.cat([latents] * 2) if guidance_scale > 1 else latents, t, text)
            cfg = guidance_scale > 1
            if cfg:
                uncond, cond = noise.chunk(2)
                noise = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)


class ScaledWhenOff(Stranger):
    """Scales what it predicts, with guidance and without."""

    def predict(self, x, t, text, negative):
        if self.w == 1:
            return 0.9 * self.unet(x, t, text)
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return 0.9 * (uncond + self.w * (cond - uncond))

    combine, alone = staticmethod(Scaled.combine), staticmethod(Scaled.alone)


class GuidesLater(Stranger):
    """Without guidance in its own first steps."""

    def predict(self, x, t, text, negative):
        if self.i < 2:
            return self.unet(x, t, text)
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return uncond + self.w * (cond - uncond)

    @staticmethod
    def combine(c, u, w, i):
        return c if i < 2 else u + w * (c - u)


class StopsGuiding(GuidesLater):
    def predict(self, x, t, text, negative):
        if self.i >= 2:
            return self.unet(x, t, text)
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return uncond + self.w * (cond - uncond)

    @staticmethod
    def combine(c, u, w, i):
        return c if i >= 2 else u + w * (c - u)


class OtherName(Stranger):
    """A scale that is not called one, in a formula 1 + w."""

    @torch.no_grad()
    def __call__(self, latents, prompt_embeds, negative_prompt_embeds, w=WEIGHT, num_inference_steps=STEPS):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            noise = cond + w * (cond - uncond)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)

    combine = staticmethod(PlusOne.combine)
