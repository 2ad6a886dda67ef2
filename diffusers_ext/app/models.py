"""The models of the app: loaded once, called by one computation at a time."""

from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline

from .. import pipelines
from ..casting import cast
from ..hub.damage import read_json
from ..model_names import resolve_model
from ..sampling.labels import takes_labels
from ..shipped import load_pipeline
from .text_to_image import is_text_to_image
from .watching import Turn, tell_steps


class Models:
    """Pipelines by name, on one device, loaded when they are first asked for; the last few are kept.

    trust_remote_code: run the .py files of models' repositories while loading them.
    lock: to be held while pipelines are called or changed, since a web server has many threads.
    """

    KEPT = 3

    def __init__(self, device: str, trust_remote_code: bool = False):
        self.device, self.trust_remote_code = device, trust_remote_code
        self.lock = Turn()
        self._loaded: dict[tuple[str, str | None, str], DiffusionPipeline] = {}

    def load(self, model: str, pipeline: str | None = None, dtype: str = "float32") -> DiffusionPipeline:
        """A shipped model by its name, a folder or a Hub id, as its own pipeline or that of `PIPELINES`.

        Args:
            model: its name.
            pipeline: None is its own.
            dtype: of the parameters, by its name in torch.

        Raises:
            ValueError: for an empty name, and as `load_pipeline`.
        """
        model = model.strip()
        if not model:
            raise ValueError("no model is given; choose a shipped one, a folder or a Hub id")
        with self.lock:
            key = (model, pipeline, dtype)
            pipe = self._loaded.pop(key, None)
            if pipe is None:
                while len(self._loaded) >= self.KEPT:
                    self._loaded.pop(next(iter(self._loaded)))
                torch_dtype = getattr(torch, dtype)
                pipe = load_pipeline(model, pipeline, trust_remote_code=self.trust_remote_code, dtype=torch_dtype)
                cast(pipe, torch_dtype, self.device)
                pipe.set_progress_bar_config(disable=True)
                tell_steps(pipe)
            self._loaded[key] = pipe
            return pipe

    def holds(self, model: str, dtype: str = "float32") -> bool:
        """Whether the model is loaded as its own pipeline, so that a look at it takes no time."""
        return (model.strip(), None, dtype) in self._loaded

    def inputs(self, model: str) -> set[str]:
        """Which of prompt and class_labels a model takes, before it is loaded; both where nothing says it yet."""
        model = model.strip()
        known = [type(pipe) for (name, pipeline, _), pipe in self._loaded.items() if (name, pipeline) == (model, None)]
        cls = known[0] if known else _class_of(Path(resolve_model(model)))
        known = {"prompt": is_text_to_image, "class_labels": takes_labels}
        return {name for name, holds in known.items() if cls is None or holds(cls)}


def _class_of(folder: Path) -> type | None:
    """The class of the pipeline in a folder; None where there is none that is known."""
    try:
        name = read_json(folder / "model_index.json")["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = [getattr(library, name, None) for library in (pipelines, diffusers) if isinstance(name, str)]
    return next(filter(None, known), None)
