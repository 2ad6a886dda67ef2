"""The app in a real browser, on loopback: each tab's button draws two pictures."""

import contextlib
import http.client
import re
import socket
from importlib.util import find_spec

import pytest
import torch
from browser import BROWSER, needs_browser
from tiny_pipelines import tiny_stable_diffusion

for needed in ("playwright", "gradio"):  # pytest.importorskip would also skip where one is there and broken
    if find_spec(needed) is None:
        pytest.skip(f"needs {needed}", allow_module_level=True)

from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel  # noqa: E402
from playwright import sync_api  # noqa: E402

from diffusers_ext import (  # noqa: E402
    CTMCScheduler,
    DiscreteDiffusionPipeline,
    FlowPostprocessingPipeline,
    SEDDTransformer,
)
from diffusers_ext.app import interface  # noqa: E402
from diffusers_ext.app.computations import Drawn  # noqa: E402
from diffusers_ext.app.interface import serve  # noqa: E402
from diffusers_ext.app.models import Models  # noqa: E402
from diffusers_ext.app.text_to_image import TextToImage  # noqa: E402

pytestmark = [needs_browser, pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")]  # it uses old pandas
WAIT = 90_000  # milliseconds; machines may be busy
BEGUN = []  # the page of each computation that the app has begun


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stoppable = interface._stoppable

    def begins(session):
        BEGUN.append(session)
        return stoppable(session)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interface, "_stoppable", begins)
        app = serve(Models("cpu"), port, block=False)
        yield f"http://127.0.0.1:{port}"
        app.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An untrained flow, an untrained model of sequences and one of prompts."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    unet = UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    FlowPostprocessingPipeline(unet, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder / "flow")
    model = SEDDTransformer(vocab_size=33, sequence_length=16, hidden_size=8, cond_dim=8, num_blocks=1, num_heads=2)
    DiscreteDiffusionPipeline(model, CTMCScheduler(vocab_size=33)).save_pretrained(folder / "sequences")
    tiny_stable_diffusion().save_pretrained(folder / "prompts")
    return folder


@pytest.fixture(scope="module")
def page(address):
    """The app at the width of a laptop; what it asks for elsewhere is refused and noted in `page.elsewhere`."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(WAIT)
        page.elsewhere = []

        def answer(route):
            local = route.request.url.startswith((address, "data:", "blob:"))
            if not local:
                page.elsewhere.append(route.request.url)
            route.continue_() if local else route.abort()

        page.route("**/*", answer)
        page.goto(address)
        page.get_by_role("tab", name="Boost-and-Skip").wait_for()
        yield page
        browser.close()


@pytest.fixture
def drawn(monkeypatch):
    """What the app was asked to draw in the first two tabs."""
    asked = []

    def noting(compare):
        def noted(*given):
            asked.append(given[-1])
            return compare(*given)

        return noted

    for name in ("compare_boost_and_skip", "compare_guidance_interval"):
        monkeypatch.setattr(interface, name, noting(getattr(interface, name)))
    return asked


FIELDS = ("class", "classes", "prompt", "negative prompt", "height", "width")


def enter(panel, label: str, value) -> None:
    """Fill a slider's number or a field, or choose from a list."""
    if label in ("scheduler", "dtype"):
        box = panel.get_by_label(label, exact=True)
        box.click()
        panel.get_by_role("option", name=value, exact=True).click()
        sync_api.expect(box).to_have_value(value)
        return
    if label in FIELDS:
        box, key = panel.get_by_label(label, exact=True), "Tab"
    elif label.startswith(("model", "flow")):
        box, key = panel.get_by_label(label, exact=True), "Enter"
    else:
        box, key = panel.get_by_label(f"number input for {label}", exact=True), "Tab"
    box.fill(str(value))
    box.press(key)


def press(page, panel, name: str = "Draw both") -> None:
    """Press a button until the app begins to compute: a press on what still moves is lost, as it is for a user."""
    before = len(BEGUN)
    for _ in range(20):
        panel.get_by_role("button", name=name).click()
        for _ in range(100):
            if len(BEGUN) > before:
                return
            page.wait_for_timeout(50)
    pytest.fail(f"{name} was pressed 20 times, and nothing began")


def draws_both(page, tab: str, **values) -> str:
    """Go to a tab, enter values, press its button, wait for two pictures; returns the text of the tab."""
    page.get_by_role("tab", name=tab).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    for label, value in values.items():
        enter(panel, label, value)
    press(page, panel)
    pictures = panel.locator("img[src*='/file=']")
    sync_api.expect(pictures).to_have_count(2, timeout=WAIT)
    decoded = "images => Promise.all(images.map(image => image.decode().then(() => image.naturalWidth)))"
    for _ in range(20):
        with contextlib.suppress(sync_api.Error):  # a picture from before has just gone
            assert min(pictures.evaluate_all(decoded)) >= 50
            break
        page.wait_for_timeout(200)
    else:
        pytest.fail("the pictures cannot be decoded")
    return panel.inner_text()


