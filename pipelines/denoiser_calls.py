"""How a pipeline calls its denoiser: read off the statement that makes the call, and cut out the conditional rows.

diffusers' pipelines guide in two ways. One call on a doubled batch, whose output is split by name,

    noise_pred = self.unet(torch.cat([latents] * 2), t, ...)
    if self.do_classifier_free_guidance:
        noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)

or a second call for the unconditional prediction,

    with self.transformer.cache_context("uncond"):
        neg_noise_pred = self.transformer(latents, encoder_hidden_states=negative_prompt_embeds, ...)

Shapes and equal halves cannot tell these from two prompts with one seed, nor which half is which. The calling
statement can: where its result is split, there or in a method that it is handed to, under which conditions, and which
names stand for "unconditional". It is looked up in the Python frames of the running pipeline, so any pipeline written
in this way is understood.
"""

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from numbers import Number
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

UNCONDITIONAL = re.compile(r"uncond|(^|_)(neg|negative|null)(_|\d|$)", re.IGNORECASE)
# Of a split in three, the part with the whole condition: InstructPix2Pix splits (text, image, uncond), OmniGen
# (cond, uncond, img_cond). The last of (uncond, text, perturb) is not a matter of classifier-free guidance and stays.
WHOLE_CONDITION = re.compile(r"text|^cond$|[^g]_cond$", re.IGNORECASE)
# Names in `cache_context`; "uncond_stg" and the like are other kinds of guidance, which have weights of their own.
UNCONDITIONAL_CONTEXTS = ("uncond", "pred_uncond")
PERTURBED = re.compile(r"perturb", re.IGNORECASE)
DENOISING_LOOP = re.compile(r"timestep|step_matrix", re.IGNORECASE)
# Arguments that are the same for all rows, whatever their first dimension: position tables of tokens.
SHARED_ARGUMENT = re.compile(r"rotary|rope|freqs|^(img|txt)_ids$")
# Arguments that may hold several rows a sample, one a frame, and are halved all the same.
FOLDED_ARGUMENT = re.compile(r"hidden_states|embed|residual|samples|controlnet_cond|mask")
# Arguments whose rows are not in the first dimension: HiDream's are (layers, rows, tokens, channels), AnyFlow's cached
# keys and values (2, rows, heads, tokens, channels).
ROW_DIMENSION = {"encoder_hidden_states_llama3": 1, "compressed_cache": 1, "full_cache": 1}


class Guard(NamedTuple):
    """A condition and the value that it must have.

    In a method that the output is handed to, `bindings` are its arguments, to evaluate in the caller, and `namespace`
    its globals; else they are empty and None.
    """

    test: CodeType
    expected: bool
    bindings: tuple[tuple[str, CodeType], ...]
    namespace: dict | None


class Split(NamedTuple):
    """The output is cut into `parts` equal parts if all guards hold.

    run: the parts to run without guidance. source: for each part, which of those that were run stands for it. Both
    empty if the conditional part is unclear. perturbed: whether one is from perturbed attention. interleaved: whether
    the parts take turns row by row, else one follows the other.
    """

    parts: int
    run: tuple[int, ...]
    source: tuple[int, ...]
    perturbed: bool
    interleaved: bool
    guards: tuple[Guard, ...]


class CallSite(NamedTuple):
    """What one statement, which calls something, says about guidance.

    splits: the splits that its result reaches, in source order.
    later: for each later unconditional call of the same network in the loop or method, the conditions of making it.
    unconditional: whether names in it stand for the unconditional prediction.
    context: the name given to the `cache_context` around it, to evaluate; where there is one, it counts instead.
    timestep: the variable of the denoising loop around it. scheduler: whose `step` that loop calls, to evaluate.
    """

    splits: tuple[Split, ...]
    later: tuple[tuple[Guard, ...], ...]
    unconditional: bool
    context: CodeType | None
    timestep: str | None
    scheduler: CodeType | None


class DenoiserCall(NamedTuple):
    """One call of a network inside a denoising loop.

    kind: "split", "mixed" (a split and another, unconditional call), "unconditional" or "plain" (conditional, or no
        guidance); split: the active one of a split.
    site: identifies the calling statement. context: name in `cache_context`, if any.
    timestep: the loop's variable; owner: the pipeline whose loop it is; scheduler: the one it steps, None if unclear.
    guess_mode: whether a ControlNet sees the conditional half alone.
    """

    kind: str
    split: Split | None
    site: tuple
    context: str | None
    timestep: Any
    owner: Any
    scheduler: Any
    guess_mode: bool


