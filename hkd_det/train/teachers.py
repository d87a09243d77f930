"""Who can teach: from the file that `--teacher` names to a detector."""

from pathlib import Path

from hkd_det.models.family import PersonDetector
from hkd_det.models.yolo_file import is_yolo_file, read_yolo
from hkd_det.train.checkpoint import read_detector


def open_teacher(path: Path) -> PersonDetector:
    """The detector in `best.pt` of one of our runs, or in a .pt file of Ultralytics', in evaluation mode.

    Raises DataError for a file that is missing, broken or something else.
    """
    if is_yolo_file(path):
        return read_yolo(path)
    return read_detector(path).build()


def name_of(path: Path) -> str:
    """The model that such a file holds: a named size, or Ultralytics' name. Raises DataError as `open_teacher` does."""
    if is_yolo_file(path):
        return str(read_yolo(path).spec.name)
    return read_detector(path).model
