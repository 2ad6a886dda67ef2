"""Tables of a section: words that the console and the report show alike."""

from collections.abc import Callable, Iterable

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..evaluation.notes import LEFT_OUT, few_images
from ..metrics import feature_statistics, frechet_distance
from ..shipped import load_shipped_classifier

CLASSIFIER_FEATURES = 64
ERRORS = "Last line: the largest standard error of a column, of sampling (jackknife)."


def words_table(title: str, legend: str, columns: list[str], rows: list[list[str]]) -> dict:
    """A table as demo.json keeps it; the first column names the rows.

    Raises:
        ValueError: for a row of another length than columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"each row needs {len(columns)} cells, one for each of {columns}, got {row}")
    return {"title": title, "legend": legend, "columns": columns, "rows": rows}


def with_notes(legend: str, images: int, distance: bool = True, without_lof: bool = False) -> str:
    """A legend, and what makes numbers of digits misleading.

    distance: whether a Fréchet distance is among them. without_lof: whether a metric is left out.
    """
    notes = few_images(images, CLASSIFIER_FEATURES) if distance else None, LEFT_OUT if without_lof else None
    return " ".join([legend, *(f"Note: {note}." for note in notes if note)])


def errors_row(rows: list[dict], names: Iterable[str], words: Callable[[str, float], str]) -> list[str]:
    """The last line of a table: the largest standard error of each column, of those that have one.

    rows: of numbers, with name_error beside name. words: how a column writes a number.
    """
    largest = {}
    for name in names:
        errors = [row[f"{name}_error"] for row in rows if row.get(f"{name}_error") is not None]
        largest[name] = words(name, max(errors)) if errors else ""
    return ["± at most", *largest.values()]


def distance_of_real_images(images: int) -> str:
    """A sentence with the Fréchet distance of as many training digits, of all classes alike as the samples are."""
    _, reference = load_shipped_classifier()
    each = [reference.features[reference.labels == digit][: max(1, images // 10)] for digit in range(10)]
    some = feature_statistics(torch.cat(each))
    distance = frechet_distance(some.mean, some.covariance, reference.mean, reference.covariance)
    return f"Fréchet of {sum(map(len, each))} training images in place of samples: {distance:.3f}."


def print_table(console: Console, table: dict) -> None:
    """Print what `words_table` made."""
    printed = Table(title=table["title"], caption=table["legend"], caption_justify="left", box=SIMPLE, min_width=78)
    for number, name in enumerate(table["columns"]):
        printed.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in table["rows"]:
        printed.add_row(*row)
    console.print(printed)
