"""A boost by the share of valid samples: the largest gamma, what samples can show, going on, and refusals."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from tiny_guided_pipelines import CASES
from tiny_pipelines import tiny_sdxl

from diffusers_ext import BoostAndSkipPipeline, boost_and_skip, choose_boost
from diffusers_ext.boost.choice import FINENESS, SEEDS_APART, largest
from diffusers_ext.boost.shares import at_least
from diffusers_ext.shipped import load_pipeline, load_shipped_classifier

GAMMAS = [float(f"{8 ** (i / FINENESS):.4g}") for i in range(FINENESS + 1)]
COUNT = 200


def tiny_unet() -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(8, 1, 1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **blocks)


class Drawn(BoostAndSkipPipeline):
    """Images of one pixel, |noise| times gamma, and more of it the lower the sampler starts."""

    def __call__(
        self, batch_size=None, gamma=1.0, skip_to_sigma=None, num_inference_steps=50, generator=None, output_type="pt"
    ):
        self.calls = [*getattr(self, "calls", []), (gamma, skip_to_sigma, batch_size)]
        return SimpleNamespace(images=drawn(generator, gamma, skip_to_sigma))


def drawn(generators, gamma, skip_to_sigma):
    noise = torch.stack([torch.randn(1, 1, 1, generator=one) for one in generators]).abs()
    return noise * gamma * (1 if skip_to_sigma is None else 1 + 1 / skip_to_sigma)


def seeds(first, count=COUNT):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def valid(images, inputs):
    assert inputs == {}
    return images.flatten() < 4


def size(images):
    return images.flatten()


@pytest.fixture
def pipe():
    return Drawn(tiny_unet(), DDPMScheduler())


def choose(pipe, recognised=0.9, **options):
    options = {"num_samples": COUNT, "skip_to_sigma": [3.0, 12.0], "batch_size": 70, **options}
    return choose_boost(pipe, valid, recognised, **options)


def share(gamma, level, seed=0):
    return (drawn(seeds(seed), gamma, level) < 4).double().mean().item()


@pytest.mark.parametrize("recognised", [0.5, 0.9, 0.96])
def test_it_is_the_largest_gamma_of_all_that_can_be_shown(pipe, recognised):
    """Against every gamma, one after the other."""
    found = choose(pipe, recognised, rarity=size)
    for level in (3.0, 12.0):
        good = [gamma for gamma in GAMMAS if at_least(share(gamma, level), COUNT) >= recognised]
        assert found.largest[level] == max(good) and 1 < max(good) < 8
    assert len({(one.gamma, one.skip_to_sigma) for one in found.measured}) <= 1 + 2 * 7
    best = max((one for one in found.measured if one.at_least >= recognised), key=lambda one: one.rarity)
    assert found.chosen == best and found.settings == {"gamma": best.gamma, "skip_to_sigma": best.skip_to_sigma}
    values = drawn(seeds(0), best.gamma, best.skip_to_sigma)
    assert found.chosen.rarity == pytest.approx(values.mean().item())
    kept = (values < 4).double()
    assert found.chosen.recognised == kept.mean() and found.chosen.error == pytest.approx(
        kept.std().item() / COUNT**0.5
    )
    assert found.confirmed.recognised == share(best.gamma, best.skip_to_sigma, SEEDS_APART)
    assert found.stock.recognised == share(1.0, None, 2 * SEEDS_APART)


def test_rarity_is_by_default_the_distance_to_stock_samples(pipe):
    found = choose(pipe)
    stock = drawn(seeds(2 * SEEDS_APART), 1.0, None).flatten()
    ours = drawn(seeds(0), found.chosen.gamma, found.chosen.skip_to_sigma).flatten()
    nearest = (ours[:, None] - stock).abs().sort(1).values[:, :5]
    assert found.chosen.rarity == pytest.approx(nearest.mean().item(), rel=1e-4)
    among = (stock[:, None] - stock).abs().sort(1).values[:, 1:6]
    assert found.stock.rarity == pytest.approx(among.mean().item(), rel=1e-4)


@given(st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=50)
def test_bisection_finds_the_last_good_one(end, last):
    asked = []

    def measure(i):
        asked.append(i)
        return SimpleNamespace(i=i, at_least=0.9 if i < last else 0.89)

    found = largest(measure, end, 0.9)
    assert found is None if last == 0 else found.i == min(last - 1, end)
    assert len(asked) <= 2 + 6


@pytest.mark.parametrize(("share_", "count"), [(0.9, 20), (0.95, 400), (1.0, 30), (0.0, 10), (0.5, 7)])
def test_the_lower_end_is_where_the_share_is_as_far_away_as_z(share_, count):
    """Wilson's interval: |share - p| = z sqrt(p (1 - p) / n), solved for p."""
    low = at_least(share_, count)
    z = norm.ppf(0.95)
    assert 0 <= low <= share_
    assert share_ - low == pytest.approx(z * (low * (1 - low) / count) ** 0.5, rel=1e-3, abs=1e-6)


