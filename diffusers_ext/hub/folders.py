"""Folders of pipelines and networks, checked before and after diffusers loads them.

diffusers believes what a folder says: a config of a wrong kind fails somewhere in a constructor, or not before the
first step, and weights that lack a key are filled with random numbers. Here each is a ValueError that names the file.
"""

import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from safetensors import safe_open

from .damage import HEAD, SAFETENSORS, other_kind, read_json, refusing

CONFIGS = ("config.json", "scheduler_config.json")
LARGEST = 10_000_000  # of an integer in a config; the largest in use is the size of a vocabulary
MOST_LAYERS = 1_000
LAYERS = re.compile(r"num_layers|num_blocks|layers_per_block|num_res_blocks|num_.*_layers|num_.*_blocks")
COUNTS = re.compile(
    r"sample_size|img_resolution|vocab_size|num_train_timesteps|.*_channels|.*_length|.*_heads|.*_size"
)
# Old names of attention layers, which diffusers renames while it loads.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def check_pipeline_folder(folder: Path, cls: type[DiffusionPipeline] = DiffusionPipeline) -> None:
    """Raise ValueError, naming the file, where a folder cannot be what its model_index.json says.

    cls: the pipeline that it is loaded as; `DiffusionPipeline` is the one that the index names.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    named = index.get("_class_name")
    if not isinstance(named, str) and not _is_entry(named):
        raise ValueError(f"{str(path)!r} names no class of a pipeline: _class_name is {named!r:.100}")
    if cls is DiffusionPipeline:
        cls = _class_of(named)
    components = {name: entry for name, entry in index.items() if not name.startswith("_") and _is_entry(entry)}
    if cls is not None:
        _check_components(path, components, cls)
        settings = {name: value for name, value in index.items() if name not in components}
        check_config(path, settings, cls)
    for name, entry in components.items():
        if entry[1] is not None:
            _check_component(folder / name, _class_of(entry))


def check_model_folder(folder: Path) -> None:
    """As `check_pipeline_folder`, of a folder of one network."""
    _check_component(folder, _class_of(read_json(folder / "config.json").get("_class_name")))


def check_pipeline(pipe: DiffusionPipeline, folder: Path, variant: str | None = None) -> None:
    """Raise ValueError where a loaded pipeline's networks are not what the files of the folder hold, or not finite."""
    for name, component in pipe.components.items():
        if isinstance(component, DiffusionPipeline):
            check_pipeline(component, folder / name, variant)
        elif isinstance(component, torch.nn.Module):
            check_model(component, folder / name, variant)


def check_model(model: torch.nn.Module, folder: Path, variant: str | None = None) -> None:
    """As `check_pipeline`, of one network."""
    if isinstance(model, ModelMixin) and not getattr(model, "is_quantized", False):
        held = {}
        for file in _weights_files(folder, variant):
            held |= {_new_name(name): dtype for name, dtype in _header(file).items()}
        if held:
            _check_weights(folder, model, held)
    tensors = ((name, value) for name, value in model.state_dict().items() if value.is_floating_point())
    for name, value in tensors:
        if value.device.type != "meta" and not torch.isfinite(value).all():
            raise ValueError(f"weights in {str(folder)!r}: {name} holds numbers that are not finite, NaN or infinity")


def check_config(path: Path, config: Mapping, cls: type) -> None:
    """Raise ValueError for a value of a kind that a class does not take, and for numbers out of all proportion.

    path: the file, for the message. A class says what it takes by annotations and defaults; what these do not settle,
    and what the class does not know, is left to it.
    """
    try:
        hints = typing.get_type_hints(cls.__init__)
    except (NameError, TypeError):
        return
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name in config and name in hints:
            problem = _problem(name, config[name], hints[name], parameter.default)
            if problem:
                raise ValueError(f"{str(path)!r}: {name} must be {problem}, got {config[name]!r:.100}")


def _problem(name: str, value, hint, default) -> str | None:
    """What a value would have to be; None if it may be right."""
    allowed = _kinds(hint) | _kinds(type(default))
    if "anything" in allowed:
        return None
    if bool in allowed:
        allowed.add(type(None))  # stands for False in old configs
    kind = float if type(value) is int and float in allowed else type(value)
    if kind is float and int in allowed and float not in allowed and value.is_integer():
        kind = int
    if kind not in allowed:
        return " or ".join(sorted({_WORDS.get(kind, kind.__name__) for kind in allowed}))
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, dict | list) and list in allowed and "tuple[tuple" not in str(hint):
            return "a flat list"
        if isinstance(number, int | float) and (problem := _out_of_proportion(name, number, default)):
            return problem
    return None


_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", list: "a list", dict: "an object"}
_WORDS[type(None)] = "null"


def _kinds(hint) -> set:
    """The kinds of JSON values that an annotation means; {"anything"} where none of it is understood."""
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        kinds = set().union(*map(_kinds, typing.get_args(hint)))
        return kinds - {"anything"} if kinds - {"anything", type(None)} else kinds  # no array stands in a JSON file
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    if origin in (tuple, list):
        return {list}
    known = (int, float, str, bool, dict, type(None))
    return {origin} if origin in known else set() if origin is type else {"anything"}


def _out_of_proportion(name: str, number: float, default) -> str | None:
    if not math.isfinite(number):
        return None if isinstance(default, float) and not math.isfinite(default) else "finite"
    if LAYERS.fullmatch(name) and not 0 <= number <= MOST_LAYERS:
        return f"a number in [0, {MOST_LAYERS}]"
    if abs(number) > LARGEST:
        return f"a number within +-{LARGEST}"
    if number < 0 and type(default) is int and default >= 0:
        return "at least 0"
    return "at least 1" if COUNTS.fullmatch(name) and number < 1 and default != 0 else None


