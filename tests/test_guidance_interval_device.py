"""What an interval and a guider read back from a second device: the schedule, once a call, and nothing in a step."""

import pytest
import torch
from tiny_guided_pipelines import CASES, STEPS

from diffusers_ext.pipelines import GuidanceInterval

stand_in_device = pytest.importorskip("stand_in_device")
pytestmark = [stand_in_device.needs_device, pytest.mark.filterwarnings("ignore:the guidance interval:UserWarning")]
# Their tiny components stay on the CPU.
ELSEWHERE = ("stable_video_diffusion", "dream_lite_edit", "ace_step", "omnigen", "ideogram_4")


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    return {key: moved(item, device) for key, item in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("name", [name for name in CASES if name not in ELSEWHERE])
def test_reads(name):
    case, reads = CASES[name](), []
    with stand_in_device.device() as device:
        case.pipe.to(device)
        for steps in (STEPS, STEPS + 3):
            options = {**moved(case.options, device), "num_inference_steps": steps}
            if "sigmas" in options:
                options["sigmas"] = [1 - step / steps for step in range(steps)]
            with GuidanceInterval(case.pipe, guided_steps=(1, 2)), stand_in_device.waits() as noted:
                case.pipe(**options, generator=torch.Generator().manual_seed(0), return_dict=False)
            reads.append(sum(stand_in_device.ours(noted).values()))
    assert max(reads) <= 3 < STEPS  # a read a step would be more
