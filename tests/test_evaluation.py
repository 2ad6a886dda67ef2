"""The numbers are those of the metrics: of digits in the shipped feature space, and of sets on disk in any."""

import json
import pickle
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from diffusers_ext import cli
from diffusers_ext.demo.tables import with_notes
from diffusers_ext.evaluation import METRICS, NEIGHBOURS, PUBLISHED, FeatureExtractor, evaluate_digits, evaluate_images
from diffusers_ext.evaluation import evaluate as evaluation
from diffusers_ext.evaluation.extractors import load_extractor
from diffusers_ext.evaluation.notes import few_images
from diffusers_ext.guidance.tuning import reference_statistics
from diffusers_ext.metrics import (
    average_knn_distance,
    frechet_distance,
    local_outlier_factor,
    precision_recall,
    rarity_score,
)
from diffusers_ext.shipped import load_pipeline, load_shipped_classifier


@pytest.fixture(scope="module")
def digits():
    pipe = load_pipeline("mnist-unet")
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(20) % 10
    generator = torch.Generator().manual_seed(0)
    images = pipe(class_labels=labels, num_inference_steps=15, generator=generator, output_type="pt").images
    return images, labels


@pytest.mark.slow
def test_numbers_are_those_of_the_metrics(digits):
    images, labels = digits[0], digits[1].clone()
    labels[0] = 5  # one that is not recognised
    numbers = evaluate_digits(images, labels)
    classifier, reference = load_shipped_classifier()
    with torch.no_grad():
        output = classifier(images * 2 - 1)
    features = output.features
    assert numbers["recognised"] == (output.logits.argmax(1) == labels).double().mean()
    assert numbers["knn_distance"] == pytest.approx(average_knn_distance(features, reference.features, 5), rel=1e-5)
    recognised = output.logits.argmax(1) == labels
    alone = average_knn_distance(features[recognised], reference.features, 5)
    assert numbers["knn_distance_recognised"] == pytest.approx(alone, rel=1e-5)
    assert numbers["lof"] == pytest.approx(local_outlier_factor(features, reference.features, 20), rel=1e-5)
    rarity = rarity_score(features, reference.features, 3)
    assert (numbers["rarity"], numbers["inside"]) == pytest.approx((rarity.mean, rarity.inside), rel=1e-5)
    exact = features.double()
    distance = frechet_distance(exact.mean(0), exact.T.cov(), reference.mean, reference.covariance)
    assert numbers["frechet"] == pytest.approx(distance, rel=1e-5)


@pytest.mark.slow
def test_wrong_labels_and_noise_show(digits):
    images, labels = digits
    right = evaluate_digits(images, labels)
    assert right["recognised"] > 0.8
    assert evaluate_digits(images, (labels + 1) % 10)["recognised"] < 0.2
    noise = evaluate_digits(torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)), labels)
    for name in ("knn_distance", "lof", "frechet"):
        assert noise[name] > 1.5 * right[name]
    assert noise["inside"] < right["inside"]


@pytest.mark.slow
def test_standard_errors_are_those_of_sampling():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(100, 1, 28, 28, generator=generator), torch.zeros(100, dtype=torch.long)
    images *= torch.rand(100, 1, 1, 1, generator=generator)
    numbers = evaluate_digits(images, labels, ["knn_distance"], with_errors=True)
    each = torch.tensor([evaluate_digits(x[None], labels[:1], ["knn_distance"])["knn_distance"] for x in images])
    assert 0.5 < numbers["knn_distance_error"] / (each.std() / 100**0.5).item() < 2  # of ten blocks: 9 degrees
    assert numbers["knn_distance"] == evaluate_digits(images, labels, ["knn_distance"])["knn_distance"]
    alike = evaluate_digits(images[:1].repeat(30, 1, 1, 1), labels[:30], ["knn_distance"], with_errors=True)
    assert alike["knn_distance_error"] == pytest.approx(0, abs=1e-6)


