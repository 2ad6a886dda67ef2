"""The rules that CI applies to a built wheel, on lists of files that they must refuse; CI builds the real one."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci/check_wheel.py"
INFO = "diffusers_ext-1.0.dist-info/METADATA"


@pytest.fixture(scope="module")
def check_wheel():
    spec = importlib.util.spec_from_file_location("check_wheel", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected(check_wheel):
    return check_wheel.expected_files()


def test_sources_are_mapped_into_the_package(expected):
    assert {
        "diffusers_ext/__init__.py",
        "diffusers_ext/pipelines/boost_and_skip.py",
        "diffusers_ext/schedulers/scheduling_boost_and_skip.py",
        "diffusers_ext/assets/mnist-unet/model_index.json",
    } <= expected
    assert not [name for name in expected if name.endswith(".pyc")]


def test_complete_wheel_passes(check_wheel, expected):
    assert check_wheel.content_errors([*expected, INFO], expected) == []


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("tests/test_cli.py", "top level holds tests"),
        ("pipelines/boost_and_skip.py", "top level holds pipelines"),
        ("setup.py", "top level holds setup.py"),
        ("diffusers_ext-0.9.dist-info/METADATA", "need one .dist-info"),
        ("diffusers_ext/removed.py", "diffusers_ext/removed.py is not in the sources"),
    ],
)
def test_what_does_not_belong_is_refused(check_wheel, expected, added, message):
    (error,) = check_wheel.content_errors([*expected, INFO, added], expected)
    assert message in error


def test_what_is_left_out_is_named(check_wheel, expected):
    for name in expected:
        assert check_wheel.content_errors([*(expected - {name}), INFO], expected) == [f"{name} is missing"]
    assert "diffusers_ext/pipelines/__init__.py is missing" in check_wheel.content_errors([INFO], set())
