"""Who may import whom, read from the sources, so that each file of the lower floors runs alone from the Hub.

schedulers/ and diffusers_ext/models/ know the standard library, torch, numpy, diffusers and their siblings;
pipelines/ transformers as well, and optional libraries inside functions; nobody knows recipes, benchmarks or tests.
"""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from diffusers import DiffusionPipeline

ROOT = Path(__file__).parent.parent
GROUND = {"torch", "numpy", "diffusers"}
OPTIONAL = {"PIL", "torchdiffeq", "accelerate", "torch_xla"}  # in pipelines, inside functions
ABOVE_ALL = {"recipes", "benchmarks", "tests"}


class Import(NamedTuple):
    """One imported module; level counts the leading dots, names what is taken from it, lazy means in a function."""

    module: str
    level: int
    names: tuple[str, ...]
    lazy: bool

    def __str__(self):
        return "." * self.level + self.module

    @property
    def library(self) -> str:
        return self.module.split(".")[0]


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Every import below a node: both statements, and import_module and __import__ of a constant."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, 0, (), lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield Import(node.module or "", node.level, tuple(alias.name for alias in node.names), lazy)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    yield Import(name.lstrip("."), len(name) - len(name.lstrip(".")), (), lazy)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, lazy or inside)


def standalone_errors(source: str, siblings: set[str], libraries: set[str], optional: set[str] = frozenset()):
    """What keeps a file from running alone beside its siblings; libraries and optional: third-party roots."""
    found = list(imports(ast.parse(source)))
    known = libraries | sys.stdlib_module_names
    errors = []
    for one in found:
        if one.level > 1 or (one.level == 1 and one.module not in siblings):
            errors.append(f"{one}: relative imports are `from .name import x`, name one of {sorted(siblings)}")
        elif one.level == 0 and one.library in optional and not one.lazy:
            errors.append(f"{one}: import optional libraries inside the function that needs them")
        elif one.level == 0 and one.library not in known | optional:
            errors.append(f"{one}: allowed are the standard library, {', '.join(sorted(libraries | optional))}")
    # diffusers finds the files to copy with this expression, which also sees docstrings.
    read = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE))
    if ghosts := read - {str(one)[1:] for one in found if one.level}:
        errors.append(f"diffusers would take text for imports of {sorted(ghosts)}")
    return errors


def depth_errors(name: str, sources: dict[str, str]):
    """diffusers copies a local file's siblings, but not their siblings: these must be imported by the file itself."""

    def siblings(stem: str) -> set[str]:
        return {one.module for one in imports(ast.parse(sources[stem])) if one.level == 1 and one.module in sources}

    direct = siblings(name)
    further = {second: first for first in direct for second in siblings(first) - direct - {name}}
    return [f".{second}: needed by .{first}, import it here too" for second, first in sorted(further.items())]


def visible_pipelines(source: str) -> list[str]:
    """Names in a module's namespace that diffusers counts as pipelines of this file; diffusers' own are exempt."""
    names: list[str] = []
    ours: set[str] = set()

    def is_pipeline(node: ast.expr) -> bool:
        return (name := ast.unparse(node).split(".")[-1]).endswith("Pipeline") or name in ours

    def visit(nodes: list[ast.stmt]):
        for node in nodes:
            if isinstance(node, ast.ClassDef) and any(map(is_pipeline, node.bases)):
                names.append(node.name)
                ours.add(node.name)
            elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] != "diffusers"):
                taken = [alias for alias in node.names if alias.name.endswith("Pipeline")]
                names.extend(alias.asname or alias.name for alias in taken)
                ours.update(alias.asname or alias.name for alias in taken)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in ours:
                names.extend(ast.unparse(target) for target in node.targets)
            elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
                for block in ("body", "orelse", "finalbody"):
                    visit(getattr(node, block, []))
                for handler in getattr(node, "handlers", []):
                    visit(handler.body)

    visit(ast.parse(source).body)
    return names


