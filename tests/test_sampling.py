"""Bulk sampling: the same bytes for any number of processes and interruptions, and no mixing of settings."""

import errno
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from cli_on_processes import TORCHRUN, run_on_two
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    UNet2DModel,
)
from fresh_process import start_two, wait_until
from PIL import Image
from tiny_pipelines import tiny_stable_diffusion

from diffusers_ext import (
    EDM2Pipeline,
    EDMHeunScheduler,
    FlowPostprocessingPipeline,
    GuidanceInterval,
    boost_and_skip,
)
from diffusers_ext.runs import kept, processes, shards
from diffusers_ext.sampling import cycled_labels, random_labels, sample_images, sample_to_folder
from diffusers_ext.sampling import folder as sampling
from diffusers_ext.shipped import load_pipeline

STEPS = 2


@pytest.fixture
def digits():
    return load_pipeline("mnist-unet")


@pytest.fixture
def plain():
    return tiny_ddpm()


def tiny_ddpm(seed: int = 0, channels: int = 3) -> DDPMPipeline:
    """Unconditional images (8, 8, channels)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8,),
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
            attention_head_dim=4,
        )  # fmt: skip
    return DDPMPipeline(unet, DDPMScheduler())


def tiny_dit() -> DiTPipeline:
    """Class-conditional images (8, 8, 3) of 1000 classes, with a scheduler that draws noise without a generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
            patch_size=2, norm_num_groups=2, num_embeds_ada_norm=1000,
        )  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    return DiTPipeline(transformer, vae, DDPMScheduler())


def draw(pipe, folder, count=6, batch_size=2, **arguments):
    return sample_to_folder(pipe, folder, count, batch_size=batch_size, num_inference_steps=STEPS, **arguments)