def test_a_share_is_not_claimed_that_so_few_samples_cannot_show(pipe):
    with pytest.raises(ValueError, match=r"cannot be shown with 20 samples, even if all of them are valid .*take 25"):
        choose(pipe, num_samples=20)
    assert not hasattr(pipe, "calls")
    assert at_least(1.0, 25) >= 0.9 > at_least(1.0, 24)


def test_it_says_what_was_measured_where_nothing_is_good_enough(pipe):
    with pytest.raises(ValueError, match=r"recognised=0.99: of the stock sampler's own samples \d.\d+ ± .* of 300"):
        choose_boost(pipe, lambda images, inputs: images.flatten() < 2, 0.99, num_samples=300)
    with pytest.raises(ValueError, match=r"even with gamma 1 the skip costs too much, at sigma 0.5"):
        choose_boost(pipe, lambda images, inputs: images.flatten() < 2.5, 0.95, num_samples=300, skip_to_sigma=0.5)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("rarity", [None, size])
def test_a_second_start_measures_nothing_twice(pipe, tmp_path, rarity):
    """Nor does one with another target, as far as it asks for the same; results are those of one start."""
    whole = choose(Drawn(tiny_unet(), DDPMScheduler()), rarity=rarity)
    begun = []

    def stop(setting, done):
        begun.append(setting)
        if len(begun) == 10:
            raise Stopped

    path = tmp_path / "boost.json"
    with pytest.raises(Stopped):
        choose(pipe, resume=path, on_batch=stop, rarity=rarity)
    finished = {call[:2] for call in pipe.calls[:9]}  # three batches each
    pipe.calls = []
    resumed = choose(pipe, resume=path, rarity=rarity)
    assert resumed == whole and not finished & {call[:2] for call in pipe.calls if call[:2] != (1.0, None)}
    assert (1.0, None) not in {call[:2] for call in pipe.calls}
    pipe.calls = []
    assert choose(pipe, resume=path, rarity=rarity) == whole and pipe.calls == []
    known = {(one.gamma, one.skip_to_sigma) for one in whole.measured}
    other = choose(pipe, 0.8, resume=path, rarity=rarity)
    assert other.chosen.gamma > whole.chosen.gamma
    asked = [call[:2] for call in pipe.calls]
    assert asked and not (set(asked) - {(other.chosen.gamma, other.chosen.skip_to_sigma)}) & known
    with pytest.raises(ValueError, match="begun with other settings: num_samples: 200 before, 100 now"):
        choose(pipe, 0.8, resume=path, num_samples=100, rarity=rarity)
    path.write_text('{"settings": {"a": 1}, "measured": {"x": {"gamma": 2}}}')
    with pytest.raises(ValueError, match="was begun with other settings"):
        choose(pipe, 0.8, resume=path, rarity=rarity)
    path.write_text("mine")
    with pytest.raises(ValueError, match="was not written by this command"):
        choose(pipe, 0.8, resume=path, rarity=rarity)
    assert path.read_text() == "mine"


