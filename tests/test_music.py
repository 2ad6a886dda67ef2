"""Tokens, pitches and MIDI files of four voices."""

import numpy as np
import pytest

from diffusers_ext.discrete.music import (
    COLOURS,
    HIGHEST_PITCH,
    LOWEST_PITCH,
    NUM_TOKENS,
    REST,
    notes,
    piano_roll,
    pitches_to_tokens,
    tokens_to_pitches,
    write_midi,
)


def parse_midi(data: bytes) -> tuple[int, list[list[tuple]]]:
    """Ticks of a beat, and of each track (tick, status, *data) of its events; reads no more than the standard says."""

    def number(position: int) -> tuple[int, int]:
        value = 0
        while True:
            byte, position = data[position], position + 1
            value = value << 7 | byte & 0x7F
            if byte < 0x80:
                return value, position

    assert data[:8] == b"MThd\x00\x00\x00\x06"
    kind, count, ticks = (int.from_bytes(data[i : i + 2], "big") for i in (8, 10, 12))
    assert kind == 1
    tracks, position = [], 14
    for _ in range(count):
        assert data[position : position + 4] == b"MTrk"
        end = position + 8 + int.from_bytes(data[position + 4 : position + 8], "big")
        position, now, events = position + 8, 0, []
        while position < end:
            delta, position = number(position)
            now, status = now + delta, data[position]
            if status == 0xFF:
                size, start = number(position + 2)
                events.append((now, status, data[position + 1], data[start : start + size]))
                position = start + size
            else:
                size = 1 if status >> 4 in (0xC, 0xD) else 2
                events.append((now, status, *data[position + 1 : position + 1 + size]))
                position += 1 + size
        assert position == end and events[-1][1:] == (0xFF, 0x2F, b"")
        tracks.append(events)
    assert position == len(data)
    return ticks, tracks


def grid_of(track: list[tuple], ticks_per_step: float, steps: int) -> np.ndarray:
    """(steps,) pitches that a track of one voice sounds."""
    grid, sounding = np.full(steps, REST), None
    for now, status, *rest in track:
        step = now / ticks_per_step
        assert step == int(step)
        if status >> 4 == 9:
            assert sounding is None
            sounding = (int(step), rest[0])
        elif status >> 4 == 8:
            start, pitch = sounding
            assert pitch == rest[0]
            grid[start : int(step)], sounding = pitch, None
    assert sounding is None
    return grid


@pytest.fixture
def music() -> np.ndarray:
    """(200, 4) pitches with held notes, rests and long stretches of silence."""
    rng = np.random.default_rng(0)
    pitches = np.repeat(rng.integers(LOWEST_PITCH, HIGHEST_PITCH + 1, (50, 4)), 4, axis=0)
    pitches[rng.random((200, 4)) < 0.1] = REST
    pitches[:130, 3] = REST
    return pitches


@pytest.mark.parametrize("steps_per_beat", [1, 4])
def test_a_file_parses_back_to_its_music(steps_per_beat, music, tmp_path):
    write_midi(tmp_path / "music.mid", music, steps_per_beat, beats_per_minute=90, program=52)
    ticks, tracks = parse_midi((tmp_path / "music.mid").read_bytes())
    (tempo,) = [event for event in tracks[0] if event[2] == 0x51]
    assert int.from_bytes(tempo[3], "big") == round(60e6 / 90) and len(tracks) == 5
    for channel, (track, voice) in enumerate(zip(tracks[1:], music.T, strict=True)):
        assert track[0] == (0, 0xC0 | channel, 52)
        assert {event[1] & 0x0F for event in track[:-1]} == {channel}
        np.testing.assert_array_equal(grid_of(track, ticks / steps_per_beat, 200), voice)


def test_held_pitches_are_one_note():
    assert notes(np.array([60, 60, -1, 62, 62, 64])) == [(0, 2, 60), (3, 5, 62), (5, 6, 64)]
    assert notes(np.array([-1, -1])) == [] and notes(np.array([], dtype=int)) == []


def test_many_voices_leave_the_drums_out(tmp_path):
    write_midi(tmp_path / "music.mid", np.full((2, 15), 60))
    _, tracks = parse_midi((tmp_path / "music.mid").read_bytes())
    assert [track[0][1] & 0x0F for track in tracks[1:]] == [*range(9), *range(10, 16)]


def test_an_empty_grid_is_a_file(tmp_path):
    write_midi(tmp_path / "music.mid", np.zeros((0, 4), dtype=int))
    assert len(parse_midi((tmp_path / "music.mid").read_bytes())[1]) == 5


def test_tokens_and_pitches():
    pitches = np.array([[REST, 36, 81, 60], [61, REST, REST, 37]])
    tokens = pitches_to_tokens(pitches)
    assert tokens.tolist() == [[0, 1, 46, 25], [26, 0, 0, 2]] and tokens.dtype == np.uint8 and NUM_TOKENS == 47
    np.testing.assert_array_equal(tokens_to_pitches(tokens.reshape(-1)), pitches)
    assert tokens_to_pitches(np.zeros((3, 8), np.uint8)).shape == (3, 2, 4)
    with pytest.raises(ValueError, match=r"pitches must be in \[36, 81\] or -1, got \[35 82\]"):
        pitches_to_tokens(np.array([35, 60, 82]))
    for wrong in (np.zeros(6, int), np.full(4, 47), np.full(4, -1)):
        with pytest.raises(ValueError, match=r"tokens must be in \[0, 47\) and their number a multiple of 4"):
            tokens_to_pitches(wrong)


@pytest.mark.parametrize(
    ("pitches", "options", "message"),
    [
        (np.zeros((2, 16), int), {}, "1 to 15 voices"),
        (np.zeros((2, 4)), {}, "must be integers"),
        (np.full((2, 4), 128), {}, r"in \[0, 127\] or -1, got 128"),
        (np.zeros((2, 4), int), {"beats_per_minute": 3}, "beats_per_minute=3"),
        (np.zeros((2, 4), int), {"beats_per_minute": 0}, "beats_per_minute=0"),
        (np.zeros((2, 4), int), {"steps_per_beat": 7}, "steps_per_beat=7"),
        (np.zeros((2, 4), int), {"steps_per_beat": 0}, "steps_per_beat=0"),
        (np.zeros((2, 4), int), {"program": 128}, "program=128"),
    ],
)
def test_what_no_file_can_hold_is_refused(pitches, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_midi(tmp_path / "music.mid", pitches, **options)
    assert not list(tmp_path.iterdir())


def test_piano_roll():
    """A note is a bar of its voice's colour at its pitch; the soprano lies above."""
    pitches = np.full((8, 4), REST)
    pitches[0:4, 0], pitches[4:8, 2], pitches[0:4, 3] = 72, 50, 72
    picture = np.asarray(piano_roll(pitches, width=10, height=6))
    assert picture.shape == ((HIGHEST_PITCH - LOWEST_PITCH + 1) * 6, 80, 3)

    def middle(step, pitch):
        return tuple(picture[(HIGHEST_PITCH - pitch) * 6 + 3, step * 10 + 5].tolist())

    assert middle(0, 72) == middle(3, 72) == COLOURS[0] and middle(5, 50) == COLOURS[2]
    assert middle(5, 72) not in COLOURS and middle(0, 50) not in COLOURS
    assert np.asarray(piano_roll(np.full((4, 1), 100), height=1)).shape[0] == 100 - LOWEST_PITCH + 1