def contents(folder) -> dict[str, bytes]:
    """Every file of a folder but the manifest."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def pixels(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))])


def interrupt(monkeypatch, after: int, error: BaseException | None = None):
    """Fail at the batch after so many."""
    draw_batch, calls = sampling.draw, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise error or KeyboardInterrupt
        return draw_batch(*arguments)

    monkeypatch.setattr(sampling, "draw", failing)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path, digits):
    one = draw(digits, tmp_path / "one", count=7)
    options = ("--num-samples", 7, "--batch-size", 2, "--num-inference-steps", STEPS, "--device", "cpu")
    command = ("sample", "mnist-unet", "--output", tmp_path / "two", *options)
    said = run_on_two(tmp_path / "notes", *command, launcher=TORCHRUN)
    assert said.count(f"wrote 7 images to {tmp_path / 'two'}, 7 of them drawn by this start") == 1
    assert said.count("sampling") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one")) == {f"{i:06d}.png" for i in range(7)}
    assert one.drawn == 7 and not one.was_finished


@pytest.mark.slow
def test_a_kill_loses_no_finished_batch(tmp_path, digits):
    """Two processes are killed; one process goes on, and the files are those of an uninterrupted one."""
    killed, whole, steps = tmp_path / "killed", tmp_path / "whole", 6
    options = ("--num-samples", 24, "--batch-size", 2, "--num-inference-steps", steps, "--random-labels")
    command = ("sample", "mnist-unet", "--output", killed, "--device", "cpu", *options)
    workers = start_two("from diffusers_ext.cli import main; main()", *command, folder=tmp_path)
    wait_until(lambda: len(list(killed.glob("shards/[0-9]*.npy"))) >= 3, workers[0])
    for process in workers:
        process.kill()
    for process in workers:
        process.join()
    finished = len(list(killed.glob("shards/[0-9]*.npy")))
    assert 3 <= finished < 12 and (killed / "lock.json").exists()

    call = {"labels": "random", "batch_size": 2, "num_inference_steps": steps}
    assert sample_to_folder(digits, killed, 24, **call).drawn == 24 - 2 * finished
    assert sample_to_folder(digits, whole, 24, **call).drawn == 24
    assert contents(killed) == contents(whole)
    assert json.loads((killed / "manifest.json").read_text()) == json.loads((whole / "manifest.json").read_text())


def test_an_interruption_changes_nothing(tmp_path, plain, monkeypatch):
    draw(plain, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        with pytest.raises(KeyboardInterrupt):
            draw(plain, tmp_path / "cut")
    assert len(contents(tmp_path / "cut")) == 2  # two batches, no lock
    assert draw(plain, tmp_path / "cut").drawn == 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").iterdir()}
    again = draw(plain, tmp_path / "cut")
    assert again.was_finished and again.drawn == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").iterdir()}


def test_a_damaged_batch_is_drawn_anew(tmp_path, plain, monkeypatch):
    draw(plain, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            draw(plain, tmp_path / "cut", count=8)
    files = sorted((tmp_path / "cut/shards").iterdir())
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    files[1].write_bytes(files[1].read_bytes()[:-5])
    for half in (".unfinished-1-manifest.json", "shards/.unfinished-1-000003.npy"):
        (tmp_path / "cut" / half).write_bytes(b"half")
    assert draw(plain, tmp_path / "cut", count=8).drawn == 6
    kept = contents(tmp_path / "cut")
    assert {name: kept[name] for name in contents(tmp_path / "whole")} == contents(tmp_path / "whole")
    assert len(kept) == 8


def test_damage_after_the_check_stops_the_writing(tmp_path, plain, monkeypatch):
    finish = sampling._Run.finish

    def after_damage(run, pipe):
        next(run.shards.folder.glob("000001.*")).write_bytes(b"")
        return finish(run, pipe)

    with monkeypatch.context() as patch:
        patch.setattr(sampling._Run, "finish", after_damage)
        with pytest.raises(ValueError, match=r"batch 1 .* is missing or damaged; start again"):
            draw(plain, tmp_path / "out")
    assert draw(plain, tmp_path / "out").drawn == 2


def test_a_full_disk_loses_no_finished_batch(tmp_path, plain, monkeypatch):
    write = shards.Shards.write

    def full(self, number, images):
        with monkeypatch.context() as patch:
            if number == 2:
                patch.setattr(os, "fsync", fail)
            write(self, number, images)

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "write", full)
        with pytest.raises(OSError, match="No space left"):
            draw(plain, tmp_path / "out")
    assert [path.name[:7] for path in sorted((tmp_path / "out/shards").iterdir())] == ["000000.", "000001."]
    assert draw(plain, tmp_path / "out").drawn == 2


@pytest.mark.parametrize(
    ("format", "name"), [("png", "000004.png"), ("zip", "images.zip"), ("npz", "samples_6x8x8x3.npz")]
)
def test_a_disk_that_is_full_when_the_result_is_written_loses_no_batch(tmp_path, plain, monkeypatch, format, name):
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    draw(plain, tmp_path / "whole", format=format)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            draw(plain, tmp_path / "out", format=format)
    assert len(list((tmp_path / "out/shards").iterdir())) == 3 and not list((tmp_path / "out").glob(".*"))
    assert draw(plain, tmp_path / "out", format=format).drawn == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "seed: 0 before, 5 now"),
        ({"count": 8}, "count: 6 before, 8 now"),
        ({"batch_size": 3}, "batch_size: 2 before, 3 now"),
        ({"format": "npz"}, "format: 'png' before, 'npz' now"),
        ({"eta": 0.5}, "call.eta: None before, 0.5 now"),
        ({"labels": [3, 4]}, r"class_labels\[1\]: 1 before, 4 now"),
        ({"labels": "random"}, "class_labels: .* before, 'random' now"),
    ],
)
def test_other_settings_are_refused(tmp_path, digits, monkeypatch, change, message):
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        with pytest.raises(KeyboardInterrupt):
            draw(digits, tmp_path, labels=[3, 1])
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"begun with other settings: {message}; go on .* another output folder"):
        draw(digits, tmp_path, **{"labels": [3, 1], **change})
    assert contents(tmp_path) == before


def test_another_model_scheduler_or_dtype_is_refused(tmp_path):
    draw(tiny_ddpm(), tmp_path)
    with pytest.raises(ValueError, match=r"components.unet.sha256: "):
        draw(tiny_ddpm(seed=1), tmp_path)
    other = tiny_ddpm()
    other.scheduler = boost_and_skip(other.scheduler, gamma=2.0)
    with pytest.raises(ValueError, match=r"components.scheduler.class: 'DDPMScheduler' before, 'BoostAndSkipDDPM"):
        draw(other, tmp_path)
    with pytest.raises(ValueError, match=r"dtype: 'torch.float32' before, 'torch.bfloat16' now"):
        draw(tiny_ddpm().to(torch.bfloat16), tmp_path)
    assert draw(tiny_ddpm(), tmp_path).was_finished


def test_settings_of_a_pipeline_are_told_apart():
    """Lists among them, and without the names of its parts."""
    unet, scheduler = tiny_ddpm().unet, EDMHeunScheduler()
    scales = ([1.0, 2.0], [1.0, 3.0])
    described = [sampling.describe_pipeline(EDM2Pipeline(unet, scheduler, latent_scale=scale)) for scale in scales]
    assert set(described[0]["components"]) == {"unet", "scheduler", "latent_scale", "latent_bias"}
    (changed,) = kept.differences(*described)
    assert changed == "components.latent_scale[1]: 2.0 before, 3.0 now"
    flows = [FlowPostprocessingPipeline(unet, scheduler, base=tiny_ddpm(seed)) for seed in (0, 1)]
    (changed,) = kept.differences(*map(sampling.describe_pipeline, flows))
    assert changed.startswith("components.base.components.unet.sha256: ")


def test_other_versions_are_refused(tmp_path, plain, monkeypatch):
    draw(plain, tmp_path)
    versions = {**sampling.drawing_versions(), "torch": "1.0"}
    monkeypatch.setattr(sampling, "drawing_versions", lambda: versions)
    with pytest.raises(ValueError, match=r"other versions.* torch: .* before, '1.0' now; .* another output folder"):
        draw(plain, tmp_path)


def test_folders_of_something_else_are_refused(tmp_path, plain):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        draw(plain, tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}
    for text in ("{}", "3", "not json"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="was not written by this command"):
            draw(plain, tmp_path)


def test_a_finished_folder_that_lost_files_is_refused(tmp_path, plain):
    draw(plain, tmp_path)
    (tmp_path / "000004.png").unlink()
    with pytest.raises(ValueError, match=r"1 of its files are gone, such as 000004.png"):
        draw(plain, tmp_path)


def test_formats_hold_the_same_images(tmp_path, digits):
    for name in ("png", "zip", "npz"):
        result = draw(digits, tmp_path / name, count=5, format=name, labels=[7, 1]).result
        assert result == tmp_path / {"png": "png", "zip": "zip/images.zip", "npz": "npz/samples_5x28x28x1.npz"}[name]
        assert {path.name for path in result.parent.iterdir()} >= {"png"} or not (result.parent / "shards").exists()
    pictures = contents(tmp_path / "png")
    with ZipFile(tmp_path / "zip/images.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == pictures
    with np.load(tmp_path / "npz/samples_5x28x28x1.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_1"].dtype == np.int64
        np.testing.assert_array_equal(arrays["arr_0"][..., 0], pixels(tmp_path / "png"))
        assert arrays["arr_1"].tolist() == [7, 1, 7, 1, 7]
    assert json.loads((tmp_path / "png/manifest.json").read_text())["labels"] == [7, 1, 7, 1, 7]
    with pytest.raises(ValueError, match="format must be one of"):
        draw(digits, tmp_path / "none", format="jpg")


def test_npz_without_labels_has_one_array(tmp_path, plain):
    with np.load(draw(plain, tmp_path, format="npz").result) as arrays:
        assert sorted(arrays) == ["arr_0"] and arrays["arr_0"].shape == (6, 8, 8, 3)


def test_archives_do_not_depend_on_the_day(tmp_path, plain, monkeypatch):
    first = [draw(plain, tmp_path / name, format=name).result.read_bytes() for name in ("zip", "npz")]
    monkeypatch.setattr(time, "time", lambda: 2e9)
    again = [draw(plain, tmp_path / f"{name}2", format=name).result.read_bytes() for name in ("zip", "npz")]
    assert first == again


def test_png_refuses_channels_that_it_has_not(tmp_path):
    with pytest.raises(ValueError, match=r"PNG holds 1, 3 or 4 channels, the images have 2; use the format npz"):
        draw(tiny_ddpm(channels=2), tmp_path / "png")
    assert not (tmp_path / "png").exists()  # refused at the first batch
    assert np.load(draw(tiny_ddpm(channels=2), tmp_path / "npz", format="npz").result)["arr_0"].shape == (6, 8, 8, 2)


def test_batch_sizes_agree_within_a_grey_level(tmp_path, digits):
    draw(digits, tmp_path / "two", count=5, batch_size=2, gamma=2.0, seed=3)
    draw(digits, tmp_path / "five", count=5, batch_size=5, gamma=2.0, seed=3)
    two, five = pixels(tmp_path / "two").astype(int), pixels(tmp_path / "five").astype(int)
    assert abs(two - five).max() <= 1
    assert len({picture.tobytes() for picture in two}) == 5


def test_an_interval_is_applied_where_the_call_does_not_take_one(tmp_path, digits):
    """The files are those of the pipeline with the interval, and it is gone afterwards."""
    call = {"guidance_scale": 30.0, "format": "npz"}
    done = draw(digits, tmp_path / "limited", count=3, batch_size=3, guidance_interval=(0.001, 0.5), **call)
    kind = type(digits)
    with GuidanceInterval(digits, guided_steps=(1, 1)):
        by_hand = draw(digits, tmp_path / "by_hand", count=3, batch_size=3, **call)
    assert type(digits) is kind
    plain = draw(digits, tmp_path / "plain", count=3, batch_size=3, **call)
    free = draw(digits, tmp_path / "free", count=3, batch_size=3, **{**call, "guidance_scale": 1.0})
    limited, by_hand, plain, free = (np.load(each.result)["arr_0"] for each in (done, by_hand, plain, free))
    np.testing.assert_array_equal(limited, by_hand)
    assert (limited != plain).any() and (limited != free).any()
    with pytest.raises(ValueError, match=r"guidance_interval must be two noise levels, .* got \(1.0,\)"):
        draw(digits, tmp_path / "other", guidance_interval=(1.0,))
    assert not (tmp_path / "other").exists()


def test_random_labels_depend_on_the_image_s_seed_alone(digits):
    labels = random_labels(digits, 2000, seed=0)
    assert torch.equal(random_labels(digits, 50, seed=0), labels[:50])
    assert torch.equal(random_labels(digits, 50, seed=7), labels[7:57])
    counts = labels.bincount(minlength=10)
    assert len(counts) == 10 and counts.min() > 140 and counts.max() < 260  # 200 +- 4.5 standard deviations
    first_noise = [torch.randn(1, generator=torch.Generator().manual_seed(i)).item() for i in range(2000)]
    assert abs(np.corrcoef(first_noise, labels)[0, 1]) < 0.09
    with pytest.raises(ValueError, match="has no classes"):
        random_labels(tiny_ddpm(), 3, seed=0)


def test_pipelines_that_draw_outside_their_generators_repeat_too(tmp_path, monkeypatch):
    pipe = tiny_dit()
    state = torch.random.get_rng_state()
    draw(pipe, tmp_path / "whole", labels="random", format="npz")
    torch.manual_seed(11)
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, tmp_path / "cut", labels="random", format="npz")
    draw(pipe, tmp_path / "cut", labels="random", format="npz")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    torch.random.set_rng_state(state)
    draw(pipe, tmp_path / "again", labels="random")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert cycled_labels(pipe, 1001).tolist() == [*range(1000), 0]


def test_text_to_image_takes_prompts_in_turn(tmp_path):
    pipe = tiny_stable_diffusion()
    draw(pipe, tmp_path / "two", count=3, batch_size=2, prompts=["cat", "dog"])
    draw(pipe, tmp_path / "cat", count=3, batch_size=2, prompts=["cat"])
    draw(pipe, tmp_path / "dog", count=3, batch_size=2, prompts=["dog"])
    two, cat, dog = (pixels(tmp_path / name) for name in ("two", "cat", "dog"))
    assert two.shape == (3, 16, 16, 3)
    for i, alone in enumerate((cat, dog, cat)):
        assert abs(two[i].astype(int) - alone[i]).max() <= 1
    assert json.loads((tmp_path / "two/manifest.json").read_text())["settings"]["prompts"] == ["cat", "dog"]
    for wrong, message in (
        ({}, "needs a prompt"),
        ({"prompts": "cat"}, "list of texts"),
        ({"prompts": []}, "list of"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pipe, tmp_path / "none", **wrong)
    with pytest.raises(ValueError, match="not both"):
        draw(pipe, tmp_path / "none", prompts=["cat"], labels=[1])
    with pytest.raises(ValueError, match="set by the sampling itself"):
        draw(pipe, tmp_path / "none", prompts=["cat"], output_type="np")


def test_a_negative_prompt_is_of_every_image(tmp_path):
    pipe = tiny_stable_diffusion()
    draw(pipe, tmp_path / "two", count=2, batch_size=2, prompts=["cat"], negative_prompt="dog", guidance_scale=5.0)
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    call = {"num_inference_steps": 2, "guidance_scale": 5.0, "generator": seeds, "output_type": "np"}
    expected = pipe(["cat"] * 2, negative_prompt=["dog"] * 2, **call).images
    assert abs(pixels(tmp_path / "two") - (expected * 255).round()).max() <= 1
    with pytest.raises(ValueError, match="one text, of all images"):
        draw(pipe, tmp_path / "none", prompts=["cat"], negative_prompt=["dog"])


@pytest.mark.parametrize(
    ("asked", "negative"),
    [
        ({"true_cfg_scale": 4.0}, ["", ""]),  # without one there is no second prediction
        ({"true_cfg_scale": 4.0, "negative_prompt": "dog"}, ["dog", "dog"]),
        ({"true_cfg_scale": 1.0}, None),
        ({}, None),
    ],
)
def test_true_guidance_gets_a_negative_prompt(tmp_path, asked, negative):
    class TrueGuidance(DDPMPipeline):
        """As Flux's call."""

        def __call__(
            self,
            prompt,
            negative_prompt=None,
            true_cfg_scale=1.0,
            num_inference_steps=1,
            generator=None,
            output_type="pt",
        ):
            seen.append((prompt, negative_prompt, true_cfg_scale))
            return ImagePipelineOutput(images=torch.zeros(len(prompt), 3, 8, 8))

    seen, plain = [], tiny_ddpm()
    draw(TrueGuidance(plain.unet, plain.scheduler), tmp_path / "out", count=2, prompts=["cat"], **asked)
    assert seen == [(["cat", "cat"], negative, asked.get("true_cfg_scale", 1.0))]
    kept = json.loads((tmp_path / "out/manifest.json").read_text())["settings"]["call"]
    assert kept == {"num_inference_steps": 2, **asked}


