"""The law of every draw of discrete diffusion, on generators as coarse as those of other devices."""

import math

import pytest
import torch

from diffusers_ext import CTMCScheduler
from diffusers_ext.schedulers.ctmc_draws import clocks, clocks_for_tokens, draw_tokens, replay_tokens, uniforms

CPU = torch.device("cpu")


@pytest.fixture(params=["as it is", "2^-24", "2^-16", "zeros"])
def resolution(request, monkeypatch):
    """Uniforms in multiples of 2^-24 or 2^-16 only, and exponentials that end there; or that are often -0.0."""
    if request.param == "as it is":
        return
    cells = 2.0**16 if request.param == "2^-16" else 2.0**24
    rand, exponential = torch.rand, torch.Tensor.exponential_

    def coarse_rand(*args, **kwargs):
        return rand(*args, **kwargs).mul_(cells).floor_().div_(cells)

    def coarse_exponential(self, *args, **kwargs):
        drawn = exponential(self, *args, **kwargs).clamp_(min=1 / cells)
        return drawn.masked_fill_(drawn < 0.01, -0.0) if request.param == "zeros" else drawn

    monkeypatch.setattr(torch, "rand", coarse_rand)
    monkeypatch.setattr(torch.Tensor, "exponential_", coarse_exponential)


def assert_counts(counted: float, expected: float):
    """Poisson counts within five standard deviations."""
    assert abs(counted - expected) < 5 * math.sqrt(expected), (counted, expected)


def test_uniforms_are_uniform_at_every_scale(resolution):
    """Also inside of a cell of the generator: the share below 2^-k is 2^-k."""
    n = 2**21
    u = uniforms((n,), torch.Generator().manual_seed(0), CPU)
    assert u.min() > 0 and u.max() < 1
    for k in range(1, 17):
        assert_counts(int((u < 2.0**-k).sum()), n * 2.0**-k)
    assert abs(float(u.double().mean()) - 0.5) < 5 / math.sqrt(12 * n)
    assert len(u[:1000].unique()) == 1000


def test_uniforms_inside_of_the_lowest_cell(monkeypatch):
    """Where the first digits are 0, they are as fine again."""
    rand, calls = torch.rand, []

    def low_first(*args, **kwargs):
        calls.append(None)
        return rand(*args, **kwargs) * (2.0**-17 if len(calls) < 3 else 1)

    monkeypatch.setattr(torch, "rand", low_first)
    u = uniforms((100_000,), torch.Generator().manual_seed(0), CPU).double() * 2.0**32
    assert u.min() > 0 and u.max() <= 1
    share = torch.histc(u, 10, 0, 1) / len(u)
    assert (share - 0.1).abs().max() < 5 * math.sqrt(0.09 / len(u))


def test_clocks_are_exponential_positive_and_finite(resolution):
    drawn = clocks((500_000,), torch.Generator().manual_seed(0), CPU).double()
    assert drawn.min() > 0 and drawn.max() < 17
    for moment in (1, 2, 3):
        error = math.sqrt(math.factorial(2 * moment) / len(drawn))
        assert abs(float((drawn**moment).mean()) - math.factorial(moment)) < 5 * error


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 4, 5, 7, 16, 17, 50])
def test_tokens_are_drawn_in_proportion_to_their_weights(vocab_size):
    """Chi-square, with tokens of no weight among them."""
    n, generator = 40_000, torch.Generator().manual_seed(0)
    weights = torch.rand(vocab_size, generator=generator) ** 3
    weights[1::3] = 0
    ticks = clocks_for_tokens((n,), vocab_size, generator, CPU)
    counts = torch.bincount(draw_tokens(weights.expand(n, -1), ticks), minlength=vocab_size).double()
    expected = n * weights.double() / weights.double().sum()
    assert counts[weights == 0].sum() == 0
    some = expected > 5
    square, freedom = float(((counts - expected) ** 2 / expected)[some].sum()), int(some.sum()) - 1
    assert square <= freedom + 5 * math.sqrt(2 * freedom) + 5


def test_rare_tokens_move_as_often_as_they_should(resolution):
    """Ten tokens of a weight far below the generator's cell of 2^-16, beside one of weight 1."""
    n, weight = 2_000_000, 2e-6
    weights = torch.tensor([weight] * 10 + [1.0]).expand(n, -1)
    ticks = clocks_for_tokens((n,), 11, torch.Generator().manual_seed(0), CPU)
    assert_counts(int((draw_tokens(weights, ticks) < 10).sum()), n * 10 * weight)