def test_standard_errors_keep_the_classes_as_they_are():
    """Digits that differ between classes alone: each class is dealt over all blocks, so that nothing varies."""
    labels = torch.arange(100) % 10
    images = torch.rand(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))[labels]
    numbers = evaluate_digits(images, labels, ["knn_distance", "frechet"], with_errors=True)
    for name in ("recognised", "knn_distance", "frechet"):
        assert numbers[f"{name}_error"] == pytest.approx(0, abs=1e-6 * abs(numbers[name]) + 1e-6), name
    with pytest.raises(ValueError, match="standard errors need 20 images or more, got 19"):
        evaluate_digits(images[:19], labels[:19], ["frechet"], with_errors=True)


# Sets on disk


RNG = np.random.default_rng(0)
REAL, MADE = RNG.integers(0, 256, (40, 28, 28), dtype=np.uint8), RNG.integers(0, 252, (30, 28, 28), dtype=np.uint8)


def write_sets(folder):
    np.savez(folder / "real.npz", REAL)
    np.savez(folder / "made.npz", MADE)
    (folder / "made").mkdir()
    with ZipFile(folder / "made.zip", "w") as archive:
        for i, image in enumerate(MADE):
            path = folder / f"made/{i:03d}.png"
            Image.fromarray(image).save(path)
            archive.write(path, f"some/{path.name}")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


class Counted:
    """A feature extractor that may be kept, and counts the images that it is given."""

    def __init__(self, identity="1"):
        self.images = 0
        self.extractor = FeatureExtractor("counted", identity, self.compute)

    def compute(self, images):
        self.images += len(images)
        pixels = images[..., 0].astype(np.float32) / 255
        return np.stack([pixels.mean((1, 2)), pixels.std((1, 2)), pixels[:, 3, 4]], axis=1)


def features_of(images):
    return Counted().compute(images[..., None])


def test_all_metrics_are_those_of_the_features(sets):
    made, real = features_of(MADE), features_of(REAL)
    result = evaluate_images(sets / "made", sets / "real.npz", Counted().extractor, batch_size=7)
    exact = made.astype(np.float64), real.astype(np.float64)
    moments = [moment for x in exact for moment in (x.mean(0), np.cov(x, rowvar=False))]
    rarity = rarity_score(made, real, 3)
    expected = {
        "frechet": frechet_distance(*moments),
        **precision_recall(made, real, 3)._asdict(),
        "knn_distance": average_knn_distance(made, real, 5),
        "lof": local_outlier_factor(made, real, 20),
        "rarity": rarity.mean,
        "inside": rarity.inside,
    }
    assert result["metrics"] == pytest.approx(expected, rel=1e-6)
    assert result["k"] == {"knn_distance": 5, "lof": 20, "rarity": 3, "precision_recall": 3}
    assert result["features"] == {"name": "counted", "weights": "1", "dimensions": 3}
    assert (result["generated"]["images"], result["reference"]["images"]) == (30, 40)
    assert json.loads(json.dumps(result)) == result


def test_samples_and_reference_are_not_exchanged(sets):
    """Recall and precision differ between these sets, and exchanging the sets exchanges them."""
    there = evaluate_images(sets / "made", sets / "real.npz", Counted().extractor, ["precision_recall"])["metrics"]
    back = evaluate_images(sets / "real.npz", sets / "made", Counted().extractor, ["precision_recall"])["metrics"]
    assert there == {"precision": back["recall"], "recall": back["precision"]}
    assert there["precision"] != there["recall"]


def test_folder_zip_and_npz_give_the_same_numbers(sets):
    results = [evaluate_images(sets / name, sets / "real.npz") for name in ("made", "made.zip", "made.npz")]
    assert results[0]["metrics"] == results[1]["metrics"] == results[2]["metrics"]
    assert results[0]["features"]["name"] == "classifier" and results[0]["features"]["dimensions"] == 64


@pytest.mark.slow
def test_digits_and_images_agree(sets):
    """evaluate_digits, whose reference is MNIST, and evaluate_images see the same features."""
    digits = evaluate_digits(torch.from_numpy(MADE)[:, None] / 255, torch.zeros(30, dtype=torch.long))
    _, reference = load_shipped_classifier()
    np.savez(sets / "mnist_statistics.npz", mu=reference.mean, sigma=reference.covariance)
    result = evaluate_images(sets / "made.npz", sets / "mnist_statistics.npz")
    assert result["metrics"] == pytest.approx({"frechet": digits["frechet"]}, rel=1e-5)


