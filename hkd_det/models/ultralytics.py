"""Ultralytics' YOLO models as pedestrian detectors, and Ultralytics' .pt files as such detectors.

The network is Ultralytics' own. Anchor points, losses and outputs are those of the other dense detectors.

The package ultralytics (AGPL-3.0) is an extra. At import, it resolves a host name to test whether it is online. It
sets thread counts, print options and warning filters, and replaces `torch.save` and `PIL.Image.open`. `import_tasks`
disables network access and output, and restores this state after the import. It keeps the settings file that
Ultralytics creates in the user's configuration.
"""

import difflib
import math
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import torch
import yaml
from torch import Tensor, nn

from hkd_det.errors import DataError, UnavailableError, UsageError, first_error_line
from hkd_det.models.base import BranchOutputs, DenseOutputs, DetectionBatch, DetectorPart, FeatureInfo, ModelSpec
from hkd_det.models.detector import DenseDetector
from hkd_det.models.head import PRIOR_PROB, dist2bbox, make_anchors
from hkd_det.models.surgery import NO_CHANGES, ModelChanges, PrunableLayer, apply_changes, filter_dense_convs
from hkd_det.ops.boxes import IOU_THRESHOLD, batched_nms, cluster_nms

MAX_STRIDE = 32  # Input sides are multiples of it.
PERSON_CLASS_NAMES = ("person", "pedestrian")
# WORLD_SIZE: under torchrun, the import would wait for the other processes, which import at another time.
QUIET_ENV = {"YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false", "WORLD_SIZE": "1"}
DETECTION_HEADS = ("Detect", "v10Detect")
MODEL_NAME_PATTERN = re.compile(r"(yolov?\d+)([nslmx])(-[\w-]+)?")  # family, size, variant
ARCHITECTURE_KEYS = ("nc", "scales", "scale", "end2end", "reg_max", "activation", "depth_multiple", "width_multiple")


@dataclass(frozen=True)
class UltralyticsSpec(ModelSpec):
    """Architecture of an Ultralytics model.

    Attributes:
        name: Ultralytics' name, such as yolo11n.
        model_yaml: Ultralytics' definition of the model, stored so that a later version cannot change it. Its key `nc`
            is the number of classes.
        person_class_id: Index of the class person.
    """

    name: str
    model_yaml: dict[str, Any]
    person_class_id: int = 0


def make_ultralytics_spec(name: str) -> UltralyticsSpec:
    """Build the architecture of a named model with the single class person.

    Args:
        name: Ultralytics' name, such as yolo11n.

    Returns:
        The architecture.

    Raises:
        UsageError: If Ultralytics has no detector of this name.
        UnavailableError: If the package ultralytics is not installed.
    """
    return UltralyticsSpec(name, {**load_model_yaml(name), "nc": 1})


