"""Tables of a section: words that the console and the report show alike."""

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..evaluation.notes import LEFT_OUT, few_images

CLASSIFIER_FEATURES = 64


def words_table(title: str, legend: str, columns: list[str], rows: list[list[str]]) -> dict:
    """A table as demo.json keeps it; the first column names the rows.

    Raises ValueError for a row of another length than columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"each row needs {len(columns)} cells, one for each of {columns}, got {row}")
    return {"title": title, "legend": legend, "columns": columns, "rows": rows}


def with_notes(legend: str, images: int, without_lof: bool = False) -> str:
    """A legend, and what makes numbers of digits misleading. without_lof: whether a metric is left out."""
    notes = few_images(images, CLASSIFIER_FEATURES), LEFT_OUT if without_lof else None
    return " ".join([legend, *(f"Note: {note}." for note in notes if note)])


def print_table(console: Console, table: dict) -> None:
    """Print what `words_table` made."""
    printed = Table(title=table["title"], caption=table["legend"], caption_justify="left", box=SIMPLE, min_width=78)
    for number, name in enumerate(table["columns"]):
        printed.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in table["rows"]:
        printed.add_row(*row)
    console.print(printed)
