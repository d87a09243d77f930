"""Ultralytics' own .pt files, pretrained or trained there, as detectors of people."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from hkd_det.errors import DataError, UsageError
from hkd_det.models.yolo import YoloDetector, YoloSpec
from hkd_det.models.yolo_names import fits, plain
from hkd_det.models.yolo_package import import_tasks, known_layers_only

PERSONS = ("person", "pedestrian")


def is_yolo_file(path: Path) -> bool:
    """Whether a file is one of Ultralytics': a pickle that names its classes. Looks, and runs none of it."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except (RuntimeError, ValueError):
        return False
    return any(name.startswith("ultralytics.") for name in names)


def read_yolo(path: Path) -> YoloDetector:
    """The detector in Ultralytics' file, in evaluation mode on the CPU; its class `person` (or the only one) is ours.

    These files are pickles. Ultralytics' restricted loader reads them: it makes objects of classes it knows and
    nothing else. DataError for a file that it refuses, and for a model that is no detector of people.
    """
    tasks = import_tasks()
    try:
        with known_layers_only(tasks):
            model, _ = tasks.load_checkpoint(str(path))
    except Exception as error:  # pickles break in many ways
        raise DataError(f"{path}: not a YOLO model that can be loaded safely: {_first_line(error)}") from error
    layout = getattr(model, "yaml", None)
    if not isinstance(layout, dict) or not fits(layout):
        raise DataError(f"{path}: a {type(model).__name__} is no detector; give a YOLO model of the task detect")
    spec = YoloSpec(path.stem, plain(layout), _person(path, dict(model.names)))
    try:
        detector = YoloDetector(spec)
        detector.network.load_state_dict(model.state_dict())
    except (UsageError, RuntimeError) as error:
        raise DataError(f"{path}: of another version of ultralytics: {_first_line(error)}") from error
    return detector.eval()


def _person(path: Path, names: dict[int, str]) -> int:
    if len(names) == 1:
        return next(iter(names))
    found = [number for number, name in names.items() if name in PERSONS]
    if len(found) != 1:
        known = ", ".join(list(names.values())[:10])
        raise DataError(f"{path}: none of its {len(names)} classes is called person ({known}, …)")
    return found[0]


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
