"""Guidance in an interval, on a tiny pipeline of every family, against plain guidance, none, and full-batch loops."""

import copy
import functools
import inspect
import itertools
import math
import re
from pathlib import Path

import diffusers
import pytest
import tiny_guided_pipelines
import torch
from contracts import same_noise_in_every_type
from conventions import newer_torch
from guided_runs import MIDDLE, WORDS, assert_same, sample, shared_stable_diffusion
from tiny_guided_pipelines import CASES, STEPS, TWO, Case
from tiny_pipelines import tiny_stable_diffusion

from diffusers_ext.pipelines.guidance_interval import (
    GuidanceInterval,
    apply_guidance_interval,
    guidance_report,
    read_step,
    remove_guidance_interval,
)
from diffusers_ext.pipelines.rows import Cut, Rows, spread_rows, take_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:the guidance interval:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def without_guidance(case: Case) -> torch.Tensor:
    if case.off:
        return sample(case.pipe, {**case.options, **case.off})
    scale, case.pipe.guider.guidance_scale = case.pipe.guider.guidance_scale, 1.0
    output = sample(case.pipe, case.options)
    case.pipe.guider.guidance_scale = scale
    return output


@pytest.fixture(params=CASES, scope="module")
def built(request) -> tuple[Case, torch.Tensor]:
    """A case and its sample with plain guidance."""
    case = CASES[request.param]()
    return case, sample(case.pipe, case.options)


class Network:
    """Stands in for the `forward` of a case's networks: counts rows, and can replace predictions."""

    def __init__(self, case: Case, guided_steps: tuple[int, int] | None = None):
        self.case, self.guided_steps = case, guided_steps
        self.rows: dict[str, list[int]] = {name: [] for name in case.networks}
        self.calls, self.last = 0, None

    def __enter__(self):
        for name in self.case.networks:
            module = getattr(self.case.pipe, name)
            module.forward = functools.partial(self.forward, name, module, module.forward)
        return self

    def __exit__(self, *error):
        for name in self.case.networks:
            del getattr(self.case.pipe, name).__dict__["forward"]

    def forward(self, name, module, forward, *args, **kwargs):
        parameters = inspect.signature(type(module).forward).parameters
        first = args[0] if args else next(kwargs[key] for key in parameters if key in kwargs)
        self.rows[name].append(len(first))
        output = forward(*args, **kwargs)
        return output if self.guided_steps is None or "control" in name else self.replaced(output)

    def replaced(self, output):
        """The output, outside the interval with the conditional prediction for the unconditional one."""
        calls = 2 if self.case.order == TWO else 1
        step, call = divmod(self.calls, calls)
        self.calls += 1
        guided = self.guided_steps[0] <= step <= self.guided_steps[1]
        if self.case.order == TWO:
            self.last = output if call == 0 else self.last
            return output if guided else image_tokens(self.last, output)
        return output if guided else self.with_conditional_rows(output)

    def with_conditional_rows(self, output):
        if isinstance(output, tuple):
            return tuple(self.with_conditional_rows(item) for item in output)
        if isinstance(output, dict) and hasattr(output, "to_tuple"):
            return type(output)(**{key: self.with_conditional_rows(item) for key, item in output.items()})
        order = self.case.order.split(", ")
        size = len(output) // len(order) if isinstance(output, list | torch.Tensor) else 0
        if not size:
            return output
        parts = [output[i * size : (i + 1) * size] for i in range(len(order))]
        chosen = [parts[order.index(part if part == "perturbed" else "cond")] for part in order]
        return list(itertools.chain(*chosen)) if isinstance(output, list) else torch.cat(chosen)


def image_tokens(conditional, output):
    """The last tokens, as many as the unconditional output has: Ideogram's has no text in front."""
    if isinstance(output, tuple):
        return tuple(map(image_tokens, conditional, output))
    return conditional[:, -output.shape[1] :] if isinstance(output, torch.Tensor) else conditional


def expected_rows(case: Case) -> tuple[int, int]:
    """Network rows of a guided step and of another."""
    parts = case.order.split("; " if case.order == TWO else ", ")
    return case.batch * len(parts), case.batch * sum(part in ("cond", "perturbed") for part in parts)


