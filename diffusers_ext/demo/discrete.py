"""Discrete diffusion: CountDown sequences with their errors, chorales as a piano roll and a MIDI file, and texts."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from rich.console import Console

from ..discrete.music import REST, piano_roll, tokens_to_pitches, write_midi
from ..evaluation.pictures import Box, places_stacked, sequences_picture, stacked
from ..metrics import countdown_errors, countdown_errors_original, countdown_wrong
from ..sampling import sample_batches
from ..shipped import load_pipeline
from .tables import print_table, words_table

SHOWN = 16  # CountDown sequences in each panel of the picture
SHOWN_CHORALES = 4
PAUSE = 8  # sixteenths between chorales in the MIDI file
BEGINNING, END = "O Romeo,", " to die."  # given tokens, between which a text is drawn
LEGEND = (
    "strict: share of all transitions that are wrong, red in the picture, ± its standard error; original: as the"
    " paper's code counts, which looks at about every second one. s: seconds a sequence."
)


@dataclass(frozen=True)
class DiscreteSettings:
    """What is sampled; the models are shipped ones or folders."""

    countdown_model: str = "countdown-sedd"
    chorale_model: str = "jsb-sedd"
    countdown_steps: tuple[int, ...] = (4, 16)
    num_countdowns: int = 16
    chorale_steps: int = 32
    num_chorales: int = 4
    text_model: str = "shakespeare-sedd"
    text_steps: tuple[int, ...] = (8, 64)
    seed: int = 0


FULL = DiscreteSettings(
    countdown_steps=(8, 64), num_countdowns=32, chorale_steps=64, num_chorales=8, text_steps=(8, 16, 32, 64)
)


def run_discrete(output: Path, device: str, console: Console, settings: DiscreteSettings | None = None) -> dict:
    """Sample, measure and print; write countdown.png, chorales.png, chorales.mid and texts.txt into the folder.

    Returns the settings, a row of numbers for each number of steps on CountDown, the table in words, the seconds that
    a chorale took, the files, and where the panels lie in the pictures.
    """
    settings = settings or DiscreteSettings()
    rows, countdowns = draw_countdowns(output / "countdown.png", device, settings)
    table = in_words(rows, settings)
    print_table(console, table)
    seconds, chorales = draw_chorales(output, device, settings)
    console.print(f"chorales: {settings.num_chorales} of {settings.chorale_steps} steps, {seconds:.2f} s each")
    write_texts(output / "texts.txt", device, settings, console)
    result = {"settings": asdict(settings), "rows": rows, "table": table, "seconds_per_chorale": seconds}
    pictures = {"countdown.png": countdowns, "chorales.png": chorales}
    return {**result, "files": ["countdown.png", "chorales.png", "chorales.mid", "texts.txt"], "pictures": pictures}


def draw_countdowns(path: Path, device: str, settings: DiscreteSettings) -> tuple[list[dict], dict[str, Box]]:
    """Sample CountDown at each number of steps with the same seeds; a row and the place of a panel each."""
    pipe = load_pipeline(settings.countdown_model).to(device)
    num_tokens = pipe.scheduler.kernel.num_real_tokens
    rows, panels = [], {}
    for steps in settings.countdown_steps:
        tokens, seconds = sample_tokens(pipe, settings.num_countdowns, settings.seed, steps)
        errors = countdown_errors(tokens)
        strict, original = errors.mean().item(), countdown_errors_original(tokens).mean().item()
        spread = errors.std().item() / len(errors) ** 0.5
        numbers = {"strict": strict, "strict_error": spread, "original": original, "seconds_per_sequence": seconds}
        rows.append({"steps": steps, **numbers})
        shown = tokens[:SHOWN]
        wrong = torch.nn.functional.pad(countdown_wrong(shown), (1, 0))
        panels[f"CountDown, {steps} steps: {strict:.1%} of transitions wrong"] = sequences_picture(
            shown, num_tokens, wrong
        )
    stacked(panels).save(path)
    return rows, places_stacked(panels)


def draw_chorales(output: Path, device: str, settings: DiscreteSettings) -> tuple[float, dict[str, Box]]:
    """Sample chorales, draw the first ones, put all into one MIDI file; returns seconds a chorale and the panels."""
    pipe = load_pipeline(settings.chorale_model).to(device)
    tokens, seconds = sample_tokens(pipe, settings.num_chorales, settings.seed, settings.chorale_steps)
    chorales = tokens_to_pitches(tokens.numpy())
    panels = {f"chorale {i}": piano_roll(pitches) for i, pitches in enumerate(chorales[:SHOWN_CHORALES])}
    stacked(panels).save(output / "chorales.png")
    spaced = np.pad(chorales, ((0, 0), (0, PAUSE), (0, 0)), constant_values=REST)
    write_midi(output / "chorales.mid", spaced.reshape(-1, chorales.shape[-1]))
    return seconds, places_stacked(panels)


def write_texts(path: Path, device: str, settings: DiscreteSettings, console: Console) -> None:
    """A text at each number of steps, even ones and those of the table, and one between given ends; of one seed."""
    pipe = load_pipeline(settings.text_model).to(device)
    pipe.set_progress_bar_config(disable=True)
    texts = []
    for steps in settings.text_steps:
        for name, spacing in (("even", "uniform"), ("by the table", "table")):
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing=spacing)
            texts.append(f"== {steps} steps, {name}\n{draw_text(pipe, settings.seed, steps)}\n")
    between = draw_text(pipe, settings.seed, steps, prompt=BEGINNING, suffix=END)
    texts.append(f"== {steps} steps, {name}, between {BEGINNING!r} and {END!r}\n{between}\n")
    path.write_text("\n".join(texts), encoding="utf-8")
    console.print("\n".join(texts), markup=False, highlight=False)


def draw_text(pipe: DiffusionPipeline, seed: int, steps: int, **given) -> str:
    """One text; given: a prompt and a suffix."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(num_inference_steps=steps, generator=generator, output_type="text", **given).text[0].strip()


def sample_tokens(pipe: DiffusionPipeline, count: int, seed: int, steps: int) -> tuple[torch.Tensor, float]:
    """Tokens (count, length) on the CPU, and seconds a sequence."""
    pipe.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    call = {"num_inference_steps": steps, "output_type": "tokens"}
    tokens = torch.cat(list(sample_batches(pipe, count, None, seed, batch_size=16, **call))).cpu()
    return tokens, (time.perf_counter() - started) / count


def in_words(rows: list[dict], settings: DiscreteSettings) -> dict:
    """A row of the table for each number of steps."""
    title = f"Discrete diffusion on CountDown; {settings.num_countdowns} sequences a row"
    words = [
        [
            str(row["steps"]),
            f"{row['strict']:.1%} ± {row['strict_error']:.1%}",
            f"{row['original']:.1%}",
            f"{row['seconds_per_sequence']:.2f}",
        ]
        for row in rows
    ]
    return words_table(title, LEGEND, ["steps", "strict", "original", "s"], words)
