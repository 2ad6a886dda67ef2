"""Guidance of pipelines that nobody listed: an interval is right, or refused before the second step; and the table."""

import inspect
import json
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import unlisted_pipelines
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from tiny_guided_pipelines import CASES
from unlisted_pipelines import STEPS, Base, build

import diffusers_ext.pipelines
from diffusers_ext.pipelines import GuidanceInterval, apply_guidance_interval, guidance_report
from diffusers_ext.pipelines.guidance_layouts import (
    COMBINED,
    LAYOUTS,
    REFUSED,
    Layout,
    parse_layout,
    table_class,
)
from diffusers_ext.pipelines.layout_proof import fit

pytestmark = pytest.mark.filterwarnings("ignore:the guidance interval:UserWarning")
KINDS = {
    name: cls
    for name, cls in vars(unlisted_pipelines).items()
    if isinstance(cls, type) and issubclass(cls, Base) and cls is not Base
}
SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "flow": FlowMatchEulerDiscreteScheduler}
INTERVALS = [(1, 2), (0, 1), (), (0, STEPS - 1), (3, 3)]
ATTACH, CALL = "at attach", "in the call"
# Nothing can be read, or what is read is not one thing.
REFUSED_AT_ATTACH = {
    "EarlierChunk", "OneUncond", "Star", "SplitSizes", "UncondFirst", "Outside", "Lambda", "CFGPP", "Doubled",
    "Threads", "Forward", "GetAttr", "MultiDiffusion", "Resample", "Reference",
}  # fmt: skip
# The numbers do not say what the source seems to say.
REFUSED_IN_THE_FIRST_STEP = {
    "Misnamed", "Windows", "TwoCallsOther", "Rescale", "NoSchedule", "NoSchedule2", "Inversion",
    "StepTwice", "Extra", "Reversed", "TwoCallsMis", "WeakGuide", "Clip", "NegativeLater", "LateGuidance",
}  # fmt: skip
# Right in some calls, refused in others: unequal parts, rows in turns, a prediction that is used twice.
SOMETIMES = {"OneUncond2", "InterleavedChunked", "Reused"}
RIGHT = KINDS.keys() - REFUSED_AT_ATTACH - REFUSED_IN_THE_FIRST_STEP - SOMETIMES


def sample(pipe, oracle=None, **options) -> torch.Tensor:
    pipe.oracle = oracle
    return pipe(generator=torch.Generator().manual_seed(1), **options)


def bounds(steps: tuple[int, ...]) -> dict:
    return {"guided_steps": (steps[0], steps[-1])} if steps else {"sigma_hi": 1e-9}


def compare(cls, scheduler, steps: tuple[int, ...], batch: int, **given) -> str:
    """ "right", or when it was refused; fails where the result is wrong, or the refusal too late."""
    oracle = set(range(steps[0], steps[-1] + 1)) if steps else set()
    expected = sample(build(cls, scheduler()), oracle, batch=batch)
    pipe = build(cls, scheduler())
    try:
        apply_guidance_interval(pipe, **bounds(steps), **given)
    except ValueError:
        assert type(pipe) is cls
        return ATTACH
    try:
        output = sample(pipe, batch=batch)
    except ValueError:
        report = guidance_report(pipe)
        assert len(report.steps) <= 1 or cls.__name__ == "Reused"
        assert len(report.steps) < STEPS
        assert "_compiled_call_impl" not in vars(pipe.unet) and type(pipe.scheduler) is scheduler
        return CALL
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5 * max(1.0, expected.abs().max().item()))
    return "right"


