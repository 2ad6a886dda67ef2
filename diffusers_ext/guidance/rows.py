"""What guidance costs: rows that pass the network."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import DiffusionPipeline


@contextmanager
def counted_rows(pipe: DiffusionPipeline) -> Iterator[list[int]]:
    """A list to which every call of the UNet adds the rows of its batch."""
    counts: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    try:
        yield counts
    finally:
        handle.remove()