class UltralyticsDetector(DenseDetector):
    """A YOLO model of Ultralytics.

    The branch `one2one` exists for models with a one-to-one head (YOLOv10, YOLO26) and has its own boxes. As in the
    training of Ultralytics, its gradient does not reach the neck.
    """

    license = "AGPL-3.0"
    spec_type = UltralyticsSpec

    spec: UltralyticsSpec

    def __init__(self, spec: UltralyticsSpec, changes: ModelChanges = NO_CHANGES) -> None:
        super().__init__()
        self.spec, self.changes = spec, changes
        self.network = _build_network(spec)
        self.strides = tuple(int(stride) for stride in self._head.stride)
        if max(self.strides) > MAX_STRIDE:
            raise UsageError(
                f"--model {spec.name}: stride {max(self.strides)} is above {MAX_STRIDE}, the step of the input size. "
                "Choose another model."
            )
        for conv in _find_score_convs(self._head):
            nn.init.constant_(conv.bias, -math.log((1 - PRIOR_PROB) / PRIOR_PROB))  # type: ignore[arg-type]  # not None
        apply_changes(self, changes)

    def forward(self, images: Tensor) -> DenseOutputs:
        """Run the network on images [B, 3, H, W], RGB, 0 to 255. See `BaseDetector.forward`.

        Training and evaluation mode return the same outputs.
        """
        features = self.forward_features(images)
        input_hw = (images.shape[-2], images.shape[-1])
        points, strides = make_anchors(input_hw, self.strides, images.device)
        one2many = self._forward_branch(features, self._head.one2many, points, strides)
        one2one = None
        if self.is_end2end:
            detached = [level.detach() for level in features]
            one2one = self._forward_branch(detached, self._head.one2one, points, strides)
        return DenseOutputs(one2many, one2one, points, strides, input_hw)

    @property
    def is_end2end(self) -> bool:
        """Whether the model has a one-to-one head and needs no non-maximum suppression."""
        return getattr(self._head, "one2one_cv2", None) is not None

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Return the inputs [B, C_i, H_i, W_i] of the head, fine to coarse, of images [B, 3, H, W], RGB, 0 to 255."""
        outputs: list[Any] = []
        value: Any = images.float() / 255
        for layer in self.network.model[:-1]:
            value = layer(_gather_inputs(layer.f, value, outputs))
            outputs.append(value if layer.i in self.network.save else None)
        return [outputs[index] for index in self._head.f]

    def predict(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """Run the one-to-one head, or the other head and non-maximum suppression. See `BaseDetector.predict`."""
        head = self._head.one2one if self.is_end2end else self._head.one2many
        points, strides = make_anchors((images.shape[-2], images.shape[-1]), self.strides, images.device)
        branch = self._forward_branch(self.forward_features(images), head, points, strides)
        return self._select_detections(branch, max_det)

    def postprocess(self, outputs: DenseOutputs, max_det: int = 100) -> DetectionBatch:
        """Select as `predict` does. See `BaseDetector.postprocess`."""
        boxes, scores = self._select_detections(outputs.one2one or outputs.one2many, max_det)
        return DetectionBatch(
            tuple(image_boxes[image_scores > 0] for image_boxes, image_scores in zip(boxes, scores, strict=True)),
            tuple(image_scores[image_scores > 0] for image_scores in scores),
        )

    def predict_traceable(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """Run `predict` with `cluster_nms` where it needs suppression. See `BaseDetector.predict_traceable`."""
        if self.is_end2end:
            return self.predict(images, max_det)
        boxes, logits = self.raw_outputs(images)
        return cluster_nms(boxes, logits.sigmoid(), max_det, IOU_THRESHOLD)

    def feature_info(self) -> list[FeatureInfo]:
        """Return the layers that the head reads, fine to coarse."""
        channels = [branch[0].conv.in_channels for branch in self._head.cv2]
        return [
            FeatureInfo(f"network.model.{index}", stride, width)
            for index, stride, width in zip(self._head.f, self.strides, channels, strict=True)
        ]

    def prunable_layers(self) -> list[PrunableLayer]:
        """Return the first convolutions of the bottlenecks, and all but the last of each head branch."""
        bottleneck = import_tasks().Bottleneck
        layers = [
            PrunableLayer(f"{name}.cv1.conv", (f"{name}.cv1.bn",), (f"{name}.cv2.conv",))
            for name, module in self.named_modules()
            if type(module) is bottleneck
        ]
        return filter_dense_convs(self, [*layers, *_find_head_layers(self._head, f"network.model.{self._head.i}")])

    def part_of(self, layer: str) -> DetectorPart:
        """Return the part of the detector that contains a layer, by its index in the definition."""
        index = int(layer.removeprefix("network.model.").partition(".")[0])
        if index < len(self.spec.model_yaml["backbone"]):
            return "backbone"
        return "neck" if index < len(self.network.model) - 1 else "head"

    @property
    def _head(self) -> Any:
        return self.network.model[-1]

    def _forward_branch(
        self, features: list[Tensor], head: dict[str, nn.Module], anchor_points: Tensor, strides: Tensor
    ) -> BranchOutputs:
        raw = self._head.forward_head(features, **head)
        # float32 from here on. bfloat16 is too coarse for box coordinates.
        logits = raw["scores"][:, self.spec.person_class_id].float()
        box_logits = raw["boxes"].float().transpose(1, 2).unflatten(2, (4, self._head.reg_max))  # [B, A, 4, reg_max]
        if self._head.reg_max > 1:
            return BranchOutputs(logits, dist2bbox(box_logits, anchor_points, strides), box_logits)
        left_top, right_bottom = (box_logits[..., 0] * strides[:, None]).split(2, dim=-1)
        return BranchOutputs(logits, torch.cat([anchor_points - left_top, anchor_points + right_bottom], -1))

    def _select_detections(self, branch: BranchOutputs, max_det: int) -> tuple[Tensor, Tensor]:
        if not self.is_end2end:
            return batched_nms(branch.boxes_xyxy, branch.logits.sigmoid(), max_det)
        logits, index = branch.logits.topk(min(max_det, branch.logits.shape[1]))
        return branch.boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)), logits.sigmoid()


def _build_network(spec: UltralyticsSpec) -> Any:
    tasks = import_tasks()
    try:
        with restrict_layer_types(tasks):
            return tasks.DetectionModel(deepcopy(spec.model_yaml), verbose=False)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"--model {spec.name}: Ultralytics does not build this model ({error}). Choose another model."
        ) from error


def _find_score_convs(head: Any) -> list[nn.Conv2d]:
    """Return the last convolutions of the score branches of all levels and both heads."""
    branches = [*head.cv3, *getattr(head, "one2one_cv3", ())]
    return [branch[-1] for branch in branches]


def _find_head_layers(head: Any, name: str) -> list[PrunableLayer]:
    """Return each convolution of a head branch with the next one of the branch as its only consumer."""
    layers = []
    for branches in ("cv2", "cv3", "one2one_cv2", "one2one_cv3"):
        for level, branch in enumerate(getattr(head, branches, None) or ()):
            prefix = f"{name}.{branches}.{level}"
            convs = [f"{prefix}.{child}" for child, module in branch.named_modules() if hasattr(module, "groups")]
            layers += [
                PrunableLayer(conv, (f"{conv.removesuffix('.conv')}.bn",), (consumer,))
                for conv, consumer in pairwise(convs)
            ]
    return layers


def _gather_inputs(from_index: int | list[int], previous: Any, outputs: list[Any]) -> Any:
    """Return the inputs of a layer: the previous output (-1), an earlier one, or several, in Ultralytics' numbering."""
    if isinstance(from_index, int):
        return previous if from_index == -1 else outputs[from_index]
    return [previous if index == -1 else outputs[index] for index in from_index]


