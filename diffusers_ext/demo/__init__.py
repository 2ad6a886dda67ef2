"""`diffusers-ext demo`: each method on the models that ship; pictures, numbers, a report. One file a section."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from .. import __version__
from ..machine.versions import best_device
from ..runs.files import check_folder, naming, write_json
from . import boost_and_skip, discrete, flow_postprocessing, guidance_interval, jump_your_steps
from .boost_and_skip import run_boost_and_skip
from .discrete import run_discrete
from .flow_postprocessing import run_flow_postprocessing
from .guidance_interval import run_guidance_interval
from .jump_your_steps import run_jump_your_steps
from .report import write_report

Section = Callable[[Path, str, Console], dict]
SECTIONS: dict[str, Section] = {
    "boost_and_skip": run_boost_and_skip,
    "guidance_interval": run_guidance_interval,
    "discrete": run_discrete,
    "jump_your_steps": run_jump_your_steps,
    "flow_postprocessing": run_flow_postprocessing,
}

FULL_SECTIONS: dict[str, Section] = {
    "boost_and_skip": partial(run_boost_and_skip, settings=boost_and_skip.FULL),
    "guidance_interval": partial(run_guidance_interval, settings=guidance_interval.FULL),
    "discrete": partial(run_discrete, settings=discrete.FULL),
    "jump_your_steps": partial(run_jump_your_steps, settings=jump_your_steps.FULL),
    "flow_postprocessing": partial(run_flow_postprocessing, settings=flow_postprocessing.FULL),
}


def run_demo(
    output: Path, device: str | None = None, sections: dict[str, Section] | None = None, full: bool = False
) -> dict:
    """Run the sections one after the other; each writes its pictures into the folder and prints its table.

    sections: by default all of `SECTIONS`, functions of the folder, the device and the console that return the
    settings, the numbers, a table in words and the names of the files. full: `FULL_SECTIONS` instead, with more
    samples, steps and rows. demo.json, with what they returned and the seconds of each, and
    report.html are written after each section; so an interrupted demo leaves both. Returns what demo.json holds.

    Raises:
        ValueError: for a folder of something else.
    """
    device = device or best_device()
    console = Console()
    output = check_folder(output, "demo.json")
    output.mkdir(parents=True, exist_ok=True)
    result = {"version": __version__, "device": device, "torch_threads": torch.get_num_threads(), "full": full}
    if sections is None:
        sections = FULL_SECTIONS if full else SECTIONS
    report = output / "report.html"
    for name, run in sections.items():
        started = time.perf_counter()
        with naming(output):
            result[name] = run(output, device, console)
        result[name]["seconds_in_all"] = time.perf_counter() - started
        write_json(output / "demo.json", result)
        write_report(output)
        console.print("wrote " + ", ".join(str(output / file) for file in result[name]["files"]))
    console.print(f"wrote {report}: open it in a browser")
    return result
