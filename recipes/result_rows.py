"""Rows of a table that take long to measure: each is kept as soon as it is known, and a second start finds it."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from diffusers_ext.checkpoints.tensor_files import read_json
from diffusers_ext.runs.files import write_json
from diffusers_ext.runs.lock import lock


class ResultRows:
    """The rows of a JSON file by their keys, which must name everything that a row depends on.

    Raises:
        ValueError: for a file of something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows: dict[str, dict] = self._kept()

    def _kept(self) -> dict[str, dict]:
        rows = read_json(self.path) if self.path.exists() else {}
        if not all(isinstance(row, dict) for row in rows.values()):
            raise ValueError(f"{self.path} holds no rows of a table; choose another output")
        return rows

    def row(self, key: str, compute: Callable[[], dict]) -> dict:
        """The row of a key: the one that is there, or compute(), JSON-able, which is written at once."""
        if key not in self.rows:
            self.put(key, compute())
        return self.rows[key]

    def put(self, key: str, row: dict) -> None:
        """Write a row, beside those that other starts have added meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock(self.path):
            self.rows = {**self._kept(), **self.rows, key: row}
            write_json(self.path, self.rows)


def summary(rows: Sequence[dict], metric: str) -> str:
    """Mean over the rows that have the metric, and the standard error of that mean where there are several."""
    values = [row[metric] for row in rows if row.get(metric) is not None]
    if not values:
        return "-"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"