def test_what_cannot_be_asked_for_is_refused_before_a_folder_is_made(tmp_path, digits, plain):
    class NeedsImage(DDPMPipeline):
        def __call__(self, image, batch_size=1, generator=None, num_inference_steps=1, output_type="pt"):
            raise AssertionError

    cases = [
        (plain, {"gamma": 2.0}, "DDPMPipeline does not take gamma"),
        (plain, {"labels": [1]}, "takes none"),
        (plain, {"labels": "random"}, "no classes"),
        (plain, {"prompts": ["cat"]}, "DDPMPipeline does not take prompt"),
        (plain, {"true_cfg_scale": 4.0}, "DDPMPipeline does not take true_cfg_scale"),
        (digits, {"negative_prompt": "dog"}, "does not take negative_prompt"),
        (digits, {"labels": "all"}, 'integers, None or "random"'),
        (digits, {"labels": []}, "must not be empty"),
        (digits, {"timesteps": torch.tensor([2, 1])}, "JSON-able"),
        (NeedsImage(plain.unet, plain.scheduler), {}, "NeedsImage needs image"),
    ]
    for pipe, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            draw(pipe, tmp_path / "out", **arguments)
    for count, batch_size in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="count and batch_size must be >= 1"):
            draw(plain, tmp_path / "out", count=count, batch_size=batch_size)
    assert not (tmp_path / "out").exists()


