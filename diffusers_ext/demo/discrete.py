"""Discrete diffusion: CountDown sequences with their errors, and chorales as a piano roll and a MIDI file."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..metrics import countdown_errors, countdown_errors_original, countdown_wrong
from ..music import REST, piano_roll, tokens_to_pitches, write_midi
from ..sampling import sample_batches
from ..shipped import load_pipeline
from .pictures import sequences_picture, stacked

SHOWN = 16  # CountDown sequences in each panel of the picture
SHOWN_CHORALES = 4
PAUSE = 8  # sixteenths between chorales in the MIDI file
LEGEND = (
    "strict: share of all transitions that are wrong, red in the picture; original: as the paper's code counts, which"
    " looks at about every second one. s: seconds a sequence."
)


@dataclass(frozen=True)
class DiscreteSettings:
    """What is sampled; the models are shipped ones or folders."""

    countdown_model: str = "countdown-sedd"
    chorale_model: str = "jsb-sedd"
    countdown_steps: tuple[int, ...] = (8, 64)
    num_countdowns: int = 32
    chorale_steps: int = 64
    num_chorales: int = 8
    seed: int = 0


def run_discrete(output: Path, device: str, console: Console, settings: DiscreteSettings | None = None) -> dict:
    """Sample, measure and print; write countdown.png, chorales.png and chorales.mid into the folder.

    Returns the settings, a row of numbers for each number of steps on CountDown, the seconds that a chorale took, and
    the files.
    """
    settings = settings or DiscreteSettings()
    rows = draw_countdowns(output / "countdown.png", device, settings)
    print_table(console, rows, settings)
    seconds = draw_chorales(output, device, settings)
    console.print(f"chorales: {settings.num_chorales} of {settings.chorale_steps} steps, {seconds:.2f} s each")
    files = ["countdown.png", "chorales.png", "chorales.mid"]
    return {"settings": asdict(settings), "rows": rows, "seconds_per_chorale": seconds, "files": files}


def draw_countdowns(picture: Path, device: str, settings: DiscreteSettings) -> list[dict]:
    """Sample CountDown at each number of steps with the same seeds; a panel and a row each."""
    pipe = load_pipeline(settings.countdown_model).to(device)
    num_tokens = pipe.scheduler.config.vocab_size - (pipe.scheduler.mask_token_id is not None)
    rows, panels = [], {}
    for steps in settings.countdown_steps:
        tokens, seconds = sample_tokens(pipe, settings.num_countdowns, settings.seed, steps)
        strict, original = countdown_errors(tokens).mean().item(), countdown_errors_original(tokens).mean().item()
        rows.append({"steps": steps, "strict": strict, "original": original, "seconds_per_sequence": seconds})
        shown = tokens[:SHOWN]
        wrong = torch.nn.functional.pad(countdown_wrong(shown), (1, 0))
        panels[f"CountDown, {steps} steps: {strict:.1%} of transitions wrong"] = sequences_picture(
            shown, num_tokens, wrong
        )
    stacked(panels).save(picture)
    return rows


def draw_chorales(output: Path, device: str, settings: DiscreteSettings) -> float:
    """Sample chorales, draw the first ones, put all into one MIDI file; returns seconds a chorale."""
    pipe = load_pipeline(settings.chorale_model).to(device)
    tokens, seconds = sample_tokens(pipe, settings.num_chorales, settings.seed, settings.chorale_steps)
    chorales = tokens_to_pitches(tokens.numpy())
    panels = {f"chorale {i}": piano_roll(pitches) for i, pitches in enumerate(chorales[:SHOWN_CHORALES])}
    stacked(panels).save(output / "chorales.png")
    spaced = np.pad(chorales, ((0, 0), (0, PAUSE), (0, 0)), constant_values=REST)
    write_midi(output / "chorales.mid", spaced.reshape(-1, chorales.shape[-1]))
    return seconds


def sample_tokens(pipe, count: int, seed: int, steps: int) -> tuple[torch.Tensor, float]:
    """Tokens (count, length) on the CPU, and seconds a sequence."""
    pipe.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    call = {"num_inference_steps": steps, "output_type": "tokens"}
    tokens = torch.cat(list(sample_batches(pipe, count, None, seed, batch_size=16, **call))).cpu()
    return tokens, (time.perf_counter() - started) / count


def print_table(console: Console, rows: list[dict], settings: DiscreteSettings) -> None:
    """A row of numbers for each number of steps."""
    title = f"Discrete diffusion on CountDown; {settings.num_countdowns} sequences a row"
    table = Table(title=title, caption=LEGEND, caption_justify="left", box=SIMPLE, min_width=78)
    for name in ("steps", "strict", "original", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        numbers = (f"{row['strict']:.2%}", f"{row['original']:.2%}", f"{row['seconds_per_sequence']:.2f}")
        table.add_row(str(row["steps"]), *numbers)
    console.print(table)
