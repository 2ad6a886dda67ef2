"""Write docs/guidance_interval_support.md: what the table-driven test found for each pipeline.

python tests/guidance_interval_matrix.py
"""

from pathlib import Path

import torch
from tiny_guided_pipelines import BATCH, CASES, STEPS, TWO, Case

from diffusers_ext.pipelines import GuidanceInterval

PAGE = Path(__file__).parent.parent / "docs" / "guidance_interval_support.md"
HEAD = """# Pipelines that were tried with a guidance interval

Written by `python tests/guidance_interval_matrix.py` from the cases of `tests/test_guidance_interval.py`, which holds
for each of them, with tiny random networks: the whole line equals plain guidance bit for bit, an empty interval equals
guidance off and a middle one a loop over all rows up to rounding, and the networks are run on exactly these rows.
Other pipelines that are written like these work as well; one that is not understood raises an error.

| Pipeline | How it guides | Rows a prompt, guided | Rows a prompt, else |
| --- | --- | --- | --- |
"""


def rows_of(case: Case, **interval) -> float:
    """Network rows a prompt and a step."""
    with GuidanceInterval(case.pipe, **interval) as limited:
        case.pipe(**case.options, generator=torch.Generator().manual_seed(0), return_dict=False)
    return limited.report.rows / BATCH / STEPS


def line(name: str) -> str:
    case = CASES[name]()
    style = "two calls" if case.order == TWO else f"one batch: {case.order}"
    control = ", with ControlNet" if "control" in name else ""
    guess = " in guess mode" if "guess" in name else ""
    guided, other = rows_of(case, sigma_lo=0.0), rows_of(case, sigma_hi=1e-9)
    return f"| {type(case.pipe).__name__} ({name}) | {style}{control}{guess} | {guided:g} | {other:g} |"


if __name__ == "__main__":
    PAGE.write_text(HEAD + "\n".join(map(line, CASES)) + "\n", encoding="utf-8")
