"""safe_load reads NVIDIA's pickles as plain data; hostile pickles are refused, none runs, hangs or eats memory."""

import collections
import io
import marshal
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh_process import ended, start_fresh
from test_damaged_files import seconds_of_cpu

from diffusers_ext.checkpoints import UnsafePickleError, safe_load
from diffusers_ext.checkpoints.safe_pickle import PickledObject, as_numbers, safe_loads

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that no test may create: every hostile pickle tries to, in the working directory."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


class Calls:
    """Pickles as a call of `function` with `arguments`, then the rest of the reduce tuple."""

    def __init__(self, function, *arguments, rest=()):
        self.function, self.arguments, self.rest = function, arguments, rest

    def __reduce__(self):
        return (self.function, self.arguments, *self.rest)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def storage(values=(1.0, 2.0)) -> bytes:
    """A storage as torch pickles it inside a tensor."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")
        torch.save(torch.tensor(values).storage(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def load_storage(data: bytes) -> bytes:
    """The call that reads a storage from bytes, without STOP."""
    argument = b"B" + struct.pack("<I", len(data)) + data
    return b"\x80\x04" + named("torch.storage", "_load_from_bytes") + argument + b"\x85R"


def rebuild(size: tuple, stride: tuple, offset: int = 0) -> bytes:
    """A tensor over a storage of two numbers."""
    push = load_storage(storage())[2:]
    numbers = b"".join(pickle.dumps(value, protocol=2)[2:-1] for value in (offset, size, stride, False))
    return b"\x80\x04" + named("torch._utils", "_rebuild_tensor_v2") + b"(" + push + numbers + b"tR."


def array_bomb(shape: tuple, contents: bytes = b"1234", code: str = "f4") -> bytes:
    make = named("numpy.core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
    dtype = named("numpy", "dtype") + text(code) + b"\x89\x88\x87R"
    contents = b"C" + bytes([len(contents)]) + contents
    return b"\x80\x04" + make + b"(K\x01" + pickle.dumps(shape, protocol=2)[2:-1] + dtype + b"\x89" + contents + b"tb."


RUN = "touch ran"
CODE = marshal.dumps(compile("open('ran', 'w')", "x", "exec"))
SYSTEM = "posix" if os.name == "posix" else "nt"

# Every way that a pickle has to name something and to call it.
NAMES_WHAT_IT_WANTS = {
    "REDUCE protocol 0": (b"cos\nsystem\n(S'touch ran'\ntR.", "os.system"),
    "REDUCE protocol 2": (pickle.dumps(Calls(os.system, RUN), protocol=2), f"{SYSTEM}.system"),
    "REDUCE protocol 4": (pickle.dumps(Calls(os.system, RUN), protocol=4), f"{SYSTEM}.system"),
    "REDUCE protocol 5": (pickle.dumps(Calls(os.system, RUN), protocol=5), f"{SYSTEM}.system"),
    "INST": (b"(S'touch ran'\nios\nsystem\n.", "os.system"),
    "OBJ": (b"(cos\nsystem\nS'touch ran'\no.", "os.system"),
    "NEWOBJ": (
        b"\x80\x02csubprocess\nPopen\n(]X\x05\x00\x00\x00touchaX\x03\x00\x00\x00ranat\x81.",
        "subprocess.Popen",
    ),
    "NEWOBJ_EX": (b"\x80\x04" + named("subprocess", "Popen") + b"(X\x03\x00\x00\x00foot}\x92.", "subprocess.Popen"),
    "STACK_GLOBAL from memo": (
        b"\x80\x04" + text("os") + b"\x940" + text("system") + b"\x940h\x00h\x01\x93.",
        "os.system",
    ),
    "dotted name": (b"\x80\x04" + named("collections", "OrderedDict.__init__.__globals__") + b".", "__globals__"),
    "extension registry": (b"\x80\x02\x82\x01.", "extension with the code 1"),
    "extension registry, 4 bytes": (b"\x80\x02\x84\x01\x00\x00\x00.", "extension with the code 1"),
    "eval": (pickle.dumps(Calls(eval, "open('ran', 'w')")), "builtins.eval"),
    "exec": (pickle.dumps(Calls(exec, "open('ran', 'w')")), "builtins.exec"),
    "getattr": (
        pickle.dumps(Calls(getattr, 1, "real")),
        "builtins.getattr",
    ),
    "import": (pickle.dumps(Calls(__import__, "os")), "builtins.__import__"),
    "runpy": (b"\x80\x02crunpy\nrun_path\nX\x03\x00\x00\x00ran\x85R.", "runpy.run_path"),
    "marshalled code": (pickle.dumps(Calls(exec, Calls(marshal.loads, CODE))), "builtins.exec"),
    "subprocess": (pickle.dumps(Calls(subprocess.check_output, ["touch", "ran"])), "subprocess.check_output"),
    "nested reduce": (
        pickle.dumps({"ema": [Calls(collections.OrderedDict, [("a", Calls(os.system, RUN))])]}),
        f"{SYSTEM}.system",
    ),
    "item of a dictionary subclass": (
        pickle.dumps(Calls(collections.OrderedDict, rest=(None, None, iter([("k", Calls(os.system, RUN))])))),
        f"{SYSTEM}.system",
    ),
    "torch.load by name": (b"\x80\x02ctorch\nload\nX\x03\x00\x00\x00ran\x85R.", "torch.load"),
    "pickle.loads by name": (pickle.dumps(Calls(pickle.loads, pickle.dumps(1))), "pickle.loads"),
    "numpy.load by name": (b"\x80\x02cnumpy\nload\nX\x03\x00\x00\x00ran\x85R.", "numpy.load"),
    "source of a module by name": (b"\x80\x02ctorch_utils.persistence\n_src_to_module\n.", "_src_to_module"),
    "persistent id": (b"\x80\x02X\x03\x00\x00\x00ranQ.", "persistent id"),
    "persistent id as text": (b"Pran\n.", "persistent id"),
    "out-of-band buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
}


@pytest.mark.parametrize("attack", NAMES_WHAT_IT_WANTS)
def test_what_it_wants_is_named(mark, attack):
    data, wanted = NAMES_WHAT_IT_WANTS[attack]
    with pytest.raises(UnsafePickleError, match=wanted):
        safe_loads(data)


def test_these_attacks_work_on_python_itself(tmp_path, monkeypatch):
    """Otherwise the tests above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    for attack in ("REDUCE protocol 0", "REDUCE protocol 2", "INST", "OBJ", "nested reduce"):
        pickle.loads(NAMES_WHAT_IT_WANTS[attack][0])
        assert (tmp_path / "ran").exists(), attack
        (tmp_path / "ran").unlink()


