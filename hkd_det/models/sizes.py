"""The named detectors, what they weigh and what they cost."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from hkd_det.errors import UsageError
from hkd_det.models.detector import DetectorSpec
from hkd_det.models.families import Spec, build
from hkd_det.models.family import PersonDetector
from hkd_det.models.faster_rcnn import FasterRcnnSpec
from hkd_det.models.yolo import yolo_spec

# A student has at most a sixth of its teacher's parameters: tests/hkd_det/models/test_sizes.py.
SIZES: dict[str, DetectorSpec | FasterRcnnSpec] = {
    "teacher-r50": DetectorSpec("resnet50", channels=256),
    "student-r18": DetectorSpec("resnet18", {"channels": (32, 64, 128, 256), "stem_width": 32}, channels=96),
    "mini-teacher": DetectorSpec("resnet18", {"channels": (32, 64, 128, 256), "stem_width": 32}, channels=96),
    "mini-student": DetectorSpec("resnet10t", {"channels": (16, 32, 64, 128), "stem_width": 16}, channels=40),
    "slim-student": DetectorSpec(
        "resnet10t",
        {"channels": (16, 32, 64, 128), "stem_width": 8, "stem_type": "deep", "layers": (1, 2, 2, 1)},
        channels=32,
    ),
    "fasterrcnn-r50": FasterRcnnSpec(),
    "fasterrcnn-r18": FasterRcnnSpec("resnet18", width=0.5, channels=112, head_width=512),
}
TEACHER_OF = {
    "student-r18": "teacher-r50",
    "mini-student": "mini-teacher",
    "slim-student": "mini-teacher",
    "fasterrcnn-r18": "fasterrcnn-r50",
}


@dataclass(frozen=True)
class Cost:
    """What a deployed detector weighs and does.

    parameters: trained numbers that are exported; what only training runs (a one-to-many head) does not count.
    flops: floating-point operations a picture of `imgsz_hw`: 2 x multiply-accumulates.
    """

    parameters: int
    flops: int
    imgsz_hw: tuple[int, int]


def spec_of(name: str) -> Spec:
    """The shape of a named size, ours or one of Ultralytics' (yolo11n, …).

    Raises UsageError for an unknown name, UnavailableError for a YOLO model where ultralytics is not installed.
    """
    if name in SIZES:
        return SIZES[name]
    if name.startswith("yolo"):
        return yolo_spec(name)
    raise UsageError(f"--model {name}: no such size; there are {', '.join(SIZES)}, and Ultralytics' (yolo11n, …)")


def build_detector(name: str, backbone: str = "") -> PersonDetector:
    """A detector of a named size with fresh weights, on its own backbone or on any timm model's.

    Raises UsageError for an unknown name, for a backbone without maps at the size's strides, and for a backbone of a
    YOLO model or a Faster R-CNN, which have their own.
    """
    spec = spec_of(name)
    if not backbone:
        return build(spec)
    if not isinstance(spec, DetectorSpec):
        raise UsageError(f"--backbone {backbone}: {name} has a backbone of its own")
    return build(replace(spec, backbone=backbone, backbone_arguments={}))


def cost(detector: PersonDetector, imgsz_hw: tuple[int, int]) -> Cost:
    """Parameters and operations of the exported form, counted by running it once on an empty picture."""
    device = next(detector.parameters()).device
    counter = FlopCounterMode(display=False)
    was_training = detector.training
    ran: set[nn.Module] = set()
    detector.eval()
    hook = register_module_forward_hook(lambda module, _inputs, _output: ran.add(module))
    with torch.no_grad(), counter:
        detector.detect(torch.zeros(1, 3, *imgsz_hw, device=device))
    hook.remove()
    detector.train(was_training)
    exported = {parameter for module in ran for parameter in module.parameters(recurse=False)}
    return Cost(sum(parameter.numel() for parameter in exported), counter.get_total_flops(), imgsz_hw)
