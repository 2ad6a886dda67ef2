"""Folders and Hub repositories that load with diffusers alone: exported, pushed, and checked when they come back."""

from .downloads import check_download, download_pipeline
from .export import export_code, export_model, export_pipeline
from .push import push_folder, push_to_hub

__all__ = [
    "check_download",
    "download_pipeline",
    "export_code",
    "export_model",
    "export_pipeline",
    "push_folder",
    "push_to_hub",
]
