"""Assignment: which points answer for which person. Task-aligned (TOOD, Feng et al. 2021, eq. 1).

A point's claim on a person is t = score^alpha x IoU^beta. A person takes its `top` best-claiming points
among those inside it; a point claimed twice goes to the person it overlaps most. `top` = 1 is the
one-to-one assignment of the end-to-end branch (YOLOv10). The score a point should give is its IoU-scaled
claim. Points inside an ignore region that answer for nobody are left out of the loss.

With `top` = 1 which of several equally good points wins would be a matter of chance, and chance can't be
learnt: `centred` adds a claim for the point nearest the middle, on the level whose cells are an eighth of
the person's height (as CSP, Liu et al. 2019, puts each pedestrian at its centre and scale).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hkd_det.losses.overlap import pairwise_iou

CELLS_A_PERSON = 8  # in height, on the level a person belongs to


@dataclass(frozen=True, eq=False)
class Targets:
    """What the A points of each picture should say.

    positive: [B, A] bool, the point answers for a person.
    owner: [B, A] that person's place in the truth; anything where not positive.
    boxes_xyxy: [B, A, 4] that person's box, input pixels; anything where not positive.
    quality: [B, A] the score it should give, 0..1; 0 where not positive.
    counted: [B, A] bool, the point's score is judged: false inside ignore regions.
    """

    positive: Tensor
    owner: Tensor
    boxes_xyxy: Tensor
    quality: Tensor
    counted: Tensor


@dataclass(frozen=True)
class TaskAlignedAssigner:
    """Claims with the paper's exponents; `top` points a person; `centred` 0 is the paper's own claim."""

    top: int
    alpha: float = 0.5
    beta: float = 6.0
    centred: float = 0.0

    @torch.no_grad()
    def __call__(
        self, scores: Tensor, boxes_xyxy: Tensor, points: Tensor, strides: Tensor, truth: "TruthBatch"
    ) -> Targets:
        """Scores [B, A] 0..1 and boxes [B, A, 4] of points [A, 2] against the truth."""
        inside = points_inside(points, _at_least(truth.boxes_xyxy, strides.min())) & truth.real[..., None]  # [B, M, A]
        iou = pairwise_iou(truth.boxes_xyxy, boxes_xyxy).clamp(min=0) * inside  # [B, M, A]
        claim = scores[:, None].pow(self.alpha) * iou.pow(self.beta) * inside
        if self.centred:
            claim = claim * (-self.centred * _off_centre(truth.boxes_xyxy, points, strides)).exp()
        mine = self._choose(claim, iou, inside)
        positive = mine.any(1)
        owner = mine.float().argmax(1) if mine.shape[1] else torch.zeros_like(positive, dtype=torch.long)
        ignored = (points_inside(points, truth.boxes_xyxy) & truth.ignore[..., None]).any(1)
        return Targets(
            positive=positive,
            owner=owner,
            boxes_xyxy=_take(truth.boxes_xyxy, owner),
            quality=_quality(claim * mine, iou * mine),
            counted=positive | ~ignored,
        )

    def _choose(self, claim: Tensor, iou: Tensor, inside: Tensor) -> Tensor:
        """[B, M, A] bool: each person's best points, each point with one person at most."""
        persons, count = claim.shape[1:]
        if persons == 0:
            return inside
        # At the start every IoU may be 0: then the first points inside the box serve, never a point outside it.
        rank = torch.where(inside, claim, -1.0)
        best = rank.topk(min(self.top, count), dim=2).indices
        chosen = torch.zeros_like(inside).scatter_(2, best, value=True) & inside
        contested = chosen.sum(1, keepdim=True) > 1
        favourite = torch.where(chosen, iou, -1.0).argmax(1, keepdim=True)  # [B, 1, A]
        winner = torch.zeros_like(chosen).scatter(1, favourite, value=True)
        return torch.where(contested, chosen & winner, chosen)


@dataclass(frozen=True, eq=False)
class TruthBatch:
    """The people of B pictures, padded to the largest number M.

    boxes_xyxy: [B, M, 4] input pixels. real: [B, M] bool, a person to find. ignore: [B, M] bool, a region
    to leave alone. Padding is neither.
    """

    boxes_xyxy: Tensor
    real: Tensor
    ignore: Tensor

    def to(self, device: torch.device) -> "TruthBatch":
        """The same truth on another device."""
        return TruthBatch(self.boxes_xyxy.to(device), self.real.to(device), self.ignore.to(device))


def points_inside(points: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """[B, M, A] bool: point [A, 2] lies strictly inside box [B, M, 4]."""
    x1, y1, x2, y2 = boxes_xyxy[..., None, :].unbind(-1)  # [B, M, 1]
    x, y = points.unbind(-1)  # [A]
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)


def _off_centre(boxes_xyxy: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """[B, M, A] squared distance from a box's middle, in strides, plus squared octaves from the level of its height."""
    x1, y1, x2, y2 = boxes_xyxy[..., None, :].unbind(-1)  # [B, M, 1]
    x, y = points.unbind(-1)  # [A]
    across, down = (x - (x1 + x2) / 2) / strides, (y - (y1 + y2) / 2) / strides  # [B, M, A]
    octaves = torch.log2((y2 - y1).clamp(min=1.0)) - torch.log2(CELLS_A_PERSON * strides)
    return across.square() + down.square() + octaves.square()


def _at_least(boxes_xyxy: Tensor, side: Tensor) -> Tensor:
    """Boxes grown about their centres to `side` pixels, so that a distant person still holds a point."""
    centre = (boxes_xyxy[..., :2] + boxes_xyxy[..., 2:]) / 2
    half = ((boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]) / 2).clamp(min=float(side) / 2 + 1e-3)
    return torch.cat([centre - half, centre + half], -1)


def _take(boxes_xyxy: Tensor, owner: Tensor) -> Tensor:
    if boxes_xyxy.shape[1] == 0:
        return boxes_xyxy.new_zeros((*owner.shape, 4))
    return boxes_xyxy.gather(1, owner[..., None].expand(-1, -1, 4))


def _quality(claim: Tensor, iou: Tensor) -> Tensor:
    """[B, A]: claims scaled so that each person's best point is asked for its best IoU (TOOD, eq. 4)."""
    if claim.shape[1] == 0:
        return claim.new_zeros((claim.shape[0], claim.shape[2]))
    best_claim = claim.amax(2, keepdim=True)
    best_iou = iou.amax(2, keepdim=True)
    return (claim * best_iou / (best_claim + 1e-9)).amax(1)
