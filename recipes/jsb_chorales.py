"""Turn the Bach chorales of the JSB set into token sequences for recipes/train_discrete.py.

    python recipes/jsb_chorales.py jsb-chorales-16th.json jsb_tokens.npz
    accelerate launch recipes/train_discrete.py --data jsb_tokens.npz --num-tokens 47 --num-streams 4 \\
        --batch-size 32 --output out/jsb

The chorales (Boulanger-Lewandowski et al., 2012; four voices on a grid of sixteenth notes) are the file
`jsb-chorales-16th.json` of github.com/czhuang/JSB-Chorales-dataset, {"train": [chorale, ...], "valid": ..., ...}
with chorale = [[soprano, alto, tenor, bass], ...] in MIDI pitches, -1 for a rest. An .npz with `train_satb`, (n, 4),
and `train_offsets`, where each chorale starts and the last one ends, is read as well.

A sequence is 64 sixteenths (4 bars) of the four voices, step by step, soprano first: 256 of the tokens of
`diffusers_ext.discrete.music`, which turns them back into pitches, MIDI files and pictures. `tokens` are the training
chorales from every beat on, in every transposition by at most a tritone that stays between the pitches 36 and 81.
`valid` are the validation chorales as they are, from every fourth bar on, so that no step counts twice; what is left
at their ends is dropped.
"""

import json
from pathlib import Path

import click
import numpy as np

from diffusers_ext.discrete.music import HIGHEST_PITCH, LOWEST_PITCH, REST, pitches_to_tokens

STEPS = 64  # sixteenths in a sequence
BEAT = 4
TRANSPOSITIONS = range(-6, 6)  # semitones; each key once


def load_chorales(path: Path, split: str) -> list[np.ndarray]:
    """Each chorale of a split, (steps, 4) MIDI pitches, -1 for a rest."""
    if path.suffix == ".npz":
        with np.load(path) as data:
            return np.split(data[f"{split}_satb"], data[f"{split}_offsets"][1:-1])
    return [np.array(chorale) for chorale in json.loads(path.read_text())[split]]


def transpositions(pitches: np.ndarray) -> list[np.ndarray]:
    """The chorale in every key that keeps it in range."""
    sounding = pitches != REST
    low, high = pitches[sounding].min(), pitches[sounding].max()
    return [
        np.where(sounding, pitches + shift, REST)
        for shift in TRANSPOSITIONS
        if low + shift >= LOWEST_PITCH and high + shift <= HIGHEST_PITCH
    ]


def windows(pitches: np.ndarray, stride: int) -> np.ndarray:
    """(count, 256) tokens of the stretches that start at every `stride` sixteenths."""
    starts = range(0, len(pitches) - STEPS + 1, stride)
    rows = [pitches_to_tokens(pitches[start : start + STEPS]).reshape(-1) for start in starts]
    return np.array(rows, dtype=np.uint8).reshape(-1, STEPS * pitches.shape[1])


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
def main(source, output):
    """Write the tokens of SOURCE, jsb-chorales-16th.json, to OUTPUT, an .npz."""
    train = [windows(key, BEAT) for chorale in load_chorales(source, "train") for key in transpositions(chorale)]
    valid = [windows(chorale, STEPS) for chorale in load_chorales(source, "valid")]
    tokens, valid = np.concatenate(train), np.concatenate(valid)
    np.savez_compressed(output, tokens=tokens, valid=valid)
    click.echo(f"{output}: {len(tokens)} sequences to train on, {len(valid)} for validation, {tokens.shape[1]} tokens")


if __name__ == "__main__":
    main()
