"""Rows of a table that take long to measure: each is kept as soon as it is known, and a second start finds it."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from .checkpoints.tensor_files import read_json
from .shards import replacing


class ResultRows:
    """The rows of a JSON file by their keys, which must name everything that a row depends on.

    Raises ValueError for a file of something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows: dict[str, dict] = self._kept()

    def _kept(self) -> dict[str, dict]:
        return read_json(self.path) if self.path.exists() else {}

    def row(self, key: str, compute: Callable[[], dict]) -> dict:
        """The row of a key: the one that is there, or compute(), JSON-able, which is written at once."""
        if key not in self.rows:
            row = compute()
            self.rows = {**self._kept(), **self.rows, key: row}  # another start may have added some meanwhile
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as file:
                file.write((json.dumps(self.rows, indent=2) + "\n").encode())
        return self.rows[key]


def summary(rows: Sequence[dict], metric: str) -> str:
    """Mean over the rows that have the metric, and the standard error of that mean where there are several."""
    values = [row[metric] for row in rows if row.get(metric) is not None]
    if not values:
        return "-"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"