def _is_entry(entry) -> bool:
    """Whether an entry of an index is a component, [library, class]; [null, null] is one that is left out."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str | None) for part in entry)


def _class_of(entry) -> type | None:
    """The class of diffusers or of this package that an index or a config names; None for others. Nothing is imported
    by a name out of a file."""
    name = entry[1] if _is_entry(entry) else entry
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if found is None and isinstance(name, str):
        found = next((cls for cls in _subclasses(ModelMixin) if cls.__name__ == name), None)
    return found if isinstance(found, type) and issubclass(found, ConfigMixin) else None


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _check_components(path: Path, components: Mapping, cls: type) -> None:
    optional = set(getattr(cls, "_optional_components", ()))
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        _, found = components.get(parameter.name, (None, None))
        if needed and found is None and parameter.name not in optional:
            there = [name for name, (_, held) in components.items() if held is not None]
            raise ValueError(
                f"{str(path)!r}: {parameter.name} must be [library, class], a component that {cls.__name__} needs;"
                f" here are {', '.join(sorted(there)) or 'none'}"
            )


def _check_component(folder: Path, cls: type | None) -> None:
    if (folder / "model_index.json").is_file():
        return check_pipeline_folder(folder)
    name = "scheduler_config.json" if cls is not None and issubclass(cls, SchedulerMixin) else "config.json"
    if cls is None or not issubclass(cls, ModelMixin | SchedulerMixin):
        if (folder / name).is_file():
            read_json(folder / name)
        return None
    if not (folder / name).is_file():
        raise ValueError(f"{str(folder / name)!r} is missing, the configuration of a {cls.__name__}")
    config = read_json(folder / name)
    _check_class(folder / name, config.get("_class_name", cls.__name__), cls)
    check_config(folder / name, config, cls)
    if issubclass(cls, ModelMixin):
        _check_files(folder)
    return None


def _check_class(path: Path, named, cls: type) -> None:
    """A config names the class that the index names, or a related one."""
    other = _class_of(named)
    if not isinstance(named, str):
        raise ValueError(f"{str(path)!r}: _class_name must be the name of a class, got {named!r:.100}")
    if other is None or issubclass(other, cls) or issubclass(cls, other):
        return
    if issubclass(cls, SchedulerMixin) and issubclass(other, SchedulerMixin):
        compatible = {one.__name__ for one in (*cls.__new__(cls).compatibles, *other.__new__(other).compatibles)}
        if {cls.__name__, other.__name__} & compatible:
            return
    raise ValueError(f"{str(path)!r} is the configuration of a {named}, not of a {cls.__name__}")


def _check_files(folder: Path) -> None:
    """Every file of weights is whole, as far as its header says, and lies in the folder."""
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    if not files:
        raise ValueError(f"{str(folder)!r} holds no weights, neither .safetensors nor .bin")
    for path in files:
        if path.suffix == ".safetensors":
            _header(path)
    for path in folder.glob("*.index*.json"):
        _shards(path)


def _shards(path: Path) -> list[Path]:
    """The files that an index of weights names."""
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{str(path)!r} is no index of weights: weight_map must name the file of each tensor")
    shards = sorted(set(names.values()))
    for name in shards:
        if Path(name).name != name or not (path.parent / name).is_file():
            raise ValueError(f"{str(path)!r} names {name[:100]!r}, which is no file beside it")
    return [path.parent / name for name in shards]


def _weights_files(folder: Path, variant: str | None) -> list[Path]:
    """The .safetensors files from which diffusers takes the weights of a network; none if it takes others."""
    middle = f".{variant}" if variant else ""
    index = folder / f"diffusion_pytorch_model.safetensors.index{middle}.json"
    if index.is_file():
        return _shards(index)
    single = folder / f"diffusion_pytorch_model{middle}.safetensors"
    return [single] if single.is_file() else []


def _header(path: Path) -> dict[str, str]:
    """The dtype of each tensor of a .safetensors file."""
    with refusing(f"weights {str(path)!r} cannot be read; is the file whole?"):
        with path.open("rb") as file:
            if other := other_kind(file.read(HEAD), wanted=SAFETENSORS):
                raise ValueError(f"it is {other}")
        with safe_open(path, "pt") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118


def _new_name(name: str) -> str:
    """The name that diffusers gives to a tensor of an old attention layer."""
    *module, kind = name.split(".")
    return ".".join([*module[:-1], OLD_NAMES.get(module[-1], module[-1]), kind]) if module else name


def _check_weights(folder: Path, model: ModelMixin, held: Mapping[str, str]) -> None:
    """The names of a file are those of the network, and its dtypes are of weights."""
    state = model.state_dict()
    shared = {value.data_ptr() for name, value in state.items() if name in held}
    lacking = [name for name, value in state.items() if name not in held and value.data_ptr() not in shared]
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    others = [name for name in held if name not in state and not any(re.search(one, name) for one in ignored)]
    for names, what in ((lacking, "lack"), (others, f"hold what {type(model).__name__} does not have,")):
        if names:
            more = f" and {len(names) - 3} others" if len(names) > 3 else ""
            raise ValueError(f"weights in {str(folder)!r} {what} {', '.join(names[:3])}{more}")
    for name, dtype in held.items():
        if name in state and state[name].is_floating_point() and not re.match(r"B?F\d", dtype):
            raise ValueError(f"weights in {str(folder)!r}: {name} is of {dtype}, not of floating point")
