"""Code in new Python processes: forks of a server that has imported the libraries, and nothing of this package."""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

HERE = Path(__file__).parent
_methods = multiprocessing.get_all_start_methods()
_context = multiprocessing.get_context("forkserver" if "forkserver" in _methods else "spawn")
if "forkserver" in _methods:
    # Most of what a start takes. Not diffusers, which reads HF_MODULES_CACHE when it is imported.
    heavy = ["torch", "torch._dynamo", "torch._meta_registrations", "transformers.modeling_utils", "scipy.stats"]
    _context.set_forkserver_preload([*heavy, "accelerate", "tokenizers"])


def start_fresh(code: str, *arguments, said: Path, **environment: str) -> BaseProcess:
    """A process that runs a script of this folder, *.py, or code, in the folder of the file of all that it says."""
    process = _context.Process(target=_run, args=(code, [*map(str, arguments)], said, environment))
    process.start()
    return process


def start_two(code: str, *arguments, folder: Path) -> list[BaseProcess]:
    """Two, as torchrun starts them; they say 0.log and 1.log, in the folder."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    launched = {**master, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return [
        start_fresh(code, *arguments, said=folder / f"{rank}.log", RANK=rank, LOCAL_RANK=rank, **launched)
        for rank in "01"
    ]


def ended(process: BaseProcess, said: Path) -> str:
    """What a process said until it ended well; an AssertionError with all that it said where it raised."""
    process.join()
    output = said.read_text(encoding="utf-8")
    assert process.exitcode == 0, output
    return output


def wait_until(condition: Callable[[], bool], process: BaseProcess) -> None:
    """The condition holds while the process is at work."""
    while not condition():
        assert process.is_alive(), "it ended before"
        time.sleep(0.01)


def run_fresh(script: str, *arguments: str, cache: Path) -> str:
    """What a script of this folder says, run away from the checkout and offline, with its own module cache."""
    said = cache / f"{script}.log"
    return ended(start_fresh(script, *arguments, said=said, HF_MODULES_CACHE=str(cache), HF_HUB_OFFLINE="1"), said)


def _run(code: str, arguments: list[str], said: Path, environment: dict[str, str]) -> None:
    with said.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    os.chdir(said.parent)
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    installed = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [str(HERE), *own, *installed]
    ours = {"diffusers", "diffusers_ext"} & {name.split(".")[0] for name in sys.modules}
    assert not ours, f"{ours} came with the server"
    sys.argv = [str(HERE / code) if code.endswith(".py") else "-c", *arguments]
    if code.endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        exec(code, {"__name__": "__main__"})
