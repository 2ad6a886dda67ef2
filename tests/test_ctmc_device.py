"""CTMCScheduler and its pipeline on a second device: the tokens of the CPU, and what they make it wait for."""

from collections import Counter

import pytest
import torch
from tiny_discrete import build

from diffusers_ext import CTMCScheduler

device = pytest.importorskip("stand_in_device", reason="the second device's stand-in is not there")
pytestmark = [device.needs_device]

SAMPLERS = [
    {"kernel": kernel, "sampler": sampler, "prediction_type": prediction, "jumps": jumps}
    for kernel in ("absorbing", "uniform", "gaussian")
    for sampler in ("euler", "tweedie", "gillespie")
    for prediction in ("log_score", "x0")
    for jumps in (None, "categorical", "poisson")
    if (kernel == "absorbing") >= (sampler == "gillespie")
    if (kernel, prediction) != ("gaussian", "log_score")
    if jumps is None or (kernel != "absorbing" and sampler == "euler")
]


def seeded(how: str, batch: int):
    if how == "none":
        return None
    one = torch.Generator().manual_seed(0)
    return one if how == "one" else [torch.Generator().manual_seed(seed) for seed in range(batch)]


def walk(config: dict, where, how: str, pick=lambda timesteps: list(timesteps)):
    """Tokens after four steps, and a Counter of the kinds of waits of the package's code."""
    scheduler = CTMCScheduler(**config, vocab_size=7)
    scheduler.set_timesteps(4, device=where)
    generator = seeded(how, 3)
    x, outputs = scheduler.sample_prior((3, 9), generator, where), torch.Generator().manual_seed(5)
    outputs = [torch.randn(3, 9, 7, generator=outputs).to(where) for _ in range(5)]
    with device.waits() as noted:
        for t, output in zip(pick(scheduler.timesteps), outputs, strict=False):
            times = scheduler.model_time(t, 3, where)
            step = scheduler.step(output, t, x, generator)
            assert times.device == step.prev_timestep.device == x.device
            x = step.prev_sample
            if scheduler.sampler.counts_tokens:
                scheduler.model_time(step.prev_timestep, 3)
    return x, Counter((wait.kind, wait.op) for wait in noted if wait.ours)


def name(config: dict) -> str:
    return "-".join(filter(None, config.values()))


@pytest.mark.parametrize("how", ["none", "one", "list"])
@pytest.mark.parametrize("config", SAMPLERS, ids=name)
@torch.no_grad()
def test_steps_wait_for_masks_and_draws_alone(config, how):
    """And need no float64. A Poisson draw needs its means where the generator lives."""
    expected, _ = walk(config, "cpu", how)
    with device.device() as dx, device.without_float64():
        tokens, noted = walk(config, dx, how)
        steps = 4 if config["sampler"] == "gillespie" else 5
        reads = noted.pop(("read", "nonzero"), 0)
        assert reads == (steps if config["kernel"] == "absorbing" else 0)
        if how == "none":
            assert not noted
            return
        draws = 2 if config["sampler"] == "gillespie" else 1  # when, and which token
        poisson = config["jumps"] == "poisson" or (config["jumps"] is None and config["kernel"] == "gaussian")
        poisson = poisson and config["sampler"] == "euler"
        if poisson:
            calls = 4 * (3 if how == "list" else 1)
            assert noted.pop(("read", "to host")) == calls
            draws = 3
        denoised = int(config["prediction_type"] == "log_score" or config["kernel"] == "absorbing")
        each = (3 if how == "list" else 1) if poisson else 1
        assert noted == {("transfer", "to device"): 4 * draws * each + (denoised if steps == 5 else 0)}
        assert torch.equal(tokens.cpu(), expected)


@pytest.mark.parametrize("config", [{"kernel": "uniform"}, {"sampler": "gillespie"}], ids=str)
@torch.no_grad()
def test_timesteps_from_elsewhere_are_read_and_right(config):
    """Copies, repeated, out of order: the same steps. A schedule that was written over is read, and refused."""
    picks = {
        "views": lambda ts: [ts[i] for i in (2, 0, 0, 3)],
        "slices": lambda ts: [ts[1:][1], ts[:1][0], ts[0].expand(3), ts[-1 if len(ts) == 4 else -2]],
        "copies": lambda ts: [ts[i].clone() for i in (2, 0, 0, 3)],
        "numbers": lambda ts: [float(ts[i]) for i in (2, 0, 0, 3)],
        "host": lambda ts: [ts.cpu()[i] for i in (2, 0, 0, 3)],
    }
    expected, _ = walk(config, "cpu", "one", picks["copies"])
    with device.device() as dx:
        for kind, pick in picks.items():
            tokens, noted = walk(config, dx, "one", pick)
            assert torch.equal(tokens.cpu(), expected), kind
            if kind in ("views", "slices"):
                assert not noted["read", "tolist"] and not noted["read", "_local_scalar_dense"], kind
        scheduler = CTMCScheduler(**config, vocab_size=7)
        scheduler.set_timesteps(4, device=dx)
        x = scheduler.sample_prior((3, 9), device=dx)
        scheduler.timesteps.mul_(0.9)
        with pytest.raises(ValueError, match="not one of the schedule's"):
            scheduler.step(torch.zeros(3, 9, 7).to(dx), scheduler.timesteps[1], x)


@pytest.mark.parametrize("sampler", ["euler", "tweedie", "gillespie"])
@pytest.mark.parametrize("how", ["none", "one", "list"])
def test_pipeline_reads_the_schedule_once(sampler, how):
    def run(where, steps):
        pipe = build("text").to(where)
        pipe.set_progress_bar_config(disable=True)
        with device.waits() as noted:
            tokens = pipe(
                batch_size=2,
                num_inference_steps=steps,
                sampler=sampler,
                generator=seeded(how, 2),
                output_type="tokens",
            ).tokens
        ours = Counter((w.kind, w.op) for w in noted if w.ours and "/models/" not in w.place)
        return tokens, ours

    with device.device() as dx, device.without_float64():
        few, many = run(dx, 4), run(dx, 10)
        grown = many[1] - few[1]
        assert grown.pop(("read", "nonzero")) == 6
        each = {"none": 0, "one": 1, "list": 1}[how] * (2 if sampler == "gillespie" else 1)
        assert grown == ({("transfer", "to device"): 6 * each} if each else {})
        if how != "none":
            assert torch.equal(many[0].cpu(), run("cpu", 10)[0])