class TestEveryFamily:
    def test_whole_line_is_plain_guidance(self, built):
        case, plain = built
        with GuidanceInterval(case.pipe, sigma_lo=0) as interval:
            assert torch.equal(sample(case.pipe, case.options), plain)
        guided, _ = expected_rows(case)
        assert [step.rows for step in interval.report.steps] == [guided] * STEPS
        assert interval.report.guided_steps == list(range(STEPS))
        assert interval.report.rows_saved == 0

    def test_empty_interval_is_no_guidance(self, built):
        case, plain = built
        with GuidanceInterval(case.pipe, sigma_hi=1e-9) as interval, Network(case) as network:
            output = sample(case.pipe, case.options)
        expected = without_guidance(case)
        assert_same(output, expected, plain)
        guided, other = expected_rows(case)
        assert sum(map(sum, network.rows.values())) == STEPS * other * (1 + ("controlnet" in case.networks))
        assert interval.report.rows == STEPS * other
        assert interval.report.rows_saved == STEPS * (guided - other)

    def test_middle_interval_is_a_loop_over_all_rows(self, built):
        case, plain = built
        with Network(case, guided_steps=MIDDLE):
            expected = sample(case.pipe, case.options)
        with GuidanceInterval(case.pipe, guided_steps=MIDDLE) as interval, Network(case) as network:
            output = sample(case.pipe, case.options)
        assert_same(output, expected, plain)
        guided, other = expected_rows(case)
        assert [step.rows for step in interval.report.steps] == [other, guided, guided, other]
        counts = [sum(rows) for rows in network.rows.values()]
        if len(counts) == 1 or "controlnet" in case.networks:
            assert counts == [2 * guided + 2 * other] * len(counts)
        else:
            assert sum(counts) == 2 * guided + 2 * other

    def test_sigmas_select_the_same_steps(self, built):
        """(sigma of step 3, sigma of step 1] is steps 1 and 2."""
        case, _ = built
        with GuidanceInterval(case.pipe, guided_steps=MIDDLE) as interval:
            by_steps = sample(case.pipe, case.options)
        sigmas = [step.sigma for step in interval.report.steps]
        assert sigmas == sorted(sigmas, reverse=True)
        with GuidanceInterval(case.pipe, sigma_lo=sigmas[3], sigma_hi=sigmas[1]) as interval:
            by_sigmas = sample(case.pipe, case.options)
        assert interval.report.guided_steps == [1, 2]
        assert torch.equal(by_sigmas, by_steps)

    def test_removing_restores(self, built):
        case, plain = built
        stock, attributes = type(case.pipe), set(vars(case.pipe))
        apply_guidance_interval(case.pipe, guided_steps=MIDDLE)
        sample(case.pipe, case.options)
        remove_guidance_interval(case.pipe)
        assert type(case.pipe) is stock
        assert set(vars(case.pipe)) == attributes
        for network in case.networks:
            assert "_compiled_call_impl" not in vars(getattr(case.pipe, network))
        assert torch.equal(sample(case.pipe, case.options), plain)


class TestOneByOne:
    """Pipelines of a shape of their own."""

    def run(self, case, **interval):
        with GuidanceInterval(case.pipe, **interval) as limited:
            output = sample(case.pipe, case.options)
        return output, [step.rows for step in limited.report.steps]

    @pytest.fixture(params=["qwen_image_2_1", "any_flow_far", "kandinsky_2_2_combined"])
    def case(self, request) -> Case:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return getattr(tiny_guided_pipelines, request.param)()

    def test_whole_line_and_empty_interval(self, case):
        plain = sample(case.pipe, case.options)
        assert torch.equal(self.run(case, sigma_lo=0)[0], plain)
        assert_same(self.run(case, sigma_hi=1e-9)[0], without_guidance(case))
        assert torch.equal(sample(case.pipe, case.options), plain)

    def test_a_cache_is_filled_before_it_is_read(self):
        """Qwen-Image 2.1: the first unconditional call is made even where it is not used."""
        case = tiny_guided_pipelines.qwen_image_2_1()
        for guided in ((2, 3), (0, 1)):
            with Network(case, guided_steps=guided):
                expected = sample(case.pipe, case.options)
            output, rows = self.run(case, guided_steps=guided)
            assert_same(output, expected)
            assert rows == [4, *(4 if guided[0] <= step <= guided[1] else 2 for step in (1, 2, 3))]
        case = case._replace(options={**case.options, "use_kv_cache": False})
        assert self.run(case, guided_steps=(2, 3))[1] == [2, 2, 4, 4]

    def test_chunks_and_stages(self):
        """Each has steps from 0 to 3."""
        _, rows = self.run(tiny_guided_pipelines.any_flow_far(), guided_steps=MIDDLE)
        assert rows == [2, 4, 4, 2] * 3
        _, rows = self.run(tiny_guided_pipelines.kandinsky_2_2_combined(), guided_steps=MIDDLE)
        assert rows == [4, 8, 8, 4, 2, 4, 4, 2]  # the prior embeds the empty prompt as well

    def test_other_kinds_of_guidance_stay(self):
        """LTX-2's spatio-temporal and modality guidance run the network again, with weights of their own."""
        case = CASES["ltx_2"]()
        other = {"stg_scale": 1.0, "audio_stg_scale": 1.0, "modality_scale": 3.0, "audio_modality_scale": 3.0}
        case = case._replace(options={**case.options, **other})
        assert_same(self.run(case, sigma_hi=1e-9)[0], without_guidance(case))
        assert self.run(case, guided_steps=MIDDLE)[1] == [6, 8, 8, 6]
        assert torch.equal(self.run(case, sigma_lo=0)[0], sample(case.pipe, case.options))

    def test_attention_over_frames(self):
        """Text2Video-Zero's attention must know how many rows there are; steps of one frame come first."""
        case = tiny_guided_pipelines.text_to_video_zero()
        plain, forward = sample(case.pipe, case.options), case.pipe.unet.forward

        def replaced(latents, t, **kwargs):
            output = forward(latents, t, **kwargs)
            if float(t) not in case.pipe.scheduler.timesteps[1:3].tolist():
                output.sample = torch.cat([output.sample.chunk(2)[1]] * 2)
            return output

        case.pipe.unet.forward = replaced
        expected = sample(case.pipe, case.options)
        del case.pipe.unet.forward
        output, rows = self.run(case, guided_steps=MIDDLE)
        assert_same(output, expected)
        assert rows == [1, 2, 4, 4, 2]
        assert torch.equal(self.run(case, sigma_lo=0)[0], plain)


# One family, everything else.


