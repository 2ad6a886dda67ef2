"""The models of the app: loaded once, called by one computation at a time."""

import torch
from diffusers import DiffusionPipeline

from ..casting import cast
from ..shipped import load_pipeline
from .watching import Turn, tell_steps


class Models:
    """Pipelines by name, on one device in float32, loaded when they are first asked for; the last few are kept.

    trust_remote_code: run the .py files of models' repositories while loading them.
    lock: to be held while pipelines are called or changed, since a web server has many threads.
    """

    KEPT = 3

    def __init__(self, device: str, trust_remote_code: bool = False):
        self.device, self.trust_remote_code = device, trust_remote_code
        self.lock = Turn()
        self._loaded: dict[tuple[str, str | None], DiffusionPipeline] = {}

    def load(self, model: str, pipeline: str | None = None) -> DiffusionPipeline:
        """A shipped model by its name, a folder or a Hub id, as its own pipeline or that of `PIPELINES`.

        Raises:
            ValueError: for an empty name, and as `load_pipeline`.
        """
        model = model.strip()
        if not model:
            raise ValueError("no model is given; choose a shipped one, a folder or a Hub id")
        with self.lock:
            key = (model, pipeline)
            pipe = self._loaded.pop(key, None)
            if pipe is None:
                while len(self._loaded) >= self.KEPT:
                    self._loaded.pop(next(iter(self._loaded)))
                pipe = load_pipeline(model, pipeline, trust_remote_code=self.trust_remote_code)
                cast(pipe, torch.float32, self.device)
                pipe.set_progress_bar_config(disable=True)
                tell_steps(pipe)
            self._loaded[key] = pipe
            return pipe

    def holds(self, model: str) -> bool:
        """Whether the model is loaded as its own pipeline, so that a look at it takes no time."""
        return (model.strip(), None) in self._loaded
