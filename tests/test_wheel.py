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


def test_metadata_that_an_index_refuses_is_named(check_wheel):
    lines = {
        "Metadata-Version": "2.4", "Name": "diffusers_ext", "Version": "0.1.0", "Requires-Python": ">=3.10",
        "License-Expression": "Apache-2.0", "Description-Content-Type": "text/markdown",
    }  # fmt: skip

    def errors(changelog="## [0.1.0]", **changes):
        fields = {**lines, **{name.replace("_", "-"): value for name, value in changes.items()}}
        text = "".join(f"{name}: {value}\n" for name, value in fields.items() if value)
        return check_wheel.metadata_errors(f"{text}\n# README\n".encode(), changelog)

    assert errors() == [] and errors("", Version="0.1.0.dev0") == []
    assert errors("## [Unreleased]") == ["CHANGELOG.md has no heading for 0.1.0"]
    assert errors(License_Expression="of our own") and errors(Requires_Python="3,10") and errors(Version="one")
    assert errors(Requires_Python="") == ["no Python version or licence in it"]
    assert errors(Description_Content_Type="") == ["no README in it"]