def test_metrics_and_k_are_chosen(sets):
    call = (sets / "made", sets / "real.npz", Counted().extractor)
    result = evaluate_images(*call, metrics=["lof", "frechet"], k={"lof": 7})
    assert list(result["metrics"]) == ["lof", "frechet"] and result["k"] == {"lof": 7}
    expected = local_outlier_factor(features_of(MADE), features_of(REAL), 7)
    assert result["metrics"]["lof"] == pytest.approx(expected, rel=1e-6)
    for name, function in [("knn_distance", average_knn_distance), ("rarity", rarity_score)]:
        result = evaluate_images(*call, metrics=[name], k={name: 9})
        expected = function(features_of(MADE), features_of(REAL), 9)
        expected = getattr(expected, "mean", expected)
        assert result["metrics"][name] == pytest.approx(expected, rel=1e-6)


def test_statistics_are_a_reference_for_the_frechet_distance(sets, tmp_path):
    whole = evaluate_images(sets / "made", sets / "real.npz", Counted().extractor, ["frechet"])
    real = features_of(REAL).astype(np.float64)
    np.savez(tmp_path / "statistics.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False), extra=1)
    result = evaluate_images(sets / "made", tmp_path / "statistics.npz", Counted().extractor)
    assert result["metrics"] == pytest.approx(whole["metrics"], rel=1e-9)
    assert result["reference"] == {"path": str(tmp_path / "statistics.npz")}
    with pytest.raises(
        ValueError, match="lof, rarity need the reference's images, got its statistics; choose frechet"
    ):
        evaluate_images(sets / "made", tmp_path / "statistics.npz", Counted().extractor, ["lof", "frechet", "rarity"])
    with pytest.raises(ValueError, match=r"mu has 3 dimensions, the features have 64; .* of the same features"):
        evaluate_images(sets / "made", tmp_path / "statistics.npz")
    with pytest.raises(ValueError, match="no arr_0, the array of images; it holds mu, sigma"):
        evaluate_images(tmp_path / "statistics.npz", sets / "real.npz", Counted().extractor)


def nvidia_file(path, **features):
    """Reference statistics as NVIDIA's calculate_metrics.py writes them, of features (count, dim) by metric."""
    statistics = {"num_images": 40}
    for name, rows in features.items():
        rows = rows.astype(np.float64)
        statistics[name] = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}
    path.write_bytes(pickle.dumps(statistics, protocol=4))
    return path


@pytest.mark.parametrize(("metric", "space"), PUBLISHED.items())
def test_nvidias_statistics_are_read_by_the_name_of_the_metric(sets, tmp_path, metric, space):
    other = {"fid": "fd_dinov2", "fd_dinov2": "fid"}[metric]
    path = nvidia_file(tmp_path / "img.pkl", **{metric: features_of(REAL), other: np.eye(5)})
    extractor = FeatureExtractor(space, None, Counted().extractor.compute)
    expected = evaluate_images(sets / "made", sets / "real.npz", extractor, ["frechet"])["metrics"]["frechet"]
    assert evaluate_images(sets / "made", path, extractor, [metric])["metrics"] == {metric: pytest.approx(expected)}
    assert evaluate_images(sets / "made", path, extractor)["metrics"] == {"frechet": pytest.approx(expected)}
    both = evaluate_images(sets / "made", sets / "real.npz", extractor, [metric, "knn_distance"])["metrics"]
    assert both[metric] == pytest.approx(expected) and set(both) == {metric, "knn_distance"}
    with pytest.raises(ValueError, match="knn_distance need the reference's images"):
        evaluate_images(sets / "made", path, extractor, [metric, "knn_distance"])
    mean, _ = reference_statistics(path, extractor)
    np.testing.assert_allclose(mean, features_of(REAL).mean(0), rtol=1e-6)


