"""diffusers' guiders in a pipeline that combines its predictions itself.

A guider wants the prediction D(c, u) of a conditional and an unconditional one. A batch of two parts is answered with
D in both, since u + w (c - u) = D for u = c = D whatever the weight w of the call. Of two calls the first has been
answered with c; the second is answered with

    u' = (D - w c) / (1 - w),  so that  u' + w (c - u') = D.
"""

import copy
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance

CLOSEST = 0.05  # |w - 1| below which u' loses too many digits


def check_guider(guider: Any) -> None:
    """Check that a guider combines two predictions.

    Args:
        guider: what is to be one.

    Raises:
        ValueError: for what is no guider of two predictions.
    """
    if not isinstance(guider, BaseGuidance):
        raise ValueError(f"guider must be a diffusers guider, such as ClassifierFreeGuidance(5.0), got {guider!r}")
    name, predictions = type(guider).__name__, getattr(guider, "_input_predictions", None)
    if predictions != ["pred_cond", "pred_uncond"]:
        raise ValueError(
            f"{name} combines {predictions}, which takes further calls of the network; a classic pipeline makes a"
            " conditional and an unconditional prediction. Use a guider of these two, or Modular Diffusers"
        )
    if type(guider).prepare_models is not BaseGuidance.prepare_models:
        raise ValueError(f"{name} changes the network for its unconditional prediction; use it in Modular Diffusers")


class GuiderOfCall:
    """A guider's copies in one call of a pipeline, one for each tensor of the network's output.

    Each has a state of its own, such as the running average of adaptive projected guidance, that starts with the call.

    Args:
        guider: of which copies are made; it is not changed.
    """

    def __init__(self, guider: BaseGuidance):
        self.guider, self.copies, self.state = guider, {}, None

    def enter(self, step: int, count: int, timestep: Any) -> bool:
        """Begin an evaluation in a step of the call; returns whether it needs the unconditional prediction.

        Args:
            step: of the call, from 0.
            count: steps of the call.
            timestep: of the step.
        """
        self.state = (step, count, timestep)
        return self._copy(0).num_conditions == 2

    def _copy(self, number: int) -> BaseGuidance:
        guider = self.copies.get(number)
        if guider is None:
            guider = self.copies[number] = copy.deepcopy(self.guider)
        if getattr(guider, "_entered", None) is not self.state:
            guider._entered = self.state
            guider.set_state(*self.state)
            guider.prepare_inputs({})
        return guider

    def __call__(self, number: int, cond: torch.Tensor, uncond: torch.Tensor | None) -> torch.Tensor:
        """D (samples, ...) for one tensor of the network's output.

        Args:
            number: of the tensor in the output.
            cond: the conditional prediction, (samples, ...).
            uncond: the unconditional one, (samples, ...), or None where it is not needed.

        Raises:
            ValueError: for a frequency-decoupled guider with predictions of other shapes than images.
        """
        guider = self._copy(number)
        given = (cond, uncond) if guider.num_conditions == 2 else (cond, None)
        if type(guider).__name__ == "FrequencyDecoupledGuidance" and cond.ndim != 4:
            raise ValueError(
                "FrequencyDecoupledGuidance takes predictions (batch, channels, height, width), of which it makes"
                f" pyramids; those of this pipeline have the shape {tuple(cond.shape)}: use another guider"
            )
        if type(guider).__name__ == "MagnitudeAwareGuidance" and cond.ndim > 3:
            # its norms over all dimensions but the first fail in diffusers 0.42.1 for more than two of them
            given = [None if one is None else one.flatten(2) for one in given]
        return guider.forward(*given).pred.reshape(cond.shape)


def second_answer(wanted: torch.Tensor, cond: torch.Tensor, weight: float) -> torch.Tensor:
    """u' of a second call, whose pipeline computes u + w (c - u), in float32 at least.

    Args:
        wanted: D, what the pipeline shall compute, (samples, ...).
        cond: c, (samples, ...).
        weight: w.
    """
    exact = torch.promote_types(cond.dtype, torch.float32)
    answer = (wanted.to(exact) - weight * cond.to(exact)) / (1 - weight)
    return answer.to(cond.dtype)


def weight_of_call(pipe: DiffusionPipeline, name: str, arguments: dict[str, Any], plus_one: bool) -> float:
    """w of u + w (c - u) in a call, which is the argument `name` of it, or that of a pipeline's own guider.

    Args:
        pipe: whose call it is.
        name: of the argument.
        arguments: of the call, by name.
        plus_one: whether w is 1 more than the argument.

    Raises:
        ValueError: if the call does not say it in one number, or if u' would lose its digits.
    """
    guider = getattr(pipe, "guider", None)
    weight = arguments.get(name) if guider is None else _of_guider(guider)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(
            f"{type(pipe).__name__} was called with {name}={weight!r}; a guider needs one number, such as 2"
        )
    weight = weight + plus_one
    if not abs(weight - 1) >= CLOSEST:
        raise ValueError(
            f"{type(pipe).__name__} was called with {name}={weight - plus_one:g}, which makes no unconditional"
            f" prediction or one that counts for next to nothing; call it with {name}={2 - plus_one}, the guider's"
            " own weight is used in its place"
        )
    return float(weight)


def _of_guider(guider: BaseGuidance) -> float | None:
    """The weight of a pipeline's own guider, if that computes u + w (c - u)."""
    plain = type(guider).__name__ == "ClassifierFreeGuidance" and not getattr(guider, "guidance_rescale", 0.0)
    return guider.guidance_scale + guider.use_original_formulation if plain else None