@pytest.mark.parametrize("weight", [1e-8, 1e-10])
def test_clocks_of_weights_below_every_float(monkeypatch, weight):
    """Given that the first 16 digits of the light block's clock are 0, which has the probability 2^-16.

    The light block of four tokens then wins with probability 4 w E[E_0] / 2^-16 for the clock E_0 of the heavy one.
    """
    n, rand, calls = 1_000_000, torch.rand, []

    def light_first(shape, **kwargs):
        drawn = rand(shape, **kwargs)
        if not calls:
            drawn[:, 0] *= 2.0**-16
        calls.append(None)
        return drawn

    monkeypatch.setattr(torch, "rand", light_first)
    weights = torch.zeros(11)
    weights[:4], weights[10] = weight, 1.0
    ticks = clocks_for_tokens((n,), 11, torch.Generator().manual_seed(0), CPU)
    light = int((draw_tokens(weights.expand(n, -1), ticks) < 4).sum())
    assert_counts(light, n * 4 * weight * 2**16)


def zipf(vocab_size: int) -> torch.Tensor:
    law = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    return law / law.sum()


@pytest.mark.parametrize("steps", [128, 4096])
def test_entropy_does_not_fall_with_the_number_of_steps(resolution, steps):
    """A law of Zipf over 50,257 tokens: in one of many steps the tail of rare tokens has its share of all that move.

    The entropy of a token fell since tokens lighter than the clocks' floor times the mask's weight were never drawn.
    Seen in the draws of blocks, whose clocks alone decide whether and roughly where to a token moves.
    """
    vocab_size, n = 50_258, 60_000 if steps == 128 else 1_000_000
    width = math.isqrt(vocab_size - 1) + 1
    moving = torch.cat([zipf(vocab_size - 1) / steps, torch.tensor([1 - 1 / steps], dtype=torch.float64)])
    blocks = torch.stack([part.sum() for part in moving.split(width)])
    mask, tail = len(blocks) - 1, len(blocks) // 2
    small = torch.tensor([blocks[:tail].sum(), blocks[tail:mask].sum(), blocks[mask]]).float()
    ticks = clocks_for_tokens((n,), 3, torch.Generator().manual_seed(0), CPU)
    drawn = torch.bincount(draw_tokens(small.expand(n, -1), ticks), minlength=3)
    assert_counts(int(drawn[0]), n * float(small[0]))
    assert_counts(int(drawn[1]), n * float(small[1]))


def test_a_walk_of_many_steps_draws_rare_tokens(resolution):
    """Through the scheduler: 60 % of the law on two tokens, the rest on 2,000 of 2e-4, in 1 and in 64 steps."""
    vocab_size, n = 2_003, 2_000
    law = torch.cat([torch.tensor([0.4, 0.2]), torch.full((2_000,), 2e-4), torch.zeros(1)])
    for steps in (1, 64):
        scheduler = CTMCScheduler(vocab_size=vocab_size, prediction_type="probabilities", time_conditioning="timestep")
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(steps)
        x = scheduler.sample_prior((1, n))
        for t in scheduler.timesteps:
            x = scheduler.step(law.expand(1, n, -1), t, x, generator).prev_sample
        assert_counts(int((x >= 2).sum()), 0.4 * n)
        assert_counts(int((x == 1).sum()), 0.2 * n)


# Noise of the chain forward, and priors


@pytest.mark.parametrize("kernel", ["absorbing", "uniform"])
def test_little_noise_moves_as_many_tokens_as_it_should(kernel, resolution):
    """Constant noise: 1 - exp(-5e-6) of them, below a cell of 2^-16."""
    scheduler = CTMCScheduler(kernel=kernel, vocab_size=1_001, noise_schedule="constant")
    x0 = torch.zeros(4, 1_000_000, dtype=torch.int64)
    moved = int((scheduler.add_noise(x0, torch.Generator().manual_seed(0), 5e-6) != 0).sum())
    assert_counts(moved, -math.expm1(-5e-6) * x0.numel() * (1 if kernel == "absorbing" else 1_000 / 1_001))


