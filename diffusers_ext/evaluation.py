"""How good generated images are: sets on disk against each other, and digits against the shipped MNIST features."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .feature_cache import cache_path, load_features, save_features
from .features import FeatureExtractor, load_extractor
from .image_sets import ImageSet, open_images
from .metrics import (
    average_knn_distance,
    feature_statistics,
    frechet_distance,
    local_outlier_factor,
    precision_recall,
    rarity_score,
)
from .shipped import load_shipped_classifier

LABELS = {
    "frechet": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "knn_distance": "AvgkNN",
    "lof": "local outlier factor",
    "rarity": "rarity score",
    "inside": "inside",
}
MEANINGS = {
    "frechet": "lower is nearer",
    "precision": "samples within the real manifold",
    "recall": "real images within the samples' own",
    "knn_distance": "to the nearest real images; higher is rarer",
    "lof": "about 1 is typical, higher is rarer",
    "rarity": "of the samples inside; higher is rarer",
    "inside": "share of samples that have a rarity score",
}
CAPTION = "Compare equal numbers of images only: the Fréchet distance falls as samples are added."
METRICS = ("frechet", "precision_recall", "knn_distance", "lof", "rarity")
NEIGHBOURS = {"knn_distance": 5, "lof": 20, "rarity": 3, "precision_recall": 3}  # k of each metric


def evaluate_images(
    generated: str | Path,
    reference: str | Path,
    features: str | Callable | FeatureExtractor = "classifier",
    metrics: Sequence[str] | None = None,
    k: Mapping[str, int] | None = None,
    features_model: str | Path | None = None,
    device: str | torch.device | None = None,
    batch_size: int = 64,
    cache: str | Path | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict:
    """How a set of generated images compares with a set of real ones, in a feature space.

    generated, reference: folders, zips or .npz files, see open_images; the reference may also be an .npz of
    statistics, mu (dim,) and sigma (dim, dim), for the Fréchet distance alone. They must be of the same features;
    nothing in such a file says so. A file with both arr_0 and mu is read as images.
    features, features_model, device: see load_extractor.
    metrics: of METRICS; by default all that the reference allows, without lof where scikit-learn is not installed.
    k: neighbours of a metric where they shall differ from NEIGHBOURS, {"lof": 10}.
    cache: folder in which features are kept and found again by the content of the set, the weights of the extractor
    and its version; None keeps none. Features of a callable are never kept.
    on_progress: called with "generated" or "reference", the number of images done, and that of all.

    Returns metrics: the numbers (frechet; precision, recall; knn_distance, AvgkNN; lof; rarity, mean over the samples
    inside the real manifold, None if none is, and inside, their share); and what they stand for: k, features
    (name, weights, dimensions), generated and reference (path, images, sha256, from_cache).

    The Fréchet distance is biased: for one and the same model it falls as the number of samples grows, much so below a
    few times the dimension. Precision and recall depend on both sizes. Compare only numbers of equal counts, of one
    reference set, one extractor and one k, and with published ones only where these are the same.

    Raises ValueError for unknown or repeated metrics, a k that the sets are too small for, metrics that need images
    where the reference is statistics, and what open_images and load_extractor refuse; ImportError if lof is asked for
    without scikit-learn. Sizes and names are checked before any network runs.
    """
    samples = open_images(generated)
    real = read_statistics(Path(reference)) or open_images(reference)
    given = isinstance(real, tuple)
    metrics = _chosen_metrics(metrics, given)
    k = _chosen_k(k, metrics, [len(samples)] if given else [len(samples), len(real)])
    extractor = load_extractor(features, features_model, device)

    def run(name: str, images: ImageSet):
        report = None if on_progress is None else lambda done: on_progress(name, done, len(images))
        return _features(images, extractor, batch_size, cache, report)

    real_features, real_facts = (None, {"path": str(reference)}) if given else run("reference", real)
    sample_features, facts = run("generated", samples)
    return {
        "metrics": _numbers(sample_features, real_features, real if given else None, metrics, k),
        "k": k,
        "features": {
            "name": extractor.name,
            "weights": extractor.identity,
            "dimensions": sample_features.shape[1],
        },
        "generated": facts,
        "reference": real_facts,
    }


def print_evaluation(result: dict, console: Console) -> None:
    """The table of what evaluate_images returned."""
    generated, reference = result["generated"], result["reference"]
    against = f"{reference['images']:,} reference images" if "images" in reference else "reference statistics"
    title = f"{generated['images']:,} generated images against {against}; {result['features']['name']} features"
    table = Table("metric", "k", "value", "meaning", title=title, caption=CAPTION, box=SIMPLE)
    groups = {"precision": "precision_recall", "recall": "precision_recall", "inside": "rarity"}
    for name, value in result["metrics"].items():
        k = result["k"].get(groups.get(name, name), "")
        table.add_row(LABELS[name], str(k), "-" if value is None else f"{value:.4f}", MEANINGS[name])
    console.print(table)


@torch.no_grad()
def evaluate_digits(images: torch.Tensor, labels: torch.Tensor) -> dict[str, float | None]:
    """How rare, how faithful and how recognisable generated digits are.

    images: (count, 1, 28, 28) in [0, 1]. labels: (count,), the digits asked for. Features are the 64 penultimate
    activations of the shipped classifier; neighbours are sought among those of 10,000 training images, and the
    Fréchet distance is to all 60,000. It falls with the number of samples, so compare equal numbers only.

    Returns recognised (share classified as its label), knn_distance (mean distance to the 5 nearest training
    images), knn_distance_recognised (the same over the recognised ones alone, None if there are none), lof (local
    outlier factor, k 20; left out where scikit-learn is not installed), rarity (rarity score, k 3, mean over the
    samples inside the real manifold; None if none is), inside (their share) and frechet; precision and recall (k 3)
    against as many training images as there are samples.
    """
    classifier, reference = load_shipped_classifier()
    outputs = [classifier(batch * 2 - 1) for batch in images.split(500)]
    features = torch.cat([output.features for output in outputs])
    recognised = torch.cat([output.logits for output in outputs]).argmax(1) == labels
    metrics = [name for name in _available() if name != "precision_recall"]
    statistics = (reference.mean, reference.covariance)
    alone = features[recognised]
    equal = reference.features[: len(features)]
    return {
        "recognised": recognised.double().mean().item(),
        "knn_distance_recognised": average_knn_distance(alone, reference.features, NEIGHBOURS["knn_distance"])
        if len(alone)
        else None,
        **_numbers(features, reference.features, statistics, metrics, NEIGHBOURS),
        **_numbers(features, equal, None, ["precision_recall"], NEIGHBOURS),
    }


def _numbers(features, reference, statistics, metrics: Sequence[str], k: Mapping[str, int]) -> dict[str, float | None]:
    """The metrics asked for of features (n, dim) against reference features (m, dim).

    statistics: mean and covariance for the Fréchet distance; None takes those of the reference features.
    """
    numbers: dict[str, float | None] = {}
    for name in metrics:
        if name == "frechet":
            ours = feature_statistics(features)
            if statistics is None:
                real = feature_statistics(reference)
                statistics = real.mean, real.covariance
            if len(statistics[0]) != len(ours.mean):
                raise ValueError(
                    f"the reference's mu has {len(statistics[0])} dimensions, the features have {len(ours.mean)}; "
                    "statistics must be of the same features"
                )
            numbers["frechet"] = frechet_distance(ours.mean, ours.covariance, *statistics)
        elif name == "precision_recall":
            numbers.update(precision_recall(features, reference, k[name])._asdict())
        elif name == "knn_distance":
            numbers[name] = average_knn_distance(features, reference, k[name])
        elif name == "lof":
            numbers[name] = local_outlier_factor(features, reference, k[name])
        elif name == "rarity":
            rarity = rarity_score(features, reference, k[name])
            numbers.update(rarity=rarity.mean if rarity.inside else None, inside=rarity.inside)
    return numbers


def _available() -> list[str]:
    """Every metric but those whose package is not installed."""
    return [name for name in METRICS if name != "lof" or find_spec("sklearn") is not None]


def _chosen_metrics(metrics: Sequence[str] | None, statistics_only: bool) -> list[str]:
    """The metrics to compute, checked against what is there to compute them."""
    if metrics is None:
        return ["frechet"] if statistics_only else _available()
    if not metrics or isinstance(metrics, str) or set(metrics) - set(METRICS) or len(set(metrics)) < len(metrics):
        raise ValueError(f"metrics must be some of {', '.join(METRICS)}, each once, got {metrics!r}")
    if statistics_only and (others := [name for name in metrics if name != "frechet"]):
        raise ValueError(f"{', '.join(others)} need the reference's images, got its statistics; choose frechet alone")
    if "lof" in metrics and "lof" not in _available():
        raise ImportError('lof needs scikit-learn: pip install "diffusers_ext[metrics]"')
    return list(metrics)


def _chosen_k(k: Mapping[str, int] | None, metrics: list[str], counts: list[int]) -> dict[str, int]:
    """k of each metric, checked. counts: of the images generated, and of the reference's if it has any."""
    k = {} if k is None else dict(k)
    if needless := sorted(set(k) - (set(metrics) & set(NEIGHBOURS))):
        raise ValueError(f"k is for those of {', '.join(NEIGHBOURS)} that are computed, got {', '.join(needless)}")
    if "frechet" in metrics and min(counts) < 2:
        raise ValueError(f"frechet needs at least 2 images in each set, got {min(counts)}; choose other metrics")
    k = {name: k.get(name, NEIGHBOURS[name]) for name in metrics if name in NEIGHBOURS}
    for name, value in k.items():
        most = {"knn_distance": counts[1], "precision_recall": min(counts) - 1}.get(name, counts[1] - 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(
                f"{name} of {counts[0]} generated and {counts[1]} reference images needs an integer k with "
                f"1 <= k <= {most}, got {value!r}; choose another, more images or other metrics"
            )
    return k


def read_statistics(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """mu and sigma of an .npz that holds them and no images; None for anything else."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            if "arr_0" in data.files or not {"mu", "sigma"} <= set(data.files):
                return None
            return data["mu"], data["sigma"]
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise ValueError(f"'{path}' cannot be read as .npz: {error}") from error


def _features(
    images: ImageSet,
    extractor: FeatureExtractor,
    batch_size: int,
    cache: str | Path | None,
    on_images: Callable[[int], None] | None,
) -> tuple[np.ndarray, dict]:
    """Features (count, dimensions) of a set, from the cache if they are there, and what the set is."""
    digest = images.content_hash()
    facts = {"path": str(images.path), "images": len(images), "sha256": digest, "from_cache": True}
    kept = None
    if cache is not None and extractor.identity is not None:
        kept = cache_path(cache, digest, extractor.name, extractor.identity)
        if (features := load_features(kept, len(images))) is not None:
            return features, facts
    features, done = None, 0
    for batch in images.batches(batch_size):
        rows = extractor(batch)
        if features is None:
            features = np.empty((len(images), rows.shape[1]), rows.dtype)
        elif rows.shape[1] != features.shape[1]:
            raise ValueError(
                f"{extractor.name} gave {features.shape[1]} features for the first images of '{images.path}' and "
                f"{rows.shape[1]} for later ones of {batch.shape[2]} x {batch.shape[1]}; it needs images of one size"
            )
        features[done : done + len(rows)] = rows
        done += len(rows)
        if on_images is not None:
            on_images(done)
    if kept is not None:
        save_features(kept, features)
    return features, {**facts, "from_cache": False}
