"""The report of the demo: one HTML file that holds its pictures, charts and style, from what demo.json says."""

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from PIL import Image

from .boost_and_skip import COLUMNS

TEMPLATE = Path(__file__).parent / "report.html.jinja"
STYLE = Path(__file__).parent / "report.css"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MEDIA_TYPES = {".mid": "audio/midi", ".txt": "text/plain;charset=utf-8"}  # of files that are no pictures

BOOST_CODE = """from diffusers_ext.shipped import load_pipeline

pipe = load_pipeline("mnist-unet", "boost-and-skip")  # or a folder, or a Hub id
digits = pipe(class_labels=list(range(10)), num_inference_steps=50, gamma=2.0, skip_steps=3).images
"""
INTERVAL_CODE = """from diffusers_ext import GuidanceInterval
from diffusers_ext.shipped import load_pipeline

pipe = load_pipeline("mnist-unet")  # or any diffusers pipeline that guides
with GuidanceInterval(pipe, guidance_interval=(0.75, 1.7)) as interval:
    digits = pipe(class_labels=list(range(10)), num_inference_steps=16, guidance_scale=3.0).images
print(interval.report)  # each step: its sigma, guided or not, network rows
"""
DISCRETE_CODE = """from diffusers_ext.jump_your_steps import optimize_timesteps
from diffusers_ext.shipped import load_pipeline

pipe = load_pipeline("countdown-sedd")
data = pipe(batch_size=8, num_inference_steps=64).tokens  # better: sequences like those to generate
tables = optimize_timesteps(pipe.model, pipe.scheduler, data, num_inference_steps=(8,), grid_size=64)
pipe.scheduler = tables.apply_to(pipe.scheduler)
tokens = pipe(batch_size=4, num_inference_steps=8).tokens
"""
FLOW_CODE = """from diffusers_ext.shipped import load_pipeline

base, flow = load_pipeline("mnist-unet"), load_pipeline("mnist-flow")
call = {"class_labels": list(range(10)), "output_type": "pt"}
digits = base(num_inference_steps=16, guidance_scale=6.0, **call).images
repaired = flow(digits, class_labels=list(range(10)), num_inference_steps=10).images
"""


@dataclass(frozen=True)
class Method:
    """A chapter of the report: sections of the demo, what it is in two sentences, how to do it, lines and charts."""

    title: str
    sections: tuple[str, ...]
    summary: str
    paper: str
    code: str
    charts: Callable[[dict], tuple[list[str], list[str]]]


def boost_charts(result: dict) -> tuple[list[str], list[str]]:
    """A chart of each metric over gamma."""
    from ..evaluation.charts import Line, line_chart

    rows, charts = result["boost_and_skip"]["rows"], []
    for name, title in COLUMNS.items():
        points = [(row["gamma"], row[name]) for row in rows if row.get(name) is not None]
        if points and name != "seconds_per_image":
            percent = name in ("recognised", "inside")
            charts.append(line_chart([Line(title, points)], title, "gamma (1: stock sampler)", percent=percent))
    return [], charts


def interval_charts(result: dict) -> tuple[list[str], list[str]]:
    """Distance and recall over the guidance weight, for both ways of guiding."""
    from ..evaluation.charts import Line, line_chart

    rows = sorted(result["guidance_interval"]["rows"], key=lambda row: row["guidance_scale"])
    kinds = {"guidance in every step": False, "in the interval": True}
    charts = []
    for name, title in (("frechet", "Fréchet distance"), ("recall", "recall")):
        lines = []
        for kind, limited in kinds.items():
            chosen = [row for row in rows if row["guidance_scale"] == 1 or row["limited"] == limited]
            lines.append(Line(kind, [(row["guidance_scale"], row[name]) for row in chosen]))
        charts.append(line_chart(lines, title, "guidance weight (1: none)"))
    return list(kinds), charts


def discrete_charts(result: dict) -> tuple[list[str], list[str]]:
    """The tables over time, and the errors over the evaluations of the network; nothing before they are made."""
    from ..evaluation.charts import Line, line_chart, tick_chart

    if "jump_your_steps" not in result:
        return [], []
    tables, rows = (result["jump_your_steps"][name] for name in ("tables", "rows"))
    names = list(tables)
    most = rows[-1]["steps"]
    lines = [
        Line(name, [(row["steps"] + 1, row[name][0]) for row in rows], [row[name][1] for row in rows])
        for name in names
    ]
    charts = [tick_chart({name: tables[name][str(most)] for name in names}, f"Tables of {most} steps", "time")]
    log = all(row[name][0] > 0 for row in rows for name in names)
    charts.append(line_chart(lines, "Error of transitions", "network evaluations", log=log, percent=True))
    return names, charts