ALLOWED = named("collections", "OrderedDict")
PERSISTENT = named("torch_utils.persistence", "_reconstruct_persistent_obj")
STATE = "set the state of"
MAKES_USE_OF_ALLOWED_NAMES = {
    "BUILD on an allowed function": (ALLOWED + b"}" + text("__code__") + b"NsN\x86b.", STATE),
    "BUILD on an allowed class": (named("dnnlib.util", "EasyDict") + b"}" + text("__init__") + b"Nsb.", STATE),
    "BUILD on a string": (text("x") + b"}b.", STATE),
    "BUILD twice on a module": (
        named("torch.nn.modules.container", "ModuleDict") + b")\x81}" + text("a") + b"Nsb}" + text("a") + b"Nsb.",
        STATE,
    ),
    "__setstate__ given as state": (
        named("torch.nn.modules.container", "ModuleDict") + b")\x81" + b"N}" + text("__setstate__") + b"Ns\x86b.",
        STATE,
    ),
    "calling a string": (text("os.system") + b")R.", "call a str"),
    "calling a module": (named("torch.nn.modules.container", "ModuleDict") + b")\x81)R.", "call a PickledObject"),
    "calling a class that is made": (named("dnnlib.util", "EasyDict") + b")R.", "in a way that is not allowed"),
    "making a function": (ALLOWED + b")\x81.", "in a way that is not allowed"),
    "calling with no tuple": (ALLOWED + b"]R.", "in a way that is not allowed"),
    "a name made of numbers": (b"K\x01K\x02\x93.", "something else than text"),
    "codecs that run code": (named("_codecs", "encode") + text("x") + text("rot13") + b"\x86R.", "latin1"),
    "array of objects": (named("numpy", "dtype") + text("O") + b"\x85R.", "no real numbers"),
    "array of a structure": (named("numpy", "dtype") + text("f4,O") + b"\x85R.", "no real numbers"),
    "persistent object of a function": (PERSISTENT + b"}" + text("type") + text("def") + b"s\x85R.", "no class"),
    "storage that is a pickle": (load_storage(pickle.dumps(Calls(os.system, RUN)))[2:] + b".", f"{SYSTEM}.system"),
    "storage that is five pickles": (
        load_storage(storage()[:15] + b"".join([pickle.dumps(Calls(os.system, RUN))] * 5))[2:] + b".",
        f"{SYSTEM}.system|malformed",
    ),
    "storage that is a zip archive": (load_storage(b"PK\x03\x04" + bytes(64))[2:] + b".", "malformed"),
    "tensor of no storage": (
        named("torch._utils", "_rebuild_tensor_v2") + b"(NK\x00))\x89" + ALLOWED + b")Rt" + b"R.",
        "something else than a storage",
    ),
}