class TestRightOrRefused:
    @pytest.mark.parametrize("steps", INTERVALS)
    @pytest.mark.parametrize("name", sorted(RIGHT))
    def test_right(self, name, steps):
        for scheduler, batch in (("ddim", 1), ("ddim", 2), ("ddim", 3), ("euler", 2), ("flow", 3)):
            assert compare(KINDS[name], SCHEDULERS[scheduler], steps, batch) == "right"

    @pytest.mark.parametrize("name", sorted(REFUSED_AT_ATTACH))
    def test_refused_at_attach(self, name):
        pipe = build(KINDS[name], DDIMScheduler())
        with pytest.raises(ValueError, match=r"its source .*layout=.uncond, cond") as error:
            apply_guidance_interval(pipe, sigma_lo=1.0)
        assert name in str(error.value)

    @pytest.mark.parametrize("steps", INTERVALS)
    @pytest.mark.parametrize("name", sorted(REFUSED_IN_THE_FIRST_STEP))
    def test_refused_in_the_first_step(self, name, steps):
        for batch in (1, 2, 3):
            assert compare(KINDS[name], DDIMScheduler, steps, batch) == CALL

    @pytest.mark.parametrize("steps", INTERVALS)
    @pytest.mark.parametrize("name", sorted(SOMETIMES))
    def test_never_wrong(self, name, steps):
        found = {compare(KINDS[name], DDIMScheduler, steps, batch) for batch in (1, 2, 3)}
        assert found <= {"right", CALL} and (CALL in found or name == "Reused")


class TestGivenLayouts:
    """What cannot be read is said; what is said wrongly is found out."""

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:the layout:UserWarning")
    @pytest.mark.parametrize("steps", INTERVALS)
    @pytest.mark.parametrize(
        ("layout", "names"),
        [
            ("uncond, cond", "Plain Outside Lambda Method GetAttr CFGPP Rescale Clip Extra NegativeLater WeakGuide"),
            ("cond, uncond", "CondFirst Misnamed"),
            ("uncond | cond", "Interleaved InterleavedChunked"),
            ("cond; uncond", "TwoCalls TwoNets"),
            ("cond, image, uncond", "Three"),
        ],
    )
    def test_right(self, layout, names, steps):
        for name in names.split():
            for batch in (1, 2, 3):
                assert compare(KINDS[name], DDIMScheduler, steps, batch, layout=layout) == "right"

    @pytest.mark.parametrize("steps", INTERVALS)
    @pytest.mark.parametrize(
        ("layout", "names"),
        [
            ("cond, uncond", "Plain Outside Lambda Method Channels Rescale Clip"),
            ("uncond, cond", "CondFirst Misnamed TwoCalls Three EarlierChunk Doubled Windows MultiDiffusion"),
            ("cond; uncond", "TwoCallsMis UncondFirst Plain"),
            ("uncond, cond", "Interleaved InterleavedChunked"),
            ("uncond | cond", "Plain"),
        ],
    )
    def test_wrong(self, layout, names, steps):
        """Before the second step, whatever the interval."""
        for name in names.split():
            assert compare(KINDS[name], DDIMScheduler, steps, 2, layout=layout) == CALL

    @pytest.mark.parametrize("name", ["Rescale", "Clip", "WeakGuide"])
    def test_not_shown_is_said(self, name):
        pipe = build(KINDS[name], DDIMScheduler())
        apply_guidance_interval(pipe, guided_steps=(1, 2), layout="uncond, cond")
        with pytest.warns(UserWarning, match="the layout 'uncond, cond' of .* is taken as given, it is not proved"):
            sample(pipe)

    def test_never_guided_is_said(self):
        """Where the source is not readable, only a guided step shows the layout."""
        pipe = build(KINDS["GetAttr"], DDIMScheduler())
        apply_guidance_interval(pipe, sigma_lo=1e6, layout="uncond, cond")
        with pytest.warns(UserWarning, match="no step showed it"):
            sample(pipe)

    @pytest.mark.parametrize(
        "layout",
        ["uncond", "cond", "a, b", "cond, cond", "uncond; cond", "uncond, image", "", "cond; uncond | image", 3],
    )
    def test_bad_layouts(self, layout):
        with pytest.raises(ValueError, match=r"layout must be (like|a string)"):
            GuidanceInterval(build(KINDS["Plain"], DDIMScheduler()), sigma_lo=1.0, layout=layout)

    def test_text_of_layouts(self):
        for text in ("uncond, cond", "uncond | cond", "cond; uncond", "cond, image, uncond"):
            assert str(parse_layout(text)) == text
        assert parse_layout("uncond,cond").parts == ("uncond", "cond")


