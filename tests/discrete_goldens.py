"""Reads the recorded cases of discrete diffusion, and the networks that they were recorded with."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from safetensors.torch import load_file

from diffusers_ext.checkpoints import load_tauldr

GOLDENS = Path(__file__).parent / "goldens"


def golden(case: str) -> SimpleNamespace:
    """config: the case's own; its other entries as attributes; t: its tensors by name."""
    entries = json.loads((GOLDENS / f"{case}.json").read_text())
    return SimpleNamespace(**entries, t=load_file(GOLDENS / f"{case}.safetensors"))


def tauldr_files(folder: Path, config: dict, state: dict, **further) -> tuple[Path, Path]:
    """Write a checkpoint and its configuration as tauLDR does."""
    torch.save({"model": {**state, **further}}, folder / "ckpt.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "ckpt.pt", folder / "config.yaml"


def tauldr_model(folder: Path, case: str, weights: str, **changes):
    """The network of a case; changes replace values of its model configuration."""
    config = golden(case).config
    config["model"].update(changes)
    files = tauldr_files(folder, config, load_file(GOLDENS / f"{weights}.safetensors"))
    return load_tauldr(*files, weights="raw")
