"""How a pipeline guides, read from its source: for a class that is not in the table of layouts.

The source is parsed, never run. A prediction is followed from the call of a network to the statement that splits it,
and to `scheduler.step`.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterator

from diffusers import DiffusionPipeline

from .guidance_layouts import CALLS, Layout
from .rows import Cut  # noqa: F401  what a sibling imports, the file that imports it does as well

UNCONDITIONAL = re.compile(r"uncond|(^|_)(neg|negative|null)(_|\d|$)", re.IGNORECASE)
# Of a split in three, the part with the whole condition: (text, image, uncond), (cond, uncond, img_cond).
WHOLE_CONDITION = re.compile(r"text|^cond$|[^g]_cond$", re.IGNORECASE)
HOW_TO_SAY = (
    'say how it guides: layout="uncond, cond" for one batch whose first half is unconditional, "cond, uncond" for the'
    ' other order, "cond; uncond" for two calls'
)


def propose(cls: type, networks: list[str]) -> Layout | None:
    """The layout that the source of a class shows; None for a class that is not made to guide.

    The class' `__call__`, and the methods that it uses, are parsed; nothing is run.

    Args:
        cls: class of the pipeline.
        networks: names of the components that are called with a timestep.

    Raises:
        ValueError: if the source cannot be read or is ambiguous.
    """
    source = _Source(cls, [name for name in networks if "control" not in name.lower()])
    if problem := source.problem():
        raise ValueError(
            f"{cls.__name__} is not among the pipelines whose guidance is known, and {problem}; {HOW_TO_SAY}"
        )
    if source.splits:
        return source.splits[0][0]
    if source.unconditional:
        return Layout(CALLS, "calls")
    return None


def hands_on_only(cls: type, networks: list[str]) -> bool:
    """Whether the source of a class shows that its predictions go to its scheduler and are used nowhere else."""
    try:
        source = _Source(cls, [name for name in networks if "control" not in name.lower()])
    except ValueError:
        return False
    found = source.splits or source.unclear or source.conditional or source.unconditional
    return bool(found) and not source.leaks


class _Source:
    """What the methods of a class do with the output of its networks.

    splits: (layout, statement) of each split into named parts. unclear: statements that split it in another way.
    conditional, unconditional: (function, statement) of each call of a network whose output is not split.
    """

    def __init__(self, cls: type, networks: list[str]):
        self.cls, self.networks = cls, {f"self.{name}" for name in networks}
        self.functions = {name: _tree(cls, function) for name, function in _methods(cls).items()}
        self.splits: list[tuple[Layout, ast.stmt]] = []
        self.unclear: list[ast.stmt] = []
        self.leaks: list[ast.stmt] = []
        self.conditional: list[tuple[str, ast.stmt]] = []
        self.unconditional: list[tuple[str, ast.stmt]] = []
        self.combining: set[str] = set()  # methods that make both predictions themselves
        waiting = True
        while waiting:  # a method that returns what a network predicted is called like a network
            self.splits, self.unclear, self.conditional, self.unconditional, self.leaks = [], [], [], [], []
            found = {f"self.{name}" for name in self.functions if self._read(name)}
            waiting = not found <= self.networks
            self.networks |= found

    def problem(self) -> str:
        """Why nothing can be proposed; empty if something can, or if nothing guides."""
        if self.unclear:
            return f"its source splits a prediction in unclear parts: `{ast.unparse(self.unclear[0])}`"
        if self.leaks and (self.splits or self.unconditional):
            return (
                "its source uses its predictions besides handing them to scheduler.step:"
                f" `{ast.unparse(self.leaks[0])[:120]}`"
            )
        layouts = sorted({str(layout) for layout, _ in self.splits})
        if len(layouts) > 1:
            return f"its source shows several layouts: {layouts}"
        if layouts and self.unconditional:
            return (
                f"its source splits a prediction ({layouts[0]}) and calls the network once more without the condition:"
                f" `{ast.unparse(self.unconditional[0][1])[:120]}`"
            )
        for function, statement in self.unconditional:
            earlier = [one for name, one in self.conditional if name == function and one.lineno < statement.lineno]
            if not layouts and not earlier:
                return (
                    "its source calls the network without the condition before it calls it with:"
                    f" `{ast.unparse(statement)[:120]}`"
                )
        if not (self.splits or self.unconditional) and _may_guide(self.cls):
            return "its source shows no prediction that is called unconditional or negative"
        return ""

    def _read(self, name: str) -> bool:
        """Read the network calls of a method; returns whether it hands on what a network predicted."""
        function, returned = self.functions[name], False
        statements = _statements(function)
        aliases = {name for node in statements if self._is_network(node.value) for name in _targets(node)}
        for i, node in enumerate(statements):
            if node.value is None or not _calls(node.value) & (self.networks | aliases):
                continue
            split, hands_on = self._follow(statements, i, _targets(node), self.networks | aliases)
            self.leaks += _leaks(function, statements[i:])
            returned = returned or (hands_on and name != "__call__")
            if split:
                self.combining.add(f"self.{name}")
            elif not (hands_on and isinstance(node, ast.Return)) and not _calls(node.value) & self.combining:
                kind = self.unconditional if any(map(UNCONDITIONAL.search, _words(node))) else self.conditional
                kind.append((name, node))
        if {name} <= {function for function, _ in self.unconditional}:
            self.combining.add(f"self.{name}")
        return returned

    def _is_network(self, value: ast.expr | None) -> bool:
        """Whether an expression is a network, or one of several, and not a call."""
        if isinstance(value, ast.IfExp):
            return self._is_network(value.body) and self._is_network(value.orelse)
        return value is not None and ast.unparse(value) in self.networks

    def _follow(self, statements: list, start: int, reached: set[str], networks: set[str]) -> tuple[bool, bool]:
        """Follow a prediction, from the statement that has it; returns whether it is split, and whether returned."""
        split, returned = False, False
        for i, node in enumerate(statements[start:], start):
            if node.value is None or (i > start and not (_names(node.value) & reached)):
                continue
            if i > start and _calls(node.value) & networks:
                continue  # a network that takes it in
            layout = _split_of(node, statements[i + 1 : i + 2])
            if layout is not None:
                split = True
                self.unclear += [node] if layout.parts == () else []
                self.splits += [(layout, node)] if layout.parts else []
                continue
            returned = returned or isinstance(node, ast.Return)
            split = self._helpers(node, reached) or split
            reached = reached | _targets(node)
        return split, returned

    def _helpers(self, node: ast.stmt, reached: set[str]) -> bool:
        """Methods `self.f(x, ...)` that a prediction is handed to; returns whether one splits it."""
        split = False
        for call in (part for part in ast.walk(node.value) if isinstance(part, ast.Call)):
            name = ast.unparse(call.func).removeprefix("self.")
            if name not in self.functions or f"self.{name}" in self.networks:
                continue
            parameters = [argument.arg for argument in self.functions[name].args.args]
            given = dict(zip(parameters[1:], call.args, strict=False))
            given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
            handed = {key for key, value in given.items() if _names(value) & reached or _calls(value) & self.networks}
            if handed:
                inside = ast.Assign([ast.Name(key) for key in sorted(handed)], ast.Constant(None))
                inner = [inside, *_statements(self.functions[name])]
                split = self._follow(inner, 0, handed, self.networks)[0] or split
                self.leaks += _leaks(self.functions[name], inner)
        return split


def _leaks(function: ast.FunctionDef, statements: list[ast.stmt]) -> list[ast.stmt]:
    """Statements that keep what a network predicted, in the first of them, or use it besides the scheduler's step."""
    ends = (ast.Continue, ast.Return, ast.Break, ast.Raise)
    leaving = [node for node in ast.walk(function) if isinstance(node, ast.If) and isinstance(node.body[-1], ends)]
    elsewhere = {part for node in leaving for one in node.body for part in ast.walk(one)}
    reached, stepped, found = _targets(statements[0]), False, []
    made: set[str] = set()  # names that got their value after the network was called
    for node in statements:
        if node.value is None:
            continue
        made |= _targets(node)
        if node is not statements[0] and not _names(node.value) & reached:
            continue
        handed = [_first_argument(call) for call in ast.walk(node.value) if _is_step(call)]
        if handed:
            inside = {part for one in handed for part in ast.walk(one)}
            names = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name) and part not in inside}
            found += [node] if names & reached and node is not statements[0] else []
            if node is statements[0]:
                return []
            stepped = stepped or node not in elsewhere
            continue
        kept = isinstance(node, ast.Assign) and any(
            not isinstance(part, ast.Name | ast.Tuple) for part in node.targets
        )
        if _collects(node) & made:  # a list of this step
            reached = reached | _collects(node)
            continue
        found += [node] if kept or stepped or _writes(node) else []
        reached = reached | _targets(node)
    return found


