"""Small pipelines that nobody listed; each guides in a way of its own, and knows what an interval should make of it.

`oracle`: the steps in which a pipeline guides; in the others its weight is 1. A call with it is what an interval on
the pipeline must give, where it does not refuse.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

STEPS = 5


class Net(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, channels: int = 3, outs: int = 3):
        super().__init__()
        self.inp = torch.nn.Conv2d(channels, 8, 3, padding=1)
        self.text = torch.nn.Linear(5, 8)
        self.head = torch.nn.Conv2d(8, outs, 3, padding=1)

    def forward(self, sample, timestep, text, return_dict=False):
        t = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1, 1, 1) / 1000
        h = torch.tanh(self.inp(sample) + self.text(text).mean(1)[:, :, None, None] + t)
        return (self.head(h),)


class Base(DiffusionPipeline):
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def begin(self, batch, generator):
        self.set_progress_bar_config(disable=True)
        self.scheduler.set_timesteps(STEPS)
        g = torch.Generator().manual_seed(5)
        return (
            torch.randn(batch, 3, 6, 6, generator=generator),
            torch.randn(batch, 4, 5, generator=g),
            torch.randn(batch, 4, 5, generator=g),
        )

    oracle = None

    def w(self, i, w):
        return w if self.oracle is None or i in self.oracle else 1.0

    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        x, c, u = self.begin(batch, generator)
        for i, t in enumerate(self.scheduler.timesteps):
            x = self.scheduler.step(
                self.predict(x, t, c, u, self.w(i, guidance_scale), guidance_scale > 1), t, x
            ).prev_sample
        return x


class Plain(Base):
    def predict(self, x, t, c, u, w, on):
        if not on:
            return self.unet(x, t, c)[0]
        noise = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0]
        noise_uncond, noise_text = noise.chunk(2)
        return noise_uncond + w * (noise_text - noise_uncond)


class CondFirst(Base):
    def predict(self, x, t, c, u, w, on):
        if not on:
            return self.unet(x, t, c)[0]
        noise_text, noise_uncond = self.unet(torch.cat([x] * 2), t, torch.cat([c, u]))[0].chunk(2)
        return torch.lerp(noise_uncond, noise_text, w)


class Misnamed(Base):
    def predict(self, x, t, c, u, w, on):
        noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([c, u]))[0].chunk(2)
        return noise_text + w * (noise_uncond - noise_text)


class EarlierChunk(Base):
    def predict(self, x, t, c, u, w, on):
        out = self.unet(torch.cat([x] * 4), t, torch.cat([u, c, c, u]))[0]
        p, _ = out.chunk(2)
        noise_uncond, noise_text = p.chunk(2)
        return noise_uncond + w * (noise_text - noise_uncond)


class OneUncond(Base):
    def predict(self, x, t, c, u, w, on):
        noise = self.unet(torch.cat([x[:1], x]), t, torch.cat([u[:1], c]))[0]
        uncond, cond = noise[:1], noise[1:]
        return uncond + w * (cond - uncond)


class OneUncond2(Base):
    def predict(self, x, t, c, u, w, on):
        n = 1
        noise = self.unet(torch.cat([x[:1], x]), t, torch.cat([u[:1], c]))[0]
        uncond = noise[:n]
        cond = noise[n:]
        return uncond + w * (cond - uncond)


class Star(Base):
    def predict(self, x, t, c, u, w, on):
        noise = self.unet(torch.cat([x[:1], x]), t, torch.cat([u[:1], c]))[0]
        uncond, *cond = noise.chunk(len(noise))
        return uncond + w * (torch.cat(cond) - uncond)


class SplitSizes(Base):
    def predict(self, x, t, c, u, w, on):
        noise = self.unet(torch.cat([x[:1], x]), t, torch.cat([u[:1], c]))[0]
        uncond, cond = noise.split([1, len(x)])
        return uncond + w * (cond - uncond)


class Off(Base):
    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        x, c, u = self.begin(batch, generator)
        cfg = guidance_scale > 1
        for i, t in enumerate(self.scheduler.timesteps):
            noise = self.unet(torch.cat([x] * 2) if cfg else x, t, torch.cat([u, c]) if cfg else c)[0]
            if not cfg:
                x = self.scheduler.step(noise, t, x).prev_sample
                continue
            noise_uncond, noise_text = noise.chunk(2)
            x = self.scheduler.step(
                noise_uncond + self.w(i, guidance_scale) * (noise_text - noise_uncond), t, x
            ).prev_sample
        return x


class Windows(Base):
    """All windows with the prompt, then all without."""

    def predict(self, x, t, c, u, w, on):
        noise = [self.unet(part, t, c)[0] for part in x.chunk(2, 2)]
        noise_uncond = [self.unet(part, t, u)[0] for part in x.chunk(2, 2)]
        noise, noise_uncond = torch.cat(noise, 2), torch.cat(noise_uncond, 2)
        return noise_uncond + w * (noise - noise_uncond)


class Reference(Base):
    def predict(self, x, t, c, u, w, on):
        self.unet(x * 0.5, t, c)
        noise = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0]
        noise_uncond, noise_text = noise.chunk(2)
        return noise_uncond + w * (noise_text - noise_uncond)


class TwoCalls(Base):
    def predict(self, x, t, c, u, w, on):
        noise = self.unet(x, t, c)[0]
        if on:
            noise_uncond = self.unet(x, t, u)[0]
            noise = noise_uncond + w * (noise - noise_uncond)
        return noise


class TwoCallsOther(Base):
    """The second call has another sample."""

    def predict(self, x, t, c, u, w, on):
        noise = self.unet(x, t, c)[0]
        noise_uncond = self.unet(x * 0.9, t, u)[0]
        return noise_uncond + w * (noise - noise_uncond)


class UncondFirst(Base):
    def predict(self, x, t, c, u, w, on):
        noise_uncond = self.unet(x, t, u)[0]
        noise = self.unet(x, t, c)[0]
        return noise_uncond + w * (noise - noise_uncond)


class Reused(Base):
    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        x, c, u = self.begin(batch, generator)
        noise_uncond = None
        for i, t in enumerate(self.scheduler.timesteps):
            noise = self.unet(x, t, c)[0]
            if i % 2 == 0:
                noise_uncond = self.unet(x, t, u)[0]
            noise = noise_uncond + self.w(i, guidance_scale) * (noise - noise_uncond)
            x = self.scheduler.step(noise, t, x).prev_sample
        return x


class FlagAfter(Base):
    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        x, c, u = self.begin(batch, generator)
        cfg = True
        for i, t in enumerate(self.scheduler.timesteps):
            two = guidance_scale > 1
            noise = self.unet(torch.cat([x] * 2) if two else x, t, torch.cat([u, c]) if two else c)[0]
            cfg = guidance_scale > 1
            if cfg:
                noise_uncond, noise_text = noise.chunk(2)
                noise = noise_uncond + self.w(i, guidance_scale) * (noise_text - noise_uncond)
            x = self.scheduler.step(noise, t, x).prev_sample
        return x


class Interleaved(Base):
    def predict(self, x, t, c, u, w, on):
        noise = self.unet(x.repeat_interleave(2, 0), t, torch.stack([u, c], 1).flatten(0, 1))[0]
        noise_uncond, noise_text = noise[::2], noise[1::2]
        return noise_uncond + w * (noise_text - noise_uncond)


class InterleavedChunked(Base):
    """Named as halves but rows take turns through a view."""

    def predict(self, x, t, c, u, w, on):
        noise = self.unet(x.repeat_interleave(2, 0), t, torch.stack([u, c], 1).flatten(0, 1))[0]
        noise_uncond, noise_text = noise.unflatten(0, (-1, 2)).unbind(1)
        return noise_uncond + w * (noise_text - noise_uncond)


def combine(noise, w):
    a, b = noise.chunk(2)
    return a + w * (b - a)


class Outside(Base):
    def predict(self, x, t, c, u, w, on):
        return combine(self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0], w)


class Lambda(Base):
    def predict(self, x, t, c, u, w, on):
        mix = lambda uncond, text: uncond + w * (text - uncond)  # noqa: E731
        return mix(*self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2))


class Method(Base):
    def predict(self, x, t, c, u, w, on):
        return self.combine(self.network(torch.cat([x] * 2), t, torch.cat([u, c])), w)

    def network(self, x, t, text):
        return self.unet(x, t, text)[0]

    def combine(self, noise, w):
        uncond, text = noise.chunk(2)
        return uncond + w * (text - uncond)


class Channels(Base):
    """Chunk(2, dim=1)."""

    def predict(self, x, t, c, u, w, on):
        noise = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0]
        noise = torch.cat([noise, noise * 0.1], 1)
        noise, _ = noise.chunk(2, dim=1)
        noise_uncond, noise_text = noise.chunk(2)
        return noise_uncond + w * (noise_text - noise_uncond)


class Rescale(Base):
    def predict(self, x, t, c, u, w, on):
        noise = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0]
        noise_uncond, noise_text = noise.chunk(2)
        noise = noise_uncond + w * (noise_text - noise_uncond)
        std, out = noise_text.std((1, 2, 3), keepdim=True), noise.std((1, 2, 3), keepdim=True)
        return 0.7 * noise * std / out + 0.3 * noise


class Dynamic(Base):
    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        x, c, u = self.begin(batch, generator)
        for i, t in enumerate(self.scheduler.timesteps):
            noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
            w = self.w(i, 1 + guidance_scale * (1 - i / 5))
            x = self.scheduler.step(noise_uncond + w * (noise_text - noise_uncond), t, x).prev_sample
        return x


class LateGuidance(Base):
    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        x, c, u = self.begin(batch, generator)
        for i, t in enumerate(self.scheduler.timesteps):
            if i >= 2:
                noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
                noise = noise_uncond + self.w(i, guidance_scale) * (noise_text - noise_uncond)
            else:
                noise = self.unet(x, t, c)[0]
            x = self.scheduler.step(noise, t, x).prev_sample
        return x


class PerSample(Base):
    def predict(self, x, t, c, u, w, on):
        noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
        w = 1 + (w - 1) * torch.linspace(0.5, 1, len(x)).view(-1, 1, 1, 1)
        return noise_uncond + w * (noise_text - noise_uncond)


class OnePlus(Base):
    @torch.no_grad()
    def __call__(self, batch=2, cfg=0.8, generator=None):
        x, c, u = self.begin(batch, generator)
        for i, t in enumerate(self.scheduler.timesteps):
            noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
            x = self.scheduler.step(
                noise_text + (self.w(i, cfg + 1) - 1) * (noise_text - noise_uncond), t, x
            ).prev_sample
        return x


class VarArgs(Base):
    @torch.no_grad()
    def __call__(self, *args, **kw):
        x, c, u = self.begin(kw.get("batch", 2), kw.get("generator"))
        for i, t in enumerate(self.scheduler.timesteps):
            noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
            w = self.w(i, 4.0)
            x = self.scheduler.step(noise_uncond + w * (noise_text - noise_uncond), t, x).prev_sample
        return x


class NoSchedule(Base):
    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        x, c, u = self.begin(batch, generator)
        self.scheduler = type(self.scheduler).from_config(self.scheduler.config)
        for i, t in enumerate([999, 750, 500, 250, 10]):
            noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
            noise = noise_uncond + self.w(i, guidance_scale) * (noise_text - noise_uncond)
            x = x - 0.1 * noise
        return x


class NoSchedule2(Base):
    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        _, c, u = self.begin(batch, None)
        x = torch.randn(batch, 3, 6, 6, generator=generator)
        for i, t in enumerate([999, 750, 500, 250, 10]):
            noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
            noise = noise_uncond + self.w(i, guidance_scale) * (noise_text - noise_uncond)
            x = x - 0.1 * noise
        return x


class Inversion(Base):
    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        x, c, u = self.begin(batch, generator)
        for i, t in enumerate(reversed(self.scheduler.timesteps)):
            x = self.scheduler.step(self.predict(x, t, c, u, self.w(4 - i, guidance_scale), True), t, x).prev_sample
        return x

    predict = Plain.predict


class StepTwice(Base):
    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        x, c, u = self.begin(batch, generator)
        for i, t in enumerate(self.scheduler.timesteps):
            noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
            w = self.w(i, guidance_scale)
            noise = noise_uncond + w * (noise_text - noise_uncond)
            a = self.scheduler.step(noise, t, x).prev_sample
            b = self.scheduler.step(noise_uncond, t, x).prev_sample
            x = 0.9 * a + 0.1 * b
        return x


class CFGPP(Base):
    """Uncond goes another way: DDIM with renoising by the unconditional prediction."""

    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        x, c, u = self.begin(batch, generator)
        for i, t in enumerate(self.scheduler.timesteps):
            noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
            w = self.w(i, guidance_scale)
            noise = noise_uncond + w * (noise_text - noise_uncond)
            if w == 1.0:
                noise_uncond = noise_text
            x = self.scheduler.step(noise, t, x).prev_sample + 0.05 * (noise_uncond - noise)
        return x


class Doubled(Base):
    """The samples themselves stay doubled, like DiT's."""

    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        x, c, u = self.begin(batch, generator)
        x = torch.cat([x, x])
        for i, t in enumerate(self.scheduler.timesteps):
            noise_uncond, noise_text = self.unet(x, t, torch.cat([u, c]))[0].chunk(2)
            half = noise_uncond + self.w(i, guidance_scale) * (noise_text - noise_uncond)
            x = self.scheduler.step(torch.cat([half, half]), t, x).prev_sample
        return x.chunk(2)[0]


