"""Where a detector's backbone ends and its head begins, family by family."""

from typing import Literal

from hkd_det.errors import UsageError
from hkd_det.models.detector import Detector
from hkd_det.models.family import PersonDetector
from hkd_det.models.faster_rcnn import FasterRcnn
from hkd_det.models.yolo import YoloDetector

Part = Literal["backbone", "neck", "head"]


def part_of(detector: PersonDetector, layer: str) -> Part:
    """The part of the detector that a layer, named as `named_modules` names it, lies in."""
    match detector:
        case Detector():
            return _first_of(layer, {"backbone.": "backbone", "neck.": "neck"})
        case FasterRcnn():
            return _first_of(layer, {"backbone.body.": "backbone", "backbone.fpn.": "neck"})
        case YoloDetector():
            index = int(layer.removeprefix("network.model.").partition(".")[0])
            if index < len(detector.spec.layout["backbone"]):
                return "backbone"
            return "neck" if index < len(detector.network.model) - 1 else "head"
        case _:
            raise UsageError(f"{type(detector).__name__}: it is not known where its backbone ends")


def _first_of(layer: str, parts: dict[str, Part]) -> Part:
    return next((part for prefix, part in parts.items() if layer.startswith(prefix)), "head")
