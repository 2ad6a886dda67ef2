"""Guidance in an interval in pipelines that are in no list: right as a hand-written loop, or refused in time.

Each stranger guides in its own way with a network that is a closed formula. What it should give is computed by a loop
that is written out (`oracle`), in which unguided steps have the conditional prediction alone.
"""

import copy
import functools
import pickle
import threading
import types
import warnings

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from strangers import called, calls, kept, networks, one_batch, schedules
from strangers.base import BATCHES, INTERVALS, STEPS, WEIGHT, Net, Stranger, build, inputs, outcome
from strangers.calls import FlagAfterTheCall, ScaledWhenOff, SkipsTheChunk, TwoCalls
from strangers.coupled import COUPLED
from strangers.networks import Experts, ExpertsMisnamed, SwapsParts
from strangers.one_batch import (
    Anonymous,
    CondFirst,
    Cosine,
    InPlace,
    Interleaved,
    Negated,
    Plain,
    PlusOne,
    Rescaled,
    Scaled,
    Slices,
)
from strangers.schedules import Hires
from tiny_pipelines import tiny_stable_diffusion

from diffusers_ext.pipelines.guidance_interval import (
    GuidanceInterval,
    apply_guidance_interval,
    apply_guider,
    remove_guidance_interval,
    remove_guider,
)

# --- every stranger: right, or refused in time

MODULES = (one_batch, kept, calls, networks, schedules, called)
CLASSES = [one for module in MODULES for one in vars(module).values() if isinstance(one, type)]
STRANGERS = [one for one in dict.fromkeys(CLASSES) if issubclass(one, Stranger) and one is not Stranger] + COUPLED
# Proposed from their source and right with every batch and interval; the others may be refused.
UNDERSTOOD = {
    "Plain", "NamedTexts", "CondFirst", "Lerp", "Addcmul", "InPlace", "Interleaved", "Slices", "Unbind", "Negated",
    "PlusOne", "Cosine", "WeightPerSample", "TwoCalls", "SkipsTheChunk", "FlagAfterTheCall", "StopsGuiding",
    "OtherName", "Experts", "ExpertsIf", "ByClosure", "TimesAsNumbers", "TwoPasses", "Hires", "Strength", "Decorated",
    "InferenceMode", "WithGradients", "ListOfRows",
}  # fmt: skip
# Not right though their layout is given, for what they do besides.
REFUSED_THOUGH_GIVEN = {
    "Channels", "SampleBySample", "LateNegative", "WeightPerSampleNegative", "Momentum", "MomentumLocal",
    "SmoothedElsewhere", "ReusedUncond", "ReusedDifference", "GuidesLater", "ByForward", "NoStep", "NoStepOtherName",
    "NoStepCalls", "StepOfClass", "OwnScheduler", "CopiedScheduler", "BothSchedulers", "StepTwice", "Resampling",
    "ResamplingLast", "HandHeun", "EveryOtherTime", "Reversed", "NeverSet", "PlainCoupledNet", "PlainMeanNet",
    "PlainNumberedNet", "PlainWithinHalves",
}  # fmt: skip
CALLS = [(2, (1, 2)), (1, (1, 2)), (2, (0, 0)), (3, (4, 4)), (3, (0, 3)), (1, (1, 4))]


@pytest.mark.parametrize("cls", STRANGERS, ids=lambda cls: cls.__name__)
def test_proposed(cls):
    for batch, interval in CALLS:
        if cls in (SwapsParts, ExpertsMisnamed) and interval[1] < 3:
            continue  # the parts change places in unguided steps alone, in which no number shows it
        what, why = outcome(build(cls), interval, batch)
        allowed = ("right",) if cls.__name__ in UNDERSTOOD else ("right", "refused")
        assert what in allowed, f"batch {batch}, steps {interval}: {what} {why}"


@pytest.mark.parametrize("cls", [cls for cls in STRANGERS if cls.layout], ids=lambda cls: cls.__name__)
def test_given(cls):
    for batch, interval in CALLS:
        what, why = outcome(build(cls), interval, batch, cls.layout)
        # "warned" is wrong with the words that the layout is taken as given and no step showed it
        allowed = ("right", "refused", "warned") if cls.__name__ in REFUSED_THOUGH_GIVEN else ("right",)
        assert what in allowed, f"batch {batch}, steps {interval}: {what} {why}"


@pytest.mark.parametrize(
    "cls", [Plain, CondFirst, Negated, PlusOne, Slices, TwoCalls, Experts], ids=lambda cls: cls.__name__
)
@pytest.mark.parametrize(
    "layout", ["uncond, cond", "cond, uncond", "uncond | cond", "cond; uncond", "uncond, cond, image"]
)
def test_wrong_layout_given(cls, layout):
    """Refused in the first guided step at the latest; or said, where no number shows it."""
    for batch, interval in CALLS:
        what, why = outcome(build(cls), interval, batch, layout)
        assert what in ("right", "refused", "warned"), f"batch {batch}, steps {interval}: {what} {why}"


# --- off is off


class TwoCallsScaledWhenOff(Stranger):
    layout = "cond; uncond"

    def predict(self, x, t, text, negative):
        noise = self.unet(x, t, text)
        if self.w != 1:
            uncond = self.unet(x, t, negative)
            noise = uncond + self.w * (noise - uncond)
        return 0.9 * noise

    combine, alone = staticmethod(Scaled.combine), staticmethod(Scaled.alone)


