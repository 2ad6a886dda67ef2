"""What the app computes, and its command; the interface itself is tried in test_app_browser.py."""

import asyncio
import sys
from dataclasses import replace
from importlib.util import find_spec
from threading import Event, Thread

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from PIL import Image
from tiny_discrete import build
from tiny_pipelines import tiny_sdxl, tiny_stable_diffusion

from diffusers_ext import (
    CTMCScheduler,
    DiscreteDiffusionPipeline,
    FlowPostprocessingPipeline,
    GuidanceInterval,
    SEDDTransformer,
    cli,
)
from diffusers_ext.app import computations, interface
from diffusers_ext.app.computations import (
    SEARCH,
    TABLES,
    Drawn,
    cell,
    compare_boost_and_skip,
    compare_discrete,
    compare_flow,
    compare_guidance_interval,
    planned_steps,
    sheet,
    table_edges,
)
from diffusers_ext.app.grids import Axes, compare_grid
from diffusers_ext.app.models import Models
from diffusers_ext.app.text_to_image import TextToImage
from diffusers_ext.app.watching import WAITING, StoppedError, Watch, watched
from diffusers_ext.discrete.music import NUM_TOKENS
from diffusers_ext.evaluation.pictures import sequences_picture
from diffusers_ext.sampling.arguments import weight_of
from diffusers_ext.shipped import load_pipeline, shipped_models

SMALL = {
    "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (8,), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
}  # fmt: skip
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")
TWO = Drawn(count=2, seed=3)
ASKED = TextToImage("cat", "dog", 32, 24, "EulerDiscreteScheduler", "bfloat16")


@pytest.fixture(scope="module")
def models():
    return Models("cpu")


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and np.array_equal(np.asarray(a), np.asarray(b))


