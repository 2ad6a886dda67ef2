"""diffusers' guiders on classic pipelines: as the stock pipeline with another weight, and as in Modular Diffusers."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from tiny_guided_pipelines import CASES, STEPS, TWO, Case
from tiny_pipelines import tiny_sdxl
from unlisted_pipelines import Plain, Rescale, Three, TwoCalls, build

from diffusers_ext.pipelines import GuidanceInterval, apply_guider, guidance_report, remove_guider
from diffusers_ext.pipelines.applied_guiders import GuiderOfCall, second_answer

pytestmark = pytest.mark.filterwarnings("ignore:the guidance interval:UserWarning")
WEIGHT = 7.0  # of the guider; the calls of the cases have 4
# These compute c + w (c - u), in which a guider's weight is one less.
PLUS_ONE = ("z_image", "z_image_controlnet", "kandinsky_3")
# AceStep's own guidance is adaptive and projected, which no weight makes plain.
PAIRS = [
    name
    for name in CASES
    if name not in ("ace_step", "stable_diffusion_instruct_pix2pix", "dream_lite_edit", "omnigen")
]  # fmt: skip
PAIRS = [name for name in PAIRS if "pag" not in name]
GUIDERS = {
    "AdaptiveProjectedGuidance": {"adaptive_projected_guidance_momentum": -0.5},
    "AdaptiveProjectedMixGuidance": {"adaptive_projected_guidance_momentum": -0.5},
    "ClassifierFreeZeroStarGuidance": {"zero_init_steps": 1},
    "TangentialClassifierFreeGuidance": {},
    "MagnitudeAwareGuidance": {},
    "FrequencyDecoupledGuidance": {},
    "ClassifierFreeGuidance": {"guidance_rescale": 0.7},
}


def guider(name: str, **changes):
    if name == "FrequencyDecoupledGuidance":
        pytest.importorskip("kornia")
        return diffusers.FrequencyDecoupledGuidance(guidance_scales=[5.0, 2.0], **changes)
    return getattr(diffusers.guiders, name)(guidance_scale=WEIGHT, **{**GUIDERS[name], **changes})


def sample(pipe, options: dict) -> torch.Tensor:
    output = pipe(**options, generator=torch.Generator().manual_seed(1), return_dict=False)[0]
    return torch.as_tensor(np.stack(output) if isinstance(output, list) else output)


def at_weight(case: Case, weight: float) -> torch.Tensor:
    """The stock pipeline called with another weight, all of its guidance scales."""
    scales = ("guidance_scale", "true_cfg_scale", "audio_guidance_scale", "min_guidance_scale", "max_guidance_scale")
    given = {name: weight for name in scales if case.options.get(name)}
    if "true_cfg_scale" in given:
        given.pop("guidance_scale", None)
    if given:
        return sample(case.pipe, {**case.options, **given})
    before, case.pipe.guider.guidance_scale = case.pipe.guider.guidance_scale, weight
    output = sample(case.pipe, case.options)
    case.pipe.guider.guidance_scale = before
    return output


class TestEveryFamily:
    @pytest.mark.parametrize("name", PAIRS)
    def test_plain_guidance_of_another_weight(self, name):
        """Exactly for one batch, to 1e-5 for two calls and where the pipeline rescales; removed bit for bit."""
        case = CASES[name]()
        plain, expected = sample(case.pipe, case.options), at_weight(case, WEIGHT)
        assert not torch.allclose(plain, expected, rtol=1e-5, atol=1e-5)
        apply_guider(case.pipe, ClassifierFreeGuidance(WEIGHT + (name in PLUS_ONE)))
        output = sample(case.pipe, case.options)
        exact = case.order != TWO and name not in (*PLUS_ONE, "ltx_2")
        scale = max(1.0, expected.abs().max().item())
        # Kandinsky 3 writes its combination in another way, and its first steps multiply the rounding.
        rounding = 1e-3 if name == "kandinsky_3" else 1e-5
        torch.testing.assert_close(output, expected, rtol=0, atol=0 if exact else rounding * scale)
        remove_guider(case.pipe)
        assert torch.equal(sample(case.pipe, case.options), plain)

    @pytest.mark.parametrize("name", PAIRS)
    def test_in_an_interval(self, name):
        """A guider of the call's own weight in an interval is the interval."""
        case = CASES[name]()
        with GuidanceInterval(case.pipe, guided_steps=(1, 2)) as interval:
            expected = sample(case.pipe, case.options)
        rows = [step.rows for step in interval.report.steps]
        apply_guider(case.pipe, ClassifierFreeGuidance(4.0 + (name in PLUS_ONE)), guided_steps=(1, 2))
        options = {**case.options, "audio_guidance_scale": 4.0} if name == "ltx_2" else case.options
        if name == "ltx_2":
            with GuidanceInterval(case.pipe, guided_steps=(1, 2)):
                expected = sample(case.pipe, options)
        elif name == "stable_video_diffusion":
            pytest.skip("it has a weight for each frame")
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(sample(case.pipe, options), expected, rtol=0, atol=2e-5 * scale)
        assert [step.rows for step in guidance_report(case.pipe).steps] == rows


