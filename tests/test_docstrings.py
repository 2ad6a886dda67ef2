"""Every public name has a docstring, which says what is raised and what shapes tensors have; read from the sources.

Docstrings are in Google's format, which `make docs` makes lists of: an entry for each parameter of what is exported.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import click
import pytest

import diffusers_ext
from diffusers_ext.cli import main

ROOT = Path(__file__).parent.parent
PACKAGES = (
    *ROOT.glob("diffusers_ext/**/__init__.py"),
    ROOT / "pipelines/__init__.py",
    ROOT / "schedulers/__init__.py",
)
FILES = [path for folder in ("diffusers_ext", "pipelines", "schedulers") for path in ROOT.glob(f"{folder}/**/*.py")]
# Modules whose names are imported from them: all are public but those with an underscore.
ROOMS = (
    "boost",
    "comparing",
    "discrete",
    "evaluation",
    "flow",
    "guidance",
    "jump_your_steps",
    "machine",
    "runs",
    "sampling",
)
FOLDERS = ("diffusers_ext", *(f"diffusers_ext/{room}" for room in ROOMS), "pipelines")
WORKSHOP = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
# "(batch, 3)", "(n,)", "(batch ...)", or in words.
SHAPE = re.compile(r"\(\)|\([^()]*,[^()]*\)|\bshape|\bscalar|\bone a sample")
Definition = ast.FunctionDef | ast.ClassDef


class Public(NamedTuple):
    """A public function, class or method. owner: the class that a method belongs to."""

    path: Path
    node: Definition
    owner: ast.ClassDef | None = None

    def __str__(self):
        name = f"{self.owner.name}.{self.node.name}" if self.owner else self.node.name
        return f"{self.path.relative_to(ROOT)}:{self.node.lineno} {name}"

    @property
    def doc(self) -> str:
        """Its docstring; of a constructor, and of the call of a class, that of the class as well. A method that takes
        over the docstring of the one that it wraps is documented by that."""
        decorators = map(ast.unparse, self.node.decorator_list)
        if wrapped := [name for name in decorators if name.startswith("functools.wraps")]:
            return wrapped[0]
        own = ast.get_docstring(self.node) or ""
        shared = self.node.name in ("__init__", "__call__", "forward", "__post_init__")
        return f"{own} {ast.get_docstring(self.owner) or ''}" if self.owner and shared else own


def exported(path: Path) -> set[str]:
    """The names in the __all__ of a package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign | ast.AugAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == "__all__":
                names |= {element.value for element in node.value.elts if isinstance(element, ast.Constant)}
    return names


def definitions(path: Path) -> list[Definition]:
    return [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, Definition)]


def exports() -> set[str]:
    """All that packages export, and the classes here that exported ones take methods from."""
    names = set(diffusers_ext.__all__).union(*map(exported, PACKAGES))
    classes = {node.name: node for path in FILES for node in definitions(path) if isinstance(node, ast.ClassDef)}
    pending = sorted(names & classes.keys())
    while pending:
        parents = classes.keys() & set(map(ast.unparse, classes[pending.pop()].bases))
        pending += parents - names
        names |= parents
    return names


EXPORTS = exports()


def public_names() -> list[Public]:
    found = []
    for path in FILES:
        for node in definitions(path):
            if node.name not in EXPORTS and (path not in WORKSHOP or node.name.startswith("_")):
                continue
            found.append(Public(path, node))
            if isinstance(node, ast.ClassDef):
                methods = [member for member in node.body if isinstance(member, ast.FunctionDef)]
                called = {"__init__", "__call__", "__post_init__"}
                found += [Public(path, m, node) for m in methods if not m.name.startswith("_") or m.name in called]
    return found


PUBLIC = public_names()