def save_sequences(folder, vocab_size: int):
    sizes = {"hidden_size": 8, "cond_dim": 8, "num_blocks": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = SEDDTransformer(vocab_size=vocab_size, sequence_length=16, **sizes)
    DiscreteDiffusionPipeline(model, CTMCScheduler(vocab_size=vocab_size)).save_pretrained(folder)
    return str(folder)


def test_boost_and_skip_off_is_the_stock_sampler(models):
    off = compare_boost_and_skip(models, "mnist-unet", 1.0, 0, 4, TWO)
    assert same(off.stock, off.ours)
    on = compare_boost_and_skip(models, "mnist-unet", 4.0, 1, 4, TWO)
    assert same(on.stock, off.stock) and not same(on.stock, on.ours)
    assert "gamma 4, the first 1 skipped" in on.note
    pipe = load_pipeline("mnist-unet")
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    alone = pipe(class_labels=[0, 1], num_inference_steps=4, gamma=4.0, skip_steps=1, generator=seeds).images
    assert same(on.ours, sheet(alone))


def test_boost_and_skip_takes_any_folder(models, tmp_path):
    DDPMPipeline(UNet2DModel(sample_size=8, **SMALL), DDPMScheduler()).save_pretrained(tmp_path)
    pair = compare_boost_and_skip(models, str(tmp_path), 4.0, 1, 3, Drawn(count=1))
    assert not same(pair.stock, pair.ours)


def test_interval_over_all_noise_is_plain_guidance(models):
    whole = compare_guidance_interval(models, "mnist-unet", 3.0, 0.0, 1e9, 4, TWO)
    assert same(whole.stock, whole.ours) and "this method: in 4 of them, 16 rows" in whole.note
    part = compare_guidance_interval(models, "mnist-unet", 3.0, 0.2, 2.0, 4, Drawn(2, 3, label=7))
    assert not same(part.stock, part.ours)
    assert ", guided<" in part.chart and ", not guided<" in part.chart


def test_steps_are_planned_as_they_are_run(models):
    pair = compare_guidance_interval(models, "mnist-unet", 3.0, 0.2, 2.0, 5, Drawn(count=1))
    assert planned_steps(models, "mnist-unet", 5, 0.2, 2.0) == pair.chart != ""
    assert planned_steps(models, "mnist-unet", 5, 0.2, 1.0) != pair.chart
    assert planned_steps(models, "some/model", 5, 0.2, 2.0) == ""  # nothing is loaded to draw an axis


@pytest.mark.parametrize(
    "scheduler",
    [HeunDiscreteScheduler(), KDPM2DiscreteScheduler(), PNDMScheduler(), PNDMScheduler(skip_prk_steps=True)],
    ids=["heun", "kdpm2", "pndm", "pndm without prk"],
)
def test_steps_of_several_evaluations_count_once(models, scheduler, monkeypatch):
    pipe = tiny_sdxl()
    pipe.scheduler = scheduler
    monkeypatch.setattr(models, "holds", lambda model, dtype: True)
    monkeypatch.setattr(models, "load", lambda model, dtype: pipe)
    with GuidanceInterval(pipe, guidance_interval=(0.5, 3.0)) as interval:
        pipe(prompt="a", num_inference_steps=6, guidance_scale=5.0, output_type="latent")
    planned = planned_steps(models, "any", 6, 0.5, 3.0)
    assert f"{len(interval.report.guided_steps)} of {len(interval.report.steps)} steps guided" in planned


def test_steps_of_edm2_count_once(models):
    pipe = models.load("mnist-edm2")
    pipe(class_labels=[0], num_inference_steps=16, guidance_scale=2.0, guidance_interval=(0.2, 2.0))
    planned = planned_steps(models, "mnist-edm2", 16, 0.2, 2.0)
    assert f"{len(pipe.guided_steps)} of 16 steps guided" in planned and pipe.guided_steps


def test_discrete_tables_beside_even_steps(models, tmp_path):
    model = save_sequences(tmp_path / "model", 33)
    even = compare_discrete(models, model, 3, TABLES[0], "CountDown", TWO)
    assert same(even.stock, even.ours) and "of transitions wrong" in even.note and "<svg" in even.chart
    made = compare_discrete(models, model, 3, TABLES[2], "tokens", TWO)
    assert not same(made.stock, made.ours)
    pipe = models.load(model)
    for steps in (1, SEARCH["grid_size"]):  # as many as the usual grid has
        assert len(table_edges(pipe, steps, TABLES[2])) == steps + 1
    with pytest.raises(ValueError, match="no table for 3 steps; it has for: none"):
        compare_discrete(models, model, 3, TABLES[1], "tokens", TWO)
    pipe.scheduler = CTMCScheduler.from_config(pipe.scheduler.config, timestep_tables={"3": [1.0, 0.9, 0.8, 1e-5]})
    own = compare_discrete(models, model, 3, TABLES[1], "tokens", TWO)
    assert not same(own.stock, own.ours)


def test_discrete_pictures(models, tmp_path):
    chorales = compare_discrete(models, save_sequences(tmp_path / "a", NUM_TOKENS + 1), 2, TABLES[0], "chorales", TWO)
    assert chorales.stock.mode == "RGB" and "2 chorales" in chorales.note
    build("text").save_pretrained(tmp_path / "text")
    assert len(compare_discrete(models, str(tmp_path / "text"), 2, TABLES[0], "tokens", TWO).note) > 20
    build("image").save_pretrained(tmp_path / "image")
    assert compare_discrete(models, str(tmp_path / "image"), 2, TABLES[0], "tokens", TWO).ours.mode == "RGB"


def test_flow_of_no_strength_changes_nothing(models, tmp_path):
    torch.manual_seed(0)
    flow = FlowPostprocessingPipeline(
        UNet2DModel(sample_size=28, **SMALL, num_class_embeds=10), FlowMatchEulerDiscreteScheduler()
    )
    flow.save_pretrained(tmp_path)
    pairs = [
        compare_flow(models, "mnist-unet", str(tmp_path), 3.0, 3, strength, 2, TWO) for strength in (0.0, 0.5, 1.0)
    ]
    assert same(pairs[0].stock, pairs[0].ours) and same(pairs[0].stock, pairs[2].stock)
    assert not same(pairs[1].ours, pairs[0].ours) and not same(pairs[1].ours, pairs[2].ours)


TABS = [
    "boost", "boost of a prompt", "interval", "interval of its own", "interval of a prompt", "discrete", "flow",
]  # fmt: skip


@pytest.mark.parametrize("tab", TABS)
def test_the_code_shown_draws_the_second_picture(models, tab, tmp_path, monkeypatch):
    two = Drawn(count=2, seed=3)
    if tab.endswith("prompt"):
        tiny_stable_diffusion().save_pretrained(tmp_path / "sd")
        compare, numbers = (
            (compare_boost_and_skip, (2.0, 1, 4))
            if "boost" in tab
            else (compare_guidance_interval, (3.0, 0.5, 3.0, 4))
        )
        pair = compare(models, str(tmp_path / "sd"), *numbers, Drawn(2, 3, text=ASKED))
    else:
        pair = {
            "boost": lambda: compare_boost_and_skip(models, "mnist-unet", 2.0, 1, 4, two),
            "interval": lambda: compare_guidance_interval(models, "mnist-unet", 3.0, 0.75, 1.7, 4, two),
            "interval of its own": lambda: compare_guidance_interval(models, "mnist-edm2", 3.0, 0.3, 3.0, 4, two),
            "discrete": lambda: compare_discrete(models, "countdown-sedd", 4, "the model's table", "tokens", two),
            "flow": lambda: compare_flow(models, "mnist-unet", "mnist-flow", 3.0, 4, 1.0, 2, two),
        }[tab]()
    names = {}
    exec(pair.code, names)
    stock, ours = {"discrete": ("even", "table"), "flow": ("images", "repaired")}.get(tab, ("stock", "images"))
    for picture, name in ((pair.stock, stock), (pair.ours, ours)):
        if tab == "discrete":
            tokens, kinds = names[name], names["pipe"].scheduler.kernel.num_real_tokens
            drawn = sequences_picture(tokens.cpu(), kinds, torch.zeros(tokens.shape).bool(), *cell(*tokens.shape))
        else:
            drawn = sheet(names[name])
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(picture))
    assert pair.stock != pair.ours


