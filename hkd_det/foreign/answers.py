"""Answers: from a foreign model's output arrays to people's boxes and scores, picture by picture."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math
from hkd_det.foreign.description import Description

Floats = NDArray[np.floating]
CANDIDATES = 1000  # the best of a picture that suppression looks at


def people(
    outputs: Mapping[str, Floats], description: Description, input_hw: tuple[int, int]
) -> Iterator[tuple[Floats, Floats]]:
    """For each picture boxes [N, 4] xyxy input pixels and scores [N] from `conf` on, best first.

    outputs: the model's, by name, in its order. Raises ValueError where their shapes are not what `output` says.
    """
    match description.output:
        case "yolox-raw":
            boxes, scores = _yolox(_only(outputs, 3), description, input_hw)
        case "yolo-raw":
            raw = _only(outputs, 3).swapaxes(1, 2)
            boxes, scores = _xyxy(raw[..., :4]), _class_scores(raw[..., 4:], description.person)
        case "yolo-e2e":
            raw = _only(outputs, 3)
            if raw.shape[2] != 6:
                raise ValueError(f"expected [B, N, 6], found {list(raw.shape)}")
            boxes, scores = raw[..., :4], np.where(raw[..., 5] == description.person, raw[..., 4], 0)
        case "boxes-scores":
            boxes, scores = _named(outputs, description.person)
    suppresses = description.output in ("yolox-raw", "yolo-raw")
    for of_one, score in zip(boxes, scores, strict=True):
        order = np.argsort(-score, kind="stable")
        order = order[score[order] >= max(description.conf, np.finfo(np.float32).tiny)]
        if suppresses:
            order = order[:CANDIDATES]
            order = order[suppress(of_one[order], description.iou)]
        yield of_one[order], score[order]


def suppress(boxes_xyxy: Floats, iou: float) -> NDArray[np.intp]:
    """Which of [N, 4] boxes, best first, stay: those that overlap no better one that stays by more than `iou`."""
    overlaps = box_math.iou(boxes_xyxy, boxes_xyxy) > iou
    gone = np.zeros(len(boxes_xyxy), bool)
    for index in range(len(boxes_xyxy)):
        if not gone[index]:
            gone[index + 1 :] |= overlaps[index, index + 1 :]
    return np.flatnonzero(~gone)


def _yolox(raw: Floats, description: Description, input_hw: tuple[int, int]) -> tuple[Floats, Floats]:
    """YOLOX's export without decode_in_inference (Megvii's `demo_postprocess`)."""
    corners, strides = [], []
    for step in description.strides:
        y, x = np.mgrid[: input_hw[0] // step, : input_hw[1] // step]
        corners.append(np.stack([x, y], -1).reshape(-1, 2))
        strides.append(np.full((len(corners[-1]), 1), step))
    corner, stride = np.concatenate(corners), np.concatenate(strides)
    if raw.shape[1] != len(corner):
        raise ValueError(
            f"{raw.shape[1]} points where strides {list(description.strides)} of an input "
            f"{input_hw[1]}x{input_hw[0]} have {len(corner)}"
        )
    centres, sides = (raw[..., :2] + corner) * stride, np.exp(raw[..., 2:4]) * stride
    boxes = _xyxy(np.concatenate([centres, sides], -1))
    return boxes, raw[..., 4] * _class_scores(raw[..., 5:], description.person)


def _named(outputs: Mapping[str, Floats], person: int) -> tuple[Floats, Floats]:
    if not {"boxes", "scores"} <= outputs.keys():
        raise ValueError(f"expected outputs boxes and scores, found {', '.join(outputs)}")
    boxes, scores, labels = outputs["boxes"], outputs["scores"], outputs.get("labels")
    if boxes.ndim != 3 or boxes.shape[2] != 4 or scores.shape != boxes.shape[:2]:
        raise ValueError(f"expected boxes [B, N, 4] and scores [B, N], found {list(boxes.shape)}, {list(scores.shape)}")
    return boxes, scores if labels is None else np.where(labels == person, scores, 0)


def _only(outputs: Mapping[str, Floats], dimensions: int) -> Floats:
    first = next(iter(outputs.values()))
    if first.ndim != dimensions:
        raise ValueError(f"expected an output of {dimensions} dimensions, found {list(first.shape)}")
    return first


def _class_scores(scores: Floats, person: int) -> Floats:
    if person >= scores.shape[-1]:
        raise ValueError(f"person: {person}, but the output has {max(scores.shape[-1], 0)} classes")
    return scores[..., person]


def _xyxy(boxes_cxcywh: Floats) -> Floats:
    centres, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return np.concatenate([centres - half, centres + half], -1)
