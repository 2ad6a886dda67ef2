"""The code that draws what a tab shows, to be copied: each begins with its imports and ends with the second picture's.

inputs: arguments of the call, with the seeds as "generator". call: further arguments.
"""

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from ..pipelines import BoostAndSkipPipeline
from .text_to_image import Source, takes


def boost_and_skip(
    pipe: DiffusionPipeline, source: Source, gamma: float, skip_steps: int, num_inference_steps: int, inputs: Mapping
) -> str:
    """By the pipeline's call, or through its scheduler."""
    call = {**inputs, "num_inference_steps": num_inference_steps}
    method = {"gamma": gamma, "skip_steps": skip_steps}
    if isinstance(pipe, BoostAndSkipPipeline):
        return _code(
            source,
            "load_pipeline",
            *source.lines(pipeline="boost-and-skip"),
            f"stock = {_call('pipe', call)}.images",
            f"images = {_call('pipe', {**call, **method})}.images",
        )
    return _code(
        source,
        "boost_and_skip, load_pipeline",
        *source.lines(),
        f"stock = {_call('pipe', call)}.images",
        f"pipe.scheduler = boost_and_skip(pipe.scheduler, {', '.join(_arguments(method))})",
        f"images = {_call('pipe', call)}.images",
    )


def guidance_interval(
    pipe: DiffusionPipeline, source: Source, interval: tuple[float, float], call: Mapping, inputs: Mapping
) -> str:
    """By the pipeline's call where it takes an interval, or with one applied."""
    call = {**inputs, **call}
    begin = (*source.lines(), f"stock = {_call('pipe', call)}.images")
    if takes(pipe, "guidance_interval"):
        method = {**call, "guidance_interval": interval}
        return _code(source, "load_pipeline", *begin, f"images = {_call('pipe', method)}.images")
    return _code(
        source,
        "apply_guidance_interval, guidance_report, load_pipeline",
        *begin,
        f"apply_guidance_interval(pipe, guidance_interval={interval!r})",
        f"images = {_call('pipe', call)}.images",
        "print(guidance_report(pipe))",
    )


def discrete(source: Source, edges: Mapping[str, list[float]], count: int, seed: int) -> str:
    """Tokens at each of the edges, by name."""
    inputs = {"batch_size": count, "generator": list(range(seed, seed + count))}
    return _code(
        source,
        "load_pipeline",
        *source.lines(),
        *(
            f"{name} = {_call('pipe', {**inputs, 'timesteps': times, 'output_type': 'tokens'})}.tokens"
            for name, times in edges.items()
        ),
    )


def flow(source: Source, call: Mapping, inputs: Mapping, flow: str, repair: Mapping) -> str:
    """Images of a model, and their repair by a flow. repair: arguments of its call."""
    return _code(
        source,
        "load_pipeline",
        *source.lines("base"),
        *Source(flow, device=source.device).lines("flow"),
        f"images = {_call('base', {**inputs, **call})}.images",
        f"repaired = flow(images, {', '.join(_arguments(repair))}).images",
    )


def grid(source: Source, arguments: Mapping[str, Any]) -> str:
    """A grid of `compare`, of these arguments."""
    words = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    return _code(
        source,
        "compare, load_pipeline",
        *source.lines(),
        f"found = compare(\n    pipe,\n{words})",
        "grid = found.grid",
    )


def _code(source: Source, names: str, *lines: str) -> str:
    """Imports, the names from this package among them, and lines."""
    return "\n".join(["import torch", *source.imports(), f"from diffusers_ext import {names}", "", *lines, ""])


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
        elif name in ("prompt", "negative_prompt"):
            words.append(f"{name}=[{value[0]!r}] * {len(value)}")
        else:
            words.append(f"{name}={value!r}")
    return words