class TestOffIsOff:
    """Guidance off: bit for bit the stock pipeline, for any batch, whatever the layout says."""

    @pytest.mark.parametrize("layout", [None, "uncond, cond", "cond, uncond", "uncond | cond", "cond, image, uncond"])
    @pytest.mark.parametrize("name", ["Plain", "Off", "FlagAfter"])
    def test_off(self, name, layout):
        for batch in (1, 2, 3, 4):
            expected = sample(build(KINDS[name], DDIMScheduler()), batch=batch, guidance_scale=1.0)
            for steps in INTERVALS:
                pipe = build(KINDS[name], DDIMScheduler())
                apply_guidance_interval(pipe, **bounds(steps), layout=layout)
                with pytest.warns(UserWarning, match="guidance is off in this call"):
                    assert torch.equal(sample(pipe, batch=batch, guidance_scale=1.0), expected)

    @pytest.mark.parametrize("name", sorted(RIGHT))
    def test_every_step(self, name):
        for batch in (1, 3):
            expected = sample(build(KINDS[name], DDIMScheduler()), batch=batch)
            pipe = build(KINDS[name], DDIMScheduler())
            apply_guidance_interval(pipe, sigma_lo=0.0)
            assert torch.equal(sample(pipe, batch=batch), expected)


class TestRows:
    """Networks, attention and arguments that know more rows than their own."""

    class Mixing(unlisted_pipelines.Net):
        """Shares something between the rows, as StyleAligned and reference attention do."""

        def forward(self, sample, timestep, text, return_dict=False):
            (output,) = super().forward(sample, timestep, text)
            return (output + 0.01 * output.mean(0, keepdim=True),)

    @pytest.mark.parametrize("layout", [None, "uncond, cond"])
    def test_rows_that_are_mixed(self, layout):
        pipe = build(KINDS["Plain"], DDIMScheduler())
        pipe.unet = self.Mixing()
        apply_guidance_interval(pipe, guided_steps=(1, 2), layout=layout)
        with pytest.raises(ValueError, match="gives its conditional rows another prediction without the others"):
            sample(pipe)

    @pytest.mark.parametrize("counts", [False, True])
    def test_attention_of_others(self, counts):
        """Compared in each call of a listed pipeline; refused where it counts the calls."""
        case = CASES["stable_diffusion"]()
        stock = type(next(iter(case.pipe.unet.attn_processors.values())))

        class Processor(stock):
            calls = 0

            def __call__(self, *args, **kwargs):
                self.calls += counts
                return super().__call__(*args, **kwargs)

        case.pipe.unet.set_attn_processor(Processor())

        def run():
            return case.pipe(**case.options, generator=torch.Generator().manual_seed(0), return_dict=False)[0]

        plain = run()
        with GuidanceInterval(case.pipe, sigma_lo=0.0):
            assert torch.equal(run(), plain)
        with GuidanceInterval(case.pipe, guided_steps=(1, 2)) as interval:
            if counts:
                with pytest.raises(ValueError, match="attention processors that keep count"):
                    run()
                return
            for _ in range(2):
                run()
                assert [step.rows for step in interval.report.steps] == [6, 4, 4, 2]

    def test_attention_between_rows(self):
        case = CASES["stable_diffusion"]()
        stock = type(next(iter(case.pipe.unet.attn_processors.values())))

        class Shared(stock):
            def __call__(self, attn, hidden_states, *args, **kwargs):
                output = super().__call__(attn, hidden_states, *args, **kwargs)
                return output + 0.1 * output[:1]

        case.pipe.unet.set_attn_processor(Shared())
        with (
            GuidanceInterval(case.pipe, guided_steps=(1, 2)),
            pytest.raises(ValueError, match=r"another prediction.*Shared"),
        ):
            case.pipe(**case.options)

    @pytest.mark.parametrize("length", [1, 2, 4])
    def test_an_argument_as_long_as_the_batch(self, length):
        """Weights of regions in cross_attention_kwargs are not rows: right where it is all one, else refused."""
        case = CASES["stable_diffusion"]()
        stock = type(next(iter(case.pipe.unet.attn_processors.values())))

        class Regions(stock):
            def __call__(self, attn, hidden_states, *args, region_weights=None, **kwargs):
                return super().__call__(attn, hidden_states, *args, **kwargs) * region_weights.sum()

        case.pipe.unet.set_attn_processor(Regions())
        options = {**case.options, "cross_attention_kwargs": {"region_weights": torch.full((length,), 1.0 / length)}}
        with GuidanceInterval(case.pipe, guided_steps=(1, 2)):
            if length == 4:
                with pytest.raises(ValueError, match=r"another prediction.*region_weights"):
                    case.pipe(**options)
            else:
                case.pipe(**options)