def direction_errors(source: str, package: str):
    """Imports that point upward, and names that exist only in a checkout. package: the file's own, dotted, or ''."""
    errors = []
    for one in imports(ast.parse(source)):
        parents = package.split(".")[: len(package.split(".")) - one.level + 1] if one.level else []
        module = ".".join([*parents, *filter(None, [one.module])])
        for target in [module, *(f"{module}.{name}" for name in one.names)]:
            root, *rest = target.split(".")
            if root in ABOVE_ALL or (root == "diffusers_ext" and rest[:1] and rest[0] in ABOVE_ALL):
                errors.append(f"{one}: nothing imports {', '.join(sorted(ABOVE_ALL))}")
                break
            if root in ("pipelines", "schedulers"):
                errors.append(f"{one}: write diffusers_ext.{target}, the name under which it is installed")
                break
    return errors


LEAVES = ("app", "cli", "demo")  # of the workshop; cli starts the other two


def leaf_errors(source: str, package: str):
    """Imports of a leaf from outside of it. package: the file's own, dotted, or ''."""
    errors, own = [], package.split(".")[1:2]
    for one in imports(ast.parse(source)):
        parents = package.split(".")[: len(package.split(".")) - one.level + 1] if one.level else []
        module = ".".join([*parents, *filter(None, [one.module])])
        for target in [module, *(f"{module}.{name}" for name in one.names)]:
            root, *rest = target.split(".")
            taken = root == "diffusers_ext" and rest[:1] and rest[0] in LEAVES
            if taken and own != rest[:1] and (own != ["cli"] or rest[0] == "cli"):
                errors.append(f"{one}: {rest[0]} is a leaf, which nothing imports")
                break
    return errors


def private_errors(source: str):
    """Underscored modules and names that are taken from diffusers_ext."""
    taken = (one for one in imports(ast.parse(source)) if one.library == "diffusers_ext" or one.level)
    parts = ((one, part) for one in taken for part in [*one.module.split("."), *one.names])
    return [f"{one}: {part} is private" for one, part in parts if part.startswith("_") and not part.endswith("__")]


FOLDERS = {"schedulers": "diffusers_ext.schedulers", "pipelines": "diffusers_ext.pipelines"}
GROUND_FILES = [*ROOT.glob("schedulers/*.py"), *ROOT.glob("diffusers_ext/models/*.py")]
PIPELINE_FILES = list(ROOT.glob("pipelines/*.py"))
OTHER_FILES = [
    path
    for folder in ("diffusers_ext", "recipes", "benchmarks", "tests", "docs")
    for path in ROOT.glob(f"{folder}/**/*.py")
    if "assets" not in path.parts
]
USERS = [path for path in OTHER_FILES if path.relative_to(ROOT).parts[0] in ("recipes", "benchmarks")]


def named(paths):
    return pytest.mark.parametrize("path", [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in sorted(paths)])


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def siblings(path: Path) -> set[str]:
    return {other.stem for other in path.parent.glob("*.py")} - {path.stem, "__init__"}


def package(path: Path) -> str:
    folder = path.relative_to(ROOT).parent
    return FOLDERS.get(folder.as_posix(), ".".join(folder.parts) if folder.parts[0] == "diffusers_ext" else "")


@named(GROUND_FILES)
def test_schedulers_and_models_know_torch_numpy_and_diffusers(path):
    assert standalone_errors(read(path), siblings(path), GROUND) == []


@named(PIPELINE_FILES)
def test_pipelines_know_transformers_as_well(path):
    assert standalone_errors(read(path), siblings(path), GROUND | {"transformers"}, OPTIONAL) == []


@named(path for path in [*GROUND_FILES, *PIPELINE_FILES] if path.name != "__init__.py")
def test_siblings_need_no_further_siblings(path):
    sources = {other.stem: read(other) for other in path.parent.glob("*.py")}
    assert depth_errors(path.stem, sources) == []


@named(path for path in PIPELINE_FILES if path.name != "__init__.py")
def test_a_file_shows_at_most_one_pipeline(path):
    module = vars(importlib.import_module(f"diffusers_ext.pipelines.{path.stem}"))
    classes = {name: value for name, value in module.items() if isinstance(value, type)}
    shown = [name for name, value in classes.items() if issubclass(value, DiffusionPipeline)]
    shown = [name for name in shown if classes[name].__module__.split(".")[0] != "diffusers"]
    assert len(visible_pipelines(read(path))) <= 1
    assert len(shown) <= 1, shown  # as diffusers counts


