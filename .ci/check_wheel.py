"""Check a built wheel: what it holds, its metadata, and that it imports from outside the checkout.

    python .ci/check_wheel.py dist/diffusers_ext-*.whl

Run with a Python that has the dependencies. The wheel itself is installed, without them, into a temporary folder.
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.metadata import ExceptionGroup, Metadata

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "diffusers_ext": "diffusers_ext",
    "pipelines": "diffusers_ext/pipelines",
    "schedulers": "diffusers_ext/schedulers",
}
REQUIRED = ("diffusers_ext/__init__.py", "diffusers_ext/pipelines/__init__.py", "diffusers_ext/schedulers/__init__.py")
PROBE = """
import json, diffusers_ext, diffusers_ext.pipelines, diffusers_ext.schedulers
from importlib.metadata import distribution
modules = diffusers_ext, diffusers_ext.pipelines, diffusers_ext.schedulers
scripts = [entry.name for entry in distribution("diffusers_ext").entry_points if entry.group == "console_scripts"]
found = {"files": [m.__file__ for m in modules], "path": list(diffusers_ext.__path__), "scripts": scripts}
found["versions"] = [diffusers_ext.__version__, distribution("diffusers_ext").version]
print(json.dumps(found))
"""


def source_files() -> list[str]:
    """What git tracks, or would add; without git, every file that is no bytecode."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *SOURCES]
    if (ROOT / ".git").exists():
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
        return [name for name in listed if (ROOT / name).is_file()]
    found = (path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.is_file())
    return [path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts]


def expected_files() -> set[str]:
    """Where each file of the three source folders belongs in the wheel."""
    moved = (name.split("/", 1) for name in source_files())
    return {f"{SOURCES[folder]}/{rest}" for folder, rest in moved}


def content_errors(names: list[str], expected: set[str]) -> list[str]:
    """What is wrong with the wheel's list of files; empty if nothing is."""
    files = {name for name in names if not name.endswith("/")}
    top = {name.split("/", 1)[0] for name in files}
    dist_info = {name for name in top if name.startswith("diffusers_ext-") and name.endswith(".dist-info")}
    packaged = {name for name in files if name.startswith("diffusers_ext/")}
    return [
        *(f"top level holds {name}" for name in sorted(top - dist_info - {"diffusers_ext"})),
        *([] if len(dist_info) == 1 else [f"need one .dist-info, got {sorted(dist_info)}"]),
        *(f"{name} is missing" for name in sorted((expected | set(REQUIRED)) - packaged)),
        *(f"{name} is not in the sources" for name in sorted(packaged - expected)),
    ]


def metadata_errors(metadata: bytes, changelog: str) -> list[str]:
    """What an index would refuse in METADATA, or show wrongly; and a release that the changelog does not have."""
    try:
        known = Metadata.from_email(metadata, validate=True)
    except ExceptionGroup as group:
        return [str(error) for error in group.exceptions]
    released = known.version.is_prerelease or f"## [{known.version}]" in changelog
    return [
        *([] if known.description_content_type == "text/markdown" and known.description else ["no README in it"]),
        *([] if known.requires_python and known.license_expression else ["no Python version or licence in it"]),
        *([] if released else [f"CHANGELOG.md has no heading for {known.version}"]),
    ]


def import_errors(wheel: Path) -> list[str]:
    """Install the wheel alone, import it from another working directory, and see where it came from."""
    with tempfile.TemporaryDirectory() as temporary:
        site = Path(temporary).resolve() / "site"
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel)]
        subprocess.run(pip, check=True)
        environment = {**os.environ, "PYTHONPATH": str(site)}
        probe = [sys.executable, "-c", PROBE]
        done = subprocess.run(probe, cwd=temporary, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        outside = [path for path in (*found["files"], *found["path"]) if not Path(path).resolve().is_relative_to(site)]
        return [
            *(f"{path} does not come from the installed wheel" for path in outside),
            *([] if found["scripts"] == ["diffusers-ext"] else [f"console scripts are {found['scripts']}"]),
            *([] if len(set(found["versions"])) == 1 else [f"versions differ: {found['versions']}"]),
        ]


def main() -> None:
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".whl"):
        raise SystemExit(f"need the path of one wheel, got {sys.argv[1:]}")
    wheel = Path(sys.argv[1]).resolve()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        errors = content_errors(names, expected_files())
        if not errors:
            metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA")))
            errors = metadata_errors(metadata, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    errors = errors or import_errors(wheel)
    if errors:
        raise SystemExit("\n".join([f"{wheel.name} is wrong:", *errors]))
    print(f"{wheel.name}: {len(names)} files, as in the sources; imports outside the checkout")


if __name__ == "__main__":
    main()
