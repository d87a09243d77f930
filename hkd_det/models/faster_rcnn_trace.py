"""Faster R-CNN for a graph: as torchvision answers, with shapes that depend on no value.

Where torchvision drops a proposal, its score here is 0; where it gathers the regions of one pyramid level, here every
level is read for all regions and the right one kept.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.onnx.operators import shape_as_tensor
from torchvision.models.detection.rpn import concat_box_prediction_layers

from hkd_det.models.faster_rcnn import NUM_CLASSES, PERSON_LABEL, ROI_SIZE, STRIDES, FasterRCNN
from hkd_det.ops.boxes import clip_boxes_traceable
from hkd_det.ops.nms import SUPPRESSED_LOGIT, cluster_nms

SAMPLING_RATIO = 2  # a side of a cell


CANONICAL_PX, CANONICAL_LEVEL = 224, 4  # a region of 224 px belongs to the level of stride 2^4 (Lin et al. 2017, eq. 1)


def compute_faster_rcnn_outputs(detector: FasterRCNN, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the second stage says of all proposals: boxes [B, P, 4], cut at the borders, and logits [B, P]."""
    maps = detector.backbone((images - detector.mean) / detector.std)
    proposals, scores = _compute_proposals(detector, maps, images)
    pooled = _pool_rois(maps[: len(STRIDES)], proposals)
    class_logits, deltas = detector.roi_heads.box_predictor(detector.roi_heads.box_head(pooled))
    deltas = deltas.reshape(-1, NUM_CLASSES, 4)[:, PERSON_LABEL]
    boxes = detector.roi_heads.box_coder.decode_single(deltas, proposals.flatten(0, 1)).view_as(proposals)
    logits = (class_logits[:, PERSON_LABEL] - class_logits[:, 0]).view_as(scores)
    return clip_boxes_traceable(boxes, shape_as_tensor(images)[2:].float()), torch.where(
        scores > 0, logits, torch.full_like(logits, SUPPRESSED_LOGIT)
    )


def _compute_proposals(detector: FasterRCNN, feature_maps: tuple[Tensor, ...], images: Tensor) -> tuple[Tensor, Tensor]:
    """The first stage's boxes [B, P, 4] and scores [B, P], best first; 0 for those that are none."""
    levels = [
        _compute_level_proposals(detector, level, features, images) for level, features in enumerate(feature_maps)
    ]
    boxes, scores = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*levels, strict=True))  # [B * levels, C]
    boxes, scores = cluster_nms(boxes, scores, int(scores.shape[1]), detector.rpn.nms_thresh)  # each level alone
    boxes, scores = (
        boxes.reshape(-1, len(feature_maps) * boxes.shape[1], 4),
        scores.reshape(-1, len(feature_maps) * scores.shape[1]),
    )
    scores, index = scores.topk(detector.rpn.post_nms_top_n())
    return boxes.gather(1, index[..., None].expand(-1, -1, 4)), scores


def _compute_level_proposals(
    detector: FasterRCNN, level: int, features: Tensor, images: Tensor
) -> tuple[Tensor, Tensor]:
    """One level's best boxes [B, C, 4], cut at the borders, and scores [B, C], 0 for boxes without an area."""
    scores, deltas = concat_box_prediction_layers(*detector.rpn.head([features]))
    scores = scores.reshape(features.shape[0], -1).sigmoid()  # [B, A]
    count = detector.rpn.pre_nms_top_n()
    room = max(0, count - int(scores.shape[1]))  # so that as many are there, however small the picture
    scores, index = F.pad(scores, (0, room)).topk(count)  # [B, C]
    anchors = F.pad(_make_anchors(detector.rpn.anchor_generator.cell_anchors[level], features, images), (0, 0, 0, room))
    deltas = F.pad(deltas.reshape(features.shape[0], -1, 4), (0, 0, 0, room))
    chosen = deltas.gather(1, index[..., None].expand(-1, -1, 4))
    boxes = detector.rpn.box_coder.decode_single(chosen.flatten(0, 1), anchors[index].flatten(0, 1))
    boxes = clip_boxes_traceable(boxes.view_as(chosen), shape_as_tensor(images)[2:].float())
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes, scores * (sides >= detector.rpn.min_size).all(-1)


def _make_anchors(cell_anchors: Tensor, features: Tensor, images: Tensor) -> Tensor:
    """One level's anchors [A, 4] in input pixels, row by row; of_cell [3, 4] are those of the first cell."""
    rows, columns = features.shape[-2], features.shape[-1]
    y, x = torch.meshgrid(
        torch.arange(rows) * (images.shape[-2] // rows),
        torch.arange(columns) * (images.shape[-1] // columns),
        indexing="ij",
    )
    corner = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4).float()
    return (corner + cell_anchors).reshape(-1, 4)


def _pool_rois(feature_maps: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    """Features [B * P, C, 7, 7] of boxes [B, P, 4], each from the level that suits its size."""
    sides = boxes[..., 2:] - boxes[..., :2]
    octave = torch.log2((sides[..., 0] * sides[..., 1]).sqrt() / CANONICAL_PX)
    wanted = (torch.floor(CANONICAL_LEVEL + octave + 1e-6) - 2).clamp(
        0, len(feature_maps) - 1
    )  # the finest has stride 2^2
    every = [
        _roi_align_level(features, boxes / stride, wanted == level)
        for level, (features, stride) in enumerate(zip(feature_maps, STRIDES, strict=True))
    ]
    pooled = torch.stack(every).sum(0)  # [B, C, P * 7, 7]
    return pooled.reshape(*pooled.shape[:2], -1, ROI_SIZE, ROI_SIZE).transpose(1, 2).flatten(0, 1)


def _roi_align_level(features: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
    """`torchvision.ops.roi_align` of one map [B, C, h, w] for boxes [B, P, 4] in its cells: [B, C, P * 7, 7].

    0 for boxes that are not `chosen` [B, P]. By GridSample: TensorRT has RoiAlign only as a plugin.
    """
    places = (torch.arange(ROI_SIZE * SAMPLING_RATIO) + 0.5) / (ROI_SIZE * SAMPLING_RATIO)
    x, y = (
        boxes[..., axis, None] + places * (boxes[..., axis + 2, None] - boxes[..., axis, None]).clamp(min=1)
        for axis in (0, 1)
    )  # [B, P, 14]
    rows, columns = features.shape[-2], features.shape[-1]
    read = (y <= rows)[..., None] & (x <= columns)[:, :, None] & mask[..., None, None]  # [B, P, 14, 14]
    x, y = (2 * x + 1) / columns - 1, (2 * y + 1) / rows - 1
    grid = torch.stack([x[:, :, None].expand(read.shape), y[..., None].expand(read.shape)], -1).flatten(1, 2)
    values = F.grid_sample(features, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(values * read.flatten(1, 2)[:, None], SAMPLING_RATIO)