def test_pickles_without_the_statistics_are_refused(sets, tmp_path):
    path = nvidia_file(tmp_path / "img.pkl", fid=features_of(REAL))
    call = (sets / "made", path)
    with pytest.raises(ValueError, match=r"holds fid \(of inception features\), the features are dinov2; choose"):
        evaluate_images(*call, "dinov2")
    with pytest.raises(ValueError, match="the features are those of a function"):
        evaluate_images(*call, features_of)
    with pytest.raises(ValueError, match="the features are classifier"):
        evaluate_images(*call)
    for wrong in ({"mu": np.zeros(3), "sigma": np.eye(2)}, {"mu": "text", "sigma": np.eye(2)}, {"sigma": np.eye(2)}):
        path.write_bytes(pickle.dumps({"fid": wrong}))
        with pytest.raises(ValueError, match="mu and sigma of fid must be arrays of numbers"):
            evaluate_images(*call, "inception")
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="holds no statistics"):
        evaluate_images(*call, "inception")

    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    path.write_bytes(pickle.dumps({"fid": Hostile()}))
    with pytest.raises(ValueError, match="not on the allow-list"):
        evaluate_images(*call, "inception")
    assert not (tmp_path / "executed").exists()


def test_a_file_with_images_and_statistics_is_read_as_images(sets, tmp_path):
    np.savez(tmp_path / "both.npz", REAL, mu=np.zeros(3), sigma=np.eye(3))
    expected = evaluate_images(sets / "made", sets / "real.npz", Counted().extractor)["metrics"]
    assert evaluate_images(sets / "made", tmp_path / "both.npz", Counted().extractor)["metrics"] == expected


def test_features_are_kept_and_found_by_content(sets, tmp_path):
    first = Counted()
    expected = evaluate_images(sets / "made", sets / "real.npz", first.extractor, cache=tmp_path)
    assert first.images == 70 and not expected["generated"]["from_cache"]
    again = Counted()
    found = evaluate_images(sets / "made.zip", sets / "real.npz", again.extractor, cache=tmp_path)
    assert again.images == 0 and found["generated"]["from_cache"] and found["reference"]["from_cache"]
    assert found["metrics"] == expected["metrics"]
    for cache, identity, images in [(None, "1", 70), (tmp_path / "other", "1", 70), (tmp_path, "2", 70)]:
        counted = Counted(identity)
        assert (
            evaluate_images(sets / "made", sets / "real.npz", counted.extractor, cache=cache)["metrics"]
            == (expected["metrics"])
        )
        assert counted.images == images


def test_a_changed_image_is_computed_again(tmp_path):
    write_sets(tmp_path)
    evaluate_images(tmp_path / "made", tmp_path / "real.npz", Counted().extractor, cache=tmp_path / "cache")
    Image.fromarray(255 - MADE[3]).save(tmp_path / "made/003.png")
    counted = Counted()
    result = evaluate_images(tmp_path / "made", tmp_path / "real.npz", counted.extractor, cache=tmp_path / "cache")
    assert counted.images == 30
    assert result["reference"]["from_cache"] and not result["generated"]["from_cache"]


def test_changed_weights_are_computed_again(sets, tmp_path, monkeypatch):
    """A cache hit skips the network itself, and another checkpoint under the same name is no hit."""
    calls, plain = [], Dinov2Model.forward

    def counted(self, pixel_values, **kwargs):
        calls.append(len(pixel_values))
        return plain(self, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(Dinov2Model, "forward", counted)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14)
    model = Dinov2Model(config)
    for _ in range(2):
        model.save_pretrained(tmp_path / "model")
        for expected in ([16, 14], []):
            calls.clear()
            call = {"features": "dinov2", "features_model": tmp_path / "model", "metrics": ["knn_distance"]}
            evaluate_images(sets / "made", sets / "made.npz", **call, cache=tmp_path / "cache", batch_size=16)
            assert calls == [*expected, *expected]
        torch.nn.init.normal_(model.layernorm.bias)


def test_a_damaged_cache_is_computed_again(sets, tmp_path):
    expected = evaluate_images(sets / "made", sets / "real.npz", Counted().extractor, cache=tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-3])
    for images in (70, 0):
        counted = Counted()
        result = evaluate_images(sets / "made", sets / "real.npz", counted.extractor, cache=tmp_path)
        assert counted.images == images and result["metrics"] == expected["metrics"]


