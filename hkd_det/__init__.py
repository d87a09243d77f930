"""Pedestrian detectors: datasets, models, distillation methods, training and metrics."""

__version__ = "0.1.0"