class TestAsModular:
    """Every guider gives what it gives in Modular Diffusers."""

    OPTIONS = {"prompt": ["a cat", "a dog"], "negative_prompt": ["", ""], "num_inference_steps": 6}  # noqa: RUF012

    @pytest.fixture(scope="class")
    def classic(self):
        return tiny_sdxl()

    @pytest.fixture(scope="class")
    def modular(self, classic):
        pipe = StableDiffusionXLAutoBlocks().init_pipeline()
        pipe.update_components(**{k: v for k, v in classic.components.items() if v is not None})
        pipe.update_components(force_zeros_for_empty_prompt=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe, **options):
        options |= {**self.OPTIONS, "output_type": "latent", "generator": torch.Generator().manual_seed(7)}
        return pipe(**options)

    @pytest.mark.parametrize("fractions", [{}, {"start": 0.4}, {"stop": 0.5}])
    @pytest.mark.parametrize("name", GUIDERS)
    def test_equal(self, classic, modular, name, fractions):
        if name == "MagnitudeAwareGuidance":
            pytest.skip("it fails for images in Modular Diffusers 0.42.1")
        modular.update_components(guider=guider(name, **fractions))
        expected = self.run(modular, height=16, width=16, output="images")
        given = guider(name, **fractions)
        apply_guider(classic, given)
        for _ in range(2):  # the state of a guider starts with the call
            output = self.run(classic, guidance_scale=2.0, return_dict=False)[0]
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)
        rows = [step.rows for step in guidance_report(classic).steps]
        assert rows == [4 if fractions.get("start", 0) * 6 <= step + 0.6 and step < fractions.get("stop", 1) * 6 else 2 for step in range(6)]  # fmt: skip  # noqa: E501
        remove_guider(classic)
        assert not hasattr(given, "_entered") and given._step is None

    @pytest.mark.parametrize("name", GUIDERS)
    def test_two_calls(self, name):
        """The second call is answered so that the pipeline's combination is the guider's."""
        case = CASES["flux"]()
        if name == "FrequencyDecoupledGuidance":  # of tokens, not of images
            apply_guider(case.pipe, guider(name))
            with pytest.raises(ValueError, match=r"takes predictions \(batch, channels, height, width\)"):
                sample(case.pipe, case.options)
            return
        outputs = []
        for weight in (2.0, 6.0):  # of the call, which does not matter
            apply_guider(case.pipe, guider(name), sigma_lo=0.4)
            outputs.append(sample(case.pipe, {**case.options, "true_cfg_scale": weight}))
            assert guidance_report(case.pipe).guided_steps == [0, 1, 2]
        torch.testing.assert_close(*outputs, rtol=0, atol=2e-5 * max(1.0, outputs[0].abs().max().item()))
        remove_guider(case.pipe)
        plain = sample(case.pipe, case.options)
        assert not torch.allclose(outputs[0], plain, rtol=1e-3, atol=1e-3)


class TestUnlisted:
    """The scheduler is given what the guider says, once the layout is proved."""

    @pytest.mark.parametrize("interval", [{}, {"guided_steps": (1, 2)}, {"guided_steps": (0, 1)}])
    @pytest.mark.parametrize("cls", [Plain, TwoCalls])
    def test_plain_guidance(self, cls, interval):
        first, last = interval.get("guided_steps", (0, 4))
        pipe = build(cls, diffusers.DDIMScheduler())
        pipe.oracle = set(range(first, last + 1))
        expected = pipe(guidance_scale=WEIGHT, generator=torch.Generator().manual_seed(1))
        pipe.oracle = None
        apply_guider(pipe, ClassifierFreeGuidance(WEIGHT), **interval)
        output = pipe(guidance_scale=2.5, generator=torch.Generator().manual_seed(1))
        # a guider is given predictions that are taken out of their sum, which costs digits
        torch.testing.assert_close(output, expected, rtol=0, atol=4e-5 * max(1.0, expected.abs().max().item()))

    def test_not_shown(self):
        pipe = build(Rescale, diffusers.DDIMScheduler())
        apply_guider(pipe, ClassifierFreeGuidance(WEIGHT), layout="uncond, cond")
        with pytest.warns(UserWarning, match="not proved"), pytest.raises(ValueError, match="a guider cannot take"):
            pipe()


