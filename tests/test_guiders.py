"""Guiders in an interval on tiny modular pipelines, against the classic pipeline with the same interval."""

import diffusers
import pytest
import torch
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from tiny_guided_pipelines import CASES
from tiny_pipelines import tiny_sdxl

from diffusers_ext.guidance.guiders import IntervalGuidance, limit_to_interval
from diffusers_ext.pipelines import GuidanceInterval

pytestmark = pytest.mark.filterwarnings("ignore:the guidance interval")
OPTIONS = {"prompt": ["a cat", "a dog"], "negative_prompt": ["", ""], "num_inference_steps": 4}
INTERVALS = [{"sigma_lo": 0.05, "sigma_hi": 2.0}, {"guided_steps": (0, 1)}, {"sigma_lo": 50.0}]


@pytest.fixture(scope="module")
def classic():
    return tiny_sdxl()


@pytest.fixture
def modular(classic):
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**{k: v for k, v in classic.components.items() if v is not None})
    pipe.update_components(force_zeros_for_empty_prompt=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_modular(pipe, **changes) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    options = {**OPTIONS, "height": 16, "width": 16, **changes}
    return pipe(**options, generator=generator, output_type="latent", output="images")


def run_classic(pipe, scale=5.0, **changes) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return pipe(
        **{**OPTIONS, **changes}, guidance_scale=scale, generator=generator, output_type="latent", return_dict=False
    )[0]


class Rows:
    """Counts the rows that a network is called with."""

    def __init__(self, module):
        self.handle = module.register_forward_pre_hook(self.count, with_kwargs=True)
        self.counts = []

    def count(self, module, args, kwargs):
        self.counts.append(len(args[0] if args else kwargs["hidden_states"]))

    def __enter__(self):
        return self.counts

    def __exit__(self, *error):
        self.handle.remove()


def test_whole_line_is_the_stock_guider(modular):
    modular.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0))
    plain = run_modular(modular)
    modular.update_components(guider=IntervalGuidance(guidance_scale=5.0, sigma_lo=0.0))
    assert torch.equal(run_modular(modular), plain)


@pytest.mark.parametrize("interval", INTERVALS)
def test_equals_the_classic_path_call_after_call(classic, modular, interval):
    with GuidanceInterval(classic, **interval) as limited, Rows(classic.unet) as classic_rows:
        expected = run_classic(classic)
    modular.update_components(guider=IntervalGuidance(guidance_scale=5.0, **interval))
    for _ in range(2):
        with Rows(modular.unet) as rows:
            torch.testing.assert_close(run_modular(modular), expected, rtol=0, atol=1e-4)
        assert sum(rows) == sum(classic_rows) == limited.report.rows


def test_several_evaluations_a_step(classic, modular):
    """Heun: one decision a step, as on the classic path."""
    heun = diffusers.HeunDiscreteScheduler.from_config(classic.scheduler.config)
    stock, classic.scheduler = classic.scheduler, heun
    try:
        with GuidanceInterval(classic, guided_steps=(1, 2)) as limited:
            expected = run_classic(classic)
    finally:
        classic.scheduler = stock
    modular.update_components(scheduler=heun, guider=IntervalGuidance(guidance_scale=5.0, guided_steps=(1, 2)))
    for _ in range(2):
        with Rows(modular.unet) as rows:
            torch.testing.assert_close(run_modular(modular), expected, rtol=0, atol=1e-4)
        # step 0 with its second evaluation, steps 1 and 2 with two calls for each evaluation, and Euler's last
        assert rows == [2, 2] + [2, 2] * 4 + [2]
    assert sum(rows) == limited.report.rows


@pytest.mark.parametrize("interval", [{"guided_steps": (3, 3)}, {"sigma_lo": 0.1}])
def test_image_to_image_counts_in_the_schedule_as_set(classic, modular, interval):
    """With strength 0.5 the steps that run are 2 and 3 of 4."""
    given = {"image": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), "strength": 0.5}
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**classic.components, add_watermarker=False)
    with GuidanceInterval(pipe, **interval) as limited:
        expected = run_classic(pipe, **given)
    assert limited.report.guided_steps == [3 if "guided_steps" in interval else 2]
    modular.update_components(guider=IntervalGuidance(guidance_scale=5.0, **interval))
    with Rows(modular.unet) as rows:
        torch.testing.assert_close(run_modular(modular, **given), expected, rtol=0, atol=1e-4)
    assert sum(rows) == limited.report.rows


