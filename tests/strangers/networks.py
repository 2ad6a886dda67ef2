"""Several networks, networks that are called in a roundabout way, and such whose rows know of each other."""

import copy
import functools

import torch
from diffusers import DiffusionPipeline

from .base import STEPS, WEIGHT, Net, Stranger


class Experts(Stranger):
    """Two networks, one for high noise."""

    _optional_components = ("unet_2",)

    def __init__(self, unet, scheduler, unet_2=None):
        DiffusionPipeline.__init__(self)
        self.register_modules(unet=unet, scheduler=scheduler, unet_2=unet_2 or Net(0.5))

    def predict(self, x, t, text, negative):
        unet = self.unet if t > 500 else self.unet_2
        uncond, cond = unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return uncond + self.w * (cond - uncond)

    def oracle(pipe, guided, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, **_):
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(STEPS)
        with torch.no_grad():
            for i, t in enumerate(scheduler.timesteps):
                net = copy.deepcopy(pipe.unet if t > 500 else pipe.unet_2)
                c, u = net(latents, t, prompt_embeds), net(latents, t, negative_prompt_embeds)
                latents = scheduler.step(pipe.combine(c, u, guidance_scale, i) if i in guided else c, t, latents)[0]
        return latents


class ExpertsIf(Experts):
    def predict(self, x, t, text, negative):
        if t > 500:
            noise = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text]))
        else:
            noise = self.unet_2(torch.cat([x] * 2), t, torch.cat([negative, text]))
        uncond, cond = noise.chunk(2)
        return uncond + self.w * (cond - uncond)


class ExpertsMisnamed(Experts):
    """The second network has the parts in the other order than their names say."""

    layout = None

    def predict(self, x, t, text, negative):
        if t > 500:
            uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
            return uncond + self.w * (cond - uncond)
        uncond, cond = self.unet_2(torch.cat([x] * 2), t, torch.cat([text, negative])).chunk(2)
        return cond + self.w * (uncond - cond)


class SwapsParts(Stranger):
    """The parts change places in the course of the steps."""

    layout = None

    def predict(self, x, t, text, negative):
        texts = [negative, text] if self.i < 2 else [text, negative]
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat(texts)).chunk(2)
        return uncond + self.w * (cond - uncond) if self.i < 2 else cond + self.w * (uncond - cond)


class ByForward(Stranger):
    """The network's forward is called past its __call__."""

    def predict(self, x, t, text, negative):
        uncond, cond = self.unet.forward(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return uncond + self.w * (cond - uncond)


class ByGetattr(Stranger):
    def predict(self, x, t, text, negative):
        uncond, cond = getattr(self, "unet")(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)  # noqa: B009
        return uncond + self.w * (cond - uncond)


class ByPartial(Stranger):
    def predict(self, x, t, text, negative):
        network = functools.partial(self.unet, encoder_hidden_states=torch.cat([negative, text]))
        uncond, cond = network(torch.cat([x] * 2), t).chunk(2)
        return uncond + self.w * (cond - uncond)


class ByClosure(Stranger):
    def predict(self, x, t, text, negative):
        def model(x, t):
            uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
            return uncond + self.w * (cond - uncond)

        return model(x, t)


class CoupledNet(Net):
    """Rows attend to the other half."""

    def predict(self, sample, timestep, text):
        out = super().predict(sample, timestep, text)
        return out + 0.3 * out.roll(len(out) // 2, 0)


class MeanNet(Net):
    def predict(self, sample, timestep, text):
        out = super().predict(sample, timestep, text)
        return out - 0.3 * out.mean(0, keepdim=True)


class WithinHalves(Net):
    """StyleAligned: rows attend to the first of their own half."""

    def predict(self, sample, timestep, text):
        out = super().predict(sample, timestep, text)
        halves = 2 if len(out) % 2 == 0 else 1
        out = out.unflatten(0, (halves, -1))
        return (out + 0.3 * out[:, :1]).flatten(0, 1)


class NumberedNet(Net):
    """Another prediction by the number of the row."""

    def predict(self, sample, timestep, text):
        return super().predict(sample, timestep, text) + 0.1 * torch.arange(len(sample)).view(-1, 1, 1, 1)
