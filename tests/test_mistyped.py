"""What everyone mistypes, and what machines lack, is one line that says what is allowed, from every command."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import SafetensorError

from diffusers_ext import cli
from diffusers_ext.cli.options import Device, Model
from diffusers_ext.machine import interruptions as room
from diffusers_ext.machine.versions import check_device
from diffusers_ext.runs.files import naming, write_json
from diffusers_ext.shipped import check_name, load_pipeline

SAMPLE = ("sample", "mnist-unet", "--num-samples", 1, "--num-inference-steps", 1, "--output", "out")
TABLES = ("optimize-timesteps", "countdown-sedd", "--output", "out", "--data")
TUNE = ("tune-interval", "mnist-unet", "--output", "out")
TRAIN = ("train-postprocessing", "--base", "mnist-unet", "--real", "folder", "--output", "out")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("hello")


def refused(*arguments) -> str:
    """The one line of a command that ends badly."""
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), (result.output, result.exception)
    (line,) = result.output.strip().splitlines()  # until version 14.3 rich's bars leave an empty one
    assert line.startswith("Error: ")
    return line


def leaves(group=cli.main):
    for command in group.commands.values():
        yield from leaves(command) if isinstance(command, click.Group) else [command]


def test_every_device_and_model_is_looked_at_before_anything_is_loaded():
    given = {(command.name, option.name): option.type for command in leaves() for option in command.params}
    assert all(isinstance(kind, Device) for (_, name), kind in given.items() if name == "device")
    models = {command: kind for (command, name), kind in given.items() if name in ("model", "base")}
    assert {command for command, kind in models.items() if not isinstance(kind, Model)} == {"export"}  # or a pipeline


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps:7", "cpu:1", "", "meta", "cuda:x"])
def test_a_device_that_is_not_here(name):
    assert check_device("cpu") == "cpu"
    for command in (
        SAMPLE, (*TABLES, "countdown"), TUNE, TRAIN, ("demo",), ("app",), ("info", "--check"),
        ("evaluate", "folder", "--reference", "folder"), ("upsample", "org/model", "folder", "--output", "out"),
    ):  # fmt: skip
        line = refused(*command, "--device", name)
        assert "'--device': device must be cpu" in line and repr(name) in line
    assert not os.path.exists("out")


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert "device must be cpu on this machine, got 'cuda'" in refused(*SAMPLE, "--device", "cuda")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: type("Kind", (), {"type": "cuda"}))
    assert check_device("cuda") == "cuda" and check_device("cuda:1") == "cuda:1"
    assert "must be cpu or cuda or cuda:0 or cuda:1 on" in refused(*SAMPLE, "--device", "cuda:2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist-unett", "did you mean mnist-unet?"),
        ("MNIST-EDM2", "did you mean mnist-edm2?"),
        ("countdown", "did you mean countdown-sedd?"),
        ("missing", "is no folder, no Hub id (owner/name) and none of countdown-sedd"),
        ("./missing", "is no folder"),
        ("/missing/model", "is no folder"),
        ("file", "is a file, not a folder"),
        ("", "model '' is no folder"),
    ],
)
def test_a_model_that_is_none(name, message):
    for before, after in (
        (("sample",), SAMPLE[2:]),
        (("optimize-timesteps",), (*TABLES[2:], "countdown")),
        (("tune-interval",), TUNE[2:]),
        (("upsample",), ("folder", "--output", "out")),
        (("train-postprocessing", "--base"), TRAIN[3:]),
        (("export",), ("out",)),
    ):
        assert message in refused(*before, name, *after)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pipeline(name)


def test_names_that_may_be_models():
    for name in ("mnist-unet", "folder", "org/mnist-unett", "a.b_c/d-e.f"):
        check_name(name)


@pytest.mark.parametrize("off", [False, True])
def test_a_hub_that_is_not_reached_is_asked_once(monkeypatch, off):
    """Libraries would wait and ask again, five times."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", off)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    message = "downloads are off" if off else "the Hub is not reached"
    for name in ("a", "b"):
        np.savez(f"{name}.npz", arr_0=np.zeros((2, 28, 28, 1), np.uint8))
    evaluate = ("evaluate", "a.npz", "--reference", "b.npz", "--metric", "frechet", "--features", "dinov2")
    for command in (
        ("sample", "org/no-such-model", *SAMPLE[2:]), (*TUNE, "--features", "dinov2", "--features-model", "org/none"),
        ("train-postprocessing", "--base", "mnist-unet", "--real", "a.npz", "--output", "out"),
        ("convert", "sedd", "org/none", "out"), (*evaluate, "--features-model", "org/none"),
        ("export", "org/none", "out"),
    ):  # fmt: skip
        assert message in refused(*command)
    assert "the Hub is not reached" in refused("export", "mnist-unet", "out", "--push-to-hub", "me/it")
    assert not os.path.exists("out")


