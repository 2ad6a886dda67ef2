"""One batch, written in many ways."""

import math

import torch

from .base import STEPS, WEIGHT, Stranger


class Plain(Stranger):
    def predict(self, x, t, text, negative):
        noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return noise_uncond + self.w * (noise_text - noise_uncond)


class NamedTexts(Plain):
    """Hands its helper texts that have their names."""

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.w, self.finished = guidance_scale, False
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.predict(latents, t, prompt_embeds, negative_prompt_embeds)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)


class CondFirst(Stranger):
    layout = "cond, uncond"

    def predict(self, x, t, text, negative):
        cond, uncond = self.unet(torch.cat([x] * 2), t, torch.cat([text, negative])).chunk(2)
        return uncond + self.w * (cond - uncond)


class Misnamed(Stranger):
    """The names say the contrary of the order."""

    def predict(self, x, t, text, negative):
        noise_text, noise_uncond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return noise_text + self.w * (noise_uncond - noise_text)


class Anonymous(Stranger):
    def predict(self, x, t, text, negative):
        a, b = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return a + self.w * (b - a)


def _cfg(noise, w):
    uncond, text = noise.chunk(2)
    return uncond + w * (text - uncond)


class ModuleHelper(Stranger):
    def predict(self, x, t, text, negative):
        return _cfg(self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])), self.w)


class Mixer:
    def __call__(self, noise, w):
        return _cfg(noise, w)

    def mix(self, noise, w):
        return _cfg(noise, w)


class ObjectHelper(Stranger):
    def predict(self, x, t, text, negative):
        return Mixer().mix(self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])), self.w)


class Lambda(Stranger):
    def predict(self, x, t, text, negative):
        guide = lambda noise: noise[: len(x)] + self.w * (noise[len(x) :] - noise[: len(x)])  # noqa: E731
        return guide(self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])))


class Lerp(Stranger):
    def predict(self, x, t, text, negative):
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return torch.lerp(uncond, cond, self.w)


class Addcmul(Stranger):
    def predict(self, x, t, text, negative):
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return torch.addcmul(uncond, cond - uncond, torch.tensor(self.w))


class InPlace(Stranger):
    def predict(self, x, t, text, negative):
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        uncond += self.w * cond.sub_(uncond)
        return uncond


class Unbind(Stranger):
    def predict(self, x, t, text, negative):
        noise = self.unet(torch.stack([x, x]).flatten(0, 1), t, torch.cat([negative, text]))
        uncond, cond = noise.unflatten(0, (2, -1)).unbind(0)
        return uncond + self.w * (cond - uncond)


class UnbindTurns(Stranger):
    """Rows that take turns, split by unbind(1)."""

    layout = "uncond | cond"

    def predict(self, x, t, text, negative):
        noise = self.unet(x.repeat_interleave(2, 0), t, torch.stack([negative, text], 1).flatten(0, 1))
        uncond, cond = noise.unflatten(0, (-1, 2)).unbind(1)
        return uncond + self.w * (cond - uncond)


class Interleaved(Stranger):
    layout = "uncond | cond"

    def predict(self, x, t, text, negative):
        noise = self.unet(x.repeat_interleave(2, 0), t, torch.stack([negative, text], 1).flatten(0, 1))
        uncond, cond = noise[::2], noise[1::2]
        return uncond + self.w * (cond - uncond)


class InterleavedChunk(Stranger):
    """Rows that take turns, in a batch that is chunked in two after it was sorted."""

    layout = "uncond | cond"

    def predict(self, x, t, text, negative):
        noise = self.unet(x.repeat_interleave(2, 0), t, torch.stack([negative, text], 1).flatten(0, 1))
        order = torch.arange(len(noise)).view(-1, 2).T.flatten()
        noise = noise[order]
        uncond, cond = noise.chunk(2)
        return uncond + self.w * (cond - uncond)


class InterleavedFlip(Stranger):
    """As above, with the whole batch flipped before it is chunked."""

    layout = "cond, uncond"

    def predict(self, x, t, text, negative):
        noise = self.unet(torch.cat([x] * 2), t, torch.cat([text, negative])).flip(0)
        uncond, cond = noise.chunk(2)
        return uncond.flip(0) + self.w * (cond.flip(0) - uncond.flip(0))


class Slices(Stranger):
    def predict(self, x, t, text, negative):
        noise = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text]))
        uncond = noise[: len(x)]
        cond = noise[len(x) :]
        return uncond + self.w * (cond - uncond)


class NegativeSlices(Stranger):
    def predict(self, x, t, text, negative):
        noise = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text]))
        cond = noise[-len(x) :]
        uncond = noise[: -len(x)]
        return uncond + self.w * (cond - uncond)


class Reshape(Stranger):
    def predict(self, x, t, text, negative):
        noise = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).reshape(2, *x.shape)
        return noise[0] + self.w * (noise[1] - noise[0])


class WeightsOfParts(Stranger):
    """The combination as a product with a vector."""

    def predict(self, x, t, text, negative):
        noise = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).reshape(2, *x.shape)
        return torch.einsum("p,pbchw->bchw", torch.tensor([1 - self.w, self.w]), noise)


