"""The diffusers-ext command."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from fresh_process import start_fresh, wait_until
from PIL import Image

import diffusers_ext
from diffusers_ext import cli, demo, sampling
from diffusers_ext.machine.versions import attention_backends, package_versions
from diffusers_ext.sampling import cycled_labels, sample_images
from diffusers_ext.shipped import load_pipeline


def invoke(*arguments: str):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0 and diffusers_ext.__version__ in result.output


@pytest.mark.slow
def test_info_lists_versions_devices_backends_and_models():
    result = invoke("info")
    assert result.exit_code == 0, result.output
    for text in ("torch", "diffusers", "cpu:", "native", "mnist-unet", "mnist-classifier"):
        assert text in result.output


def test_info_reports_what_really_computes():
    assert package_versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert package_versions()["python"].count(".") == 2
    backends = attention_backends("cpu")
    assert "native" in backends and "xformers" not in backends  # no xformers operator computes on a CPU


def test_export_writes_a_loadable_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    result = invoke("export", "mnist-unet", tmp_path / "out", "--license", "apache-2.0")
    assert result.exit_code == 0, result.output
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == ["boost_and_skip", "BoostAndSkipPipeline"]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert pipe.config.null_class == 10


def test_sample_writes_pictures_and_a_manifest(tmp_path):
    common = ("--num-inference-steps", 4, "--num-samples", 3, "--batch-size", 2, "--seed", 5)
    boost = ("--pipeline", "boost-and-skip", "--gamma", 4, "--skip-steps", 1, "--class-labels", "7,1")
    result = invoke("sample", "mnist-unet", "--output", tmp_path / "out", *common, *boost)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "000000.png", "000001.png", "000002.png", "manifest.json"
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["settings"]["call"] == {"num_inference_steps": 4, "gamma": 4.0, "skip_steps": 1}
    assert manifest["labels"] == [7, 1, 7]
    pipe = load_pipeline("mnist-unet")
    alone = sample_images(pipe, torch.tensor([7]), 7, num_inference_steps=4, gamma=4.0, skip_steps=1)
    written = np.asarray(Image.open(tmp_path / "out/000002.png")) / 255
    np.testing.assert_allclose(written, alone[0, 0].numpy(), atol=1.01 / 255)


def test_sample_takes_any_folder_and_its_own_pipeline(tmp_path):
    unet = UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    common = ("sample", tmp_path / "model", "--num-inference-steps", 2, "--num-samples", 1)
    assert invoke(*common, "--output", tmp_path / "plain").exit_code == 0
    assert Image.open(tmp_path / "plain/000000.png").size == (8, 8)
    refused = invoke(*common, "--output", tmp_path / "none", "--gamma", 4)
    assert refused.exit_code == 1 and "DDPMPipeline does not take gamma" in refused.output
    refused = invoke(*common, "--output", tmp_path / "none", "--class-labels", 1)
    assert refused.exit_code == 1 and "DDPMPipeline takes none" in refused.output
    assert not (tmp_path / "none").exists()
    boosted = invoke(*common, "--output", tmp_path / "boost", "--pipeline", "boost-and-skip", "--gamma", 4)
    assert boosted.exit_code == 0, boosted.output


def test_sample_goes_on_and_refuses_to_mix(tmp_path):
    common = ("sample", "mnist-unet", "--output", tmp_path, "--num-inference-steps", 2, "--num-samples", 2)
    options = ("--random-labels", "--format", "npz")
    first = invoke(*common, *options)
    assert first.exit_code == 0, first.output
    path = tmp_path / "samples_2x28x28x1.npz"
    assert f"wrote 2 images to {path}, 2 of them drawn by this start" in first.output
    again = invoke(*common, *options)
    assert again.exit_code == 0 and f"{path} was finished before: 2 images, nothing to do" in again.output
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    damaged = invoke(*common, *options)
    assert damaged.exit_code == 1 and f"1 of its files are damaged, such as {path.name}" in damaged.output
    path.write_bytes(whole)
    other = invoke(*common, *options, "--seed", 1)
    assert other.exit_code == 1 and "seed: 0 before, 1 now" in other.output
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("")
    refused = invoke("sample", "no/such-model", "--output", tmp_path / "full")
    assert refused.exit_code == 1 and "is not empty" in refused.output


@pytest.mark.slow
def test_sample_reads_prompts_steps_and_labels(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(sampling, "sample_to_folder", lambda *given, **named: called.append(named) or done)
    done = sampling.Sampled(tmp_path, 16, 16, False)
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n")
    (tmp_path / "empty.txt").write_text("\n")
    common = ("sample", "mnist-unet", "--output", tmp_path / "out")
    for options in (
        ("--prompts", tmp_path / "prompts.txt"),
        ("--prompt", "a bird", "--num-inference-steps", "10,10,5"),
        ("--num-inference-steps", "250", "--class-labels", "3, 1"),
        ("--random-labels",),
    ):
        result = invoke(*common, *options)
        assert result.exit_code == 0, result.output
    assert [named["prompts"] for named in called] == [["a cat", "a dog"], ["a bird"], None, None]
    assert [named["num_inference_steps"] for named in called] == [50, "10,10,5", 250, 50]
    assert [named["labels"] for named in called] == [None, None, [3, 1], "random"]
    for wrong, message in (
        (("--prompts", tmp_path / "empty.txt"), "holds no prompt"),
        (("--prompts", tmp_path / "prompts.txt", "--prompt", "a bird"), "not both"),
        (("--class-labels", "1", "--random-labels"), "not both"),
        (("--class-labels", "1;2"), "'1;2' is not integers between commas"),
        (("--num-inference-steps", "0"), "0 is not >= 1"),
        (("--num-inference-steps", "foo"), "neither a number of steps nor a respacing"),
        (("--num-inference-steps", "10,"), "neither a number of steps nor a respacing"),
    ):
        result = invoke(*common, *wrong)
        assert result.exit_code == 2 and message in result.output


def test_labels_go_through_the_classes_without_the_null_class():
    pipe = load_pipeline("mnist-unet")
    assert cycled_labels(pipe, 12).tolist() == [*range(10), 0, 1]
    assert cycled_labels(pipe, 3, [7, None]).tolist() == [7, 10, 7] and cycled_labels(pipe, 1, [None]).tolist() == [10]
    for wrong, message in (([], "empty"), ([10], r"\[0, 9\].*got \[10\]; 10 is the null class: write none"),
                           ([-1, 3], r"got \[-1\]$"), ([1.5], "integers")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            cycled_labels(pipe, 2, wrong)
    with pytest.raises(ValueError, match="EDM2Pipeline has no null class"):
        cycled_labels(load_pipeline("mnist-edm2"), 2, [3, None])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "mnist-flow"], "repairs images and has no base"),
        (["sample", "mnist-flow", "--prompt", "seven"], "repairs images and has no base"),
        (["sample", "mnist-unet", "--class-labels", "3,10"], "10 is the null class: write none"),
        (["upsample", "mnist-unet", "images"], "no upsampler: it takes 1 channels and gives 1"),
        (["upsample", "mnist-edm2", "images"], "no upsampler"),
        (["upsample", "mnist-flow", "images"], "here are model, scheduler"),
    ],
    ids=" ".join,
)
def test_what_a_model_is_not_for_is_said_before_anything_is_drawn(arguments, message, tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 28, 28, 1), np.uint8))
    arguments = [tmp_path / "images.npz" if word == "images" else word for word in arguments]
    done = invoke(*arguments, "--output", tmp_path / "out", "--num-inference-steps", 2, "--device", "cpu")
    assert done.exit_code == 1 and message in done.output and done.output.count("\n") == 1, done.output
    assert not (tmp_path / "out").exists()


def test_the_word_none_draws_the_null_class(tmp_path):
    common = ("sample", "mnist-unet", "--num-samples", 2, "--num-inference-steps", 2, "--device", "cpu")
    done = invoke(*common, "--class-labels", "none,3", "--format", "npz", "--output", tmp_path)
    assert done.exit_code == 0, done.output
    assert np.load(tmp_path / "samples_2x28x28x1.npz")["arr_1"].tolist() == [10, 3]


def test_bad_input_is_one_line_without_a_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("export", "mnist-unet", tmp_path)
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        f"Error: output folder '{tmp_path}' is not empty; choose a new one or remove it first"
    ]


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ImportError("needs scikit-learn: pip install scikit-learn")

    monkeypatch.setattr(demo, "run_demo", fail)
    result = invoke("demo", "--output", tmp_path)
    assert result.exit_code == 1 and "pip install scikit-learn" in result.output


def test_images_depend_on_seed_and_position_alone():
    pipe = load_pipeline("mnist-unet", "boost-and-skip")
    pipe.set_progress_bar_config(disable=True)
    done, call = [], {"num_inference_steps": 6, "gamma": 4.0, "skip_steps": 1}
    whole = sample_images(pipe, torch.arange(3), 5, batch_size=2, on_batch=done.append, **call)
    assert done == [2, 1] and whole.shape == (3, 1, 28, 28)
    later = sample_images(pipe, torch.arange(1, 3), 6, **call)
    torch.testing.assert_close(whole[1:], later, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="batch_size"):
        sample_images(pipe, torch.arange(3), batch_size=0)


def test_a_first_sample_that_fails_does_not_block_the_corrected_one(tmp_path):
    common = ("sample", "mnist-unet", "--num-samples", 2, "--num-inference-steps", 5, "--device", "cpu")
    for name, wrong, message in (
        ("labels", ("--class-labels", 12), "class labels must be in [0, 9]"),
        ("skip", ("--pipeline", "boost-and-skip", "--skip-steps", 5), "skip_steps"),
    ):
        output = ("--output", tmp_path / name)
        failed = invoke(*common, *wrong, *output)
        assert failed.exit_code == 1 and message in failed.output.replace("\n", " "), failed.output
        assert not (tmp_path / name).exists()
        corrected = [*wrong]
        corrected[-1] = 1
        assert invoke(*common, *corrected, *output).exit_code == 0


def test_a_folder_without_finished_work_is_begun_anew(tmp_path):
    """Whatever its settings and versions, as the version before left it after a sample that failed."""
    (tmp_path / "manifest.json").write_text('{"settings": {"seed": 7}, "versions": {}, "result": null, "shards": []}')
    common = ("sample", "mnist-unet", "--num-samples", 2, "--num-inference-steps", 1, "--device", "cpu")
    result = invoke(*common, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"]["seed"] == 0


def test_an_export_again_changes_nothing(tmp_path):
    assert invoke("export", "mnist-classifier", tmp_path / "out").exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = invoke("export", "mnist-classifier", tmp_path / "out")
    assert again.exit_code == 0 and "out was finished before, nothing to do" in again.output.replace("\n", "")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    weights = next((tmp_path / "out").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    damaged = invoke("export", "mnist-classifier", tmp_path / "out")
    assert damaged.exit_code == 1 and "is not empty" in damaged.output and weights.stat().st_size == 1000


def test_numbers_are_not_written_over_somebody_s_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "mine.json").write_text('{"notes": 1}')
    for target, message in (
        (tmp_path / "mine.json", "was not written by this command"),
        ("/dev/null/a.json", "/dev/null"),
    ):
        result = invoke("evaluate", tmp_path / "images", "--reference", tmp_path / "images", "--json", target)
        assert result.exit_code == 1 and message in result.output.replace("\n", ""), result.output
    assert (tmp_path / "mine.json").read_text() == '{"notes": 1}'
    (tmp_path / "report.html").write_text("mine")
    result = invoke("demo", "--output", tmp_path, "--device", "cpu")
    assert (
        result.exit_code == 1 and "is not empty" in result.output and (tmp_path / "report.html").read_text() == "mine"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ImportError("half imported"), RuntimeError("by a library")])
def test_ctrl_c_is_one_word_and_130(monkeypatch, error):
    """Also where a library made another error of it, and in the middle of imports."""

    def interrupted(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise error from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("diffusers_ext.machine.versions.print_info", interrupted)
    result = invoke("info")
    assert (result.exit_code, result.output) == (130, "Aborted!\n")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_terminated_export_leaves_nothing(tmp_path, tmp_path_factory):
    """After SIGTERM; and after SIGKILL the next start tidies up."""
    script = (
        "import sys, time\nfrom diffusers_ext import cli\nfrom diffusers_ext.hub import export\n"
        "write = export.model_card\n"
        "export.model_card = lambda *given: print('staged', flush=True) or time.sleep(100)\n"
        "cli.main(['export', 'mnist-classifier', sys.argv[1]])"
    )
    said = tmp_path_factory.mktemp("said") / "log"
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = start_fresh(script, tmp_path / "out", said=said)
        wait_until(lambda: said.exists() and said.read_text().endswith("staged\n"), running)
        os.kill(running.pid, number)
        running.join()
        assert running.exitcode == {signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        said.unlink()
        if number != signal.SIGKILL:
            assert not list(tmp_path.iterdir())
    assert invoke("export", "mnist-classifier", tmp_path / "out").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