def read_denoiser_call(module: torch.nn.Module, frame: FrameType, last: FrameType) -> DenoiserCall | None:
    """Understand the call of `module` that is being made from `frame`, searching outward up to `last`.

    None if there is no denoising loop in between: nothing to guide. Raises ValueError if a condition of the split
    cannot be evaluated.
    """
    kind, split, where, context = "plain", None, None, None
    while frame is not None and frame is not last:
        if (frame.f_code, frame.f_lineno) not in _silent:
            names = frame.f_locals  # a dict that Python makes anew at each look
            site = _call_site(frame, names, module)
            where = where or (frame.f_code, frame.f_lineno)
            if kind == "plain":
                split = next((split for split in site.splits if _holds(split.guards, frame, names)), None)
                context = context or _evaluate(site.context, frame, names)
                named = isinstance(context, str)
                if split is not None:
                    kind = "mixed" if any(_holds(guards, frame, names) for guards in site.later) else "split"
                elif context in UNCONDITIONAL_CONTEXTS if named else site.unconditional:
                    kind = "unconditional"
            if site.timestep is not None:
                return DenoiserCall(
                    kind,
                    split,
                    where,
                    context if isinstance(context, str) else None,
                    names.get(site.timestep),
                    names.get("self"),
                    _evaluate(site.scheduler, frame, names),
                    bool(names.get("guess_mode", False)),
                )
        frame = frame.f_back
    return None


def _evaluate(expression: CodeType | None, frame: FrameType, names: dict[str, Any]) -> Any:
    """The value of names and attributes in the pipeline's code."""
    return None if expression is None else eval(expression, frame.f_globals, names)


def _holds(guards: tuple[Guard, ...], frame: FrameType, names: dict[str, Any]) -> bool:
    def value(guard: Guard) -> Any:
        if guard.namespace is None:
            return _evaluate(guard.test, frame, names)
        needed = [binding for binding in guard.bindings if binding[0] in guard.test.co_names]
        arguments = {name: _evaluate(expression, frame, names) for name, expression in needed}
        return eval(guard.test, guard.namespace, arguments)

    try:
        return all(bool(value(guard)) == guard.expected for guard in guards)
    except NameError as error:
        name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
        raise ValueError(
            f"{name} decides on guidance only after the network was called ({error}), so an interval cannot be applied"
            " to it"
        ) from error


# From here on: reading source, once for each calling statement.

_sites: dict[tuple[CodeType, int, type], CallSite] = {}
# Statements of others than pipelines that say nothing, such as torch's on the way to a network.
_silent: set[tuple[CodeType, int]] = set()


def _call_site(frame: FrameType, names: dict[str, Any], module: torch.nn.Module) -> CallSite:
    owner = names.get("self")
    key = (frame.f_code, frame.f_lineno, type(owner))
    if key not in _sites:
        function, site = _function(frame.f_code), CallSite((), (), False, None, None, None)
        if function and (statement := function.statement(frame.f_lineno)):
            site = _read(function, statement, _called(statement, frame, names, module), owner)
        _sites[key] = site
        if not any(site) and not isinstance(owner, DiffusionPipeline):
            _silent.add(key[:2])
    return _sites[key]


