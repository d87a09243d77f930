"""Deployment of trained detectors: export, runtime without torch, video streams and demo.

Examples:
    >>> detector = open_detector("student.onnx", device="cpu")
    >>> detections = detector("street.jpg", conf=0.3)
"""

from hkd_deploy.backends.base import Detector, StageTimes
from hkd_deploy.pipeline import open_detector

__all__ = ["Detector", "StageTimes", "open_detector"]