def raises_value_error(node: Definition) -> bool:
    """Whether a function's own statements, not those of functions inside it, raise a ValueError."""
    pending = list(ast.iter_child_nodes(node))
    while pending:
        one = pending.pop()
        if isinstance(one, ast.Raise) and one.exc is not None and ast.unparse(one.exc).startswith("ValueError"):
            return True
        if not isinstance(one, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            pending += ast.iter_child_nodes(one)
    return False


def takes_tensors(node: Definition) -> list[str]:
    """Parameters that are annotated as tensors or arrays."""
    if not isinstance(node, ast.FunctionDef):
        return []
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    annotated = [(one.arg, ast.unparse(one.annotation)) for one in arguments if one.annotation is not None]
    kinds = re.compile(r"\b(torch\.(\w*)Tensor|np\.ndarray)\b")
    return [name for name, kind in annotated if kinds.search(kind) and "Callable" not in kind and "dict" not in kind]


def is_outside(one: Public) -> bool:
    """Whether no entries are asked for: a constructor's are in the docstring of its class, a command's in its help."""
    is_command = one.path.relative_to(ROOT).parts[1] in ("cli", "app")
    return is_command or one.node.name in ("__init__", "__post_init__") or one.doc.startswith("functools.wraps")


def parameters(one: Public) -> list[str]:
    """What a function takes, with its stars, or the constructor of a class; of a dataclass or an output its fields."""
    node = one.node
    if isinstance(node, ast.ClassDef):
        constructor = [member for member in node.body if getattr(member, "name", "") == "__init__"]
        if not constructor:
            kinds = " ".join(map(ast.unparse, [*node.bases, *node.decorator_list]))
            fields = [member for member in node.body if isinstance(member, ast.AnnAssign)]
            return [field.target.id for field in fields if re.search("Output|Tuple|dataclass", kinds)]
        node = constructor[0]
    taken = node.args
    names = [argument.arg for argument in (*taken.posonlyargs, *taken.args)]
    names += [f"*{taken.vararg.arg}"] if taken.vararg else []
    names += [argument.arg for argument in taken.kwonlyargs]
    names += [f"**{taken.kwarg.arg}"] if taken.kwarg else []
    is_bound = node is not one.node or (one.owner and "staticmethod" not in map(ast.unparse, node.decorator_list))
    return names[1:] if is_bound else names


def entries(doc: str, *titles: str) -> list[str]:
    """Names that the sections of a docstring have an entry for, in order."""
    sections = re.findall(rf"^(?:{'|'.join(titles)}):\n((?: {{4}}.*\n|\n)+)", f"{doc}\n", re.MULTILINE)
    return [name for section in sections for name in re.findall(r"^ {4}(\S+): \S", section, re.MULTILINE)]


def documented(one: Public) -> list[str]:
    """What the docstring has an entry for; the fields of a class without a constructor are Attributes."""
    doc = ast.get_docstring(one.node) or ""
    return entries(doc, "Args") or entries(doc, "Attributes")


def test_the_names_are_found():
    names = {str(one).split(" ")[1] for one in PUBLIC}
    assert len(names) > 350
    assert {"DiscreteDiffusionPipeline.__call__", "EDMHeunScheduler.step", "optimize_timesteps", "PrecisionRecall",
            "ClassifierGuidance.forward", "TableDiscreteDDIMScheduler", "convert_edm2", "sample_to_folder",
            "likelihood_bound", "IntervalGuidance", "image_tensor", "Grid.step_costs"} <= names  # fmt: skip


def test_every_public_name_has_a_docstring():
    bare = [one for one in PUBLIC if not one.doc.strip()]
    assert not bare, "\n".join(map(str, bare))


def test_every_parameter_has_an_entry():
    """Of what is exported, in the order of the signature; classes may add entries to those of a parent."""
    asked = [one for one in PUBLIC if (one.owner or one.node).name in EXPORTS and not is_outside(one)]
    assert {"add_noise_by_count", "set_state", "run"} <= {one.node.name for one in asked}  # of parents
    wrong = [f"{one}: {parameters(one)} has {documented(one)}" for one in asked
             if parameters(one) and documented(one) != parameters(one)]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_what_is_raised_has_an_entry():
    """No sentence on an error, which would not be listed."""
    prose = [
        one for one in PUBLIC if re.search(r"\bRaises\s+\w*(Error|Exception)\b", ast.get_docstring(one.node) or "")
    ]
    assert not prose, "\n".join(map(str, prose))


def test_every_module_says_what_it_is():
    bare = [
        path for path in FILES if path.name != "__main__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not bare


def untyped(node: ast.FunctionDef, owner: ast.ClassDef | None) -> list[str]:
    """Its parameters without an annotation, but for self and cls and what is passed on with stars."""
    taken = [*node.args.posonlyargs, *node.args.args]
    if owner is not None and "staticmethod" not in map(ast.unparse, node.decorator_list):
        taken = taken[1:]
    return [argument.arg for argument in (*taken, *node.args.kwonlyargs) if argument.annotation is None]


def test_every_parameter_of_a_public_function_has_a_type():
    """Also where the module is not for users; ruff asks for what is returned. Commands have click's types."""
    bare = []
    for path in FILES:
        if path.parent.name == "cli":
            continue
        public = [node for node in definitions(path) if not node.name.startswith("_")]
        found = [(node, None) for node in public if isinstance(node, ast.FunctionDef)]
        for owner in (node for node in public if isinstance(node, ast.ClassDef)):
            found += [(member, owner) for member in owner.body
                      if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef)
                      and (not member.name.startswith("_") or member.name.startswith("__"))]  # fmt: skip
        bare += [
            f"{Public(path, node, owner)}: {untyped(node, owner)}" for node, owner in found if untyped(node, owner)
        ]
    assert not bare, "\n".join(bare)


def test_errors_are_named_where_they_are_raised():
    """A constructor's may be named in the docstring of its class."""
    silent = [one for one in PUBLIC if raises_value_error(one.node) and "ValueError" not in one.doc]
    assert not silent, "\n".join(map(str, silent))


def test_tensors_have_shapes():
    """Where a public function takes tensors, its docstring has shapes, or that of the class whose call it is."""
    silent = [f"{one}: {takes_tensors(one.node)}" for one in PUBLIC
              if takes_tensors(one.node) and not SHAPE.search(one.doc)]  # fmt: skip
    assert not silent, "\n".join(silent)


def commands(group: click.Group, name: str = "diffusers-ext") -> list[tuple[str, click.Command]]:
    found = []
    for key, command in group.commands.items():
        found += commands(command, f"{name} {key}") if isinstance(command, click.Group) else []
        found.append((f"{name} {key}", command))
    return found


@pytest.mark.parametrize(("name", "command"), commands(main))
def test_every_command_says_what_it_does(name, command):
    """And so does every option that is not told by its name, its default and its type."""
    assert command.help and len(command.help.split(".")[0]) > 10, name
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help or parameter.show_default or parameter.is_flag, f"{name} {parameter.opts}"


def test_the_checks_see_what_is_missing():
    tree = ast.parse(
        '''
def plain(x: torch.Tensor): ...
def raising(n):
    """Does it."""
    if n:
        raise ValueError("n")
def inner(x: np.ndarray | None = None):
    """x: (batch, 3)."""
    def deeper():
        raise ValueError
def listed(a, /, b, *c, d=1, **e):
    """Does it.

    Args:
        a: the first,
            and more: of it.
        b: the second.
        *c: others.

        **e: further ones.

    Returns:
        d: no parameter.
    """
class Box:
    """A box.

    Args:
        size: its own.
    """
    def __init__(self, size): ...
    def of(self, size): ...
'''
    ).body
    plain, raising, inner, listed, box = (Public(ROOT / "x.py", node) for node in tree)
    assert parameters(listed) == ["a", "b", "*c", "d", "**e"] and documented(listed) == ["a", "b", "*c", "**e"]
    assert untyped(listed.node, None) == ["a", "b", "d"] and untyped(box.node.body[2], box.node) == ["size"]
    assert parameters(box) == documented(box) == ["size"]
    assert parameters(Public(ROOT / "x.py", box.node.body[2], box.node)) == ["size"]
    assert not plain.doc and takes_tensors(plain.node) == ["x"]
    assert raises_value_error(raising.node) and "ValueError" not in raising.doc
    assert not raises_value_error(inner.node) and takes_tensors(inner.node) == ["x"] and SHAPE.search(inner.doc)
