"""The edges of the steps of a schedule as data, and which of its evaluations a timestep is."""

from collections.abc import Callable

import numpy as np
import torch


def times_of(timestep: float | list[float] | np.ndarray | torch.Tensor) -> list[float]:
    """A timestep or several as Python's numbers; reads the device of a tensor that is on one."""
    if isinstance(timestep, torch.Tensor):
        return [float(t) for t in timestep.detach().reshape(-1).tolist()]
    return np.asarray(timestep, dtype=np.float64).reshape(-1).tolist()


class StepEdges:
    """The edges of the steps as set, on the host, beside the timesteps of the network, on its device.

    edges: n + 1 times. evaluated: the times at which the network is called, in order: the edges, the last one where
    something is left to denoise, and times within a step for samplers that evaluate it there. conditioning: what it
    receives at times (n,) float64. `timesteps` and `model_times`: (evaluated,) float32, on the device. `points`: what
    was evaluated and the last edge, on the host.

    A timestep taken from `timesteps`, by a loop or an index, is known by the tensor that it is a view of and by its
    place there, which the host knows; the device is only read for timesteps from elsewhere.
    """

    def __init__(
        self,
        edges: list[float],
        evaluated: list[float],
        conditioning: Callable,
        device: str | torch.device | None = None,
    ):
        self.edges, self.evaluations = edges, len(evaluated)
        self.points = evaluated if evaluated[-1] == edges[-1] else [*evaluated, edges[-1]]
        rounded = torch.tensor(evaluated, dtype=torch.float32)
        both = torch.stack([rounded, conditioning(rounded.double()).float()])
        self.timesteps, self.model_times = both.to(device).unbind()
        self.timesteps = self.timesteps.clone()  # the base of its views, and of nothing else
        self._rounded = rounded.tolist()
        self._version = _version(self.timesteps)

    def known(self, timestep: float | list[float] | torch.Tensor) -> int | None:
        """The index of a timestep that is an entry of `timesteps`, also repeated by `expand`; else None."""
        if not isinstance(timestep, torch.Tensor) or not timestep.numel() or self._version is None:
            return None
        base = timestep if timestep._base is None else timestep._base
        once = timestep.numel() == 1 or not any(timestep.stride())
        if base is not self.timesteps or not once or _version(base) != self._version:
            return None
        return timestep.storage_offset() if timestep.dtype == base.dtype else None

    def times(self, timestep: float | list[float] | torch.Tensor) -> list[float]:
        """A timestep or several as Python's numbers, without reading the device for one of `timesteps`."""
        index = self.known(timestep)
        return times_of(timestep) if index is None else [self._rounded[index]]

    def index(self, timestep: float | list[float] | torch.Tensor) -> int:
        """Which of `points` a timestep is, the same for the whole batch.

        Raises:
            ValueError: for one that is none.
        """
        index = self.known(timestep)
        if index is not None:
            return index
        times = times_of(timestep)
        if not times:
            raise ValueError("timestep must be one time or one a sample, got none")
        distances = [abs(point - times[0]) for point in self.points]
        index = min(range(len(distances)), key=distances.__getitem__)
        if not distances[index] <= 2e-7 or any(t != times[0] for t in times):
            raise ValueError(
                f"timestep={timestep} is not one of the schedule's {[round(t, 6) for t in self.points]}; pass one of"
                " them, or say where the step ends with next_timestep= (num_decode= for gillespie)"
            )
        return index


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count (inference mode)."""
    return None if tensor.is_inference() else tensor._version
