"""The classes of samples: in turn, or at random from each sample's seed."""

import inspect
from collections.abc import Sequence
from hashlib import sha256

import torch
from diffusers import DiffusionPipeline

from ..pipelines.call_arguments import checked_arguments


@checked_arguments
def cycled_labels(
    pipe: DiffusionPipeline, count: int, labels: Sequence[int | None] | None = None
) -> torch.Tensor | None:
    """count labels (count,), the given ones or every class of the model in turn; None for an unconditional model.

    The classes are those of the network without the pipeline's null class, which None among the labels stands for.

    Args:
        pipe: whose classes are meant.
        count: number of labels.
        labels: those to go through; None for every class.

    Raises:
        ValueError: for labels given to a pipeline that takes none, for those that it has not, for None where there is
            no null class, and for an empty list.
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    if labels is None:
        labels = _classes(pipe)
        if labels is None:
            return None
    elif not takes_labels(pipe):
        raise ValueError(f"class labels {labels}: {type(pipe).__name__} takes none; leave them out")
    if len(labels) == 0:
        raise ValueError("class labels must not be empty")
    null_class, named = pipe.config.get("null_class"), [label for label in labels if label is not None]
    if null_class is None and len(named) < len(labels):
        raise ValueError(f"class label none: this {type(pipe).__name__} has no null class; name classes")
    given, classes = torch.as_tensor(named), _classes(pipe)
    if named and (given.is_floating_point() or given.ndim != 1):
        raise ValueError(f"class labels must be integers, one after the other, got {given.tolist()}")
    if classes is not None and (wrong := sorted(set(given.tolist()) - set(classes))):
        null = "" if null_class is None else f"; {null_class} is the null class: write none (in Python None)"
        raise ValueError(
            f"class labels must be in [{classes[0]}, {classes[-1]}], the classes of this model, got {wrong}"
            + (null if null_class in wrong else "")
        )
    labels = torch.tensor([null_class if label is None else int(label) for label in labels])
    return labels[torch.arange(count) % len(labels)]


@checked_arguments
def random_labels(pipe: DiffusionPipeline, count: int, seed: int) -> torch.Tensor:
    """count labels (count,), uniform over the model's classes; label i depends on seed + i alone.

    It comes from a hash, not from the generator of image i, so labels and noise are independent.

    Args:
        pipe: whose classes are meant.
        count: number of labels.
        seed: label i depends on seed + i.

    Raises:
        ValueError: for a pipeline without classes.
    """
    classes = _classes(pipe)
    if classes is None:
        raise ValueError(f"random labels: {type(pipe).__name__} of this model has no classes; leave them out")
    return torch.tensor([classes[hashed("class label", seed + i) % len(classes)] for i in range(count)])


def hashed(purpose: str, seed: int) -> int:
    """63 bits that look random, another for each purpose and seed."""
    return int.from_bytes(sha256(f"{purpose} {seed}".encode()).digest()[:8], "big") >> 1


def takes_labels(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline's call has class_labels."""
    return "class_labels" in inspect.signature(pipe.__call__).parameters


def _number_of_classes(pipe: DiffusionPipeline) -> int | None:
    """The classes of the pipeline's unet or DiT transformer, the null class among them; None where nothing says."""
    if takes_labels(pipe) and getattr(pipe, "unet", None) is not None:
        config = pipe.unet.config
        return config.get("num_class_embeds") or config.get("label_dim") or None  # EDM2 has the latter, 0 for none
    if takes_labels(pipe) and getattr(pipe, "transformer", None) is not None:
        return pipe.transformer.config.get("num_embeds_ada_norm")  # the null class comes after these
    return None


def _classes(pipe: DiffusionPipeline) -> list[int] | None:
    """The classes of the pipeline's network, without the null class; None for an unconditional one."""
    number = _number_of_classes(pipe)
    if number is None:
        return None
    return [label for label in range(number) if label != pipe.config.get("null_class")]
