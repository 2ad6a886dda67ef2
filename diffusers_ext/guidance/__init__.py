"""Guidance in part of the sampling: guiders for modular pipelines, and the search for the best interval and weight."""