@pytest.mark.parametrize("attack", MAKES_USE_OF_ALLOWED_NAMES)
def test_allowed_names_do_no_more_than_they_must(mark, attack):
    data, message = MAKES_USE_OF_ALLOWED_NAMES[attack]
    with pytest.raises(UnsafePickleError, match=message):
        safe_loads(b"\x80\x04" + data)


def test_source_code_of_persistent_objects_is_dropped(mark):
    meta = {
        "type": "class",
        "version": 6,
        "module_src": "open('ran', 'w')",
        "class_name": "Precond",
        "state": {"a": 1},
    }
    found = safe_loads(b"\x80\x04" + PERSISTENT + pickle.dumps(meta, protocol=2)[2:-1] + b"\x85R.")
    assert isinstance(found, PickledObject) and found.class_name == "Precond" and found.state == {"a": 1}


def huge_storage(count: int) -> bytes:
    """The storage of two numbers, which says that it has `count`."""
    data = storage()
    return data.replace(b"K\x02Nt", b"\x8a\x08" + count.to_bytes(8, "little", signed=True) + b"Nt")


def laughs(levels: int, empty: bytes, join: bytes) -> bytes:
    """Each level is two references to the one below."""
    body = empty + b"\x94"
    for level in range(levels):
        body += join.replace(b"#", b"h" + bytes([level])) + b"\x94"
    return b"\x80\x04" + body


def kept(body: bytes) -> bytes:
    """Pushed, memoised and dropped."""
    return body + b"\x94" + b"0"


LONG = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000
PAIRS = b"(" + b"K\x01N\x86" * 30_000 + b"l"
ENTRIES = b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(20_000)) + b"u"
MODULE = named("torch.nn.modules.container", "ModuleDict")
AGAIN = "same data over and over"