class TestSource:
    """A class whose source is not there, or is not what runs, is refused as it is attached."""

    def test_no_source(self):
        space = {"Base": Base, "torch": torch}
        exec(inspect.getsource(KINDS["Plain"]), space)
        with pytest.raises(ValueError, match=r"the source of Plain\.predict cannot be read"):
            apply_guidance_interval(build(space["Plain"], DDIMScheduler()), sigma_lo=1.0)
        pipe = build(space["Plain"], DDIMScheduler())
        apply_guidance_interval(pipe, guided_steps=(1, 2), layout="uncond, cond")
        expected = sample(build(KINDS["Plain"], DDIMScheduler()), {1, 2})
        torch.testing.assert_close(sample(pipe), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("change", ["order", "lines"])
    def test_edited_after_import(self, tmp_path, monkeypatch, change):
        source = "import torch\nfrom unlisted_pipelines import Base\n\n\n" + inspect.getsource(KINDS["Plain"])
        file = tmp_path / "edited_pipeline.py"
        file.write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        module = __import__("edited_pipeline")
        monkeypatch.delitem(sys.modules, "edited_pipeline")
        if change == "order":
            source = source.replace("noise_uncond, noise_text = ", "noise_text, noise_uncond = ")
        else:
            source = source.replace("import torch", "import torch\n\n\nVALUE = 3\n\n")
        file.write_text(source)
        with pytest.raises(ValueError, match=r"source of Plain\.\w+ (is not the code that runs|cannot be read)"):
            apply_guidance_interval(build(module.Plain, DDIMScheduler()), sigma_lo=1.0)

    def test_coroutines(self):
        class Later(KINDS["Plain"]):
            async def __call__(self, guidance_scale=4.0):
                return super().__call__(guidance_scale=guidance_scale)

        with pytest.raises(ValueError, match="returns before it has sampled"):
            apply_guidance_interval(build(Later, DDIMScheduler()), sigma_lo=1.0)


class TestTable:
    """The pipelines of diffusers, and what is no longer one of them."""

    def test_a_subclass_of_its_own_is_not_listed(self):
        stock = diffusers.StableDiffusionPipeline

        class Same(stock):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)

            def another(self):
                return None

        class Other(stock):
            def encode_prompt(self, *args, **kwargs):
                return super().encode_prompt(*args, **kwargs)

        assert table_class(stock) is stock and table_class(Same) is stock and table_class(Other) is None

    def test_pipelines_of_this_package_are_listed(self):
        for name in ("BoostAndSkip", "StableDiffusionXLGuidanceInterval", "DiTGuidanceInterval"):
            cls = getattr(diffusers_ext.pipelines, f"{name}Pipeline")
            assert table_class(cls) is cls

    def test_a_patched_class_is_not_listed(self, monkeypatch):
        stock = diffusers.StableDiffusionPipeline
        call = stock.__call__

        def patched(self, *args, **kwargs):
            return call(self, *args, **kwargs)

        monkeypatch.setattr(stock, "__call__", patched)
        assert table_class(stock) is None

    def test_patched_after_attach(self, monkeypatch):
        case = CASES["stable_diffusion"]()
        apply_guidance_interval(case.pipe, guided_steps=(1, 2))
        space = {}
        exec("def __call__(self, *args, guidance_scale=4.0, **kwargs):\n    return None", space)
        monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", space["__call__"])
        with pytest.raises(ValueError, match=r"the source of .*__call__ (cannot be read|is not the code)"):
            case.pipe(**case.options)

    def test_a_subclass_is_proved(self):
        """It has the layout of its source, and the same picture."""
        case = CASES["stable_diffusion_xl"]()

        class Other(type(case.pipe)):
            def prepare_latents(self, *args, **kwargs):
                return super().prepare_latents(*args, **kwargs)

        other = Other(**case.pipe.components, add_watermarker=False)
        other.set_progress_bar_config(disable=True)
        images = []
        for pipe in (case.pipe, other):
            with GuidanceInterval(pipe, guided_steps=(1, 2)) as interval:
                images.append(pipe(**case.options, generator=torch.Generator().manual_seed(0), return_dict=False)[0])
        torch.testing.assert_close(*images, rtol=0, atol=1e-5)
        assert [step.rows for step in interval.report.steps] == [6, 4, 4, 2]

    @pytest.mark.parametrize("name", CASES)
    def test_verified(self, name):
        """Every family passes the proof, and has the same result."""
        case = CASES[name]()
        outputs = []
        for verify in (False, True):
            with GuidanceInterval(case.pipe, guided_steps=(1, 2), verify=verify) as interval:
                output = case.pipe(**case.options, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
                outputs.append((output, [step.index for step in interval.report.steps]))
        first, second = (torch.as_tensor(output[0]) if isinstance(output, list) else output for output, _ in outputs)
        assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))

    def test_verify_finds_a_wrong_entry(self, monkeypatch):
        case = CASES["stable_diffusion"]()
        monkeypatch.setitem(LAYOUTS, "StableDiffusionPipeline", Layout(("cond", "uncond")))
        with (
            GuidanceInterval(case.pipe, guided_steps=(0, 1), verify=True),
            pytest.raises(ValueError, match="calls conditional the weight -3"),
        ):
            case.pipe(**case.options)


