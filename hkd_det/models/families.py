"""From a spec, or its plain values in a checkpoint, to a detector of its family."""

from dataclasses import asdict
from typing import Any

from hkd_det.models.detector import Detector, DetectorSpec
from hkd_det.models.family import PersonDetector
from hkd_det.models.faster_rcnn import FasterRcnn, FasterRcnnSpec
from hkd_det.models.surgery import UNCHANGED, Changes
from hkd_det.models.yolo import YoloDetector, YoloSpec
from hkd_det.settings import from_mapping

Spec = DetectorSpec | YoloSpec | FasterRcnnSpec

FAMILIES: dict[str, type[Spec]] = {"hkd": DetectorSpec, "yolo": YoloSpec, "faster-rcnn": FasterRcnnSpec}


def build(spec: Spec, changes: Changes = UNCHANGED) -> PersonDetector:
    """A detector with fresh weights."""
    match spec:
        case DetectorSpec():
            return Detector(spec, changes)
        case YoloSpec():
            return YoloDetector(spec, changes)
        case FasterRcnnSpec():
            return FasterRcnn(spec, changes)


def spec_as_dict(spec: Spec) -> dict[str, Any]:
    """Plain values, the family among them."""
    family = next(name for name, kind in FAMILIES.items() if isinstance(spec, kind))
    return {"family": family, **asdict(spec)}


def read_spec(values: dict[str, Any]) -> Spec:
    """The inverse of `spec_as_dict`. Raises KeyError for a family there is not, UsageError for unknown values."""
    return from_mapping(FAMILIES[values["family"]], {key: value for key, value in values.items() if key != "family"})
