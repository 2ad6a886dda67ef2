"""Training of flows for FlowPostprocessingPipeline: neighbours, the features that they are sought in, the loss."""

from .base_samples import channels_first, draw_base_samples, velocity_network
from .features import DINOv2Features, classifier_features, combined_features, extract_features, pixel_features
from .neighbours import Neighbours, balanced_weights, find_neighbours
from .pairs import flow_loss
from .training import train_postprocessing_flow
from .training_run import TrainedFlow

__all__ = [
    "DINOv2Features",
    "Neighbours",
    "TrainedFlow",
    "balanced_weights",
    "channels_first",
    "classifier_features",
    "combined_features",
    "draw_base_samples",
    "extract_features",
    "find_neighbours",
    "flow_loss",
    "pixel_features",
    "train_postprocessing_flow",
    "velocity_network",
]