def test_a_push_by_nobody(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", lambda self, name: False)
    monkeypatch.setattr("diffusers_ext.hub.push.get_token", lambda: None)
    assert "nobody is logged in" in refused("export", "mnist-unet", "out", "--push-to-hub", "me/it")
    assert not os.path.exists("out")


@pytest.mark.parametrize("suffix", ["npz", "npy", "txt"])
def test_data_that_is_cut_is_told_before_the_model_is_loaded(suffix, monkeypatch):
    monkeypatch.setattr("diffusers_ext.cli.loading.load_on_processes", lambda *given: pytest.fail("it loads"))
    np.savez("whole.npz", tokens=np.zeros((4, 256), int))
    np.save("whole.npy", np.zeros((4, 256), int))
    Path("whole.txt").write_bytes(b"\xff\xfe\xfa\xfb")
    whole = Path(f"whole.{suffix}").read_bytes()
    for length in {len(whole) // 2, 1} if suffix == "txt" else {len(whole) // 2, 5, 0}:
        Path(f"cut.{suffix}").write_bytes(whole[:length])
        assert f"data 'cut.{suffix}' cannot be read; is it whole?" in refused(*TABLES, f"cut.{suffix}")
    assert "No such file or directory: 'missing" in refused(*TABLES, f"missing.{suffix}")
    assert 'must be an .npz, .npy or .txt file or "countdown"' in refused(*TABLES, "folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--foo",), "No such option '--foo'"),
        (("sampel",), "No such command 'sampel'"),
        (("sample",), "Missing argument 'MODEL'"),
        (("sample", "mnist-unet"), "Missing option '--output'"),
        ((*SAMPLE, "--dtype", "foo"), "'float32', 'float16', 'bfloat16'"),
        ((*SAMPLE, "--seed", "-1"), "'--seed'"),
        ((*SAMPLE, "--seed", 10**20), "'--seed'"),
        ((*SAMPLE, "--gamma", "nan"), "nan is not finite"),
        ((*SAMPLE[:-1], "file"), "is a file"),
        ((*SAMPLE[:-1], "file/out"), "Not a directory: '"),
        ((*SAMPLE, "--prompts", "folder"), "is a directory"),
        ((*SAMPLE, "--prompts", "missing"), "does not exist"),
        ((*TRAIN, "--ema-decay", 2), "'--ema-decay'"),
        ((*TRAIN, "--learning-rate", "inf"), "inf is not finite"),
        (("evaluate", "missing", "--reference", "folder"), "no such file or folder"),
        (("evaluate", "file", "--reference", "folder"), "neither a folder of images"),
        (("convert", "edm2", "missing", "out"), "does not exist"),
        (("convert", "sedd", "file", "out"), "is a file"),
        (("convert", "guided-diffusion", "folder", "out"), "is a directory"),
        (("app", "--port", 0), "1<=x<=65535"),
    ],
)
def test_one_line(arguments, message):
    assert message in refused(*arguments)


