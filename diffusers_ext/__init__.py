"""Research methods for Hugging Face diffusers.

The names below are imported when they are first asked for. What `save_pretrained` wrote loads again in a fresh process
that imports this package and diffusers, in any order; see `registration`.
"""

import os as _os
from importlib import import_module as _import_module

from .machine.interruptions import guard_imports as _guard_imports

_guard_imports()

from .registration import ROOMS as _ROOMS
from .registration import loadable_class as _loadable_class
from .registration import register_when_imported as _register_when_imported

__version__ = "0.1.0.dev0"

# In a checkout, pipelines/ and schedulers/ lie beside this folder, not inside it.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_root, "setup.py")) and _os.path.isfile(
    _os.path.join(_root, "pipelines", "__init__.py")
):
    __path__.append(_root)

# What the first line of an example imports: the calls that begin a piece of work, and the classes that are built or
# loaded by name. All else is imported from its room: outputs, helpers, single schedulers that `boost_and_skip` makes.
_HOMES = {
    "ADMUNet2DModel": "models",
    "ADMUpsamplerPipeline": "pipelines",
    "BoostAndSkipPipeline": "pipelines",
    "CTMCScheduler": "schedulers",
    "DiscreteDiffusionPipeline": "pipelines",
    "EDM2Pipeline": "pipelines",
    "EDM2UNet2DModel": "models",
    "EDMHeunScheduler": "schedulers",
    "FlowPostprocessingPipeline": "pipelines",
    "GuidanceInterval": "pipelines",
    "IntervalGuidance": "guidance.guiders",
    "SEDDTransformer": "models",
    "apply_guidance_interval": "pipelines",
    "apply_guider": "pipelines",
    "boost_and_skip": "schedulers",
    "choose_boost": "boost",
    "compare": "comparing",
    "evaluate_images": "evaluation",
    "export_pipeline": "hub",
    "guidance_report": "pipelines",
    "limit_to_interval": "guidance.guiders",
    "load_pipeline": "shipped",
    "optimize_timesteps": "jump_your_steps",
    "remove_guidance_interval": "pipelines",
    "remove_guider": "pipelines",
    "sample_to_folder": "sampling",
    "train_postprocessing_flow": "flow",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(_import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _ROOMS:
        value = _import_module(f".{name}", __name__)
    # A folder may name this package as the library of its classes, of which some are not listed above.
    elif (value := _loadable_class(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})


_register_when_imported()