def test_steps_are_told_and_a_stop_ends_them(models):
    told, stop = [], Event()

    def tell(done, total, words):
        told.append((done, total, words))
        if len(told) == 8:
            stop.set()

    with pytest.raises(StoppedError, match="sampling 2, step 2 of 5"), watched(Watch(tell, stop)):
        compare_boost_and_skip(models, "mnist-unet", 2.0, 0, 5, Drawn(count=1))
    assert told[:6] == [(i, 5, f"sampling 1, step {i} of 5") for i in range(6)]
    compare_flow(models, "mnist-unet", "mnist-flow", 3.0, 2, 1.0, 2, Drawn(count=1))  # nothing of it is left
    assert len(told) == 8


def test_who_waits_is_told_so_and_can_stop(models):
    told, stop, entered, leave = [], Event(), Event(), Event()

    def holds():
        with models.lock:
            entered.set()
            leave.wait(60)

    def tell(done, total, words):
        told.append(words)
        stop.set()

    holder = Thread(target=holds)
    holder.start()
    assert entered.wait(60)
    try:
        with pytest.raises(StoppedError, match="waiting"), watched(Watch(tell, stop)):
            compare_boost_and_skip(models, "mnist-unet", 2.0, 0, 2, Drawn(count=1))
    finally:
        leave.set()
        holder.join()
    assert told == [WAITING]
    with models.lock, models.lock:
        pass