@pytest.fixture
def pipe():
    """Tiny Stable Diffusion with its own schedule."""
    pipe = shared_stable_diffusion()
    scheduler = pipe.scheduler
    yield pipe
    remove_guidance_interval(pipe)
    pipe.scheduler = scheduler


def vp_sigma(scheduler, t) -> float:
    alpha_bar = scheduler.alphas_cumprod[int(t)]
    return float(((1 - alpha_bar) / alpha_bar) ** 0.5)


def one_call_a_step(calls: int) -> list[int]:
    return list(range(calls))


def two_calls_a_step(calls: int) -> list[int]:
    return [call // 2 for call in range(calls)]


def pndm(calls: int) -> list[int]:
    return [0, 0, *range(1, calls - 1)]


def pndm_runge_kutta(calls: int) -> list[int]:
    return [call // 4 if call < 12 else call - 9 for call in range(calls)]


SAMPLERS = {
    "DDIM": (diffusers.DDIMScheduler, {}, one_call_a_step),
    "DDPM": (diffusers.DDPMScheduler, {}, one_call_a_step),
    "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True}, pndm),
    "PNDM with Runge-Kutta": (diffusers.PNDMScheduler, {}, pndm_runge_kutta),
    "Euler": (diffusers.EulerDiscreteScheduler, {}, one_call_a_step),
    "Euler, Karras": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True}, one_call_a_step),
    "Euler, exponential": (diffusers.EulerDiscreteScheduler, {"use_exponential_sigmas": True}, one_call_a_step),
    "Euler, beta": (diffusers.EulerDiscreteScheduler, {"use_beta_sigmas": True}, one_call_a_step),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, one_call_a_step),
    "Heun": (diffusers.HeunDiscreteScheduler, {}, two_calls_a_step),
    "Heun, Karras": (diffusers.HeunDiscreteScheduler, {"use_karras_sigmas": True}, two_calls_a_step),
    "KDPM2": (diffusers.KDPM2DiscreteScheduler, {}, two_calls_a_step),
    "KDPM2 ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, {}, two_calls_a_step),
    "LMS": (diffusers.LMSDiscreteScheduler, {}, one_call_a_step),
    "DPM++ multistep": (diffusers.DPMSolverMultistepScheduler, {}, one_call_a_step),
    "DPM++ multistep, SDE, Karras": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        one_call_a_step,
    ),
    "DPM++ singlestep": (diffusers.DPMSolverSinglestepScheduler, {}, one_call_a_step),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}, one_call_a_step),
    "DEIS": (diffusers.DEISMultistepScheduler, {}, one_call_a_step),
    "SA-Solver": (diffusers.SASolverScheduler, {}, one_call_a_step),
    "LCM": (diffusers.LCMScheduler, {"original_inference_steps": 50}, one_call_a_step),
    "TCD": (diffusers.TCDScheduler, {"original_inference_steps": 50}, one_call_a_step),
}


class TestSchedulers:
    """Each sampler calls the network once a step or more; the decision is the step's."""

    steps = 7

    @pytest.fixture(params=SAMPLERS, scope="class")
    def scheduler(self, request):
        cls, config, steps_of_calls = SAMPLERS[request.param]
        return cls.from_config(shared_stable_diffusion().scheduler.config, **config), steps_of_calls

    @pytest.fixture
    def sampler(self, scheduler, pipe):
        pipe.scheduler, steps_of_calls = scheduler
        return pipe, {**WORDS, "num_inference_steps": self.steps}, steps_of_calls

    def full_loop(self, pipe, options, steps_of_calls, guided) -> torch.Tensor:
        """All rows, with the conditional prediction in both halves at the calls of unguided steps."""
        outputs = []
        forward = pipe.unet.forward

        def replaced(*args, **kwargs):
            (output,) = forward(*args, **kwargs)
            step = steps_of_calls(100)[len(outputs)]
            outputs.append(output)
            return (output if step in guided else torch.cat([output.chunk(2)[1]] * 2),)

        pipe.unet.forward = replaced
        try:
            return sample(pipe, options)
        finally:
            del pipe.unet.forward

    @pytest.mark.parametrize("guided", [(2, 3), (0, 0), (5, 6)])
    def test_steps(self, sampler, guided):
        pipe, options, steps_of_calls = sampler
        expected = self.full_loop(pipe, options, steps_of_calls, range(guided[0], guided[1] + 1))
        apply_guidance_interval(pipe, guided_steps=guided)
        assert_same(sample(pipe, options), expected)
        report = guidance_report(pipe)
        assert [step.index for step in report.steps] == list(range(self.steps))
        assert report.guided_steps == list(range(guided[0], guided[1] + 1))
        for step in report.steps:
            calls = steps_of_calls(100).count(step.index)
            calls -= step.index == self.steps - 1 and steps_of_calls is two_calls_a_step  # the last is Euler's
            assert (step.rows, step.rows_saved) == ((4 * calls, 0) if step.guided else (2 * calls, 2 * calls))

    def test_sigmas(self, sampler):
        """The report's sigmas are those of the schedule, and select the steps at their upper end."""
        pipe, options, _ = sampler
        apply_guidance_interval(pipe, sigma_lo=0)
        sample(pipe, options)
        report, scheduler = guidance_report(pipe), pipe.scheduler
        if hasattr(scheduler, "sigmas"):
            expected = sorted({float(sigma) for sigma in scheduler.sigmas} - {0.0}, reverse=True)[: self.steps]
        else:
            times = sorted({int(t) for t in getattr(scheduler, "_timesteps", scheduler.timesteps)}, reverse=True)
            expected = [vp_sigma(scheduler, t) for t in times]
        assert [step.sigma for step in report.steps] == pytest.approx(expected, rel=1e-6)
        lowest, highest = report.steps[4].sigma, report.steps[2].sigma
        apply_guidance_interval(pipe, sigma_lo=lowest, sigma_hi=highest)
        sample(pipe, options)
        assert guidance_report(pipe).guided_steps == [2, 3]

    def test_sigma_of_each_evaluation_would_differ(self, pipe):
        """Heun's second evaluation lies at the next step's sigma, and does not decide again."""
        pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
        apply_guidance_interval(pipe, guided_steps=(3, 3))
        sample(pipe, WORDS | {"num_inference_steps": 7})
        assert [step.rows for step in guidance_report(pipe).steps] == [4, 4, 4, 8, 4, 4, 2]


