"""What guidance costs: rows that pass the network."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from diffusers import DiffusionPipeline

from ..pipelines.guided_run import denoisers_of


def networks_of(pipe: DiffusionPipeline) -> list[torch.nn.Module]:
    """The components that are called with a timestep, such as the UNet or the transformer, and others of their
    classes: EDM2's guiding network."""
    kinds = tuple(type(one) for one in denoisers_of(pipe).values())
    networks = {id(one): one for one in pipe.components.values() if kinds and isinstance(one, kinds)}
    return [*networks.values()]


@contextmanager
def counted_rows(pipe: DiffusionPipeline) -> Iterator[list[int]]:
    """A list to which every call of a network that denoises (`networks_of`) adds the rows of its batch."""
    counts: list[int] = []
    with ExitStack() as hooks:
        for network in networks_of(pipe):
            handle = network.register_forward_pre_hook(
                lambda module, args, kwargs: counts.append(rows_of([*args, *kwargs.values()])), with_kwargs=True
            )
            hooks.callback(handle.remove)
        yield counts


def rows_of(values: list) -> int:
    """The rows of the first tensor that has more than one dimension, or of the first list of tensors (Z-Image)."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            return len(value)
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return len(value)
    return 0
