"""What every pipeline and every scheduler of the package must do, as mixins for test classes."""

import copy
import inspect
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conventions import PipelineConventions
from diffusers import DiffusionPipeline, SchedulerMixin
from fresh_process import run_fresh
from packaging.version import Version

from diffusers_ext.hub import export_pipeline

# Before, DDPMPipeline gave arrays whatever was asked for, and there are none in bfloat16.
ddpm_gives_tensors = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.41"), reason="DDPMPipeline gives no tensors before diffusers 0.41"
)


def same_noise_in_every_type(monkeypatch):
    """Draw noise in float32 and round it: torch's bfloat16 stream is another one in some versions."""
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, dtype=None, **other: draw(*size, **other).to(dtype))


class PipelineContract(PipelineConventions):
    """Tests of a pipeline class that makes images, beside the conventions.

    A subclass gives besides: `options(variant)` yield `batch` images in `steps` steps; and `file`, the pipeline's
    source.
    """

    batch: int
    steps: int
    file: Path

    def run(self, pipe: DiffusionPipeline, variant: str, **overrides) -> np.ndarray:
        generator = torch.Generator().manual_seed(7)
        return pipe(**{"output_type": "np", "generator": generator, **self.options(variant), **overrides}).images

    def save_expected(self, pipe: DiffusionPipeline, variant: str, folder: Path) -> None:
        """What a fresh process needs to repeat the sample, and the sample."""
        (folder / "options.json").write_text(json.dumps(self.options(variant)))
        np.save(folder / "expected.npy", self.run(pipe, variant))

    def check_loaded(self, folder: Path, *names: str) -> None:
        expected = np.load(folder / "expected.npy")
        for name in names:
            np.testing.assert_allclose(
                np.load(folder / f"{name}.npy"), expected, atol=1e-4, err_msg=f"{folder} {name}"
            )

    def test_save_and_load_in_a_fresh_process(self, tmp_path):
        """By class, and by DiffusionPipeline once diffusers_ext is imported: the same sample."""
        for variant in self.variants:
            pipe = self.quiet(variant)
            pipe.save_pretrained(tmp_path / variant)
            self.save_expected(pipe, variant, tmp_path / variant)
        run_fresh("load_with_package.py", type(pipe).__name__, str(tmp_path), *self.variants, cache=tmp_path)
        for variant in self.variants:
            self.check_loaded(tmp_path / variant, "class", "base")

    def test_export_and_custom_pipeline_without_the_package(self, tmp_path):
        """An exported folder, and a stock folder with custom_pipeline=, load where diffusers_ext is not installed."""
        for variant in self.variants:
            pipe = self.quiet(variant)
            export_pipeline(pipe, tmp_path / variant)
            self.save_expected(pipe, variant, tmp_path / variant)
        run_fresh("load_without_package.py", str(self.file), str(tmp_path), *self.variants, cache=tmp_path)
        for variant in self.variants:
            self.check_loaded(tmp_path / variant, "export", "custom")

    def test_output_types_agree(self, variant):
        pipe = self.quiet(variant)
        array = self.run(pipe, variant)
        tensor = self.run(pipe, variant, output_type="pt")
        pictures = self.run(pipe, variant, output_type="pil")
        assert array.shape[0] == tensor.shape[0] == len(pictures) == self.batch
        assert array.min() >= 0 and array.max() <= 1
        assert np.mean((array == 0) | (array == 1)) < 0.2  # clipped values would hide differences here and elsewhere
        np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
        for picture, image in zip(pictures, array, strict=True):
            levels = np.asarray(picture).reshape(image.shape)
            np.testing.assert_array_equal(levels, (image * 255).round().astype(np.uint8))

    def test_return_dict(self, variant):
        pipe = self.quiet(variant)
        generator = torch.Generator().manual_seed(7)
        outputs = pipe(**self.options(variant), generator=generator, output_type="np", return_dict=False)
        assert isinstance(outputs, tuple) and len(outputs) == 1
        np.testing.assert_array_equal(outputs[0], self.run(pipe, variant))

    def test_callback_sees_and_replaces_the_sample(self, variant):
        pipe, seen = self.quiet(variant), []

        def watch(pipeline, step, timestep, tensors):
            assert pipeline is pipe and list(tensors) == ["latents"]
            seen.append((step, float(timestep), tensors["latents"].clone()))
            return {}

        untouched = self.run(pipe, variant, callback_on_step_end=watch)
        np.testing.assert_array_equal(untouched, self.run(pipe, variant))
        assert [step for step, _, _ in seen] == list(range(self.steps))
        times = [time for _, time, _ in seen]
        assert times == sorted(times, reverse=True)
        blank = self.run(
            pipe, variant, callback_on_step_end=lambda p, i, t, tensors: {"latents": tensors["latents"] * 0}
        )
        np.testing.assert_array_equal(blank, np.full_like(blank, 0.5))

    def test_callback_tensor_names_are_checked(self, variant):
        with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
            self.run(self.quiet(variant), variant, callback_on_step_end_tensor_inputs=["prompt_embeds"])

    def test_generators(self, variant):
        """One generator repeats the batch; one a sample makes each sample independent of the batch."""
        pipe = self.quiet(variant)
        np.testing.assert_array_equal(self.run(pipe, variant), self.run(pipe, variant))

        def seeded(*seeds):
            return [torch.Generator().manual_seed(seed) for seed in seeds]

        together = self.run(pipe, variant, generator=seeded(*range(self.batch)))
        reversed_order = self.run(pipe, variant, generator=seeded(*reversed(range(self.batch))))
        np.testing.assert_allclose(together, reversed_order[::-1], atol=1e-4)
        alone = self.run(pipe, variant, generator=seeded(0), **self.several(variant, 1))
        np.testing.assert_allclose(alone, together[:1], atol=1e-4)
        assert not np.allclose(together[0], together[1], atol=1e-3)

    def test_reduced_precision(self, variant, monkeypatch):
        """bfloat16 runs in bfloat16 and, with the same noise, stays near float32."""
        same_noise_in_every_type(monkeypatch)
        exact = self.run(self.quiet(variant), variant)
        pipe, types = self.quiet(variant).to(torch.bfloat16), []

        def note(pipeline, step, timestep, tensors):
            types.append(tensors["latents"].dtype)
            return {}

        rough = self.run(pipe, variant, callback_on_step_end=note)
        np.testing.assert_allclose(rough, exact, atol=0.1)
        assert set(types) == {torch.bfloat16}
        assert rough.dtype == np.float32 and np.isfinite(rough).all()
        assert rough.shape == exact.shape

    def test_lists_of_one_label(self):
        """[[1], [1]] are the labels [1, 1], as for diffusers' own class-conditional pipeline."""
        variant = self.variants[0]
        if not self.options(variant).get("class_labels"):
            pytest.skip("has no classes")
        pipe = self.quiet(variant)
        listed = [[label] for label in self.options(variant)["class_labels"]]
        np.testing.assert_array_equal(self.run(pipe, variant, class_labels=listed), self.run(pipe, variant))

    def test_progress_bar(self, variant, capsys):
        self.run(self.build(variant), variant)
        assert f"{self.steps}/{self.steps}" in capsys.readouterr().err


