"""Respacing against the authors' kept timesteps and by its properties."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from diffusers_ext.pipelines import respaced_timesteps
from diffusers_ext.pipelines.respacing import set_timesteps

GOLDENS = sorted((Path(__file__).parent / "goldens").glob("gd_math_*.json"))


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_the_authors_timesteps(path):
    case = json.loads(path.read_text())
    kept = load_file(path.with_suffix(".safetensors"))["timestep_map"].tolist()
    respacing = case["timestep_respacing"] or str(case["diffusion_steps"])
    assert respaced_timesteps(respacing, case["diffusion_steps"]) == kept[::-1]


@given(st.integers(2, 4000), st.data())
def test_n_timesteps_keep_both_ends(total, data):
    count = data.draw(st.integers(2, total))
    kept = respaced_timesteps(str(count), total)
    assert len(kept) == count and kept[0] == total - 1 and kept[-1] == 0
    assert all(a > b for a, b in pairwise(kept))
    gaps = {a - b for a, b in pairwise(kept)}
    assert max(gaps) - min(gaps) <= 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(200, 2000))
def test_sections_count_their_own_timesteps(counts, total):
    kept = respaced_timesteps(",".join(map(str, counts)), total)
    assert len(kept) == sum(counts)
    starts = [sum(total // len(counts) + (i < total % len(counts)) for i in range(n)) for n in range(len(counts) + 1)]
    inside = [sum(starts[n] <= t < starts[n + 1] for t in kept) for n in range(len(counts))]
    assert inside == counts


@given(st.integers(1, 1000))
def test_ddim_strides_are_equal_or_refused(count):
    try:
        kept = respaced_timesteps(f"ddim{count}", 1000)
    except ValueError as error:
        assert "no integer stride" in str(error)
        assert all(len(range(0, 1000, stride)) != count for stride in range(1, 1000))
    else:
        assert len(kept) == count and kept[-1] == 0
        assert len({a - b for a, b in pairwise(kept)}) <= 1


@pytest.mark.parametrize(
    "wrong", ["", "ten", "0", "-5", "1001", "500,600", "ddim", "ddim999", "ddim0", "1.5", None, 250]
)
def test_wrong_respacings(wrong):
    with pytest.raises(ValueError, match="must be like"):
        respaced_timesteps(wrong, 1000)


def test_a_scheduler_is_set_by_length_respacing_or_list():
    scheduler = DDPMScheduler()
    set_timesteps(scheduler, 10, None, "cpu")
    assert scheduler.timesteps.tolist() == list(range(900, -1, -100))  # the scheduler's own spacing
    set_timesteps(scheduler, "10", None, "cpu")
    assert scheduler.timesteps.tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    set_timesteps(scheduler, "10", [7, 3], "cpu")
    assert scheduler.timesteps.tolist() == [7, 3]
    with pytest.raises(ValueError, match="DDIMScheduler takes no custom timesteps"):
        set_timesteps(DDIMScheduler(), "10", None, "cpu")
