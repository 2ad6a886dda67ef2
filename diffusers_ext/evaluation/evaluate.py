"""How good generated images are: sets on disk against each other, and digits against the shipped MNIST features."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..checkpoints.safe_pickle import as_numbers, safe_load
from ..checkpoints.tensor_files import refusing
from ..metrics import feature_statistics, frechet_distance, nearest_neighbours, precision_recall, rarity_score
from ..metrics.lof import outlier_factors
from ..pipelines.call_arguments import checked_arguments
from ..shipped import load_shipped_classifier
from .cache import cache_path, load_features, save_features
from .extractors import FeatureExtractor, load_extractor
from .images import ImageSet, open_images
from .notes import notes_on

LABELS = {
    "frechet": "Fréchet distance",
    "fid": "FID",
    "fd_dinov2": "FD_DINOv2",
    "precision": "precision",
    "recall": "recall",
    "knn_distance": "AvgkNN",
    "lof": "local outlier factor",
    "rarity": "rarity score",
    "inside": "inside",
}
MEANINGS = {
    "frechet": "lower is nearer",
    "fid": "lower is nearer",
    "fd_dinov2": "lower is nearer",
    "precision": "samples within the real manifold",
    "recall": "real images within the samples' own",
    "knn_distance": "to the nearest real images; higher is rarer",
    "lof": "about 1 is typical, higher is rarer",
    "rarity": "of the samples inside; higher is rarer",
    "inside": "share of samples that have a rarity score",
}
CAPTION = "Compare equal numbers of images only: the Fréchet distance falls as samples are added."
METRICS = ("frechet", "precision_recall", "knn_distance", "lof", "rarity")
PUBLISHED = {"fid": "inception", "fd_dinov2": "dinov2"}  # Fréchet distances that are named after their features
FRECHET = ("frechet", *PUBLISHED)
BLOCKS = 10  # of images, for standard errors
NEIGHBOURS = {"knn_distance": 5, "lof": 20, "rarity": 3, "precision_recall": 3}  # k of each metric


@checked_arguments(but="metrics k")
def evaluate_images(
    generated: str | Path,
    reference: str | Path,
    features: str | Callable | FeatureExtractor | None = None,
    metrics: Sequence[str] | None = None,
    k: Mapping[str, int] | None = None,
    features_model: str | Path | None = None,
    device: str | torch.device | None = None,
    batch_size: int = 64,
    cache: str | Path | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict:
    """How a set of generated images compares with a set of real ones, in a feature space.

    The Fréchet distance is biased: for one and the same model it falls as the number of samples grows, much so below a
    few times the dimension. Precision and recall depend on both sizes. Compare only numbers of equal counts, of one
    reference set, one extractor and one k, and with published ones only where these are the same.

    Args:
        generated: a folder, zip or .npz file of images, see `open_images`. A file with both arr_0 and mu is read as
            images.
        reference: likewise, or statistics, for the Fréchet distance alone: an .npz with mu (dim,) and sigma (dim,
            dim), or one of NVIDIA's .pkl files, see `read_statistics`. They must be of the same features; nothing in
            an .npz says so.
        features: see `load_extractor`. By default the features of fid or fd_dinov2 where that is asked for, else the
            classifier's.
        metrics: of METRICS; by default all that the reference allows, without lof where scikit-learn is not installed.
            Further "fid", the Fréchet distance of "inception" features, or "fd_dinov2", that of "dinov2" features.
        k: neighbours of a metric where they shall differ from NEIGHBOURS, {"lof": 10}.
        features_model: see `load_extractor`.
        device: see `load_extractor`.
        batch_size: images that pass the extractor together.
        cache: folder in which features are kept and found again by the content of the set, the weights of the
            extractor and its version; None keeps none. Features of a callable are never kept.
        on_progress: called with "generated" or "reference", the number of images done, and that of all.

    Returns:
        A dict with metrics, the numbers (frechet; precision, recall; knn_distance, AvgkNN; lof; rarity, mean over the
            samples inside the real manifold, None if none is, and inside, their share); and with what they stand for:
            k, features (name, weights, dimensions), generated and reference (path, images, sha256, from_cache), and
            notes, sentences on what makes the numbers misleading: few images for a Fréchet distance, one set alone
            compressed, lof left out.

    Raises:
        ValueError: for unknown or repeated metrics, a k that the sets are too small for, metrics that need images
            where the reference is statistics, and what `open_images` and `load_extractor` refuse. Sizes and names are
            checked before any network runs.
        ImportError: if lof is asked for without scikit-learn.
    """
    samples = open_images(generated)
    features = _chosen_features(features, metrics)
    real = read_statistics(Path(reference), _space(features)) or open_images(reference)
    given, asked = isinstance(real, tuple), metrics
    metrics = _chosen_metrics(asked, given)
    k = _chosen_k(k, metrics, [len(samples)] if given else [len(samples), len(real)])
    extractor = load_extractor(features, features_model, device)

    def run(name: str, images: ImageSet):
        report = None if on_progress is None else lambda done: on_progress(name, done, len(images))
        return _features(images, extractor, batch_size, cache, report)

    real_features, real_facts = (None, {"path": str(reference)}) if given else run("reference", real)
    sample_features, facts = run("generated", samples)
    distance = any(name in FRECHET for name in metrics)
    without_lof = asked is None and not given and "lof" not in metrics
    return {
        "metrics": measure_features(sample_features, real_features, real if given else None, metrics, k),
        "k": k,
        "features": {
            "name": extractor.name,
            "weights": extractor.identity,
            "dimensions": sample_features.shape[1],
        },
        "generated": facts,
        "reference": real_facts,
        "notes": notes_on(samples, None if given else real, sample_features.shape[1], distance, without_lof),
    }


def print_evaluation(result: dict, console: Console) -> None:
    """The table of what evaluate_images returned.

    Args:
        result: what `evaluate_images` returned.
        console: where the table goes.
    """
    generated, reference = result["generated"], result["reference"]
    against = f"{reference['images']:,} reference images" if "images" in reference else "reference statistics"
    title = f"{generated['images']:,} generated images against {against}; {result['features']['name']} features"
    table = Table("metric", "k", "value", "meaning", title=title, caption=CAPTION, box=SIMPLE)
    groups = {"precision": "precision_recall", "recall": "precision_recall", "inside": "rarity"}
    for name, value in result["metrics"].items():
        k = result["k"].get(groups.get(name, name), "")
        table.add_row(LABELS[name], str(k), "-" if value is None else f"{value:.4f}", MEANINGS[name])
    console.print(table)
    for note in result["notes"]:
        console.print(f"Note: {note}.", markup=False, highlight=False)


@checked_arguments
@torch.no_grad()
def evaluate_digits(
    images: torch.Tensor, labels: torch.Tensor, metrics: Sequence[str] | None = None, with_errors: bool = False
) -> dict[str, float | None]:
    """How rare, how faithful and how recognisable generated digits are.

    Features are the 64 penultimate activations of the shipped classifier; neighbours are sought among those of 10,000
    training images, and the Fréchet distance is to all 60,000. It falls with the number of samples, so compare equal
    numbers only.

    Args:
        images: (count, 1, 28, 28) in [0, 1].
        labels: (count,), the digits asked for.
        metrics: of METRICS; by default all.
        with_errors: the standard error of each number as well, see `_errors`; it needs 20 images or more.

    Returns:
        A dict with recognised (share classified as its label) and of the metrics: knn_distance (mean distance to the 5
            nearest training images), knn_distance_recognised (the same over the recognised ones alone, None if there
            are none), lof (local outlier factor, k 20; left out where scikit-learn is not installed), rarity (rarity
            score, k 3, mean over the samples inside the real manifold; None if none is), inside (their share),
            frechet; precision and recall (k 3) against as many training images as there are samples. With errors, each
            has its own as frechet_error and so on, None where a tenth left out leaves no number.

    Raises:
        ValueError: for images and labels of another form or range, for unknown or repeated metrics, and for fewer
            images than errors need.
    """
    _check_digits(images, labels)
    _chosen_features("classifier", metrics)  # refuses fid and fd_dinov2
    metrics = _chosen_metrics(metrics, statistics_only=False)
    classifier, reference = load_shipped_classifier()
    classifier, labels = classifier.to(images.device), labels.to(images.device)
    outputs = [classifier(batch.float() * 2 - 1) for batch in images.split(500)]
    features = torch.cat([output.features for output in outputs])
    recognised = torch.cat([output.logits for output in outputs]).argmax(1) == labels
    scores = _scores(features, reference.features, metrics, NEIGHBOURS)
    numbers = _digit_numbers(features, recognised, reference, metrics, scores)
    if with_errors:
        numbers |= _errors(features, recognised, labels, reference, metrics, scores)
    return numbers


def _digit_numbers(features, recognised, reference, metrics: Sequence[str], scores) -> dict[str, float | None]:
    """See `evaluate_digits`. features (count, dim), recognised (count,), scores: of the samples. reference: real."""
    numbers: dict[str, float | None] = {"recognised": recognised.cpu().double().mean().item()}
    if "knn_distance" in metrics:
        numbers["knn_distance_recognised"] = _mean(scores["knn_distance"][recognised.cpu().numpy()])
    statistics, real = (reference.mean, reference.covariance), reference.features[: len(features)]
    return numbers | _numbers(features, real, statistics, metrics, NEIGHBOURS, scores)


def _errors(features, recognised, labels, reference, metrics: Sequence[str], scores) -> dict[str, float | None]:
    r"""Standard errors by the jackknife, B = `BLOCKS` blocks left out one at a time (Efron and Stein, 1981).

    .. math:: \mathrm{se}^2 = \frac{B - 1}{B} \sum_b (\theta_{(b)} - \bar\theta)^2

    theta_(b) is the number without block b of the images, which are dealt at random, each class over all blocks, and
    the same way each time. It is the error of sampling with the labels given: what a Fréchet distance of few images
    is too high by is not in it.
    """
    if len(features) < 2 * BLOCKS:
        raise ValueError(f"standard errors need {2 * BLOCKS} images or more, got {len(features)}")
    shuffled = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    order = shuffled[labels.cpu()[shuffled].argsort(stable=True)]
    dealt = torch.empty_like(order)
    dealt[order] = torch.arange(len(order)) % BLOCKS
    without = []
    for block in range(BLOCKS):
        rest = dealt != block
        kept, left = rest.to(features.device), {name: values[rest.numpy()] for name, values in scores.items()}
        without.append(_digit_numbers(features[kept], recognised[kept], reference, metrics, left))
    errors: dict[str, float | None] = {}
    for name in without[0]:
        values = [numbers[name] for numbers in without]
        missing = any(value is None for value in values)
        errors[f"{name}_error"] = None if missing else float(np.std(values) * (BLOCKS - 1) ** 0.5)
    return errors


def _check_digits(images: torch.Tensor, labels: torch.Tensor) -> None:
    """Raises ValueError for what are no digits in [0, 1] and their labels."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1:] != (1, 28, 28) or not len(images):
        shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor (count, 1, 28, 28), got {shape}")
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"images must be floating point in [0, 1], got {images.dtype} from {images.min()} to {images.max()}"
        )
    whole = isinstance(labels, torch.Tensor) and not (labels.is_floating_point() or labels.dtype == torch.bool)
    if not whole or labels.shape != images.shape[:1] or not (labels.min() >= 0 and labels.max() <= 9):
        raise ValueError(f"labels must be integers in [0, 9], a tensor of one an image, got {labels!r:.200}")