def _collects(node: ast.stmt) -> set[str]:
    """The list of `kept.append(x)`."""
    call = node.value
    plain = isinstance(node, ast.Expr) and isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    appended = plain and call.func.attr == "append" and isinstance(call.func.value, ast.Name)
    return {call.func.value.id} if appended else set()


def _writes(node: ast.stmt) -> bool:
    """Whether a statement hands what it uses to a call for nothing, as `kept.append(x)`, or writes `out=`."""
    calls = [part for part in ast.walk(node.value) if isinstance(part, ast.Call)]
    if any(keyword.arg == "out" for call in calls for keyword in call.keywords):
        return True
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    function = node.value.func
    in_place = isinstance(function, ast.Attribute) and function.attr.endswith("_")
    return not in_place and ast.unparse(function).split(".")[0] not in ("print", "logger", "logging", "warnings")


def _is_step(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step"


def _first_argument(call: ast.Call) -> ast.expr:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "model_output"]
    return (*call.args, *named, call.func)[0]


def _may_guide(cls: type) -> bool:
    """Whether the arguments of a call speak of guidance, or do not say what they are."""
    parameters = inspect.signature(cls.__call__).parameters.values()
    named = any(re.search(r"guid|cfg|scale|weight", parameter.name) for parameter in parameters)
    return named or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _methods(cls: type) -> dict[str, Callable]:
    """`__call__` and the methods that it uses, directly or not, but for those that all pipelines have."""
    found, waiting = {}, ["__call__"]
    while waiting:
        name = waiting.pop()
        method = inspect.getattr_static(cls, name, None)
        method = method.__func__ if isinstance(method, staticmethod | classmethod) else method
        if (
            name in found
            or (hasattr(DiffusionPipeline, name) and name != "__call__")
            or not inspect.isfunction(method)
        ):
            continue
        found[name] = inspect.unwrap(method)
        waiting += [used for used in _code_names(found[name].__code__) if used not in found]
    return found


