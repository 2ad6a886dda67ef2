"""What tests of guidance in an interval share: a call's result, and when two are the same."""

import functools

import numpy as np
import torch
from tiny_guided_pipelines import STEPS
from tiny_pipelines import tiny_stable_diffusion

MIDDLE = (1, 2)  # of steps 0 to 3
WORDS = {"prompt": ["a cat", "a dog"], "num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}


def sample(pipe, options: dict) -> torch.Tensor:
    output = pipe(**options, generator=torch.Generator().manual_seed(1), return_dict=False)[0]
    return torch.as_tensor(np.stack(output) if isinstance(output, list) else output)


def assert_same(output: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor | None = None) -> None:
    """Up to rounding, which differs with the number of rows; with `plain`, a tenth of what lies between the two."""
    assert expected.isfinite().all()
    if plain is None:
        atol = 1e-4 * max(1.0, expected.abs().max().item())
    else:
        atol = 0.1 * (expected - plain).abs().max().item()
    torch.testing.assert_close(output, expected, rtol=0, atol=atol)


@functools.cache
def shared_stable_diffusion():
    return tiny_stable_diffusion()
