"""A limited pipeline beside others: copies, files, threads, callbacks and blocks; nothing of a call is left behind."""

import copy
import pickle
import threading

import diffusers
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from diffusers.callbacks import PipelineCallback, SDXLCFGCutoffCallback
from tiny_guided_pipelines import CASES, STEPS, any_flow_far
from tiny_pipelines import tiny_sdxl
from unlisted_pipelines import Plain, build

from diffusers_ext.pipelines import (
    GuidanceInterval,
    StableDiffusionXLGuidanceIntervalPipeline,
    apply_guidance_interval,
    guidance_report,
    remove_guidance_interval,
)
from diffusers_ext.pipelines.interceptors import _INTERCEPTED

pytestmark = pytest.mark.filterwarnings("ignore:the guidance interval:UserWarning")
WORDS = {"prompt": ["a cat", "a dog"], "num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
STOCK = diffusers.StableDiffusionXLPipeline


def sample(pipe, **options) -> torch.Tensor:
    return pipe(**{**WORDS, **options}, generator=torch.Generator().manual_seed(1), return_dict=False)[0]


def beside(pipe):
    """A stock pipeline with the same networks."""
    other = STOCK(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.fixture
def limited():
    """A pipeline with an interval, its sample, and that of the stock one."""
    pipe = tiny_sdxl()
    plain = sample(pipe)
    apply_guidance_interval(pipe, guided_steps=(1, 2))
    yield pipe, sample(pipe), plain
    assert not _INTERCEPTED
    assert "_compiled_call_impl" not in vars(pipe.unet) and type(pipe.scheduler) is diffusers.EulerDiscreteScheduler


class TestCopies:
    @pytest.mark.slow
    def test_with_the_interval(self, limited):
        """Copies keep it, each for itself."""
        pipe, expected, plain = limited
        fresh = tiny_sdxl()
        apply_guidance_interval(fresh, guided_steps=(1, 2))
        for other in (copy.deepcopy(pipe), copy.copy(pipe), pickle.loads(pickle.dumps(fresh))):
            torch.testing.assert_close(sample(other), expected, rtol=0, atol=1e-6)
            assert [step.rows for step in guidance_report(other).steps] == [2, 4, 4, 2]
        other = copy.deepcopy(pipe)
        remove_guidance_interval(other)
        assert type(other) is STOCK and torch.equal(sample(other), plain)
        assert torch.equal(sample(pipe), expected)

    def test_without_the_interval(self, limited):
        pipe, _, plain = limited
        made = [type(pipe)(**pipe.components), pipe.__class__.from_pipe(pipe), STOCK.from_pipe(pipe)]
        made.append(AutoPipelineForText2Image.from_pipe(pipe))
        for other in made:
            other.set_progress_bar_config(disable=True)
            assert type(other) is STOCK
            assert torch.equal(sample(other), plain)
        assert type(AutoPipelineForImage2Image.from_pipe(pipe)) is diffusers.StableDiffusionXLImg2ImgPipeline

    def test_saved_and_loaded(self, limited, tmp_path):
        pipe, _, plain = limited
        pipe.save_pretrained(tmp_path)
        for loaded in (diffusers.DiffusionPipeline.from_pretrained(tmp_path), type(pipe).from_pretrained(tmp_path)):
            loaded.set_progress_bar_config(disable=True)
            assert type(loaded) is STOCK
            torch.testing.assert_close(sample(loaded), plain, rtol=0, atol=1e-4)

    def test_auto_pipeline(self, tmp_path):
        """It accepts the pipeline that takes the interval as an argument, and its saved folder."""
        ours = StableDiffusionXLGuidanceIntervalPipeline(**tiny_sdxl().components, add_watermarker=False)
        ours.save_pretrained(tmp_path)
        loaded = AutoPipelineForText2Image.from_pretrained(tmp_path)
        assert type(loaded) is type(AutoPipelineForText2Image.from_pipe(ours)) is type(ours)
        for auto, cls in ((AutoPipelineForImage2Image, "Img2Img"), (AutoPipelineForInpainting, "Inpaint")):
            stock = getattr(diffusers, f"StableDiffusionXL{cls}Pipeline")
            assert type(auto.from_pipe(ours)) is stock and type(auto.from_pretrained(tmp_path)) is stock


class TestBesides:
    def test_threads_that_share_networks(self, limited):
        """Encoders not among them: those of transformers 5.0 disturb each other in threads, in stock pipelines too."""
        pipe, expected, plain = limited
        second, stock = beside(pipe), beside(pipe)
        apply_guidance_interval(second, guided_steps=(0, 0))
        wanted = {0: expected, 1: sample(second), 2: plain}
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        with torch.no_grad():
            encoded = dict(zip(names, pipe.encode_prompt(WORDS["prompt"]), strict=True))
        found = {number: [] for number in wanted}

        def draw(number, one):
            for _ in range(3):
                found[number].append(sample(one, prompt=None, **encoded))

        threads = [threading.Thread(target=draw, args=pair) for pair in enumerate((pipe, second, stock))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, outputs in found.items():
            assert len(outputs) == 3 and all(torch.equal(output, wanted[number]) for output in outputs)

    def test_pipelines_in_callbacks(self, limited):
        """A stock one is stock, one with an interval of its own has that, and the outer one is as without."""
        pipe, expected, plain = limited
        stock, second, seen = beside(pipe), beside(pipe), []
        apply_guidance_interval(second, guided_steps=(0, 0))
        wanted = sample(second)

        def callback(pipeline, step, timestep, tensors):
            assert pipeline is pipe
            seen.append(torch.equal(sample(stock), plain) and torch.equal(sample(second), wanted))
            return {}

        assert torch.equal(sample(pipe, callback_on_step_end=callback), expected)
        assert seen == [True] * STEPS

    def test_callback_objects(self, limited):
        pipe, expected, _ = limited

        class Counting(PipelineCallback):
            seen = 0
            tensor_inputs = ["latents"]  # noqa: RUF012

            def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
                self.seen += 1
                return callback_kwargs

        counting = Counting(cutoff_step_ratio=None, cutoff_step_index=1)
        assert torch.equal(sample(pipe, callback_on_step_end=counting), expected)
        assert counting.seen == STEPS

    @pytest.mark.parametrize("interval", [{"sigma_lo": 0.0}, {"guided_steps": (1, 1)}])
    def test_guidance_that_a_callback_turns_off(self, interval):
        pipe = tiny_sdxl()
        options = {"prompt": ["a cat"], "callback_on_step_end": SDXLCFGCutoffCallback(None, 2)}
        plain = sample(pipe, **options)
        with GuidanceInterval(pipe, **interval) as limited:
            output = sample(pipe, **options)
        assert torch.equal(output, plain) == ("sigma_lo" in interval)
        assert [step.rows for step in limited.report.steps] == (
            [2, 2, 2, 1] if "sigma_lo" in interval else [1, 2, 1, 1]
        )

    def test_nested_blocks(self, limited):
        pipe, expected, plain = limited
        with GuidanceInterval(pipe, sigma_lo=100.0):
            outer = sample(pipe)
            with GuidanceInterval(pipe, guided_steps=(0, STEPS - 1)):
                assert torch.equal(sample(pipe), plain)
            assert torch.equal(sample(pipe), outer)
            with pytest.raises(RuntimeError, match="stop"), GuidanceInterval(pipe, guided_steps=(0, 0)):
                raise RuntimeError("stop")
            assert torch.equal(sample(pipe), outer)
        assert torch.equal(sample(pipe), expected)

    @pytest.mark.parametrize("where", ["callback", "network"])
    def test_exceptions(self, limited, where):
        pipe, expected, _ = limited

        def fail(*args, **kwargs):
            raise RuntimeError("stop")

        if where == "network":
            pipe.unet.forward = fail
        with pytest.raises(RuntimeError, match="stop"):
            sample(pipe, **({"callback_on_step_end": fail} if where == "callback" else {}))
        vars(pipe.unet).pop("forward", None)
        assert not _INTERCEPTED
        assert torch.equal(sample(pipe), expected)


class TestSchedulersOfACall:
    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: type(one).from_config(one.config)])
    def test_another_one(self, copied):
        """A pipeline may put a copy of its scheduler in place for a call."""

        class Copying(Plain):
            def begin(self, batch, generator):
                self.scheduler = copied(self.scheduler)
                assert type(self.scheduler) == diffusers.DDIMScheduler  # noqa: E721
                return super().begin(batch, generator)

        pipe = build(Plain, diffusers.DDIMScheduler())
        with GuidanceInterval(pipe, guided_steps=(1, 2)):
            expected = pipe(generator=torch.Generator().manual_seed(1))
        pipe = build(Copying, diffusers.DDIMScheduler())
        with GuidanceInterval(pipe, guided_steps=(1, 2)):
            assert torch.equal(pipe(generator=torch.Generator().manual_seed(1)), expected)
        assert type(pipe.scheduler) is diffusers.DDIMScheduler


class TestRowsOfListedPipelines:
    @pytest.mark.slow
    def test_any_flow_far_of_one_prompt(self):
        """An empty compressed cache has rows, too."""
        case = any_flow_far()
        one = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in case.options.items()}

        def run(**changes):
            options = {**one, **changes}
            return case.pipe(**options, generator=torch.Generator().manual_seed(0), return_dict=False)[0]

        plain = run()
        with GuidanceInterval(case.pipe, sigma_lo=0.0):
            assert torch.equal(run(), plain)
        with GuidanceInterval(case.pipe, sigma_hi=1e-9):
            empty = run()
        torch.testing.assert_close(empty, run(**case.off), rtol=0, atol=1e-4)
        with GuidanceInterval(case.pipe, guided_steps=(1, 2)) as interval:
            run()
        assert [step.rows for step in interval.report.steps] == [1, 2, 2, 1] * 3

    def test_masks_of_two_adapters(self):
        """One mask an IP-Adapter, as many as rows in the batch of one prompt."""
        from test_guidance_interval_ip_adapter import DIM, with_ip_adapter

        case = CASES["stable_diffusion"]()
        with_ip_adapter(case.pipe, count=2)
        both = [torch.randn(2, 1, DIM, generator=torch.Generator().manual_seed(i)) for i in range(2)]
        masks = torch.zeros(2, 1, 16, 16)
        masks[0, ..., :8], masks[1, ..., 8:] = 1, 1

        def run(embeddings, **changes):
            options = {**case.options, "prompt": "a cat", "negative_prompt": "dark", **changes}
            options |= {"ip_adapter_image_embeds": embeddings, "cross_attention_kwargs": {"ip_adapter_masks": masks}}
            return case.pipe(**options, generator=torch.Generator().manual_seed(0), return_dict=False)[0]

        plain = run(both)
        with GuidanceInterval(case.pipe, sigma_lo=0.0):
            assert torch.equal(run(both), plain)
        with GuidanceInterval(case.pipe, sigma_hi=1e-9) as interval:
            empty = run(both)
        assert interval.report.rows == STEPS
        torch.testing.assert_close(empty, run([one[1:] for one in both], **case.off), rtol=0, atol=2e-5)
