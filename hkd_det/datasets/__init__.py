"""Readers of annotated pictures; numpy and OpenCV only."""

from hkd_det.image import read_image
from hkd_det.structures import GroundTruth, Sample

__all__ = ["GroundTruth", "Sample", "read_image"]
