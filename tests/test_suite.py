"""The suite's own rules: what conftest.py selects, and which skips CI accepts."""

import os

import pytest
from fresh_process import start_fresh

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
    code = """
import os, sys
for name in [name for name in os.environ if name.startswith("PYTEST")]:
    del os.environ[name]
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""

    def run(*options: str, ci: str = "") -> str:
        words = ["-p", "conftest", "-c", os.devnull, "--rootdir", tmp_path, "-p", "no:cacheprovider", "-W", "ignore"]
        said = tmp_path / "said.log"
        start_fresh(code, *words, *options, tmp_path / "test_some.py", said=said, CI=ci).join()
        return said.read_text().strip().splitlines()[-1].strip("= ").split(" in ")[0]

    return run


def test_selections(closing_line):
    assert closing_line() == "5 passed, 2 skipped, 1 xfailed"
    assert closing_line("-m", "numeric") == "3 passed, 5 deselected"
    assert closing_line("--quick") == "2 passed, 1 skipped, 4 deselected, 1 xfailed"


def test_ci_skips_nothing_that_applies(closing_line):
    assert closing_line(ci="true") == "1 failed, 5 passed, 1 skipped, 1 xfailed"
