"""Who can teach: from the file that `--teacher` names to a detector, or to a black box."""

from pathlib import Path

import torch

from hkd_det.errors import UsageError
from hkd_det.models.black_box import BlackBox, is_black_box, open_black_box
from hkd_det.models.family import PersonDetector
from hkd_det.models.yolo_file import is_yolo_file, read_yolo
from hkd_det.train.checkpoint import read_detector
from hkd_det.train.config import TrainConfig


def teacher_of(config: TrainConfig, device: torch.device) -> PersonDetector | BlackBox:
    """The run's teacher, on the device."""
    path = Path(config.teacher)
    if is_black_box(path):
        return open_black_box(path, device, Path(config.teacher_description) if config.teacher_description else None)
    return open_teacher(path).to(device).to(memory_format=torch.channels_last)


def open_teacher(path: Path) -> PersonDetector:
    """The detector in `best.pt` of one of our runs, or in a .pt file of Ultralytics', in evaluation mode.

    Raises DataError for a file that is missing, broken or something else, UsageError for a black box.
    """
    _check_seen_into(path)
    if is_yolo_file(path):
        return read_yolo(path)
    return read_detector(path).build()


def name_of(path: Path) -> str:
    """The model that such a file holds: a named size, or Ultralytics' name. Raises as `open_teacher` does."""
    _check_seen_into(path)
    if is_yolo_file(path):
        return str(read_yolo(path).spec.name)
    return read_detector(path).model


def _check_seen_into(path: Path) -> None:
    if is_black_box(path):
        raise UsageError(
            f"{path} is a black box, it shows no layers and has no weights to start from; "
            "--distill detections learns from its boxes and scores"
        )