def test_a_respacing_goes_to_the_pipeline_as_it_is(tmp_path, plain, monkeypatch):
    with pytest.raises(ValueError, match="DDPMPipeline failed with num_inference_steps='10,10,5'"):
        sample_to_folder(plain, tmp_path / "out", 1, num_inference_steps="10,10,5")
    given = []
    monkeypatch.setattr(plain.scheduler, "set_timesteps", given.append)
    monkeypatch.setattr(plain.scheduler, "timesteps", torch.tensor([0]))
    sample_to_folder(plain, tmp_path / "out2", 1, num_inference_steps="ddim25")
    assert given == ["ddim25"]


def test_images_that_are_not_finite_are_refused(tmp_path, plain):
    with torch.no_grad():
        plain.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="image 0 is not finite; use another dtype"):
        draw(plain, tmp_path)


@pytest.mark.parametrize("images", [torch.zeros(3, 1, 4, 4), torch.zeros(2, 4, 4), ["a", "b"]])
def test_what_are_not_the_images_asked_for_is_refused(tmp_path, plain, monkeypatch, images):
    monkeypatch.setattr(sampling, "draw", lambda *arguments: images)
    with pytest.raises(ValueError, match=r"must give 2 images \(batch, channels, height, width\), got"):
        draw(plain, tmp_path)


