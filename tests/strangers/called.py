"""`__call__` under decorators, with gradients, and by a property."""

import functools

import torch

from .base import Stranger
from .calls import TwoCalls
from .one_batch import Plain


class WrappedPlain(Plain):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class WrappedQuiet(Plain):
    """A wrapper whose arguments do not speak of guidance."""

    def __call__(self, latents, prompt_embeds, negative_prompt_embeds):
        return Plain.__call__(self, latents, prompt_embeds, negative_prompt_embeds)


class WrappedQuietCalls(TwoCalls):
    def __call__(self, latents, prompt_embeds, negative_prompt_embeds):
        return TwoCalls.__call__(self, latents, prompt_embeds, negative_prompt_embeds)


def decorated(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


def bare(function):
    def inner(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return inner


class Decorated(Plain):
    __call__ = decorated(Stranger.__call__)


class DecoratedBare(Plain):
    __call__ = bare(Stranger.__call__)


class DecoratedPredict(Plain):
    predict = bare(Plain.predict)


class InferenceMode(Plain):
    __call__ = torch.inference_mode()(Stranger.__call__.__wrapped__)


class WithGradients(Plain):
    """No torch.no_grad()."""

    __call__ = Stranger.__call__.__wrapped__


_namespace = {"Stranger": Stranger, "torch": torch}
exec(
    "class Exec(Stranger):\n"
    "    def predict(self, x, t, text, negative):\n"
    "        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)\n"
    "        return uncond + self.w * (cond - uncond)\n",
    _namespace,
)
Exec = _namespace["Exec"]


class Property(Stranger):
    """The network is reached by a property."""

    @property
    def model(self):
        return self.unet

    def predict(self, x, t, text, negative):
        uncond, cond = self.model(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return uncond + self.w * (cond - uncond)
