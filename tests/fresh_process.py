"""Scripts in new Python processes: forks of a server that has imported the libraries, and nothing of this package."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
_methods = multiprocessing.get_all_start_methods()
_context = multiprocessing.get_context("forkserver" if "forkserver" in _methods else "spawn")
if "forkserver" in _methods:
    # Most of what a start takes. Not diffusers, which reads HF_MODULES_CACHE when it is imported.
    heavy = ["torch", "torch._dynamo", "torch._meta_registrations", "transformers.modeling_utils", "scipy.stats"]
    _context.set_forkserver_preload([*heavy, "accelerate", "tokenizers"])


def run_fresh(script: str, *arguments: str, cache: Path) -> str:
    """What a script of this folder prints, run away from the checkout and offline, with its own module cache.

    A script that raises is an AssertionError with all that it said.
    """
    said = cache / f"{script}.log"
    process = _context.Process(target=_run, args=(script, arguments, cache, said))
    process.start()
    process.join()
    output = said.read_text(encoding="utf-8")
    assert process.exitcode == 0, output
    return output


def _run(script: str, arguments: tuple[str, ...], cache: Path, said: Path) -> None:
    with said.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    os.chdir(cache)
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    installed = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [str(HERE), *own, *installed]
    sys.argv = [str(HERE / script), *arguments]
    ours = {"diffusers", "diffusers_ext"} & {name.split(".")[0] for name in sys.modules}
    assert not ours, f"{ours} came with the server"
    runpy.run_path(sys.argv[0], run_name="__main__")
