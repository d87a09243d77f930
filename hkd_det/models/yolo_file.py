"""Ultralytics' own .pt files, pretrained or trained there, as detectors of people."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from hkd_det.errors import DataError, UsageError
from hkd_det.models.yolo import UltralyticsDetector, UltralyticsSpec
from hkd_det.models.yolo_names import filter_model_yaml, is_detection_model
from hkd_det.models.yolo_package import import_tasks, restrict_layer_types

PERSON_CLASS_NAMES = ("person", "pedestrian")


def is_ultralytics_file(path: Path) -> bool:
    """Whether a file is one of Ultralytics': a pickle that names its classes. Looks, and runs none of it."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except (RuntimeError, ValueError):
        return False
    return any(name.startswith("ultralytics.") for name in names)


def load_ultralytics(path: Path) -> UltralyticsDetector:
    """The detector in Ultralytics' file, in evaluation mode on the CPU; its class `person` (or the only one) is ours.

    These files are pickles. Ultralytics' restricted loader reads them: it makes objects of classes it knows and
    nothing else. DataError for a file that it refuses, and for a model that is no detector of people.
    """
    tasks = import_tasks()
    try:
        with restrict_layer_types(tasks):
            model, _ = tasks.load_checkpoint(str(path))
    except Exception as error:  # pickles break in many ways
        raise DataError(f"{path}: not a YOLO model that can be loaded safely: {_first_error_line(error)}") from error
    layout = getattr(model, "yaml", None)
    if not isinstance(layout, dict) or not is_detection_model(layout):
        raise DataError(f"{path}: a {type(model).__name__} is no detector; give a YOLO model of the task detect")
    spec = UltralyticsSpec(path.stem, filter_model_yaml(layout), _find_person_class(path, dict(model.names)))
    try:
        detector = UltralyticsDetector(spec)
        detector.network.load_state_dict(model.state_dict())
    except (UsageError, RuntimeError) as error:
        raise DataError(f"{path}: of another version of ultralytics: {_first_error_line(error)}") from error
    return detector.eval()


def _find_person_class(path: Path, names: dict[int, str]) -> int:
    if len(names) == 1:
        return next(iter(names))
    found = [number for number, name in names.items() if name in PERSON_CLASS_NAMES]
    if len(found) != 1:
        known = ", ".join(list(names.values())[:10])
        raise DataError(f"{path}: none of its {len(names)} classes is called person ({known}, …)")
    return found[0]


def _first_error_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
