"""Ultralytics' YOLO models as pedestrian detectors: their networks, our anchor points, loss and outputs.

Ultralytics' own .pt files, pretrained or trained there, as detectors of people.
"""

import math
import zipfile
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hkd_det.errors import DataError, UsageError
from hkd_det.models.base import BaseDetector, BranchOutputs, DenseOutputs, DetectionBatch, FeatureInfo
from hkd_det.models.head import PRIOR_PROB, dist2bbox, make_anchors
from hkd_det.models.surgery import NO_CHANGES, ModelChanges, PrunableLayer, apply_changes, filter_dense_convs
from hkd_det.models.ultralytics_io import (
    filter_model_yaml,
    import_tasks,
    is_detection_model,
    load_model_yaml,
    restrict_layer_types,
)
from hkd_det.ops.nms import batched_nms

MAX_STRIDE = 32  # what every picture's sides are multiples of


@dataclass(frozen=True)
class UltralyticsSpec:
    """Everything that fixes a YOLO model's shape; saved with its weights.

    name: Ultralytics' (yolo11n). layout: Ultralytics' definition of it, so that a later version's can't differ; `nc` in
    it is the number of classes. person: which of them is the person.
    """

    name: str
    model_yaml: dict[str, Any]
    person_class_id: int = 0


def make_ultralytics_spec(name: str) -> UltralyticsSpec:
    """The named model with one class, the person; UsageError for a name that Ultralytics has not."""
    return UltralyticsSpec(name, {**load_model_yaml(name), "nc": 1})


class UltralyticsDetector(BaseDetector):
    """Pictures in, people out.

    `one` of its predictions is the one-to-one head's of models that have one (YOLOv10, YOLO26), with boxes of its own;
    as in Ultralytics' training its gradient stays out of the neck.
    """

    spec: UltralyticsSpec

    def __init__(self, spec: UltralyticsSpec, changes: ModelChanges = NO_CHANGES) -> None:
        super().__init__()
        self.spec, self.changes = spec, changes
        self.network = _build_network(spec)
        self.strides = tuple(int(stride) for stride in self._head.stride)
        if max(self.strides) > MAX_STRIDE:
            raise UsageError(
                f"{spec.name}: stride {max(self.strides)}, where pictures come in steps of {MAX_STRIDE} px"
            )
        for scores in _find_score_convs(self._head):
            nn.init.constant_(scores.bias, -math.log((1 - PRIOR_PROB) / PRIOR_PROB))  # type: ignore[arg-type]
        apply_changes(self, changes)

    def forward(self, images: Tensor) -> DenseOutputs:
        """[B, 3, H, W] uint8 or float RGB, 0..255, H and W multiples of 32, to a prediction; alike in either mode."""
        maps = self.forward_features(images)
        input_hw = (images.shape[-2], images.shape[-1])
        points, strides = make_anchors(input_hw, self.strides, images.device)
        many = self._forward_branch(maps, self._head.one2many, points, strides)
        one = None
        if self.is_end2end:
            one = self._forward_branch([level.detach() for level in maps], self._head.one2one, points, strides)
        return DenseOutputs(many, one, points, strides, input_hw)

    @property
    def is_end2end(self) -> bool:
        """Whether the model has a one-to-one head and needs no suppression."""
        return getattr(self._head, "one2one_cv2", None) is not None

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The neck's maps that enter the head, fine to coarse, of [B, 3, H, W] RGB pictures, 0..255."""
        outputs: list[Any] = []
        value: Any = images.float() / 255
        for layer in self.network.model[:-1]:
            value = layer(_gather_inputs(layer.f, value, outputs))
            outputs.append(value if layer.i in self.network.save else None)
        return [outputs[index] for index in self._head.f]

    def predict(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """End to end: the best boxes [B, K, 4] xyxy input pixels and scores [B, K], 0..1, falling.

        By the one-to-one head alone where there is one, else by the other and suppression, 0 filling up.
        """
        head = self._head.one2one if self.is_end2end else self._head.one2many
        points, strides = make_anchors((images.shape[-2], images.shape[-1]), self.strides, images.device)
        return self._select_detections(
            self._forward_branch(self.forward_features(images), head, points, strides), max_det
        )

    def postprocess(self, outputs: DenseOutputs, max_det: int = 100) -> DetectionBatch:
        """The one-to-one head's best; without one the other's that stay after suppression."""
        boxes, scores = self._select_detections(outputs.one2one or outputs.one2many, max_det)
        return DetectionBatch(
            tuple(of_one[kept > 0] for of_one, kept in zip(boxes, scores, strict=True)),
            tuple(kept[kept > 0] for kept in scores),
        )

    def feature_info(self) -> list[FeatureInfo]:
        """The neck's layers that the head reads."""
        widths = [branch[0].conv.in_channels for branch in self._head.cv2]
        return [
            FeatureInfo(f"network.model.{index}", stride, width)
            for index, stride, width in zip(self._head.f, self.strides, widths, strict=True)
        ]

    def prunable_layers(self) -> list[PrunableLayer]:
        """The bottlenecks' first convolutions, which only their second reads, and the head's but the last."""
        bottleneck = import_tasks().Bottleneck
        found = [
            PrunableLayer(f"{name}.cv1.conv", (f"{name}.cv1.bn",), (f"{name}.cv2.conv",))
            for name, module in self.named_modules()
            if type(module) is bottleneck
        ]
        return filter_dense_convs(self, [*found, *_find_head_layers(self._head, f"network.model.{self._head.i}")])

    @property
    def _head(self) -> Any:
        return self.network.model[-1]

    def _forward_branch(
        self, features: list[Tensor], head: dict[str, nn.Module], anchor_points: Tensor, strides: Tensor
    ) -> BranchOutputs:
        raw = self._head.forward_head(features, **head)
        # float32 from here on: box arithmetic must not run in bfloat16.
        logits = raw["scores"][:, self.spec.person_class_id].float()
        sides = raw["boxes"].float().transpose(1, 2).unflatten(2, (4, self._head.reg_max))  # [B, A, 4, bins]
        if self._head.reg_max > 1:
            return BranchOutputs(logits, dist2bbox(sides, anchor_points, strides), sides)
        left_up, right_down = (sides[..., 0] * strides[:, None]).split(2, dim=-1)
        return BranchOutputs(logits, torch.cat([anchor_points - left_up, anchor_points + right_down], -1))

    def _select_detections(self, branch: BranchOutputs, max_det: int) -> tuple[Tensor, Tensor]:
        if not self.is_end2end:
            return batched_nms(branch.boxes_xyxy, branch.logits.sigmoid(), max_det)
        scores, index = branch.logits.topk(min(max_det, branch.logits.shape[1]))
        return branch.boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)), scores.sigmoid()