class TestSchedules:
    def report(self, pipe, options):
        apply_guidance_interval(pipe, sigma_lo=0.5, sigma_hi=3.0)
        sample(pipe, options)
        return guidance_report(pipe)

    @pytest.mark.parametrize(
        "scheduler",
        ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"],
    )
    def test_image_to_image_starts_where_it_starts(self, pipe, scheduler):
        """With strength 0.5, step numbers and sigmas are those of the schedule as set, from its middle."""
        full = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
        full.set_timesteps(8)
        image = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        image.set_progress_bar_config(disable=True)
        image.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
        options = {**WORDS, "num_inference_steps": 8, "strength": 0.5, "image": torch.zeros(2, 3, 16, 16)}
        report = self.report(image, options)
        assert [step.index for step in report.steps] == [4, 5, 6, 7]
        order = full.order
        sigmas = [float(s) for s in full.sigmas[::order]] if hasattr(full, "sigmas") else None
        sigmas = sigmas or [vp_sigma(full, t) for t in full.timesteps]
        assert [step.sigma for step in report.steps] == pytest.approx(sigmas[4:8])
        assert report.guided_steps == [step.index for step in report.steps if 0.5 < step.sigma <= 3.0]

    def test_custom_sigmas_and_timesteps(self, pipe):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        report = self.report(pipe, {**WORDS, "num_inference_steps": None, "sigmas": [9.0, 3.0, 0.6, 0.5, 0.0]})
        assert [step.sigma for step in report.steps] == pytest.approx([9.0, 3.0, 0.6, 0.5])
        assert report.guided_steps == [1, 2]
        report = self.report(pipe, {**WORDS, "num_inference_steps": None, "timesteps": [900, 500, 100]})
        assert [step.sigma for step in report.steps] == pytest.approx(
            [vp_sigma(pipe.scheduler, t) for t in (900, 500, 100)]
        )

    def test_flow_units(self):
        """Flow sigma s is s / (1 - s) in EDM units; pure noise is infinite, and in the whole line."""
        case = CASES["flux"]()
        apply_guidance_interval(case.pipe, sigma_lo=0.3, sigma_hi=0.75, sigma_unit="flow")
        sample(case.pipe, case.options)
        report = guidance_report(case.pipe)
        flow_sigmas = [1.0, 0.75, 0.5, 0.25]
        assert [step.sigma for step in report.steps] == pytest.approx([math.inf, 3.0, 1.0, 1 / 3])
        assert report.guided_steps == [i for i, s in enumerate(flow_sigmas) if 0.3 < s <= 0.75]

    def test_flow_schedules_in_other_units(self):
        """Mochi's sigmas run from 0, where all is noise, to 1; those of Cosmos Predict2 are EDM's, up to 80."""
        levels = {}
        for config in ({}, {"invert_sigmas": True}, {"use_karras_sigmas": True}):
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
            if "use_karras_sigmas" in config:
                scheduler.register_to_config(sigma_min=0.002, sigma_max=80.0)
            scheduler.set_timesteps(4)
            times = scheduler.timesteps
            levels[tuple(config)] = [read_step(scheduler, t).sigma for t in times]
        assert levels["invert_sigmas",] == pytest.approx(levels[()], rel=1e-4)
        assert levels["use_karras_sigmas",] == pytest.approx(scheduler.sigmas[:-1].tolist())
        assert levels["use_karras_sigmas",][0] == pytest.approx(80.0)

    def test_zero_terminal_snr(self, pipe):
        config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **config)
        plain = sample(pipe, WORDS)
        apply_guidance_interval(pipe, sigma_lo=0)
        assert torch.equal(sample(pipe, WORDS), plain)
        assert guidance_report(pipe).steps[0].sigma > 1e3

    def test_timestep_outside_the_schedule(self):
        scheduler = diffusers.DDIMScheduler()
        scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="timestep 333 is not in the schedule of DDIMScheduler"):
            read_step(scheduler, 333)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sigma_lo": 2.0, "sigma_hi": 1.0}, "need 0 <= sigma_lo < sigma_hi"),
            ({"sigma_lo": 1.0, "sigma_hi": 1.0}, "need 0 <= sigma_lo < sigma_hi"),
            ({"sigma_lo": -1.0, "sigma_hi": 1.0}, "need 0 <= sigma_lo"),
            ({"sigma_lo": math.nan, "sigma_hi": 1.0}, "sigma_lo=nan"),
            ({"sigma_lo": 0.1, "sigma_hi": math.nan}, "sigma_hi=nan"),
            ({"sigma_lo": "low", "sigma_hi": 1.0}, "sigma_lo must be a number or None, got 'low'"),
            ({"sigma_lo": True, "sigma_hi": 3.0}, "sigma_lo must be a number or None, got True"),
            ({"sigma_lo": 0.5, "sigma_hi": 2.0, "sigma_unit": "flow"}, "sigma_hi <= 1 in flow units"),
            ({"sigma_lo": 0.5, "sigma_hi": 2.0, "sigma_unit": "steps"}, 'sigma_unit must be "edm" or "flow"'),
            ({"sigma_lo": 0.5, "guided_steps": (1, 2)}, "give either sigma_lo and sigma_hi, or guided_steps"),
            ({}, "give either sigma_lo and sigma_hi, or guided_steps"),
            ({"guided_steps": (3, 2)}, "0 <= first <= last"),
            ({"guided_steps": (-1, 2)}, "0 <= first <= last"),
            ({"guided_steps": (0.5, 2)}, "guided_steps must be "),
            ({"guided_steps": 3}, "guided_steps must be "),
            ({"guided_steps": (1, 2, 3)}, "guided_steps must be "),
        ],
    )
    def test_arguments(self, pipe, arguments, message):
        before = type(pipe)
        with pytest.raises(ValueError, match=message):
            apply_guidance_interval(pipe, **arguments)
        assert type(pipe) is before

    def test_steps_outside_the_schedule(self, pipe):
        apply_guidance_interval(pipe, guided_steps=(2, 4))
        with pytest.raises(ValueError, match=r"guided_steps=\(2, 4\) reaches beyond the schedule, whose 4 steps"):
            sample(pipe, WORDS)

    def test_no_pipeline(self, pipe):
        with pytest.raises(ValueError, match="pipe must be a diffusers DiffusionPipeline, got UNet2DConditionModel"):
            apply_guidance_interval(pipe.unet, sigma_hi=1.0)

    def test_no_report_yet(self, pipe):
        with pytest.raises(ValueError, match="has not been called with a guidance interval"):
            guidance_report(pipe)
        apply_guidance_interval(pipe, sigma_hi=1.0)
        with pytest.raises(ValueError, match="has not been called with a guidance interval"):
            guidance_report(pipe)

    def test_pipeline_without_guidance(self):
        unet = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(4,),
            norm_num_groups=2,
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            attention_head_dim=2,
        )
        ddpm = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
        ddpm.set_progress_bar_config(disable=True)
        with pytest.warns(UserWarning, match="DDPMPipeline takes no guidance scale: the interval has no effect"):
            apply_guidance_interval(ddpm, sigma_hi=1.0)
        with pytest.warns(UserWarning, match="the interval has no effect"):
            ddpm(num_inference_steps=2)

    @pytest.mark.parametrize("scale", [1.0, 0.0])
    def test_guidance_off(self, pipe, scale):
        """Even for two prompts with one seed, whose latents look like a doubled batch."""
        options = {**WORDS, "guidance_scale": scale, "latents": torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)}
        plain = sample(pipe, options)
        apply_guidance_interval(pipe, sigma_hi=1.0)
        with pytest.warns(UserWarning, match=f"guidance is off in this call .guidance_scale={scale}.: the interval"):
            assert torch.equal(sample(pipe, options), plain)

    @pytest.mark.parametrize(("arguments", "which"), [({"sigma_lo": 50.0}, "none"), ({"sigma_lo": 0.0}, "every one")])
    def test_all_or_nothing_is_said(self, pipe, arguments, which):
        apply_guidance_interval(pipe, **arguments)
        with pytest.warns(UserWarning, match=f"holds {which} of the 4 steps .sigma 4.117 to 0.04131."):
            sample(pipe, WORDS)

    def test_true_guidance_without_a_negative_prompt(self):
        """Qwen-Image's default weight asks for guidance, which needs a negative prompt: refused before a step."""
        case = CASES["qwen_image"]()
        apply_guidance_interval(case.pipe, sigma_hi=1.0)
        positive = {key: value for key, value in case.options.items() if not key.startswith("negative")}
        for scale in ({"true_cfg_scale": 3.0}, {}):
            asked = {key: value for key, value in positive.items() if key != "true_cfg_scale"} | scale
            message = r"true_cfg_scale=[34]\.0 and without a negative prompt"
            with pytest.raises(ValueError, match=message), Network(case) as network:
                sample(case.pipe, asked)
            assert network.rows == {"transformer": []}
        with pytest.warns(UserWarning, match="guidance is off in this call"):
            sample(case.pipe, {**positive, "true_cfg_scale": 1.0})

    def test_distilled_model(self):
        """Flux without true guidance: an error before the first step, with the way to true guidance in the message."""
        case = CASES["flux"]()
        transformer = diffusers.FluxTransformer2DModel.from_config(case.pipe.transformer.config, guidance_embeds=True)
        case.pipe.transformer = transformer
        apply_guidance_interval(case.pipe, sigma_hi=1.0)
        with pytest.raises(ValueError, match=r"distilled.*true_cfg_scale > 1") as error, Network(case) as network:
            sample(case.pipe, {**case.options, "true_cfg_scale": 1.0})
        assert "FluxPipeline" in str(error.value)
        assert network.rows == {"transformer": []}
        positive = {key: value for key, value in case.options.items() if not key.startswith("negative")}
        with pytest.raises(ValueError, match=r"and a negative_prompt"), Network(case) as network:
            sample(case.pipe, positive)
        assert network.rows == {"transformer": []}
        sample(case.pipe, case.options)

    def test_network_that_embeds_the_scale(self, pipe):
        components = dict(pipe.components)
        components["unet"] = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=8)
        lcm = diffusers.StableDiffusionPipeline(**components, requires_safety_checker=False)
        lcm.set_progress_bar_config(disable=True)
        apply_guidance_interval(lcm, sigma_hi=1.0)
        with pytest.raises(ValueError, match="hands the guidance scale to its network"):
            sample(lcm, WORDS)


