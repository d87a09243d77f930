"""The named models, loading them as student or teacher, ONNX teachers, and counting of parameters and operations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, DetectionBatch, FeatureInfo, ModelSpec
from hkd_det.models.checkpoint import build_from_spec, load_detector_checkpoint
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNNSpec
from hkd_det.models.feature_layers import observe_calls
from hkd_det.models.ultralytics import is_ultralytics_file, load_ultralytics, make_ultralytics_spec
from hkd_det.models.yolox import YOLOXSpec
from hkd_det.models.yolox_weights import is_yolox_file, load_yolox, prepare_yolox
from hkd_det.onnxrt.detector import OnnxDetector, OnnxEnsemble, open_onnx_detector, open_onnx_ensemble
from hkd_det.onnxrt.openvino import is_openvino_model

ENSEMBLE_SUFFIXES = (".yaml", ".yml")

# A student has at most a sixth of the parameters of its teacher: tests/hkd_det/models/test_zoo.py.
MODELS: dict[str, ModelSpec] = {
    "teacher-r50": HKDDetectorSpec("resnet50", channels=256),
    "student-r18": HKDDetectorSpec("resnet18", {"channels": (32, 64, 128, 256), "stem_width": 32}, channels=96),
    "mini-teacher": HKDDetectorSpec("resnet18", {"channels": (32, 64, 128, 256), "stem_width": 32}, channels=96),
    "mini-student": HKDDetectorSpec("resnet10t", {"channels": (16, 32, 64, 128), "stem_width": 16}, channels=40),
    "slim-student": HKDDetectorSpec(
        "resnet10t",
        {"channels": (16, 32, 64, 128), "stem_width": 8, "stem_type": "deep", "layers": (1, 2, 2, 1)},
        channels=32,
    ),
    "yolox-nano": YOLOXSpec(),
    "yolox-nano-hswish": YOLOXSpec(act="hardswish"),
    "yolox-nano-relu": YOLOXSpec(act="relu"),
    "yolox-pico-hswish": YOLOXSpec(act="hardswish", stage_channels=(16, 16, 32, 96, 160, 32)),
    "yolox-nano-x2": YOLOXSpec(width=0.5, act="hardswish"),
    "yolox-nano-x3": YOLOXSpec(width=0.75),
    "yolox-tiny": YOLOXSpec(width=0.375, depthwise=False),
    "yolox-s": YOLOXSpec(width=0.5, depthwise=False),
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
    """Size and computational cost of the exported form of a detector.

    Attributes:
        num_params: Number of parameters. Layers that only training runs, such as a one-to-many head, do not count.
        flops: Floating-point operations per image of size `imgsz_hw`, two per multiply-accumulate.
        imgsz_hw: Height and width of the image, pixels.
    """

    num_params: int
    flops: int
    imgsz_hw: tuple[int, int]


class OnnxTeacher(nn.Module):
    """The teacher part of the `BaseDetector` interface for ONNX files. It has no gradients and no parameters.

    Args:
        model: The opened ONNX file, or several files as an ensemble.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"detections"})

    def __init__(self, model: OnnxDetector | OnnxEnsemble) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> DetectionBatch:
        """Run the model.

        Args:
            images (Tensor[B, 3, H, W]): RGB, 0 to 255, uint8 or float.

        Returns:
            Detections in input pixels, on the device of the images.
        """
        arrays = images.detach().permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
        detections = self.model(list(arrays))
        return DetectionBatch(
            tuple(torch.from_numpy(item.boxes_xyxy).to(images.device) for item in detections),
            tuple(torch.from_numpy(item.scores).to(images.device) for item in detections),
        )

    def postprocess(self, outputs: Any, max_det: int = 100) -> DetectionBatch:
        """Return the `max_det` best detections per image.

        Args:
            outputs: Return value of `forward`.
            max_det: Maximum number of detections per image.

        Returns:
            Detections in descending order of score.
        """
        return DetectionBatch(
            tuple(boxes[:max_det] for boxes in outputs.boxes_xyxy), tuple(scores[:max_det] for scores in outputs.scores)
        )

    def feature_info(self) -> list[FeatureInfo]:
        """Return no layers: an ONNX file has no feature maps that can be recorded."""
        return []


