"""Readers of annotated image datasets. They need NumPy and OpenCV, but not torch."""

from hkd_det.image import read_image
from hkd_det.structures import GroundTruth, Sample

__all__ = ["GroundTruth", "Sample", "read_image"]