def test_a_callable_is_computed_every_time(sets, tmp_path):
    seen = []

    def brightness(images):
        seen.append(len(images))
        return torch.stack([images.float().mean((1, 2, 3)), images.float().std((1, 2, 3))], 1)

    for _ in range(2):
        evaluate_images(sets / "made", sets / "real.npz", brightness, ["frechet"], cache=tmp_path, device="cpu")
    assert sum(seen) == 140 and list(tmp_path.iterdir()) == []


def test_progress_is_told(sets):
    told = []
    evaluate_images(
        sets / "made", sets / "real.npz", Counted().extractor, ["frechet"], batch_size=25,
        on_progress=lambda *progress: told.append(progress),
    )  # fmt: skip
    assert told == [("reference", 25, 40), ("reference", 40, 40), ("generated", 25, 30), ("generated", 30, 30)]


def test_without_scikit_learn_lof_is_left_out_or_missed(sets, monkeypatch):
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    call = (sets / "made", sets / "real.npz", Counted().extractor)
    assert "lof" not in evaluate_images(*call)["metrics"]
    with pytest.raises(ImportError, match="lof needs scikit-learn: pip install scikit-learn"):
        evaluate_images(*call, metrics=["lof"])


def test_rarity_of_samples_far_from_everything_is_none(tmp_path):
    np.savez(tmp_path / "real.npz", REAL // 16)
    np.savez(tmp_path / "made.npz", 255 - MADE // 16)
    result = evaluate_images(tmp_path / "made.npz", tmp_path / "real.npz", Counted().extractor, ["rarity"])
    assert result["metrics"] == {"rarity": None, "inside": 0}


def test_sizes_that_change_within_a_set_are_named_where_they_matter(tmp_path):
    for i, size in enumerate([28, 28, 20]):
        Image.fromarray(MADE[i, :size, :size]).save(tmp_path / f"{i}.png")
    call = (tmp_path, tmp_path)
    result = evaluate_images(*call, Counted().extractor, ["knn_distance"], k={"knn_distance": 1})
    assert result["metrics"] == {"knn_distance": 0}
    with pytest.raises(ValueError, match="classifier knows grey digits of 28 x 28 pixels, got grey images of 20 x 20"):
        evaluate_images(*call, metrics=["frechet"])
    pixels = FeatureExtractor("pixels", None, lambda images: images.reshape(len(images), -1))
    with pytest.raises(ValueError, match=r"gave 784 features for the first .* and 400 for later ones of 20 x 20"):
        evaluate_images(*call, pixels, ["frechet"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"metrics": ["is"]}, "metrics must be some of frechet, precision_recall, .*fd_dinov2, each once, got"),
        ({"metrics": ["fid"]}, "fid is the Fréchet distance of inception features .* ask for one of them at a time"),
        ({"metrics": ["lof", "lof"]}, "each once"),
        ({"metrics": []}, "metrics must be some of"),
        ({"metrics": "lof"}, "metrics must be some of"),
        ({"metrics": ["lof"], "k": {"lof": 0}}, "lof of 30 generated and 40 reference images .* 1 <= k <= 39, got 0"),
        ({"metrics": ["lof"], "k": {"lof": 40}}, "1 <= k <= 39, got 40; choose another, more images or other metrics"),
        ({"metrics": ["lof"], "k": {"lof": 2.0}}, "needs an integer k .* got 2.0"),
        ({"metrics": ["rarity"], "k": {"rarity": 40}}, "rarity of .* 1 <= k <= 39, got 40"),
        ({"metrics": ["knn_distance"], "k": {"knn_distance": 41}}, "1 <= k <= 40, got 41"),
        ({"metrics": ["precision_recall"], "k": {"precision_recall": 30}}, "1 <= k <= 29, got 30"),
        ({"metrics": ["lof"], "k": {"rarity": 3}}, "k is for those of .* that are computed, got rarity"),
        ({"k": {"frechet": 3}}, "k is for those of .* that are computed, got frechet"),
    ],
)
def test_wrong_settings_are_named_before_a_network_runs(sets, call, message):
    counted = Counted()
    with pytest.raises(ValueError, match=message):
        evaluate_images(sets / "made", sets / "real.npz", counted.extractor, **call)
    assert counted.images == 0


