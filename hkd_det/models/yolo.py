"""Ultralytics' YOLO models as pedestrian detectors: their networks, our anchor points, loss and outputs."""

import math
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hkd_det.errors import UsageError
from hkd_det.models.family import PersonDetector
from hkd_det.models.head import PRIOR
from hkd_det.models.points import anchor_points, decode_boxes
from hkd_det.models.prediction import Branch, Found, Prediction
from hkd_det.models.suppression import suppressed
from hkd_det.models.surgery import UNCHANGED, Changes, Inner, apply_changes, plain_layers
from hkd_det.models.tap import Tap
from hkd_det.models.yolo_names import definition
from hkd_det.models.yolo_package import import_tasks, known_layers_only

COARSEST = 32  # what every picture's sides are multiples of


@dataclass(frozen=True)
class YoloSpec:
    """Everything that fixes a YOLO model's shape; saved with its weights.

    name: Ultralytics' (yolo11n). layout: Ultralytics' definition of it, so that a later version's can't differ; `nc` in
    it is the number of classes. person: which of them is the person.
    """

    name: str
    layout: dict[str, Any]
    person: int = 0


def yolo_spec(name: str) -> YoloSpec:
    """The named model with one class, the person; UsageError for a name that Ultralytics has not."""
    return YoloSpec(name, {**definition(name), "nc": 1})


class YoloDetector(PersonDetector):
    """Pictures in, people out.

    `one` of its predictions is the one-to-one head's of models that have one (YOLOv10, YOLO26), with boxes of its own;
    as in Ultralytics' training its gradient stays out of the neck.
    """

    spec: YoloSpec

    def __init__(self, spec: YoloSpec, changes: Changes = UNCHANGED) -> None:
        super().__init__()
        self.spec, self.changes = spec, changes
        self.network = _network(spec)
        self.strides = tuple(int(stride) for stride in self._head.stride)
        if max(self.strides) > COARSEST:
            raise UsageError(f"{spec.name}: stride {max(self.strides)}, where pictures come in steps of {COARSEST} px")
        for scores in _last_layers(self._head):
            nn.init.constant_(scores.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]
        apply_changes(self, changes)

    def forward(self, pictures: Tensor) -> Prediction:
        """[B, 3, H, W] uint8 or float RGB, 0..255, H and W multiples of 32, to a prediction; alike in either mode."""
        maps = self.pyramid(pictures)
        input_hw = (pictures.shape[-2], pictures.shape[-1])
        points, strides = anchor_points(input_hw, self.strides, pictures.device)
        many = self._branch(maps, self._head.one2many, points, strides)
        one = None
        if self.answers_once:
            one = self._branch([level.detach() for level in maps], self._head.one2one, points, strides)
        return Prediction(many, one, points, strides, input_hw)

    @property
    def answers_once(self) -> bool:
        """Whether the model has a one-to-one head and needs no suppression."""
        return getattr(self._head, "one2one_cv2", None) is not None

    def pyramid(self, pictures: Tensor) -> list[Tensor]:
        """The neck's maps that enter the head, fine to coarse, of [B, 3, H, W] RGB pictures, 0..255."""
        outputs: list[Any] = []
        value: Any = pictures.float() / 255
        for layer in self.network.model[:-1]:
            value = layer(_sources(layer.f, value, outputs))
            outputs.append(value if layer.i in self.network.save else None)
        return [outputs[index] for index in self._head.f]

    def detect(self, pictures: Tensor, top: int = 300) -> tuple[Tensor, Tensor]:
        """End to end: the best boxes [B, K, 4] xyxy input pixels and scores [B, K], 0..1, falling.

        By the one-to-one head alone where there is one, else by the other and suppression, 0 filling up.
        """
        head = self._head.one2one if self.answers_once else self._head.one2many
        points, strides = anchor_points((pictures.shape[-2], pictures.shape[-1]), self.strides, pictures.device)
        return self._best(self._branch(self.pyramid(pictures), head, points, strides), top)

    def found(self, output: Prediction, top: int = 100) -> Found:
        """The one-to-one head's best; without one the other's that stay after suppression."""
        boxes, scores = self._best(output.one or output.many, top)
        return Found(
            tuple(of_one[kept > 0] for of_one, kept in zip(boxes, scores, strict=True)),
            tuple(kept[kept > 0] for kept in scores),
        )

    def taps(self) -> list[Tap]:
        """The neck's layers that the head reads."""
        widths = [branch[0].conv.in_channels for branch in self._head.cv2]
        return [
            Tap(f"network.model.{index}", stride, width)
            for index, stride, width in zip(self._head.f, self.strides, widths, strict=True)
        ]

    def inner_layers(self) -> list[Inner]:
        """The bottlenecks' first convolutions, which only their second reads, and the head's but the last."""
        bottleneck = import_tasks().Bottleneck
        found = [
            Inner(f"{name}.cv1.conv", (f"{name}.cv1.bn",), (f"{name}.cv2.conv",))
            for name, module in self.named_modules()
            if type(module) is bottleneck
        ]
        return plain_layers(self, [*found, *_head_layers(self._head, f"network.model.{self._head.i}")])

    @property
    def _head(self) -> Any:
        return self.network.model[-1]

    def _branch(self, maps: list[Tensor], head: dict[str, nn.Module], points: Tensor, strides: Tensor) -> Branch:
        raw = self._head.forward_head(maps, **head)
        # float32 from here on: box arithmetic must not run in bfloat16.
        logits = raw["scores"][:, self.spec.person].float()
        sides = raw["boxes"].float().transpose(1, 2).unflatten(2, (4, self._head.reg_max))  # [B, A, 4, bins]
        if self._head.reg_max > 1:
            return Branch(logits, decode_boxes(sides, points, strides), sides)
        left_up, right_down = (sides[..., 0] * strides[:, None]).split(2, dim=-1)
        return Branch(logits, torch.cat([points - left_up, points + right_down], -1))

    def _best(self, branch: Branch, top: int) -> tuple[Tensor, Tensor]:
        if not self.answers_once:
            return suppressed(branch.boxes_xyxy, branch.logits.sigmoid(), top)
        scores, index = branch.logits.topk(min(top, branch.logits.shape[1]))
        return branch.boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)), scores.sigmoid()