class SplitsWhenOff(Stranger):
    """Without guidance its batch of samples is used in halves of its own."""

    def predict(self, x, t, text, negative):
        if self.w == 1:
            noise = self.unet(x, t, text)
            return torch.cat([noise[:1], noise[1:] + 0.1 * noise[:1]])
        uncond, cond = self.unet(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)
        return uncond + self.w * (cond - uncond)


# These double nothing with weight 1; of those that double their batch whatever the weight, the rounding changes.
OFF = [TwoCalls, TwoCallsScaledWhenOff, SkipsTheChunk, FlagAfterTheCall, ScaledWhenOff, SplitsWhenOff]
DOUBLING = [Plain, CondFirst, InPlace, Interleaved, Hires, Cosine, Anonymous]


def stock(pipe, **options) -> torch.Tensor:
    return pipe(**options)[0]


@pytest.mark.parametrize("layout", ["proposed", "given"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("cls", [*OFF, *DOUBLING, Scaled, Rescaled], ids=lambda cls: cls.__name__)
class TestOffIsOff:
    def limited(self, cls, batch, layout, interval, **options):
        """A call with an interval, a stock one, and what was warned of."""
        pipe, given = build(cls), {**inputs(batch), **options}
        plain = stock(pipe, **given)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                attached = GuidanceInterval(pipe, **interval, layout=cls.layout if layout == "given" else None)
            except ValueError:
                pytest.skip("refused at attach")
            with attached:
                result = stock(pipe, **given)
        return result, plain, "; ".join(str(one.message) for one in seen)

    def test_whole_line(self, cls, batch, layout):
        """Every step in the interval."""
        if layout == "proposed" and cls in (Scaled, Rescaled, ScaledWhenOff, TwoCallsScaledWhenOff):
            pytest.skip("refused, since no number shows its layout")
        result, plain, said = self.limited(cls, batch, layout, {"sigma_lo": 0.0})
        assert torch.equal(result, plain)
        assert "no effect" not in said and "holds none" not in said

    @pytest.mark.parametrize("interval", [(1, 2), (0, 0), (4, 4)])
    def test_weight_of_one(self, cls, batch, layout, interval):
        if layout == "proposed" and cls in (Scaled, Rescaled):
            pytest.skip("refused, since no number shows its layout")
        result, plain, _ = self.limited(cls, batch, layout, {"guided_steps": interval}, guidance_scale=1.0)
        assert torch.equal(result, plain) if cls in OFF else (result - plain).abs().max() < 1e-5 * plain.abs().max()


# --- schedulers


def euler(**options):
    return diffusers.EulerDiscreteScheduler(**options)


SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "euler": euler,
    "euler trailing": lambda: euler(timestep_spacing="trailing"),
    "euler karras": lambda: euler(use_karras_sigmas=True),
    "ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(),
    "dpm++ karras": lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "sde": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "single": diffusers.DPMSolverSinglestepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "pndm prk": lambda: diffusers.PNDMScheduler(),
    "heun": diffusers.HeunDiscreteScheduler,
    "kdpm2": diffusers.KDPM2DiscreteScheduler,
    "ipndm": diffusers.IPNDMScheduler,
    "edm": diffusers.EDMEulerScheduler,
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "inverse": lambda: diffusers.DDIMInverseScheduler(clip_sample=False),
    "lcm": diffusers.LCMScheduler,
    "tcd": diffusers.TCDScheduler,
    "sa": diffusers.SASolverScheduler,
}


class Drawn(Plain):
    """Plain with a generator, and with what each scheduler wants of its sample."""

    @torch.no_grad()
    def __call__(
        self, latents, prompt_embeds, negative_prompt_embeds, guidance_scale=WEIGHT, num_inference_steps=STEPS
    ):
        self.w, self.finished = guidance_scale, False
        torch.manual_seed(3)
        texts = (prompt_embeds, negative_prompt_embeds)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = (
                self.scheduler.scale_model_input(latents, t)
                if hasattr(self.scheduler, "scale_model_input")
                else latents
            )
            noise = self.predict(x, t, *texts)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.finished = True
        return (latents,)


def walk_of(scheduler) -> list[int]:
    """The step that each evaluation belongs to, of `STEPS` steps."""
    number = len(scheduler.timesteps)
    if isinstance(scheduler, diffusers.PNDMScheduler) and not scheduler.config.skip_prk_steps:
        return [i // 4 if i < 12 else i - 9 for i in range(number)]  # three Runge-Kutta steps of four evaluations
    if isinstance(scheduler, diffusers.PNDMScheduler):
        return [0, *range(number - 1)]  # a first step of two
    return [i // 2 for i in range(number)] if hasattr(scheduler, "state_in_first_order") else list(range(number))


@pytest.mark.parametrize("interval", [(0, 0), (1, 2), (4, 4)], ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, interval):
    """Stock and limited calls with every kind of scheduler; those whose evaluations are no steps included."""
    pipe, given = build(Drawn, SCHEDULERS[name]()), inputs(2)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    steps = walk_of(scheduler)
    net, latents = Net(), given["latents"]
    torch.manual_seed(3)
    for step, t in zip(steps, scheduler.timesteps, strict=True):
        x = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        c, u = net(x, t, given["prompt_embeds"]), net(x, t, given["negative_prompt_embeds"])
        noise = u + WEIGHT * (c - u) if interval[0] <= step <= interval[1] else c
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    with GuidanceInterval(pipe, guided_steps=interval):
        result = pipe(**given)[0]
    torch.testing.assert_close(result, latents, rtol=0, atol=1e-3 * latents.abs().max().item())


class Bare:
    """A scheduler with steps and nothing else."""

    def set_timesteps(self, count):
        self.timesteps = torch.arange(count, 0, -1) * 100

    def step(self, model_output, timestep, sample, return_dict=True):
        return (sample - 0.1 * model_output,)


class TestBareScheduler:
    class Pipeline(Plain):
        def __init__(self, unet, scheduler):
            DiffusionPipeline.__init__(self)
            self.register_modules(unet=unet)
            self.scheduler = scheduler

        @property
        def components(self):
            return {"unet": self.unet, "scheduler": self.scheduler}

    def test_steps(self):
        pipe = build(self.Pipeline, Bare())
        assert outcome(pipe, (1, 2), 2)[0] in ("right", "refused")

    def test_sigmas_are_refused(self):
        pipe = build(self.Pipeline, Bare())
        with GuidanceInterval(pipe, sigma_lo=1.0), pytest.raises(ValueError):
            pipe(**inputs(2))
        assert len(set(pipe.unet.times)) <= 1


@pytest.mark.parametrize("bounds", [(0.5, 3.0), (0.1, 100.0)])
@pytest.mark.parametrize("cls", ["ddim", "euler", "flow", "inverse"])
def test_noise_levels(cls, bounds):
    """Guided where the EDM noise level at which a step starts is in (lo, hi]."""
    pipe, given = build(Drawn, SCHEDULERS[cls]()), inputs(2)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    if cls in ("ddim", "inverse"):
        alphas = scheduler.alphas_cumprod[scheduler.timesteps.long()]
        sigmas = ((1 - alphas) / alphas).sqrt().tolist()
    else:
        sigmas = scheduler.sigmas[:-1].double()
        sigmas = (sigmas / (1 - sigmas) if cls == "flow" else sigmas).tolist()
    net, latents = Net(), given["latents"]
    torch.manual_seed(3)
    for sigma, t in zip(sigmas, scheduler.timesteps, strict=True):
        x = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        c, u = net(x, t, given["prompt_embeds"]), net(x, t, given["negative_prompt_embeds"])
        noise = u + WEIGHT * (c - u) if bounds[0] < sigma <= bounds[1] else c
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    with GuidanceInterval(pipe, sigma_lo=bounds[0], sigma_hi=bounds[1]):
        result = pipe(**given)[0]
    torch.testing.assert_close(result, latents, rtol=0, atol=1e-3 * latents.abs().max().item())


# --- callbacks, threads, exceptions


class WithCallback(Plain):
    def __call__(
        self,
        latents,
        prompt_embeds,
        negative_prompt_embeds,
        guidance_scale=WEIGHT,
        num_inference_steps=STEPS,
        callback_on_step_end=None,
    ):
        self.w, self.finished = guidance_scale, False
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            noise_uncond, noise_text = noise.chunk(2)
            noise = noise_uncond + self.w * (noise_text - noise_uncond)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, i, t, {"prompt_embeds": prompt_embeds}) or {}
                prompt_embeds = changed.get("prompt_embeds", prompt_embeds)
        self.finished = True
        return (latents,)


class WithHook(Plain):
    def __call__(
        self,
        latents,
        prompt_embeds,
        negative_prompt_embeds,
        guidance_scale=WEIGHT,
        num_inference_steps=STEPS,
        after_step=None,
    ):
        self.w, self.finished = guidance_scale, False
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(torch.cat([latents] * 2), t, torch.cat([negative_prompt_embeds, prompt_embeds]))
            noise_uncond, noise_text = noise.chunk(2)
            noise = noise_uncond + self.w * (noise_text - noise_uncond)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
            after_step()
        self.finished = True
        return (latents,)


class _Object:
    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


WRAPPERS = {"function": lambda f: f, "partial": functools.partial, "object": _Object}


def plain_loop(given, guided, weights=None, texts=None, scheduler=None):
    scheduler, net, latents = scheduler or DDIMScheduler(clip_sample=False), Net(), given["latents"]
    scheduler.set_timesteps(STEPS)
    for i, t in enumerate(scheduler.timesteps):
        text = given["prompt_embeds"] if texts is None else texts[i]
        c, u = net(latents, t, text), net(latents, t, given["negative_prompt_embeds"])
        noise = u + (WEIGHT if weights is None else weights[i]) * (c - u) if i in guided else c
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


class TestCallbacks:
    @pytest.mark.parametrize("batch", BATCHES)
    def test_changes_the_weight(self, batch):
        def callback(pipe, i, t, tensors):
            pipe.w = 2.0 if i >= 0 else pipe.w

        pipe, given = build(WithCallback), inputs(batch)
        with GuidanceInterval(pipe, guided_steps=(0, 2)):
            result = pipe(**given, callback_on_step_end=callback)[0]
        torch.testing.assert_close(result, plain_loop(given, range(3), [4, 2, 2, 2, 2]), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("batch", BATCHES)
    def test_changes_the_text(self, batch):
        pipe, given = build(WithCallback), inputs(batch)
        texts = [given["prompt_embeds"] * (1 if i < 2 else -1) for i in range(STEPS)]
        with GuidanceInterval(pipe, guided_steps=(1, 3)):
            result = pipe(
                **given,
                callback_on_step_end=lambda pipe, i, t, tensors: {"prompt_embeds": texts[min(i + 1, STEPS - 1)]},
            )[0]
        torch.testing.assert_close(result, plain_loop(given, (1, 2, 3), texts=texts), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("other", [Plain, TwoCalls], ids=lambda cls: cls.__name__)
    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_runs_a_stock_pipeline_with_the_same_network(self, wrapper, other):
        """It is none of ours, whatever kind of callable the callback is."""
        pipe, given = build(WithCallback), inputs(2)
        inner = build(other, net=pipe.unet)
        expected = stock(inner, **inputs(3))
        pictures = []
        callback = WRAPPERS[wrapper](lambda *args: pictures.append(stock(inner, **inputs(3))))
        with GuidanceInterval(pipe, guided_steps=(1, 2)):
            result = pipe(**given, callback_on_step_end=callback)[0]
        assert all(torch.equal(one, expected) for one in pictures) and len(pictures) == STEPS
        torch.testing.assert_close(result, plain_loop(given, (1, 2)), rtol=0, atol=1e-3)

    @pytest.mark.parametrize(
        ("cls", "wrapper"),
        [*((WithCallback, wrapper) for wrapper in WRAPPERS), (WithHook, "function"), (WithHook, "partial")],
    )
    def test_by_its_place_or_under_another_name(self, cls, wrapper):
        pipe, given, pictures = build(cls), inputs(2), []
        inner = build(Plain, net=pipe.unet)
        expected = stock(inner, **inputs(3))
        callback = WRAPPERS[wrapper](lambda *args: pictures.append(stock(inner, **inputs(3))))
        with GuidanceInterval(pipe, guided_steps=(1, 2)):
            result = pipe(*given.values(), WEIGHT, STEPS, callback)[0]
        assert all(torch.equal(one, expected) for one in pictures) and len(pictures) == STEPS
        torch.testing.assert_close(result, plain_loop(given, (1, 2)), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_runs_a_stock_pipeline_with_the_same_network_and_scheduler_class(self, wrapper):
        pipe, given = build(WithCallback), inputs(2)
        inner = build(Plain, net=pipe.unet)
        apply_guidance_interval(inner, guided_steps=(0, 0))
        expected = stock(inner, **inputs(1))
        pictures = []
        callback = WRAPPERS[wrapper](lambda *args: pictures.append(stock(inner, **inputs(1))))
        with GuidanceInterval(pipe, guided_steps=(1, 2)):
            result = pipe(**given, callback_on_step_end=callback)[0]
        assert all(torch.equal(one, expected) for one in pictures) and len(pictures) == STEPS
        torch.testing.assert_close(result, plain_loop(given, (1, 2)), rtol=0, atol=1e-3)


class TestContained:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StopIteration])
    @pytest.mark.parametrize("at", [0, 1, 3])
    def test_exceptions_leave_nothing(self, error, at):
        def callback(pipe, i, t, tensors):
            if i == at:
                raise error

        pipe, given = build(WithCallback), inputs(2)
        before, plain = set(vars(pipe.unet)), stock(pipe, **given)
        with pytest.raises(error), GuidanceInterval(pipe, guided_steps=(1, 2)):
            pipe(**given, callback_on_step_end=callback)
        assert set(vars(pipe.unet)) == before
        assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))
        assert torch.equal(stock(pipe, **given), plain)

    @pytest.mark.parametrize("second", [None, (0, 0)], ids=["stock", "limited"])
    def test_threads(self, second):
        """Two pipelines with one network, whose calls overlap step by step."""
        barrier = threading.Barrier(2, timeout=20)
        net = Net()
        pipes = [build(WithCallback, net=net) for _ in range(2)]
        given = [inputs(2), inputs(3)]
        expected = [plain_loop(given[0], (1, 2)), plain_loop(given[1], range(STEPS) if second is None else (0,))]
        apply_guidance_interval(pipes[0], guided_steps=(1, 2))
        if second is not None:
            apply_guidance_interval(pipes[1], guided_steps=second)
        results = [None, None]

        def work(k):
            results[k] = pipes[k](**given[k], callback_on_step_end=lambda *args: barrier.wait() and None)[0]

        threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result, one in zip(results, expected, strict=True):
            torch.testing.assert_close(result, one, rtol=0, atol=1e-3)
        assert "_compiled_call_impl" not in vars(net)

    def test_nested_blocks(self):
        pipe, given = build(Plain), inputs(2)
        plain = stock(pipe, **given)
        with GuidanceInterval(pipe, guided_steps=(1, 2)):
            with GuidanceInterval(pipe, guided_steps=(0, 0)):
                torch.testing.assert_close(stock(pipe, **given), plain_loop(given, (0,)), rtol=0, atol=1e-3)
            torch.testing.assert_close(stock(pipe, **given), plain_loop(given, (1, 2)), rtol=0, atol=1e-3)
            remove_guidance_interval(pipe)
            assert torch.equal(stock(pipe, **given), plain)
        assert torch.equal(stock(pipe, **given), plain) and type(pipe) is Plain

    def test_one_interval_nested_in_itself(self):
        pipe, given = build(Plain), inputs(2)
        plain = stock(pipe, **given)
        interval = GuidanceInterval(pipe, guided_steps=(1, 2))
        with interval:
            with interval:
                stock(pipe, **given)
            torch.testing.assert_close(stock(pipe, **given), plain_loop(given, (1, 2)), rtol=0, atol=1e-3)
        assert torch.equal(stock(pipe, **given), plain) and type(pipe) is Plain

    def test_guider_in_an_interval_in_a_guider(self):
        pipe, given = build(Plain), inputs(2)
        apply_guider(pipe, ClassifierFreeGuidance(9.0))
        nine = plain_loop(given, range(STEPS), [9.0] * STEPS)
        torch.testing.assert_close(stock(pipe, **given), nine, rtol=0, atol=1e-3)
        with GuidanceInterval(pipe, guided_steps=(1, 2)):
            torch.testing.assert_close(stock(pipe, **given), plain_loop(given, (1, 2)), rtol=0, atol=1e-3)
        torch.testing.assert_close(stock(pipe, **given), nine, rtol=0, atol=1e-3)

    @pytest.mark.parametrize("how", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy, copy.copy])
    def test_copies(self, how):
        pipe, given = build(Plain), inputs(2)
        apply_guidance_interval(pipe, guided_steps=(1, 2))
        expected = stock(pipe, **given)
        copied = how(pipe)
        assert torch.equal(stock(copied, **given), expected)
        remove_guidance_interval(copied)
        assert torch.equal(stock(copied, **given), stock(build(Plain), **given))
        if how is not copy.copy:
            assert torch.equal(stock(pipe, **given), expected)

    @pytest.mark.parametrize("how", [lambda p: type(p)(**p.components), lambda p: type(p).from_pipe(p)])
    def test_makes_stock_pipelines(self, how):
        pipe, given = build(Plain), inputs(2)
        plain = stock(pipe, **given)
        apply_guidance_interval(pipe, guided_steps=(1, 2))
        other = how(pipe)
        assert torch.equal(stock(other, **given), plain)
        torch.testing.assert_close(stock(pipe, **given), plain_loop(given, (1, 2)), rtol=0, atol=1e-3)

    def test_double_precision_and_to(self):
        pipe, given = build(Plain), {key: value.double() for key, value in inputs(2).items()}
        apply_guidance_interval(pipe, guided_steps=(1, 2))
        assert pipe.to(torch.float64) is pipe
        assert stock(pipe, **given).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_low_precision(self, dtype):
        pipe = build(Plain).to(dtype)
        given = {key: value.to(dtype) for key, value in inputs(2).items()}
        plain = stock(pipe, **given)
        with GuidanceInterval(pipe, sigma_lo=0.0):
            assert torch.equal(stock(pipe, **given), plain)
        with GuidanceInterval(pipe, guided_steps=(1, 2)):
            result = stock(pipe, **given)
        scheduler = copy.deepcopy(pipe.scheduler)
        expected = plain_loop(inputs(2), (1, 2), scheduler=scheduler)
        assert (result.float() - expected).abs().max() < 0.05 * expected.abs().max()

    def test_compiled(self):
        pipe, given = build(Plain), inputs(2)
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        with GuidanceInterval(pipe, guided_steps=(1, 2)):
            result = stock(pipe, **given)
        torch.testing.assert_close(result, plain_loop(given, (1, 2)), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_replaced_forward(self, when):
        """What offloading does to a network."""

        def hook(module):
            old = module.forward
            module.forward = lambda *args, **kwargs: old(*args, **kwargs)

        pipe, given = build(Plain), inputs(2)
        if when == "before":
            hook(pipe.unet)
        apply_guidance_interval(pipe, guided_steps=(1, 2))
        if when == "after":
            hook(pipe.unet)
        torch.testing.assert_close(stock(pipe, **given), plain_loop(given, (1, 2)), rtol=0, atol=1e-3)

    def test_patched_after_attach(self):
        """`predict` is replaced by one of another layout while the interval is in force."""

        class Patched(Plain):
            pass

        pipe, given = build(Patched), inputs(2)
        expected = plain_loop(given, (1, 2))
        apply_guidance_interval(pipe, guided_steps=(1, 2))
        stock(pipe, **given)
        Patched.predict = CondFirst.predict
        try:
            result = stock(pipe, **given)
        except ValueError:
            return
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)

    def test_patched_instance(self):
        pipe, given = build(Plain), inputs(2)
        pipe.predict = types.MethodType(CondFirst.predict, pipe)
        try:
            with GuidanceInterval(pipe, guided_steps=(1, 2)):
                result = stock(pipe, **given)
        except ValueError:
            assert not pipe.finished
            return
        torch.testing.assert_close(result, plain_loop(given, (1, 2)), rtol=0, atol=1e-3)

    def test_network_replaced_after_attach(self):
        pipe, given = build(Plain), inputs(2)
        apply_guidance_interval(pipe, guided_steps=(1, 2))
        pipe.unet = Net()
        torch.testing.assert_close(stock(pipe, **given), plain_loop(given, (1, 2)), rtol=0, atol=1e-3)

    def test_scheduler_replaced_after_attach(self):
        pipe, given = build(Plain), inputs(2)
        apply_guidance_interval(pipe, guided_steps=(1, 2))
        pipe.scheduler = DDIMScheduler(clip_sample=False)
        torch.testing.assert_close(stock(pipe, **given), plain_loop(given, (1, 2)), rtol=0, atol=1e-3)

    def test_one_step(self):
        pipe = build(Plain)
        assert outcome(pipe, (0, 0), 2, num_inference_steps=1)[0] == "right"

    def test_called_twice(self):
        """The second call is proved again."""
        pipe = build(Plain)
        apply_guidance_interval(pipe, guided_steps=(1, 2))
        for batch in (1, 3, 2):
            given = inputs(batch)
            torch.testing.assert_close(stock(pipe, **given), plain_loop(given, (1, 2)), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("asked_with_its_device", [False, True])
    def test_a_call_that_begins_again_draws_the_same(self, monkeypatch, asked_with_its_device):
        """From the generator of the pipeline's device as well."""
        own, begun = torch.zeros(1), []

        class Drawing(DDIMScheduler):
            def set_timesteps(self, *args, **kwargs):
                begun.append((torch.rand(()).item(), own.item()))
                own.add_(1)
                super().set_timesteps(*args, **kwargs)

        if asked_with_its_device:
            module = types.SimpleNamespace(
                get_rng_state=lambda device: own.clone(), set_rng_state=lambda state, device: own.copy_(state)
            )
        else:  # MPS
            module = types.SimpleNamespace(
                get_rng_state=lambda: own.clone(), set_rng_state=lambda state: own.copy_(state)
            )
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        monkeypatch.setattr(Rescaled, "_execution_device", torch.device("cuda"))
        pipe = build(Rescaled, Drawing(clip_sample=False))
        with (
            pytest.warns(UserWarning, match="does not show it"),
            GuidanceInterval(pipe, guided_steps=(1, 2), layout="uncond, cond"),
        ):
            pipe(**inputs(2))
        assert len(begun) == 2 and begun[0] == begun[1]

    def test_equal_prompts(self):
        """No part can be told from the other; nothing is wrong."""
        pipe, given = build(Plain), inputs(2)
        given["negative_prompt_embeds"] = given["prompt_embeds"]
        with GuidanceInterval(pipe, guided_steps=(1, 2)):
            result = stock(pipe, **given)
        torch.testing.assert_close(result, plain_loop(given, (1, 2)), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("difference", [0.3, 2.0, 10.0])
    @pytest.mark.parametrize("cls", [Plain, TwoCalls], ids=lambda cls: cls.__name__)
    def test_prompts_that_are_nearly_equal(self, cls, dtype, difference):
        """A difference of the predictions near rounding, as at high noise; made visible by a weight of 20."""
        pipe = build(cls).to(dtype)
        given = {key: value.to(dtype) for key, value in inputs(2).items()}
        given["negative_prompt_embeds"] = given["prompt_embeds"] * (1 - difference * 8 * torch.finfo(dtype).eps)
        options = {**given, "guidance_scale": 20.0}
        scheduler = copy.deepcopy(pipe.scheduler)
        loose = {key: value.float() for key, value in given.items()}
        expected = plain_loop(loose, (1, 2), [20.0] * STEPS, scheduler=scheduler)
        with GuidanceInterval(pipe, guided_steps=(1, 2)):
            result = stock(pipe, **options)
        scale = 0.001 if dtype == torch.float32 else 0.2
        assert (result.float() - expected).abs().max() < scale * expected.abs().max()

    def test_one_of_the_prompts_is_equal(self):
        pipe, given = build(Plain), inputs(2)
        given["negative_prompt_embeds"] = torch.stack([given["prompt_embeds"][0], given["negative_prompt_embeds"][1]])
        with GuidanceInterval(pipe, guided_steps=(1, 2)):
            result = stock(pipe, **given)
        torch.testing.assert_close(result, plain_loop(given, (1, 2)), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("weight", [0.0, 0.5, -2.0, 1.2, 1.005, 100.0, 1000.0])
    @pytest.mark.parametrize("cls", [Plain, PlusOne], ids=lambda cls: cls.__name__)
    def test_weights(self, cls, weight):
        """Any weight: right, or refused in the first step."""
        for interval in INTERVALS:
            what, why = outcome(build(cls), interval, 2, guidance_scale=weight)
            assert what in ("right", "refused"), (interval, why)
            assert what == "right" or why.startswith("step 1")


# --- guiders


def adaptive(guidance_scale, given, guider, guided=range(STEPS)):
    """A guider in a loop of its own."""
    scheduler, net, latents, guider = DDIMScheduler(clip_sample=False), Net(), given["latents"], copy.deepcopy(guider)
    scheduler.set_timesteps(STEPS)
    for i, t in enumerate(scheduler.timesteps):
        c, u = net(latents, t, given["prompt_embeds"]), net(latents, t, given["negative_prompt_embeds"])
        noise = c
        if i in guided:
            guider.set_state(i, STEPS, t)
            guider.prepare_inputs({})
            noise = guider.forward(c, u if guider.num_conditions == 2 else None).pred
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


class TestGuiders:
    @pytest.mark.parametrize("layout", ["proposed", "given"])
    @pytest.mark.parametrize("batch", BATCHES)
    @pytest.mark.parametrize(
        "cls", [Plain, CondFirst, Interleaved, TwoCalls, InPlace, PlusOne], ids=lambda c: c.__name__
    )
    @pytest.mark.parametrize("weight", [4.0, 2.0])
    def test_other_weight(self, cls, batch, layout, weight):
        pipe, given = build(cls), inputs(batch)
        plain = stock(pipe, **given)
        apply_guider(pipe, ClassifierFreeGuidance(7.0), layout=cls.layout if layout == "given" else None)
        result = stock(pipe, **given, guidance_scale=weight)
        torch.testing.assert_close(result, plain_loop(given, range(STEPS), [7.0] * STEPS), rtol=0, atol=2e-3)
        remove_guider(pipe)
        assert torch.equal(stock(pipe, **given), plain)

    @pytest.mark.parametrize("cls", [Plain, TwoCalls], ids=lambda cls: cls.__name__)
    @pytest.mark.parametrize("interval", [None, (1, 2)])
    def test_momentum_begins_anew(self, cls, interval):
        guider = AdaptiveProjectedGuidance(guidance_scale=5.0, adaptive_projected_guidance_momentum=-0.5)
        pipe, given = build(cls), inputs(2)
        apply_guider(pipe, guider, guided_steps=interval)
        first = stock(pipe, **given)
        assert torch.equal(stock(pipe, **given), first)
        guided = range(STEPS) if interval is None else range(interval[0], interval[1] + 1)
        torch.testing.assert_close(first, adaptive(5.0, given, guider, guided), rtol=0, atol=2e-3)

    @pytest.mark.parametrize("cls", [Plain, TwoCalls], ids=lambda cls: cls.__name__)
    @pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.4, 1.0), (0.2, 0.8)])
    def test_start_and_stop(self, cls, start, stop):
        guider = ClassifierFreeGuidance(guidance_scale=5.0, start=start, stop=stop)
        pipe, given = build(cls), inputs(2)
        apply_guider(pipe, guider)
        torch.testing.assert_close(stock(pipe, **given), adaptive(5.0, given, guider), rtol=0, atol=2e-3)

    @pytest.mark.parametrize("cls", [Plain, TwoCalls], ids=lambda cls: cls.__name__)
    def test_weight_without_unconditional_prediction(self, cls):
        pipe = build(cls)
        apply_guider(pipe, ClassifierFreeGuidance(7.0))
        try:
            result = stock(pipe, **inputs(2), guidance_scale=1.0)
        except ValueError:
            assert not pipe.finished and len(set(pipe.unet.times)) <= 1
            return
        expected = plain_loop(inputs(2), range(STEPS), [7.0] * STEPS)
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-3)

    @pytest.mark.parametrize("weight", [1.02, 0.97, 1.0001])
    @pytest.mark.parametrize("cls", [TwoCalls, Plain], ids=lambda cls: cls.__name__)
    def test_weights_near_one(self, cls, weight):
        pipe = build(cls)
        apply_guider(pipe, ClassifierFreeGuidance(7.0))
        try:
            result = stock(pipe, **inputs(2), guidance_scale=weight)
        except ValueError:
            assert not pipe.finished and len(set(pipe.unet.times)) <= 1
            return
        expected = plain_loop(inputs(2), range(STEPS), [7.0] * STEPS)
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-3)

    def test_refused(self):
        for guider in (diffusers.guiders.SkipLayerGuidance(skip_layer_guidance_layers=[0]), "cfg", 3.0, None):
            with pytest.raises(ValueError):
                apply_guider(build(Plain), guider)


