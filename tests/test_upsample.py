"""`diffusers-ext upsample`: what `sample` wrote goes through an upsampler, resumable, and bad input is told."""

import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_pipeline_adm_upsampler import LABELS, SMALL, pipeline

from diffusers_ext.cli import main
from diffusers_ext.evaluation import read_images
from diffusers_ext.sampling import sample_to_folder


@pytest.fixture
def model(tmp_path):
    pipeline().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def upsample(model, images, output, *options):
    arguments = ["upsample", model, str(images), "--output", str(output), "--num-inference-steps", "2,1", *options]
    return CliRunner().invoke(main, [*arguments, "--batch-size", "1", "--device", "cpu"])


def test_an_npz_with_its_labels(model, tmp_path):
    np.savez(tmp_path / "small.npz", SMALL, LABELS)
    done = upsample(model, tmp_path / "small.npz", tmp_path / "out", "--format", "npz")
    assert done.exit_code == 0, done.output
    arrays = np.load(tmp_path / "out/samples_2x8x8x3.npz")
    assert arrays["arr_1"].tolist() == LABELS.tolist()
    expected = pipeline()(
        SMALL, class_labels=LABELS, num_inference_steps="2,1", output_type="np",
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
    ).images  # fmt: skip
    assert np.abs(arrays["arr_0"] / 255 - expected).max() < 1.5 / 255
    again = upsample(model, tmp_path / "small.npz", tmp_path / "out", "--format", "npz")
    assert "nothing to do" in again.output
    np.savez(tmp_path / "other.npz", 255 - SMALL, LABELS)
    refused = upsample(model, tmp_path / "other.npz", tmp_path / "out", "--format", "npz")
    assert refused.exit_code == 1 and "images" in refused.output


def test_pictures_need_labels_from_elsewhere(model, tmp_path):
    (tmp_path / "small").mkdir()
    for i, array in enumerate(SMALL):
        Image.fromarray(array).save(tmp_path / f"small/{i}.png")
    done = upsample(model, tmp_path / "small", tmp_path / "out", "--class-labels", "1,3")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["000000.png", "000001.png"]
    np.savez(tmp_path / "small.npz", SMALL, LABELS)
    upsample(model, tmp_path / "small.npz", tmp_path / "same")
    for name in ("000000.png", "000001.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()


def test_read_images_gives_the_same_from_every_container(tmp_path):
    np.savez(tmp_path / "a.npz", SMALL)
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, array in enumerate(SMALL):
            Image.fromarray(array).save(tmp_path / f"folder/{i}.png")
            archive.write(tmp_path / f"folder/{i}.png", f"{i}.png")
    for name in ("a.npz", "folder", "a.zip"):
        images, labels = read_images(tmp_path / name)
        assert np.array_equal(images, SMALL) and labels is None


def test_bad_images(tmp_path):
    np.savez(tmp_path / "few.npz", SMALL, LABELS[:1])
    np.savez(tmp_path / "float.npz", SMALL, LABELS / 2)
    (tmp_path / "sizes").mkdir()
    for size in (4, 5):
        Image.new("RGB", (size, size)).save(tmp_path / f"sizes/{size}.png")
    for name, message in (("few.npz", "a label for each"), ("float.npz", "integers"), ("sizes", "of one size")):
        with pytest.raises(ValueError, match=message):
            read_images(tmp_path / name)


def test_images_must_match_their_number(tmp_path):
    with pytest.raises(ValueError, match="images must be uint8"):
        sample_to_folder(pipeline(), tmp_path / "out", 3, labels=[1], images=SMALL)
