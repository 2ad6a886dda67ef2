"""How good a set of samples is: distances between sets of features, and measures of token sequences and texts.

The former take features, not images: arrays or tensors (samples, dimensions) of a network that the caller
chooses. State the network, the number of samples and k beside every number.
"""

from .frechet import FeatureStatistics, feature_statistics, frechet_distance
from .lof import local_outlier_factor
from .neighbours import (
    PrecisionRecall,
    RarityScore,
    average_knn_distance,
    nearest_neighbours,
    precision_recall,
    rarity_score,
)
from .sequences import (
    HistogramDistance,
    countdown_errors,
    countdown_errors_original,
    countdown_sequences,
    countdown_wrong,
    generative_perplexity,
    histogram_distance,
    unigram_entropy,
)
from .texts import ngram_divergence, real_word_share

__all__ = [
    "FeatureStatistics",
    "HistogramDistance",
    "PrecisionRecall",
    "RarityScore",
    "average_knn_distance",
    "countdown_errors",
    "countdown_errors_original",
    "countdown_sequences",
    "countdown_wrong",
    "feature_statistics",
    "frechet_distance",
    "generative_perplexity",
    "histogram_distance",
    "local_outlier_factor",
    "nearest_neighbours",
    "ngram_divergence",
    "precision_recall",
    "rarity_score",
    "real_word_share",
    "unigram_entropy",
]
