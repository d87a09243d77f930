"""What a two-stage detector's losses add to torchvision's: ignore regions, left out of both stages' samples."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_area

from hkd_det.models.assignment import TruthBatch

DISCARDED = -1  # torchvision's label of what is sampled neither as a person nor as background
MOSTLY = 0.5  # share of a box's area inside an ignore region from which it is left out


def people_and_ignored(truth: TruthBatch) -> tuple[list[Tensor], list[Tensor]]:
    """For each picture the boxes [N, 4] of its people and those [M, 4] of its ignore regions, xyxy.

    Boxes without area are left out: no anchor can be drawn to them.
    """
    solid = (truth.boxes_xyxy[..., 2:] > truth.boxes_xyxy[..., :2]).all(-1)
    return (
        [boxes[kept] for boxes, kept in zip(truth.boxes_xyxy, truth.real & solid, strict=True)],
        [boxes[kept] for boxes, kept in zip(truth.boxes_xyxy, truth.ignore & solid, strict=True)],
    )


def discard_ignored(labels: Tensor, boxes_xyxy: Tensor, ignored_xyxy: Tensor) -> Tensor:
    """Labels [A] in which background boxes [A, 4] that lie mostly in one of the ignore regions [M, 4] are discarded."""
    inside = shared_area(boxes_xyxy, ignored_xyxy) >= MOSTLY * box_area(boxes_xyxy)[:, None]  # [A, M]
    return torch.where((labels == 0) & inside.any(1), DISCARDED, labels)


def shared_area(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """[A, M] area that boxes [A, 4] share with boxes [M, 4]."""
    low = torch.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    high = torch.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    return (high - low).clamp(min=0).prod(-1)


def sampled_boxes_loss(deltas: Tensor, targets: Tensor) -> Tensor:
    """The summed smooth L1 of box offsets [R, 4], as torchvision has it for both stages."""
    return F.smooth_l1_loss(deltas, targets, beta=1 / 9, reduction="sum")
