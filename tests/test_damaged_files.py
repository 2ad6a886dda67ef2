"""Files from elsewhere, cut off, damaged, and of the wrong kind: the readers give what is in them, or a ValueError."""

import json
import pickle
import random
import shutil
import signal
import sys
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from discrete_goldens import GOLDENS, golden, tauldr_files
from safetensors.torch import load_file

from diffusers_ext import CTMCScheduler
from diffusers_ext.checkpoints import (
    load_countdown,
    load_edm2,
    load_guided_diffusion,
    load_sedd,
    load_tauldr,
    safe_load,
    sedd_scheduler,
    tauldr_scheduler,
)
from diffusers_ext.evaluation import read_statistics
from diffusers_ext.flow import Neighbours
from diffusers_ext.jump_your_steps import TimestepTables

SCHEDULER = CTMCScheduler(vocab_size=17)
CASES = 110  # of each file


class Evil:
    """A pickle that would make a file if it were executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def sedd(folder):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDENS / "sedd_absorb_hub" / name, folder / name)
    return lambda: (load_sedd(folder), sedd_scheduler(folder))


def countdown(folder):
    torch.save(load_file(GOLDENS / "sedd_absorb_hub/model.safetensors"), folder / "count.pt")
    return lambda: load_countdown(folder / "count.pt")


def tauldr(folder):
    files = tauldr_files(folder, golden("ctmc_seq_net").config, load_file(GOLDENS / "ctmc_seq_model.safetensors"))
    return lambda: (load_tauldr(*files, weights="raw"), tauldr_scheduler(files[1]))


def edm2(folder):
    shutil.copyfile(GOLDENS / "edm2_uncond_ema_fp16_nosource.pkl", folder / "network.pkl")
    return lambda: load_edm2(folder / "network.pkl")


def plain_pickle(folder):
    (folder / "statistics.pkl").write_bytes(pickle.dumps({"fid": {"mu": torch.ones(5), "sigma": [0.5, 1, "a"]}}))
    return lambda: safe_load(folder / "statistics.pkl")


def guided_diffusion(folder):
    shutil.copyfile(GOLDENS / "gd_celeba_like.pt", folder / "model.pt")
    return lambda: load_guided_diffusion(folder / "model.pt")


def index_lists(folder):
    torch.save([[0, 64], [0, 16, 64], [0, 6, 16, 43, 64]], folder / "schedule.pt")
    return lambda: TimestepTables.from_index_lists(folder / "schedule.pt", SCHEDULER)


def tables(folder):
    TimestepTables({2: (1.0, 0.3, 0.01)}, {"kernel": "absorbing"}, {2: {"seed": 0}}).save(folder / "tables.json")
    return lambda: TimestepTables.load(folder / "tables.json")


def neighbours(folder):
    Neighbours(torch.arange(12).view(4, 3), torch.ones(4, 3)).save(folder / "neighbours.safetensors")
    return lambda: Neighbours.load(folder / "neighbours.safetensors")


def statistics(folder):
    np.savez(folder / "real.npz", mu=np.zeros(3), sigma=np.eye(3))

    def read():
        if read_statistics(folder / "real.npz") is None:
            raise ValueError("holds no statistics: it is read as images")

    return read


FILES = [
    (sedd, "config.json"),
    (sedd, "model.safetensors"),
    (countdown, "count.pt"),
    (tauldr, "config.yaml"),
    (tauldr, "ckpt.pt"),
    (edm2, "network.pkl"),
    (plain_pickle, "statistics.pkl"),
    (guided_diffusion, "model.pt"),
    (index_lists, "schedule.pt"),
    (tables, "tables.json"),
    (neighbours, "neighbours.safetensors"),
    (statistics, "real.npz"),
]
NAMES = [f"{reader.__name__} {name}" for reader, name in FILES]


@contextmanager
def seconds_of_cpu(limit: float):
    """Fail where Python works for longer, not where the machine is busy with something else."""

    def stop(number, frame):
        pytest.fail(f"still reading after {limit} s")

    if not hasattr(signal, "ITIMER_VIRTUAL"):
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Cut off, with bits flipped (often near an end, where the structure is), overwritten, or with bytes put in."""
    data, kind = bytearray(whole), rng.choice(("cut", "flip", "flip", "overwrite", "insert"))
    if kind == "cut":
        return bytes(data[: rng.randrange(len(data))])
    for _ in range(rng.choice((1, 2, 8))):
        place = rng.choice((rng.randrange(min(len(data), 600)), rng.randrange(len(data)), -rng.randrange(1, 200)))
        place = max(place, -len(data)) % len(data)
        if kind == "flip":
            data[place] ^= 1 << rng.randrange(8)
        elif kind == "overwrite":
            data[place : place + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\0\0\0\0", b"9999", b"[{(-"))
        else:
            data[place:place] = rng.choice((b"9", b"-", b'"', b"\x80", b".", b"0e9", b"[["))
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("reader", "name"), [file for file in FILES if file[0] is not guided_diffusion])
def test_damage_is_a_clear_error(reader, name, tmp_path):
    """Where nothing but a number changed, the file may still be read. guided-diffusion's has a test of its own."""
    read, path = reader(tmp_path), tmp_path / name
    read()  # as it was written
    whole, rng, refused = path.read_bytes(), random.Random(name), 0
    for _ in range(CASES):
        path.write_bytes(damaged(whole, rng))
        try:
            with seconds_of_cpu(5):
                read()
        except ValueError as error:
            refused += 1
            assert 10 < len(str(error)) < 20_000
    assert refused > CASES // 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("reader", "name"), FILES, ids=NAMES)
def test_another_kind_of_file_is_a_clear_error(reader, name, tmp_path):
    """Other content of the same format, other formats, and what would run."""
    read, path, ran = reader(tmp_path), tmp_path / name, tmp_path / "ran"
    values = [None, 3, "text", [], [1], {}, {"a": 1}, {"model": 3, "data": []}, [{"ema": 1}], {1: 2}, [[0, "a"]]]
    others = [torch.ones(3), {"net.a": 1}, {"a": torch.ones(2)}, {"model": {"net.a": torch.ones(())}}]
    kinds: list[bytes] = [b"", b"\0" * 100, b"{", b"PK\x03\x04", "é".encode("latin1"), b"[" * 5000]
    kinds += [json.dumps(value).encode() for value in values]
    kinds += [pickle.dumps(value) for value in (*values, Evil(ran))]
    for value in (*values, *others, Evil(ran), {"net.x": Evil(ran)}):
        torch.save(value, path)
        kinds.append(path.read_bytes())
    for content in kinds:
        path.write_bytes(content)
        with seconds_of_cpu(5):
            if reader is plain_pickle:  # any data may be in a pickle
                with suppress(ValueError):
                    read()
            else:
                with pytest.raises(ValueError, match=r".{10}"):
                    read()
        assert not ran.exists()
    path.unlink()
    with pytest.raises((ValueError, OSError)):
        read()


def test_the_evil_file_would_run(tmp_path):
    """Otherwise the tests above would prove nothing."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="has no timer of this kind")
def test_the_clock_stops_what_hangs():
    with pytest.raises(pytest.fail.Exception, match="still reading"), seconds_of_cpu(0.1):
        while True:
            pass