def flow_charts(result: dict) -> tuple[list[str], list[str]]:
    """Metrics before and after the repair over the guidance scale."""
    from ..evaluation.charts import Line, line_chart

    rows, kinds = result["flow_postprocessing"]["rows"], {"before": False, "after the repair": True}
    titles = {"frechet": "Fréchet distance", "recognised": "recognised", "recall": "recall"}
    charts = []
    for name, title in titles.items():
        lines = [
            Line(kind, [(row["guidance_scale"], row[name]) for row in rows if row["repaired"] == repaired])
            for kind, repaired in kinds.items()
        ]
        charts.append(line_chart(lines, title, "guidance scale (1: none)", percent=name == "recognised"))
    return list(kinds), charts


METHODS = {
    "boost-and-skip": Method(
        "Boost-and-Skip",
        ("boost_and_skip",),
        "The initial noise is multiplied by gamma and the first steps are left out, and nothing else changes. What"
        " comes out are samples from the sparse regions of the data: the larger gamma, the less usual, and the more"
        " often not what was asked for.",
        "2502.06516",
        BOOST_CODE,
        boost_charts,
    ),
    "guidance-interval": Method(
        "Guidance interval",
        ("guidance_interval",),
        "Classifier-free guidance is applied only in steps whose noise level sigma lies in an interval, (sigma_lo,"
        " sigma_hi]. Samples stay more varied than with guidance everywhere, and the steps outside of it need half the"
        " network evaluations.",
        "2404.07724",
        INTERVAL_CODE,
        interval_charts,
    ),
    "discrete-diffusion": Method(
        "Discrete diffusion and Jump Your Steps",
        ("discrete", "jump_your_steps"),
        "A discrete diffusion model draws many tokens at once in each step, and where in time the steps lie decides"
        " how much goes wrong. Jump Your Steps finds these times once, for each number of steps, and they travel with"
        " the model in its scheduler.",
        "2410.07761",
        DISCRETE_CODE,
        discrete_charts,
    ),
    "flow-postprocessing": Method(
        "Flow postprocessing",
        ("flow_postprocessing",),
        "A second, small network leads each generated image along a straight line to real images that are near it. It"
        " repairs what strong guidance broke, in a few steps, and the base model is not touched.",
        "2503.10638",
        FLOW_CODE,
        flow_charts,
    ),
}


def write_report(folder: Path) -> Path:
    """Write report.html from demo.json and the files that it names, all in the folder; returns its path.

    Sections that are not there yet are said to be missing.

    Raises:
        OSError: where a file cannot be read.
    """
    result = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    path = folder / "report.html"
    path.write_text(report_html(result, folder), encoding="utf-8")
    return path


def report_html(result: dict, folder: Path) -> str:
    """The page. result: as demo.json holds it. folder: where the files of the sections are."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(spaced=lambda name: name.replace("_", " "), words=_words)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        result=result, methods=METHODS, policy=POLICY, style=STYLE.read_text(encoding="utf-8"),
        charts=find_spec("matplotlib") is not None, pictures=partial(_pictures, folder),
        downloads=partial(_downloads, folder),
    )  # fmt: skip


def _pictures(folder: Path, part: dict) -> Iterator[tuple[bool, list[tuple[str, int, int, str]]]]:
    """For each picture of a section whether its panels are wide, and of each the title, width, height and data URI."""
    for name, boxes in part.get("pictures", {}).items():
        wide = all(box[2] - box[0] > 2 * (box[3] - box[1]) for box in boxes.values())
        with Image.open(folder / name) as picture:
            yield wide, [_panel(title, picture.crop(tuple(box))) for title, box in boxes.items()]


def _panel(title: str, panel: Image.Image) -> tuple[str, int, int, str]:
    file = BytesIO()
    panel.save(file, "PNG", optimize=True)
    return title, *panel.size, _data_uri(file.getvalue(), "image/png")


def _downloads(folder: Path, part: dict) -> Iterator[tuple[str, str]]:
    """The name and the data URI of each file of a section that is no picture, to be kept."""
    for name in part["files"]:
        if Path(name).suffix != ".png":
            yield name, _data_uri((folder / name).read_bytes(), MEDIA_TYPES[Path(name).suffix])


def _data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _words(value) -> str:
    if isinstance(value, list):
        return ", ".join(_words(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
