"""A pipeline in no list, the loop that it is compared with, and what becomes of a call under an interval."""

import copy
import warnings

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffusers_ext.pipelines.guidance_interval import GuidanceInterval

STEPS, WEIGHT = 5, 4.0
INTERVALS = [(0, 0), (1, 2), (3, 3), (4, 4)]
BATCHES = [1, 2, 3]


class Net(torch.nn.Module):
    """eps(x, t, text) with the text's mean, by rows. times: the timesteps at which it was called."""

    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.gain, self.times, self.rows = torch.nn.Parameter(torch.tensor(gain), requires_grad=False), [], []

    @property
    def dtype(self) -> torch.dtype:
        return self.gain.dtype

    def forward(self, sample, timestep, encoder_hidden_states):
        self.times.append(float(torch.as_tensor(timestep).max()))
        self.rows.append(len(sample))
        return self.predict(sample, timestep, encoder_hidden_states)

    def predict(self, sample, timestep, text):
        place = torch.linspace(-1, 1, sample[0].numel()).view(sample[0].shape).to(sample.dtype)
        tone = text.mean(1).tanh()
        time = torch.as_tensor(timestep).to(sample.dtype).max() / 1000
        mixed = tone[:, 0].view(-1, 1, 1, 1) * place + tone[:, 1].view(-1, 1, 1, 1) * (3 * place).cos()
        return torch.tanh(self.gain * (0.6 * sample + mixed * (1 + time)) + 0.2 * sample.roll(1, -1))


class Stranger(DiffusionPipeline):
    """Samples with `predict`, which each subclass has for itself."""

    layout = "uncond, cond"  # the right one

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.w, self.finished = guidance_scale, False
        texts = (prompt_embeds, negative_prompt_embeds)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            self.i = i
            noise = self.predict(latents, t, *texts)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)

    @staticmethod
    def combine(c, u, w, i):
        """The combination of a guided step, for the loop that it is compared with."""
        return u + w * (c - u)


def inputs(batch: int) -> dict:
    drawn = torch.Generator().manual_seed(batch)
    return {
        "latents": torch.randn(batch, 4, 4, 4, generator=drawn),
        "prompt_embeds": torch.randn(batch, 3, 2, generator=drawn) + 0.7,
        "negative_prompt_embeds": torch.randn(batch, 3, 2, generator=drawn) - 0.7,
    }


def build(cls, scheduler=None, net=None, **components):
    return cls(
        unet=net or getattr(cls, "net", Net)(), scheduler=scheduler or DDIMScheduler(clip_sample=False), **components
    )


def oracle(
    pipe, guided, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
):
    """The picture with guidance in the steps `guided` only, by a loop of its own."""
    scheduler = copy.deepcopy(pipe.scheduler)
    net = copy.deepcopy(pipe.unet)
    scheduler.set_timesteps(num_inference_steps)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            c, u = pipe.both(net, latents, t, prompt_embeds, negative_prompt_embeds)
            noise = pipe.combine(c, u, guidance_scale, i) if i in guided else pipe.alone(c)
            latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


Stranger.alone = staticmethod(lambda c: c)
Stranger.both = staticmethod(lambda net, x, t, text, negative: (net(x, t, text), net(x, t, negative)))
Stranger.oracle = oracle


def outcome(pipe, interval, batch, layout=None, **options) -> tuple[str, str]:
    """What becomes of a call: "right", "refused", "WRONG" or "LATE", and when or why."""
    given = {**inputs(batch), **options}
    pipe.unet.times.clear()
    first, last = interval
    expected = type(pipe).oracle(pipe, range(first, last + 1), **given)
    pipe.unet.times.clear()
    pipe.finished = False
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            with GuidanceInterval(pipe, guided_steps=interval, layout=layout):
                result = pipe(**given)[0]
        except ValueError as error:
            steps = len(set(pipe.unet.times))
            if pipe.finished:
                return "LATE", str(error)
            return "refused", f"step {steps}: {error}"
        except Exception as error:
            return "CRASH", repr(error)
    said = "; ".join(str(one.message) for one in seen)
    size = expected.abs().max().item()
    if not (result - expected).abs().max().item() <= 1e-3 * max(1.0, size):
        error = (result - expected).abs().max().item() / size
        return ("warned" if "not proved" in said else "WRONG"), f"off by {error:.2g} {said}"
    false = [one for one in seen if "no effect" in str(one.message)]
    return ("FALSE WARNING", said) if false else ("right", said)
