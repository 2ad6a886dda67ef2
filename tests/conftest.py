"""What every run of the tests has in common: threads, caches, selections of tests, and which skips CI accepts.

Read before any test module, so that the environment is set before torch is imported.
"""

import functools
import inspect
import os
import re
import sys
import tempfile

import pytest

# Some containers ask for no bytecode: each worker, and all that a test starts, would compile everything anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Workers share the cores, so each computes on one thread, and what a test starts inherits it.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    # diffusers copies the files of custom pipelines there, always under the same names.
    modules = tempfile.TemporaryDirectory(prefix=f"diffusers-ext-modules-{worker}-")
    os.environ["HF_MODULES_CACHE"] = modules.name


def pytest_xdist_auto_num_workers():
    """Of `-n logical`: with more than a thread each, workers would wait for each other's."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (os.cpu_count() or 1) // int(threads)) if threads.isdigit() and int(threads) > 1 else None


# Selections of tests, none of which anyone has to keep


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the first case of every fast test that starts no process")


COMPARES = re.compile(r"assert_close|assert_allclose|approx\(")
STARTS = re.compile(r"(run|start)_fresh|(run_on|start)_two|subprocess|torch\.compile|check_loaded")
FIXTURES = {"world", "closing_line"}  # which start processes


source_of = functools.cache(inspect.getsource)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config, items):
    first = {}
    for item in items:
        source = source_of(item.function)
        if STARTS.search(source) or FIXTURES.intersection(item.fixturenames):
            continue
        if COMPARES.search(source):
            item.add_marker("numeric")
        if not item.get_closest_marker("slow"):
            first.setdefault(item.nodeid.split("[")[0], item)
    if config.getoption("--quick"):
        kept = set(first.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


@pytest.hookimpl(tryfirst=True)  # before fixtures draw
def pytest_runtest_setup():
    """What draws without a generator draws the same numbers, whatever ran before in the worker."""
    import numpy as np  # both after the environment is set
    import torch

    torch.manual_seed(0)
    np.random.seed(0)


# In CI, whose versions are pinned and all there, a test is skipped only where it does not apply: anything else, an old
# version or a package that is missing, is an error.

ACCEPTED = re.compile(
    "no browser on PATH|has no classes|has no callback|has no guidance scale or no callback"
    "|takes no prompt, or draws one sample for each|UNets have no cache"
    "|no number shows its layout|refused at attach|it fails for images in Modular Diffusers|a weight for each frame"
    "|is not written|as those of earlier versions"
)


def checked(report):
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    if os.environ.get("CI") == "true" and reason and not hasattr(report, "wasxfail") and not ACCEPTED.search(reason):
        report.outcome, report.longrepr = "failed", f"CI must not skip this: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return checked((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return checked((yield))
