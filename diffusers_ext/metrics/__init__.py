"""How good a set of samples is: distances between sets of features.

Every metric takes features, not images: arrays or tensors (samples, dimensions) of a network that the caller
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

__all__ = [
    "FeatureStatistics",
    "PrecisionRecall",
    "RarityScore",
    "average_knn_distance",
    "feature_statistics",
    "frechet_distance",
    "local_outlier_factor",
    "nearest_neighbours",
    "precision_recall",
    "rarity_score",
]
