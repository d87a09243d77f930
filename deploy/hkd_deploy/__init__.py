"""Deployment of trained detectors: export, runtime without torch, video streams and demo.

Examples:
    >>> with open_detector("student.onnx", device="cpu") as detector:
    ...     detections = detector(image_rgb)
"""

from hkd_deploy.backends.base import Detector, StageTimes
from hkd_deploy.pipeline import open_detector

__all__ = ["Detector", "StageTimes", "open_detector"]