class Einops(Stranger):
    def predict(self, x, t, text, negative):
        noise = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text]))
        uncond, cond = rearrange(noise, 2)
        return uncond + self.w * (cond - uncond)


def rearrange(x, p):
    return x.view(p, -1, *x.shape[1:])


class Channels(Stranger):
    """Both predictions in the channels of one row."""

    def predict(self, x, t, text, negative):
        noise = torch.cat([self.unet(x, t, negative), self.unet(x, t, text)], dim=1)
        uncond, cond = noise.chunk(2, dim=1)
        return uncond + self.w * (cond - uncond)


class EarlierChunk(Stranger):
    """A batch whose second half is not used, and whose first has both parts."""

    layout = None

    def predict(self, x, t, text, negative):
        noise = self.unet(torch.cat([x] * 4), t, torch.cat([negative, text, text, negative]))
        p, _ = noise.chunk(2)
        uncond, cond = p.chunk(2)
        return uncond + self.w * (cond - uncond)


class EarlierSlice(Stranger):
    layout = None

    def predict(self, x, t, text, negative):
        noise = self.unet(torch.cat([x] * 4), t, torch.cat([text, negative, negative, text]))[2 * len(x) :]
        uncond, cond = noise.chunk(2)
        return uncond + self.w * (cond - uncond)


class OneUnconditionalRow(Stranger):
    """One unconditional row for all prompts."""

    layout = None

    def predict(self, x, t, text, negative):
        noise = self.unet(torch.cat([x[:1], x]), t, torch.cat([negative[:1], text]))
        uncond, cond = noise[:1], noise[1:]
        return uncond + self.w * (cond - uncond)

    @staticmethod
    def combine(c, u, w, i):
        return u[:1] + w * (c - u[:1])


class UnequalSplit(OneUnconditionalRow):
    def predict(self, x, t, text, negative):
        noise = self.unet(torch.cat([x[:1], x]), t, torch.cat([negative[:1], text]))
        uncond, cond = noise.split([1, len(x)])
        return uncond + self.w * (cond - uncond)


class Starred(OneUnconditionalRow):
    def predict(self, x, t, text, negative):
        noise = self.unet(torch.cat([x[:1], x]), t, torch.cat([negative[:1], text]))
        uncond, *cond = noise.chunk(len(noise))
        return uncond + self.w * (torch.cat(cond) - uncond)


class Negated(Stranger):
    def predict(self, x, t, text, negative):
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return -(uncond + self.w * (cond - uncond))

    @staticmethod
    def combine(c, u, w, i):
        return -(u + w * (c - u))


Negated.alone = staticmethod(lambda c: -c)


class PlusOne(Stranger):
    def predict(self, x, t, text, negative):
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return cond + self.w * (cond - uncond)

    @staticmethod
    def combine(c, u, w, i):
        return c + w * (c - u)


class Scaled(Stranger):
    """Its predictions are scaled before they reach the scheduler, so they are not affine combinations."""

    def predict(self, x, t, text, negative):
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return 0.9 * (uncond + self.w * (cond - uncond))

    @staticmethod
    def combine(c, u, w, i):
        return 0.9 * (u + w * (c - u))


Scaled.alone = staticmethod(lambda c: 0.9 * c)


class Rescaled(Stranger):
    """Lin et al.'s rescaling."""

    def predict(self, x, t, text, negative):
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return self.combine(cond, uncond, self.w, 0)

    @staticmethod
    def combine(c, u, w, i):
        m = u + w * (c - u)
        dims = (1, 2, 3)
        return 0.7 * m * c.std(dims, keepdim=True) / m.std(dims, keepdim=True) + 0.3 * m


class Cosine(Stranger):
    """A weight for each step, which is 1 in the first."""

    def predict(self, x, t, text, negative):
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return uncond + self.weight_at(self.w, self.i) * (cond - uncond)

    @staticmethod
    def weight_at(w, i):
        return 1 + (w - 1) * (1 - math.cos(math.pi * i / 4)) / 2

    @classmethod
    def combine(cls, c, u, w, i):
        return u + cls.weight_at(w, i) * (c - u)


class LateNegative(Cosine):
    """A weight below 1 in the first step, and above in the others."""

    @staticmethod
    def weight_at(w, i):
        return -0.5 if i == 0 else w


class LateSmall(Cosine):
    @staticmethod
    def weight_at(w, i):
        return 0.5 if i == 0 else w


class WeightPerSample(Stranger):
    factors = (1.0, 2.0, 0.25)  # of the weight: 4, 8, 1

    def predict(self, x, t, text, negative):
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return self.combine(cond, uncond, self.w, 0)

    @classmethod
    def combine(cls, c, u, w, i):
        return u + w * torch.tensor(cls.factors[: len(c)]).view(-1, 1, 1, 1) * (c - u)


class WeightPerSampleNegative(WeightPerSample):
    factors = (1.0, -1.0, 0.1)


class WeightPerChannel(Stranger):
    def predict(self, x, t, text, negative):
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return self.combine(cond, uncond, self.w, 0)

    @staticmethod
    def combine(c, u, w, i):
        return u + w * torch.tensor([1.0, 1.2, 0.9, 1.1]).view(1, -1, 1, 1) * (c - u)