@pytest.mark.slow
def test_boost_and_skip(page, drawn):
    text = draws_both(page, "Boost-and-Skip", **{"steps": 4, "skip: first steps left out": 1, "samples": 2})
    assert "gamma 4, the first 1 skipped" in text
    assert drawn == [Drawn(count=2, seed=0)]  # no class is every class in turn, not class 0


@pytest.mark.slow
def test_guidance_interval_draws_the_sigma_axis(page, drawn):
    text = draws_both(page, "Guidance interval", steps=4, samples=2, **{"class": 7})
    assert drawn == [Drawn(count=2, seed=0, label=7)]
    found = re.search(r"(\d) of 4 steps guided", text)
    assert found and f"in {found[1]} of them" in text
    panel = page.get_by_role("tabpanel").filter(visible=True)
    assert panel.locator("svg.chart use:has(title)").count() == 4
    enter(panel, "steps", 6)  # the axis follows the sliders before anything is drawn
    sync_api.expect(panel.locator("svg.chart use:has(title)")).to_have_count(6, timeout=WAIT)


@pytest.mark.slow
def test_discrete(page, folders):
    model = {"model: shipped, a folder or a Hub id": folders / "sequences"}
    text = draws_both(page, "Discrete diffusion", **model, steps=3, samples=2)
    assert "even steps: " in text and "with the table: " in text
    assert page.get_by_role("tabpanel").filter(visible=True).locator("svg.chart").count() == 1


@pytest.mark.slow
def test_flow(page, folders):
    flow = {"flow, trained on its images": folders / "flow"}
    text = draws_both(page, "Flow postprocessing", **flow, steps=3, samples=2)
    assert "repaired to strength 1 in 4 steps" in text