# --- classes in the table, as they are met


LISTED = {"guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "latent", "prompt": ["a cat", "a dog"]}


def listed(cls=diffusers.StableDiffusionPipeline, **options):
    pipe = cls(**tiny_stable_diffusion().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, **options) -> torch.Tensor:
    given = {**LISTED, **options}
    return pipe(**given, generator=torch.Generator().manual_seed(1), return_dict=False)[0]


class _CutsNegative(diffusers.StableDiffusionPipeline):
    """Overrides one helper only."""

    def encode_prompt(self, *args, **kwargs):
        text, negative = super().encode_prompt(*args, **kwargs)
        return 0.9 * text, negative


class _Wrapped(diffusers.StableDiffusionPipeline):
    def __call__(self, *args, **kwargs):
        kwargs["guidance_scale"] = 4.0
        return super().__call__(*args, **kwargs)


class _DDIM(DDIMScheduler):
    def step(self, model_output, timestep, sample, **kwargs):
        return super().step(0.9 * model_output, timestep, sample, **kwargs)


def listed_loop(pipe, guided, weight=4.0):
    """The same picture by a loop of its own."""
    text, negative = pipe.encode_prompt(LISTED["prompt"], "cpu", 1, True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            c, u = pipe.unet(latents, t, text).sample, pipe.unet(latents, t, negative).sample
            noise = u + weight * (c - u) if i in guided else c
            latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


class Coupled:
    """An attention processor in which the rows of a batch see each other."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        out = diffusers.models.attention_processor.AttnProcessor()(attn, hidden_states, encoder_hidden_states)
        return out + 0.5 * out.roll(len(out) // 2, 0)


class TestListed:
    @pytest.mark.parametrize("cls", [_CutsNegative, _Wrapped])
    @pytest.mark.parametrize("layout", [None, "uncond, cond"])
    def test_subclasses(self, cls, layout):
        pipe = listed(cls)
        plain = picture(pipe)
        assert torch.equal(plain, picture(pipe))
        try:
            with GuidanceInterval(pipe, guided_steps=(1, 2), layout=layout):
                result = picture(pipe)
        except ValueError:
            assert layout is None
            return
        torch.testing.assert_close(result, listed_loop(pipe, (1, 2)), rtol=0, atol=1e-3)

    def test_scheduler_subclass(self):
        pipe = listed()
        pipe.scheduler = _DDIM.from_config(pipe.scheduler.config)
        with GuidanceInterval(pipe, guided_steps=(1, 2)):
            result = picture(pipe)
        torch.testing.assert_close(result, listed_loop(pipe, (1, 2)), rtol=0, atol=1e-3)

    @pytest.mark.filterwarnings("error:.*takes no guidance scale")
    def test_patched_class(self, monkeypatch):
        """The class's __call__ is replaced by one that cannot be read."""
        original = diffusers.StableDiffusionPipeline.__call__
        monkeypatch.setattr(
            diffusers.StableDiffusionPipeline, "__call__", lambda self, *a, **k: original(self, *a, **k)
        )
        pipe = listed()
        with pytest.raises(ValueError, match=r"not the code that runs|not among the pipelines"):
            apply_guidance_interval(pipe, guided_steps=(1, 2))

    @pytest.mark.parametrize("attach", ["before", "after"])
    def test_coupled_attention(self, attach):
        pipe = listed()
        if attach == "before":
            pipe.unet.set_attn_processor(Coupled())
        apply_guidance_interval(pipe, guided_steps=(1, 2))
        pipe.unet.set_attn_processor(Coupled())
        with pytest.raises(ValueError, match="without the others"):
            picture(pipe)

    @pytest.mark.parametrize("images", [1, 2])
    @pytest.mark.parametrize("prompts", [["a cat"], ["a cat", "a dog"], ["a", "b", "c"]], ids=len)
    def test_off_is_off(self, prompts, images):
        pipe = listed()
        options = {"prompt": prompts, "num_images_per_prompt": images}
        off, plain = picture(pipe, **options, guidance_scale=1.0), picture(pipe, **options)
        for interval in ({"guided_steps": (1, 2)}, {"sigma_hi": 1e-9}, {"sigma_lo": 0.0}):
            with GuidanceInterval(pipe, **interval), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert torch.equal(picture(pipe, **options, guidance_scale=1.0), off)
        with GuidanceInterval(pipe, sigma_lo=0.0):
            assert torch.equal(picture(pipe, **options), plain)

    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_callback_with_a_pipeline_of_the_same_network(self, wrapper):
        pipe, inner = listed(), listed()
        inner.unet = pipe.unet
        expected = picture(inner, prompt=["a", "b", "c"])
        pictures = []
        callback = WRAPPERS[wrapper](lambda *args: pictures.append(picture(inner, prompt=["a", "b", "c"])) or {})
        with GuidanceInterval(pipe, guided_steps=(1, 2)) as interval:
            result = picture(pipe, callback_on_step_end=callback)
        assert [step.rows for step in interval.report.steps] == [2, 4, 4, 2]
        assert all(torch.equal(one, expected) for one in pictures)
        torch.testing.assert_close(result, listed_loop(pipe, (1, 2)), rtol=0, atol=1e-3)

    def test_weight_changed_by_a_callback(self):
        """Guidance is turned off in the middle: rows are halved by the callback, as diffusers documents it."""

        def callback(pipe, i, t, tensors):
            if i == 1:
                pipe._guidance_scale = 0.0
                return {"prompt_embeds": tensors["prompt_embeds"][-2:]}
            return {}

        pipe = listed()
        options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        with GuidanceInterval(pipe, guided_steps=(0, 3)):
            result = picture(pipe, **options)
        torch.testing.assert_close(result, listed_loop(pipe, (0, 1)), rtol=0, atol=1e-3)
        with GuidanceInterval(pipe, guided_steps=(1, 3)):
            result = picture(pipe, **options)
        torch.testing.assert_close(result, listed_loop(pipe, (1,)), rtol=0, atol=1e-3)

    def test_verify(self):
        pipe = listed()
        with GuidanceInterval(pipe, guided_steps=(1, 2), verify=True):
            result = picture(pipe)
        torch.testing.assert_close(result, listed_loop(pipe, (1, 2)), rtol=0, atol=1e-3)

    def test_mask_that_is_not_per_row(self):
        """Regions in cross_attention_kwargs, as many as there are rows: none is cut."""

        class Regions:
            def __call__(self, attn, hidden_states, encoder_hidden_states=None, region_weights=None, **kwargs):
                out = diffusers.models.attention_processor.AttnProcessor()(attn, hidden_states, encoder_hidden_states)
                return out * region_weights.sum() if region_weights is not None else out

        pipe = listed()
        pipe.unet.set_attn_processor(Regions())
        options = {"cross_attention_kwargs": {"region_weights": torch.tensor([0.3, 0.2, 0.4, 0.1])}}
        plain = picture(pipe, **options)
        with GuidanceInterval(pipe, sigma_lo=0.0):
            assert torch.equal(picture(pipe, **options), plain)
        with pytest.raises(ValueError, match="region_weights"), GuidanceInterval(pipe, guided_steps=(1, 2)):
            picture(pipe, **options)
