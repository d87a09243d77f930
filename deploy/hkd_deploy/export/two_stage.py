"""Faster R-CNN for a graph: as torchvision answers, with shapes that depend on no value.

Where torchvision drops a proposal, its score here is 0; where it gathers the regions of one pyramid level, here every
level is read for all regions and the right one kept.
"""

import torch
from torch import Tensor
from torch.onnx.operators import shape_as_tensor
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import roi_align

from hkd_deploy.export.resize import cut
from hkd_det.models.faster_rcnn import CLASSES, PERSON, POOLED, STRIDES, FasterRcnn
from hkd_det.models.peaks import SILENT
from hkd_det.models.suppression import suppressed

SAMPLES = 2  # a side of a cell
CANONICAL_PX, CANONICAL_LEVEL = 224, 4  # a region of 224 px belongs to the level of stride 2^4 (Lin et al. 2017, eq. 1)


def detections(detector: FasterRcnn, pictures: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The best boxes [B, K, 4] input pixels and scores [B, K], 0..1, falling; 0 fills up."""
    boxes, logits = candidates(detector, pictures)
    return suppressed(boxes, logits.sigmoid() * (logits > SILENT), top, detector.roi_heads.nms_thresh)


def candidates(detector: FasterRcnn, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """What the second stage says of all proposals: boxes [B, P, 4], cut at the borders, and logits [B, P]."""
    maps = detector.backbone((pictures - detector.mean) / detector.std)
    proposals, scores = _proposals(detector, maps, pictures)
    pooled = _pooled(maps[: len(STRIDES)], proposals)
    class_logits, deltas = detector.roi_heads.box_predictor(detector.roi_heads.box_head(pooled))
    deltas = deltas.reshape(-1, CLASSES, 4)[:, PERSON]
    boxes = detector.roi_heads.box_coder.decode_single(deltas, proposals.flatten(0, 1)).view_as(proposals)
    logits = (class_logits[:, PERSON] - class_logits[:, 0]).view_as(scores)
    return cut(boxes, shape_as_tensor(pictures)[2:].float()), torch.where(
        scores > 0, logits, torch.full_like(logits, SILENT)
    )


def _proposals(detector: FasterRcnn, maps: tuple[Tensor, ...], pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The first stage's boxes [B, P, 4] and scores [B, P], best first; 0 for those that are none."""
    boxes, scores = [], []
    for level, features in enumerate(maps):
        found = _of_level(detector, level, features, pictures)
        kept = suppressed(*found, top=found[1].shape[1], iou=detector.rpn.nms_thresh)
        boxes.append(kept[0])
        scores.append(kept[1])
    every, score = torch.cat(boxes, 1), torch.cat(scores, 1)
    score, index = score.topk(min(detector.rpn.post_nms_top_n(), score.shape[1]))
    return every.gather(1, index[..., None].expand(-1, -1, 4)), score


def _of_level(detector: FasterRcnn, level: int, features: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """One level's best boxes [B, C, 4], cut at the borders, and scores [B, C], 0 for boxes without an area."""
    scores, deltas = concat_box_prediction_layers(*detector.rpn.head([features]))
    scores = scores.reshape(features.shape[0], -1)  # [B, A]
    scores, index = scores.topk(min(detector.rpn.pre_nms_top_n(), scores.shape[1]))  # [B, C]
    anchors = _anchors(detector.rpn.anchor_generator.cell_anchors[level], features, pictures)
    chosen = deltas.reshape(features.shape[0], -1, 4).gather(1, index[..., None].expand(-1, -1, 4))
    boxes = detector.rpn.box_coder.decode_single(chosen.flatten(0, 1), anchors[index].flatten(0, 1))
    boxes = cut(boxes.view_as(chosen), shape_as_tensor(pictures)[2:].float())
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes, scores.sigmoid() * (sides >= detector.rpn.min_size).all(-1)


def _anchors(of_cell: Tensor, features: Tensor, pictures: Tensor) -> Tensor:
    """One level's anchors [A, 4] in input pixels, row by row; of_cell [3, 4] are those of the first cell."""
    rows, columns = features.shape[-2], features.shape[-1]
    y, x = torch.meshgrid(
        torch.arange(rows) * (pictures.shape[-2] // rows),
        torch.arange(columns) * (pictures.shape[-1] // columns),
        indexing="ij",
    )
    corner = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4).float()
    return (corner + of_cell).reshape(-1, 4)


def _pooled(maps: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    """Features [B * P, C, 7, 7] of boxes [B, P, 4], each from the level that suits its size."""
    owner = torch.arange(boxes.shape[0], device=boxes.device).float()[:, None, None].expand(-1, boxes.shape[1], 1)
    regions = torch.cat([owner, boxes], -1).flatten(0, 1)  # [B * P, 5]
    sides = regions[:, 3:] - regions[:, 1:3]
    octave = torch.log2((sides[:, 0] * sides[:, 1]).sqrt() / CANONICAL_PX)
    level = torch.floor(CANONICAL_LEVEL + octave + 1e-6) - 2  # the finest map, 0, has stride 2^2
    level = level.clamp(0, len(maps) - 1)[:, None, None, None]
    every = [
        roi_align(features, regions, POOLED, 1 / stride, SAMPLES) * (level == index)
        for index, (features, stride) in enumerate(zip(maps, STRIDES, strict=True))
    ]
    return torch.stack(every).sum(0)
