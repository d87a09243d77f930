"""Decoding of the outputs of common detectors to person boxes and scores, with NMS where the graph has none.

This file has the formats in which a row needs a grid or anchors; `detection_outputs` has those in which it is a box.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from hkd_det.onnxrt.detection_outputs import (
    FloatArray,
    RawRows,
    activate_scores,
    convert_boxes,
    read_boxes_classes,
    read_boxes_scores,
    read_class_score_boxes,
    read_detection_output,
    select_class_scores,
    xyxy_from_cxcywh,
)
from hkd_det.onnxrt.model_config import OnnxModelConfig, OutputFormat
from hkd_det.structures import nms

Reader = Callable[[Mapping[str, FloatArray], OnnxModelConfig, tuple[int, int]], RawRows]

PRE_NMS_TOPK = 1000  # boxes per image that enter NMS


def decode_outputs(
    outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int], num_images: int = 1
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Decode the outputs of a model to person boxes and scores.

    Only the rows with a score of at least `config.conf` are decoded.

    Args:
        outputs: Output arrays by name, in the order of the graph.
        config: Output conventions.
        input_hw: Height and width of the model input in pixels.
        num_images: Number of images of the batch.

    Yields:
        Per image, boxes (array[N, 4], xyxy, input pixels) and scores (array[N], descending, at least `config.conf`).

    Raises:
        ValueError: The shapes do not match `config.output_format`.
    """
    scores, decode_rows = READERS[config.output_format](outputs, config, input_hw)
    if config.output_format == "detection-output":  # lists only images with detections
        scores = np.concatenate([scores, np.zeros((max(0, num_images - len(scores)), scores.shape[1]))])
    if len(scores) < num_images:
        raise ValueError(f"expected the results of {num_images} images, got {len(scores)}")
    min_score = max(config.conf, np.finfo(np.float32).tiny)
    for index, image_scores in enumerate(scores):
        rows = np.flatnonzero(image_scores >= min_score)
        rows = rows[np.argsort(-image_scores[rows], kind="stable")]
        if config.needs_nms:
            rows = rows[:PRE_NMS_TOPK]
        boxes = decode_rows(index, rows)
        kept = nms(boxes, config.iou) if config.needs_nms else slice(None)
        yield boxes[kept], image_scores[rows[kept]]


def _read_yolox(outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int]) -> RawRows:
    """YOLOX without `decode_in_inference`, decoded as `demo_postprocess` of Megvii's repository does."""
    raw = _get_first_output(outputs, 3)
    corners, strides = _make_grid(input_hw, config.strides)
    _check_num_points(raw.shape[1], input_hw, config.strides)
    scores = raw[..., 4] * select_class_scores(raw[..., 5:], config)

    def decode_rows(index: int, rows: NDArray[np.intp]) -> FloatArray:
        values = raw[index, rows, :4]
        centers, sides = (values[:, :2] + corners[rows]) * strides[rows], np.exp(values[:, 2:]) * strides[rows]
        return xyxy_from_cxcywh(np.concatenate([centers, sides], 1))

    return scores, decode_rows


def _read_yolov5(outputs: Mapping[str, FloatArray], config: OnnxModelConfig, _: tuple[int, int]) -> RawRows:
    raw = _get_first_output(outputs, 3)  # [B, A, 5 + classes]
    scores = raw[..., 4] * select_class_scores(raw[..., 5:], config)
    return scores, lambda index, rows: xyxy_from_cxcywh(raw[index, rows, :4])


def _read_yolo(outputs: Mapping[str, FloatArray], config: OnnxModelConfig, _: tuple[int, int]) -> RawRows:
    raw = _get_first_output(outputs, 3)  # [B, 4 + classes, A]
    scores = select_class_scores(raw[:, 4:].swapaxes(1, 2), config)
    return scores, lambda index, rows: xyxy_from_cxcywh(raw[index, :4, rows])


