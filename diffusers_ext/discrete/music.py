"""Music in four voices: tokens of a sequence model, MIDI pitches on a grid, Standard MIDI Files and piano rolls.

A grid is (steps, voices) integers: the MIDI pitch that a voice sounds at each step, soprano first, -1 for a rest.
Equal pitches in a row are one held note; a grid cannot tell them from repeated ones.
"""

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..pipelines.call_arguments import checked_arguments

REST = -1
LOWEST_PITCH, HIGHEST_PITCH = 36, 81  # of the Bach chorales
NUM_TOKENS = HIGHEST_PITCH - LOWEST_PITCH + 2  # token 0 is a rest, token k the pitch 35 + k
VOICES = 4
TICKS = 480  # of a beat in the files
BLACK_KEYS = (1, 3, 6, 8, 10)  # semitones above C
COLOURS = ((204, 68, 75), (230, 159, 0), (0, 133, 120), (44, 90, 160), (120, 94, 150))


@checked_arguments
def pitches_to_tokens(pitches: np.ndarray | torch.Tensor) -> np.ndarray:
    """uint8 tokens of MIDI pitches, of the same shape.

    Raises:
        ValueError: for pitches that have no token.
    """
    pitches = np.asarray(pitches)
    outside = (pitches != REST) & ((pitches < LOWEST_PITCH) | (pitches > HIGHEST_PITCH))
    if outside.any():
        raise ValueError(
            f"pitches must be in [{LOWEST_PITCH}, {HIGHEST_PITCH}] or {REST}, got {np.unique(pitches[outside])}"
        )
    return np.where(pitches == REST, 0, pitches - LOWEST_PITCH + 1).astype(np.uint8)


@checked_arguments
def tokens_to_pitches(tokens: np.ndarray | torch.Tensor) -> np.ndarray:
    """Grids (..., steps, 4) int64 of sequences (..., 4 steps), in which the voices of a step follow each other.

    Raises:
        ValueError: for tokens of no pitch and for lengths that are no multiple of 4.
    """
    tokens = np.asarray(tokens).astype(np.int64)
    if (
        tokens.ndim == 0
        or tokens.shape[-1] % VOICES
        or tokens.min(initial=0) < 0
        or tokens.max(initial=0) >= NUM_TOKENS
    ):
        raise ValueError(
            f"tokens must be in [0, {NUM_TOKENS}) and their number a multiple of {VOICES}, got {tokens.shape} with"
            f" values from {tokens.min(initial=0)} to {tokens.max(initial=0)}"
        )
    pitches = np.where(tokens == 0, REST, tokens + LOWEST_PITCH - 1)
    return pitches.reshape(*tokens.shape[:-1], -1, VOICES)


@checked_arguments
def notes(voice: np.ndarray | torch.Tensor) -> list[tuple[int, int, int]]:
    """(first step, step after the last, pitch) of each note of one voice, (steps,) pitches."""
    voice = np.asarray(voice)
    edges = [0, *(np.flatnonzero(np.diff(voice)) + 1).tolist(), len(voice)]
    return [(a, b, int(voice[a])) for a, b in pairwise(edges) if a < b and voice[a] != REST]


