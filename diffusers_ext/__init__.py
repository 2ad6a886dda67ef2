"""Research methods for Hugging Face diffusers.

Schedulers, models and pipelines are imported with the package, so that what `save_pretrained` wrote loads again in
a fresh process; the workshop (`hub`, `metrics`, `shipped`, `cli`) is imported where it is used.
"""

import os as _os

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
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# A saved pipeline names its class alone, and DiffusionPipeline.from_pretrained looks that name up on diffusers. So a
# scheduler does for the classes that its config can be given to (`compatibles`), its own among them.
for _module, _kind in ((pipelines, "Pipeline"), (schedulers, "Scheduler")):
    for _name in _module.__all__:
        if _name.endswith(_kind) and _name not in pipelines.LAZY and not hasattr(_diffusers, _name):
            setattr(_diffusers, _name, getattr(_module, _name))
_diffusers.__getattr__ = __getattr__  # PEP 562; diffusers' own lazy names are looked up after it
