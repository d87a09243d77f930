"""From a spec, or its plain values in a checkpoint, to a detector of its family."""

from dataclasses import asdict
from typing import Any

from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.family import BaseDetector
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.surgery import NO_CHANGES, ModelChanges
from hkd_det.models.yolo import UltralyticsDetector, UltralyticsSpec
from hkd_det.settings import dataclass_from_dict

ModelSpec = HKDDetectorSpec | UltralyticsSpec | FasterRCNNSpec

FAMILIES: dict[str, type[ModelSpec]] = {"hkd": HKDDetectorSpec, "yolo": UltralyticsSpec, "faster-rcnn": FasterRCNNSpec}


def build_from_spec(spec: ModelSpec, changes: ModelChanges = NO_CHANGES) -> BaseDetector:
    """A detector with fresh weights."""
    match spec:
        case HKDDetectorSpec():
            return HKDDetector(spec, changes)
        case UltralyticsSpec():
            return UltralyticsDetector(spec, changes)
        case FasterRCNNSpec():
            return FasterRCNN(spec, changes)


def spec_to_dict(spec: ModelSpec) -> dict[str, Any]:
    """Plain values, the family among them."""
    family = next(name for name, kind in FAMILIES.items() if isinstance(spec, kind))
    return {"family": family, **asdict(spec)}


def spec_from_dict(values: dict[str, Any]) -> ModelSpec:
    """The inverse of `spec_as_dict`. Raises KeyError for a family there is not, UsageError for unknown values."""
    return dataclass_from_dict(
        FAMILIES[values["family"]], {key: value for key, value in values.items() if key != "family"}
    )
