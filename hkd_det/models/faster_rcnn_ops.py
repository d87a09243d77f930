"""Operations of Faster R-CNN that torchvision lacks: traceable inference, ignore regions and soft labels.

Traceable inference has shapes that do not depend on values, for the ONNX export. The results equal those of
torchvision. Where torchvision drops a proposal, its score is 0 here. Where torchvision gathers the RoIs of one pyramid
level, all levels are pooled for all RoIs here and the right one is selected.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.onnx.operators import shape_as_tensor
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import box_area, box_iou

from hkd_det.models.base import BaseDetector, DetectionBatch, ProposalOutputs
from hkd_det.ops.boxes import SUPPRESSED_LOGIT, clip_boxes_traceable, cluster_nms, giou_loss, pairwise_intersection
from hkd_det.ops.losses import (
    SCORE_EPS,
    ReduceMean,
    quality_focal_kd_loss,
)

PERSON_LABEL, NUM_CLASSES = 1, 2  # Label 0 is the background.


STRIDES = (4, 8, 16, 32)  # of the pyramid levels that RoIs are pooled from


ROI_SIZE = 7  # cells per side of a pooled RoI


SAMPLING_RATIO = 2  # samples per side of a cell


CANONICAL_PX, CANONICAL_LEVEL = 224, 4  # An RoI of 224 px is pooled at stride 2^4 (Lin et al. 2017, eq. 1).


def compute_second_stage(
    rpn: Any, roi_heads: Any, features: tuple[Tensor, ...], images: Tensor
) -> tuple[Tensor, Tensor]:
    """Run both stages on the feature pyramid.

    Args:
        rpn: torchvision's `RegionProposalNetwork`.
        roi_heads: torchvision's `RoIHeads`.
        features (tuple of Tensor[B, C, H_i, W_i]): All five pyramid levels, fine to coarse.
        images (Tensor[B, 3, H, W]): Input images, only their shape is used.

    Returns:
        boxes (Tensor[B, P, 4]): Second-stage boxes of all proposals, xyxy, input pixels, clipped to the image.
        logits (Tensor[B, P]): Their logits, `SUPPRESSED_LOGIT` for unused rows.
    """
    proposals, scores = _compute_proposals(rpn, features, images)
    roi_features = _pool_rois(features[: len(STRIDES)], proposals)
    class_logits, deltas = roi_heads.box_predictor(roi_heads.box_head(roi_features))
    deltas = deltas.reshape(-1, NUM_CLASSES, 4)[:, PERSON_LABEL]
    boxes = roi_heads.box_coder.decode_single(deltas, proposals.flatten(0, 1)).view_as(proposals)
    logits = (class_logits[:, PERSON_LABEL] - class_logits[:, 0]).view_as(scores)
    return clip_boxes_traceable(boxes, shape_as_tensor(images)[2:].float()), torch.where(
        scores > 0, logits, torch.full_like(logits, SUPPRESSED_LOGIT)
    )


def _compute_proposals(rpn: Any, features: tuple[Tensor, ...], images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first-stage boxes [B, P, 4] and scores [B, P], best first; unused rows have score 0."""
    levels = [_compute_level_proposals(rpn, level, feature, images) for level, feature in enumerate(features)]
    boxes, scores = (torch.stack(values, 1).flatten(0, 1) for values in zip(*levels, strict=True))  # [B * levels, C]
    boxes, scores = cluster_nms(boxes, scores, int(scores.shape[1]), rpn.nms_thresh)  # per level
    boxes, scores = (
        boxes.reshape(-1, len(features) * boxes.shape[1], 4),
        scores.reshape(-1, len(features) * scores.shape[1]),
    )
    scores, index = scores.topk(rpn.post_nms_top_n())
    return boxes.gather(1, index[..., None].expand(-1, -1, 4)), scores


