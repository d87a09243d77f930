"""Where a detector's backbone ends and its head begins, family by family."""

from typing import Literal

from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector
from hkd_det.models.detector import HKDDetector
from hkd_det.models.faster_rcnn import FasterRCNN
from hkd_det.models.ultralytics import UltralyticsDetector

DetectorPart = Literal["backbone", "neck", "head"]


def part_of(detector: BaseDetector, layer: str) -> DetectorPart:
    """The part of the detector that a layer, named as `named_modules` names it, lies in."""
    match detector:
        case HKDDetector():
            return _match_prefix(layer, {"backbone.": "backbone", "neck.": "neck"})
        case FasterRCNN():
            return _match_prefix(layer, {"backbone.body.": "backbone", "backbone.fpn.": "neck"})
        case UltralyticsDetector():
            index = int(layer.removeprefix("network.model.").partition(".")[0])
            if index < len(detector.spec.model_yaml["backbone"]):
                return "backbone"
            return "neck" if index < len(detector.network.model) - 1 else "head"
        case _:
            raise UsageError(f"{type(detector).__name__}: it is not known where its backbone ends")


def _match_prefix(layer: str, parts: dict[str, DetectorPart]) -> DetectorPart:
    return next((part for prefix, part in parts.items() if layer.startswith(prefix)), "head")
