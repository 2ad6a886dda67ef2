"""diffusers-ext on two processes, each of which notes how many there are.

cli_on_processes.py NOTES COMMAND ...   runs the command; NOTES/INDEX says what the process found
"""

import subprocess
import sys
from pathlib import Path

from fresh_process import start_two

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run_on_two(notes: Path, *arguments, launcher: tuple[str, ...] = ()) -> str:
    """What the command says; fails unless it ends well and there were two processes at the work."""
    notes.mkdir()
    if launcher:
        command = [*launcher, __file__, notes, *arguments]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        said = done.stdout
    else:
        processes = start_two("cli_on_processes.py", notes, *arguments, folder=notes)
        for process in processes:
            process.join()
        logs = [(notes / f"{rank}.log").read_text(encoding="utf-8") for rank in range(len(processes))]
        assert not any(process.exitcode for process in processes), "\n".join(logs)
        said = "".join(logs)
    found = [(notes / rank).read_text() for rank in "01"]
    assert found == ["2 on cpu"] * 2, found
    return said


def main() -> None:
    from diffusers_ext import cli
    from diffusers_ext.runs import processes

    start = processes.start_processes

    def noting(*arguments):
        accelerator = start(*arguments)
        note = Path(sys.argv[1]) / str(accelerator.process_index)
        note.write_text(f"{accelerator.num_processes} on {accelerator.device.type}")
        return accelerator

    processes.start_processes = noting
    cli.main(sys.argv[2:])


if __name__ == "__main__":
    main()
