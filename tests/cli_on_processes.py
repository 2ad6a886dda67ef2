"""diffusers-ext on two processes of torchrun, each of which notes how many there are.

torchrun ... cli_on_processes.py NOTES COMMAND ...   runs the command; NOTES/INDEX says what the process found
"""

import subprocess
import sys
from pathlib import Path


def run_on_two(notes: Path, *arguments) -> str:
    """What the command prints; fails unless it ends well and there were two processes at the work."""
    notes.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, __file__, notes, *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = {path.name: path.read_text() for path in notes.iterdir()}
    assert found == {"0": "2 on cpu", "1": "2 on cpu"}, found
    return done.stdout


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
