"""Research methods for Hugging Face diffusers.

Schedulers, models and pipelines are imported with the package, so that what `save_pretrained` wrote loads again in
a fresh process; the workshop (`hub`, `metrics`, `shipped`, `cli`) is imported where it is used.
"""

import os as _os

import diffusers as _diffusers
from diffusers.pipelines import auto_pipeline as _auto

__version__ = "0.1.0.dev0"

# In a checkout, pipelines/ and schedulers/ lie beside this folder, not inside it.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_root, "setup.py")) and _os.path.isfile(
    _os.path.join(_root, "pipelines", "__init__.py")
):
    __path__.append(_root)

from . import models, pipelines, schedulers
from .models import *  # noqa: F403
from .pipelines import *  # noqa: F403
from .schedulers import *  # noqa: F403

# A saved pipeline names its class alone, and DiffusionPipeline.from_pretrained looks that name up on diffusers. So a
# scheduler does for the classes that its config can be given to (`compatibles`), its own among them.
for _module, _kind in ((pipelines, "Pipeline"), (schedulers, "Scheduler")):
    for _name in _module.__all__:
        if _name.endswith(_kind) and not hasattr(_diffusers, _name):
            setattr(_diffusers, _name, getattr(_module, _name))

# AutoPipeline looks pipelines up by the task; to another task it leads to the stock pipelines.
_name = "stable-diffusion-xl-guidance-interval"
_auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING[_name] = pipelines.StableDiffusionXLGuidanceIntervalPipeline
_auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING[_name] = _diffusers.StableDiffusionXLImg2ImgPipeline
_auto.AUTO_INPAINT_PIPELINES_MAPPING[_name] = _diffusers.StableDiffusionXLInpaintPipeline

__all__ = ["__version__", *models.__all__, *pipelines.__all__, *schedulers.__all__]