class _Function:
    """The syntax tree of one code object, with parents and absolute line numbers."""

    namespace: dict | None = None

    def __init__(self, source: str, first_line: int):
        self.tree = ast.parse(source)
        ast.increment_lineno(self.tree, first_line - 1)
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        kinds = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)
        statements = (node for node in ast.walk(self.tree) if isinstance(node, kinds))
        self.statements = sorted(statements, key=lambda node: (node.lineno, node.col_offset))

    def statement(self, line: int) -> ast.stmt | None:
        """The simple statement that spans a line."""
        return next((node for node in self.statements if node.lineno <= line <= node.end_lineno), None)

    def around(self, node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
        """Pairs of an enclosing node and the child through which it encloses, from inside out."""
        while node in self.parents:
            node, child = self.parents[node], node
            yield node, child


@functools.lru_cache(maxsize=512)
def _function(code: CodeType) -> _Function | None:
    try:
        lines, first = inspect.getsourcelines(code)
        # An enclosing `if` takes the place of the class around a method.
        indented = lines[0][:1].isspace()
        return _Function("if True:\n" + "".join(lines), first - 1) if indented else _Function("".join(lines), first)
    except (OSError, TypeError, SyntaxError, IndexError):
        return None


def _called(statement: ast.stmt, frame: FrameType, names: dict[str, Any], module: torch.nn.Module) -> str | None:
    """The expression through which a statement calls the module, like "self.unet"."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and (expression := _names_only(node.func)):
            try:
                if _evaluate(expression, frame, names) is module:
                    return ast.unparse(node.func)
            except (NameError, AttributeError):
                continue
    return None


def _names_only(node: ast.expr) -> CodeType | None:
    """A name or a chain of attributes, compiled; None for anything else."""
    if all(isinstance(part, ast.Name | ast.Attribute | ast.expr_context) for part in ast.walk(node)):
        return compile(ast.Expression(node), "<call site>", "eval")
    return None


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _targets(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.Assign):
        return statement.targets
    return [statement.target] if isinstance(statement, ast.AnnAssign | ast.AugAssign) else []


def _read(function: _Function, statement: ast.stmt, called: str | None, owner: Any) -> CallSite:
    loop = next((node for node, _ in function.around(statement) if _loop_variable(node)), None)
    within = loop or function.tree.body[-1]
    splits = tuple(_splits_after(function, statement, called, owner))
    return CallSite(
        splits=splits,
        later=tuple(_unconditional_after(function, statement, called, within)) if splits else (),
        unconditional=any(map(UNCONDITIONAL.search, _words(statement))),
        context=_context_around(function, statement),
        timestep=_loop_variable(loop) if loop else None,
        scheduler=_scheduler(loop) if loop else None,
    )


def _unconditional_after(
    function: _Function, statement: ast.stmt, called: str | None, within: ast.stmt
) -> Iterator[tuple[Guard, ...]]:
    """Self-attention guidance calls the network on the unconditional part of a batch that was split before."""
    inside = {node for node, _ in function.around(statement)}
    for node in function.statements[function.statements.index(statement) + 1 :]:
        calls = node.lineno <= within.end_lineno and node.value and called in _calls(node.value)
        if calls and not _context_around(function, node) and any(map(UNCONDITIONAL.search, _words(node))):
            yield tuple(_guards(function, node, inside))


def _words(statement: ast.stmt) -> set[str]:
    """Names and attributes in a statement, but for those in targets or a joined batch that hold both predictions."""
    parts = [statement.value] if statement.value else []
    parts += [target for target in _targets(statement) if _is_one_prediction(target)]
    joined = {node for part in parts for call in _joins(part) for node in ast.walk(call)}
    nodes = [node for part in parts for node in ast.walk(part) if node not in joined]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _is_one_prediction(target: ast.expr) -> bool:
    """Whether the targets of a call are not of two kinds, like those of a split."""
    names = _names(target) - {"_"} if isinstance(target, ast.Tuple) else {""}
    return all(map(UNCONDITIONAL.search, names)) or not any(map(UNCONDITIONAL.search, names))


def _joins(node: ast.AST) -> list[ast.Call]:
    calls = (part for part in ast.walk(node) if isinstance(part, ast.Call))
    return [call for call in calls if ast.unparse(call.func) in ("torch.cat", "torch.stack")]


def _context_around(function: _Function, statement: ast.stmt) -> CodeType | None:
    contexts = (_context(node) for node, _ in function.around(statement) if isinstance(node, ast.With))
    return next(filter(None, contexts), None)


def _context(node: ast.With) -> CodeType | None:
    for item in node.items:
        call = item.context_expr
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "cache_context":
            return compile(ast.Expression(call.args[0]), "<call site>", "eval") if call.args else None
    return None


def _loop_variable(node: ast.AST) -> str | None:
    """The variable that holds the timestep if the node is a loop over timesteps."""
    if not isinstance(node, ast.For):
        return None
    names = [part.id for part in ast.walk(node.target) if isinstance(part, ast.Name)]
    if not ("t" in names or DENOISING_LOOP.search(ast.unparse(node.iter))):
        return None
    if isinstance(node.iter, ast.Call) and ast.unparse(node.iter.func) == "range":
        # over positions, from which the body takes the timestep
        for part in node.body:
            if not (isinstance(part, ast.Assign) and isinstance(part.value, ast.Subscript)):
                continue
            if DENOISING_LOOP.search(ast.unparse(part.value.value)) and isinstance(part.targets[0], ast.Name):
                return part.targets[0].id
        return None
    return names[-1]


def _scheduler(loop: ast.For) -> CodeType | None:
    for node in ast.walk(loop):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step":
            owner = node.func.value
            if "sched" in ast.unparse(owner) and (expression := _names_only(owner)):
                return expression
    return None


def _splits_after(function: _Function, statement: ast.stmt, called: str | None, owner: Any) -> Iterator[Split]:
    """Follow the result of a statement to the splits that name the unconditional part.

    The way leads on through other calls (a ControlNet's through the UNet), but not through another call of the same
    network, which has splits of its own. owner: the object whose methods may do the splitting.
    """
    names = _split_names(statement)
    if any(map(UNCONDITIONAL.search, names)) and not all(map(UNCONDITIONAL.search, names)):
        yield _split(names, False, ())
    reached = {name for target in _targets(statement) for name in _names(target)}
    inside = {node for node, _ in function.around(statement)}
    later = function.statements[function.statements.index(statement) + 1 :]
    for node, split in _follow(function, later, reached, inside, called):
        if split is not None:
            yield split
            continue
        for helper, parameter, bindings in _helpers(node, reached, owner):
            within = _follow(helper, helper.statements, {parameter}, set(), None)
            for part in (part for _, part in within if part is not None):
                outer = tuple(_guards(function, node, inside))
                inner = (guard._replace(bindings=bindings, namespace=helper.namespace) for guard in part.guards)
                yield part._replace(guards=(*outer, *inner))


def _follow(
    function: _Function, statements: list[ast.stmt], reached: set[str], inside: set[ast.AST], called: str | None
) -> Iterator[tuple[ast.stmt, Split | None]]:
    """The statements that use what is reached, which they add to, each with the split that it makes, if any."""
    for i, node in enumerate(statements):
        if not node.value or not _names(node.value) & reached or (called and called in _calls(node.value)):
            continue
        names, interleaved = _split_names(node) or _slice_names(node, statements[i + 1 : i + 2]), False
        if not names:
            names, interleaved = _turn_names(node), True
        targets = {name for target in _targets(node) for name in _names(target)}
        if any(map(UNCONDITIONAL.search, names)) and not all(map(UNCONDITIONAL.search, names)):
            yield node, _split(names, interleaved, tuple(_guards(function, node, inside)))
        elif _joins_predictions(node):
            reached -= targets
        else:
            yield node, None
            reached |= targets


def _helpers(node: ast.stmt, reached: set[str], owner: Any) -> Iterator[tuple[_Function, str, tuple]]:
    """Methods `self.f(x, ...)` that a statement hands a reached name to: source, parameter, all arguments."""
    for call in ast.walk(node.value):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        if ast.unparse(call.func.value) != "self":
            continue
        method = getattr(getattr(type(owner), call.func.attr, None), "__wrapped__", None)
        method = method or getattr(type(owner), call.func.attr, None)
        helper = _function(method.__code__) if inspect.isfunction(method) else None
        if helper is None:
            continue
        helper.namespace = method.__globals__
        given = dict(zip(inspect.signature(method).parameters, [call.func.value, *call.args], strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        bindings = {name: _names_only(value) for name, value in given.items()}
        bindings = tuple((name, expression) for name, expression in bindings.items() if expression)
        for name, value in given.items():
            if isinstance(value, ast.Name) and value.id in reached:
                yield helper, name, bindings


def _calls(node: ast.AST) -> set[str]:
    return {ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}


def _split_names(node: ast.stmt) -> list[str]:
    """Names of `a, b = x.chunk(2)` and `a, b = torch.split(x, len(x) // 2, dim=0)`; empty for other statements."""
    target, value = (*_targets(node), None)[0], node.value
    if not (isinstance(target, ast.Tuple) and isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute)):
        return []
    if value.func.attr not in ("chunk", "split", "tensor_split"):
        return []
    position = 2 if ast.unparse(value.func.value) == "torch" else 1
    dims = [keyword.value for keyword in value.keywords if keyword.arg == "dim"] or value.args[position : position + 1]
    if dims and ast.unparse(dims[0]) != "0":
        return []
    return [ast.unparse(element) for element in target.elts]


def _turn_names(node: ast.stmt) -> list[str]:
    """Names of `a, b = x[::2], x[1::2]`; empty for other statements."""
    target, value = (*_targets(node), None)[0], node.value
    if not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)):
        return []
    count, slices = len(value.elts), [ast.unparse(part) for part in value.elts]
    turns = all(text.endswith((f"[{i or ''}::{count}]", f"[{i}::{count}]")) for i, text in enumerate(slices))
    return [ast.unparse(element) for element in target.elts] if turns and count == len(target.elts) else []


def _joins_predictions(node: ast.stmt) -> bool:
    """Whether separate predictions, one of them unconditional, are put in one batch: what is split again later."""
    return any(UNCONDITIONAL.search(name) for call in _joins(node.value) for name in _names(call))


def _slice_names(node: ast.stmt, following: list[ast.stmt]) -> list[str]:
    """Names of the pair `a = x[:n]`, `b = x[n:]`; empty for other statements."""

    def bounds(node: ast.stmt) -> tuple | None:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            part = node.value.slice
            if isinstance(part, ast.Slice) and part.step is None and isinstance(node.targets[0], ast.Name):
                ends = (ast.unparse(end) if end else None for end in (part.lower, part.upper))
                return (ast.unparse(node.value.value), *ends)
        return None

    first, second = bounds(node), bounds(following[0]) if following else None
    if first and second and first[0] == second[0] and first[1] is None and second[2] is None and first[2] == second[1]:
        return [node.targets[0].id, following[0].targets[0].id]
    return []


def _split(names: list[str], interleaved: bool, guards: tuple[Guard, ...]) -> Split:
    unconditional = [i for i, name in enumerate(names) if UNCONDITIONAL.search(name)]
    conditional = [i for i in range(len(names)) if i not in unconditional]
    perturbed = [i for i in conditional if PERTURBED.search(names[i])]
    conditional = [i for i in conditional if i not in perturbed and names[i] != "_"]
    if len(conditional) > len(unconditional):
        conditional = [i for i in conditional if WHOLE_CONDITION.search(names[i])]
    if len(conditional) != len(unconditional):
        return Split(len(names), (), (), False, interleaved, guards)
    # Where there are several pairs (CycleDiffusion's source and target), they come in one order.
    run = (*conditional, *perturbed)
    stands_in = dict(zip(unconditional, range(len(conditional)), strict=True))
    source = tuple(run.index(i) if i in run else stands_in.get(i, 0) for i in range(len(names)))
    return Split(len(names), run, source, bool(perturbed), interleaved, guards)


def _guards(function: _Function, node: ast.stmt, inside: set[ast.AST]) -> Iterator[Guard]:
    """The conditions under which a statement runs, beyond those under which the call was made."""
    for enclosing, child in function.around(node):
        # the constant is the `if` around a method that _function adds
        if isinstance(enclosing, ast.If) and enclosing not in inside and not isinstance(enclosing.test, ast.Constant):
            test = compile(ast.Expression(enclosing.test), "<call site>", "eval")
            yield Guard(test, child in enclosing.body, (), None)


# From here on: rows.


class Rows(NamedTuple):
    """The arguments of a network call: `total` rows, in a list of tensors if `listed`, else in a tensor."""

    total: int
    listed: bool


def count_rows(arguments: dict[str, Any]) -> Rows:
    """Rows of the first argument that has rows: the noisy sample, in every diffusers model but packed ones.

    Raises ValueError where there is none.
    """
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            return Rows(len(value) if value.ndim > 1 else 1, False)
        if isinstance(value, list) and value:
            return Rows(len(value), True)
    raise ValueError(f"a network was called without a tensor among {list(arguments)}; cannot count its rows")


def take_rows(name: str, value: Any, rows: Rows, split: Split) -> Any:
    """The parts of an argument that are run without guidance; what does not vary by row comes back as it is."""
    if isinstance(value, torch.Tensor):
        if not has_rows(name, value, rows):
            return value
        dim = ROW_DIMENSION.get(name, 0)
        if split.interleaved:
            return torch.stack([value[i :: split.parts] for i in split.run], dim=1).flatten(0, 1)
        return _joined(value.chunk(split.parts, dim), split.run, dim)
    if isinstance(value, dict) and all(isinstance(key, int) for key in value) and not _has_tensor(value):
        size = rows.total // split.parts  # by number of the row, like OmniGen's places of images
        kept = [row for i in split.run for row in range(i * size, (i + 1) * size)]
        return {new: value[old] for new, old in enumerate(kept) if old in value}
    if isinstance(value, dict):
        return type(value)({key: take_rows(str(key), item, rows, split) for key, item in value.items()})
    if isinstance(value, list | tuple):
        if isinstance(value, list) and len(value) == rows.total and (rows.listed or _is_nested(value)):
            size = rows.total // split.parts
            return [item for i in split.run for item in value[i * size : (i + 1) * size]]
        return type(value)([take_rows(name, item, rows, split) for item in value])
    return value


def has_rows(name: str, value: torch.Tensor, rows: Rows) -> bool:
    """Whether a tensor argument, (rows, ...) but for `ROW_DIMENSION`, has an entry for each row."""
    if not value.numel() or value.ndim <= (dim := ROW_DIMENSION.get(name, 0)) or SHARED_ARGUMENT.search(name):
        return False
    folded = value.shape[dim] % rows.total == 0 and FOLDED_ARGUMENT.search(name)
    return value.shape[dim] == rows.total or bool(folded)


def unclear_arguments(name: str, value: Any, rows: Rows) -> list[str]:
    """Names of tensors that are taken to be the same for all rows, but have a dimension as long as the batch."""
    if isinstance(value, torch.Tensor):
        shared = has_rows(name, value, rows) or SHARED_ARGUMENT.search(name)
        return [] if shared or rows.total not in value.shape[:2] else [name]
    items = []
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and not (rows.listed and len(value) == rows.total):
        items = [(name, item) for item in value]
    return [unclear for key, item in items for unclear in unclear_arguments(key, item, rows)]


def _is_nested(value: list) -> bool:
    """A list of lists or tuples without tensors: one entry a row, like the shapes of packed images."""
    return all(isinstance(item, list | tuple) and not _has_tensor(item) for item in value)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return _has_tensor(list(value.values()))
    if isinstance(value, list | tuple):
        return any(_has_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)


def _joined(parts: tuple[torch.Tensor, ...], chosen: tuple[int, ...], dim: int = 0) -> torch.Tensor:
    return parts[chosen[0]] if len(chosen) == 1 else torch.cat([parts[i] for i in chosen], dim)


def caches_of_rows(name: str, value: Any) -> list[str]:
    """What a network keeps from call to call that is not clear to have rows, by name."""
    if isinstance(value, dict):
        return [one for key, item in value.items() for one in caches_of_rows(f"{key}", item)]
    if isinstance(value, list | tuple):
        return [one for item in value for one in caches_of_rows(name, item)]
    clear = value is None or isinstance(value, str | Number) or name in ROW_DIMENSION
    return [] if clear else [name]


def spread_rows(value: Any, rows: Rows, split: Split, name: str = "") -> Any:
    """The output for all parts of a batch from that for `rows` of the parts that were run."""
    if isinstance(value, torch.Tensor):
        dim = ROW_DIMENSION.get(name, 0)
        if value.ndim <= dim or not value.shape[dim] or value.shape[dim] % rows.total:
            return value
        if split.interleaved:
            turns = [value[i :: len(split.run)] for i in split.source]
            return torch.stack(turns, dim=1).flatten(0, 1)
        return _joined(value.chunk(len(split.run), dim), split.source, dim)
    if isinstance(value, dict):  # a ModelOutput too
        items = {key: spread_rows(item, rows, split, str(key)) for key, item in value.items()}
        return type(value)(**items) if hasattr(value, "to_tuple") else items
    if isinstance(value, list | tuple):
        if isinstance(value, list) and rows.listed and len(value) == rows.total:
            size = rows.total // len(split.run)
            return [item for i in split.source for item in value[i * size : (i + 1) * size]]
        return type(value)([spread_rows(item, rows, split) for item in value])
    return value


def copy_tensors(value: Any) -> Any:
    """The same structure with tensors of its own, which the receiver may change in place."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        items = {key: copy_tensors(item) for key, item in value.items()}
        return type(value)(**items) if hasattr(value, "to_tuple") else items
    if isinstance(value, list | tuple):
        return type(value)([copy_tensors(item) for item in value])
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors with rows in an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value] if value.ndim else []
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]
