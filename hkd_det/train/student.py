"""The detector that a run trains: fresh, on pretrained backbone weights, or where another one stands."""

from pathlib import Path

from hkd_det.errors import UsageError
from hkd_det.models.backbone import load_pretrained
from hkd_det.models.detector import Detector
from hkd_det.models.family import PersonDetector
from hkd_det.models.faster_rcnn import FasterRcnn
from hkd_det.models.sizes import build_detector
from hkd_det.train.config import TrainConfig
from hkd_det.train.teachers import open_teacher


def build_student(config: TrainConfig, init: Path | None) -> PersonDetector:
    """The detector to train, on the CPU; `init` is a checkpoint whose shape and weights are its start."""
    if init is not None:
        return open_teacher(init)
    detector = build_detector(config.model, config.backbone)
    if config.pretrained:
        if not isinstance(detector, Detector | FasterRcnn):
            raise UsageError(f"--pretrained fills timm's backbones; {config.model} has one of its own")
        load_pretrained(detector.backbone, detector.spec.backbone, config.pretrained)
    return detector