def test_sampled_images_are_tensors_whatever_the_pipeline_gives():
    """Some versions of diffusers give arrays for "pt" too."""
    labels = torch.tensor([0, 3, 1])
    for form in (torch.rand(2, 3, 4, 5), np.random.default_rng(0).random((2, 4, 5, 3))):

        class Labelled(SimpleNamespace):
            def __call__(self, class_labels, generator, output_type, form=form):
                return SimpleNamespace(images=form[: len(class_labels)])

        images = sample_images(Labelled(_execution_device=torch.device("cpu")), labels, batch_size=2)
        assert images.shape == (3, 3, 4, 5) and images.dtype == torch.float32


def test_grey_levels_are_rounded_from_tensors_and_arrays():
    images = torch.tensor([0.0, 0.4, 0.6, 254.4, 255.0, 256.0]).reshape(1, 3, 1, 2) / 255
    expected = np.array([[[[0, 1, 255], [0, 254, 255]]]], dtype=np.uint8)
    np.testing.assert_array_equal(sampling.to_uint8(images, range(1)), expected)
    np.testing.assert_array_equal(sampling.to_uint8(images.permute(0, 2, 3, 1).numpy(), range(1)), expected)
    np.testing.assert_array_equal(sampling.to_uint8(images.bfloat16(), range(1)), expected)