def is_ultralytics_file(path: Path) -> bool:
    """Return whether a file is a pickle with classes of Ultralytics. No code in the file is run."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except (RuntimeError, ValueError):
        return False
    return any(name.startswith("ultralytics.") for name in names)


def load_ultralytics(path: Path) -> UltralyticsDetector:
    """Load a .pt file of Ultralytics. Its class `person`, or its only class, becomes the class of the detector.

    These files are pickles. Ultralytics' restricted loader reads them: it creates objects of known classes only.

    Args:
        path: The .pt file.

    Returns:
        The detector in evaluation mode on the CPU.

    Raises:
        DataError: If the loader refuses the file, or if the model is no detector of persons.
    """
    tasks = import_tasks()
    try:
        with restrict_layer_types(tasks):
            model, _ = tasks.load_checkpoint(str(path))
    except Exception as error:  # pickles raise many types
        raise DataError(
            f"{path}: not a YOLO model that can be loaded safely ({first_error_line(error) or type(error).__name__}). "
            "Provide a detection model that Ultralytics saved."
        ) from error
    model_yaml = getattr(model, "yaml", None)
    if not isinstance(model_yaml, dict) or not is_detection_model(model_yaml):
        raise DataError(
            f"{path}: expected a detection model, got {type(model).__name__}. Provide a YOLO model of the task detect."
        )
    spec = UltralyticsSpec(path.stem, filter_model_yaml(model_yaml), _find_person_class(path, dict(model.names)))
    try:
        detector = UltralyticsDetector(spec)
        detector.network.load_state_dict(model.state_dict())
    except (UsageError, RuntimeError) as error:
        raise DataError(
            f"{path}: saved by an incompatible version of ultralytics "
            f"({first_error_line(error) or type(error).__name__}). Install that version."
        ) from error
    return detector.eval()


def _find_person_class(path: Path, names: dict[int, str]) -> int:
    if len(names) == 1:
        return next(iter(names))
    person_ids = [class_id for class_id, name in names.items() if name in PERSON_CLASS_NAMES]
    if len(person_ids) != 1:
        known = ", ".join(list(names.values())[:10])
        raise DataError(
            f"{path}: none of its {len(names)} classes is called person ({known}, …). Provide a model with this class."
        )
    return person_ids[0]


def import_tasks() -> Any:
    """Import `ultralytics.nn.tasks`, which builds and loads the networks.

    Returns:
        The module.

    Raises:
        UnavailableError: If the package is missing or too old.
    """
    if "ultralytics.nn.tasks" not in sys.modules:
        with _preserve_global_state():
            _import_ultralytics()
    tasks: Any = sys.modules["ultralytics.nn.tasks"]
    if not hasattr(tasks, "SAFE_LOAD"):
        raise UnavailableError("ultralytics: the version is too old. Run pip install --upgrade 'hkd-det[yolo]'.")
    return tasks


@contextmanager
def restrict_layer_types(tasks: Any) -> Iterator[None]:
    """Let Ultralytics load files and build networks without running foreign code, inside a `with` block.

    Without it, its files (pickles) and its model definitions (`activation` is passed to `eval`) can run any code.
    Ultralytics raises TypeError for everything that is not a known layer.

    Args:
        tasks: The module `ultralytics.nn.tasks`.
    """
    safe_globals, safe_load = torch.serialization.get_safe_globals(), tasks.SAFE_LOAD
    tasks.SAFE_LOAD = True
    try:
        yield
    finally:
        tasks.SAFE_LOAD = safe_load
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(safe_globals)


def load_model_yaml(name: str) -> dict[str, Any]:
    """Load Ultralytics' definition of a detector of one size.

    Args:
        name: Ultralytics' name, such as yolo11n, yolov8s-p2 or yolov9c.

    Returns:
        The definition as of `filter_model_yaml`.

    Raises:
        UsageError: If there is no such detector; the message suggests similar names.
        UnavailableError: If the package is missing or too old.
    """
    files = _list_model_yamls()
    match = MODEL_NAME_PATTERN.fullmatch(name)
    path = files.get(name) or (files.get(match[1] + (match[3] or "")) if match else None)
    if path is None or not is_detection_model(model_yaml := _read_yaml(path)):
        raise UsageError(f"--model {name}: Ultralytics has no such detector.{_suggest_names(name, files)}")
    scales = model_yaml.get("scales")
    if not scales:
        return filter_model_yaml(model_yaml)
    if not match or match[2] not in scales:
        raise UsageError(f"--model {name}: the size is missing.{_suggest_names(name, files)}")
    return filter_model_yaml({**model_yaml, "scale": match[2]})


def is_detection_model(model_yaml: dict[str, Any]) -> bool:
    """Return whether the head of a definition returns boxes and scores only."""
    return model_yaml["head"][-1][2] in DETECTION_HEADS


def filter_model_yaml(model_yaml: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a definition that determine the architecture."""
    return {key: model_yaml[key] for key in (*ARCHITECTURE_KEYS, "backbone", "head") if model_yaml.get(key) is not None}


