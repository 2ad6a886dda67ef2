"""The demo's report: what is in it, and how it looks in a browser."""

import ast
import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
import torch
from browser import look_at, needs_browser
from PIL import Image

from diffusers_ext.demo.report import METHODS, POLICY, report_html, write_report
from diffusers_ext.demo.tables import words_table
from diffusers_ext.shipped import shipped_models

METRICS = ("recognised", "knn_distance", "rarity", "inside", "frechet", "recall")


def made_result(folder) -> dict:
    """As demo.json holds it: all sections, with made numbers and pictures of one colour a panel."""
    boxes = {"plain <b>": [10, 10, 110, 110], "other": [120, 10, 220, 110]}
    picture = Image.new("RGB", (230, 120), "white")
    picture.paste((200, 0, 0), boxes["plain <b>"])
    picture.paste((0, 0, 200), boxes["other"])
    picture.save(folder / "made.png")
    strips = Image.new("L", (1000, 60), 128)
    strips.save(folder / "strips.png")
    (folder / "song.mid").write_bytes(b"MThd")

    def part(rows, files=("made.png",), **more):
        columns = [f"a long column {i}" for i in range(9)]
        table = words_table("a title & more", "a legend", columns, [[f"{i} cells"] * 9 for i in range(3)])
        settings = {"gammas": [1.0, 2.5], "a_model": "x" * 60, "steps": 4}
        facts = {"settings": settings, "rows": rows, "table": table, "files": list(files)}
        return {**facts, "seconds_in_all": 7.4, **more}

    numbers = [{name: 0.1 * i + 0.05 * j for j, name in enumerate(METRICS)} for i in range(1, 5)]
    guided = [(1.0, False), (3.0, False), (3.0, True)]
    repaired = [(1.0, False), (1.0, True), (6.0, False), (6.0, True)]
    edges = {name: {"2": [1.0, 0.5, 0.001], "4": [1.0, 0.7, 0.4, 0.2, 0.001]} for name in ("even", "ours")}
    errors = [
        {"steps": 2, "even": [0.5, 0.01], "ours": [0.3, 0.01]},
        {"steps": 4, "even": [0.2, 0.3], "ours": [0.1, 0]},
    ]
    pictures = {"made.png": boxes}
    wide = {"strips.png": {"one": [0, 0, 1000, 30], "two": [0, 30, 1000, 60]}}
    boosted = [{"gamma": i + 1.0, **row} for i, row in enumerate(numbers)]
    interval = [{"guidance_scale": w, "limited": on, **numbers[i]} for i, (w, on) in enumerate(guided)]
    flow = [{"guidance_scale": w, "repaired": on, **numbers[i]} for i, (w, on) in enumerate(repaired)]
    return {
        "version": "1.2.3",
        "device": "cpu",
        "torch_threads": 2,
        "full": True,
        "boost_and_skip": part(boosted, pictures=pictures),
        "guidance_interval": part(interval, pictures=pictures),
        "discrete": part([], ["strips.png", "song.mid"], pictures=wide),
        "jump_your_steps": part(errors, [], tables=edges),
        "flow_postprocessing": part(flow, pictures=pictures),
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return report_html(made_result(folder), folder)


class Reader(HTMLParser):
    """Every attribute that a browser would fetch, and whether the tags are balanced."""

    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster", "action") or (tag == "link" and name == "href"):
                self.fetched.append(value)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_holds_all_that_it_needs(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert len(reader.fetched) == 2 + 2 + 2 + 2 and all(uri.startswith("data:image/png;") for uri in reader.fetched)
    assert POLICY in page and "default-src 'none'" in POLICY
    assert "<script" not in page and "url(" not in page and "@import" not in page
    assert 'href="data:audio/midi;base64,' in page and 'download="song.mid"' in page


def test_page_shows_every_section(page):
    for anchor, method in METHODS.items():
        assert f'<section id="{anchor}">' in page and f'href="#{anchor}"' in page
        chapter = re.search(rf'<section id="{anchor}">(.*?)</section>', page, re.DOTALL)[1]
        assert method.paper in chapter and "<svg" in chapter and "<img" in chapter and "<table>" in chapter
        assert "gammas <b>1, 2.5</b>" in chapter and "seconds in all <b>7</b>" in chapter
    assert page.count("<svg") == 5 + 2 + 2 + 3  # no chart of a metric that was not measured
    assert "plain &lt;b&gt;" in page and "plain <b>" not in page and "a title &amp; more" in page
    assert "Not run yet" not in page and "37 seconds in all" in page and "2 torch threads" in page


@pytest.mark.slow
def test_a_table_without_errors_keeps_its_line_and_its_colour(tmp_path):
    result = made_result(tmp_path)
    result["jump_your_steps"]["rows"][0]["even"] = [0.0, 0.0]
    chapter = re.search(r'<section id="discrete-diffusion">(.*?)</section>', report_html(result, tmp_path), re.DOTALL)[
        1
    ]
    assert re.findall(r'<li class="(c\d)">(\w+)</li>', chapter) == [("c0", "even"), ("c1", "ours")]
    line = {name: re.search(rf"(var\(--c\d\))[^>]*><title>{name} at 3: ", chapter)[1] for name in ("even", "ours")}
    assert line == {"even": "var(--c0)", "ours": "var(--c1)"}


def test_panels_are_cut_out_of_the_picture(tmp_path, page):
    panels = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    first, second = (Image.open(BytesIO(base64.b64decode(panel))) for panel in panels[:2])
    assert first.size == second.size == (100, 100)
    assert first.getcolors() == [(10_000, (200, 0, 0))] and second.getcolors() == [(10_000, (0, 0, 200))]


def test_page_of_an_interrupted_demo_says_what_is_missing(tmp_path):
    result = made_result(tmp_path)
    for name in ("jump_your_steps", "flow_postprocessing"):
        del result[name]
    (tmp_path / "demo.json").write_text(json.dumps({**result, "full": False}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Not run yet: jump your steps" in page and "Not run yet: flow postprocessing" in page
    assert "This is the short demo" in page and page.count("<svg") == 5 + 2


@pytest.mark.parametrize("anchor", METHODS)
def test_code_runs_as_shown(anchor, monkeypatch):
    """With few steps, which is all that is changed."""
    code = METHODS[anchor].code
    ast.parse(code)
    assert 1 <= sum(not line.startswith("from") for line in code.splitlines() if line.strip()) <= 5
    if "mnist-flow" in code and "mnist-flow" not in shipped_models():
        pytest.skip("the flow does not ship yet")
    for slow, fast in (("num_inference_steps=50", "num_inference_steps=5"), ("=64)", "=4)"), ("=8, n", "=2, n")):
        code = code.replace(slow, fast)
    found = {}
    torch.manual_seed(0)
    exec(code.replace("grid_size=4", "grid_size=12"), found)
    if anchor == "discrete-diffusion":
        assert found["tokens"].shape == (4, 256)
        assert found["pipe"].scheduler.config.timestep_spacing == "table"
    else:
        assert len(found.get("repaired", found["digits"])) == 10


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_page_in_a_browser(page, tmp_path, dark):
    views, console = look_at(page, tmp_path, dark=dark)
    assert console == []
    assert [view["width"] for view in views] == [390, 1280]
    for view in views:
        assert view["scrolled"] <= view["width"]
        assert (view["images"], view["broken"], view["charts"]) == (8, 0, 12)
        assert view["requests"] == []
        assert view["background"] == ("rgb(20, 23, 28)" if dark else "rgb(251, 251, 249)")


@pytest.mark.slow
@needs_browser
def test_browser_sees_what_is_wrong(tmp_path):
    wide = '<body><div style="width: 2000px">x</div><img src="data:image/png;base64,AAAA"><img src="http://127.0.0.1:9/a">'
    views, _ = look_at(wide, tmp_path)
    assert [view["scrolled"] > view["width"] for view in views] == [True, True]
    assert views[0]["broken"] == 2 and views[0]["requests"] == ["http://127.0.0.1:9/a"]
    refused = wide.replace("<body>", f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><body>')
    _, console = look_at(refused, tmp_path)
    assert any("Content Security Policy" in line for line in console)
