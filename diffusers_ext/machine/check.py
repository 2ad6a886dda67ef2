"""What works on this machine: ways of placing and speeding up a pipeline, each tried on tiny random models of ours.

    python -m diffusers_ext.machine.check DEVICE NAME ...   tries in this process, one line of JSON each

`check_devices` starts that and prints nothing. A process that dies or hangs costs the one capability that it tried.
"""

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import Timer

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils import logging

from ..casting import cast
from ..models import EDM2UNet2DModel, SEDDTransformer
from ..pipelines import BoostAndSkipPipeline, DiscreteDiffusionPipeline, EDM2Pipeline, FlowPostprocessingPipeline
from ..schedulers import BoostAndSkipDDIMScheduler, CTMCScheduler, EDMHeunScheduler


@dataclass(frozen=True)
class Outcome:
    """What became of one capability.

    Attributes:
        capability: its name.
        result: "ok"; "not here", with the reason that was given; "differs", where it runs and changes the samples
            beyond round-off; "crashed", where the process died or did not come back.
        reason: of a result that is not "ok".
        seconds: that the attempt took.
    """

    capability: str
    result: str
    reason: str = ""
    seconds: float = 0.0


class NotHere(Exception):
    """What a capability needs, and this machine has not."""


class Differs(Exception):
    """A capability runs, and its samples are others."""


# Tiny pipelines with random weights, one a method


def _seeded(build: Callable) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(**options) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=16, **options,
    ).eval()  # fmt: skip