def _compute_level_proposals(rpn: Any, level: int, features: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best clipped boxes [B, C, 4] of a level and their scores [B, C], 0 for boxes without area."""
    scores, deltas = concat_box_prediction_layers(*rpn.head([features]))
    scores = scores.reshape(features.shape[0], -1).sigmoid()  # [B, A]
    count = rpn.pre_nms_top_n()
    padding = max(0, count - int(scores.shape[1]))  # The number of candidates is the same for all image sizes.
    scores, index = F.pad(scores, (0, padding)).topk(count)  # [B, C]
    anchors = F.pad(_make_anchors(rpn.anchor_generator.cell_anchors[level], features, images), (0, 0, 0, padding))
    deltas = F.pad(deltas.reshape(features.shape[0], -1, 4), (0, 0, 0, padding))
    deltas = deltas.gather(1, index[..., None].expand(-1, -1, 4))
    boxes = rpn.box_coder.decode_single(deltas.flatten(0, 1), anchors[index].flatten(0, 1))
    boxes = clip_boxes_traceable(boxes.view_as(deltas), shape_as_tensor(images)[2:].float())
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes, scores * (sides >= rpn.min_size).all(-1)


def _make_anchors(cell_anchors: Tensor, features: Tensor, images: Tensor) -> Tensor:
    """Return the anchors [A, 4] of a level in input pixels, row by row; `cell_anchors` [3, 4] are those of one cell."""
    rows, columns = features.shape[-2], features.shape[-1]
    y, x = torch.meshgrid(
        torch.arange(rows) * (images.shape[-2] // rows),
        torch.arange(columns) * (images.shape[-1] // columns),
        indexing="ij",
    )
    offset = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4).float()
    return (offset + cell_anchors).reshape(-1, 4)


def _pool_rois(features: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    """Return the features [B * P, C, 7, 7] of boxes [B, P, 4], each pooled from the level of its size."""
    sides = boxes[..., 2:] - boxes[..., :2]
    octave = torch.log2((sides[..., 0] * sides[..., 1]).sqrt() / CANONICAL_PX)
    box_level = (torch.floor(CANONICAL_LEVEL + octave + 1e-6) - 2).clamp(0, len(features) - 1)  # level 0: stride 2^2
    pooled_levels = [
        _roi_align_level(feature, boxes / stride, box_level == level)
        for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True))
    ]
    pooled = torch.stack(pooled_levels).sum(0)  # [B, C, P * 7, 7]
    return pooled.reshape(*pooled.shape[:2], -1, ROI_SIZE, ROI_SIZE).transpose(1, 2).flatten(0, 1)


def _roi_align_level(features: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
    """Compute `torchvision.ops.roi_align` by GridSample, as TensorRT has RoiAlign only as a plugin.

    Args:
        features (Tensor[B, C, h, w]): Feature map.
        boxes (Tensor[B, P, 4]): Boxes in cells of the feature map.
        mask (Tensor[B, P]): bool, boxes to pool. The result is 0 for the others.

    Returns:
        pooled (Tensor[B, C, P * 7, 7]): Pooled features.
    """
    steps = (torch.arange(ROI_SIZE * SAMPLING_RATIO) + 0.5) / (ROI_SIZE * SAMPLING_RATIO)
    x, y = (
        boxes[..., axis, None] + steps * (boxes[..., axis + 2, None] - boxes[..., axis, None]).clamp(min=1)
        for axis in (0, 1)
    )  # [B, P, 14]
    rows, columns = features.shape[-2], features.shape[-1]
    is_read = (y <= rows)[..., None] & (x <= columns)[:, :, None] & mask[..., None, None]  # [B, P, 14, 14]
    x, y = (2 * x + 1) / columns - 1, (2 * y + 1) / rows - 1
    grid = torch.stack([x[:, :, None].expand(is_read.shape), y[..., None].expand(is_read.shape)], -1).flatten(1, 2)
    values = F.grid_sample(features, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(values * is_read.flatten(1, 2)[:, None], SAMPLING_RATIO)


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

    Scores are trained at the boxes of the teacher. Boxes are trained there and at the proposals of the student that
    overlap one of them. Without these proposals, the target of every RoI would be the RoI itself.

    A teacher with a one-to-one branch predicts scores near 0 for duplicates of its best boxes. These scores do not
    describe the content of a box, which the second stage classifies. Duplicates are therefore suppressed first.

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
    rois, box_indices = zip(
        *(
            _append_positive_proposals(proposals[:MAX_ROIS], boxes)
            for proposals, boxes in zip(outputs.proposals, detections.boxes_xyxy, strict=True)
        ),
        strict=True,
    )
    roi_outputs = student.forward_rois(outputs, rois)
    # scores [R] and boxes [R, 4] of the teacher box that each RoI belongs to
    scores = torch.cat([score[index] for score, index in zip(detections.scores, box_indices, strict=True)]).detach()
    boxes = torch.cat([box[index] for box, index in zip(detections.boxes_xyxy, box_indices, strict=True)]).detach()
    is_teacher_box = torch.cat(
        [
            torch.arange(len(index), device=index.device) < len(box)
            for box, index in zip(detections.boxes_xyxy, box_indices, strict=True)
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
