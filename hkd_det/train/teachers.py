"""Who can teach: from the file that `--teacher` names to a detector, or to a black box."""

from pathlib import Path

import torch

from hkd_det.errors import UsageError
from hkd_det.models.black_box import OnnxTeacher, is_onnx_file, load_onnx_teacher
from hkd_det.models.family import BaseDetector
from hkd_det.models.yolo_file import is_ultralytics_file, load_ultralytics
from hkd_det.train.checkpoint import load_detector_checkpoint
from hkd_det.train.config import TrainConfig


def load_teacher(config: TrainConfig, device: torch.device) -> BaseDetector | OnnxTeacher:
    """The run's teacher, on the device."""
    path = Path(config.teacher)
    if is_onnx_file(path):
        return load_onnx_teacher(path, device, Path(config.teacher_config) if config.teacher_config else None)
    return load_detector(path).to(device).to(memory_format=torch.channels_last)


def load_detector(path: Path) -> BaseDetector:
    """The detector in `best.pt` of one of our runs, or in a .pt file of Ultralytics', in evaluation mode.

    Raises DataError for a file that is missing, broken or something else, UsageError for a black box.
    """
    _check_not_onnx(path)
    if is_ultralytics_file(path):
        return load_ultralytics(path)
    return load_detector_checkpoint(path).build()


def model_name(path: Path) -> str:
    """The model that such a file holds: a named size, or Ultralytics' name. Raises as `open_teacher` does."""
    _check_not_onnx(path)
    if is_ultralytics_file(path):
        return str(load_ultralytics(path).spec.name)
    return load_detector_checkpoint(path).model


def _check_not_onnx(path: Path) -> None:
    if is_onnx_file(path):
        raise UsageError(
            f"{path} is a black box, it shows no layers and has no weights to start from; "
            "--distill detections learns from its boxes and scores"
        )
