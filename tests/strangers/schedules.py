"""Schedules that are walked in other ways, or by other means than `scheduler.step`."""

import copy
import math

import torch

from .base import STEPS, WEIGHT, Stranger, oracle


class NoStep(Stranger):
    """Writes the scheduler's step itself (DDIM)."""

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            noise = uncond + guidance_scale * (cond - uncond)
            latents = ddim(self.scheduler, noise, t, latents, i)
        self.finished = True
        return (latents,)


def ddim(scheduler, noise, t, latents, i):
    alpha = scheduler.alphas_cumprod[t]
    start = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    times = [*scheduler.timesteps.tolist(), None]
    after = scheduler.final_alpha_cumprod if times[i + 1] is None else scheduler.alphas_cumprod[times[i + 1]]
    return after.sqrt() * start + (1 - after).sqrt() * noise


class NoStepOtherName(NoStep):
    """The same with a scale that is not called one."""

    @torch.no_grad()
    def __call__(self, latents, prompt_embeds, negative_prompt_embeds, w=WEIGHT, num_inference_steps=STEPS):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            noise = uncond + w * (cond - uncond)
            latents = ddim(self.scheduler, noise, t, latents, i)
        self.finished = True
        return (latents,)


class NoStepCalls(NoStep):
    layout = "cond; uncond"

    @torch.no_grad()
    def __call__(self, latents, prompt_embeds, negative_prompt_embeds, w=WEIGHT, num_inference_steps=STEPS):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            cond = self.unet(latents, t, prompt_embeds)
            uncond = self.unet(latents, t, negative_prompt_embeds)
            noise = uncond + w * (cond - uncond)
            latents = ddim(self.scheduler, noise, t, latents, i)
        self.finished = True
        return (latents,)


class StepOfClass(Stranger):
    """Steps by the function of the scheduler's class."""

    @torch.no_grad()
    def __call__(self, latents, prompt_embeds, negative_prompt_embeds, w=WEIGHT, num_inference_steps=STEPS):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            noise = uncond + w * (cond - uncond)
            latents = type(self.scheduler).step(self.scheduler, noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)


class OwnScheduler(Stranger):
    """Makes a scheduler of its own for each call."""

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        for t in scheduler.timesteps:
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            noise = uncond + guidance_scale * (cond - uncond)
            latents = scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)


class CopiedScheduler(Stranger):
    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps)
        for t in scheduler.timesteps:
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            noise = uncond + guidance_scale * (cond - uncond)
            latents = scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)


class BothSchedulers(OwnScheduler):
    """Sets the timesteps of its scheduler, and steps another."""

    @torch.no_grad()
    def __call__(self, latents, prompt_embeds, negative_prompt_embeds, w=WEIGHT, num_inference_steps=STEPS):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        other = type(self.scheduler).from_config(self.scheduler.config)
        other.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            noise = uncond + w * (cond - uncond)
            latents = other.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)


class StepTwice(Stranger):
    """Asks the scheduler for the clean sample before it steps."""

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            noise = uncond + guidance_scale * (cond - uncond)
            self.preview = self.scheduler.step(noise, t, latents).pred_original_sample
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)


class Resampling(Stranger):
    """Each of the last steps is made twice, with noise between."""

    again = 3

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            for _ in range(1 + (i >= self.again)):
                noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
                uncond, cond = noise.chunk(2)
                noise = uncond + guidance_scale * (cond - uncond)
                latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)

    def oracle(pipe, guided, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, **_):
        scheduler, net = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.unet)
        scheduler.set_timesteps(STEPS)
        with torch.no_grad():
            for i, t in enumerate(scheduler.timesteps):
                for _ in range(1 + (i >= pipe.again)):
                    c, u = net(latents, t, prompt_embeds), net(latents, t, negative_prompt_embeds)
                    latents = scheduler.step(u + guidance_scale * (c - u) if i in guided else c, t, latents)[0]
        return latents


class ResamplingLast(Resampling):
    again = 4


class HandHeun(Stranger):
    """A corrector with a second evaluation at the next time."""

    def predict(self, x, t, text, negative):
        first = self.guided(x, t, text, negative)
        following = self.scheduler.timesteps[min(self.i + 1, STEPS - 1)]
        second = self.guided(x - 0.1 * first, following, text, negative)
        return (first + second) / 2

    def guided(self, x, t, text, negative):
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return uncond + self.w * (cond - uncond)

    def oracle(pipe, guided, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, **_):
        return torch.full_like(latents, math.inf)


class EveryOtherTime(Stranger):
    """Walks over every second timestep that it set."""

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.set_timesteps(2 * num_inference_steps)
        for t in self.scheduler.timesteps[::2]:
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            noise = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)

    def oracle(pipe, guided, **given):
        return torch.full_like(given["latents"], math.inf)


class Reversed(EveryOtherTime):
    """Walks from low noise to high."""

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for t in reversed(self.scheduler.timesteps):
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            noise = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)


class NeverSet(Stranger):
    """Walks a schedule of its own; the scheduler's timesteps are not set."""

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.num_inference_steps = num_inference_steps
        for t in torch.linspace(801, 1, num_inference_steps).long():
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            noise = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)

    def oracle(pipe, guided, **given):
        return torch.full_like(given["latents"], math.inf)


class TimesAsNumbers(Stranger):
    """Its timesteps are numbers, of a list."""

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps.tolist():
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            noise = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)


class TwoPasses(Stranger):
    """Two loops in a call, with the timesteps set anew."""

    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        for _ in range(2):
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
                uncond, cond = noise.chunk(2)
                noise = uncond + guidance_scale * (cond - uncond)
                latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)

    def oracle(pipe, guided, latents, **given):
        for _ in range(2):
            latents = oracle(pipe, guided, latents, **given)
        return latents


class Hires(TwoPasses):
    """The second at twice the resolution."""

    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        for size in (4, 8):
            latents = latents.repeat_interleave(size // 4, -1)
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
                uncond, cond = noise.chunk(2)
                noise = uncond + guidance_scale * (cond - uncond)
                latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)

    def oracle(pipe, guided, latents, **given):
        for size in (4, 8):
            latents = oracle(pipe, guided, latents.repeat_interleave(size // 4, -1), **given)
        return latents


class Strength(Stranger):
    """Begins in the middle of its schedule."""

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.finished = False
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps[1:]:
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            uncond, cond = noise.chunk(2)
            noise = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)

    def oracle(pipe, guided, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, **_):
        scheduler, net = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.unet)
        scheduler.set_timesteps(STEPS)
        with torch.no_grad():
            for i, t in list(enumerate(scheduler.timesteps))[1:]:
                c, u = net(latents, t, prompt_embeds), net(latents, t, negative_prompt_embeds)
                latents = scheduler.step(u + guidance_scale * (c - u) if i in guided else c, t, latents)[0]
        return latents
