"""The suite's own rules: what conftest.py selects, and which skips CI accepts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.parametrize("case", range(3))
def test_number(case):
    assert case == pytest.approx(case)

@pytest.mark.slow
def test_slow():
    pass

def test_word():
    pass

@pytest.mark.parametrize("reason", ["has no classes", "needs torch 2.7"])
def test_skipped(reason):
    pytest.skip(reason)

@pytest.mark.xfail
def test_expected():
    raise ValueError
"""


@pytest.fixture
def closing_line(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(Path(__file__).parent)

    def run(*options: str, ci: str = "") -> str:
        command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", os.devnull, "--rootdir", str(tmp_path)]
        command += ["-p", "no:cacheprovider", "-W", "ignore", *options, str(tmp_path / "test_some.py")]
        done = subprocess.run(command, env={**environment, "CI": ci}, capture_output=True, text=True, timeout=120)
        return done.stdout.strip().splitlines()[-1].strip("= ").split(" in ")[0]

    return run


def test_selections(closing_line):
    assert closing_line() == "5 passed, 2 skipped, 1 xfailed"
    assert closing_line("-m", "numeric") == "3 passed, 5 deselected"
    assert closing_line("--quick") == "2 passed, 1 skipped, 4 deselected, 1 xfailed"


def test_ci_skips_nothing_that_applies(closing_line):
    assert closing_line(ci="true") == "1 failed, 5 passed, 1 skipped, 1 xfailed"