def test_file_names_are_unique():
    """diffusers copies every custom file into one flat folder, where equal names replace each other."""
    stems = [path.stem for path in [*GROUND_FILES, *PIPELINE_FILES] if path.name != "__init__.py"]
    assert sorted(stems) == sorted(set(stems))
    assert "pipeline" not in stems


@named([*GROUND_FILES, *PIPELINE_FILES, *OTHER_FILES])
def test_nothing_imports_upward(path):
    assert direction_errors(read(path), package(path)) == []


@named(path for path in OTHER_FILES if path.relative_to(ROOT).parts[0] != "tests")
def test_leaves_are_imported_by_nothing(path):
    assert leaf_errors(read(path), package(path)) == []


@named(USERS)
def test_recipes_and_benchmarks_use_public_names(path):
    assert private_errors(read(path)) == []


def test_every_floor_is_looked_at():
    """An empty parametrization passes silently."""
    assert (ROOT / "schedulers/__init__.py") in GROUND_FILES
    assert (ROOT / "diffusers_ext/models/__init__.py") in GROUND_FILES
    assert (ROOT / "pipelines/__init__.py") in PIPELINE_FILES
    assert Path(__file__) in OTHER_FILES


# The rules themselves, on snippets that they must refuse or let pass.

REFUSED = {
    "import scipy": "scipy: allowed are",
    "from transformers import AutoModel": "transformers: allowed are",
    "def f():\n    import scipy": "scipy: allowed are",
    "import PIL.Image": "PIL.Image: allowed are",
    "import diffusers_ext": "diffusers_ext: allowed are",
    "from diffusers_ext.hub import export_pipeline": "diffusers_ext.hub: allowed are",
    "import importlib\nimportlib.import_module('scipy.stats')": "scipy.stats: allowed are",
    "__import__('scipy')": "scipy: allowed are",
    "try:\n    import xformers\nexcept ImportError:\n    pass": "xformers: allowed are",
    "from ..hub import export_pipeline": "..hub: relative imports are",
    "from . import sibling": ".: relative imports are",
    "from .stranger import x": ".stranger: relative imports are",
    "from .sibling.deeper import x": ".sibling.deeper: relative imports are",
    '"""Use it so:\n\n    from .ghost import x\n"""': "text for imports of ['ghost']",
}
PASSED = [
    "import math\nimport os.path\nfrom collections.abc import Callable",
    "import torch\nimport numpy as np\nimport torch.nn.functional as F\nfrom torch import nn",
    "from diffusers.schedulers.scheduling_utils import SchedulerMixin",
    "from .sibling import x\nfrom .sibling import (\n    y,\n    z,\n)",
]


@pytest.mark.parametrize(("snippet", "message"), REFUSED.items())
def test_ground_floor_rule_refuses(snippet, message):
    (error,) = standalone_errors(snippet, {"sibling"}, GROUND)
    assert message in error


@pytest.mark.parametrize("snippet", PASSED)
def test_ground_floor_rule_passes(snippet):
    assert standalone_errors(snippet, {"sibling"}, GROUND) == []


@pytest.mark.parametrize(
    ("snippet", "message"),
    {
        "from PIL import Image": "PIL: import optional libraries inside",
        "if True:\n    import torchdiffeq": "torchdiffeq: import optional libraries inside",
        "class A:\n    import PIL": "PIL: import optional libraries inside",
        "def f():\n    import scipy": "scipy: allowed are",
        "from diffusers_ext.schedulers import CTMCScheduler": "diffusers_ext.schedulers: allowed are",
        "from ..schedulers.scheduling_ctmc import CTMCScheduler": "relative imports are",
    }.items(),
)
def test_pipeline_rule_refuses(snippet, message):
    (error,) = standalone_errors(snippet, {"sibling"}, GROUND | {"transformers"}, OPTIONAL)
    assert message in error


@pytest.mark.parametrize(
    "snippet",
    [
        "from transformers import CLIPTextModel",
        "def f():\n    from PIL import Image",
        "class A:\n    async def f(self):\n        if True:\n            from torchdiffeq import odeint",
    ],
)
def test_pipeline_rule_passes(snippet):
    assert standalone_errors(snippet, {"sibling"}, GROUND | {"transformers"}, OPTIONAL) == []


