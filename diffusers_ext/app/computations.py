"""What the tabs of the app compute: the stock sampler and ours, with the same seeds. Plain functions of numbers."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..discrete.music import piano_roll, tokens_to_pitches
from ..evaluation.pictures import sequences_picture, stacked
from ..jump_your_steps import optimize_timesteps
from ..metrics import countdown_errors, countdown_wrong
from ..pipelines import BoostAndSkipPipeline, FlowPostprocessingPipeline, GuidanceInterval
from ..pipelines.guidance_interval import GuidedStep
from ..pipelines.interval import Interval, StepStart, read_step
from ..sampling import cycled_labels, draws_sequences, is_discrete, sample_batches
from ..sampling.arguments import weight_of
from ..sampling.draw import to_uint8
from ..sampling.methods import scheduled
from ..schedulers import EDMHeunScheduler, boost_and_skip
from . import code_of
from .models import Models
from .text_to_image import NONE, Source, TextToImage, is_text_to_image, takes

LARGEST = 64  # samples a picture
SMALLEST_PICTURE = 320  # pixels; smaller sheets are enlarged
SEQUENCES_PICTURE = (1024, 512)  # pixels, about; larger for many or long sequences
TABLES = ("even steps", "the model's table", "Jump Your Steps, made now")
SEARCH = {"sequences": 6, "steps": 32, "grid_size": 32}  # of a table that is made now, from the model's own samples
PICTURES = ("tokens", "CountDown", "chorales")


@dataclass(frozen=True)
class Drawn:
    """What both tabs' pictures hold: how many, of what, from which seeds on.

    label: class of all images, "none" for the null class; None is every class in turn. text: for pipelines that take a
    prompt.
    """

    count: int = 8
    seed: int = 0
    label: int | str | None = None
    text: TextToImage = NONE

    def __post_init__(self) -> None:
        if not 1 <= self.count <= LARGEST:
            raise ValueError(f"number of samples must be 1 to {LARGEST}, got {self.count}")


@dataclass(frozen=True)
class Pair:
    """The picture of the stock sampler, ours, what to say of them, a chart as SVG where there is one, and the code."""

    stock: Image.Image
    ours: Image.Image
    note: str
    chart: str = ""
    code: str = ""


def compare_boost_and_skip(
    models: Models, model: str, gamma: float, skip_steps: int, num_inference_steps: int, drawn: Drawn
) -> Pair:
    """The stock sampler beside Boost-and-Skip, of a pixel-space model or one that takes prompts.

    Raises:
        ValueError: for arguments out of range and models that cannot be boosted.
    """
    with _loaded(models, model, drawn.text) as pipe:
        boosted = boost_and_skip(pipe.scheduler, gamma, skip_steps)  # refuses models that begin with no Gaussian noise
        if is_text_to_image(pipe):
            stock = draw(pipe, drawn, num_inference_steps=num_inference_steps)
            with scheduled(pipe, boosted):
                ours = draw(pipe, drawn, num_inference_steps=num_inference_steps)
        else:
            if not isinstance(pipe, BoostAndSkipPipeline):
                pipe = models.load(model, "boost-and-skip", drawn.text.dtype)
            call = {"num_inference_steps": num_inference_steps}
            stock = draw(pipe, drawn, gamma=1.0, skip_steps=0, **call)
            ours = draw(pipe, drawn, gamma=gamma, skip_steps=skip_steps, **call)
    note = f"stock sampler: gamma 1, no step skipped\n\nthis method: gamma {gamma:g}, the first {skip_steps} skipped"
    source = Source(model, drawn.text, models.device)
    code = code_of.boost_and_skip(pipe, source, gamma, skip_steps, num_inference_steps, _inputs(pipe, drawn))
    return Pair(sheet(stock), sheet(ours), note, code=code)


def compare_guidance_interval(
    models: Models,
    model: str,
    guidance_scale: float,
    sigma_lo: float,
    sigma_hi: float,
    num_inference_steps: int,
    drawn: Drawn,
) -> Pair:
    """Guidance in every step beside guidance in (sigma_lo, sigma_hi], and the steps on the sigma axis.

    Raises:
        ValueError: for arguments out of range and pipelines that do not guide in a way that is understood.
    """
    with _loaded(models, model, drawn.text) as pipe:
        call = {"num_inference_steps": num_inference_steps, weight_of(pipe) or "guidance_scale": guidance_scale}
        stock = draw(pipe, drawn, **call)
        source = Source(model, drawn.text, models.device)
        code = code_of.guidance_interval(pipe, source, (sigma_lo, sigma_hi), call, _inputs(pipe, drawn))
        if takes(pipe, "guidance_interval"):  # EDM2 and others that have it built in
            ours = draw(pipe, drawn, guidance_interval=(sigma_lo, sigma_hi), **call)
            chart = planned_steps(models, model, num_inference_steps, sigma_lo, sigma_hi, drawn.text)
            note = "stock sampler: guidance in all steps\n\nthis method: in the interval"
            return Pair(sheet(stock), sheet(ours), note, chart, code)
        with GuidanceInterval(pipe, guidance_interval=(sigma_lo, sigma_hi)) as interval:
            ours = draw(pipe, drawn, **call)
    steps, rows, saved = interval.report.steps, interval.report.rows, interval.report.rows_saved
    note = (
        f"stock sampler: guidance in all {len(steps)} steps, {rows + saved} rows through the network\n\n"
        f"this method: in {len(interval.report.guided_steps)} of them, {rows} rows"
    )
    return Pair(sheet(stock), sheet(ours), note, sigma_chart(steps, sigma_lo, sigma_hi), code)


def planned_steps(
    models: Models,
    model: str,
    num_inference_steps: int,
    sigma_lo: float,
    sigma_hi: float,
    text: TextToImage = NONE,
) -> str:
    """The steps on the sigma axis before anything is drawn; "" for a model that is not loaded or shows no sigmas."""
    if not models.holds(model, text.dtype):
        return ""
    pipe = models.load(model, dtype=text.dtype)
    try:
        scheduler = text.scheduler_of(pipe)
        scheduler = type(scheduler).from_config(scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        starts, interval = _starts(scheduler), Interval(sigma_lo, sigma_hi)
        steps = [GuidedStep(start.index, start.sigma, start in interval) for start in starts]
    except (ValueError, TypeError):  # schedulers that need more than a number, such as the size of the image
        return ""
    return sigma_chart(steps, sigma_lo, sigma_hi)


def _starts(scheduler) -> list[StepStart]:
    """The steps of a schedule, of which some schedulers list each evaluation of the network."""
    if isinstance(scheduler, EDMHeunScheduler):
        levels, name = scheduler.sigmas.tolist()[:-1], type(scheduler).__name__
        return [StepStart(i, len(levels), sigma, name) for i, sigma in enumerate(levels)]
    starts = {}
    for timestep in scheduler.timesteps:
        start = read_step(scheduler, timestep)
        starts.setdefault(start.index, start)
    return list(starts.values())


def sigma_chart(steps: Iterable[GuidedStep], sigma_lo: float, sigma_hi: float) -> str:
    """The sigma axis with the interval and the steps, as SVG; "" where no step has a finite sigma > 0."""
    from ..evaluation.charts import axis_chart  # which brings matplotlib

    known = [step for step in steps if step.sigma is not None and 0 < step.sigma < math.inf]
    if not known:
        return ""
    guided = [step.guided for step in known]
    title = f"{sum(guided)} of {len(known)} steps guided, in ({sigma_lo:g}, {sigma_hi:g}]"
    return axis_chart([step.sigma for step in known], guided, (sigma_lo, sigma_hi), title)


def compare_discrete(
    models: Models, model: str, num_inference_steps: int, table: str, picture: str, drawn: Drawn
) -> Pair:
    """Even steps beside those of a table, one of `TABLES`, drawn as one of `PICTURES`; the edges as a chart.

    Raises:
        ValueError: for other names, models that are no discrete diffusion, and where the model has no such table.
    """
    from ..evaluation.charts import tick_chart  # which brings matplotlib

    if table not in TABLES or picture not in PICTURES:
        raise ValueError(f"table must be one of {TABLES} and picture one of {PICTURES}, got {table!r} and {picture!r}")
    with models.lock:
        pipe = models.load(model)
        if not is_discrete(pipe):
            raise ValueError(f"{type(pipe).__name__} is no discrete diffusion; choose a DiscreteDiffusionPipeline")
        even = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="uniform")
        even.set_timesteps(num_inference_steps)
        edges = {"even": even.edges.tolist(), "table": table_edges(pipe, num_inference_steps, table)}
        sheets, notes = [], []
        for title, times in zip(("even steps", "with the table"), edges.values(), strict=True):
            shown, note = draw_discrete(pipe, times, picture, drawn)
            sheets.append(shown)
            notes.append(f"{title}: {note}")
    source = Source(model, device=models.device)
    chart = tick_chart(edges, f"{num_inference_steps} steps", "time")
    return Pair(*sheets, "\n\n".join(notes), chart, code_of.discrete(source, edges, drawn.count, drawn.seed))


def table_edges(pipe: DiffusionPipeline, num_inference_steps: int, table: str) -> list[float]:
    """The edges of the steps. A table that is made now is optimised on a few of the model's own samples.

    Raises:
        ValueError: where the model has no table for so many steps.
    """
    config = pipe.scheduler.config
    if table == TABLES[2]:
        search = {"batch_size": SEARCH["sequences"], "num_inference_steps": SEARCH["steps"], "output_type": "tokens"}
        data = pipe(**search, generator=torch.Generator().manual_seed(0)).tokens.cpu()
        call = {"grid_size": max(SEARCH["grid_size"], num_inference_steps + 1), "progress": False}
        tables = optimize_timesteps(pipe.model, pipe.scheduler, data, (num_inference_steps,), **call)
        return list(tables[num_inference_steps])
    spacing = "uniform"
    if table == TABLES[1]:
        known = config.timestep_tables or {}
        if str(num_inference_steps) not in known:
            there = ", ".join(sorted(known, key=int)) or "none"
            raise ValueError(f"the model has no table for {num_inference_steps} steps; it has for: {there}")
        spacing = "table"
    scheduler = type(pipe.scheduler).from_config(config, timestep_spacing=spacing)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler.edges.tolist()


def draw_discrete(pipe: DiffusionPipeline, edges: list[float], picture: str, drawn: Drawn) -> tuple[Image.Image, str]:
    """Samples at these edges as a picture, and what to say of them: errors of CountDown, text of a text model."""
    call = {"timesteps": edges, "output_type": "tokens"}
    if not draws_sequences(pipe):
        call["output_type"] = "pil"
        return sheet([image for batch in _batches(pipe, drawn, call) for image in batch]), "images"
    tokens = torch.cat(list(_batches(pipe, drawn, call))).cpu()
    if picture == "chorales":
        rolls = {f"chorale {i}": piano_roll(pitches) for i, pitches in enumerate(tokens_to_pitches(tokens.numpy()))}
        return stacked(rolls), f"{len(tokens)} chorales"
    marked = torch.zeros(tokens.shape, dtype=torch.bool)
    note = "a row a sequence, darker for later tokens of the vocabulary"
    if picture == "CountDown":
        marked = torch.nn.functional.pad(countdown_wrong(tokens), (1, 0))
        note = f"{countdown_errors(tokens).mean():.1%} of transitions wrong, red"
    elif pipe.tokenizer is not None:
        note = pipe.tokenizer.batch_decode(tokens)[0]
    num_tokens = pipe.scheduler.kernel.num_real_tokens
    return sequences_picture(tokens, num_tokens, marked, *cell(*tokens.shape)), note


def cell(count: int, length: int) -> tuple[int, int]:
    """Width and height in pixels of a token's cell, so that a few sequences make no narrow strip."""
    return max(4, SEQUENCES_PICTURE[0] // length), max(8, min(64, SEQUENCES_PICTURE[1] // count))


def compare_flow(
    models: Models,
    model: str,
    flow: str,
    guidance_scale: float,
    num_inference_steps: int,
    strength: float,
    repair_steps: int,
    drawn: Drawn,
) -> Pair:
    """Images of a model before and after their repair by a flow.

    Raises:
        ValueError: for arguments out of range, and for a flow that is no flow or was trained on other images.
    """
    with _loaded(models, model, drawn.text) as base:
        repair = models.load(flow)
        if not isinstance(repair, FlowPostprocessingPipeline):
            raise ValueError(
                f"{type(repair).__name__} is no flow; train one with `diffusers-ext train-postprocessing` and give its"
                " folder"
            )
        call = {"num_inference_steps": num_inference_steps}
        if guidance_scale != 1 or weight_of(base):
            call[weight_of(base) or "guidance_scale"] = guidance_scale
        images = draw(base, drawn, **call)
        labels = {}
        if repair.model.config.get("num_class_embeds") is not None:
            labels["class_labels"] = _labels(base, drawn).tolist()
        repaired = repair(images, num_inference_steps=repair_steps, strength=strength, **labels).images
    note = f"before: guidance {guidance_scale:g}\n\nafter: repaired to strength {strength:g} in {repair_steps} steps"
    its_call = {"num_inference_steps": repair_steps, "strength": strength, **labels}
    code = code_of.flow(Source(model, drawn.text, models.device), call, _inputs(base, drawn), flow, its_call)
    return Pair(sheet(images), sheet(repaired), note, code=code)


@contextmanager
def _loaded(models: Models, model: str, text: TextToImage) -> Iterator[DiffusionPipeline]:
    """The model for one computation, with the scheduler and in the dtype that are asked for."""
    with models.lock:
        pipe = models.load(model, dtype=text.dtype)
        text.check(pipe)
        with scheduled(pipe, text.scheduler_of(pipe)):
            yield pipe


def draw(pipe: DiffusionPipeline, drawn: Drawn, **call) -> list[Image.Image]:
    """Images, each with a seed of its own.

    Raises:
        ValueError: for arguments that the pipeline does not take, and images of a prompt that are not finite.
    """
    if not is_text_to_image(pipe):
        return [image for batch in _batches(pipe, drawn, call) for image in batch]
    (images,) = _batches(pipe, drawn, {**call, "output_type": "pt"})
    pixels = to_uint8(images, range(drawn.count))
    return [Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each) for each in pixels]