class Extra(Base):
    """Adds a term to the prediction."""

    def predict(self, x, t, c, u, w, on):
        noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
        return noise_uncond + w * (noise_text - noise_uncond) + 0.1 * x


class Three(Base):
    def predict(self, x, t, c, u, w, on):
        out = self.unet(torch.cat([x] * 3), t, torch.cat([c, (c + u) / 2, u]))[0]
        noise_text, noise_image, noise_uncond = out.chunk(3)
        wi = 1.0 if w == 1 else 1.5
        return noise_uncond + w * (noise_text - noise_image) + wi * (noise_image - noise_uncond)


class Threads(Base):
    def predict(self, x, t, c, u, w, on):
        with ThreadPoolExecutor(1) as pool:
            noise = pool.submit(self.unet, torch.cat([x] * 2), t, torch.cat([u, c])).result()[0]
        noise_uncond, noise_text = noise.chunk(2)
        return noise_uncond + w * (noise_text - noise_uncond)


class Forward(Base):
    def predict(self, x, t, c, u, w, on):
        noise_uncond, noise_text = self.unet.forward(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
        return noise_uncond + w * (noise_text - noise_uncond)


class GetAttr(Base):
    def predict(self, x, t, c, u, w, on):
        net = getattr(self, "un" + "et")
        noise_uncond, noise_text = net(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
        return noise_uncond + w * (noise_text - noise_uncond)


class Alias(Base):
    def predict(self, x, t, c, u, w, on):
        net = self.unet
        noise_uncond, noise_text = net(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
        return noise_uncond + w * (noise_text - noise_uncond)


class Negated(Base):
    def predict(self, x, t, c, u, w, on):
        noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
        return -(noise_uncond + w * (noise_text - noise_uncond))


class Mutates(Base):
    """Changes the prediction in place."""

    def predict(self, x, t, c, u, w, on):
        noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
        noise_text -= noise_uncond
        noise_text *= w
        noise_uncond += noise_text
        return noise_uncond


class Reversed(Base):
    """Negative prompt called cond."""

    def predict(self, x, t, c, u, w, on):
        noise_cond, noise_uncond = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
        return noise_cond + w * (noise_uncond - noise_cond)


class TwoCallsMis(Base):
    def predict(self, x, t, c, u, w, on):
        noise = self.unet(x, t, u)[0]
        noise_uncond = self.unet(x, t, c)[0]
        return noise + w * (noise_uncond - noise)


class Switch(Base):
    """Doubles in the first steps only."""

    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        x, c, u = self.begin(batch, generator)
        for i, t in enumerate(self.scheduler.timesteps):
            if i < 3:
                noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
                noise = noise_uncond + self.w(i, guidance_scale) * (noise_text - noise_uncond)
            else:
                noise = self.unet(x, t, c)[0]
            x = self.scheduler.step(noise, t, x).prev_sample
        return x


class MultiDiffusion(Base):
    def predict(self, x, t, c, u, w, on):
        total = torch.zeros_like(x)
        for k in range(2):
            part = x[:, :, 3 * k : 3 * k + 3]
            noise_uncond, noise_text = self.unet(torch.cat([part] * 2), t, torch.cat([u, c]))[0].chunk(2)
            total[:, :, 3 * k : 3 * k + 3] = noise_uncond + w * (noise_text - noise_uncond)
        return total


class Resample(Base):
    """Each step twice, as RePaint."""

    @torch.no_grad()
    def __call__(self, batch=2, guidance_scale=4.0, generator=None):
        x, c, u = self.begin(batch, generator)
        for i, t in enumerate(self.scheduler.timesteps):
            for r in range(2):
                noise = Plain.predict(self, x, t, c, u, self.w(i, guidance_scale), True)
                y = self.scheduler.step(noise, t, x).prev_sample
                x = y if r else 0.9 * x + 0.1 * y
        return x


class TwoNets(Base):
    """Two networks."""

    def __init__(self, unet, transformer, scheduler):
        DiffusionPipeline.__init__(self)
        self.register_modules(unet=unet, transformer=transformer, scheduler=scheduler)

    def predict(self, x, t, c, u, w, on):
        net = self.unet if t > 500 else self.transformer
        noise = net(x, t, c)[0]
        negative = net(x, t, u)[0]
        return negative + w * (noise - negative)


class Thousandths(Base):
    """The network is told t / 1000."""

    def predict(self, x, t, c, u, w, on):
        noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t / 1000, torch.cat([u, c]))[0].chunk(2)
        return noise_uncond + w * (noise_text - noise_uncond)


class Backwards(Base):
    """The network is told 1 - t / 1000."""

    def predict(self, x, t, c, u, w, on):
        noise_uncond, noise_text = self.unet(torch.cat([x] * 2), 1 - t / 1000, torch.cat([u, c]))[0].chunk(2)
        return -(noise_uncond + w * (noise_text - noise_uncond))


class WeakGuide(Base):
    def predict(self, x, t, c, u, w, on):
        w = 0.5 if w != 1 else w
        noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
        return noise_uncond + w * (noise_text - noise_uncond)


class Clip(Base):
    def predict(self, x, t, c, u, w, on):
        noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
        return (noise_uncond + w * (noise_text - noise_uncond)).clamp(-0.5, 0.5)


class NegativeLater(Base):
    """Perpendicular negative."""

    def predict(self, x, t, c, u, w, on):
        noise_uncond, noise_text = self.unet(torch.cat([x] * 2), t, torch.cat([u, c]))[0].chunk(2)
        d = noise_text - noise_uncond
        return noise_text + (w - 1) * (
            d
            - (d * noise_text).sum((1, 2, 3), keepdim=True)
            / noise_text.square().sum((1, 2, 3), keepdim=True)
            * noise_text
        )


def build(cls, scheduler):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = {"unet": Net(), "transformer": Net()}
    return cls(**networks, scheduler=scheduler) if cls is TwoNets else cls(networks["unet"], scheduler)