def test_depth_rule():
    sources = {"a": "from .b import x", "b": "from .c import x", "c": "import torch"}
    assert depth_errors("a", sources) == [".c: needed by .b, import it here too"]
    assert depth_errors("b", sources) == depth_errors("c", sources) == []
    assert depth_errors("a", {**sources, "a": "from .b import x\nfrom .c import y"}) == []


@pytest.mark.parametrize(
    ("snippet", "names"),
    {
        "class A(DiffusionPipeline): ...": ["A"],
        "class A(diffusers.DiffusionPipeline): ...\nclass B(Mixin): ...": ["A"],
        "class A(DiffusionPipeline): ...\nclass B(A): ...": ["A", "B"],
        "from .base import BasePipeline\nclass A(BasePipeline): ...": ["BasePipeline", "A"],
        "from .base import BasePipeline as Base\nclass A(Base): ...": ["Base", "A"],
        "class A(DiffusionPipeline): ...\nalias = A": ["A", "alias"],
        "if x:\n    class A(DDPMPipeline): ...\nelse:\n    class B(DDPMPipeline): ...": ["A", "B"],
        "try:\n    pass\nexcept E:\n    class A(DDPMPipeline): ...": ["A"],
        "from diffusers import DDPMPipeline\nfrom diffusers.pipelines.dit import DiTPipeline": [],
        "def make():\n    class A(DDPMPipeline): ...": [],
    }.items(),
)
def test_pipelines_are_counted(snippet, names):
    assert visible_pipelines(snippet) == names


@pytest.mark.parametrize(
    ("snippet", "package", "message"),
    [
        ("import recipes.train", "", "nothing imports"),
        ("from recipes import train", "", "nothing imports"),
        ("from .. import recipes", "diffusers_ext.metrics", "nothing imports"),
        ("from ..recipes.train import main", "diffusers_ext.metrics", "nothing imports"),
        ("from . import tests", "diffusers_ext", "nothing imports"),
        ("from diffusers_ext.benchmarks import x", "", "nothing imports"),
        ("from diffusers_ext import benchmarks", "", "nothing imports"),
        ("from pipelines.boost_and_skip import x", "", "write diffusers_ext.pipelines.boost_and_skip"),
        ("def f():\n    import schedulers", "diffusers_ext", "write diffusers_ext.schedulers"),
    ],
)
def test_direction_rule_refuses(snippet, package, message):
    (error,) = direction_errors(snippet, package)
    assert message in error


@pytest.mark.parametrize(
    ("snippet", "package"),
    [
        ("from ..pipelines import BoostAndSkipPipeline", "diffusers_ext.metrics"),
        ("from .schedulers import boost_and_skip", "diffusers_ext"),
        ("import diffusers.pipelines\nfrom diffusers_ext import pipelines, schedulers", ""),
    ],
)
def test_direction_rule_passes(snippet, package):
    assert direction_errors(snippet, package) == []


@pytest.mark.parametrize(
    ("snippet", "package", "leaf"),
    [
        ("from diffusers_ext.cli.options import Steps", "", "cli"),
        ("from diffusers_ext import demo", "", "demo"),
        ("from ..demo.pictures import grid", "diffusers_ext.app", "demo"),
        ("def f():\n    from ..cli import main", "diffusers_ext.demo", "cli"),
        ("from .app import serve", "diffusers_ext", "app"),
    ],
)
def test_leaf_rule_refuses(snippet, package, leaf):
    (error,) = leaf_errors(snippet, package)
    assert f"{leaf} is a leaf" in error


def test_leaf_rule_passes():
    assert leaf_errors("from ..demo import run_demo\nfrom .options import Steps", "diffusers_ext.cli") == []
    assert leaf_errors("from .pictures import grid\nfrom ..sampling import sample_images", "diffusers_ext.demo") == []


def test_private_rule():
    assert private_errors("from diffusers_ext.hub import _with_siblings") == [
        "diffusers_ext.hub: _with_siblings is private"
    ]
    assert private_errors("import diffusers_ext._hidden") == ["diffusers_ext._hidden: _hidden is private"]
    assert private_errors("from diffusers_ext import __version__\nfrom torch import _C") == []