def test_levels_that_start_at_one_step_are_tried_once():
    pipe = Drawn(tiny_unet(), DDPMScheduler())
    found = choose(pipe, skip_to_sigma=[3.0, 3.01, 100.0, 120.0], num_inference_steps=10)
    assert list(found.largest) == [3.0, 100.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recognised": 1.0}, "recognised must be a share between 0 and 1, got 1.0"),
        ({"recognised": float("nan")}, "recognised must be a share"),
        ({"recognised": "0.9"}, "recognised must be a number"),
        ({"max_gamma": 1.0}, "max_gamma must be a finite number > 1"),
        ({"max_gamma": float("inf")}, "max_gamma must be a finite number > 1"),
        ({"skip_to_sigma": []}, "skip_to_sigma must be finite numbers > 0"),
        ({"skip_to_sigma": [3.0, -1.0]}, "skip_to_sigma must be finite numbers > 0"),
        ({"skip_to_sigma": 1e6}, "outside of the noise levels of this schedule"),
        ({"num_samples": 0}, "count must be >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"inputs": {"class_labels": [0, 1], "prompt": ["a"]}}, "inputs must be labels"),
    ],
)
def test_bad_values_are_refused_before_the_work(pipe, options, message):
    options = {"num_samples": COUNT, "skip_to_sigma": [3.0], **options}
    with pytest.raises(ValueError, match=message):
        choose_boost(pipe, valid, **options)
    assert not hasattr(pipe, "calls")


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (lambda images, inputs: torch.full((len(images),), 1.5), r"number in \[0, 1\], got 1.5 to 1.5"),
        (lambda images, inputs: torch.full((len(images),), float("nan")), "the score must be finite"),
        (lambda images, inputs: [True], "the score must give one number a sample, 50, got shape"),
        (torch.nn.Linear(1, 1).eval(), "a classifier says the class that was asked for, and Drawn is asked for none"),
        (torch.nn.Linear(1, 1), "Linear is in training mode"),
        ("classifier", "judge must be a classifier or a function, got str"),
    ],
)
def test_judges_that_are_none(pipe, judge, message):
    with pytest.raises(ValueError, match=message):
        choose_boost(pipe, judge, num_samples=100)


def test_pipelines_that_cannot_be_boosted():
    with pytest.raises(ValueError, match="does not take gamma, nor multiply its initial noise"):
        choose_boost(DDPMPipeline(tiny_unet(), DDPMScheduler()), valid, num_samples=100)
    flow = CASES["stable_diffusion_3"]().pipe  # flow matching is not covered
    with pytest.raises(ValueError, match="does not take gamma, nor multiply its initial noise"):
        choose_boost(flow, valid, num_samples=100, inputs={"prompt": ["a"] * 100})


@pytest.mark.slow
def test_the_settings_are_what_pipelines_and_schedulers_take():
    """Digits by the shipped classifier, and text-to-image by a score of one's own, through the scheduler."""
    digits, classifier = load_pipeline("mnist-unet", "boost-and-skip"), load_shipped_classifier()[0]
    found = choose_boost(
        digits, classifier, 0.3, num_samples=20, num_inference_steps=6, skip_to_sigma=4, max_gamma=1.2, batch_size=20
    )
    assert found.settings == {"gamma": 1.2, "skip_to_sigma": 4.0} and found.largest == {4.0: 1.2}
    labels = list(range(10)) * 2
    images = digits(
        class_labels=labels, generator=seeds(0, 20), num_inference_steps=6, output_type="pt", **found.settings
    )
    recognised = classifier(images.images * 2 - 1).logits.argmax(1) == torch.tensor(labels)
    assert found.chosen.recognised == pytest.approx(recognised.double().mean().item(), abs=0.051)

    pipe = tiny_sdxl()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    own = pipe.scheduler
    call = {"height": 32, "width": 32, "guidance_scale": 1.0}
    found = choose_boost(
        pipe, lambda images, inputs: [prompt == "a cat" for prompt in inputs["prompt"]], 0.1,
        {"prompt": ["a cat"] * 4}, num_inference_steps=4, skip_to_sigma=2.0, max_gamma=2.0, call=call,
    )  # fmt: skip
    assert pipe.scheduler is own and found.settings == {"gamma": 2.0, "skip_to_sigma": 2.0}
    pipe.scheduler = boost_and_skip(pipe.scheduler, **found.settings)
    image = pipe("a cat", num_inference_steps=4, generator=seeds(0, 1), output_type="pt", **call).images
    assert image.isfinite().all() and json.dumps(found.settings)