@checked_arguments
def write_midi(
    path: str | Path,
    pitches: np.ndarray | torch.Tensor,
    steps_per_beat: int = 4,
    beats_per_minute: float = 80.0,
    program: int = 19,
) -> None:
    """Write a grid (steps, voices) as a Standard MIDI File of type 1: a track of the tempo, then one a voice.

    Args:
        path: of the file.
        pitches: (steps, voices), MIDI pitches or -1 for silence.
        steps_per_beat: of the grid.
        beats_per_minute: the tempo.
        program: General MIDI instrument from 0; 19 is a church organ, 52 a choir.

    Raises:
        ValueError: for other shapes, pitches outside [0, 127] that are not -1, more than 15 voices, and numbers that
            the format cannot hold.
    """
    pitches = np.asarray(pitches)
    if pitches.ndim != 2 or not 1 <= pitches.shape[1] <= 15 or pitches.dtype.kind not in "iu":
        raise ValueError(f"pitches must be integers (steps, 1 to 15 voices), got {pitches.dtype} {pitches.shape}")
    if pitches.size and not REST <= pitches.min() <= pitches.max() <= 127:
        raise ValueError(f"pitches must be in [0, 127] or {REST}, got {pitches.min()} to {pitches.max()}")
    microseconds = round(60e6 / beats_per_minute) if beats_per_minute > 0 else 0
    if not 0 < microseconds < 2**24 or steps_per_beat < 1 or TICKS % steps_per_beat or not 0 <= program <= 127:
        raise ValueError(
            f"need 3.6 <= beats_per_minute, steps_per_beat that divides {TICKS} and program in [0, 127], got"
            f" {beats_per_minute=}, {steps_per_beat=}, {program=}"
        )
    tempo = b"\x00\xff\x51\x03" + microseconds.to_bytes(3, "big")
    # channel 10, number 9, is percussion in General MIDI
    channels = [number for number in range(16) if number != 9][: pitches.shape[1]]
    tracks = [tempo]
    for channel, voice in zip(channels, pitches.T, strict=True):
        tracks.append(bytes([0, 0xC0 | channel, program]) + b"".join(_events(voice, channel, TICKS // steps_per_beat)))
    header = b"MThd" + struct.pack(">IHHH", 6, 1, len(tracks), TICKS)
    Path(path).write_bytes(header + b"".join(map(_track, tracks)))


def _events(voice: np.ndarray, channel: int, ticks: int) -> Iterator[bytes]:
    """Note on and note off messages of a voice, each after the ticks since the one before."""
    now = 0
    for start, end, pitch in notes(voice):
        yield _variable_length((start - now) * ticks) + bytes([0x90 | channel, pitch, 80])
        yield _variable_length((end - start) * ticks) + bytes([0x80 | channel, pitch, 0])
        now = end


def _track(events: bytes) -> bytes:
    events += b"\x00\xff\x2f\x00"  # end of track
    return b"MTrk" + struct.pack(">I", len(events)) + events


def _variable_length(number: int) -> bytes:
    """Seven bits a byte, the highest first, and the eighth bit set in all but the last."""
    groups = [number & 0x7F]
    while number := number >> 7:
        groups.append(number & 0x7F | 0x80)
    return bytes(reversed(groups))


@checked_arguments
def piano_roll(
    pitches: np.ndarray | torch.Tensor, steps_per_beat: int = 4, width: int = 10, height: int = 6
) -> Image.Image:
    """A picture of a grid (steps, voices): time to the right, pitch upwards, a colour a voice, a line a beat.

    The range is that of the chorales, wider where the music is.

    The rows of black keys are shaded, the lines of every fourth beat darker.

    Args:
        pitches: (steps, voices), MIDI pitches or -1 for silence.
        steps_per_beat: of the grid.
        width: of a cell in pixels.
        height: of a cell in pixels.
    """
    pitches = np.asarray(pitches)
    steps, voices = pitches.shape
    sounding = pitches[pitches != REST]
    low, high = int(sounding.min(initial=LOWEST_PITCH)), int(sounding.max(initial=HIGHEST_PITCH))
    image = Image.new("RGB", (steps * width, (high - low + 1) * height), "white")
    draw = ImageDraw.Draw(image)
    for pitch in range(low, high + 1):
        if pitch % 12 in BLACK_KEYS:
            top = (high - pitch) * height
            draw.rectangle((0, top, image.width, top + height - 1), fill=(242, 242, 242))
    for step in range(0, steps, steps_per_beat):
        strong = step % (4 * steps_per_beat) == 0
        draw.line((step * width, 0, step * width, image.height), fill=(150,) * 3 if strong else (215,) * 3)
    for number in reversed(range(voices)):  # the soprano above the others
        for start, end, pitch in notes(pitches[:, number]):
            top = (high - pitch) * height
            box = (start * width + 1, top, end * width - 1, top + height - 1)
            draw.rectangle(box, fill=COLOURS[number % len(COLOURS)])
    return image
