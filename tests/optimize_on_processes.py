"""On two processes: each writes the tables that it got, METHOD-PROCESS.json, to the folder."""

import sys
from pathlib import Path

from test_timestep_search import countdown_tables

from diffusers_ext.runs.processes import start_processes

accelerator = start_processes("cpu")
for method in ("exact", "golden"):
    tables = countdown_tables(num_inference_steps=[4], method=method, batch_size=2, accelerator=accelerator)
    tables.save(Path(sys.argv[1]) / f"{method}-{accelerator.process_index}.json")
