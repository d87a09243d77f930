"""Readers of annotated pictures; numpy and OpenCV only."""

from hkd_det.datasets.sample import Sample, Truth, read_picture

__all__ = ["Sample", "Truth", "read_picture"]