def _import_ultralytics() -> None:
    try:
        import ultralytics.nn.tasks  # noqa: F401, PLC0415 - AGPL-3.0: only imported for YOLO models
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UnavailableError(
            f"{package}: not installed. YOLO models require it (AGPL-3.0). Run pip install 'hkd-det[yolo]'."
        ) from None


@contextmanager
def _preserve_global_state() -> Iterator[None]:
    environment, num_threads, print_options = dict(os.environ), cv2.getNumThreads(), np.get_printoptions()
    torch_save, image_open = torch.save, PIL.Image.open
    os.environ.update(QUIET_ENV)
    try:
        with warnings.catch_warnings(), torch._tensor_str.printoptions():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        cv2.setNumThreads(num_threads)
        np.set_printoptions(**print_options)
        torch.save, PIL.Image.open = torch_save, image_open


def _list_model_yamls() -> dict[str, Path]:
    directory = Path(str(import_tasks().__file__)).parents[1] / "cfg" / "models"
    return {path.stem: path for path in sorted(directory.rglob("yolo*.yaml"))}


def _read_yaml(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def _suggest_names(name: str, files: dict[str, Path]) -> str:
    names = []
    for stem, path in files.items():
        model_yaml = _read_yaml(path)
        family = re.fullmatch(r"(yolov?\d+)(.*)", stem)
        if not family or not is_detection_model(model_yaml):
            continue
        if model_yaml.get("scales") and not MODEL_NAME_PATTERN.fullmatch(stem):
            names += [f"{family[1]}{size}{family[2]}" for size in model_yaml["scales"]]
        else:
            names.append(stem)
    similar = difflib.get_close_matches(name, names, 5, 0.5)
    return f" Similar names: {', '.join(similar)}." if similar else ""
