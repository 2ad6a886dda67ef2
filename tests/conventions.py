"""What diffusers and its users expect of every pipeline, whatever it makes, as a mixin for test classes."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import is_torch_version

# Where torch 2.6 fails inside diffusers: its group offloading asks for an accelerator, and dynamo cannot trace how it
# chooses an attention backend.
newer_torch = pytest.mark.skipif(is_torch_version("<", "2.7"), reason="diffusers cannot do this with torch 2.6")


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def modules(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def as_array(result) -> np.ndarray:
    return result.detach().float().cpu().numpy() if isinstance(result, torch.Tensor) else np.asarray(result)


class PipelineConventions:
    """Tests of one pipeline class over several sets of components.

    A subclass gives `variants`, names for which `build(variant)` returns a tiny pipeline, `options(variant)` the
    keyword arguments of a quick call and `several(variant, count)` what to change in them to draw so many samples,
    the first one as ever. `output_type` is one that gives an array or a tensor, `raw` the one of the sample itself.
    """

    variants: tuple[str, ...]
    output_type = "np"
    raw = "latent"

    def build(self, variant: str) -> DiffusionPipeline:
        raise NotImplementedError

    def options(self, variant: str) -> dict:
        raise NotImplementedError

    def several(self, variant: str, count: int) -> dict:
        raise NotImplementedError

    def without_optional(self, pipe: DiffusionPipeline, variant: str) -> dict:
        """What to change in options(variant) for a pipeline without its optional components."""
        return {}

    def quiet(self, variant: str) -> DiffusionPipeline:
        pipe = self.build(variant)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe: DiffusionPipeline, variant: str, **overrides):
        given = {"output_type": self.output_type, "generator": seeded(7)[0], **self.options(variant), **overrides}
        return pipe(**{name: value for name, value in given.items() if value is not None})

    def sample(self, pipe: DiffusionPipeline, variant: str, **overrides) -> np.ndarray:
        return as_array(self.call(pipe, variant, **overrides)[0])

    def taken(self, name: str) -> bool:
        """Whether the call of the pipeline takes an argument."""
        return name in inspect.signature(type(self.build(self.variants[0])).__call__).parameters

    def pytest_generate_tests(self, metafunc):
        if "variant" in metafunc.fixturenames:
            metafunc.parametrize("variant", self.variants)

    # Components

    def test_components_make_another_pipeline(self, variant):
        pipe = self.quiet(variant)
        names = set(inspect.signature(type(pipe).__init__).parameters)
        assert set(pipe.components) <= names
        settings = {name: value for name, value in pipe.config.items() if name in names - set(pipe.components)}
        again = type(pipe)(**pipe.components, **settings)
        again.set_progress_bar_config(disable=True)
        assert all(again.components[name] is part for name, part in pipe.components.items())
        np.testing.assert_array_equal(self.sample(again, variant), self.sample(pipe, variant))

    def test_optional_components_stay_away(self, tmp_path):
        """Set to None, the pipeline runs, is saved, and comes back without them."""
        variant = self.variants[0]
        pipe = self.quiet(variant)
        options = self.without_optional(pipe, variant)
        for name in pipe._optional_components:
            setattr(pipe, name, None)
        expected = self.sample(pipe, variant, **options)
        pipe.save_pretrained(tmp_path)
        again = type(pipe).from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert all(getattr(again, name) is None for name in pipe._optional_components)
        np.testing.assert_allclose(self.sample(again, variant, **options), expected, atol=1e-4)

    @pytest.mark.parametrize("form", ["pickled", "variant"])
    def test_other_forms_of_weights(self, form, tmp_path):
        """Weights as .bin, and of a variant, whose name the files carry and without which they are not found."""
        variant = self.variants[0]
        pipe = self.quiet(variant)
        how = {"variant": "fp16"} if form == "variant" else {}
        pipe.save_pretrained(tmp_path, safe_serialization=form == "variant", **how)
        for name, part in modules(pipe).items():
            weights = [path.name for path in (tmp_path / name).iterdir() if path.suffix in (".bin", ".safetensors")]
            assert weights
            if isinstance(part, ModelMixin):  # transformers writes safetensors alone
                assert all(".fp16." in file if how else file.endswith(".bin") for file in weights)
        again = type(pipe).from_pretrained(tmp_path, **how)
        again.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(self.sample(again, variant), self.sample(pipe, variant), atol=1e-4)
        with pytest.raises((ValueError, OSError)):
            type(pipe).from_pretrained(tmp_path, variant="other")

    # Types and places

    def test_types(self, tmp_path):
        """`.to` and `torch_dtype` reach every component that has a type, and `pipe.dtype` says which it is."""
        pipe = self.quiet(self.variants[0])

        def types(pipe):
            return {part.dtype for part in pipe.components.values() if hasattr(part, "dtype")}

        assert types(pipe) == {pipe.dtype} == {torch.float32}
        assert pipe.to(dtype=torch.float16) is pipe
        assert types(pipe) == {pipe.dtype} == {torch.float16}
        assert np.isfinite(self.sample(pipe, self.variants[0])).all()
        pipe.save_pretrained(tmp_path)
        assert types(type(pipe).from_pretrained(tmp_path, torch_dtype=torch.float16)) >= {torch.float16}
        first, *others = modules(pipe)
        mixed = type(pipe).from_pretrained(tmp_path, torch_dtype={first: torch.bfloat16, "default": torch.float16})
        assert getattr(mixed, first).dtype == torch.bfloat16
        assert {getattr(mixed, name).dtype for name in others} <= {torch.float16}
        assert types(pipe.to("cpu", torch.float32)) == {torch.float32}

    def test_attention_slicing_changes_nothing(self):
        pipe = self.quiet(self.variants[0])
        expected = self.sample(pipe, self.variants[0])
        for size in (1, "auto", "max"):
            pipe.enable_attention_slicing(size)
            np.testing.assert_allclose(self.sample(pipe, self.variants[0]), expected, atol=1e-3)
        pipe.disable_attention_slicing()

    @pytest.mark.parametrize(
        "method", ["enable_model_cpu_offload", pytest.param("enable_group_offload", marks=newer_torch)]
    )
    def test_offloading_changes_nothing(self, method):
        """Twice, since some hooks of offloading are put in anew after a call."""
        variant = self.variants[0]
        pipe = self.quiet(variant)
        expected = self.sample(pipe, variant)
        if method == "enable_group_offload" and not all(
            getattr(part, "_supports_group_offloading", True) for part in modules(pipe).values()
        ):
            with pytest.raises(ValueError, match="group offloading"):
                pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
            return
        for start in (0, 1):
            if method == "enable_model_cpu_offload":
                pipe.enable_model_cpu_offload(device="cpu")
            elif start == 0:
                pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
            np.testing.assert_allclose(self.sample(pipe, variant), expected, atol=2e-4)

    def test_a_balanced_device_map_changes_nothing(self, tmp_path, monkeypatch):
        """The dispatch itself, with the CPU in the place of accelerators."""
        variant = self.variants[0]
        pipe = self.quiet(variant)
        pipe.save_pretrained(tmp_path)
        memory = {torch.device("cpu"): 10**9}
        monkeypatch.setattr("diffusers.pipelines.pipeline_loading_utils.get_max_memory", lambda given=None: memory)
        placed = type(pipe).from_pretrained(tmp_path, device_map="balanced")
        placed.set_progress_bar_config(disable=True)
        assert set(placed.hf_device_map.values()) == {torch.device("cpu")}
        assert set(placed.hf_device_map) == set(modules(pipe))
        np.testing.assert_allclose(self.sample(placed, variant), self.sample(pipe, variant), atol=1e-4)
        placed.reset_device_map()

    # The call

    def test_the_tuple_begins_as_the_output_does(self, variant):
        pipe = self.quiet(variant)
        output, alone = self.call(pipe, variant), self.call(pipe, variant, return_dict=False)
        assert isinstance(alone, tuple)
        np.testing.assert_array_equal(as_array(output[0]), as_array(alone[0]))

    def test_batch_sizes(self, variant):
        """1, 2 and 3 samples with a generator each: the first is the same in all of them."""
        pipe, firsts = self.quiet(variant), []
        for count in (1, 2, 3):
            drawn = self.sample(pipe, variant, **self.several(variant, count), generator=seeded(*range(count)))
            assert len(drawn) == count
            firsts.append(drawn[0])
        for first in firsts[1:]:
            np.testing.assert_allclose(first, firsts[0], atol=1e-4)
        one = self.sample(pipe, variant, **self.several(variant, 1), generator=seeded(0)[0])
        np.testing.assert_allclose(one[0], firsts[0], atol=1e-4)

    def test_images_per_prompt(self):
        if not self.taken("num_images_per_prompt"):
            pytest.skip("takes no prompt, or draws one sample for each")
        pipe, variant = self.quiet(self.variants[0]), self.variants[0]
        for count in (1, 2):
            asked = {**self.several(variant, count), "num_images_per_prompt": 2}
            assert len(self.sample(pipe, variant, **asked)) == 2 * count

    def test_guidance_may_change_in_a_callback(self):
        if not (self.taken("guidance_scale") and self.taken("callback_on_step_end")):
            pytest.skip("has no guidance scale or no callback")
        variant = next((name for name in self.variants if "guidance_scale" in self.options(name)), None)
        assert variant is not None

        def raise_it(pipe, step, timestep, tensors):
            pipe._guidance_scale += 1
            return tensors

        pipe = self.quiet(variant)
        names = pipe._callback_tensor_inputs
        callback = {"callback_on_step_end": raise_it, "callback_on_step_end_tensor_inputs": names}
        raised = self.sample(pipe, variant, guidance_scale=2.0, **callback)
        assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
        assert not np.array_equal(raised, self.sample(pipe, variant, guidance_scale=2.0))
        assert self.sample(pipe, variant, guidance_scale=1.0).shape == raised.shape

    def test_the_last_callback_has_the_last_word(self, variant):
        if not self.taken("callback_on_step_end"):
            pytest.skip("has no callback")
        pipe = self.quiet(variant)
        name, steps = pipe._callback_tensor_inputs[0], []

        def clear_at_the_end(pipe, step, timestep, tensors):
            assert set(tensors) == set(pipe._callback_tensor_inputs)
            steps.append(step)
            if step == pipe.num_timesteps - 1:
                tensors[name] = torch.zeros_like(tensors[name])
            return tensors

        callback = {
            "callback_on_step_end": clear_at_the_end,
            "callback_on_step_end_tensor_inputs": pipe._callback_tensor_inputs,
        }
        assert not self.sample(pipe, variant, output_type=self.raw, **callback).any()
        assert steps == list(range(pipe.num_timesteps))
        only = {**callback, "callback_on_step_end_tensor_inputs": [name]}
        only["callback_on_step_end"] = lambda pipe, step, timestep, tensors: {}
        np.testing.assert_array_equal(self.sample(pipe, variant, **only), self.sample(pipe, variant))

    def test_no_progress_bar_where_none_is_wanted(self, capfd):
        pipe = self.quiet(self.variants[0])
        for part in pipe.components.values():
            if isinstance(part, DiffusionPipeline):
                part.set_progress_bar_config(disable=True)
        capfd.readouterr()
        self.sample(pipe, self.variants[0])
        assert capfd.readouterr().err == ""
