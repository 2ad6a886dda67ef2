"""Training of flows for FlowPostprocessingPipeline: neighbours, the features that they are sought in, the loss."""

from .base_samples import channels_first, check_base, draw_base_samples, velocity_network
from .features import DINOv2Features, classifier_features, combined_features, extract_features, pixel_features
from .neighbours import Neighbours, balanced_weights, find_neighbours
from .pairs import flow_loss
from .pipeline_folder import check_flow_folder, save_flow, write_flow
from .training import train_postprocessing_flow
from .training_run import TrainedFlow, check_output

__all__ = [
    "DINOv2Features",
    "Neighbours",
    "TrainedFlow",
    "balanced_weights",
    "channels_first",
    "check_base",
    "check_flow_folder",
    "check_output",
    "classifier_features",
    "combined_features",
    "draw_base_samples",
    "extract_features",
    "find_neighbours",
    "flow_loss",
    "pixel_features",
    "save_flow",
    "train_postprocessing_flow",
    "velocity_network",
    "write_flow",
]