def test_sets_that_are_too_small_or_broken_are_named(sets, tmp_path):
    np.savez(tmp_path / "one.npz", MADE[:1])
    for pair in ((tmp_path / "one.npz", sets / "real.npz"), (sets / "made", tmp_path / "one.npz")):
        with pytest.raises(ValueError, match="frechet needs at least 2 images in each set, got 1"):
            evaluate_images(*pair, Counted().extractor)
    (tmp_path / "broken.npz").write_bytes((sets / "real.npz").read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"broken\.npz' cannot be read"):
        evaluate_images(sets / "made", tmp_path / "broken.npz", Counted().extractor)
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match=r"objects\.npz' cannot be read as \.npz"):
        evaluate_images(sets / "made", tmp_path / "objects.npz", Counted().extractor)


# The command


def invoke(*arguments):
    return CliRunner().invoke(cli.main, ["evaluate", *(str(argument) for argument in arguments)])


def test_the_command_prints_and_writes_what_it_measured(sets, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path / "cache"))
    call = (
        sets / "made",
        "--reference",
        sets / "real.npz",
        "--device",
        "cpu",
        "--json",
        tmp_path / "new/numbers.json",
    )
    result = invoke(*call)
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "new/numbers.json").read_text())
    expected = evaluate_images(sets / "made", sets / "real.npz", device="cpu")
    assert saved["metrics"] == expected["metrics"] and saved["versions"]["torch"] == version("torch")
    for text in ("30 generated images against 40 reference", "classifier", f"{expected['metrics']['frechet']:.4f}"):
        assert text in result.output
    assert len(list((tmp_path / "cache/features").iterdir())) == 2
    assert invoke(*call).exit_code == 0
    saved = json.loads((tmp_path / "new/numbers.json").read_text())
    assert saved["generated"]["from_cache"] and saved["metrics"] == expected["metrics"]


def test_the_command_takes_metrics_k_cache_and_code(sets, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path / "cache"))
    code = "def means(images):\n    return images.float().mean(3).flatten(1)\n"
    (tmp_path / "own.py").write_text(code)
    call = (sets / "made", "--reference", sets / "real.npz", "--device", "cpu", "--json", tmp_path / "numbers.json")
    result = invoke(
        *call, "--metric", "rarity", "--metric", "knn_distance", "--k", "rarity=9", "--k", "knn_distance=2",
        "--features", f"{tmp_path}/own.py:means",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "numbers.json").read_text())
    assert list(saved["metrics"]) == ["rarity", "inside", "knn_distance"]
    assert saved["k"] == {"rarity": 9, "knn_distance": 2}
    made, real = (x.astype(np.float64).mean(2) for x in (MADE, REAL))
    assert saved["metrics"]["knn_distance"] == pytest.approx(average_knn_distance(made, real, 2), rel=1e-5)
    assert not (tmp_path / "cache").exists()
    assert invoke(*call, "--metric", "frechet", "--cache", tmp_path / "here").exit_code == 0
    assert len(list((tmp_path / "here").iterdir())) == 2 and not (tmp_path / "cache").exists()
    assert invoke(*call, "--metric", "frechet", "--no-cache").exit_code == 0
    assert not json.loads((tmp_path / "numbers.json").read_text())["generated"]["from_cache"]
    assert not (tmp_path / "cache").exists()


