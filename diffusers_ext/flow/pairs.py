"""What a flow is trained on: pairs of generated samples and their real neighbours, and the loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..pipelines.call_arguments import checked_arguments
from ..pipelines.flow_postprocessing import velocity
from .features import as_unit


@dataclass(frozen=True)
class Pairs:
    """Generated samples and their neighbours. draw gives pairs of the given rows, each neighbour drawn anew, uniformly
    or with the probabilities weights (n, k). Those that keep (n,) marks are their own x_1."""

    samples: torch.Tensor
    real: torch.Tensor
    indices: torch.Tensor
    labels: torch.Tensor | None
    weights: torch.Tensor | None = None
    keep: torch.Tensor | None = None

    def draw(
        self, rows: torch.Tensor, generator: torch.Generator, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tensors on the device: x_0 and x_1 (batch, ...) float32, flow times t (batch,), labels (batch,) or None."""
        if self.weights is None:
            ranks = torch.randint(self.indices.shape[1], rows.shape, generator=generator)
        else:
            ranks = torch.multinomial(self.weights[rows], 1, generator=generator)[:, 0]
        chosen = self.indices[rows, ranks]
        t = torch.rand(len(rows), generator=generator).to(device)
        x0, x1 = (
            as_unit(data[index.to(data.device)].to(device))
            for data, index in ((self.samples, rows), (self.real, chosen))
        )
        if self.keep is not None:
            x1 = torch.where(self.keep[rows].to(device).view(-1, *[1] * (x0.ndim - 1)), x0, x1)
        return x0, x1, t, None if self.labels is None else self.labels[rows].to(device)


@checked_arguments
def flow_loss(
    model: Callable, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None
) -> torch.Tensor:
    r"""The rectified-flow loss (arXiv 2209.03003; as used in arXiv 2503.10638), a scalar.

    .. math:: \| v_\theta(x_t, c, t) - (x_1 - x_0) \|^2,\quad x_t = (1 - t) x_0 + t x_1

    averaged over all entries.

    Args:
        model: called like a `UNet2DModel`.
        x0: generated samples (batch, ...).
        x1: real samples (batch, ...).
        t: (batch,) in [0, 1].
        class_labels: (batch,) for a conditional model.

    Raises:
        ValueError: for other shapes, and for labels that are no integers.
    """
    if x0.shape != x1.shape or t.shape != x0.shape[:1]:
        raise ValueError(
            f"x0 and x1 must have one shape (batch, ...) and t be (batch,), got {tuple(x0.shape)}, {tuple(x1.shape)},"
            f" {tuple(t.shape)}"
        )
    if class_labels is not None and (class_labels.shape != t.shape or class_labels.is_floating_point()):
        raise ValueError(
            f"class_labels must be integers (batch,), got {class_labels.dtype} {tuple(class_labels.shape)}"
        )
    time = t.view(-1, *[1] * (x0.ndim - 1))
    return F.mse_loss(velocity(model, (1 - time) * x0 + time * x1, t, class_labels).float(), x1 - x0)
