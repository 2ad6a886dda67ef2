"""Saved pipelines load with diffusers: it finds the classes of this package wherever the package was imported.

A saved pipeline or network names its class alone, which `DiffusionPipeline.from_pretrained`, `AutoModel` and
`compatibles` of schedulers look up on diffusers; a saved component names its module, which must have been imported.
Both hold as soon as diffusers is imported, be it before this package or after it. Until then nothing is imported, so
that commands which only print their help need not wait the seconds that diffusers takes.
"""

import sys
from functools import partial
from importlib import import_module

ROOMS = ("models", "pipelines", "schedulers")


class _Finder:
    """Lets the import of diffusers register the classes, right after its own __init__ and before its submodules."""

    def find_spec(self, name, path=None, target=None):
        if name != "diffusers":
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_import_and_register, spec.loader.exec_module)
        return spec


def _import_and_register(exec_module, module) -> None:
    exec_module(module)
    _register()


def register_when_imported() -> None:
    """Make the classes known to diffusers: now where it is imported, else when it is."""
    if "diffusers" not in sys.modules:
        sys.meta_path.insert(0, _Finder())
        return
    import_module("diffusers")  # which waits for another thread that is still at it
    _register()


def _register() -> None:
    for room in ROOMS:
        import_module(f".{room}", __package__)
    # PEP 562; diffusers' own lazy names are looked up after it. diffusers replaced itself while it was imported.
    sys.modules["diffusers"].__getattr__ = _on_diffusers
    if "diffusers.pipelines.auto_pipeline" in sys.modules:  # which takes seconds to import, so else when asked for
        _tell_auto_pipelines()


def _on_diffusers(name: str):
    diffusers = sys.modules["diffusers"]
    if name not in diffusers.__all__ and (found := loadable_class(name)) is not None:
        return found
    if name.startswith("AutoPipeline"):
        _tell_auto_pipelines()
    raise AttributeError(f"module 'diffusers' has no attribute {name!r}")


def loadable_class(name: str) -> type | None:
    """The class of this name that `from_pretrained` makes from a saved folder; None for other names."""
    for room in ROOMS if name[:1].isupper() else ():
        module = import_module(f".{room}", __package__)
        if name in getattr(module, "__all__", ()):  # without it, the room is being imported
            from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

            value = getattr(module, name)
            if isinstance(value, type) and issubclass(value, (DiffusionPipeline, ModelMixin, SchedulerMixin)):
                return value
    return None


def _tell_auto_pipelines() -> None:
    """AutoPipeline looks pipelines up by the task; to another task it leads to the stock pipelines."""
    import diffusers
    from diffusers.pipelines import auto_pipeline

    from .pipelines import StableDiffusionXLGuidanceIntervalPipeline

    name = "stable-diffusion-xl-guidance-interval"
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING[name] = StableDiffusionXLGuidanceIntervalPipeline
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING[name] = diffusers.StableDiffusionXLImg2ImgPipeline
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING[name] = diffusers.StableDiffusionXLInpaintPipeline