def _edm2_unet(label_dim: int) -> EDM2UNet2DModel:
    unet = EDM2UNet2DModel(
        img_resolution=8, img_channels=3, label_dim=label_dim, model_channels=16, channel_mult=(1, 2), num_blocks=1,
        attn_resolutions=(4,), channels_per_head=16,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith("gain"):  # zero in a fresh network, which would hide what lies behind it
                parameter.fill_(0.5)
    return unet.eval()


def _boost_and_skip() -> DiffusionPipeline:
    return BoostAndSkipPipeline(_unet(), BoostAndSkipDDIMScheduler(gamma=2.0, skip_steps=1, prediction_type="sample"))


def _edm2() -> DiffusionPipeline:
    return EDM2Pipeline(_edm2_unet(3), EDMHeunScheduler(sigma_max=2.0), guidance_unet=_edm2_unet(0))


def _flow_postprocessing() -> DiffusionPipeline:
    return FlowPostprocessingPipeline(_unet(), FlowMatchEulerDiscreteScheduler())


def _discrete() -> DiffusionPipeline:
    sizes = {"hidden_size": 32, "cond_dim": 16, "num_blocks": 1, "num_heads": 2, "sequence_length": 12}
    model = SEDDTransformer(vocab_size=9, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return DiscreteDiffusionPipeline(model.eval(), CTMCScheduler(vocab_size=9))


def _sample(pipe: DiffusionPipeline) -> torch.Tensor:
    """Samples (2, 3, 8, 8), not clipped, or the share of tokens that are no masks (2,), float32 on the CPU.

    They start from the same noise whatever the device and the type.
    """
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"num_inference_steps": 3, "output_type": "latent"}
    if isinstance(pipe, DiscreteDiffusionPipeline):
        tokens = pipe(batch_size=2, num_inference_steps=3, output_type="tokens").tokens
        return (tokens < 8).float().mean(1).cpu()
    if isinstance(pipe, FlowPostprocessingPipeline):
        return pipe(latents=noise * 0.5, **call).images.float().cpu()
    if isinstance(pipe, EDM2Pipeline):
        call |= {"class_labels": [0, 1], "guidance_scale": 1.5, "guided_steps": (1, 1)}
    return pipe(batch_size=2, latents=noise, **call).images.float().cpu()


def _compare(sample: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raise Differs for an error above `tolerance`, in units of the standard deviation of what is expected."""
    error = (sample - expected).abs().max().item() / (expected.std().item() or 1.0)
    if not error <= tolerance:  # NaN is not
        raise Differs(f"samples differ by {error:.2g} of their standard deviation, more than {tolerance:g}")


def _accelerated(device: str) -> None:
    if torch.device(device).type == "cpu":
        raise NotHere("needs an accelerator")


# Capabilities. Each builds what it needs anew, so that none sees what another left


def _types(dtype: torch.dtype, tolerance: float) -> Callable[[str], None]:
    def check(device: str) -> None:
        for build in (_boost_and_skip, _edm2, _flow_postprocessing, _discrete):
            expected = _sample(_seeded(build))
            _compare(_sample(cast(_seeded(build), dtype).to(device)), expected, tolerance)

    return check


def _model_offload(device: str) -> None:
    pipe, expected = _seeded(_edm2), _sample(_seeded(_edm2))
    pipe.enable_model_cpu_offload(device=device)
    for _ in range(2):  # its hooks are put in anew after a call
        _compare(_sample(pipe), expected, 1e-2)


def _sequential_offload(device: str) -> None:
    _accelerated(device)
    pipe, expected = _seeded(_edm2), _sample(_seeded(_edm2))
    pipe.enable_sequential_cpu_offload(device=device)
    _compare(_sample(pipe), expected, 1e-2)


def _group_offload(device: str) -> None:
    pipe, expected = _seeded(_edm2), _sample(_seeded(_edm2))
    pipe.enable_group_offload(torch.device(device), offload_type="leaf_level")
    _compare(_sample(pipe), expected, 1e-2)


def _device_map(device: str) -> None:
    _accelerated(device)
    expected = _sample(_seeded(_edm2))
    with tempfile.TemporaryDirectory() as folder:
        _seeded(_edm2).save_pretrained(folder)
        pipe = EDM2Pipeline.from_pretrained(folder, device_map="balanced")
        pipe.set_progress_bar_config(disable=True)
        if not pipe.hf_device_map:
            raise NotHere("diffusers placed nothing")
        _compare(_sample(pipe), expected, 1e-2)


def _compiled(device: str) -> None:
    pipe = _seeded(_edm2).to(device)
    expected = _sample(pipe)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True)
    _compare(_sample(pipe), expected, 1e-2)


def _attention(backend: str) -> Callable[[str], None]:
    def check(device: str) -> None:
        if "hub" in backend:
            raise NotHere("not tried: it downloads a kernel from the Hub")
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
        pipe = cast(_seeded(_edm2), dtype).to(device)
        expected = _sample(pipe)
        try:
            for unet in (pipe.unet, pipe.guidance_unet):
                unet.set_attention_backend(backend)
            _compare(_sample(pipe), expected, 1e-2 if dtype == torch.float32 else 0.2)
        finally:
            pipe.unet.set_attention_backend("native")  # which diffusers also takes for its default from now on

    return check


CHECKS: dict[str, Callable[[str], None]] = {
    "float32": _types(torch.float32, 1e-2),
    "bfloat16": _types(torch.bfloat16, 0.5),
    "float16": _types(torch.float16, 0.2),
    'device_map="balanced"': _device_map,
    "enable_model_cpu_offload": _model_offload,
    "enable_sequential_cpu_offload": _sequential_offload,
    "enable_group_offload": _group_offload,
    "torch.compile, one graph": _compiled,
    **{f"attention {backend.value}": _attention(backend.value) for backend in AttentionBackendName},
}


def attempt(capability: str, device: str) -> Outcome:
    """Try one of `CHECKS` in this process; whatever it raises is its outcome."""
    start, result, reason = time.perf_counter(), "ok", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CHECKS[capability](device)
    except Differs as error:
        result, reason = "differs", str(error)
    except Exception as error:  # every library says in its own way what it needs
        result, reason = "not here", str(error).strip().split("\n", 1)[0][:200] or type(error).__name__
    return Outcome(capability, result, reason, round(time.perf_counter() - start, 2))


def check_devices(
    device: str, capabilities: Sequence[str] = tuple(CHECKS), limit: float = 300.0, worker: Sequence[str] | None = None
) -> Iterator[Outcome]:
    """Try each capability on a device, and give the outcomes as they come.

    The work is done in another process: where that dies, or needs more than `limit` seconds for one capability, the
    capability has crashed, and a new process goes on with the next one.

    Args:
        device: its name.
        capabilities: names of what is tried.
        limit: seconds for one capability.
        worker: the command of that process, which gets the names and prints the outcomes; by default this module.
    """
    worker = worker or [sys.executable, "-m", "diffusers_ext.machine.check", device]
    waiting = list(capabilities)
    while waiting:
        process = subprocess.Popen([*worker, *waiting], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        timer = Timer(limit, process.kill)
        timer.start()
        try:
            for line in process.stdout:
                if (outcome := _parsed(line)) is not None and outcome.capability in waiting:
                    timer.cancel()
                    waiting.remove(outcome.capability)
                    yield outcome
                    timer = Timer(limit, process.kill)
                    timer.start()
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        if waiting:
            yield Outcome(waiting.pop(0), "crashed", f"the process ended with {code}, or took more than {limit:g} s")


def _parsed(line: str) -> Outcome | None:
    """An outcome, or None for a line that some library printed."""
    with suppress(ValueError, TypeError):
        return Outcome(**json.loads(line))
    return None


def main(device: str, *capabilities: str) -> None:
    """Try capabilities in this process, and print a line of JSON for each."""
    logging.set_verbosity_error()
    for capability in capabilities:
        print(json.dumps(asdict(attempt(capability, device))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