def test_prior_has_its_tails(resolution):
    """Of the Gaussian prior, tokens with a share of 3e-5 and less."""
    scheduler = CTMCScheduler(kernel="gaussian", vocab_size=64, prediction_type="x0", Q_sigma=8.0)
    law = scheduler.prior_probabilities()
    drawn = torch.bincount(
        scheduler.sample_prior((2, 300_000), torch.Generator().manual_seed(0)).flatten(), minlength=64
    )
    tail = law < 3e-5
    assert_counts(int(drawn[tail].sum()), 600_000 * float(law[tail].sum()))
    assert_counts(int(drawn[31]), 600_000 * float(law[31]))


@pytest.mark.parametrize("length", [0.5, 5e-5])
def test_poisson_jumps_are_as_many_as_they_should_be(length, monkeypatch):
    """Means and variances of the jumps of birth-death tokens; of few jumps also where torch.poisson finds none."""
    scheduler = CTMCScheduler(
        kernel="birth_death", vocab_size=101, prediction_type="probabilities", noise_schedule="constant"
    )
    x = torch.full((40, 2_000), 50)
    output = torch.full((1, 1, 101), 1 / 101).expand(*x.shape, -1)
    rates = scheduler.reverse_rates(output[:1, :1], 0.6, x[:1, :1])[0, 0].double()
    up, down = float(rates[51]) * length, float(rates[49]) * length
    if length < 1e-3:
        monkeypatch.setattr(torch, "poisson", lambda mean, generator=None: torch.zeros_like(mean))
    jumps = []
    for seed in range(1 if length > 1e-3 else 12):
        step = scheduler.step(output, 0.6, x, torch.Generator().manual_seed(seed), next_timestep=0.6 - length)
        jumps.append((step.prev_sample - x).flatten().double())
    jumps = torch.cat(jumps)
    error = math.sqrt((up + down) / len(jumps))
    assert abs(float(jumps.mean()) - (up - down)) < 5 * error
    assert float(jumps.var()) == pytest.approx(up + down, rel=0.2 if length < 1e-3 else 0.03)


# Recorded uniforms


def test_recorded_uniforms_of_zero_and_one_draw_tokens_that_have_weight():
    weights = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1e-30, 0.0], [0.0, 1.0, 2.0]])
    for value in (0.0, 1.0):
        assert replay_tokens(weights.clone(), torch.full((3, 3), value)).tolist() == [2, 1, 2]


@pytest.mark.parametrize("zeros", [1, 3, 6])
def test_a_holding_time_of_uniform_zero_decodes_as_many_masks(zeros):
    """-log 0 is infinite, as for decoded positions, but masks come before these."""
    scheduler = CTMCScheduler(vocab_size=5, sampler="gillespie")
    x = torch.tensor([[1, 4, 2, 4, 4, 0, 4, 4, 4]] * 2)
    u = torch.full((2, 9), 0.0)
    u[0, torch.tensor([1, 3, 4, 6, 7, 8])[zeros:]] = 0.5
    tokens = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0))
    for count in range(7):
        step = scheduler.step(torch.zeros(2, 9, 5), 0.5, x, num_decode=count, noise=(u, tokens))
        assert ((x == 4).sum(1) - (step.prev_sample == 4).sum(1)).tolist() == [count, count]
        assert torch.equal(step.prev_sample[x != 4], x[x != 4])
        assert ((step.prev_timestep > 0) & (step.prev_timestep <= 0.5)).all()
    with pytest.raises(ValueError, match="noise records 2 tokens a sample, the step decodes 3"):
        scheduler.step(torch.zeros(2, 9, 5), 0.5, x, num_decode=3, noise=(u, tokens[:, :2]))


@pytest.mark.parametrize("output", [-200.0, 0.0, 200.0])
def test_gillespie_decodes_as_many_masks_whatever_the_rates(output, resolution):
    """Also where rates vanish or overflow in float32."""
    scheduler = CTMCScheduler(vocab_size=5, sampler="gillespie")
    x = torch.full((3, 50), 4)
    for count in (1, 20, 50):
        step = scheduler.step(
            torch.full((3, 50, 5), output), 0.5, x, torch.Generator().manual_seed(0), num_decode=count
        )
        assert ((x == 4).sum(1) - (step.prev_sample == 4).sum(1)).tolist() == [count] * 3