class TestSurvives:
    """What may be done to a pipeline's network before or after the interval is applied, for both ways to guide."""

    @pytest.fixture(params=["stable_diffusion", "flux"])
    def alive(self, request, tmp_path) -> tuple[Case, torch.Tensor]:
        """A pipeline of its own, and its sample with the interval."""
        case = CASES[request.param]()
        with GuidanceInterval(case.pipe, guided_steps=MIDDLE):
            return case, sample(case.pipe, case.options)

    def check(self, case, expected):
        """Twice, since some hooks of offloading are put in anew after a call."""
        for _ in range(2):
            assert_same(sample(case.pipe, case.options), expected)
            assert [step.rows for step in guidance_report(case.pipe).steps] == [2, 4, 4, 2]

    @pytest.mark.parametrize("first", ["interval", "offload"])
    @pytest.mark.parametrize("offload", ["model", "sequential", pytest.param("group", marks=newer_torch)])
    def test_offload(self, alive, offload, first):
        accelerate = pytest.importorskip("accelerate")
        (case, expected), pipe = alive, alive[0].pipe
        if first == "interval":
            apply_guidance_interval(pipe, guided_steps=MIDDLE)
        if offload == "model":
            pipe.enable_model_cpu_offload(device="cpu")
        elif offload == "sequential":
            accelerate.cpu_offload(getattr(pipe, case.networks[0]), torch.device("cpu"))
        else:
            onload = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
            getattr(pipe, case.networks[0]).enable_group_offload(**onload)
        if first == "offload":
            apply_guidance_interval(pipe, guided_steps=MIDDLE)
        self.check(case, expected)
        if offload == "model":
            pipe.remove_all_hooks()
            self.check(case, expected)

    def test_device_map(self, alive, tmp_path, monkeypatch):
        """accelerate's hooks, which the pipeline gets as it is loaded; here with a CPU for the accelerator."""
        pytest.importorskip("accelerate")
        case, expected = alive
        case.pipe.save_pretrained(tmp_path)
        memory = {torch.device("cpu"): 10**9}
        monkeypatch.setattr("diffusers.pipelines.pipeline_loading_utils.get_max_memory", lambda limit=None: memory)
        missing = {name: None for name, component in case.pipe.components.items() if component is None}
        placed = type(case.pipe).from_pretrained(tmp_path, device_map="balanced", **missing)
        assert placed.hf_device_map[case.networks[0]] == torch.device("cpu")
        assert hasattr(getattr(placed, case.networks[0]), "_hf_hook")
        placed.set_progress_bar_config(disable=True)
        apply_guidance_interval(placed, guided_steps=MIDDLE)
        self.check(case._replace(pipe=placed), expected)
        placed.reset_device_map()
        self.check(case._replace(pipe=placed), expected)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("alive", "how", "first"),
        [
            ("flux", "wrapped", "compile"),
            ("stable_diffusion", "repeated blocks", "interval"),
            ("flux", "wrapped", "interval"),
            pytest.param("flux", "in place", "interval", marks=newer_torch),
            pytest.param("flux", "in place", "compile", marks=newer_torch),
            pytest.param("flux", "repeated blocks", "compile", marks=newer_torch),
            ("flux", "forward", "interval"),
            ("flux", "forward", "compile"),
        ],
        indirect=["alive"],
    )
    def test_compile(self, alive, how, first):
        (case, expected), pipe, name = alive, alive[0].pipe, alive[0].networks[0]
        torch.compiler.reset()
        if first == "interval":
            apply_guidance_interval(pipe, guided_steps=MIDDLE)
        network = getattr(pipe, name)
        if how == "wrapped":
            setattr(pipe, name, torch.compile(network, backend="eager"))
        elif how == "in place":
            network.compile(backend="eager", fullgraph=True)
        elif how == "repeated blocks":
            network.compile_repeated_blocks(backend="eager", fullgraph=True)
        else:
            network.forward = torch.compile(network.forward, backend="eager")
        if first == "compile":
            apply_guidance_interval(pipe, guided_steps=MIDDLE)
        compiled = vars(getattr(pipe, name)).get("_compiled_call_impl")
        self.check(case, expected)
        assert vars(getattr(pipe, name)).get("_compiled_call_impl") is compiled

    @pytest.mark.parametrize("first", ["interval", "backend"])
    def test_attention_backend(self, alive, first):
        case, expected = alive
        network = getattr(case.pipe, case.networks[0])
        if first == "interval":
            apply_guidance_interval(case.pipe, guided_steps=MIDDLE)
        network.set_attention_backend("_native_math")
        if first == "backend":
            apply_guidance_interval(case.pipe, guided_steps=MIDDLE)
        try:
            self.check(case, expected)
        finally:
            network.set_attention_backend("native")  # which is diffusers' default, and that of all networks

    def test_exception_inside_a_call(self, alive):
        case, expected = alive
        apply_guidance_interval(case.pipe, guided_steps=MIDDLE)

        def stop(pipeline, step, timestep, tensors):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sample(case.pipe, {**case.options, "callback_on_step_end": stop})
        assert "_compiled_call_impl" not in vars(getattr(case.pipe, case.networks[0]))
        self.check(case, expected)

    def test_cached_computations_are_refused(self, alive):
        """A step without the unconditional rows would leave what the next one reuses out of step."""
        case, expected = alive
        if "unet" in case.networks:
            pytest.skip("UNets have no cache")
        case.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        apply_guidance_interval(case.pipe, guided_steps=MIDDLE)
        with pytest.raises(ValueError, match=r"FluxTransformer2DModel reuses computations.*FBC.*disable_cache"):
            sample(case.pipe, case.options)
        case.pipe.transformer.disable_cache()
        self.check(case, expected)


