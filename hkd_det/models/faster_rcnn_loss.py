"""Loss parts of Faster R-CNN that torchvision does not have: ignore regions and soft labels."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_area, box_iou

from hkd_det.models.base import BaseDetector, DetectionBatch, ProposalOutputs
from hkd_det.ops.boxes import giou_loss, pairwise_intersection
from hkd_det.ops.losses import SCORE_EPS, ReduceMean, quality_focal_kd_loss

IGNORE_LABEL = -1  # torchvision's label of boxes that are sampled neither as foreground nor as background
IGNORE_IOA_THRESHOLD = 0.5  # Ratio of a box inside an ignore region from which it is ignored.
POSITIVE_IOU = 0.5  # IoU from which a proposal belongs to a box, as in the training of the second stage.
MAX_ROIS = 100  # Highest-scoring proposals per image that soft labels consider.


def mark_ignored_anchors(labels: Tensor, boxes_xyxy: Tensor, ignore_regions_xyxy: Tensor) -> Tensor:
    """Relabel background boxes that are mostly inside one ignore region, so that they are not sampled.

    Args:
        labels (Tensor[A]): 0 for background, above 0 for foreground.
        boxes_xyxy (Tensor[A, 4]): Anchors or proposals.
        ignore_regions_xyxy (Tensor[M, 4]): Ignore regions.

    Returns:
        labels (Tensor[A]): `labels` with IGNORE_LABEL for these boxes.
    """
    min_area = IGNORE_IOA_THRESHOLD * box_area(boxes_xyxy)[:, None]
    is_inside = pairwise_intersection(boxes_xyxy, ignore_regions_xyxy) >= min_area  # [A, M]
    return torch.where((labels == 0) & is_inside.any(1), IGNORE_LABEL, labels)


def smooth_l1_sum(box_deltas: Tensor, target_deltas: Tensor) -> Tensor:
    """Compute the sum of the smooth L1 loss of box deltas [R, 4] with torchvision's beta of 1/9."""
    return F.smooth_l1_loss(box_deltas, target_deltas, beta=1 / 9, reduction="sum")


def roi_soft_label_losses(
    student: BaseDetector, outputs: ProposalOutputs, detections: DetectionBatch, reduce_mean: ReduceMean
) -> tuple[Tensor, Tensor]:
    """Compute the losses of the second stage of a student with the detections of a teacher as soft labels.

    Scores are trained at the boxes of the teacher, where its scores are known. Boxes are trained there and at the
    proposals of the student nearby; alone, RoIs at the target would only teach to leave a box where it is.

    A teacher with a one-to-one branch gives boxes next to its best ones scores near 0. These scores do not describe
    the content of a box, which the second stage classifies. Such duplicates are suppressed first.

    Args:
        student: Detector with the capability "rois".
        outputs: First-stage outputs of the student.
        detections: Detections of the teacher for the same images.
        reduce_mean: Averages a normalization factor over all processes.

    Returns:
        cls_loss (Tensor): Scalar mean of `quality_focal_kd_loss` with beta 0 over the boxes of the teacher.
        box_loss (Tensor): Scalar mean of the GIoU loss, weighted by the scores of the teacher.
    """
    detections = detections.suppress(POSITIVE_IOU)
    rois, owners = zip(
        *(
            _append_positive_proposals(proposals[:MAX_ROIS], boxes)
            for proposals, boxes in zip(outputs.proposals, detections.boxes_xyxy, strict=True)
        ),
        strict=True,
    )
    roi_outputs = student.forward_rois(outputs, rois)
    scores = torch.cat([score[owner] for score, owner in zip(detections.scores, owners, strict=True)]).detach()  # [R]
    boxes = torch.cat([box[owner] for box, owner in zip(detections.boxes_xyxy, owners, strict=True)]).detach()
    is_teacher_box = torch.cat(
        [
            torch.arange(len(owner), device=owner.device) < len(box)
            for box, owner in zip(detections.boxes_xyxy, owners, strict=True)
        ]
    )
    teacher_logits = scores[is_teacher_box].logit(eps=SCORE_EPS)
    cls_loss = quality_focal_kd_loss(roi_outputs.logits[is_teacher_box], teacher_logits, beta=0)
    box_loss = scores * giou_loss(roi_outputs.boxes_xyxy, boxes)
    return cls_loss.sum() / reduce_mean(is_teacher_box.sum().float()), box_loss.sum() / reduce_mean(scores.sum())


def _append_positive_proposals(proposals: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return RoIs [R, 4], the boxes [N, 4] and then the proposals near one of them, and the box index [R] of each."""
    box_index = torch.arange(len(boxes), device=boxes.device)
    if not len(boxes):
        return boxes, box_index
    best_iou, nearest = box_iou(proposals, boxes).max(1)
    is_positive = best_iou >= POSITIVE_IOU
    return torch.cat([boxes, proposals[is_positive]]), torch.cat([box_index, nearest[is_positive]])