def _code_names(code) -> set[str]:
    nested = (one for one in code.co_consts if inspect.iscode(one))
    return set(code.co_names).union(*map(_code_names, nested))


def _tree(cls: type, function: Callable) -> ast.FunctionDef:
    """The syntax tree of a function. Raises ValueError if its source is not there, or not what was compiled."""
    name = f"{cls.__name__}.{function.__name__}"
    try:
        text = inspect.getsource(function)
        body = ast.parse(f"class _:\n{text}" if text[0].isspace() else text)
        if text[0].isspace():
            body = body.body[0]
        tree = body.body[0]
        codes = list(_codes(compile(f"class _:\n{text}" if text[0].isspace() else text, "<source>", "exec", 0, True)))
    except (OSError, TypeError, SyntaxError, ValueError) as error:
        raise ValueError(f"the source of {name} cannot be read ({error}); {HOW_TO_SAY}") from error
    if not isinstance(tree, ast.FunctionDef) or not any(_same_code(code, function.__code__) for code in codes):
        raise ValueError(f"the source of {name} is not the code that runs: it was edited or patched; {HOW_TO_SAY}")
    return tree


def _codes(code) -> Iterator:
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield constant
            yield from _codes(constant)


def _same_code(source, code) -> bool:
    """Whether a function's code is that of its source, but for where it stands and what its free names refer to."""
    names = [{*one.co_names, *one.co_freevars, *one.co_cellvars} - {"__class__"} for one in (source, code)]
    # until Python 3.10 the full names of nested functions are constants as well
    constants = [
        [repr(value) for value in one.co_consts if not inspect.iscode(value) and ".<locals>." not in str(value)]
        for one in (source, code)
    ]
    if any(name.startswith("@") for name in names[1]):  # pytest has put more into its asserts
        names[1], constants[1] = names[1] & names[0], constants[0]
    local = [[name for name in one.co_varnames if not name.startswith("@")] for one in (source, code)]
    same = (source.co_name, source.co_argcount) == (code.co_name, code.co_argcount)
    return same and all(one == other for one, other in (names, constants, local))


