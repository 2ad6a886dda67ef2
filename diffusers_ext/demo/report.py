"""The report of the demo: one HTML file that holds its pictures, charts and style, from what demo.json says."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from ..evaluation.charts import Line, legend, line_chart, tick_chart
from ..evaluation.pictures import Box
from .boost_and_skip import COLUMNS

STYLE = Path(__file__).parent / "report.css"
# Nothing is fetched, whatever the page says: pictures are in it, and so is the style.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MEDIA_TYPES = {".mid": "audio/midi"}  # of files that are no pictures
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Four research methods for diffusers</title>
<style>
{style}</style>
</head>
"""
ABOUT = (
    "Each method below was run on this machine, on small models that ship with the package, beside the stock sampler"
    " with the same seeds."
)
SHORT = (
    "This is the short demo: few samples and few steps, so that the numbers are rough, as the standard errors in the"
    " tables say; <code>diffusers-ext demo --full</code> takes more."
)

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
    """A chapter of the report: sections of the demo, what it is in two sentences, how to do it, its charts."""

    title: str
    sections: tuple[str, ...]
    summary: str
    paper: str
    code: str
    charts: Callable[[dict[str, dict]], str]


def boost_charts(results: dict[str, dict]) -> str:
    """A chart of each metric over gamma."""
    rows, charts = results["boost_and_skip"]["rows"], []
    for name, title in COLUMNS.items():
        points = [(row["gamma"], row[name]) for row in rows if row.get(name) is not None]
        if points and name != "seconds_per_image":
            percent = name in ("recognised", "inside")
            charts.append(line_chart([Line(title, points)], title, "gamma (1: stock sampler)", percent=percent))
    return _charts(charts)


def interval_charts(results: dict[str, dict]) -> str:
    """Distance and recall over the guidance weight, for both ways of guiding."""
    rows = sorted(results["guidance_interval"]["rows"], key=lambda row: row["guidance_scale"])
    kinds = {"guidance in every step": False, "in the interval": True}
    charts = []
    for name, title in (("frechet", "Fréchet distance"), ("recall", "recall")):
        lines = []
        for kind, limited in kinds.items():
            chosen = [row for row in rows if row["guidance_scale"] == 1 or row["limited"] == limited]
            lines.append(Line(kind, [(row["guidance_scale"], row[name]) for row in chosen]))
        charts.append(line_chart(lines, title, "guidance weight (1: none)"))
    return legend(list(kinds)) + _charts(charts)


def discrete_charts(results: dict[str, dict]) -> str:
    """The tables over time, and the errors over the evaluations of the network; nothing before they are made."""
    if "jump_your_steps" not in results:
        return ""
    result = results["jump_your_steps"]
    names, rows = list(result["tables"]), result["rows"]
    most = rows[-1]["steps"]
    lines = [
        Line(name, [(row["steps"] + 1, row[name][0]) for row in rows], [row[name][1] for row in rows])
        for name in names
        if all(row[name][0] > 0 for row in rows)
    ]
    charts = [
        tick_chart({name: result["tables"][name][str(most)] for name in names}, f"Tables of {most} steps", "time")
    ]
    if lines:
        charts.append(line_chart(lines, "Error of transitions", "network evaluations", log=True, percent=True))
    return legend(names) + _charts(charts)


def flow_charts(results: dict[str, dict]) -> str:
    """Metrics before and after the repair over the guidance scale."""
    rows, kinds = results["flow_postprocessing"]["rows"], {"before": False, "after the repair": True}
    titles = {"frechet": "Fréchet distance", "recognised": "recognised", "recall": "recall"}
    charts = []
    for name, title in titles.items():
        lines = [
            Line(kind, [(row["guidance_scale"], row[name]) for row in rows if row["repaired"] == repaired])
            for kind, repaired in kinds.items()
        ]
        charts.append(line_chart(lines, title, "guidance scale (1: none)", percent=name == "recognised"))
    return legend(list(kinds)) + _charts(charts)


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
    head = HEAD.format(policy=POLICY, style=STYLE.read_text(encoding="utf-8"))
    chapters = "\n".join(_chapter(anchor, method, result, folder) for anchor, method in METHODS.items())
    return f"{head}<body>\n{_header(result)}\n<main>\n{chapters}\n</main>\n{_footer(result)}\n</body>\n</html>\n"


