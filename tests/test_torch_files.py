"""Torch files as plain data: what was written comes back, damage is refused, hostile files cost nothing."""

import io
import random
import struct
import zipfile

import pytest
import torch
from test_damaged_files import Evil, seconds_of_cpu

from diffusers_ext.checkpoints.tensor_files import read_tensors, read_torch_file
from diffusers_ext.checkpoints.torch_files import load_torch_file

FLAT = torch.arange(24.0)
STATE = {
    "w": torch.randn(30, 20, generator=torch.Generator().manual_seed(0)),
    "view": FLAT[4:16].view(3, 4).T,
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
    **{str(dtype): torch.arange(5).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8)},
    "truth": torch.tensor([True, False]),
}


def saved(content, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def rewritten(whole: bytes, change=lambda name, data: data, compression=zipfile.ZIP_STORED) -> bytes:
    """A zip archive with other records, and the checksums that belong to them."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(file, "w", compression) as target:
        for info in source.infolist():
            target.writestr(info.filename, change(info.filename, source.read(info)))
    return file.getvalue()


def is_state(tensors) -> bool:
    return list(tensors) == list(STATE) and all(
        torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype for name, value in STATE.items()
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_what_was_written_comes_back(legacy, tmp_path):
    (tmp_path / "a.pt").write_bytes(saved(STATE, legacy))
    assert is_state(read_tensors(tmp_path / "a.pt"))
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0]["params"][0].sum().backward()
    optimizer.step()
    content = {"step": 3, "rates": [0.1, None], "optimizer": optimizer.state_dict(), "size": torch.ones(2, 3).size()}
    content |= {"dtype": torch.float32, "names": {"a", "b"}, "lists": [[0, 64], [0, 16, 64]], "b": b"x" * 300}
    (tmp_path / "b.pt").write_bytes(saved({name: content[name] for name in content if name != "dtype"}, legacy))
    read = read_torch_file(tmp_path / "b.pt")
    assert read["optimizer"]["state"][0]["exp_avg"].shape == (2,) and read["size"] == (2, 3)
    assert {name: read[name] for name in ("step", "rates", "names", "lists", "b")} == {
        name: content[name] for name in ("step", "rates", "names", "lists", "b")
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_damage_never_gives_other_tensors(legacy, tmp_path):
    """Files of before torch 1.6 have no checksums: there it may change numbers, and nothing else may come out."""
    whole, rng, refused = saved(STATE, legacy), random.Random(5), 0
    for _ in range(150):
        data, how = bytearray(whole), rng.choice(("flip", "flip", "cut", "splice", "overwrite"))
        place, other = rng.randrange(len(data)), rng.randrange(len(data))
        if how == "flip":
            data[place] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del data[place:]
        elif how == "splice":
            data[place : place + rng.choice((0, 16))] = data[other : other + 16]
        else:
            data[place : place + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\0\0\0\0"))
        (tmp_path / "a.pt").write_bytes(data)
        try:
            with seconds_of_cpu(5):
                tensors = read_tensors(tmp_path / "a.pt")
            assert legacy or is_state(tensors), (how, place)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and "weights_only" not in str(error)
    assert refused > 60


def test_a_checksum_of_every_record_counts(tmp_path):
    whole = saved(STATE)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        records = [info for info in archive.infolist() if "/data" in info.filename and info.file_size]
    for info in records:
        data = bytearray(whole)
        name, extra = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
        data[info.header_offset + 30 + name + extra] ^= 1
        (tmp_path / "a.pt").write_bytes(data)
        with pytest.raises(ValueError, match=r"Bad CRC-32|bad"):
            read_tensors(tmp_path / "a.pt")


def test_files_without_checksums_are_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        whole = saved(STATE)
    finally:
        torch.serialization.set_crc32_options(before)
    (tmp_path / "a.pt").write_bytes(whole)
    assert is_state(read_tensors(tmp_path / "a.pt"))


def storage_of_another_size(name: str, data: bytes) -> bytes:
    return data + b"1234" if name.endswith("/data/0") else data


def negative_stride(name: str, data: bytes) -> bytes:
    return data.replace(b"K\x14K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86") if name.endswith("data.pkl") else data


def huge_offset(name: str, data: bytes) -> bytes:
    return data.replace(b"QK\x00K\x1e", b"QJ\xff\xff\xff\x7fK\x1e", 1) if name.endswith("data.pkl") else data


def expanded(name: str, data: bytes) -> bytes:
    return (
        data.replace(b"K\x1eK\x14\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86") if name.endswith(".pkl") else data
    )


HOSTILE = {
    "compressed": (rewritten(saved({"a": torch.zeros(9_000_000)}), compression=zipfile.ZIP_DEFLATED), "compressed"),
    "storage of another size": (rewritten(saved(STATE), storage_of_another_size), "does not hold 600 elements"),
    "negative stride": (rewritten(saved(STATE), negative_stride), "shape or stride"),
    "offset beyond the storage": (rewritten(saved(STATE), huge_offset), "beyond its storage"),
    "larger than its storage": (rewritten(saved(STATE), expanded), "beyond its storage"),
    "no torch archive": (rewritten(saved(STATE)).replace(b"data.pkl", b"dada.pkl"), "none of torch.save"),
    "of sparse tensors": (saved({"a": torch.eye(3).to_sparse()}), "_rebuild_sparse_tensor"),
    "empty": (b"", "the file is empty"),
    "web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", r"a page of the web \(HTML\)"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "pointer of git-lfs"),
    "safetensors": (b"\x40\0\0\0\0\0\0\0{\"a\":{}}", "a safetensors file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "a compressed file"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("case", HOSTILE)
def test_other_files_are_refused_by_name(case, tmp_path):
    content, message = HOSTILE[case]
    (tmp_path / "a.pt").write_bytes(content)
    with seconds_of_cpu(3), pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_refused_without_torchs_advice(legacy, tmp_path):
    (tmp_path / "a.pt").write_bytes(saved({"a": Evil(tmp_path / "ran")}, legacy))
    with pytest.raises(ValueError, match=r"open, which is not on the allow-list.*nothing was executed") as error:
        read_tensors(tmp_path / "a.pt")
    assert "weights_only" not in str(error.value) and not (tmp_path / "ran").exists()


def test_a_dictionary_around_the_tensors_is_told(tmp_path):
    for name in ("model", "state_dict", "ema"):
        (tmp_path / "a.pt").write_bytes(saved({"step": 3, name: {"w": torch.ones(2)}}))
        with pytest.raises(ValueError, match=f"tensors by name lie under '{name}'"):
            read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(bad, tmp_path):
    (tmp_path / "a.pt").write_bytes(saved({"good": torch.ones(2), "bad": torch.tensor([1.0, bad]).half()}))
    with pytest.raises(ValueError, match="tensor bad holds numbers that are not finite"):
        read_tensors(tmp_path / "a.pt")


def test_one_storage_shown_many_times_is_no_bomb(tmp_path):
    (tmp_path / "a.pt").write_bytes(saved({f"w{i}": STATE["w"].expand(1, 30, 20) for i in range(1000)}))
    with pytest.raises(ValueError, match=r"shows 2400000 bytes of tensors"):
        read_tensors(tmp_path / "a.pt")
    assert len(load_torch_file(tmp_path / "a.pt")) == 1000
