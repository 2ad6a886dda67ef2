"""What is kept of a prediction from step to step, or used besides the combination."""

import copy

import torch

from .base import STEPS, WEIGHT, Stranger
from .one_batch import Plain


class PlusPlus(Stranger):
    """CFG++ (arXiv 2406.08070): the new noise is the unconditional prediction."""

    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            mixed = uncond + guidance_scale * (cond - uncond)
            latents = plus_plus(self.scheduler, self.scheduler.step(mixed, t, latents), uncond, i)
        self.finished = True
        return (latents,)

    def oracle(pipe, guided, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, **_):
        scheduler, net = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.unet)
        scheduler.set_timesteps(STEPS)
        for i, t in enumerate(scheduler.timesteps):
            c, u = net(latents, t, prompt_embeds), net(latents, t, negative_prompt_embeds)
            u = u if i in guided else c
            step = scheduler.step(u + guidance_scale * (c - u), t, latents)
            latents = plus_plus(scheduler, step, u, i)
        return latents


def plus_plus(scheduler, step, uncond, i):
    times = [*scheduler.timesteps.tolist(), None]
    alpha = scheduler.final_alpha_cumprod if times[i + 1] is None else scheduler.alphas_cumprod[times[i + 1]]
    return alpha.sqrt() * step.pred_original_sample + (1 - alpha).sqrt() * uncond


class PlusPlusHidden(PlusPlus):
    """The same with the unconditional prediction handed on in a list."""

    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished, kept = False, []
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            kept.append(uncond)
            mixed = uncond + guidance_scale * (cond - uncond)
            step = self.scheduler.step(mixed, t, latents)
            latents = plus_plus(self.scheduler, step, kept[-1], i)
        self.finished = True
        return (latents,)


class PlusPlusSetattr(PlusPlus):
    """The same with an attribute that a function sets."""

    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            setattr(self, "_last", uncond)  # noqa: B010
            mixed = uncond + guidance_scale * (cond - uncond)
            step = self.scheduler.step(mixed, t, latents)
            latents = plus_plus(self.scheduler, step, self._last, i)
        self.finished = True
        return (latents,)


class PlusPlusHelper(PlusPlus):
    """The same with all of it in a method, which is handed the prediction and keeps it."""

    def mix(self, noise, w):
        uncond, cond = noise.chunk(2)
        self.last = uncond
        return uncond + w * (cond - uncond)

    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            step = self.scheduler.step(self.mix(noise, guidance_scale), t, latents)
            latents = plus_plus(self.scheduler, step, self.last, i)
        self.finished = True
        return (latents,)


class PlusPlusBuffer(PlusPlus):
    """The same with a buffer that is written to."""

    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished, buffer = False, torch.zeros_like(latents)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            torch.add(uncond, 0, out=buffer)
            mixed = uncond + guidance_scale * (cond - uncond)
            step = self.scheduler.step(mixed, t, latents)
            latents = plus_plus(self.scheduler, step, buffer, i)
        self.finished = True
        return (latents,)


class Momentum(Stranger):
    """The difference has a running average, in an object of its own, that starts anew with the call."""

    def predict(self, x, t, text, negative):
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        if self.i == 0:
            self.average = Average()
        self.average.update(cond - uncond)
        return cond + (self.w - 1) * self.average.value

    def oracle(pipe, guided, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, **_):
        scheduler, net, average = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.unet), Average()
        scheduler.set_timesteps(STEPS)
        for i, t in enumerate(scheduler.timesteps):
            c, u = net(latents, t, prompt_embeds), net(latents, t, negative_prompt_embeds)
            average.update(c - u if i in guided else torch.zeros_like(c))
            noise = c + (guidance_scale - 1) * average.value if i in guided else c
            latents = scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents


class MomentumLocal(Momentum):
    """The same in a variable of the loop."""

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished, average = False, 0.0
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            average = cond - uncond + 0.5 * average
            noise = cond + (guidance_scale - 1) * average
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)


class ListOfRows(Plain):
    """Its combination is made row by row in a list."""

    def predict(self, x, t, text, negative):
        noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        rows = []
        for i in range(len(x)):
            rows.append(noise_uncond[i] + self.w * (noise_text[i] - noise_uncond[i]))
        return torch.stack(rows)


class SmoothedElsewhere(Stranger):
    """The unconditional prediction passes a function that keeps it, which the pipeline's source does not show."""

    def predict(self, x, t, text, negative):
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        if self.i == 0:
            self.smooth = Smooth()
        uncond = self.smooth(uncond)
        return uncond + self.w * (cond - uncond)

    def oracle(pipe, guided, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, **_):
        scheduler, net, smooth = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.unet), Smooth()
        scheduler.set_timesteps(STEPS)
        for i, t in enumerate(scheduler.timesteps):
            noise = net(latents, t, prompt_embeds)
            if i in guided:
                u = smooth(net(latents, t, negative_prompt_embeds))
                noise = u + guidance_scale * (noise - u)
            latents = scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents


class Smooth:
    value = None

    def __call__(self, uncond):
        self.value = uncond if self.value is None else 0.5 * (uncond + self.value)
        return self.value


class Average:
    value = 0.0

    def update(self, difference):
        self.value = difference + 0.5 * self.value


class ReusedUncond(Stranger):
    """The unconditional prediction is made in every second step only."""

    layout = "cond; uncond"

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            cond = self.unet(latents, t, prompt_embeds)
            if i % 2 == 0:
                uncond = self.unet(latents, t, negative_prompt_embeds)
            mixed = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(mixed, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)

    def oracle(pipe, guided, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, **_):
        scheduler, net = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.unet)
        scheduler.set_timesteps(STEPS)
        with torch.no_grad():
            for i, t in enumerate(scheduler.timesteps):
                c = net(latents, t, prompt_embeds)
                if i % 2 == 0:
                    u = net(latents, t, negative_prompt_embeds)
                noise = u + guidance_scale * (c - u) if i in guided else c
                latents = scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents


class ReusedDifference(ReusedUncond):
    """The batch is doubled in every second step only; the difference is used in the next."""

    layout = "uncond, cond"

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            if i % 2 == 0:
                noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
                uncond, cond = noise.chunk(2)
                difference = cond - uncond
            else:
                cond = self.unet(latents, t, prompt_embeds)
            mixed = cond + (guidance_scale - 1) * difference
            latents = self.scheduler.step(mixed, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)

    def oracle(pipe, guided, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, **_):
        scheduler, net = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.unet)
        scheduler.set_timesteps(STEPS)
        with torch.no_grad():
            for i, t in enumerate(scheduler.timesteps):
                c = net(latents, t, prompt_embeds)
                if i % 2 == 0:
                    d = c - net(latents, t, negative_prompt_embeds)
                noise = c + (guidance_scale - 1) * d if i in guided else c
                latents = scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents
