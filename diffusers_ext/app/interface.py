"""The interface of the app: a tab a method. Needs gradio, which is imported where the app is built."""

import html
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import asynccontextmanager
from importlib.util import find_spec

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
from .models import Models

ADDRESS = "127.0.0.1"
# classes of the shipped models that the tabs can run
BOOSTED = ["BoostAndSkipPipeline"]
GUIDED = ["BoostAndSkipPipeline", "EDM2Pipeline"]
DISCRETE = ["DiscreteDiffusionPipeline"]
FLOWS = ["FlowPostprocessingPipeline"]
FONTS = ("system-ui", "Segoe UI", "Roboto", "Arial", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
STYLE = """
/* the title and the buttons lie above the picture, not on it */
.picture .image-container { padding-top: 32px; }
.chart { width: 100%; max-width: 440px; height: auto; --c0: #2563b0; --c1: #c8501f; }
.dark .chart { --c0: #6ea8f0; --c1: #f08a5d; }
.chart text { font: 12px system-ui, sans-serif; fill: currentColor; }
.chart .chart-title { font-weight: 600; }
.chart .grid-line { stroke: currentColor; opacity: 0.25; fill: none; }
.chart .line path { stroke: var(--line); stroke-width: 2; fill: none; }
.chart .line circle { fill: var(--line); stroke: var(--line); }
.chart .line circle.off { fill: none; }
.chart .band { fill: var(--c0); opacity: 0.18; }
.chart .c0 { --line: var(--c0); }
.chart .c1 { --line: var(--c1); }
"""


def import_gradio():
    """gradio, told to send nothing home. Raises ImportError with what to install where it is missing."""
    if find_spec("gradio") is None:
        raise ImportError("the app needs gradio: pip install gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which reads it
    import gradio

    return gradio


def build_app(models: Models):
    """The interface as gradio Blocks; `serve` shows it. Raises ImportError without gradio."""
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


def serve(models: Models, port: int, block: bool = True, allowed_hosts: Iterable[str] = ()):
    """Serve the app on this machine alone, without a link to share; returns it. block: until Ctrl+C.

    allowed_hosts: names by which requests may ask for it beside this machine's, for a proxy. Raises ValueError for
    what is no name.
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
            drawn = _drawn(gr)
            button = gr.Button("Draw both", variant="primary")
        shown = _pictures(gr)

    def compute(model, gamma, skip, steps, *drawn) -> tuple:
        return _shown(drawn, compare_boost_and_skip, models, model, gamma, int(skip), int(steps))[:3]

    button.click(compute, [model, gamma, skip, steps, *drawn], shown)


def _interval_tab(gr, models: Models) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            model = _model(gr, "mnist-unet", GUIDED)
            weight = gr.Slider(1, 20, 3, step=0.1, label="guidance weight")
            low = gr.Slider(0, 10, 0.75, step=0.01, label="interval: sigma above")
            high = gr.Slider(0.01, 100, 1.7, step=0.01, label="interval: sigma at most")
            steps = gr.Slider(2, 250, 16, step=1, label="steps")
            drawn = _drawn(gr)
            button = gr.Button("Draw both", variant="primary")
        with gr.Column(scale=2):
            axis = gr.HTML(padding=False)
            shown = _pictures(gr)

    def compute(model, weight, low, high, steps, *drawn) -> tuple:
        return _shown(drawn, compare_guidance_interval, models, model, weight, low, high, int(steps))

    def plan(model, steps, low, high) -> str:
        return planned_steps(models, model, int(steps), low, high)

    button.click(compute, [model, weight, low, high, steps, *drawn], [*shown, axis])
    for control in (model, steps, low, high):
        control.change(plan, [model, steps, low, high], axis, show_progress="hidden")


def _discrete_tab(gr, models: Models) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            model = _model(gr, "countdown-sedd", DISCRETE)
            steps = gr.Slider(1, 256, 8, step=1, label="steps")
            table = gr.Radio(list(TABLES), value=TABLES[2], label="table for the second picture")
            picture = gr.Radio(list(PICTURES), value="CountDown", label="show as")
            count, seed = _count(gr), _seed(gr)
            button = gr.Button("Draw both", variant="primary")
        with gr.Column(scale=2):
            edges = gr.HTML(padding=False)
            shown = _pictures(gr, ("even steps", "with the table"))

    def compute(model, steps, table, picture, count, seed) -> tuple:
        drawn = (count, seed, "", "")
        return _shown(drawn, compare_discrete, models, model, int(steps), table, picture)

    def suited(model) -> str:
        return {"countdown-sedd": "CountDown", "jsb-sedd": "chorales"}.get(model, "tokens")

    button.click(compute, [model, steps, table, picture, count, seed], [*shown, edges])
    model.change(suited, model, picture, show_progress="hidden")


def _flow_tab(gr, models: Models) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            model = _model(gr, "mnist-unet", GUIDED)
            flow = _model(gr, "mnist-flow", FLOWS, "flow, trained on its images")
            weight = gr.Slider(1, 20, 6, step=0.1, label="guidance weight")
            steps = gr.Slider(2, 250, 16, step=1, label="steps")
            strength = gr.Slider(0, 1, 1, step=0.05, label="strength of the repair")
            repair = gr.Slider(1, 50, 4, step=1, label="steps of the repair")
            drawn = _drawn(gr)
            button = gr.Button("Draw both", variant="primary")
        shown = _pictures(gr, ("before", "after the repair"))

    def compute(model, flow, weight, steps, strength, repair, *drawn) -> tuple:
        numbers = (weight, int(steps), strength, int(repair))
        return _shown(drawn, compare_flow, models, model, flow or "", *numbers)[:3]

    button.click(compute, [model, flow, weight, steps, strength, repair, *drawn], shown)


def _model(gr, value: str, pipelines: list[str], label: str = "model: shipped, a folder or a Hub id"):
    return gr.Dropdown(shipped(pipelines), value=value, label=label, allow_custom_value=True)


def shipped(pipelines: list[str]) -> list[str]:
    """The shipped models that are pipelines of these classes, which is what a tab can run."""
    indices = {name: folder / "model_index.json" for name, folder in shipped_models().items()}
    return [
        name for name, index in indices.items() if index.is_file() and read_json(index)["_class_name"] in pipelines
    ]


def _drawn(gr) -> list:
    # no gr.Number, whose page shows no number as 0, and sends it
    label = gr.Textbox("", label="class", placeholder="every class in turn")
    return [_count(gr), _seed(gr), label, gr.Textbox("", label="prompt, for text-to-image models")]


def _count(gr):
    return gr.Slider(1, LARGEST, 9, step=1, label="samples")


def _seed(gr):
    return gr.Number(0, label="seed", precision=0)


def _pictures(gr, titles: tuple[str, str] = ("stock sampler", "this method")) -> list:
    with gr.Column(scale=2):
        with gr.Row():
            pictures = [_picture(gr, title) for title in titles]
        return [*pictures, gr.Markdown()]


def _picture(gr, title: str):
    buttons = ["download", "fullscreen"]  # not "share", which sends the picture to the Hub
    return gr.Image(label=title, format="png", interactive=False, buttons=buttons, elem_classes="picture")


def _of(values: tuple) -> Drawn:
    count, seed, label, prompt = values
    label = label.strip()
    if label and label != "none" and not label.isdecimal():
        raise ValueError(f"class must be a whole number, none, or empty for every class in turn, got {label!r}")
    return Drawn(int(count), int(seed or 0), int(label) if label.isdecimal() else label or None, prompt.strip())


def _shown(drawn: tuple, compare: Callable[..., Pair], *arguments) -> tuple:
    """Both pictures, what to say of them, and the chart.

    drawn: values of the controls of `_drawn`; `compare` takes what they mean as its last argument.
    """
    pair = compare(*arguments, _of(drawn))
    return pair.stock, pair.ours, html.escape(pair.note, quote=False), pair.chart  # it may hold a model's text
