"""`diffusers-ext demo`: each method on the models that ship; pictures, numbers, plots. One file a section."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from .. import __version__
from ..info import best_device
from .boost_and_skip import run_boost_and_skip
from .discrete import run_discrete
from .flow_postprocessing import run_flow_postprocessing
from .guidance_interval import run_guidance_interval
from .jump_your_steps import run_jump_your_steps

Section = Callable[[Path, str, Console], dict]
SECTIONS: dict[str, Section] = {
    "boost_and_skip": run_boost_and_skip,
    "guidance_interval": run_guidance_interval,
    "discrete": run_discrete,
    "jump_your_steps": run_jump_your_steps,
    "flow_postprocessing": run_flow_postprocessing,
}


def run_demo(output: Path, device: str | None = None, sections: dict[str, Section] | None = None) -> dict:
    """Run the sections one after the other; each writes its pictures into the folder and prints its table.

    sections: by default all of `SECTIONS`, functions of the folder, the device and the console that return the
    settings, the numbers and the names of the files. demo.json is written after each section and holds what they
    returned; so does the result.
    """
    device = device or best_device()
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    result = {"version": __version__, "device": device, "torch_threads": torch.get_num_threads()}
    for name, run in (SECTIONS if sections is None else sections).items():
        result[name] = run(output, device, console)
        (output / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
        console.print("wrote " + ", ".join(str(output / file) for file in result[name]["files"]))
    return result
