"""What a two-stage detector's losses add to torchvision's: ignore regions, left out of both stages' samples."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_area

from hkd_det.models.assignment import Targets

IGNORE_LABEL = -1  # torchvision's label of what is sampled neither as a person nor as background
IGNORE_IOA_THRESHOLD = 0.5  # share of a box's area inside an ignore region from which it is left out


def split_ignored(targets: Targets) -> tuple[list[Tensor], list[Tensor]]:
    """For each picture the boxes [N, 4] of its people and those [M, 4] of its ignore regions, xyxy.

    Boxes without area are left out: no anchor can be drawn to them.
    """
    solid = (targets.boxes_xyxy[..., 2:] > targets.boxes_xyxy[..., :2]).all(-1)
    return (
        [boxes[kept] for boxes, kept in zip(targets.boxes_xyxy, targets.valid & solid, strict=True)],
        [boxes[kept] for boxes, kept in zip(targets.boxes_xyxy, targets.ignore & solid, strict=True)],
    )


def mark_ignored_anchors(labels: Tensor, boxes_xyxy: Tensor, ignore_regions_xyxy: Tensor) -> Tensor:
    """Labels [A] in which background boxes [A, 4] that lie mostly in one of the ignore regions [M, 4] are discarded."""
    inside = (
        box_intersection(boxes_xyxy, ignore_regions_xyxy) >= IGNORE_IOA_THRESHOLD * box_area(boxes_xyxy)[:, None]
    )  # [A, M]
    return torch.where((labels == 0) & inside.any(1), IGNORE_LABEL, labels)


def box_intersection(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """[A, M] area that boxes [A, 4] share with boxes [M, 4]."""
    low = torch.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    high = torch.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    return (high - low).clamp(min=0).prod(-1)


def smooth_l1_sum(box_deltas: Tensor, target_deltas: Tensor) -> Tensor:
    """The summed smooth L1 of box offsets [R, 4], as torchvision has it for both stages."""
    return F.smooth_l1_loss(box_deltas, target_deltas, beta=1 / 9, reduction="sum")
