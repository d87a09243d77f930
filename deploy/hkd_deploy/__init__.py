"""From weights to a board: export, the runtime without torch, streams and the demo.

with open_detector("student.onnx", device="cpu") as detector:
    detections = detector(frame_rgb)
"""

from hkd_deploy.pipeline import Detector, StageTimes, open_detector

__all__ = ["Detector", "StageTimes", "open_detector"]
