"""A comparison of settings: each image once, kept as soon as it is drawn, and all of them in a grid.

images/000000.png   an image, its settings in the text chunk "settings"
grid.png            all of them under the names of their axes; the same chunk
comparison.json     what is compared, each cell's settings and file, network rows and hash of each image
seconds.json        of each image, measured where it was drawn
lock.json           held while somebody works here
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..evaluation.pictures import labelled_grid
from ..runs.files import changed_files, check_folder, hash_files, remove_leftovers, replacing, sync_folder, write_json
from ..runs.kept import Kept
from ..runs.lock import lock
from ..runs.provenance import describe_pipeline, drawing_versions
from ..sampling.image_files import file_names
from ..sampling.labels import cycled_labels
from .drawing import Drawn, Painter
from .settings import COLUMNS, Grid, Settings, axis, label_of

KEPT, SECONDS, PICTURE, IMAGES = "comparison.json", "seconds.json", "grid.png", "images"


@dataclass(frozen=True)
class Cell:
    """One cell of the grid; cells with settings of the same effect have the same image.

    Attributes:
        row: counted from 0.
        column: counted from 0.
        settings: that it was asked for.
        image: as drawn.
        network_rows: rows that passed the network for it.
        seconds: of its call; None where an earlier start measured them and lost them.
        file: of its image, "" without a folder.
    """

    row: int
    column: int
    settings: Settings
    image: Image.Image
    network_rows: int
    seconds: float | None
    file: str


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns: the cells row by row, the grid as a picture, and a table of costs in Markdown.

    Attributes:
        cells: row by row.
        grid: the cells as a picture.
        table: of costs, in Markdown.
        drawn: how many images this start drew; 0 where an earlier one had drawn all.
    """

    cells: list[Cell]
    grid: Image.Image
    table: str
    drawn: int


def compare(
    pipe: DiffusionPipeline,
    prompt: str | Sequence[str] | None = None,
    class_labels: int | Sequence[int] | None = None,
    seeds: int | Sequence[int] = 0,
    guidance_scales: float | Sequence[float] | None = None,
    guidance_intervals: Sequence[tuple[float, float] | None] | tuple[float, float] | None = None,
    guiders: str | Sequence[str] = "cfg",
    gammas: float | Sequence[float] | None = None,
    skip_steps: int | Sequence[int] | None = None,
    skip_to_sigma: float | Sequence[float] | None = None,
    columns: Sequence[str] = COLUMNS,
    output: str | Path | None = None,
    on_step: Callable[[int, int, int], None] | None = None,
    **call,
) -> Comparison:
    """Draw an image for every combination of settings, with equal seeds, in a grid with named axes.

    Each of the settings is one value or several, an axis; None is the pipeline's own. With a folder, every image is
    kept as soon as it is drawn, and the same call goes on after an interruption: all files but seconds.json end with
    the same bytes. An image that is gone or damaged is drawn anew. Combinations of the same effect, such as weight 1
    in an interval and everywhere, are drawn once.

    Args:
        pipe: text-to-image (takes prompt), class-conditional (class_labels) or unconditional (batch_size).
        prompt: one text or several.
        class_labels: classes; None is 0 for a class-conditional pipeline.
        seeds: of a CPU generator for each image; the noise of a column is the same in all rows.
        guidance_scales: weights of the two predictions: the call's true_cfg_scale where it has one (Flux, Qwen-Image),
            with an empty negative_prompt unless one is given; else its guidance_scale. 1 is off.
        guidance_intervals: (sigma_lo, sigma_hi] in EDM units; None is every step.
        guiders: names of `GUIDERS`: "cfg" is the pipeline's own guidance; "apg" projects with eta 0; "cfg-zero" leaves
            the first step out for flow matching alone.
        gammas: of Boost-and-Skip, through the pipeline's call or `boost_and_skip`.
        skip_steps: of Boost-and-Skip, likewise.
        skip_to_sigma: of Boost-and-Skip, likewise.
        columns: the axes that make the columns, of `AXES`; the others make the rows.
        output: a folder that is new, empty or begun by the same call; None keeps nothing.
        on_step: called as on_step(image, images, steps) with the number of the image that is drawn, how many there are
            and its finished steps, in pipelines that have callback_on_step_end; steps 0 is its beginning.
        **call: further arguments of the pipeline's call, JSON-able: num_inference_steps, negative_prompt, height, ...

    Raises:
        ValueError: before anything is drawn for settings that the pipeline does not take, by name, and for a folder of
            something else, begun with other settings or in use; while drawing, for an image that is not finite.
    """
    painter = Painter(pipe, call)
    if class_labels is None and "class_labels" in painter.takes and prompt is None:
        class_labels = _some_class(pipe)
    axes = {
        "prompt": prompt, "class_label": class_labels, "seed": seeds, "guider": guiders,
        "guidance_scale": guidance_scales, "guidance_interval": guidance_intervals, "gamma": gammas,
        "skip_steps": skip_steps, "skip_to_sigma": skip_to_sigma,
    }  # fmt: skip
    grid = Grid({name: axis(name, values) for name, values in axes.items()}, tuple(columns))
    painter.check_axes(grid.axes)
    plan = [(row, column, settings, painter.same_as(settings)) for row, column, settings in grid.cells()]
    images = list(dict.fromkeys(same for *_, same in plan))
    for settings in dict.fromkeys(replace(same, seed=0) for same in images):
        painter.check(settings)
    on_step = on_step or (lambda image, images, steps: None)
    with _quiet(pipe):
        if output is None:
            shelf = _Shelf()
            return _finished(grid, plan, images, shelf, _fill(shelf, painter, images, on_step))
        folder = check_folder(output, KEPT)
        with _made(folder), lock(folder):
            shelf = _FolderShelf(folder, _begun_with(pipe, grid, call), plan, images)
            drawn = _fill(shelf, painter, images, on_step)
            return _finished(grid, plan, images, shelf, drawn)