def _build_network(spec: UltralyticsSpec) -> Any:
    """Ultralytics' network; UsageError for a definition that it does not build."""
    tasks = import_tasks()
    try:
        with restrict_layer_types(tasks):
            return tasks.DetectionModel(deepcopy(spec.model_yaml), verbose=False)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{spec.name}: Ultralytics does not build this model: {error}") from error


def _find_score_convs(head: Any) -> list[nn.Conv2d]:
    """The convolutions that give the scores, of all levels and both heads."""
    branches = [*head.cv3, *getattr(head, "one2one_cv3", ())]
    return [branch[-1] for branch in branches]


def _find_head_layers(head: Any, name: str) -> list[PrunableLayer]:
    """Each convolution of a head's branches that the branch's next one reads."""
    found = []
    for branches in ("cv2", "cv3", "one2one_cv2", "one2one_cv3"):
        for level, branch in enumerate(getattr(head, branches, None) or ()):
            inside = f"{name}.{branches}.{level}"
            convolutions = [f"{inside}.{part}" for part, module in branch.named_modules() if hasattr(module, "groups")]
            found += [
                PrunableLayer(conv, (f"{conv.removesuffix('.conv')}.bn",), (reader,))
                for conv, reader in pairwise(convolutions)
            ]
    return found


def _gather_inputs(from_index: int | list[int], previous: Any, outputs: list[Any]) -> Any:
    """What a layer reads: the last output (-1), an earlier one, or several, as Ultralytics numbers them."""
    if isinstance(from_index, int):
        return previous if from_index == -1 else outputs[from_index]
    return [previous if index == -1 else outputs[index] for index in from_index]


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
