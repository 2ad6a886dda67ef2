"""The interface of the app: a tab a method. Needs gradio, which is imported where the app is built."""

import html
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

from ..comparing import GUIDERS
from ..hub.damage import read_json, reason
from ..model_names import shipped_models
from .computations import (
    LARGEST,
    PICTURES,
    TABLES,
    Drawn,
    Pair,
    compare_boost_and_skip,
    compare_discrete,
    compare_flow,
    compare_guidance_interval,
    planned_steps,
)
from .grids import Axes, compare_grid
from .models import Models
from .text_to_image import DTYPES, OWN, SCHEDULERS, TextToImage
from .watching import Watch, watched

if TYPE_CHECKING:
    import gradio

ADDRESS = "127.0.0.1"
# classes of the shipped models that the tabs can run
BOOSTED = ["BoostAndSkipPipeline"]
GUIDED = ["BoostAndSkipPipeline", "EDM2Pipeline"]
DISCRETE = ["DiscreteDiffusionPipeline"]
FLOWS = ["FlowPostprocessingPipeline"]
SIGMA_STEP = 0.005  # of log10
LOWEST = -3  # log10 of the lowest noise level of a slider, which stands for 0
MOST_WAITING = 16  # computations, of which one runs
RUNNING: dict[str, list[threading.Event]] = {}  # of each page, what stops its computations
FONTS = ("system-ui", "Segoe UI", "Roboto", "Arial", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
STYLE = """
/* the title and the buttons lie above the picture, not on it */
.picture .image-container { padding-top: 32px; }
.chart { width: 100%; max-width: 440px; height: auto; --c0: #2563b0; --c1: #c8501f; }
.dark .chart { --c0: #6ea8f0; --c1: #f08a5d; }
"""


def import_gradio() -> ModuleType:
    """gradio, told to send nothing home.

    Raises:
        ImportError: with what to install where it is missing.
    """
    if missing := [name for name in ("gradio", "matplotlib") if find_spec(name) is None]:
        raise ImportError(f"the app needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which reads it
    import gradio

    return gradio


def build_app(models: Models) -> "gradio.Blocks":
    """The interface as gradio Blocks; `serve` shows it.

    Raises:
        ImportError: without gradio.
    """
    gr = import_gradio()
    with _blocks(gr)(title="diffusers_ext", analytics_enabled=False) as app:
        gr.Markdown("# diffusers_ext\nEach method beside the stock sampler, with the same seeds.")
        with gr.Tab("Boost-and-Skip"):
            _boost_tab(gr, models)
        with gr.Tab("Guidance interval"):
            _interval_tab(gr, models)
        with gr.Tab("Discrete diffusion"):
            _discrete_tab(gr, models)
        with gr.Tab("Flow postprocessing"):
            _flow_tab(gr, models)
        with gr.Tab("Grid"):
            _grid_tab(gr, models)
    return app


def _blocks(gr) -> type:
    class Blocks(gr.Blocks):
        """Whatever goes wrong is shown in the page as the text that it is, and not printed."""

        async def process_api(self, *args, **kwargs):
            try:
                return await super().process_api(*args, **kwargs)
            except Exception as error:
                message = error.message if isinstance(error, gr.Error) else reason(error)
                raise gr.Error(html.escape(message, quote=False), print_exception=False) from error

    return Blocks


def serve(models: Models, port: int, block: bool = True, allowed_hosts: Iterable[str] = ()) -> "gradio.Blocks":
    """Serve the app on this machine alone, without a link to share; returns it. block: until Ctrl+C.

    allowed_hosts: names by which requests may ask for it beside this machine's, for a proxy.

    Raises:
        ValueError: for what is no name.
    """
    gr = import_gradio()
    from .guard import Guard

    Guard(None, allowed_hosts)  # raises before anything is served
    app = build_app(models)
    app.queue(default_concurrency_limit=1)

    @asynccontextmanager
    async def guarded(server):
        # around gradio's own middleware, which answers some requests itself
        server.middleware_stack = Guard(server.middleware_stack, allowed_hosts)
        yield

    app.launch(
        server_name=ADDRESS, server_port=port, share=False, ssr_mode=False, run_history=False, show_error=True,
        footer_links=[], prevent_thread_lock=True, app_kwargs={"lifespan": guarded},
        theme=_theme(gr), css=STYLE,
    )  # fmt: skip
    if block:
        try:
            threading.Event().wait()
        finally:
            app.close()
    return app


def _theme(gr):
    """Fonts of the machine, and a button whose white text is read easily."""
    theme = gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=MONO)
    fill = {"button_primary_background_fill": "*primary_600", "button_primary_background_fill_hover": "*primary_700"}
    return theme.set(**fill, **{f"{name}_dark": value for name, value in fill.items()})


def _boost_tab(gr, models: Models) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            model = _model(gr, "mnist-unet", BOOSTED)
            gamma = gr.Slider(1, 8, 4, step=0.25, label="gamma: factor on the initial noise")
            skip = gr.Slider(0, 20, 3, step=1, label="skip: first steps left out")
            steps = gr.Slider(2, 250, 50, step=1, label="steps")
            drawn = _drawn(gr, models, model)
            buttons = _buttons(gr)
        shown = _pictures(gr)

    def compute(model, gamma, skip, steps, *drawn) -> tuple:
        return _shown(_of(models, model, *drawn), compare_boost_and_skip, models, model, gamma, int(skip), int(steps))[
            :4
        ]

    _run(gr, buttons, compute, [model, gamma, skip, steps, *drawn], shown)


def _interval_tab(gr, models: Models) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            model = _model(gr, "mnist-unet", GUIDED)
            weight = gr.Slider(1, 20, 3, step=0.1, label="guidance weight")
            low = _sigma(gr, 0.75, "interval: sigma above")
            high = _sigma(gr, 1.7, "interval: sigma at most")
            steps = gr.Slider(2, 250, 16, step=1, label="steps")
            drawn = _drawn(gr, models, model)
            buttons = _buttons(gr)
        with gr.Column(scale=2):
            axis = gr.HTML(padding=False)
            shown = _pictures(gr)

    def compute(model, weight, low, high, steps, *drawn) -> tuple:
        numbers = (weight, _level(low), _level(high), int(steps))
        return _shown(_of(models, model, *drawn), compare_guidance_interval, models, model, *numbers)

    def plan(model, steps, low, high, *text) -> str:
        return planned_steps(models, model, int(steps), _level(low), _level(high), _text(models, model, *text))

    _run(gr, buttons, compute, [model, weight, low, high, steps, *drawn], [*shown, axis])
    *_, scheduler, dtype = text = drawn[3:]
    for control in (model, steps, low, high, scheduler, dtype):
        control.change(plan, [model, steps, low, high, *text], axis, show_progress="hidden")


def _discrete_tab(gr, models: Models) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            model = _model(gr, "countdown-sedd", DISCRETE)
            steps = gr.Slider(1, 256, 8, step=1, label="steps")
            table = gr.Radio(list(TABLES), value=TABLES[2], label="table for the second picture")
            picture = gr.Radio(list(PICTURES), value="CountDown", label="show as")
            count, seed = _count(gr), _seed(gr)
            buttons = _buttons(gr)
        with gr.Column(scale=2):
            edges = gr.HTML(padding=False)
            shown = _pictures(gr, ("even steps", "with the table"))

    def compute(model, steps, table, picture, count, seed) -> tuple:
        return _shown(Drawn(int(count), int(seed or 0)), compare_discrete, models, model, int(steps), table, picture)

    def suited(model) -> str:
        return {"countdown-sedd": "CountDown", "jsb-sedd": "chorales"}.get(model, "tokens")

    _run(gr, buttons, compute, [model, steps, table, picture, count, seed], [*shown, edges])
    model.change(suited, model, picture, show_progress="hidden")


def _flow_tab(gr, models: Models) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            model = _model(gr, "mnist-unet", GUIDED)
            flow = _model(gr, "mnist-flow", FLOWS, "flow, trained on its images")
            weight = gr.Slider(1, 20, 15, step=0.1, label="guidance weight")
            steps = gr.Slider(2, 250, 16, step=1, label="steps")
            strength = gr.Slider(0, 1, 1, step=0.05, label="strength of the repair")
            repair = gr.Slider(1, 50, 4, step=1, label="steps of the repair")
            drawn = _drawn(gr, models, model)
            buttons = _buttons(gr)
        shown = _pictures(gr, ("before", "after the repair"))

    def compute(model, flow, weight, steps, strength, repair, *drawn) -> tuple:
        numbers = (weight, int(steps), strength, int(repair))
        return _shown(_of(models, model, *drawn), compare_flow, models, model, flow or "", *numbers)[:4]

    _run(gr, buttons, compute, [model, flow, weight, steps, strength, repair, *drawn], shown)


def _grid_tab(gr, models: Models) -> None:
    """`compare`, with the values of each axis between commas."""
    labels = {
        "class_labels": "classes",
        "seeds": "seeds",
        "guidance_scales": "guidance scales",
        "guidance_intervals": "guidance intervals: none, LO:HI",
        "guiders": f"guiders: {', '.join(GUIDERS)}",
        "gammas": "gammas",
        "skip_steps": "skips: first steps left out",
    }
    begin = {"class_labels": "3,8", "seeds": "0,1", "guidance_scales": "1,5", "guidance_intervals": "none,0.75:1.7"}
    with gr.Row():
        with gr.Column(scale=1):
            model = _model(gr, "mnist-unet", GUIDED)
            texts = [gr.Textbox(begin.get(name, ""), label=label) for name, label in labels.items()]
            steps = gr.Slider(2, 250, 16, step=1, label="steps")
            drawn = _text_to_image(gr, models, model, texts[0])
            buttons = _buttons(gr, "Draw the grid")
        with gr.Column(scale=2):
            shown = [_picture(gr, "grid"), gr.Markdown()]
            with gr.Accordion("the same in Python", open=False):
                shown.append(gr.Code(language="python", interactive=False, show_label=False))

    def compute(model, steps, *values) -> tuple:
        axes = dict(zip(labels, values, strict=False))
        axes["guiders"] = axes["guiders"] or "cfg"
        if "class_labels" not in models.inputs(model):
            axes["class_labels"] = ""  # its field is hidden
        text = _text(models, model, *values[len(axes) :])
        sheet = compare_grid(models, model, Axes(**axes), int(steps), text)
        return sheet.grid, html.escape(sheet.table, quote=False), sheet.code

    _run(gr, buttons, compute, [model, steps, *texts, *drawn], shown)


def _sigma(gr, value: float, words: str):
    """A slider over log10 of a noise level, whose label says the level; leftmost is 0."""

    def labelled(exponent: float) -> str:
        return f"{words} {_level(exponent):.3g}"

    start = round(math.log10(value) / SIGMA_STEP) * SIGMA_STEP
    slider = gr.Slider(LOWEST, 2, start, step=SIGMA_STEP, label=labelled(start), info="its log10")

    def relabel(exponent: float) -> dict:
        return gr.update(label=labelled(exponent))

    slider.change(relabel, slider, slider, queue=False, show_progress="hidden")
    return slider


def _level(exponent: float) -> float:
    """The noise level of a slider's place, to three digits."""
    return 0.0 if exponent <= LOWEST else float(f"{10**exponent:.3g}")


def _buttons(gr, words: str = "Draw both") -> tuple:
    with gr.Row():
        return gr.Button(words, variant="primary"), gr.Button("Stop")


def _run(gr, buttons: tuple, compute: Callable[..., tuple], inputs: list, outputs: list) -> None:
    """Compute by the first button, telling each step; the second one stops what this page computes or waits for."""
    draw, stop = buttons

    def run(request: gr.Request, progress=gr.Progress(), *values) -> tuple:  # noqa: B008
        def tell(done: int, total: int, words: str) -> None:
            progress((done, total) if total else 0, desc=words)

        with _stoppable(request.session_hash) as event, watched(Watch(tell, event)):
            return compute(*values)

    def halt(request: gr.Request) -> None:
        for event in list(RUNNING.get(request.session_hash, ())):
            event.set()

    # many may wait, one computes: `Models.lock` sees to that and tells the others
    draw.click(run, inputs, outputs, concurrency_limit=MOST_WAITING)
    stop.click(halt, queue=False, show_progress="hidden")


@contextmanager
def _stoppable(session: str) -> Iterator[threading.Event]:
    """An event among those of a page for the time of a computation."""
    event = threading.Event()
    RUNNING.setdefault(session, []).append(event)
    try:
        yield event
    finally:
        RUNNING[session].remove(event)
        if not RUNNING[session]:
            RUNNING.pop(session, None)


def _model(gr, value: str, pipelines: list[str], label: str = "model: shipped, a folder or a Hub id"):
    return gr.Dropdown(shipped(pipelines), value=value, label=label, allow_custom_value=True)


def shipped(pipelines: list[str]) -> list[str]:
    """The shipped models that are pipelines of these classes, which is what a tab can run."""
    indices = {name: folder / "model_index.json" for name, folder in shipped_models().items()}
    return [
        name for name, index in indices.items() if index.is_file() and read_json(index)["_class_name"] in pipelines
    ]


def _drawn(gr, models: Models, model) -> list:
    """The controls of what a model draws, for `_of`."""
    # no gr.Number, whose page shows no number as 0, and sends it
    count, seed, label = _count(gr), _seed(gr), gr.Textbox("", label="class", placeholder="every class in turn")
    return [count, seed, label, *_text_to_image(gr, models, model, label)]


def _text_to_image(gr, models: Models, model, label) -> list:
    """The controls of `TextToImage`, for `_text`; they, and the class, are hidden where the model takes none."""
    with gr.Group(visible="prompt" in models.inputs(model.value)) as group:
        fields = [gr.Textbox("", label="prompt"), gr.Textbox("", label="negative prompt")]
        with gr.Row():
            size = {"precision": 0, "info": "pixels; 0: the model's own"}
            fields += [gr.Number(0, label=name, **size) for name in ("height", "width")]
        fields += [
            gr.Dropdown([OWN, *SCHEDULERS], value=OWN, label="scheduler"),
            gr.Dropdown(list(DTYPES), value=DTYPES[0], label="dtype"),
        ]

    def suited(model) -> tuple:
        inputs = models.inputs(model or "")
        return gr.update(visible="prompt" in inputs), gr.update(visible="class_labels" in inputs)

    model.change(suited, model, [group, label], queue=False, show_progress="hidden")
    return fields


def _count(gr):
    return gr.Slider(1, LARGEST, 9, step=1, label="samples")


def _seed(gr):
    return gr.Number(0, label="seed", precision=0)


def _pictures(gr, titles: tuple[str, str] = ("stock sampler", "this method")) -> list:
    with gr.Column(scale=2):
        with gr.Row():
            pictures = [_picture(gr, title) for title in titles]
        note = gr.Markdown()
        with gr.Accordion("the same in Python", open=False):
            return [*pictures, note, gr.Code(language="python", interactive=False, show_label=False)]


def _picture(gr, title: str):
    buttons = ["download", "fullscreen"]  # not "share", which sends the picture to the Hub
    return gr.Image(label=title, format="png", interactive=False, buttons=buttons, elem_classes="picture")


def _of(models: Models, model: str, count: float, seed: float | None, label: str, *text) -> Drawn:
    """What the controls of `_drawn` mean for a model."""
    label = label.strip() if "class_labels" in models.inputs(model) else ""
    if label and label != "none" and not label.isdecimal():
        raise ValueError(f"class must be a whole number, none, or empty for every class in turn, got {label!r}")
    chosen = int(label) if label.isdecimal() else label or None
    return Drawn(int(count), int(seed or 0), chosen, _text(models, model, *text))


def _text(models: Models, model: str, prompt: str, negative: str, height, width, scheduler: str, dtype: str):
    """What the controls of `_text_to_image` mean for a model: what is hidden is left out."""
    if "prompt" not in models.inputs(model):
        return TextToImage()
    size = (int(height or 0) or None, int(width or 0) or None)
    return TextToImage(prompt.strip(), negative.strip(), *size, "" if scheduler == OWN else scheduler, dtype)


def _shown(drawn: Drawn, compare: Callable[..., Pair], *arguments) -> tuple:
    """Both pictures, what to say of them, the code that draws them, and the chart; `compare` takes `drawn` last."""
    pair = compare(*arguments, drawn)
    note = html.escape(pair.note, quote=False)  # it may hold a model's text
    return pair.stock, pair.ours, note, pair.code, pair.chart