@pytest.mark.slow
def test_a_grid_is_that_of_compare(models):
    axes = Axes(class_labels="3, 8", seeds="1", guidance_scales="1,5", guidance_intervals="none, 0.75:1.7", gammas="2")
    sheet = compare_grid(models, "mnist-unet", axes, 3, TextToImage())
    names = {}
    exec(sheet.code, names)
    assert same(names["grid"], sheet.grid) and len(names["found"].cells) == 8
    assert sheet.table.count("images/") == 0 and "0.75" in sheet.table
    for wrong, message in (
        ({"seeds": "0;1"}, "seeds: values between commas, got '0;1'"),
        ({"guidance_intervals": "0.7"}, "guidance intervals: .*'0.7' is neither \"none\" nor LO:HI"),
        ({"class_labels": "10"}, "class_label: class labels must be in"),
        ({"seeds": ",".join(map(str, range(101)))}, "101 images, at most 100"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_grid(models, "mnist-unet", Axes(**wrong), 3, TextToImage())


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    tiny_stable_diffusion().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_each_setting_of_text_to_image_counts(models, stable_diffusion):
    """In all tabs alike: other pictures, and the model as it was before."""
    tabs = {
        "boost": lambda text: compare_boost_and_skip(models, stable_diffusion, 2.0, 1, 3, Drawn(1, 3, text=text)),
        "interval": lambda text: compare_guidance_interval(
            models, stable_diffusion, 3.0, 0.5, 3.0, 3, Drawn(1, 3, text=text)
        ),
    }
    begin = TextToImage("cat")
    for draws in tabs.values():
        plain = draws(begin)
        for name in ("prompt", "negative_prompt", "scheduler", "dtype"):
            assert not same(
                draws(replace(begin, **{name: getattr(ASKED, name) + "s" * (name == "prompt")})).stock, plain.stock
            )
        assert draws(replace(begin, height=32, width=24)).stock.size == (14 * 24, 14 * 32)
        again = draws(begin)
        assert same(again.stock, plain.stock) and same(again.ours, plain.ours)


def test_a_grid_of_prompts(models, stable_diffusion):
    sheet = compare_grid(models, stable_diffusion, Axes(seeds="3", guidance_scales="1,5"), 3, ASKED)
    names = {}
    exec(sheet.code, names)
    assert same(names["grid"], sheet.grid) and names["found"].cells[0].image.size == (24, 32)
    assert type(names["pipe"].scheduler) is EulerDiscreteScheduler and names["pipe"].unet.dtype == torch.bfloat16
    assert type(models.load(stable_diffusion).scheduler) is DDIMScheduler


def test_the_axis_is_that_of_the_scheduler_chosen(models, stable_diffusion):
    text = replace(ASKED, scheduler="DPMSolverMultistepScheduler")
    pair = compare_guidance_interval(models, stable_diffusion, 3.0, 0.5, 3.0, 4, Drawn(1, 3, text=text))
    assert planned_steps(models, stable_diffusion, 4, 0.5, 3.0, text) == pair.chart != ""
    models.load(stable_diffusion)
    assert planned_steps(models, stable_diffusion, 4, 0.5, 3.0, TextToImage("cat")) not in ("", pair.chart)


def test_wrong_settings_of_text_to_image_are_said(models, stable_diffusion, monkeypatch):
    def draw(model, text, **drawn):
        compare_boost_and_skip(models, model, 2.0, 1, 3, Drawn(1, text=text, **drawn))

    for call, message in (
        (lambda: draw(stable_diffusion, TextToImage()), "StableDiffusionPipeline needs a prompt"),
        (lambda: draw(stable_diffusion, TextToImage("cat"), label=1), "takes none"),
        (lambda: draw("mnist-unet", TextToImage("cat", height=8)), "no text-to-image model: leave out prompt, height"),
        (lambda: draw("mnist-unet", TextToImage(scheduler="DDIMScheduler")), "leave out scheduler"),
        (lambda: TextToImage(height=-8), "height must be > 0"),
        (lambda: TextToImage(scheduler="Euler"), "one of DDIMScheduler, .*'Euler'"),
        (lambda: TextToImage(dtype="int8"), "dtype must be one of float32"),
        (lambda: compare_grid(models, "mnist-unet", Axes(), 3, TextToImage("cat")), "leave out prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    pipe = tiny_stable_diffusion()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler can be exchanged for"):
        ASKED.check(pipe)
    pipe = tiny_stable_diffusion()
    pipe.unet.conv_in.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="is not finite"):
        computations.draw(pipe, Drawn(1, text=TextToImage("cat")), num_inference_steps=2)


def test_true_guidance_gets_its_weight_and_a_negative_prompt():
    class Pipe:
        def __call__(self, prompt, negative_prompt=None, guidance_scale=3.5, true_cfg_scale=1.0):
            pass

    assert weight_of(Pipe()) == "true_cfg_scale" and weight_of(load_pipeline("countdown-sedd")) is None
    assert TextToImage("a").inputs(Pipe(), 2) == {"prompt": ["a"] * 2, "negative_prompt": [""] * 2}


def test_what_a_model_takes_is_known_before_it_is_loaded(stable_diffusion, tmp_path):
    unloaded = Models("cpu")
    assert unloaded.inputs(stable_diffusion) == {"prompt"}
    assert unloaded.inputs(" mnist-unet ") == unloaded.inputs("mnist-edm2") == {"class_labels"}
    assert "prompt" not in unloaded.inputs("mnist-flow") | unloaded.inputs("jsb-sedd")
    (tmp_path / "model_index.json").write_text('{"_class_name": ["pipeline", "Own"]}')
    for unknown in ("some/model", str(tmp_path)):
        assert unloaded.inputs(unknown) == {"prompt", "class_labels"}


def test_few_sequences_make_no_narrow_strip():
    assert [cell(*size) for size in ((9, 256), (1, 16), (64, 2048))] == [(4, 56), (64, 64), (4, 8)]


def test_sheet_is_row_by_row_and_enlarged():
    images = [Image.new("L", (10, 10), level) for level in (10, 20, 30)]
    canvas = sheet(images)
    assert canvas.size == (320, 320)
    assert [canvas.getpixel(place) for place in ((80, 80), (240, 80), (80, 240), (240, 240))] == [10, 20, 30, 0]


def test_models_are_kept_and_forgotten(monkeypatch):
    loaded = []

    class Pipe:
        progress_bar = None

        def set_progress_bar_config(self, disable):
            pass

    def load(model, pipeline, trust_remote_code, dtype):
        loaded.append((model, pipeline, trust_remote_code))
        return Pipe()

    def cast(pipe, dtype, device):
        pipe.where = device, dtype

    monkeypatch.setattr("diffusers_ext.app.models.load_pipeline", load)
    monkeypatch.setattr("diffusers_ext.app.models.cast", cast)
    kept = Models("cpu", trust_remote_code=True)
    first = kept.load(" a ")
    assert kept.load("a", dtype="float16") is not first and loaded.pop() == ("a", None, True)
    assert kept.load("a") is first and loaded == [("a", None, True)] and first.where == ("cpu", torch.float32)
    for name in ("b", "c", "a", "d"):
        kept.load(name)
    assert kept.holds("a") and not kept.holds("b")
    with pytest.raises(ValueError, match="no model is given"):
        kept.load("  ")


def test_wrong_input_is_said(models, tmp_path):
    for call, message in (
        (lambda: Drawn(count=65), "1 to 64, got 65"),
        (lambda: compare_discrete(models, "mnist-unet", 2, TABLES[0], "tokens", TWO), "is no discrete diffusion"),
        (lambda: compare_guidance_interval(models, "jsb-sedd", 2.0, 0, 1, 2, TWO), "does not take guidance_scale"),
        (lambda: compare_discrete(models, "x", 2, "best", "tokens", TWO), "'best'"),
        (lambda: compare_flow(models, "mnist-unet", "mnist-unet", 3.0, 3, 1.0, 2, TWO), "is no flow"),
        (lambda: compare_flow(models, "mnist-unet", "", 3.0, 3, 1.0, 2, TWO), "no model is given"),
        (lambda: compare_boost_and_skip(models, "mnist-unet", -1.0, 0, 4, TWO), "gamma"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


RUNS = {  # what each tab does with a model, and the list that it shows
    "boost": (interface.BOOSTED, lambda models, name: compare_boost_and_skip(models, name, 2.0, 1, 3, TWO)),
    "interval": (
        interface.GUIDED,
        lambda models, name: compare_guidance_interval(models, name, 2.0, 0.5, 2, 3, TWO),
    ),
    "discrete": (interface.DISCRETE, lambda models, name: compare_discrete(models, name, 2, TABLES[0], "tokens", TWO)),
    "repaired": (interface.GUIDED, lambda models, name: compare_flow(models, name, "mnist-flow", 2.0, 2, 1.0, 1, TWO)),
    "repairs": (interface.FLOWS, lambda models, name: compare_flow(models, "mnist-unet", name, 2.0, 2, 1.0, 1, TWO)),
}


@pytest.mark.parametrize("tab", RUNS)
def test_a_tab_lists_what_it_can_run_and_says_what_it_cannot(models, tab):
    pipelines, run = RUNS[tab]
    listed = interface.shipped(pipelines)
    assert listed
    for name in shipped_models():
        if name in listed:
            assert run(models, name).ours is not None
        else:
            with pytest.raises(ValueError, match=r"is no|does not take|is not one that boost_and_skip"):
                run(models, name)


def asked(path="/", kind="http", allowed=(), extensions=("websocket.http.response",), **headers) -> list:
    """What the guard answers; what is let through answers "app"."""
    from diffusers_ext.app.guard import Guard

    sent = []

    async def app(scope, receive, send):
        sent.append("app")

    async def send(message):
        sent.append(message.get("status", message["type"]))
        if b"NAME" in message.get("body", b"") or b"no files" in message.get("body", b""):
            sent.append("reason")

    scope = {"type": kind, "path": path, "method": "GET", "extensions": {name: {} for name in extensions}}
    scope["headers"] = [
        (name.encode(), value.encode())
        for name, values in headers.items()
        for value in ([values] if isinstance(values, str) else values)
    ]
    asyncio.run(Guard(app, allowed)(scope, None, send))
    return sent


@needs_gradio
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_another_host_is_refused(kind):
    for host in ("localhost", "LocalHost:7860", "127.0.0.1", "127.0.0.1:7860", "[::1]", "[::1]:7860"):
        assert asked(kind=kind, host=host) == ["app"]
        assert asked(kind=kind, host=host, origin="http://localhost:7860") == ["app"]
        for origin in ("http://evil.org", "null", "http://localhost.evil.org"):
            assert "app" not in asked(kind=kind, host=host, origin=origin)
    for host in (
        "evil.org", "evil.org:7860", "localhost.evil.org", "127.0.0.1.evil.org", "localhost@evil.org", "[::2]", "",
        "localhost:x", "evil.org:localhost", "127.0.0.2", "0.0.0.0", "localhost evil.org", [],
        ["localhost", "evil.org"],
    ):  # fmt: skip
        sent = asked(kind=kind, host=host)
        assert sent[0] == 403 and sent[-1] == "reason"
        assert "app" not in asked(kind=kind, host=host, allowed=["a.org"])
    assert asked(kind="websocket", host="evil.org", extensions=()) == ["websocket.close"]
    for allowed in ("a.org", "A.org:443", "https://a.org"):
        assert asked(kind=kind, allowed=[allowed], host="a.org:80", origin="https://a.org") == ["app"]
    assert asked(kind="lifespan") == ["app"]


@needs_gradio
def test_no_files_are_taken():
    for path in ("/gradio_api/upload", "/upload/", "/gradio_api/upload_progress", "/gradio_api/process_recording"):
        assert asked(path, host="localhost")[0] == 403
    assert asked("/gradio_api/queue/join", host="localhost") == ["app"]


@pytest.mark.slow
@needs_gradio
def test_allowed_hosts_are_names():
    result = CliRunner().invoke(cli.main, ["app", "--allow-host", "a b"])
    assert result.exit_code == 1 and result.output.startswith("Error: allowed hosts must be names"), result.output


def test_code_in_a_folder_is_not_run(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "pipeline.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match=r"holds code, pipeline\.py"):
        compare_boost_and_skip(Models("cpu"), str(tmp_path), 2.0, 1, 3, TWO)


def test_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(interface, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(cli.main, ["app"])
    assert result.exit_code == 1 and "pip install gradio" in result.output


def test_command_passes_its_options(monkeypatch):
    served = []
    monkeypatch.setattr(interface, "import_gradio", lambda: None)
    monkeypatch.setattr(interface, "serve", lambda *given, allowed_hosts: served.append((*given, allowed_hosts)))
    names = ("--allow-host", "a.org", "--allow-host", "b.org")
    for options in ((), ("--port", "8000", "--trust-remote-code", "--device", "cpu", *names)):
        result = CliRunner().invoke(cli.main, ["app", *options])
        assert result.exit_code == 0, result.output
    (first, port, none), (second, other, hosts) = served
    assert (first.trust_remote_code, port, none) == (False, 7860, ())
    assert (second.trust_remote_code, second.device, other, hosts) == (True, "cpu", 8000, ("a.org", "b.org"))
    assert computations.LARGEST == 64 and interface.ADDRESS == "127.0.0.1"
