"""Answers: from a foreign model's output arrays to people's boxes and scores, picture by picture."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math
from hkd_det.foreign.description import OnnxModelConfig

FloatArray = NDArray[np.floating]
PRE_NMS_TOPK = 1000  # the best of a picture that suppression looks at


def decode_outputs(
    outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int]
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """For each picture boxes [N, 4] xyxy input pixels and scores [N] from `conf` on, best first.

    outputs: the model's, by name, in its order. Raises ValueError where their shapes are not what `output` says.
    """
    match config.output_format:
        case "yolox-raw":
            boxes, scores = _decode_yolox(_get_first_output(outputs, 3), config, input_hw)
        case "yolo-raw":
            raw = _get_first_output(outputs, 3).swapaxes(1, 2)
            boxes, scores = _xyxy_from_cxcywh(raw[..., :4]), _select_class_scores(raw[..., 4:], config.person_class_id)
        case "yolo-e2e":
            raw = _get_first_output(outputs, 3)
            if raw.shape[2] != 6:
                raise ValueError(f"expected [B, N, 6], found {list(raw.shape)}")
            boxes, scores = raw[..., :4], np.where(raw[..., 5] == config.person_class_id, raw[..., 4], 0)
        case "boxes-scores":
            boxes, scores = _decode_named_outputs(outputs, config.person_class_id)
    suppresses = config.output_format in ("yolox-raw", "yolo-raw")
    for of_one, score in zip(boxes, scores, strict=True):
        order = np.argsort(-score, kind="stable")
        order = order[score[order] >= max(config.conf, np.finfo(np.float32).tiny)]
        if suppresses:
            order = order[:PRE_NMS_TOPK]
            order = order[nms(of_one[order], config.iou)]
        yield of_one[order], score[order]


def nms(boxes_xyxy: FloatArray, iou_threshold: float) -> NDArray[np.intp]:
    """Which of [N, 4] boxes, best first, stay: those that overlap no better one that stays by more than `iou`."""
    overlaps = box_math.box_iou(boxes_xyxy, boxes_xyxy) > iou_threshold
    gone = np.zeros(len(boxes_xyxy), bool)
    for index in range(len(boxes_xyxy)):
        if not gone[index]:
            gone[index + 1 :] |= overlaps[index, index + 1 :]
    return np.flatnonzero(~gone)


def _decode_yolox(raw: FloatArray, config: OnnxModelConfig, input_hw: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """YOLOX's export without decode_in_inference (Megvii's `demo_postprocess`)."""
    corners, strides = [], []
    for step in config.strides:
        y, x = np.mgrid[: input_hw[0] // step, : input_hw[1] // step]
        corners.append(np.stack([x, y], -1).reshape(-1, 2))
        strides.append(np.full((len(corners[-1]), 1), step))
    corner, stride = np.concatenate(corners), np.concatenate(strides)
    if raw.shape[1] != len(corner):
        raise ValueError(
            f"{raw.shape[1]} points where strides {list(config.strides)} of an input "
            f"{input_hw[1]}x{input_hw[0]} have {len(corner)}"
        )
    centres, sides = (raw[..., :2] + corner) * stride, np.exp(raw[..., 2:4]) * stride
    boxes = _xyxy_from_cxcywh(np.concatenate([centres, sides], -1))
    return boxes, raw[..., 4] * _select_class_scores(raw[..., 5:], config.person_class_id)


def _decode_named_outputs(outputs: Mapping[str, FloatArray], person_class_id: int) -> tuple[FloatArray, FloatArray]:
    if not {"boxes", "scores"} <= outputs.keys():
        raise ValueError(f"expected outputs boxes and scores, found {', '.join(outputs)}")
    boxes, scores, labels = outputs["boxes"], outputs["scores"], outputs.get("labels")
    if boxes.ndim != 3 or boxes.shape[2] != 4 or scores.shape != boxes.shape[:2]:
        raise ValueError(f"expected boxes [B, N, 4] and scores [B, N], found {list(boxes.shape)}, {list(scores.shape)}")
    return boxes, scores if labels is None else np.where(labels == person_class_id, scores, 0)


def _get_first_output(outputs: Mapping[str, FloatArray], ndim: int) -> FloatArray:
    first = next(iter(outputs.values()))
    if first.ndim != ndim:
        raise ValueError(f"expected an output of {ndim} dimensions, found {list(first.shape)}")
    return first


def _select_class_scores(scores: FloatArray, person_class_id: int) -> FloatArray:
    if person_class_id >= scores.shape[-1]:
        raise ValueError(f"person: {person_class_id}, but the output has {max(scores.shape[-1], 0)} classes")
    return scores[..., person_class_id]


def _xyxy_from_cxcywh(boxes_cxcywh: FloatArray) -> FloatArray:
    centres, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return np.concatenate([centres - half, centres + half], -1)