@pytest.mark.parametrize(
    "guider",
    [
        diffusers.ClassifierFreeGuidance(guidance_scale=5.0),
        diffusers.AdaptiveProjectedGuidance(guidance_scale=5.0),
        diffusers.TangentialClassifierFreeGuidance(guidance_scale=5.0),
        diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=0),
    ],
    ids=lambda guider: type(guider).__name__,
)
def test_other_guiders(classic, modular, guider):
    """The whole line is the guider, an empty interval no guidance, and the guider that was given stays as it was."""
    modular.update_components(guider=guider)
    plain = run_modular(modular)
    modular.update_components(guider=limit_to_interval(guider, sigma_lo=0.0))
    assert torch.equal(run_modular(modular), plain)
    limited = limit_to_interval(guider, sigma_lo=50.0)
    modular.update_components(guider=limited)
    for _ in range(2):
        torch.testing.assert_close(run_modular(modular), run_classic(classic, scale=1.0), rtol=0, atol=1e-4)
    assert type(limited).__name__ == type(guider).__name__ and isinstance(limited, type(guider))
    modular.update_components(guider=guider)
    assert torch.equal(run_modular(modular), plain)


def test_disabling_still_counts():
    guider = IntervalGuidance(guidance_scale=5.0, sigma_lo=0.0)
    assert guider.num_conditions == 2
    guider.disable()
    assert guider.num_conditions == 1
    guider.enable()
    assert guider.num_conditions == 2


def test_step_fractions_do_not_outlive_a_call(modular):
    """diffusers' own guider, off in the last step, fails in the second call; this one does not."""
    modular.update_components(guider=IntervalGuidance(guidance_scale=5.0, sigma_lo=0.0, stop=0.5))
    assert torch.equal(run_modular(modular), run_modular(modular))


@pytest.mark.parametrize(("stop", "last_call"), [(1.0, 6), (0.5, 5)])
def test_broken_off_in_an_unguided_step(modular, stop, last_call):
    """The next call still knows that it needs negative prompts."""
    modular.update_components(guider=IntervalGuidance(guidance_scale=5.0, guided_steps=(1, 2), stop=stop))
    expected, calls = run_modular(modular), []

    def interrupt(module, args):
        calls.append(module)
        if len(calls) == last_call:
            raise KeyboardInterrupt

    with modular.unet.register_forward_pre_hook(interrupt):
        with pytest.raises(KeyboardInterrupt):
            run_modular(modular)
        assert torch.equal(run_modular(modular), expected)
        assert len(calls) == 2 * last_call


@pytest.mark.parametrize(("interval", "which"), [({"sigma_lo": 0.0}, "every one"), ({"sigma_lo": 50.0}, "none")])
def test_no_effect_is_said(modular, interval, which):
    modular.update_components(guider=IntervalGuidance(guidance_scale=5.0, **interval))
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"the guidance interval .* holds {which} of the 4 steps"):
            run_modular(modular)


def test_classic_pipeline_with_a_guider():
    case = CASES["hunyuan_image"]()
    guider = case.pipe.guider
    with GuidanceInterval(case.pipe, guided_steps=(1, 2)):
        expected = case.pipe(**case.options, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    case.pipe.guider = case.pipe.ocr_guider = limit_to_interval(guider, guided_steps=(1, 2))
    output = case.pipe(**case.options, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    torch.testing.assert_close(output, expected)


def test_config_and_copies(tmp_path):
    guider = IntervalGuidance(guidance_scale=5.0, sigma_lo=0.28, sigma_hi=5.42)
    guider.save_config(tmp_path) if hasattr(guider, "save_config") else guider.save_pretrained(tmp_path)
    again = IntervalGuidance.from_pretrained(tmp_path)
    assert (again.guidance_scale, again.interval.sigma_lo, again.interval.sigma_hi) == (5.0, 0.28, 5.42)
    other = guider.new(guidance_scale=3.0)
    assert (other.guidance_scale, other.interval.sigma_hi) == (3.0, 5.42)
    limited = limit_to_interval(diffusers.ClassifierFreeGuidance(), guided_steps=(1, 2)).new(guidance_scale=3.0)
    assert (limited.guidance_scale, limited.interval.guided_steps) == (3.0, (1, 2))


def test_errors():
    with pytest.raises(ValueError, match="need 0 <= sigma_lo < sigma_hi"):
        IntervalGuidance(sigma_lo=2.0, sigma_hi=1.0)
    with pytest.raises(ValueError, match="guider must be of the class BaseGuidance, got 3"):
        limit_to_interval(3, sigma_lo=1.0)
    with pytest.raises(ValueError, match="no running pipeline with a scheduler was found"):
        IntervalGuidance(sigma_lo=1.0).set_state(0, 4, torch.tensor(900))