def _statements(function: ast.FunctionDef) -> list[ast.stmt]:
    """The simple statements of a function that have a value, in source order."""
    kinds = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)
    found = (node for node in ast.walk(function) if isinstance(node, kinds))
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _targets(statement: ast.stmt) -> set[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {name for target in targets if target is not None for name in _names(target)}


def _calls(node: ast.AST) -> set[str]:
    return {ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}


def _words(statement: ast.stmt) -> set[str]:
    """Names and attributes in a statement, but for those in a joined batch, which holds both predictions."""
    joins = [part for part in ast.walk(statement) if isinstance(part, ast.Call)]
    joined = {
        node for call in joins if ast.unparse(call.func) in ("torch.cat", "torch.stack") for node in ast.walk(call)
    }
    nodes = [node for node in ast.walk(statement) if node not in joined]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _split_of(node: ast.stmt, following: list[ast.stmt]) -> Layout | None:
    """The layout of a statement that splits rows; one without parts if it is unclear; None for other statements."""
    for names, how in (_chunk_names(node), _slice_names(node, following), _turn_names(node)):
        if names is not None:
            return _layout_of_names(names, how)
    return None


def _layout_of_names(names: list[str], how: str) -> Layout:
    unconditional = [name for name in names if UNCONDITIONAL.search(name)]
    if len(names) not in (2, 3) or len(unconditional) != 1 or len(set(names)) < len(names) or "_" in names:
        return Layout((), how)
    parts = dict.fromkeys(unconditional, "uncond")
    rest = [name for name in names if name not in parts]
    parts |= {name: "perturbed" for name in rest if re.search("perturb", name, re.IGNORECASE)}
    rest = [name for name in names if name not in parts]
    whole = rest if len(rest) == 1 else [name for name in rest if WHOLE_CONDITION.search(name)]
    if len(whole) != 1:
        return Layout((), how)
    return Layout(tuple(parts.get(name, "cond" if name in whole else "image") for name in names), how)


def _chunk_names(node: ast.stmt) -> tuple[list[str] | None, str]:
    """Names of `a, b = x.chunk(2)` and `a, b = torch.split(x, n)`; what else is split by rows has no names."""
    value = node.value
    splits = [
        call
        for call in ast.walk(value)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("chunk", "split", "tensor_split", "unbind")
    ]
    for call in splits:
        position = 2 if ast.unparse(call.func.value) == "torch" else 1
        dims = [keyword.value for keyword in call.keywords if keyword.arg == "dim"]
        dims = dims or call.args[position : position + 1]
        if dims and ast.unparse(dims[0]) != "0":
            continue
        sizes = call.args[position - 1 : position]
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if call is not value or not isinstance(target, ast.Tuple) or (sizes and isinstance(sizes[0], ast.List)):
            return [], "batch"
        names = [ast.unparse(element) for element in target.elts]
        count = ast.unparse(sizes[0]) if call.func.attr == "chunk" and sizes else ""
        return ([] if (count.isdigit() and int(count) != len(names)) or "*" in "".join(names) else names), "batch"
    return None, ""


def _slice_names(node: ast.stmt, following: list[ast.stmt]) -> tuple[list[str] | None, str]:
    """Names of `a, b = x[:n], x[n:]`, or of the two as statements of their own."""
    pairs = []
    for one in (node, *following):
        target = one.targets[0] if isinstance(one, ast.Assign) and len(one.targets) == 1 else None
        if isinstance(target, ast.Tuple) and isinstance(one.value, ast.Tuple):
            pairs += zip(target.elts, one.value.elts, strict=False)
        elif target is not None:
            pairs.append((target, one.value))
    rows = [
        (ast.unparse(target), ast.unparse(value.value), value.slice)
        for target, value in pairs[:2]
        if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Slice) and value.slice.step is None
    ]
    if len(rows) == 2 and rows[0][1] == rows[1][1]:
        (first, _, low), (second, _, high) = rows
        ends = [low.upper, high.lower]
        if (
            low.lower is None
            and high.upper is None
            and None not in ends
            and ast.unparse(ends[0]) == ast.unparse(ends[1])
        ):
            return ([] if isinstance(ends[0], ast.Constant) else [first, second]), "batch"
    return None, ""


def _turn_names(node: ast.stmt) -> tuple[list[str] | None, str]:
    """Names of `a, b = x[::2], x[1::2]`."""
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    if not (isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)):
        return None, ""
    count, slices = len(node.value.elts), [ast.unparse(part) for part in node.value.elts]
    turns = all(text.endswith((f"[{i or ''}::{count}]", f"[{i}::{count}]")) for i, text in enumerate(slices))
    turns = turns and count == len(target.elts)
    return ([ast.unparse(element) for element in target.elts], "turns") if turns else (None, "")