class TestRefused:
    def test_no_guider(self):
        with pytest.raises(ValueError, match="guider must be a diffusers guider"):
            apply_guider(CASES["flux"]().pipe, 5.0)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: diffusers.SkipLayerGuidance(skip_layer_guidance_layers=[1]),
            lambda: diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=[1]),
            lambda: diffusers.SmoothedEnergyGuidance(seg_guidance_layers=[1]),
        ],
    )
    def test_further_calls(self, make):
        with pytest.raises(ValueError, match="takes further calls of the network"):
            apply_guider(CASES["flux"]().pipe, make())

    def test_auto_guidance(self):
        with pytest.raises(ValueError, match="changes the network for its unconditional prediction"):
            apply_guider(CASES["flux"]().pipe, diffusers.AutoGuidance(auto_guidance_layers=[1], dropout=0.5))

    def test_three_parts(self):
        with pytest.raises(ValueError, match="has the parts cond, image, uncond; a guider combines two"):
            apply_guider(CASES["stable_diffusion_instruct_pix2pix"]().pipe, ClassifierFreeGuidance(3.0))
        case = CASES["stable_diffusion_pag"]()
        apply_guider(case.pipe, ClassifierFreeGuidance(WEIGHT))
        with pytest.raises(ValueError, match="makes the predictions uncond, cond, perturbed"):
            sample(case.pipe, case.options)
        case = CASES["stable_diffusion_pag"]()
        options = {**case.options, "pag_scale": 0.0}
        apply_guider(case.pipe, ClassifierFreeGuidance(WEIGHT))
        output = sample(case.pipe, options)
        remove_guider(case.pipe)
        assert torch.equal(output, sample(case.pipe, {**options, "guidance_scale": WEIGHT}))
        with pytest.raises(ValueError, match="a guider combines two"):
            apply_guider(
                build(Three, diffusers.DDIMScheduler()), ClassifierFreeGuidance(3.0), layout="cond, image, uncond"
            )

    @pytest.mark.parametrize(
        ("name", "weight", "say"),
        [
            ("stable_diffusion", {"guidance_scale": 1.0}, r"guidance_scale=1.0.*no unconditional prediction"),
            ("wan", {"guidance_scale": 1.0}, r"guidance_scale=1.*call it with guidance_scale=2"),
            ("flux", {"true_cfg_scale": 1.0}, r"true_cfg_scale=1.*call it with true_cfg_scale=2"),
            ("wan", {"guidance_scale": 1.001}, r"guidance_scale=1.001.*counts for next to nothing"),
            ("z_image", {"guidance_scale": 0.0}, "no unconditional prediction"),
        ],
    )
    def test_weights_without_an_unconditional_prediction(self, name, weight, say):
        """Before the second step, with the weight to give."""
        case = CASES[name]()
        apply_guider(case.pipe, ClassifierFreeGuidance(WEIGHT))
        with pytest.raises(ValueError, match=say):
            sample(case.pipe, {**case.options, **weight})
        assert len(guidance_report(case.pipe).steps) <= 1 < STEPS

    def test_replaces_and_is_replaced(self):
        case = CASES["stable_diffusion"]()
        stock = type(case.pipe)
        with GuidanceInterval(case.pipe, guided_steps=(1, 2)):
            inner = sample(case.pipe, case.options)
            apply_guider(case.pipe, ClassifierFreeGuidance(WEIGHT))
            assert torch.equal(sample(case.pipe, case.options), at_weight(case, WEIGHT))
        remove_guider(case.pipe)
        assert type(case.pipe) is stock
        assert not torch.equal(inner, sample(case.pipe, case.options))


def test_magnitude_aware_guidance_of_images():
    """It fails in diffusers 0.42.1 for more than three dimensions: the weight is 1 + (w - 1) e^(-8 |c - u| / |u|)."""
    generator = torch.Generator().manual_seed(0)
    uncond = torch.randn(2, 3, 4, 4, generator=generator)
    cond = uncond + 0.1 * torch.randn(2, 3, 4, 4, generator=generator)
    guiding = GuiderOfCall(guider("MagnitudeAwareGuidance"))
    assert guiding.enter(0, 4, torch.tensor(900))
    for i in range(2):
        ratio = (cond[i] - uncond[i]).norm() / uncond[i].norm()
        expected = uncond[i] + (1 + (WEIGHT - 1) * torch.exp(-8 * ratio)) * (cond[i] - uncond[i])
        torch.testing.assert_close(guiding(0, cond, uncond)[i], expected)


def test_second_answer():
    """u' + w (c - u') is what the guider wants; in bfloat16 up to its digits."""
    generator = torch.Generator().manual_seed(0)
    cond, wanted = (torch.randn(1000, generator=generator) for _ in range(2))
    for weight in (0.5, 1.1, 2.0, 7.5, 100.0):
        answer = second_answer(wanted, cond, weight)
        torch.testing.assert_close(answer + weight * (cond - answer), wanted, rtol=0, atol=1e-4)
    half = second_answer(wanted.bfloat16(), cond.bfloat16(), 4.0)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half + 4.0 * (cond.bfloat16() - half), wanted.bfloat16(), rtol=0, atol=0.2)