class TestTheRestOfDiffusers:
    """What else may be done with a pipeline."""

    @pytest.fixture
    def fresh(self):
        """A pipeline of its own, and its sample with the interval."""
        pipe = tiny_stable_diffusion()
        with GuidanceInterval(pipe, guided_steps=MIDDLE):
            expected = sample(pipe, WORDS)
        return pipe, expected

    def check(self, pipe, expected):
        """Twice, since some hooks of offloading are put in anew after a call."""
        for _ in range(2):
            assert_same(sample(pipe, WORDS), expected)
            assert [step.rows for step in guidance_report(pipe).steps] == [2, 4, 4, 2]

    def test_to_another_type(self, fresh, monkeypatch):
        same_noise_in_every_type(monkeypatch)
        pipe, expected = fresh
        apply_guidance_interval(pipe, guided_steps=MIDDLE)
        rough = sample(pipe.to(torch.bfloat16), WORDS)
        assert rough.dtype == torch.bfloat16
        self.check(pipe.to(torch.float32), sample(pipe, WORDS))
        torch.testing.assert_close(rough.float(), expected, atol=0.2, rtol=0)

    def test_shared_network(self, fresh):
        """Only the pipeline that has the interval is limited, also when it calls the other one from a callback."""
        pipe, expected = fresh
        other = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        other.scheduler = copy.deepcopy(pipe.scheduler)
        other.set_progress_bar_config(disable=True)
        plain = sample(other, WORDS)
        apply_guidance_interval(pipe, guided_steps=MIDDLE)
        self.check(pipe, expected)
        assert torch.equal(sample(other, WORDS), plain)
        inner = []

        def callback(pipeline, step, timestep, tensors):
            inner.append(sample(other, WORDS))
            return {}

        self.check(pipe, sample(pipe, {**WORDS, "callback_on_step_end": callback}))
        assert len(inner) == STEPS and all(torch.equal(output, plain) for output in inner)
        apply_guidance_interval(other, guided_steps=(0, 0))
        assert [step.rows for step in self.steps(other)] == [4, 2, 2, 2]
        self.check(pipe, expected)

    def steps(self, pipe):
        sample(pipe, WORDS)
        return guidance_report(pipe).steps

    def test_callbacks_and_generators(self, fresh):
        """A callback sees the steps of the stock pipeline; with a generator a sample, samples are independent."""
        pipe, _ = fresh
        apply_guidance_interval(pipe, guided_steps=MIDDLE)
        seen = []

        def watch(pipeline, step, timestep, tensors):
            assert pipeline is pipe
            seen.append(step)
            return {"latents": tensors["latents"]}

        def run(prompts, *seeds):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            options = {**WORDS, "prompt": prompts, "generator": generators}
            return pipe(**options, callback_on_step_end=watch, return_dict=False)[0]

        together = run(["a cat", "a dog"], 3, 4)
        assert seen == list(range(STEPS))
        assert_same(run(["a dog"], 4), together[1:])

    def test_applying_twice_replaces(self, fresh):
        pipe, expected = fresh
        stock = type(pipe)
        apply_guidance_interval(pipe, sigma_hi=1e-9)
        apply_guidance_interval(pipe, guided_steps=MIDDLE)
        self.check(pipe, expected)
        assert type(pipe).__mro__[1] is stock
        remove_guidance_interval(pipe)
        remove_guidance_interval(pipe)
        assert type(pipe) is stock

    @pytest.mark.slow
    def test_what_it_looks_like(self, fresh, tmp_path):
        """To users, to save_pretrained and to copies it is the stock class."""
        pipe, expected = fresh
        signature = inspect.signature(type(pipe).__call__)
        interval = apply_guidance_interval(pipe, sigma_lo=0.28, sigma_hi=5.42)
        assert repr(interval) == "GuidanceInterval(StableDiffusionPipeline, (0.28, 5.42])"
        assert isinstance(pipe, diffusers.StableDiffusionPipeline)
        assert inspect.signature(type(pipe).__call__) == signature
        assert type(pipe).__qualname__ == "StableDiffusionPipeline"
        pipe.save_pretrained(tmp_path)
        loaded = diffusers.DiffusionPipeline.from_pretrained(
            tmp_path, safety_checker=None, requires_safety_checker=False
        )
        assert type(loaded) is diffusers.StableDiffusionPipeline
        apply_guidance_interval(pipe, guided_steps=MIDDLE)
        self.check(copy.deepcopy(pipe), expected)

    def test_report_reads_well(self, fresh):
        pipe, _ = fresh
        apply_guidance_interval(pipe, guided_steps=MIDDLE)
        sample(pipe, WORDS)
        lines = str(guidance_report(pipe)).splitlines()
        assert lines[0].split() == ["step", "sigma", "guided", "rows", "saved"]
        assert lines[2].split() == ["1", "1.6237", "yes", "4", "0"]
        assert lines[-1] == "2 of 4 steps guided; 12 network rows run, 4 saved"

    def test_guidance_rescale(self, fresh):
        pipe, _ = fresh
        options = {**WORDS, "guidance_rescale": 0.7}
        off = sample(pipe, {**WORDS, "guidance_scale": 1.0})
        with GuidanceInterval(pipe, sigma_hi=1e-9):
            assert_same(sample(pipe, options), off)

    def test_images_per_prompt(self, fresh):
        pipe, _ = fresh
        apply_guidance_interval(pipe, guided_steps=MIDDLE)
        sample(pipe, {**WORDS, "num_images_per_prompt": 3})
        assert [step.rows for step in guidance_report(pipe).steps] == [6, 12, 12, 6]

    def test_ip_adapter(self, fresh):
        """Image embeddings come as a list of tensors inside a dict."""
        pipe, _ = fresh
        state = {"image_proj": {"proj.weight": torch.randn(32, 6), "proj.bias": torch.randn(32)}}
        for name in ("weight", "bias"):
            state["image_proj"][f"norm.{name}"] = torch.ones(8)
        widths = {int(key): module for key, module in enumerate(_cross_attentions(pipe.unet))}
        state["ip_adapter"] = {}
        for i, module in widths.items():
            for name in ("to_k_ip", "to_v_ip"):
                state["ip_adapter"][f"{2 * i + 1}.{name}.weight"] = torch.randn(module.inner_dim, 8)
        pipe.unet._load_ip_adapter_weights([state])
        embeds = [torch.cat([torch.zeros(2, 1, 6), torch.randn(2, 1, 6)])]
        options = {**WORDS, "ip_adapter_image_embeds": embeds}
        plain, off = sample(pipe, options), None
        with GuidanceInterval(pipe, sigma_lo=0):
            assert torch.equal(sample(pipe, options), plain)
        off = sample(pipe, {**WORDS, "guidance_scale": 1.0, "ip_adapter_image_embeds": [embeds[0][2:]]})
        with GuidanceInterval(pipe, sigma_hi=1e-9) as interval:
            assert_same(sample(pipe, options), off)
        assert interval.report.rows == 2 * STEPS

    def test_no_network_left_behind(self, fresh):
        """Nothing of a call outlives it."""
        pipe, _ = fresh
        interval = apply_guidance_interval(pipe, guided_steps=MIDDLE)
        sample(pipe, WORDS)
        assert set(vars(interval)) == {"guider", "interval", "layout", "outer", "pipe", "plans", "report", "verify"}


