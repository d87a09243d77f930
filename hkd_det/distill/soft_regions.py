"""A teacher's detections as soft targets of a two-stage student's second stage: any teacher's, a black box's too.

Scores are learnt at the teacher's boxes: there it says what it thinks. Boxes are learnt there, and from the student's
own proposals nearby: a region that lies right already teaches only to leave it where it is.

A teacher that answers once a person says next to nothing (1e-9) of the boxes beside its best. That is no opinion of
what they show, and a second stage judges what a region shows: such doubles are left out.
"""

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from hkd_det.losses.detection import ReduceMean
from hkd_det.losses.overlap import generalized_box_iou_loss
from hkd_det.losses.soft_score import SCORE_EPS, quality_focal_kd_loss
from hkd_det.models.faster_rcnn import FasterRCNN
from hkd_det.models.prediction import DetectionBatch, ProposalOutputs

POSITIVE_IOU = 0.5  # IoU from which a proposal answers for a box, as in the second stage's own training
MAX_ROIS = 100  # of the student's best, how many are looked at a picture


def roi_soft_label_losses(
    student: FasterRCNN, student_outputs: ProposalOutputs, detections: DetectionBatch, reduce_mean: ReduceMean
) -> tuple[Tensor, Tensor]:
    """The score term and the box term, scalars.

    Score: the binary divergence of the student's score from the teacher's, mean over the teacher's boxes. Box:
    1 - GIoU of the student's box and the teacher's, mean weighted by the teacher's score.
    """
    detections = nms_detections(detections)
    judged = [
        _append_positive_proposals(mine[:MAX_ROIS], theirs)
        for mine, theirs in zip(student_outputs.proposals, detections.boxes_xyxy, strict=True)
    ]
    answer = student.forward_rois(student_outputs, [regions for regions, _ in judged])
    owners = [owner for _, owner in judged]
    scores = torch.cat([score[owner] for score, owner in zip(detections.scores, owners, strict=True)]).detach()  # [R]
    boxes = torch.cat([box[owner] for box, owner in zip(detections.boxes_xyxy, owners, strict=True)]).detach()
    own = torch.cat(
        [
            torch.arange(len(owner), device=owner.device) < len(box)
            for box, owner in zip(detections.boxes_xyxy, owners, strict=True)
        ]
    )
    divergence = quality_focal_kd_loss(answer.logits[own], scores[own].logit(eps=SCORE_EPS), beta=0)
    distance = generalized_box_iou_loss(answer.boxes_xyxy, boxes)
    return divergence.sum() / reduce_mean(own.sum().float()), (scores * distance).sum() / reduce_mean(scores.sum())


def nms_detections(detections: DetectionBatch) -> DetectionBatch:
    """The detections but those that overlap a better one by more than NEAR: the better one tells whom they show."""
    kept = [
        nms(boxes.float(), scores.float(), POSITIVE_IOU)
        for boxes, scores in zip(detections.boxes_xyxy, detections.scores, strict=True)
    ]
    return DetectionBatch(
        tuple(boxes[index] for boxes, index in zip(detections.boxes_xyxy, kept, strict=True)),
        tuple(scores[index] for scores, index in zip(detections.scores, kept, strict=True)),
    )


def _append_positive_proposals(proposals: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """[R, 4] the boxes [N, 4], then those proposals [P, 4] near one of them; and [R] whose each region is."""
    own = torch.arange(len(boxes), device=boxes.device)
    if not len(boxes):
        return boxes, own
    best, owner = box_iou(proposals, boxes).max(1)
    return torch.cat([boxes, proposals[best >= POSITIVE_IOU]]), torch.cat([own, owner[best >= POSITIVE_IOU]])