MODEL = "model: shipped, a folder or a Hub id"
TEXT = ("prompt", "negative prompt", "height", "width", "scheduler", "dtype")
ASKED = {
    "prompt": "cat", "negative prompt": "dog", "height": 32, "width": 24, "scheduler": "EulerDiscreteScheduler",
    "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("tab", ["Boost-and-Skip", "Guidance interval", "Flow postprocessing", "Grid"])
def test_what_a_model_takes_is_shown(page, folders, tab):
    page.get_by_role("tab", name=tab).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    name = "classes" if tab == "Grid" else "class"

    def shows(shown: bool) -> None:
        for label in TEXT:
            sync_api.expect(panel.get_by_label(label, exact=True)).to_be_visible(visible=shown)
        sync_api.expect(panel.get_by_label(name, exact=True)).to_be_visible(visible=not shown)

    shows(False)
    enter(panel, MODEL, folders / "prompts")
    shows(True)
    enter(panel, MODEL, "mnist-unet")
    shows(False)


@pytest.mark.slow
def test_a_prompt_is_drawn_as_asked_and_left_out_where_it_is_hidden(page, folders, drawn):
    values = {"steps": 4, "skip: first steps left out": 1, "samples": 1, "class": 7}
    draws_both(page, "Boost-and-Skip", **values, **{MODEL: folders / "prompts"}, **ASKED)
    panel = page.get_by_role("tabpanel").filter(visible=True)
    enter(panel, MODEL, "mnist-unet")
    sync_api.expect(panel.get_by_label("prompt", exact=True)).to_be_hidden()
    press(page, panel)
    for _ in range(600):
        if len(drawn) < 2:
            page.wait_for_timeout(50)
    text = TextToImage("cat", "dog", 32, 24, "EulerDiscreteScheduler", "bfloat16")
    assert drawn == [Drawn(count=1, text=text), Drawn(count=1, label=7)]
    enter(panel, "class", "")


@pytest.mark.slow
def test_grid(page):
    page.get_by_role("tab", name="Grid").click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    enter(panel, "steps", 2)
    press(page, panel, "Draw the grid")
    sync_api.expect(panel.locator("img[src*='/file=']")).to_have_count(1, timeout=WAIT)
    sync_api.expect(panel.get_by_role("row")).to_have_count(1 + 16)  # two classes, seeds, weights and intervals


@pytest.mark.slow
def test_the_code_of_what_is_shown_can_be_copied(page):
    text = draws_both(page, "Boost-and-Skip", **{"steps": 3, "skip: first steps left out": 1, "samples": 2})
    panel = page.get_by_role("tabpanel").filter(visible=True)
    assert "load_pipeline" not in text
    panel.get_by_role("button", name="the same in Python").click()
    code = panel.locator(".cm-content")
    sync_api.expect(code).to_contain_text("""load_pipeline('mnist-unet', "boost-and-skip")""")
    sync_api.expect(code).to_contain_text("skip_steps=1")


@pytest.mark.slow
def test_noise_levels_have_logarithmic_sliders(page):
    """The label says the level; both ends are reached."""
    page.get_by_role("tab", name="Guidance interval").click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    sync_api.expect(panel.get_by_label("number input for interval: sigma above 0.75")).to_be_visible()
    enter(panel, "interval: sigma at most 1.7", 2)
    sync_api.expect(panel.get_by_label("number input for interval: sigma at most 100")).to_be_visible()
    enter(panel, "interval: sigma above 0.75", -3)
    sync_api.expect(panel.get_by_label("number input for interval: sigma above 0", exact=True)).to_be_visible()


@pytest.mark.slow
def test_a_second_page_waits_and_each_can_stop(page, address):
    """Steps are told; who comes second reads that it waits; Stop ends a wait and a computation."""
    second = page.context.browser.new_page()
    second.set_default_timeout(WAIT)
    second.goto(address)
    panels = []
    for user, tab in ((page, "Boost-and-Skip"), (second, "Guidance interval")):
        user.get_by_role("tab", name=tab).click()
        panels.append(user.get_by_role("tabpanel").filter(visible=True))
        enter(panels[-1], "steps", 250)
        enter(panels[-1], "samples", 64)
    press(page, panels[0])
    page.get_by_text(re.compile("sampling 1, step [1-9]")).first.wait_for()
    press(second, panels[1])
    second.get_by_text("waiting: another computation is running").first.wait_for()
    panels[1].get_by_role("button", name="Stop").click()
    second.get_by_text("stopped: waiting").first.wait_for()
    panels[0].get_by_role("button", name="Stop").click()
    page.get_by_text(re.compile("stopped: sampling 1, step")).first.wait_for()
    second.close()
    draws_both(page, "Boost-and-Skip", **{"steps": 3, "skip: first steps left out": 1, "samples": 2})


@pytest.mark.slow
def test_wrong_input_is_shown_as_a_message(page):
    page.get_by_role("tab", name="Flow postprocessing").click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    enter(panel, "flow, trained on its images", "mnist-unet")
    press(page, panel)
    page.get_by_text("is no flow").first.wait_for()
    enter(panel, "class", "seven")
    press(page, panel)
    page.get_by_text("class must be a whole number").first.wait_for()
    enter(panel, "class", "")


@pytest.mark.slow
def test_errors_are_shown_as_text_and_not_printed(page, capfd):
    page.get_by_role("tab", name="Boost-and-Skip").click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    name = MODEL
    enter(panel, name, "<class 'Pipeline'>")
    press(page, panel)
    page.get_by_text("<class 'Pipeline'>").first.wait_for()
    page.get_by_text("is no folder, no Hub id").first.wait_for()
    enter(panel, name, "countdown-sedd")
    press(page, panel)
    page.get_by_text("is not one that boost_and_skip can shorten").first.wait_for()
    enter(panel, name, "mnist-unet")
    assert "Traceback" not in "".join(capfd.readouterr())


def answer(address: str, method: str, path: str, host: str | None = None, **headers) -> int:
    port = int(address.rsplit(":", 1)[1])
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        client.request(method, path, b"{}", {"Host": host or f"127.0.0.1:{port}", **headers})
        return client.getresponse().status


def test_other_hosts_and_files_are_refused(address):
    for path in ("/", "/config", "/gradio_api/queue/join", "/gradio_api/queue/data?session_hash=a", "/theme.css"):
        for method in ("GET", "POST", "OPTIONS"):
            asks = {"Origin": "http://evil.org", "Access-Control-Request-Method": "POST"}
            assert answer(address, method, path, "evil.org", **asks) == 403
    assert answer(address, "GET", "/config") == answer(address, "GET", "/config", "localhost") == 200
    assert answer(address, "POST", "/gradio_api/upload") == answer(address, "POST", "/gradio_api/upload/") == 403


# pixels between each picture and what is above it, its title or a button
CLEARANCE = """blocks => blocks.map(block => {
  const [picture, ...above] = ["img", "label", "a[download]"].map(name => block.querySelector(name));
  const bottoms = above.map(part => part.getBoundingClientRect().bottom);
  return picture.getBoundingClientRect().top - Math.max(...bottoms);
})"""


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_nothing_covers_the_pictures(page, width):
    page.set_viewport_size({"width": 1280, "height": 900})
    page.get_by_role("tab", name="Boost-and-Skip").click()
    if page.get_by_role("tabpanel").filter(visible=True).locator("img[src*='/file=']").count() < 2:
        draws_both(page, "Boost-and-Skip", **{"steps": 3, "skip: first steps left out": 1, "samples": 1})
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_function("width => document.documentElement.scrollWidth == width", arg=width)
    blocks = page.get_by_role("tabpanel").filter(visible=True).locator(".picture")
    clearance = blocks.evaluate_all(CLEARANCE)
    assert len(clearance) == 2 and min(clearance) >= 0


def test_nothing_is_asked_of_the_network(page):
    assert page.elsewhere == []


def test_only_this_machine_is_served(address):
    port = int(address.rsplit(":", 1)[1])
    others = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for other in others:
        with contextlib.closing(socket.socket()) as client:
            client.settimeout(5)
            assert client.connect_ex((other, port)) != 0
    with contextlib.closing(socket.create_connection(("127.0.0.1", port), 5)):
        pass