def test_the_command_takes_a_dinov2_folder(sets, tmp_path):
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "model")
    result = invoke(
        sets / "made", "--reference", sets / "made.zip", "--features", "dinov2", "--features-model",
        tmp_path / "model", "--metric", "frechet", "--no-cache", "--batch-size", 8,
        "--json", tmp_path / "numbers.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "numbers.json").read_text())
    assert saved["metrics"]["frechet"] < 1e-9 and saved["features"]["dimensions"] == 8


def test_the_command_measures_fd_dinov2_against_nvidias_file(sets, tmp_path):
    """The features need not be named; the picture goes the authors' way, through Pillow and ImageNet's moments."""
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "model")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    rows = []
    for image in np.repeat(REAL[..., None], 3, axis=-1):
        resized = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
        pixels = (np.asarray(resized) / 255 - mean) / std
        with torch.no_grad():
            sample = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
            rows.append(model(pixel_values=sample).last_hidden_state[0, 0].numpy())
    path = nvidia_file(tmp_path / "img.pkl", fd_dinov2=np.stack(rows))
    result = invoke(
        sets / "real.npz", "--reference", path, "--metric", "fd_dinov2", "--features-model", tmp_path / "model",
        "--no-cache", "--device", "cpu", "--json", tmp_path / "numbers.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "reference statistics; dinov2 features" in " ".join(result.output.split()) and "FD_DINOv2" in result.output
    assert json.loads((tmp_path / "numbers.json").read_text())["metrics"]["fd_dinov2"] < 1e-6
    (tmp_path / "img.pkl").write_bytes(pickle.dumps({"fd_dinov2": print}))
    refused = invoke(sets / "made", "--reference", path, "--metric", "fd_dinov2")
    assert refused.exit_code == 1 and "wants builtins.print" in refused.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--metric", "is"), 2, "'is' is not one of"),
        (("--metric", "fid", "--metric", "fd_dinov2"), 1, "ask for one of them at a time"),
        (
            ("--metric", "fid", "--features", "dinov2"),
            1,
            "without other features; got metrics=['fid'] and features='di",
        ),
        (("--k", "lof"), 2, "'lof' must be METRIC=K with a whole number"),
        (("--k", "lof=-3"), 2, "must be METRIC=K"),
        (("--k", "lof=3", "--k", "lof=4"), 2, "once a metric"),
        (("--k", "lof=90"), 1, "Error: lof of 30 generated and 40 reference images needs an integer k"),
        (("--cache", "here", "--no-cache"), 2, "--cache and --no-cache exclude each other"),
        (("--features", "vgg"), 1, "Error: features must be one of classifier, dinov2, inception or module:function"),
        (("--features", "no_such_module_anywhere:f"), 1, "Error: No module named"),
        (("--reference", "missing"), 1, "Error: no images at 'missing': there is no such file or folder"),
    ],
)
def test_wrong_arguments_are_one_line(sets, arguments, code, message):
    result = invoke(sets / "made", "--reference", sets / "real.npz", *arguments)
    assert result.exit_code == code and message in result.output and "Traceback" not in result.output


def test_the_command_offers_every_metric():
    (option,) = [option for option in cli.main.commands["evaluate"].params if option.name == "metrics"]
    assert tuple(option.type.choices) == (*METRICS, *PUBLISHED)
    help_text = invoke("--help").output
    assert " ".join(help_text.split()).count("5 for knn_distance, 20 for lof, 3 for rarity and precision_recall") == 1
    assert NEIGHBOURS == {"knn_distance": 5, "lof": 20, "rarity": 3, "precision_recall": 3}


def test_what_makes_numbers_misleading_is_said(tmp_path, monkeypatch):
    """Few images, a compressed set against another, a metric that is left out; in the result and in print."""
    random = np.random.default_rng(0)
    for name, suffix, count in (("png", "png", 8), ("jpeg", "jpg", 30), ("more", "jpeg", 30)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (28, 28), np.uint8)).save(tmp_path / name / f"{i}.{suffix}")
    few, packed = "8 generated images for 64 features", "generated images are PNG, the real ones JPEG"
    said = evaluate_images(tmp_path / "png", tmp_path / "jpeg", metrics=["frechet"])["notes"]
    assert [note.split(":")[0] for note in said] == [few, "30 real images for 64 features", f"the {packed}"]
    assert evaluate_images(tmp_path / "more", tmp_path / "jpeg", metrics=["knn_distance"])["notes"] == []
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    done = CliRunner().invoke(cli.main, ["evaluate", f"{tmp_path / 'png'}", "--reference", f"{tmp_path / 'jpeg'}"])
    printed = " ".join(done.output.split())
    assert all(note in printed for note in (few, packed, "(lof) is left out: it needs scikit-learn")), done.output
    assert few_images(192, 64) is None and few_images(191, 64)
    with pytest.warns(UserWarning, match="the real ones JPEG"):
        reference_statistics(tmp_path / "jpeg", load_extractor("classifier"))
    assert "left out" in with_notes("A legend.", 200, without_lof=True) and "50 images" in with_notes("A legend.", 50)