def is_onnx_file(path: Path) -> bool:
    """Return whether a model file is an ONNX file, by its suffix."""
    return path.suffix == ".onnx"


def load_onnx_teacher(path: Path, device: torch.device, config_path: Path | None = None) -> OnnxTeacher:
    """Open an ONNX detector on a torch device, with the thread count of torch.

    Args:
        path: The .onnx file, the OpenVINO model, or the .yaml file of an ensemble.
        device: Device to run on.
        config_path: YAML file or name of the configuration, for files that hkd-export did not write.

    Returns:
        The teacher.

    Raises:
        HkdError: As `open_onnx_detector`.
    """
    if path.suffix in ENSEMBLE_SUFFIXES:
        return OnnxTeacher(open_onnx_ensemble(path, str(device), torch.get_num_threads()))
    return OnnxTeacher(open_onnx_detector(path, str(device), config_path, torch.get_num_threads()))


def get_spec(name: str) -> ModelSpec:
    """Return the architecture of a named model: one of `MODELS`, or a YOLO model of Ultralytics such as yolo11n.

    Args:
        name: Name of the model.

    Returns:
        The architecture.

    Raises:
        UsageError: If the name is unknown.
        UnavailableError: If the name is a YOLO model and the package ultralytics is not installed.
    """
    if name in MODELS:
        return MODELS[name]
    if name.startswith("yolo"):
        return make_ultralytics_spec(name)
    raise UsageError(
        f"--model {name}: no such model. Choose one of {', '.join(MODELS)}, or a YOLO model such as yolo11n."
    )


def build_model(name: str, backbone: str = "") -> BaseDetector:
    """Build a named model with fresh weights.

    Args:
        name: Name of the model, as for `get_spec`.
        backbone: Name of a timm model that replaces the backbone; "" keeps it.

    Returns:
        The detector on the CPU, in training mode.

    Raises:
        UsageError: If the name is unknown, if the backbone has no feature maps at the strides of the model, or if the
            model is a YOLO model or a Faster R-CNN, whose backbone is fixed.
    """
    spec = get_spec(name)
    if not backbone:
        return build_from_spec(spec)
    if not isinstance(spec, HKDDetectorSpec):
        raise UsageError(
            f"--backbone {backbone}: {name} has its own backbone. Omit --backbone or choose another --model."
        )
    return build_from_spec(replace(spec, backbone=backbone, backbone_kwargs={}))


def build_student(
    model: str,
    backbone: str,
    pretrained: str,
    weights: Path | None,
    iterate_images: Callable[[int], Iterator[Tensor]],
) -> BaseDetector:
    """Build the detector that a run trains.

    Args:
        model: Name of the model, as for `get_spec`.
        backbone: Name of a timm model that replaces the backbone; "" keeps it.
        pretrained: Source of pretrained backbone weights, as for `BaseDetector.load_pretrained`; "" for none.
        weights: Checkpoint to start from. It replaces all other arguments, except the activation of a YOLOX model.
        iterate_images: Yields at least the given number of training images, [B, 3, H, W] RGB. The statistics of batch
            normalization in a YOLOX file are estimated on them.

    Returns:
        The detector on the CPU.

    Raises:
        UsageError: As `build_model` and `BaseDetector.load_pretrained`.
        DataError: If a file is not readable or does not fit.
        UnavailableError: If the pretrained weights cannot be downloaded.
    """
    if weights is not None and is_yolox_file(weights):
        spec = MODELS.get(model)
        source = load_yolox(weights)
        return prepare_yolox(source, spec if isinstance(spec, YOLOXSpec) else source.spec, iterate_images)
    if weights is not None:
        return load_detector(weights)
    detector = build_model(model, backbone)
    if pretrained:
        detector.load_pretrained(pretrained)
    return detector


