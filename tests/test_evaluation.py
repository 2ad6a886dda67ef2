"""evaluate_digits: the numbers are those of the metrics, in the shipped feature space."""

import pytest
import torch

from diffusers_ext.evaluation import evaluate_digits
from diffusers_ext.metrics import average_knn_distance, frechet_distance, local_outlier_factor, rarity_score
from diffusers_ext.shipped import load_pipeline, load_shipped_classifier


@pytest.fixture(scope="module")
def digits():
    pipe = load_pipeline("mnist-unet")
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(20) % 10
    generator = torch.Generator().manual_seed(0)
    images = pipe(class_labels=labels, num_inference_steps=15, generator=generator, output_type="pt").images
    return images, labels


def test_numbers_are_those_of_the_metrics(digits):
    images, labels = digits
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


def test_wrong_labels_and_noise_show(digits):
    images, labels = digits
    right = evaluate_digits(images, labels)
    assert right["recognised"] > 0.8
    assert evaluate_digits(images, (labels + 1) % 10)["recognised"] < 0.2
    noise = evaluate_digits(torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)), labels)
    for name in ("knn_distance", "lof", "frechet"):
        assert noise[name] > 1.5 * right[name]
    assert noise["inside"] < right["inside"]
