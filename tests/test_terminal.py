"""Commands say what they do, and nothing else: no warnings, bars or notes of the libraries that they use."""

import os
import subprocess
import sys

import pytest
import torch
from diffusers.models import modeling_utils
from diffusers.utils import logging
from transformers.utils import logging as transformers_logging

from diffusers_ext.casting import cast
from diffusers_ext.shipped import load_pipeline

STEPS = ("--num-samples", "2", "--num-inference-steps", "2")
COMMANDS = {
    "help": ("--help",),
    "sample images": ("sample", "mnist-unet", "--output", "images", "--pipeline", "boost-and-skip", *STEPS),
    "sample with EDM2, in half precision": ("sample", "mnist-edm2", "--output", "edm2", "--dtype", "bfloat16", *STEPS),
    "sample tokens": ("sample", "countdown-sedd", "--output", "tokens", *STEPS),
    "export": ("export", "mnist-unet", "export", "--license", "apache-2.0"),
}


def test_commands_are_quiet(tmp_path):
    """In one process, as the first that import what they need; nothing may write to stderr but our own bars."""
    script = f"""
import sys
from diffusers_ext.cli import main
for arguments in {list(map(list, COMMANDS.values()))}:
    main(arguments, standalone_mode=False)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "Warning" not in done.stdout and "Loading" not in done.stdout


@pytest.mark.parametrize("library", [logging, transformers_logging], ids=["diffusers", "transformers"])
def test_bars_are_off_only_while_a_pipeline_is_read(library, capfd):
    before = library.is_progress_bar_enabled()
    library.enable_progress_bar()
    try:
        load_pipeline("mnist-unet")
        assert library.is_progress_bar_enabled() and capfd.readouterr().err == ""
        with pytest.raises(ValueError, match="is no pipeline"):
            load_pipeline("mnist-classifier")
        library.disable_progress_bar()
        load_pipeline("mnist-unet")
        assert not library.is_progress_bar_enabled()
    finally:
        (library.enable_progress_bar if before else library.disable_progress_bar)()


@pytest.mark.parametrize("name", ["mnist-unet", "mnist-edm2"])
def test_casting_says_nothing(name, caplog, monkeypatch):
    monkeypatch.setattr(modeling_utils.logger, "handlers", [caplog.handler])
    pipe = cast(load_pipeline(name), torch.bfloat16, "cpu")
    assert pipe.dtype == torch.bfloat16 and cast(pipe.unet, torch.float32).dtype == torch.float32
    assert not caplog.records
    modeling_utils.logger.warning("another")
    assert {record.getMessage() for record in caplog.records} == {"another"}
