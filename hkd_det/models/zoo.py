"""The named detectors, what they weigh and what they cost.

Who can teach: from the file that `--teacher` names to a detector, or to a black box.

The detector that a run trains: fresh, on pretrained backbone weights, or where another one stands.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from hkd_det.errors import UsageError
from hkd_det.models.backbone import load_pretrained
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import ModelSpec, build_from_spec, load_detector_checkpoint
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.onnx_teacher import OnnxTeacher, is_onnx_file, load_onnx_teacher
from hkd_det.models.ultralytics import is_ultralytics_file, load_ultralytics, make_ultralytics_spec

# A student has at most a sixth of its teacher's parameters: tests/hkd_det/models/test_sizes.py.
MODELS: dict[str, HKDDetectorSpec | FasterRCNNSpec] = {
    "teacher-r50": HKDDetectorSpec("resnet50", channels=256),
    "student-r18": HKDDetectorSpec("resnet18", {"channels": (32, 64, 128, 256), "stem_width": 32}, channels=96),
    "mini-teacher": HKDDetectorSpec("resnet18", {"channels": (32, 64, 128, 256), "stem_width": 32}, channels=96),
    "mini-student": HKDDetectorSpec("resnet10t", {"channels": (16, 32, 64, 128), "stem_width": 16}, channels=40),
    "slim-student": HKDDetectorSpec(
        "resnet10t",
        {"channels": (16, 32, 64, 128), "stem_width": 8, "stem_type": "deep", "layers": (1, 2, 2, 1)},
        channels=32,
    ),
    "fasterrcnn-r50": FasterRCNNSpec(),
    "fasterrcnn-r18": FasterRCNNSpec("resnet18", width_mult=0.5, channels=112, head_width=512),
}


DEFAULT_TEACHER = {
    "student-r18": "teacher-r50",
    "mini-student": "mini-teacher",
    "slim-student": "mini-teacher",
    "fasterrcnn-r18": "fasterrcnn-r50",
}


@dataclass(frozen=True)
class ModelComplexity:
    """What a deployed detector weighs and does.

    parameters: trained numbers that are exported; what only training runs (a one-to-many head) does not count.
    flops: floating-point operations a picture of `imgsz_hw`: 2 x multiply-accumulates.
    """

    num_params: int
    flops: int
    imgsz_hw: tuple[int, int]


def get_spec(name: str) -> ModelSpec:
    """The shape of a named size, ours or one of Ultralytics' (yolo11n, …).

    Raises UsageError for an unknown name, UnavailableError for a YOLO model where ultralytics is not installed.
    """
    if name in MODELS:
        return MODELS[name]
    if name.startswith("yolo"):
        return make_ultralytics_spec(name)
    raise UsageError(f"--model {name}: no such size; there are {', '.join(MODELS)}, and Ultralytics' (yolo11n, …)")


def build_model(name: str, backbone: str = "") -> BaseDetector:
    """A detector of a named size with fresh weights, on its own backbone or on any timm model's.

    Raises UsageError for an unknown name, for a backbone without maps at the size's strides, and for a backbone of a
    YOLO model or a Faster R-CNN, which have their own.
    """
    spec = get_spec(name)
    if not backbone:
        return build_from_spec(spec)
    if not isinstance(spec, HKDDetectorSpec):
        raise UsageError(f"--backbone {backbone}: {name} has a backbone of its own")
    return build_from_spec(replace(spec, backbone=backbone, backbone_kwargs={}))


def count_params_and_flops(detector: BaseDetector, imgsz_hw: tuple[int, int]) -> ModelComplexity:
    """Parameters and operations of the exported form, counted by running it once on an empty picture."""
    device = next(detector.parameters()).device
    counter = FlopCounterMode(display=False)
    was_training = detector.training
    ran: set[nn.Module] = set()
    detector.eval()
    hook = register_module_forward_hook(lambda module, _inputs, _output: ran.add(module))
    with torch.no_grad(), counter:
        detector.predict(torch.zeros(1, 3, *imgsz_hw, device=device))
    hook.remove()
    detector.train(was_training)
    exported = {parameter for module in ran for parameter in module.parameters(recurse=False)}
    return ModelComplexity(sum(parameter.numel() for parameter in exported), counter.get_total_flops(), imgsz_hw)


def load_teacher(path: Path, device: torch.device, config_path: Path | None = None) -> BaseDetector | OnnxTeacher:
    """Load a frozen teacher onto a device."""
    if is_onnx_file(path):
        return load_onnx_teacher(path, device, config_path)
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


def build_student(model: str, backbone: str, pretrained: str, weights: Path | None = None) -> BaseDetector:
    """The detector to train, on the CPU; `init` is a checkpoint whose shape and weights are its start."""
    if weights is not None:
        return load_detector(weights)
    detector = build_model(model, backbone)
    if pretrained:
        if not isinstance(detector, HKDDetector | FasterRCNN):
            raise UsageError(f"--pretrained fills timm's backbones; {model} has one of its own")
        load_pretrained(detector.backbone, detector.spec.backbone, pretrained)
    return detector
