"""Readers of annotated pictures; numpy and OpenCV only."""

from hkd_det.datasets.sample import GroundTruth, Sample, read_image

__all__ = ["Sample", "GroundTruth", "read_image"]