def _header(result: dict) -> str:
    links = "".join(f'<li><a href="#{anchor}">{escape(method.title)}</a></li>' for anchor, method in METHODS.items())
    short = "" if result["full"] else f"<p><strong>{SHORT}</strong></p>"
    title = "<h1>Four research methods for diffusers</h1>"
    return f"<header>{title}<p>{ABOUT}</p>{short}<nav><ul>{links}</ul></nav></header>"


def _footer(result: dict) -> str:
    seconds = sum(part["seconds_in_all"] for part in result.values() if isinstance(part, dict))
    threads = result["torch_threads"]
    made = (
        f"diffusers_ext {result['version']} on {result['device']}, {threads} torch thread{'s' * (threads != 1)};"
        f" {seconds:.0f} seconds in all. The numbers themselves are in demo.json."
    )
    return f'<footer class="soft"><p>{escape(made)}</p></footer>'


def _chapter(anchor: str, method: Method, result: dict, folder: Path) -> str:
    results = {name: result[name] for name in method.sections if name in result}
    link = f'<a href="https://arxiv.org/abs/{method.paper}">arXiv {method.paper}</a>'
    parts = [f"<h2>{escape(method.title)}</h2>", f"<p>{escape(method.summary)} {link}.</p>"]
    parts += [_pictures(part, folder) for part in results.values()]
    if method.sections[0] in results:
        parts.append(method.charts(results))
    parts += [_table(part["table"]) for part in results.values()]
    parts.append(f"<h3>In code</h3><pre><code>{escape(method.code)}</code></pre>")
    for name, part in results.items():
        title = "Settings and time" + (f", {_spaced(name)}" if len(method.sections) > 1 else "")
        parts.append(f"<h3>{title}</h3>{_settings(part, folder)}")
    for name in method.sections:
        if name not in results:
            parts.append(f'<p class="note">Not run yet: {_spaced(name)}.</p>')
    return f'<section id="{anchor}">' + "\n".join(parts) + "</section>"


def _pictures(part: dict, folder: Path) -> str:
    """The panels of a section's pictures, each an image of its own under its title."""
    figures = []
    for name, boxes in part.get("pictures", {}).items():
        wide = all(box[2] - box[0] > 2 * (box[3] - box[1]) for box in boxes.values())
        with Image.open(folder / name) as picture:
            panels = "".join(_figure(title, picture, box) for title, box in boxes.items())
        figures.append(f'<div class="pictures{" wide" if wide else ""}">{panels}</div>')
    return "".join(figures)


def _figure(title: str, picture: Image.Image, box: Box) -> str:
    panel, file = picture.crop(tuple(box)), BytesIO()
    panel.save(file, "PNG", optimize=True)
    image = (
        f'<img class="ink" alt="{escape(title)}" width="{panel.width}" height="{panel.height}"'
        f' src="{_data_uri(file.getvalue(), "image/png")}">'
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{image}</figure>"


def _data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _charts(charts: list[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _table(table: dict) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table["columns"])
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table["rows"])
    whole = (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
    return f'<h3>{escape(table["title"])}</h3>{whole}<p class="note">{escape(table["legend"])}</p>'


def _settings(part: dict, folder: Path) -> str:
    """The settings and the seconds of a section, and its files that are no pictures, to be kept."""
    words = {_spaced(name): _words(value) for name, value in part["settings"].items()}
    words["seconds in all"] = f"{part['seconds_in_all']:.0f}"
    items = "".join(f"<li>{escape(name)} <b>{escape(value)}</b></li>" for name, value in words.items())
    links = ""
    for name in part["files"]:
        if Path(name).suffix != ".png":
            uri = _data_uri((folder / name).read_bytes(), MEDIA_TYPES[Path(name).suffix])
            links += f'<p class="note"><a download="{escape(name)}" href="{uri}">{escape(name)}</a></p>'
    return f'<ul class="settings">{items}</ul>{links}'


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _words(value) -> str:
    if isinstance(value, list):
        return ", ".join(_words(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