def _batches(pipe: DiffusionPipeline, drawn: Drawn, call: dict) -> Iterator:
    inputs = drawn.text.inputs(pipe, drawn.count)
    if unknown := sorted(name for name in {**inputs, **call} if not takes(pipe, name)):
        raise ValueError(f"{type(pipe).__name__} does not take {', '.join(unknown)}; choose another model")
    return sample_batches(
        pipe, drawn.count, _labels(pipe, drawn), drawn.seed, drawn.count, inputs.pop("prompt", None), **inputs, **call
    )


def _inputs(pipe: DiffusionPipeline, drawn: Drawn) -> dict:
    """The arguments of a call that draws them, for the code; "generator" as the seeds."""
    inputs = drawn.text.inputs(pipe, drawn.count)
    if not inputs:
        labels = _labels(pipe, drawn)
        inputs = {"batch_size": drawn.count} if labels is None else {"class_labels": labels.tolist()}
    return {**inputs, "generator": list(range(drawn.seed, drawn.seed + drawn.count))}


def _labels(pipe: DiffusionPipeline, drawn: Drawn) -> torch.Tensor | None:
    chosen = None if drawn.label == "none" else drawn.label
    return cycled_labels(pipe, drawn.count, None if drawn.label is None else [chosen])


def sheet(images: list[Image.Image]) -> Image.Image:
    """Images of one size in a sheet about as wide as high, small ones enlarged by a whole factor."""
    columns = math.ceil(math.sqrt(len(images)))
    rows, (width, height) = math.ceil(len(images) / columns), images[0].size
    canvas = Image.new(images[0].mode, (columns * width, rows * height))
    for i, image in enumerate(images):
        canvas.paste(image, (i % columns * width, i // columns * height))
    factor = max(1, math.ceil(SMALLEST_PICTURE / canvas.width))
    return canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.BICUBIC)