def _read_yolo_e2e(outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int]) -> RawRows:
    raw = _get_first_output(outputs, 3)
    if raw.shape[2] != 6:
        raise ValueError(f"expected [B, N, 6], got {list(raw.shape)}")
    is_person = (raw[..., 5] == config.person_class_id) | (config.person_class_id is None)
    scores = np.where(is_person, raw[..., 4], 0)
    return scores, lambda index, rows: convert_boxes(raw[index, rows, :4], config, input_hw)


def _read_gfl(outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int]) -> RawRows:
    """Generalized Focal Loss head (Li et al. 2020): each side is the expected value over distance bins."""
    class_scores, bins = _split_gfl_outputs(list(outputs.values()), config)
    corners, strides = _make_grid(input_hw, config.strides)
    _check_num_points(class_scores.shape[1], input_hw, config.strides)
    scores = activate_scores(class_scores, config.score_activation)
    distances = np.arange(config.num_bins, dtype=np.float32)

    def decode_rows(index: int, rows: NDArray[np.intp]) -> FloatArray:
        logits = bins[index, rows].reshape(-1, 4, config.num_bins)
        weights = np.exp(logits - logits.max(2, keepdims=True))
        sides = (weights @ distances) / weights.sum(2) * strides[rows]  # [N, 4]: left, top, right, bottom
        points = (corners[rows] + config.point_offset) * strides[rows] + config.point_shift_px
        return np.concatenate([points - sides[:, :2], points + sides[:, 2:]], 1)

    return scores, decode_rows


def _split_gfl_outputs(arrays: Sequence[FloatArray], config: OnnxModelConfig) -> tuple[FloatArray, FloatArray]:
    """Return the class scores of persons [B, A] and the distance bins [B, A, 4 * num_bins] of all levels."""
    num_columns, num_levels = 4 * config.num_bins, len(config.strides)
    if len(arrays) not in (1, 2 * num_levels) or any(array.ndim != 3 for array in arrays):
        raise ValueError(
            f"expected one output [B, A, classes + {num_columns}], or {num_levels} outputs [B, A, classes] and then "
            f"{num_levels} outputs [B, A, {num_columns}], got {[list(array.shape) for array in arrays]}"
        )
    if len(arrays) == 1:
        classes, bins = [arrays[0][..., :-num_columns]], arrays[0][..., -num_columns:]
    else:
        classes, bins = list(arrays[:num_levels]), np.concatenate(arrays[num_levels:], 1)
    if bins.shape[2] != num_columns:
        raise ValueError(f"expected distances of 4 * num_bins = {num_columns} values, got {bins.shape[2]}")
    return np.concatenate([select_class_scores(level, config) for level in classes], 1), bins