class _Shelf:
    """Images in memory, by their number."""

    def __init__(self) -> None:
        self.drawn: dict[int, Drawn] = {}

    def holds(self, number: int) -> bool:
        return number in self.drawn

    def put(self, number: int, drawn: Drawn) -> None:
        self.drawn[number] = drawn

    def image(self, number: int) -> Image.Image:
        pixels = self.drawn[number].image
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def rows(self, number: int) -> int:
        return self.drawn[number].network_rows

    def seconds(self, number: int) -> float | None:
        return self.drawn[number].seconds

    def file(self, number: int) -> str:
        return ""

    def finish(self, grid: Image.Image) -> None:
        pass


class _FolderShelf(_Shelf):
    """Images in a folder. What has no finished image is begun anew, whatever its settings were.

    settings: what is compared, JSON-able. plan, images: of `compare`.

    Raises:
        ValueError: as `Kept.load`.
    """

    def __init__(self, folder: Path, settings: dict, plan: list[tuple], images: list[Settings]):
        super().__init__()
        self.folder, self.settings = folder, [each.given() for each in images]
        self.files = [f"{IMAGES}/{name}" for name in file_names(len(images), "png")]
        number = {same: i for i, same in enumerate(images)}
        self.cells = [
            {"row": row, "column": column, "settings": asked.given(), "file": self.files[number[same]]}
            for row, column, asked, same in plan
        ]
        self.kept = Kept(
            folder / KEPT, settings, lambda content: isinstance(content["images"], dict), drawing_versions()
        )
        content = self.kept.read()
        if content is not None and content["images"]:
            self.kept.check(content)
        (folder / IMAGES).mkdir(exist_ok=True)
        for leftover in (folder, folder / IMAGES):
            remove_leftovers(leftover)
        self.noted: dict[str, dict] = {} if content is None else content["images"]
        for name in changed_files(folder, {name: note["sha256"] for name, note in self.noted.items()}):
            del self.noted[name]
        self.measured = self._read_seconds()
        self._save()

    def holds(self, number: int) -> bool:
        return self.files[number] in self.noted

    def put(self, number: int, drawn: Drawn) -> None:
        super().put(number, drawn)
        name = self.files[number]
        _write_png(self.folder / name, super().image(number), self._chunk(self.settings[number]))
        sync_folder(self.folder / IMAGES)
        self.measured[name] = round(drawn.seconds, 3)
        write_json(self.folder / SECONDS, self.measured)
        self.noted[name] = {"network_rows": drawn.network_rows, **_hash(self.folder, name)}
        self._save()
        del self.drawn[number]

    def image(self, number: int) -> Image.Image:
        with Image.open(self.folder / self.files[number]) as image:
            return image.copy()

    def rows(self, number: int) -> int:
        return self.noted[self.files[number]]["network_rows"]

    def seconds(self, number: int) -> float | None:
        return self.measured.get(self.files[number])

    def file(self, number: int) -> str:
        return self.files[number]

    def finish(self, grid: Image.Image) -> None:
        settings = {name: self.kept.begun_with["settings"][name] for name in ("axes", "columns")}
        _write_png(self.folder / PICTURE, grid, self._chunk(settings))
        sync_folder(self.folder)

    def _save(self) -> None:
        self.kept.save(cells=self.cells, images={name: self.noted[name] for name in self.files if name in self.noted})

    def _chunk(self, settings: dict) -> dict[str, Any]:
        begun = self.kept.begun_with["settings"]
        return {"model": begun["model"], "dtype": begun["dtype"], "call": begun["call"], **settings}

    def _read_seconds(self) -> dict[str, float]:
        with suppress(OSError, ValueError):
            content = json.loads((self.folder / SECONDS).read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return {name: value for name, value in content.items() if isinstance(value, float)}
        return {}


def _fill(shelf: _Shelf, painter: Painter, images: list[Settings], on_step: Callable) -> int:
    """Draw what is not there; returns how many."""
    missing = [number for number in range(len(images)) if not shelf.holds(number)]
    for number in missing:
        on_step(number, len(images), 0)
        shelf.put(
            number, painter.draw(images[number], lambda steps, number=number: on_step(number, len(images), steps))
        )
    return len(missing)


def _finished(grid: Grid, plan: list[tuple], images: list[Settings], shelf: _Shelf, drawn: int) -> Comparison:
    number = {same: i for i, same in enumerate(images)}
    pictures = [shelf.image(i) for i in range(len(images))]
    cells = []
    for row, column, asked, same in plan:
        i = number[same]
        cells.append(Cell(row, column, asked, pictures[i], shelf.rows(i), shelf.seconds(i), shelf.file(i)))
    sheet = _sheet(grid, cells)
    shelf.finish(sheet)
    return Comparison(cells, sheet, _table(grid, cells), drawn)


def _sheet(grid: Grid, cells: list[Cell]) -> Image.Image:
    """The picture of the grid: axes with one value are named in its title."""
    rows, columns, varied = grid.side(columns=False), grid.side(columns=True), grid.varied()
    names = [
        ["\n".join(label_of(name, value) for name, value in one.items() if name in varied) for one in side]
        for side in (rows, columns)
    ]
    table = [cells[i * len(columns) : (i + 1) * len(columns)] for i in range(len(rows))]
    for i, row in enumerate(table):
        costs = sorted({cell.network_rows for cell in row})
        names[0][i] += f"\n{'-'.join(str(cost) for cost in dict.fromkeys((costs[0], costs[-1])))} network rows"
    plain = (None, "cfg", 0) if "seed" in varied else (None, "cfg")
    fixed = {name: values[0] for name, values in grid.axes.items() if name not in varied and values[0] not in plain}
    title = ", ".join(label_of(name, value) for name, value in fixed.items())
    return labelled_grid([[cell.image for cell in row] for row in table], *names, title)


def _table(grid: Grid, cells: list[Cell]) -> str:
    """Markdown: a line a cell, with the axes that vary, network rows and seconds."""
    varied = grid.varied()
    lines = [[*varied, "network rows", "seconds", "file"], ["---"] * (len(varied) + 3)]
    for cell in cells:
        settings = vars(cell.settings)
        words = ["none" if settings[name] is None else _word(settings[name]) for name in varied]
        seconds = "-" if cell.seconds is None else f"{cell.seconds:.2f}"
        lines.append([*words, str(cell.network_rows), seconds, cell.file or "-"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({value[0]:g}, {value[1]:g}]"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _begun_with(pipe: DiffusionPipeline, grid: Grid, call: dict) -> dict[str, Any]:
    """All that the images depend on, JSON-able."""
    return {
        "axes": {name: list(values) for name, values in grid.axes.items() if values != (None,)},
        "columns": list(grid.columns),
        "call": {name: value for name, value in call.items() if value is not None},
        "cpu_threads": torch.get_num_threads() if pipe._execution_device.type == "cpu" else None,
        **describe_pipeline(pipe),
    }


def _some_class(pipe: DiffusionPipeline) -> int | None:
    labels = cycled_labels(pipe, 1)
    return None if labels is None else int(labels[0])


def _write_png(path: Path, image: Image.Image, settings: dict) -> None:
    """The same image and settings give the same bytes."""
    chunk, buffer = PngInfo(), BytesIO()
    chunk.add_itxt("settings", json.dumps(settings, ensure_ascii=False))
    image.save(buffer, "PNG", pnginfo=chunk)
    with replacing(path) as file:
        file.write(buffer.getvalue())


def _hash(folder: Path, name: str) -> dict[str, str]:
    return {"sha256": hash_files(folder, [name])[name]}


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder that exists, and goes again where nothing has come into it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