BOMBS = {
    "text that is encoded 10,000 times": (
        b"\x80\x04"
        + kept(named("_codecs", "encode"))
        + kept(LONG)
        + kept(text("latin1"))
        + b"h\x00h\x01h\x02\x86R0" * 10_000
        + b"N.",
        AGAIN,
    ),
    "storage that is read 10,000 times": (
        b"\x80\x04"
        + kept(named("torch.storage", "_load_from_bytes"))
        + kept(b"B" + struct.pack("<I", len(storage([1.0] * 25_000))) + storage([1.0] * 25_000))
        + b"h\x00h\x01\x85R0" * 10_000
        + b"N.",
        AGAIN,
    ),
    "pairs that become 20,000 dictionaries": (
        b"\x80\x04" + kept(named("collections", "OrderedDict")) + kept(PAIRS) + b"h\x00h\x01\x85R0" * 20_000 + b"N.",
        AGAIN,
    ),
    "state of 20,000 modules": (
        b"\x80\x04" + kept(ENTRIES) + kept(MODULE) + b"h\x01)\x81h\x00b0" * 20_000 + b"N.",
        AGAIN,
    ),
    "shape of 100,000 sizes, 10,000 times": (
        b"\x80\x04"
        + kept(named("numpy.core.multiarray", "_reconstruct"))
        + kept(named("numpy", "ndarray"))
        + kept(b"(" + b"K\x01" * 100_000 + b"t")
        + b"h\x00h\x01h\x02C\x01b\x87R0" * 10_000
        + b"N.",
        AGAIN,
    ),
    "equal keys of 100,000 letters": (b"\x80\x04" + kept(LONG) + b"}" + b"h\x00Ns" * 9_000 + b".", "longer than 4096"),
    "key of a million digits": (
        b"\x80\x04}\x8b" + struct.pack("<i", 400_000) + b"\x11" * 400_000 + b"Ns.",
        "longer than 4096",
    ),
    "bytes longer than the file": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", "malformed"),
    "text longer than the file": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.", "malformed"),
    "integer longer than the file": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", "malformed"),
    "integer of a million digits": (b"I" + b"9" * 1_000_000 + b"\n.", "longer than"),
    "frame longer than the file": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N", "malformed|no end"),
    "array of 2^60 numbers": (array_bomb((2**30, 2**30)), "does not fit"),
    "array with a negative shape": (array_bomb((-1, 4)), "shape or stride"),
    "array of a hundred dimensions": (array_bomb((1,) * 100), "at most 16"),
    "storage of 2^50 numbers": (load_storage(huge_storage(2**50)) + b".", "a storage of 1125899906842624 elements"),
    "storage of -1 numbers": (load_storage(huge_storage(-1)) + b".", "not one storage"),
    "tensor larger than its storage": (rebuild((2**30, 2**30), (0, 0)), "beyond its storage"),
    "tensor behind its storage": (rebuild((2,), (1,), offset=1), "beyond its storage"),
    "tensor before its storage": (rebuild((2,), (1,), offset=-1), "something else than a storage"),
    "tensor with a negative stride": (rebuild((2,), (-1,)), "shape or stride"),
    "key of nested tuples": (laughs(60, b")", b"##\x86")[:-1] + b"\x94}h" + bytes([60]) + b"Ns.", "tuple as a key"),
    "set of nested tuples": (laughs(60, b")", b"##\x86") + b"\x8f(h" + bytes([60]) + b"\x90.", "tuple as a key"),
    "a hundred thousand marks": (b"(" * 100_000, "malformed|no end"),
    "no end": (b"\x80\x04N", "malformed|no end"),
    "nothing on the stack": (b"\x80\x04.", "malformed"),
    "too many instructions": (b"\x80\x04" + b"N0" * 500_001 + b"N.", "more than 1000000 instructions"),
    "memo that was never written": (b"\x80\x04h\x05.", "malformed"),
    "text": (b"not a pickle at all", "malformed"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_quickly(bomb):
    data, message = BOMBS[bomb]
    with seconds_of_cpu(10), pytest.raises(UnsafePickleError, match=message):
        safe_loads(data)


def test_storages_mean_to_torch_what_they_mean_here(mark):
    """What torch.load would take for something else does not come through either."""
    good = storage()
    magic, first = good[:15], good.index(b"\x80\x02(X\x07\x00\x00\x00storage")
    identity = good[first + 2 : good.index(b"Q.", first) + 1]
    key = laughs(60, b")", b"##\x86")[2:]  # whose comparison takes 2^60 steps
    cpu = text("cpu") + b"K\x02NtQ."
    laughing = good[: first + 2] + b"(" + text("storage") + b"ctorch\nFloatStorage\n" + key + cpu
    laughing += b"\x80\x02]" + key + b"a." + good[-16:]
    for data in (
        b"PK\x03\x04\n0" + good[2:],  # a persistent id as text, thrown away; or a zip archive
        good[: first + 2] + identity.replace(b"K\x02N", b"J\xff\xff\xff\x7fN") + b"0" + good[first + 2 :],
        b"\x80\x02" + identity + b"0" + good[2:],
        laughing,
        magic + good,
    ):
        with pytest.raises(UnsafePickleError):
            safe_loads(load_storage(data) + b".")
    twice = good[: first + 2] + identity + b"0" + good[first + 2 :]  # torch would make two storages
    with pytest.raises(UnsafePickleError, match="persistent id"):
        safe_loads(load_storage(twice) + b".")
    assert magic.endswith(b".") and safe_loads(load_storage(good) + b".").count == 2


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_read_or_refused():
    """Bytes changed, left out and put in at random; nothing but UnsafePickleError comes out."""
    sources = [pickle.dumps({"a": torch.ones(3), "b": np.arange(4.0)}, protocol=protocol) for protocol in (2, 4)]
    rng, refused = random.Random(0), 0
    for i in range(600):
        data, at = bytearray(sources[i % 2]), rng.randrange(len(sources[i % 2]))
        change = rng.choice(("replace", "remove", "insert"))
        data[at : at + (change != "insert")] = b"" if change == "remove" else bytes([rng.randrange(256)])
        try:
            safe_loads(bytes(data))
        except UnsafePickleError:
            refused += 1
    assert 300 < refused < 600


def test_shared_references_stay_shared():
    """The billion laughs: 2^60 lists to who walks through them, 61 lists to who does not."""
    value = safe_loads(laughs(60, b"]", b"](##e") + b".")
    for _ in range(60):
        assert len(value) == 2 and value[0] is value[1]
        value = value[0]
    assert value == []


def test_numbers_out_of_nested_lists_are_refused():
    """NumPy walks through 2^26 entries of 200 bytes; see `as_numbers`."""
    for nested in (laughs(26, b"]", b"](##e"), laughs(26, b")", b"##\x86")):
        assert as_numbers(safe_loads(nested + b".")).dtype == object
    for plain in (np.arange(3.0), np.float64(2), 3, 0.5, [1.0, 2], (3, 4), torch.ones(2)):
        np.testing.assert_array_equal(as_numbers(plain), np.asarray(plain))
    for other in ("a", [1, "a"], [[1.0]], None, {}, [10**400], [0.0] * 5000):
        assert as_numbers(other).dtype == object


@pytest.mark.slow
def test_depth_and_cycles_are_no_recursion():
    value = safe_loads(b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".")
    depth = 1
    while value:
        (value,) = value
        depth += 1
    assert depth == 200_000
    cycle = safe_loads(b"\x80\x04]\x94h\x00a.")
    assert cycle[0] is cycle


def test_a_real_checkpoint_is_plain_data():
    data = safe_load(GOLDENS / "edm2_cond_ema_fp16_nosource.pkl")
    assert list(data) == ["encoder", "dataset_kwargs", "loss_fn", "ema"]
    assert data["ema"].class_name == "Precond" and data["ema"].state["label_dim"] == 10
    np.testing.assert_allclose(data["encoder"].state["scale"], [0.11990407, 0.10822511, 0.13477089, 0.15243903])
    assert type(data["dataset_kwargs"]) is dict
    gain = data["ema"].state["_modules"]["unet"].state["_parameters"]["out_gain"]
    assert type(gain) is torch.Tensor and gain.dtype == torch.float16 and gain.shape == ()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_reference_statistics_of_every_protocol(protocol):
    mean, covariance = np.arange(6.0), np.asfortranarray(np.arange(36.0).reshape(6, 6))
    statistics = {"fid": {"mu": mean, "sigma": covariance}, "big": np.arange(3, dtype=">i2"), "n": np.float64(0.5)}
    read = safe_loads(pickle.dumps(statistics, protocol=protocol))
    np.testing.assert_array_equal(read["fid"]["mu"], mean)
    np.testing.assert_array_equal(read["fid"]["sigma"], covariance)
    np.testing.assert_array_equal(read["big"], [0, 1, 2])
    assert read["n"] == 0.5


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_tensors_and_views(dtype):
    whole = torch.arange(12).reshape(3, 4).to(dtype)
    parts = {"whole": whole, "transposed": whole.T, "row": whole[1], "empty": whole[:0]}
    parts["parameter"] = torch.nn.Parameter(torch.ones(2))
    read = safe_loads(pickle.dumps(parts))
    for name, part in parts.items():
        assert torch.equal(read[name], part) and read[name].dtype == part.dtype, name


def test_files_are_named(tmp_path):
    (tmp_path / "empty.pkl").write_bytes(b"")
    with pytest.raises(UnsafePickleError, match=r"empty\.pkl: the file is empty"):
        safe_load(tmp_path / "empty.pkl")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Calls(os.system, "true")))
    with pytest.raises(
        UnsafePickleError, match=r"bad\.pkl: the pickle wants .*system, which is not on the allow-list"
    ):
        safe_load(str(tmp_path / "bad.pkl"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource is not there")
def test_no_bomb_takes_memory(tmp_path):
    """All of them again in a process that may not take more than 1 GB beyond what torch takes."""
    script = (
        "import resource\n"
        "import test_safe_pickle as tests\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))\n"
        "for name in tests.BOMBS:\n"
        "    tests.test_bombs_are_refused_quickly(name)\n"
    )
    ended(start_fresh(script, said=tmp_path / "said"), tmp_path / "said")
