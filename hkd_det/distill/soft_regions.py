"""A teacher's detections as soft targets of a two-stage student's second stage: any teacher's, a black box's too.

Scores are learnt at the teacher's boxes: there it says what it thinks. Boxes are learnt there, and from the student's
own proposals nearby: a region that lies right already teaches only to leave it where it is.

A teacher that answers once a person says next to nothing (1e-9) of the boxes beside its best. That is no opinion of
what they show, and a second stage judges what a region shows: such doubles are left out.
"""

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from hkd_det.losses.detection import Norm
from hkd_det.losses.overlap import giou_loss
from hkd_det.losses.soft_score import CERTAIN, soft_score_loss
from hkd_det.models.faster_rcnn import FasterRcnn
from hkd_det.models.prediction import Found, TwoStage

NEAR = 0.5  # IoU from which a proposal answers for a box, as in the second stage's own training
PROPOSALS = 100  # of the student's best, how many are looked at a picture


def soft_regions(student: FasterRcnn, output: TwoStage, found: Found, norm_of: Norm) -> tuple[Tensor, Tensor]:
    """The score term and the box term, scalars.

    Score: the binary divergence of the student's score from the teacher's, mean over the teacher's boxes. Box:
    1 - GIoU of the student's box and the teacher's, mean weighted by the teacher's score.
    """
    found = without_doubles(found)
    judged = [
        _with_near(mine[:PROPOSALS], theirs) for mine, theirs in zip(output.proposals, found.boxes_xyxy, strict=True)
    ]
    answer = student.regions(output, [regions for regions, _ in judged])
    owners = [owner for _, owner in judged]
    scores = torch.cat([score[owner] for score, owner in zip(found.scores, owners, strict=True)]).detach()  # [R]
    boxes = torch.cat([box[owner] for box, owner in zip(found.boxes_xyxy, owners, strict=True)]).detach()
    own = torch.cat(
        [
            torch.arange(len(owner), device=owner.device) < len(box)
            for box, owner in zip(found.boxes_xyxy, owners, strict=True)
        ]
    )
    divergence = soft_score_loss(answer.logits[own], scores[own].logit(eps=CERTAIN), power=0)
    distance = giou_loss(answer.boxes_xyxy, boxes)
    return divergence.sum() / norm_of(own.sum().float()), (scores * distance).sum() / norm_of(scores.sum())


def without_doubles(found: Found) -> Found:
    """The detections but those that overlap a better one by more than NEAR: the better one tells whom they show."""
    kept = [
        nms(boxes.float(), scores.float(), NEAR) for boxes, scores in zip(found.boxes_xyxy, found.scores, strict=True)
    ]
    return Found(
        tuple(boxes[index] for boxes, index in zip(found.boxes_xyxy, kept, strict=True)),
        tuple(scores[index] for scores, index in zip(found.scores, kept, strict=True)),
    )


def _with_near(proposals: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """[R, 4] the boxes [N, 4], then those proposals [P, 4] near one of them; and [R] whose each region is."""
    own = torch.arange(len(boxes), device=boxes.device)
    if not len(boxes):
        return boxes, own
    best, owner = box_iou(proposals, boxes).max(1)
    return torch.cat([boxes, proposals[best >= NEAR]]), torch.cat([own, owner[best >= NEAR]])