def test_no_arguments_are_help():
    result = CliRunner().invoke(cli.main, [])
    assert "Commands:" in result.output and len(result.output.splitlines()) > 10


FULL = [
    (OSError(errno.ENOSPC, "full"), "No space left on device"),
    (OSError(errno.EDQUOT, "full"), os.strerror(errno.EDQUOT)),
    (OSError(errno.EROFS, "read-only"), "Read-only file system"),
    (SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), "No space left on device"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 192 vs 80"), "No space left on device"),
]


@pytest.mark.parametrize(("error", "message"), FULL)
def test_a_full_disk_is_told_with_the_path(error, message, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise error

    with pytest.raises(OSError, match=message) as told, naming(tmp_path / "here"):
        fail()
    assert told.value.filename == str(tmp_path / "here")
    with pytest.raises(OSError, match=message) as told, naming(tmp_path / "around"), naming(tmp_path / "here"):
        fail()
    assert told.value.filename == str(tmp_path / "here")
    monkeypatch.setattr("diffusers.DiffusionPipeline.save_pretrained", fail)
    line = refused("export", "mnist-unet", "out")
    assert message in line and str(tmp_path / "out") in line and not os.path.exists("out")
    monkeypatch.setattr("diffusers_ext.runs.files.os.fsync", fail)
    with pytest.raises(OSError, match=message) as told:
        write_json(tmp_path / "a.json", {})
    assert told.value.filename == str(tmp_path / "a.json")


def test_other_errors_keep_what_they_are():
    for error in (RuntimeError("a bug"), KeyError(3), OSError("in words"), OSError(errno.ENOENT, "none", "there")):
        with pytest.raises(type(error)) as told, naming("here"):
            raise error
        assert told.value is error


def test_what_libraries_raise_for_bad_input_is_one_line(monkeypatch):
    for error in (EOFError(), MemoryError("of 2 GB\nin all"), click.FileError("a", "b")):

        def fail(error=error):
            raise error

        monkeypatch.setattr("diffusers_ext.machine.versions.print_info", fail)
        assert type(error).__name__ in (line := refused("info")) or "of 2 GB in all" in line or "'a': b" in line
    monkeypatch.setattr("diffusers_ext.machine.versions.print_info", lambda: {}["a bug of ours"])
    assert isinstance(CliRunner().invoke(cli.main, ["info"]).exception, KeyError)


# Ctrl-C


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (["-m", "diffusers_ext.cli", "sample", "mnist-unet", "--output", "out"], (130, "Aborted!\n")),
        (["diffusers-ext", "sample", "mnist-unet", "--output", "out"], (130, "Aborted!\n")),
        (["-c", "import diffusers_ext, diffusers"], (-signal.SIGINT, None)),  # of other programs it is not ours
    ],
    ids=["module", "script", "library"],
)
def test_ctrl_c_while_importing(start, expected, tmp_path):
    (tmp_path / "diffusers.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "diffusers-ext").write_text("from diffusers_ext.cli import main\nmain()\n")
    paths = [str(tmp_path), os.path.dirname(os.path.dirname(cli.__path__[0]))]
    running = subprocess.Popen(
        [sys.executable, *start], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )  # fmt: skip
    assert running.stdout.readline() == "importing\n"
    running.send_signal(signal.SIGINT)
    code, told = running.wait(60), running.stderr.read()
    assert (code, told) == expected or (expected[1] is None and code == expected[0] and "KeyboardInterrupt" in told)


def test_a_second_ctrl_c_and_one_that_would_be_forgotten_end_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(room, "end_at_once", lambda *_: ended.append(1))

    class Gone:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    for again in (lambda: signal.raise_signal(signal.SIGINT), lambda: None):
        with pytest.raises(KeyboardInterrupt), room.interruptions() as came:
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                again()
        assert signal.SIGINT in came
    assert len(ended) == 1
    with room.interruptions():
        Gone()
    assert len(ended) == 2
