"""The numbers by which the shipped MNIST model is judged, in the feature space of the shipped classifier."""

from importlib.util import find_spec

import torch

from .metrics import (
    average_knn_distance,
    feature_statistics,
    frechet_distance,
    local_outlier_factor,
    rarity_score,
)
from .shipped import load_shipped_classifier

NEIGHBOURS = {"knn_distance": 5, "lof": 20, "rarity": 3}  # k of each metric


@torch.no_grad()
def evaluate_digits(images: torch.Tensor, labels: torch.Tensor) -> dict[str, float | None]:
    """How rare, how faithful and how recognisable generated digits are.

    images: (count, 1, 28, 28) in [0, 1]. labels: (count,), the digits asked for. Features are the 64 penultimate
    activations of the shipped classifier; neighbours are sought among those of 10,000 training images, and the
    Fréchet distance is to all 60,000. It falls with the number of samples, so compare equal numbers only.

    Returns recognised (share classified as its label), knn_distance (mean distance to the 5 nearest training
    images), knn_distance_recognised (the same over the recognised ones alone, None if there are none), lof (local
    outlier factor, k 20; left out where scikit-learn is not installed), rarity (rarity score, k 3, mean over the
    samples inside the real manifold; None if none is), inside (their share) and frechet.
    """
    classifier, reference = load_shipped_classifier()
    outputs = [classifier(batch * 2 - 1) for batch in images.split(500)]
    features = torch.cat([output.features for output in outputs])
    recognised = torch.cat([output.logits for output in outputs]).argmax(1) == labels
    rarity = rarity_score(features, reference.features, NEIGHBOURS["rarity"])
    statistics = feature_statistics(features)
    numbers = {
        "recognised": recognised.double().mean().item(),
        "knn_distance": average_knn_distance(features, reference.features, NEIGHBOURS["knn_distance"]),
        "knn_distance_recognised": average_knn_distance(
            features[recognised], reference.features, NEIGHBOURS["knn_distance"]
        )
        if recognised.any()
        else None,
        "rarity": rarity.mean if rarity.inside else None,
        "inside": rarity.inside,
        "frechet": frechet_distance(statistics.mean, statistics.covariance, reference.mean, reference.covariance),
    }
    if find_spec("sklearn") is not None:
        numbers["lof"] = local_outlier_factor(features, reference.features, NEIGHBOURS["lof"])
    return numbers