def public(config: dict) -> dict:
    """The parameters in a config, without what diffusers notes beside them."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


class SchedulerContract:
    """Tests of one scheduler class. A subclass gives `cls`, `parent` and `config`, values of its own parameters."""

    cls: type
    parent: type
    config: dict

    def sample(self) -> torch.Tensor:
        return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def output(self, sample: torch.Tensor) -> torch.Tensor:
        """Of a network, at any time."""
        return 0.1 * sample

    def step(self, scheduler, sample: torch.Tensor, timestep, **options):
        """One step, with the noise of one seed where it draws any."""
        known = inspect.signature(scheduler.step).parameters
        noise = {"generator": torch.Generator().manual_seed(1)} if "generator" in known else {}
        scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        assert scaled.shape == sample.shape
        return scheduler.step(self.output(scaled), timestep, sample, **noise, **options)

    def first_step(self, scheduler, **options):
        scheduler.set_timesteps(5)
        return self.step(scheduler, self.sample(), scheduler.timesteps[0], **options)

    def test_a_whole_schedule_keeps_the_shape(self):
        scheduler, sample = self.cls(**self.config), self.sample()
        scheduler.set_timesteps(5)
        for timestep in scheduler.timesteps:
            sample = self.step(scheduler, sample, timestep).prev_sample
        assert sample.shape == self.sample().shape and torch.isfinite(sample).all()
        assert scheduler.order >= 1

    def test_a_saved_scheduler_takes_the_same_step(self, tmp_path):
        scheduler = self.cls(**self.config)
        scheduler.save_pretrained(tmp_path)
        again = self.cls.from_pretrained(tmp_path)
        assert torch.equal(self.first_step(again).prev_sample, self.first_step(scheduler).prev_sample)

    def test_tuple_and_output_agree(self):
        output = self.first_step(self.cls(**self.config))
        alone = self.first_step(self.cls(**self.config), return_dict=False)
        assert isinstance(alone, tuple) and torch.equal(alone[0], output.prev_sample)
        for one, other in zip(alone, output.values(), strict=False):  # what can be left out of a tuple comes last
            torch.testing.assert_close(one, other, equal_nan=True)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_compatible_classes_take_and_give_back_the_config(self):
        scheduler = self.cls(**self.config)
        assert self.cls in scheduler.compatibles
        real = [other for other in scheduler.compatibles if issubclass(other, SchedulerMixin)]  # others lack a package
        for other in real:
            assert public(self.cls.from_config(other.from_config(scheduler.config).config).config) == public(
                scheduler.config
            ), other

    def test_config_values_are_no_attributes(self):
        """As diffusers wants it: a warning for those that are read so, and no parameter that takes everything."""
        scheduler = self.cls(**self.config)
        name = next(iter(self.config))
        assert hasattr(scheduler, "init_noise_sigma") or self.parent is not None
        if name not in vars(scheduler) and not hasattr(self.cls, name):
            with pytest.warns(FutureWarning, match="config"):
                assert getattr(scheduler, name) == scheduler.config[name]
        with pytest.raises(AttributeError, match="does_not_exist"):
            scheduler.does_not_exist  # noqa: B018
        kinds = {parameter.kind for parameter in inspect.signature(self.cls.__init__).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}

    def test_noise_is_added_at_one_time_or_one_a_sample(self):
        scheduler, sample = self.cls(**self.config), self.sample()
        if not hasattr(scheduler, "add_noise"):
            assert not hasattr(self.parent, "add_noise")
            return
        scheduler.set_timesteps(5)
        noise = torch.rand(sample.shape, generator=torch.Generator().manual_seed(2))
        for times in (scheduler.timesteps[:1], scheduler.timesteps[:1].repeat(4)):
            noisy = scheduler.add_noise(sample, self.noise(noise), times)
            assert noisy.shape == sample.shape and noisy.dtype == sample.dtype
            assert not torch.equal(noisy, sample)

    def noise(self, uniforms: torch.Tensor):
        return uniforms

    @pytest.mark.parametrize("train", [100, 1000, 1100])
    def test_numbers_of_training_steps(self, train):
        scheduler = self.cls(**self.config, num_train_timesteps=train)
        scheduler.set_timesteps(10)
        assert len(scheduler) == train and scheduler.timesteps.max() < train
        assert torch.isfinite(self.first_step(scheduler).prev_sample).all()

    def test_trained_betas_are_kept(self, tmp_path):
        scheduler = self.cls(**self.config, trained_betas=np.array([0.1, 0.3]))
        scheduler.save_pretrained(tmp_path)
        assert scheduler.betas.tolist() == self.cls.from_pretrained(tmp_path).betas.tolist()
        assert scheduler.betas.tolist() == pytest.approx([0.1, 0.3])

    def test_config_round_trip_on_disk(self, tmp_path):
        scheduler = self.cls(**self.config)
        scheduler.save_pretrained(tmp_path)
        again = self.cls.from_pretrained(tmp_path)
        assert type(again) is self.cls
        assert public(again.config) == public(scheduler.config)

    def test_every_parameter_reaches_the_parent(self):
        """A parameter of the parent, given through from_config, changes the tables and not the config alone."""
        parent = self.parent(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        ours = self.cls.from_config(parent.config, **self.config)
        assert torch.equal(ours.betas, parent.betas)
        for name, value in self.config.items():
            assert ours.config[name] == value
        for name, value in public(parent.config).items():
            assert ours.config[name] == value, name

    def test_to_the_parent_and_back(self):
        """The parent's class drops our values and keeps them in its config; ours takes them up again."""
        ours = self.cls(**self.config)
        back = self.cls.from_config(self.parent.from_config(ours.config).config)
        assert {name: back.config[name] for name in self.config} == self.config

    def test_copies_and_repr(self):
        scheduler = self.cls(**self.config)
        scheduler.set_timesteps(10)
        copied = copy.deepcopy(scheduler)
        assert torch.equal(copied.timesteps, scheduler.timesteps)
        assert public(copied.config) == public(scheduler.config)
        for name in self.config:
            assert f'"{name}"' in repr(scheduler)
