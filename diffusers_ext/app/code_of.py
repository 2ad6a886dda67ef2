"""The code that draws what a tab shows, to be copied: each begins with its imports and ends with the second picture's.

inputs: arguments of the call, with the seeds as "generator". call: further arguments.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from ..pipelines import BoostAndSkipPipeline


def boost_and_skip(
    pipe: DiffusionPipeline, model: str, gamma: float, skip_steps: int, num_inference_steps: int, inputs: Mapping
) -> str:
    """By the pipeline's call, or through its scheduler."""
    call = {**inputs, "num_inference_steps": num_inference_steps}
    method = {"gamma": gamma, "skip_steps": skip_steps}
    if isinstance(pipe, BoostAndSkipPipeline):
        return _code(
            "from diffusers_ext import load_pipeline",
            f'pipe = load_pipeline({model!r}, "boost-and-skip")',
            f"stock = {_call('pipe', call)}.images",
            f"images = {_call('pipe', {**call, **method})}.images",
        )
    return _code(
        "from diffusers_ext import boost_and_skip, load_pipeline",
        f"pipe = load_pipeline({model!r})",
        f"stock = {_call('pipe', call)}.images",
        f"pipe.scheduler = boost_and_skip(pipe.scheduler, {', '.join(_arguments(method))})",
        f"images = {_call('pipe', call)}.images",
    )


def guidance_interval(
    pipe: DiffusionPipeline, model: str, interval: tuple[float, float], call: Mapping, inputs: Mapping
) -> str:
    """By the pipeline's call where it takes an interval, or with one applied."""
    call = {**inputs, **call}
    begin = (f"pipe = load_pipeline({model!r})", f"stock = {_call('pipe', call)}.images")
    if "guidance_interval" in inspect.signature(pipe.__call__).parameters:
        method = {**call, "guidance_interval": interval}
        return _code("from diffusers_ext import load_pipeline", *begin, f"images = {_call('pipe', method)}.images")
    return _code(
        "from diffusers_ext import apply_guidance_interval, guidance_report, load_pipeline",
        *begin,
        f"apply_guidance_interval(pipe, guidance_interval={interval!r})",
        f"images = {_call('pipe', call)}.images",
        "print(guidance_report(pipe))",
    )


def discrete(model: str, edges: Mapping[str, list[float]], count: int, seed: int) -> str:
    """Tokens at each of the edges, by name."""
    inputs = {"batch_size": count, "generator": list(range(seed, seed + count))}
    return _code(
        "from diffusers_ext import load_pipeline",
        f"pipe = load_pipeline({model!r})",
        *(
            f"{name} = {_call('pipe', {**inputs, 'timesteps': times, 'output_type': 'tokens'})}.tokens"
            for name, times in edges.items()
        ),
    )


def flow(model: str, call: Mapping, inputs: Mapping, flow: str, repair: Mapping) -> str:
    """Images of a model, and their repair by a flow. repair: arguments of its call."""
    return _code(
        "from diffusers_ext import load_pipeline",
        f"base, flow = load_pipeline({model!r}), load_pipeline({flow!r})",
        f"images = {_call('base', {**inputs, **call})}.images",
        f"repaired = flow(images, {', '.join(_arguments(repair))}).images",
    )


def _code(imports: str, *lines: str) -> str:
    return "\n".join(["import torch", imports, "", *lines, ""])


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call with generators anew, one a sample; a long one with an argument a line."""
    words = _arguments(arguments)
    return f"{name}({', '.join(words)})" if len(words) < 3 else f"{name}(\n    " + ",\n    ".join(words) + ",\n)"


def _arguments(arguments: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in arguments.items():
        if name == "generator":
            seeds = f"range({value[0]}, {value[-1] + 1})"
            words.append(f"generator=[torch.Generator().manual_seed(seed) for seed in {seeds}]")
        elif name == "prompt":
            words.append(f"prompt=[{value[0]!r}] * {len(value)}")
        else:
            words.append(f"{name}={value!r}")
    return words