def measure_features(
    features: torch.Tensor,
    reference: torch.Tensor | None,
    statistics: tuple | None = None,
    metrics: Sequence[str] = METRICS,
    k: Mapping[str, int] = NEIGHBOURS,
) -> dict[str, float | None]:
    """The numbers of `evaluate_images`, of features instead of images.

    Args:
        features: (n, dim), of the samples.
        reference: (m, dim), of real images; None where the Fréchet distance alone is asked for.
        statistics: their mean and covariance, of more images perhaps; None takes those of `reference`.
        metrics: of `METRICS`.
        k: neighbours of each metric that has them.

    Raises:
        ValueError: as the metrics themselves.
    """
    return _numbers(features, reference, statistics, metrics, k, _scores(features, reference, metrics, k))


def _scores(features, reference, metrics: Sequence[str], k: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Each sample's share, (n,), of the metrics asked for that are means over the samples; see `_numbers`."""
    scores = {}
    if "knn_distance" in metrics:
        scores["knn_distance"] = nearest_neighbours(features, reference, k["knn_distance"])[0].mean(axis=1)
    if "lof" in metrics:
        scores["lof"] = outlier_factors(features, reference, k["lof"])
    if "rarity" in metrics:
        scores["rarity"] = rarity_score(features, reference, k["rarity"]).scores
    return scores


def _numbers(
    features, reference, statistics, metrics: Sequence[str], k: Mapping[str, int], scores: Mapping[str, np.ndarray]
) -> dict[str, float | None]:
    """The metrics asked for of features (n, dim) against reference features (m, dim).

    statistics: mean and covariance for the Fréchet distance; None takes those of the reference features. scores: what
    `_scores` returned of these samples.
    """
    numbers: dict[str, float | None] = {}
    for name in metrics:
        if name in FRECHET:
            ours = feature_statistics(features)
            if statistics is None:
                real = feature_statistics(reference)
                statistics = real.mean, real.covariance
            if len(statistics[0]) != len(ours.mean):
                raise ValueError(
                    f"the reference's mu has {len(statistics[0])} dimensions, the features have {len(ours.mean)}; "
                    "statistics must be of the same features"
                )
            numbers[name] = frechet_distance(ours.mean, ours.covariance, *statistics)
        elif name == "precision_recall":
            numbers.update(precision_recall(features, reference, k[name])._asdict())
        elif name == "rarity":
            inside = ~np.isnan(scores[name])
            numbers.update(rarity=_mean(scores[name][inside]), inside=_mean(inside))
        else:
            numbers[name] = _mean(scores[name])
    return numbers


def _mean(values: np.ndarray) -> float | None:
    """None of no values."""
    return float(values.mean()) if len(values) else None


def _available() -> list[str]:
    """Every metric but those whose package is not installed."""
    return [name for name in METRICS if name != "lof" or find_spec("sklearn") is not None]


def _chosen_metrics(metrics: Sequence[str] | None, statistics_only: bool) -> list[str]:
    """The metrics to compute, checked against what is there to compute them."""
    if metrics is None:
        return ["frechet"] if statistics_only else _available()
    known = (*METRICS, *PUBLISHED)
    if not metrics or isinstance(metrics, str) or set(metrics) - set(known) or len(set(metrics)) < len(metrics):
        raise ValueError(f"metrics must be some of {', '.join(known)}, each once, got {metrics!r}")
    if statistics_only and (others := [name for name in metrics if name not in FRECHET]):
        raise ValueError(f"{', '.join(others)} need the reference's images, got its statistics; choose frechet alone")
    if "lof" in metrics and "lof" not in _available():
        raise ImportError("lof needs scikit-learn: pip install scikit-learn")
    return list(metrics)


def _chosen_features(features, metrics: Sequence[str] | None) -> str | Callable | FeatureExtractor:
    """The features given, those that a metric is named after, or the classifier's."""
    named = {} if isinstance(metrics, str) else {name: PUBLISHED[name] for name in metrics or () if name in PUBLISHED}
    if not named:
        return "classifier" if features is None else features
    if len(named) > 1 or (features is not None and _space(features) not in named.values()):
        raise ValueError(
            "fid is the Fréchet distance of inception features and fd_dinov2 that of dinov2 features: ask for one of"
            f" them at a time, without other features; got metrics={list(metrics)} and features={features!r}"
        )
    return next(iter(named.values())) if features is None else features


def _space(features: str | Callable | FeatureExtractor) -> str | None:
    """The name of a feature space; None for a function's."""
    if isinstance(features, FeatureExtractor):
        return features.name
    return features if isinstance(features, str) else None


def _chosen_k(k: Mapping[str, int] | None, metrics: list[str], counts: list[int]) -> dict[str, int]:
    """k of each metric, checked. counts: of the images generated, and of the reference's if it has any."""
    k = {} if k is None else dict(k)
    if needless := sorted(set(k) - (set(metrics) & set(NEIGHBOURS))):
        raise ValueError(f"k is for those of {', '.join(NEIGHBOURS)} that are computed, got {', '.join(needless)}")
    if (frechet := [name for name in metrics if name in FRECHET]) and min(counts) < 2:
        raise ValueError(f"{frechet[0]} needs at least 2 images in each set, got {min(counts)}; choose other metrics")
    k = {name: k.get(name, NEIGHBOURS[name]) for name in metrics if name in NEIGHBOURS}
    for name, value in k.items():
        most = {"knn_distance": counts[1], "precision_recall": min(counts) - 1}.get(name, counts[1] - 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(
                f"{name} of {counts[0]} generated and {counts[1]} reference images needs an integer k with "
                f"1 <= k <= {most}, got {value!r}; choose another, more images or other metrics"
            )
    return k


def read_statistics(path: Path, features: str | None = None) -> tuple[np.ndarray, np.ndarray] | None:
    """mu (dim,) and sigma (dim, dim) of a file that holds them; None for anything else.

    Args:
        path: an .npz without images, or a .pkl as NVIDIA's EDM2 writes it, {"fid": {"mu", "sigma"}, "fd_dinov2":
            {...}}, of which nothing is executed.
        features: the name of the feature space, which says what to take from a .pkl.

    Raises:
        ValueError: for files that cannot be read, or that hold nothing of these features.
    """
    if path.suffix.lower() == ".pkl" and path.is_file():
        return _pickled_statistics(path, features)
    if path.suffix.lower() != ".npz" or not path.is_file():
        return None
    with refusing(f"'{path}' cannot be read as .npz"), np.load(path, allow_pickle=False) as data:
        if "arr_0" in data.files or not {"mu", "sigma"} <= set(data.files):
            return None
        return data["mu"], data["sigma"]


def _pickled_statistics(path: Path, features: str | None) -> tuple[np.ndarray, np.ndarray]:
    data = safe_load(path)
    held = data if isinstance(data, dict) else {}
    name = next((name for name, space in PUBLISHED.items() if space == features), None)
    if not isinstance(held.get(name), dict):
        there = ", ".join(f"{n} (of {PUBLISHED[n]} features)" for n in PUBLISHED if n in held) or "no statistics"
        raise ValueError(
            f"'{path}' holds {there}, the features are {features or 'those of a function'}; choose others"
        )
    mu, sigma = (as_numbers(held[name].get(key)) for key in ("mu", "sigma"))
    if not (mu.dtype.kind == sigma.dtype.kind == "f" and mu.ndim == 1 and sigma.shape == (len(mu), len(mu))):
        raise ValueError(
            f"'{path}': mu and sigma of {name} must be arrays of numbers (dim,) and (dim, dim), got {mu.dtype}"
            f" {mu.shape} and {sigma.dtype} {sigma.shape}"
        )
    return mu, sigma


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