def _network(spec: YoloSpec) -> Any:
    """Ultralytics' network; UsageError for a definition that it does not build."""
    tasks = import_tasks()
    try:
        with known_layers_only(tasks):
            return tasks.DetectionModel(deepcopy(spec.layout), verbose=False)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{spec.name}: Ultralytics does not build this model: {error}") from error


def _last_layers(head: Any) -> list[nn.Conv2d]:
    """The convolutions that give the scores, of all levels and both heads."""
    branches = [*head.cv3, *getattr(head, "one2one_cv3", ())]
    return [branch[-1] for branch in branches]


def _head_layers(head: Any, name: str) -> list[Inner]:
    """Each convolution of a head's branches that the branch's next one reads."""
    found = []
    for branches in ("cv2", "cv3", "one2one_cv2", "one2one_cv3"):
        for level, branch in enumerate(getattr(head, branches, None) or ()):
            inside = f"{name}.{branches}.{level}"
            convolutions = [f"{inside}.{part}" for part, module in branch.named_modules() if hasattr(module, "groups")]
            found += [
                Inner(conv, (f"{conv.removesuffix('.conv')}.bn",), (reader,)) for conv, reader in pairwise(convolutions)
            ]
    return found


def _sources(wanted: int | list[int], last: Any, outputs: list[Any]) -> Any:
    """What a layer reads: the last output (-1), an earlier one, or several, as Ultralytics numbers them."""
    if isinstance(wanted, int):
        return last if wanted == -1 else outputs[wanted]
    return [last if index == -1 else outputs[index] for index in wanted]