def _read_fastestdet(outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int]) -> RawRows:
    """FastestDet, decoded as its `utils.tool.handle_preds` does."""
    maps = _get_first_output(outputs, 4)
    batch, num_channels, height, width = maps.shape
    raw = maps.reshape(batch, num_channels, height * width).swapaxes(1, 2)  # [B, A, 5 + classes]
    person_scores = select_class_scores(raw[..., 5:], config)
    scores = np.clip(raw[..., 0], 0, 1) ** 0.6 * np.clip(person_scores, 0, 1) ** 0.4
    input_wh, map_wh = np.array(input_hw[::-1], np.float32), np.array([width, height], np.float32)

    def decode_rows(index: int, rows: NDArray[np.intp]) -> FloatArray:
        values, corners = raw[index, rows], np.stack([rows % width, rows // width], 1)
        centers = (corners + np.tanh(values[:, 1:3])) / map_wh * input_wh
        sides = input_wh / (1 + np.exp(-values[:, 3:5]))
        return xyxy_from_cxcywh(np.concatenate([centers, sides], 1))

    return scores, decode_rows


def _read_yolo_fastestv2(
    outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int]
) -> RawRows:
    """Yolo-FastestV2, decoded as its `utils.utils.handel_preds` does. The anchors of a cell share the class scores."""
    raw = _concatenate_levels(list(outputs.values()))  # [B, A, 5 * anchors + classes]
    anchors = np.array(config.anchors, np.float32).reshape(len(config.strides), -1, 2)  # [levels, anchors, wh]
    num_anchors = anchors.shape[1]
    corners, strides = _make_grid(input_hw, config.strides)
    _check_num_points(raw.shape[1], input_hw, config.strides)
    class_scores = select_class_scores(raw[..., 5 * num_anchors :], config)
    objectness = raw[..., 4 * num_anchors : 5 * num_anchors]
    scores = (objectness * class_scores[..., None]).reshape(len(raw), -1)  # [B, A * anchors]
    levels = np.searchsorted(np.array(config.strides), strides[:, 0])

    def decode_rows(index: int, rows: NDArray[np.intp]) -> FloatArray:
        cells, numbers = rows // num_anchors, rows % num_anchors
        values = raw[index, cells, : 4 * num_anchors].reshape(-1, num_anchors, 4)[np.arange(len(rows)), numbers]
        centers = (2 * values[:, :2] - 0.5 + corners[cells]) * strides[cells]
        sides = (2 * values[:, 2:]) ** 2 * anchors[levels[cells], numbers]
        return xyxy_from_cxcywh(np.concatenate([centers, sides], 1))

    return scores, decode_rows


def _concatenate_levels(arrays: Sequence[FloatArray]) -> FloatArray:
    """Return one array [B, A, channels] of one output of 2 or 3 dimensions, or of maps [B, H, W, channels]."""
    if all(array.ndim == 4 for array in arrays):
        return np.concatenate([array.reshape(len(array), -1, array.shape[3]) for array in arrays], 1)
    if len(arrays) != 1 or arrays[0].ndim not in (2, 3):
        raise ValueError(
            f"expected one output [B, A, channels], or maps [B, H, W, channels], got "
            f"{[list(array.shape) for array in arrays]}"
        )
    return arrays[0].reshape(-1, *arrays[0].shape[-2:])


READERS: dict[OutputFormat, Reader] = {
    "yolox-raw": _read_yolox,
    "yolov5-raw": _read_yolov5,
    "yolo-raw": _read_yolo,
    "yolo-e2e": _read_yolo_e2e,
    "gfl-raw": _read_gfl,
    "fastestdet-raw": _read_fastestdet,
    "yolo-fastestv2-raw": _read_yolo_fastestv2,
    "boxes-scores": read_boxes_scores,
    "boxes-classes": read_boxes_classes,
    "detection-output": read_detection_output,
    "class-score-boxes": read_class_score_boxes,
}


@cache
def _make_grid(input_hw: tuple[int, int], strides: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
    """Return the cells [A, 2] (x, y, in strides) and the strides [A, 1] of all levels, in the order of rows."""
    corners, level_strides = [], []
    for stride in strides:
        y, x = np.mgrid[: -(-input_hw[0] // stride), : -(-input_hw[1] // stride)]
        corners.append(np.stack([x, y], -1).reshape(-1, 2).astype(np.float32))
        level_strides.append(np.full((len(corners[-1]), 1), stride, np.float32))
    return np.concatenate(corners), np.concatenate(level_strides)


def _check_num_points(num_points: int, input_hw: tuple[int, int], strides: tuple[int, ...]) -> None:
    expected = len(_make_grid(input_hw, strides)[0])
    if num_points != expected:
        raise ValueError(
            f"expected {expected} anchor points for the input {input_hw[1]}x{input_hw[0]} and the strides "
            f"{list(strides)}, got {num_points}"
        )


def _get_first_output(outputs: Mapping[str, FloatArray], ndim: int) -> FloatArray:
    first = next(iter(outputs.values()))
    if first.ndim != ndim:
        raise ValueError(f"expected an output of {ndim} dimensions, got {list(first.shape)}")
    return first