def test_threads_are_as_before(tmp_path, plain, monkeypatch):
    used, draw_batch = [], sampling.draw

    def noting(*arguments):
        used.append(torch.get_num_threads())
        return draw_batch(*arguments)

    monkeypatch.setattr(sampling, "draw", noting)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        draw(plain, tmp_path / "out", count=2)
        assert used == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_fewer_processes_than_promised_is_an_error(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.start_processes("cpu") is None
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.warns(UserWarning, match="torchrun --nproc_per_node N"):
        processes.start_processes("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = []

    def alone(**arguments):
        asked.append(arguments["cpu"])
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(processes, "Accelerator", alone)
    for device in ("cpu", "mps"):
        with pytest.raises(ValueError, match=r"promised 2 processes \(WORLD_SIZE\), but accelerate made 1"):
            processes.start_processes(device)
    assert asked == [True, False]
    with pytest.raises(ValueError, match="leave the index out"):
        processes.start_processes("cuda:1")


def test_a_process_alone_trains_on_the_device_that_was_asked_for(monkeypatch):
    """accelerate by itself takes the fastest device here."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    made, current = [], []
    monkeypatch.setattr(processes, "Accelerator", lambda **arguments: made.append(arguments))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for device in ("cpu", "cuda", "cuda:1"):
        processes.start_accelerator(device, "no")
    assert [arguments["cpu"] for arguments in made] == [True, False, False]
    assert current == [torch.device("cuda:1")]


def test_an_error_of_the_main_process_is_raised_in_all(monkeypatch):
    sent = []

    def broadcast(outcome):
        sent.append(outcome)
        return sent[0]

    monkeypatch.setattr(processes, "broadcast_object_list", broadcast)
    for index in (0, 1):
        team = processes.Processes(SimpleNamespace(num_processes=2, process_index=index))
        with pytest.raises(ValueError, match="no"):
            team.agreed(lambda: (_ for _ in ()).throw(ValueError("no")))
    assert sent[1] == [None, None]