class TestFit:
    """Least squares on what the scheduler is given."""

    def parts(self, *shape):
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(2, *shape, generator=generator) for _ in range(2)]

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("weight", [1.5, 7.5, 50.0])
    def test_weights(self, sign, weight):
        u, c = self.parts(3, 4, 4)
        found = fit(sign * (u + weight * (c - u)), [u, c], 1)
        assert found.exact and found.sign == sign
        torch.testing.assert_close(found.weights[:, 1], torch.full((2,), weight).double(), rtol=1e-4, atol=0)

    def test_shapes(self):
        u, c = self.parts(4, 3, 5)
        m = u + 3 * (c - u)
        for seen in (m[:, :2], m.permute(0, 3, 1, 2), m.reshape(2, 12, 5)):
            found = fit(seen, [u, c], 1)
            assert found.exact and found.weights[0, 1] == pytest.approx(3.0, rel=1e-4)
            torch.testing.assert_close(found.combined([c, c]), found.align(c), rtol=0, atol=1e-5)

    def test_no_combination(self):
        u, c = self.parts(3, 4, 4)
        assert not fit((u + 3 * (c - u)).clamp(-1, 1), [u, c], 1).exact
        assert not fit(0.9 * (u + 3 * (c - u)), [u, c], 1).exact
        assert not fit(c, [c, c], 1).clear


def fingerprints() -> dict[str, str]:
    """Of the denoising code of every pipeline of diffusers that guides, by name."""
    from guidance_interval_matrix import fingerprint, pipelines_that_guide

    return {name: fingerprint(cls) for name, cls in pipelines_that_guide().items()}


class TestCoverage:
    GOLDEN = Path(__file__).parent / "goldens" / "guidance_fingerprints.json"

    @pytest.mark.slow
    def test_every_pipeline_is_listed(self):
        """`python tests/guidance_interval_matrix.py --fingerprints` writes them, after the table was looked at."""
        golden = json.loads(self.GOLDEN.read_text())
        if diffusers.__version__ != golden["diffusers"]:
            pytest.skip(f"the table is of diffusers {golden['diffusers']}, this is {diffusers.__version__}")
        found = fingerprints()
        changed = sorted(name for name, value in found.items() if golden["pipelines"].get(name) != value)
        assert not changed, f"new, or with other code than the table knows: {changed}"
        gone = sorted(golden["pipelines"].keys() - found.keys())
        assert not gone, f"no longer in diffusers: {gone}"
        listed = LAYOUTS.keys() | REFUSED.keys() | COMBINED
        missing = sorted(found.keys() - listed)
        assert not missing, f"not in the table: {missing}"

    def test_a_changed_method_changes_the_fingerprint(self, monkeypatch):
        from guidance_interval_matrix import fingerprint

        stock = diffusers.StableDiffusionPipeline
        before = fingerprint(stock)
        monkeypatch.setattr(stock, "encode_prompt", diffusers.StableDiffusionXLPipeline.encode_prompt)
        assert fingerprint(stock) != before
