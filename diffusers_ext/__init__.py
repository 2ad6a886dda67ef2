"""Research methods for Hugging Face diffusers.

Schedulers, models and pipelines are imported with the package, so that what `save_pretrained` wrote loads again in
a fresh process; the workshop (`hub`, `metrics`, `shipped`, `cli`) is imported where it is used.
"""

import os as _os
import sys as _sys

from .machine.interruptions import guard_imports as _guard_imports

_guard_imports()  # before the seconds that the others take

import diffusers as _diffusers

__version__ = "0.1.0.dev0"

# In a checkout, pipelines/ and schedulers/ lie beside this folder, not inside it.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_root, "setup.py")) and _os.path.isfile(
    _os.path.join(_root, "pipelines", "__init__.py")
):
    __path__.append(_root)

from . import models, pipelines, schedulers
from .models import *  # noqa: F403
from .schedulers import *  # noqa: F403

__all__ = ["__version__", *models.__all__, *pipelines.__all__, *schedulers.__all__]
globals().update({name: getattr(pipelines, name) for name in pipelines.__all__ if name not in pipelines.LAZY})


def __getattr__(name: str):
    if name in pipelines.LAZY:
        return getattr(pipelines, name)
    if name.startswith("AutoPipeline"):
        _tell_auto_pipelines()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _tell_auto_pipelines() -> None:
    """AutoPipeline looks pipelines up by the task; to another task it leads to the stock pipelines."""
    from diffusers.pipelines import auto_pipeline

    name = "stable-diffusion-xl-guidance-interval"
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING[name] = pipelines.StableDiffusionXLGuidanceIntervalPipeline
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING[name] = _diffusers.StableDiffusionXLImg2ImgPipeline
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING[name] = _diffusers.StableDiffusionXLInpaintPipeline


# Saved pipelines and networks name their class alone, which DiffusionPipeline.from_pretrained and AutoModel look up on
# diffusers. So a scheduler does for the classes that its config can be given to (`compatibles`), its own among them.
_LOADED = (_diffusers.DiffusionPipeline, _diffusers.SchedulerMixin, _diffusers.ModelMixin)
for _module in (pipelines, schedulers, models):
    for _name in _module.__all__:
        _value = None if _name in pipelines.LAZY else getattr(_module, _name)
        if isinstance(_value, type) and issubclass(_value, _LOADED) and not hasattr(_diffusers, _name):
            setattr(_diffusers, _name, _value)
_diffusers.__getattr__ = __getattr__  # PEP 562; diffusers' own lazy names are looked up after it
if "diffusers.pipelines.auto_pipeline" in _sys.modules:  # which takes seconds to import, so else when it is asked for
    _tell_auto_pipelines()
