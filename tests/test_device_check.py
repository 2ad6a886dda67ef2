"""diffusers-ext info --check: what is tried is tried, and nothing that goes wrong stops the rest."""

import signal
import sys

import pytest
import torch
from click.testing import CliRunner

from diffusers_ext.cli import main
from diffusers_ext.machine import check as device_check
from diffusers_ext.machine.check import CHECKS, Outcome, attempt, check_devices

# Ends as told by the first name that it gets, after one good line.
WORKER = """
import json, os, signal, sys, time
def say(name): print(json.dumps({"capability": name, "result": "ok", "seconds": 0.5}), flush=True)
print("a library says hello"); print('{"capability": 3')
for name in sys.argv[1:]:
    if name == "dies": os.kill(os.getpid(), signal.SIGSEGV)
    if name == "leaves": sys.exit(3)
    if name == "hangs": time.sleep(60)
    say(name)
"""


def test_what_runs_on_a_cpu_is_ok():
    outcomes = {name: attempt(name, "cpu") for name in CHECKS if name != "torch.compile, one graph"}
    good = {name for name, outcome in outcomes.items() if outcome.result == "ok"}
    assert {"float32", "bfloat16", "float16", "enable_model_cpu_offload", "attention native"} <= good
    for name in ('device_map="balanced"', "enable_sequential_cpu_offload"):
        assert outcomes[name].result == "not here" and outcomes[name].reason == "needs an accelerator"
    assert outcomes["attention xformers"].result == "not here" and outcomes["attention xformers"].reason
    assert all(outcome.reason for outcome in outcomes.values() if outcome.result != "ok")
    assert not [name for name, outcome in outcomes.items() if outcome.result in ("differs", "crashed")]


def test_attention_matters_to_what_is_compared(monkeypatch):
    """A backend that computes something else is seen."""
    honest = device_check.EDM2UNet2DModel.set_attention_backend

    def spoil(unet, backend):
        with torch.no_grad():
            for module in unet.modules():
                if hasattr(module, "to_qkv"):
                    module.to_qkv.weight.normal_()
        honest(unet, backend)

    monkeypatch.setattr(device_check.EDM2UNet2DModel, "set_attention_backend", spoil)
    outcome = attempt("attention native", "cpu")
    assert outcome.result == "differs" and "samples differ by" in outcome.reason


def test_samples_that_are_not_finite_differ():
    with pytest.raises(device_check.Differs, match="nan"):
        device_check._compare(torch.tensor([float("nan")]), torch.zeros(1), 0.1)


def test_whatever_is_raised_is_an_outcome(monkeypatch):
    def fail(device):
        raise RuntimeError("no such thing on " + device + "\nmore")

    monkeypatch.setitem(CHECKS, "float32", fail)
    outcome = attempt("float32", "mars")
    assert (outcome.result, outcome.reason) == ("not here", "no such thing on mars")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_that_dies_or_hangs_costs_one_capability():
    names = ["first", "dies", "second", "leaves", "hangs", "last"]
    outcomes = list(check_devices("cpu", names, limit=3.0, worker=[sys.executable, "-c", WORKER]))
    assert [outcome.capability for outcome in outcomes] == names
    results = {outcome.capability: outcome.result for outcome in outcomes}
    crashed = {name for name, result in results.items() if result == "crashed"}
    assert crashed == {"dies", "leaves", "hangs"} and results["last"] == "ok"
    reasons = {outcome.capability: outcome.reason for outcome in outcomes}
    assert f"ended with {-signal.SIGSEGV}" in reasons["dies"] and "ended with 3" in reasons["leaves"]


def test_the_command_prints_a_line_each(monkeypatch):
    asked = []

    def outcomes(device):
        asked.append(device)
        return [Outcome("float32", "ok", seconds=1.25), Outcome("attention sage", "not here", "needs a GPU")]

    monkeypatch.setattr(device_check, "check_devices", outcomes)
    result = CliRunner().invoke(main, ["info", "--check", "--device", "cpu"])
    assert result.exit_code == 0 and asked == ["cpu"], result.output
    assert "float32" in result.output and "1.2" in result.output and "needs a GPU" in result.output
    assert CliRunner().invoke(main, ["info", "--device", "cpu"]).exit_code == 2


@pytest.mark.slow
def test_the_real_process_answers():
    (outcome,) = check_devices("cpu", ["attention native"])
    assert outcome.result == "ok", outcome