def load_teacher(path: Path, device: torch.device, config_path: Path | None = None) -> BaseDetector | OnnxTeacher:
    """Load a teacher onto a device.

    Args:
        path: best.pt of a run, a .pt file of Ultralytics, a YOLOX file, another .onnx file, an OpenVINO model, or the
            .yaml file of an ensemble.
        device: Device of the teacher.
        config_path: YAML file or name of the configuration of a file that hkd-export did not write. With it, a YOLOX
            file is run as an .onnx file.

    Returns:
        The teacher in evaluation mode.

    Raises:
        HkdError: If the file cannot be loaded.
    """
    if is_onnx_teacher(path, config_path):
        return load_onnx_teacher(path, device, config_path)
    return load_detector(path).to(device).to(memory_format=torch.channels_last)


def is_onnx_teacher(path: Path, config_path: Path | None = None) -> bool:
    """Return whether `load_teacher` runs a file with ONNX Runtime or OpenVINO, so that it provides detections only.

    Args:
        path: File of the teacher.
        config_path: Description of an .onnx file, or None.
    """
    if path.suffix in ENSEMBLE_SUFFIXES:
        return True
    if is_openvino_model(path):
        return True
    return is_onnx_file(path) and (config_path is not None or not is_yolox_file(path))


def load_detector(path: Path) -> BaseDetector:
    """Load a detector from best.pt of a run, from a .pt file of Ultralytics, or from a YOLOX file (`load_yolox`).

    Args:
        path: The file.

    Returns:
        The detector in evaluation mode on the CPU.

    Raises:
        DataError: If the file is missing, broken or of another kind.
        UsageError: If the file is an .onnx file.
    """
    if is_yolox_file(path):
        return load_yolox(path)
    _check_not_onnx(path)
    if is_ultralytics_file(path):
        return load_ultralytics(path)
    return load_detector_checkpoint(path).build()


def read_model_name(path: Path, model: str = "") -> str:
    """Return the name of the model in a checkpoint file. Errors are those of `load_detector`.

    Args:
        path: File as for `load_detector`.
        model: Requested name. A YOLOX file can give a model with another activation.
    """
    if is_yolox_file(path):
        spec = load_yolox(path).spec
        fitting = [
            name for name, known in MODELS.items() if isinstance(known, YOLOXSpec) and known.can_start_from(spec)
        ]
        own = [name for name in fitting if MODELS[name] == spec]
        return model if model in fitting else next(iter(own), "yolox")
    _check_not_onnx(path)
    if is_ultralytics_file(path):
        return str(load_ultralytics(path).spec.name)
    return load_detector_checkpoint(path).model


def count_params_and_flops(detector: BaseDetector, imgsz_hw: tuple[int, int]) -> ModelComplexity:
    """Count parameters and operations of the exported form by running it once on an empty image.

    Args:
        detector: The detector. Its mode is restored.
        imgsz_hw: Height and width of the image, multiples of 32, pixels.

    Returns:
        The counts.
    """
    device = next(detector.parameters()).device
    counter = FlopCounterMode(display=False)
    was_training = detector.training
    called: set[nn.Module] = set()
    detector.eval()
    with torch.no_grad(), counter, observe_calls(detector, on_output=lambda _name, module, *_: called.add(module)):
        detector.predict(torch.zeros(1, 3, *imgsz_hw, device=device))
    detector.train(was_training)
    exported = {parameter for module in called for parameter in module.parameters(recurse=False)}
    return ModelComplexity(sum(parameter.numel() for parameter in exported), counter.get_total_flops(), imgsz_hw)


def _check_not_onnx(path: Path) -> None:
    if is_onnx_file(path):
        raise UsageError(
            f"{path}: this ONNX file has no feature maps and no weights to start from. "
            "Use it with --teacher and --distill soft_labels, or provide a YOLOX file in FP32."
        )