def _cross_attentions(unet):
    return [module for name, module in unet.named_modules() if name.endswith("attn2")]


def test_the_support_matrix_lists_every_case():
    """docs/guidance_interval_support.md is written by guidance_interval_matrix.py."""
    page = (Path(__file__).parent.parent / "docs" / "guidance_interval_support.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \w+ \((\w+)\)", page, flags=re.MULTILINE) == list(CASES)


class TestRows:
    """Which parts of an argument are run, here of a batch of two, the conditional half second."""

    split = Cut(2, (1,), (0, 0))
    rows = Rows(4, False)
    tensor = torch.arange(12.0).view(4, 3)

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("hidden_states", tensor, tensor[2:]),
            ("encoder_hidden_states", torch.cat([tensor] * 2), tensor),  # two frames a row
            ("encoder_hidden_states_llama3", tensor.view(1, 4, 3), tensor[2:].view(1, 2, 3)),
            ("image_rotary_emb", tensor, tensor),
            ("timestep", torch.tensor(3.0), torch.tensor(3.0)),
        ],
    )
    def test_tensors(self, name, value, expected):
        assert torch.equal(take_rows(name, value, self.rows, self.split), expected)

    def test_containers(self):
        def take(value, name="x"):
            return take_rows(name, value, self.rows, self.split)

        assert take([[(1, 2)], [(3, 4)], [(5, 6)], [(7, 8)]]) == [[(5, 6)], [(7, 8)]]
        assert take([1.0, 0.5, 0.2, 0.1]) == [1.0, 0.5, 0.2, 0.1]  # weights of four ControlNets
        assert take({0: "a", 2: "b", 3: "c"}) == {0: "b", 1: "c"}
        residuals = take((self.tensor, [self.tensor] * 4), "residuals")
        assert torch.equal(residuals[0], self.tensor[2:]) and len(residuals[1]) == 4
        assert take({"scale": 0.5, "image_embeds": [self.tensor]})["image_embeds"][0].shape == (2, 3)

    def test_rows_that_take_turns(self):
        turns = self.split._replace(turns=True)
        half = take_rows("hidden_states", self.tensor, self.rows, turns)
        assert torch.equal(half, self.tensor[1::2])
        assert torch.equal(spread_rows(half, Rows(2, False), turns), half.repeat_interleave(2, dim=0))

    def test_three_parts(self):
        perturbed = Cut(3, (1, 2), (0, 0, 1))
        batch = torch.arange(6.0)[:, None]
        kept = take_rows("hidden_states", batch, Rows(6, False), perturbed)
        assert kept.flatten().tolist() == [2, 3, 4, 5]
        assert spread_rows(kept, Rows(4, False), perturbed).flatten().tolist() == [2, 3, 2, 3, 4, 5]
