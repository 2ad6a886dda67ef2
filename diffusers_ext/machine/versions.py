"""What this machine offers: versions, devices, attention backends, shipped models."""

import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..model_names import shipped_models

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "xformers",
    "faiss-cpu",
    "scikit-learn",
    "matplotlib",
)


def package_versions() -> dict[str, str | None]:
    """Version of each package that diffusers_ext uses; None where it is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "diffusers_ext": __version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def best_device() -> str:
    """The torch device to use when none is asked for: cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str) -> str:
    """The name of a device that torch has here.

    Raises:
        ValueError: for any other, with those that it has.
    """
    here = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        here += [kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in here:
        raise ValueError(f"device must be {' or '.join(here)} on this machine, got {name!r}")
    return name


def devices() -> list[str]:
    """Every device that torch sees here, one line each."""
    lines = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        lines.append("mps")
    return lines


def attention_backends(device: str) -> list[str]:
    """Names of diffusers' attention backends that compute on this device, found by computing with each.

    Backends that would fetch a kernel from the Hub are not tried.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    dtype = torch.float32 if device == "cpu" else torch.float16
    query = torch.randn(1, 16, 2, 64, device=device, dtype=dtype)  # (batch, sequence, heads, channels)
    usable = []
    for backend in AttentionBackendName:
        if "hub" in backend.value:
            continue
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dispatch_attention_fn(query, query, query, backend=backend)
        except Exception:  # each backend says in its own way that it cannot run here
            continue
        usable.append(backend.value)
    return usable


def print_checks(device: str) -> None:
    """Try everything in `check` on a device, with a line for each while it goes on, then print the table."""
    from .check import check_devices

    console, table = (
        Console(),
        Table("tried", "result", "seconds", "reason", title=f"on {device}", title_justify="left"),
    )
    with console.status("starting") as status:
        for outcome in check_devices(device):
            status.update(f"{outcome.capability}: {outcome.result}")
            table.add_row(outcome.capability, outcome.result, f"{outcome.seconds:.1f}", outcome.reason)
    console.print(", ".join(f"{name} {found}" for name, found in package_versions().items() if found))
    console.print(*devices(), sep="\n")
    console.print(table)


def print_info() -> None:
    """Print all of the above."""
    console = Console()
    table = Table("package", "version", title="versions", title_justify="left")
    for name, found in package_versions().items():
        table.add_row(name, found or "not installed")
    console.print(table)
    console.print("[bold]devices[/bold]\n  " + "\n  ".join(devices()))
    device = best_device()
    console.print(f"[bold]attention backends on {device}[/bold]\n  " + ", ".join(attention_backends(device)))
    shipped = shipped_models()
    console.print("[bold]shipped models[/bold]\n  " + "\n  ".join(f"{name}: {path}" for name, path in shipped.items()))
