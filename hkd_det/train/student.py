"""The detector that a run trains: fresh, on pretrained backbone weights, or where another one stands."""

from pathlib import Path

from hkd_det.errors import UsageError
from hkd_det.models.backbone import load_pretrained
from hkd_det.models.detector import HKDDetector
from hkd_det.models.family import BaseDetector
from hkd_det.models.faster_rcnn import FasterRCNN
from hkd_det.models.sizes import build_model
from hkd_det.train.config import TrainConfig
from hkd_det.train.teachers import load_detector


def build_student(config: TrainConfig, weights: Path | None) -> BaseDetector:
    """The detector to train, on the CPU; `init` is a checkpoint whose shape and weights are its start."""
    if weights is not None:
        return load_detector(weights)
    detector = build_model(config.model, config.backbone)
    if config.pretrained:
        if not isinstance(detector, HKDDetector | FasterRCNN):
            raise UsageError(f"--pretrained fills timm's backbones; {config.model} has one of its own")
        load_pretrained(detector.backbone, detector.spec.backbone, config.pretrained)
    return detector
