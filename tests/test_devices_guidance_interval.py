"""Guidance in an interval on a second device, with every family's tiny pipeline: as on the CPU, and nobody waits."""

import functools
import types

import numpy as np
import pytest
import torch
from stand_in_device import device, needs_device, ours, waits, without_float64
from tiny_guided_pipelines import CASES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from diffusers_ext.pipelines.guidance_interval import GuidanceInterval

pytestmark = [
    needs_device,
    pytest.mark.filterwarnings("ignore:the guidance interval:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
# diffusers 0.42.1 makes float64 tensors on the device there, most of them in rotary embeddings; some ask for a Mac by
# its name and then do without.
NEEDS_FLOAT64 = {
    "bria": "transformer_bria.py",
    "hidream": "transformer_hidream_image.py",
    "ltx_2": "transformer_ltx2.py",
    "ace_step": "adaptive_projected_guidance.py",
    "flux": "embeddings.py",
    "flux_controlnet": "embeddings.py",
    "chroma": "embeddings.py",
    "ovis_image": "embeddings.py",
    "skyreels_v2": "embeddings.py",
    "skyreels_v2_diffusion_forcing": "embeddings.py",
    "lumina2": "transformer_lumina2.py",
}


def to_device(value):
    return tree_map(lambda leaf: leaf.to("dx") if isinstance(leaf, torch.Tensor) else leaf, value)


def put_on_device(case) -> None:
    """The pipeline, and what stands in for its encoders, which returns tensors of the host."""
    case.pipe.to("dx")
    for name, stand_in in list(vars(case.pipe).items()):
        if isinstance(stand_in, types.FunctionType):
            setattr(case.pipe, name, lambda *args, _call=stand_in, **kwargs: to_device(_call(*args, **kwargs)))


def starts_of_steps(scheduler: type, noted: list, monkeypatch) -> list[int]:
    """How much was noted before each step of the scheduler, the first of which ends the first step of the pipeline."""
    starts, step = [], scheduler.step

    @functools.wraps(step)
    def counted(*args, **kwargs):
        starts.append(len(noted))
        return step(*args, **kwargs)

    monkeypatch.setattr(scheduler, "step", counted)
    return starts


def sample(pipe, options: dict) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH), GuidanceInterval(pipe, guided_steps=(1, 2)):
        output = pipe(**options, generator=torch.Generator().manual_seed(1), return_dict=False)[0]
    return torch.as_tensor(np.stack(output)) if isinstance(output, list) else torch.as_tensor(output).cpu()


@pytest.mark.parametrize("family", CASES)
def test_the_interval_on_a_device(family, monkeypatch):
    case = CASES[family]()
    expected = sample(case.pipe, case.options)
    with device(), waits() as noted:
        put_on_device(case)
        starts = starts_of_steps(type(case.pipe.scheduler), noted, monkeypatch)
        if family in NEEDS_FLOAT64:
            result = sample(case.pipe, to_device(case.options))
        else:
            with without_float64():
                result = sample(case.pipe, to_device(case.options))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.abs().max().item()))
    # A schedule is read once, in the first step.
    assert not ours(noted[starts[0] :]) and sum(ours(noted).values()) <= 3
