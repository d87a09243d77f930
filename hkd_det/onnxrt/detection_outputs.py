"""Readers of output formats in which a row is a box in the input, for `decoding.decode_outputs`.

The outputs are those of many tools. `_find_arrays` finds the boxes, scores and labels among them: by the names of the
configuration, else by the names of `KNOWN_NAMES`, else by shape and number type.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hkd_det.onnxrt.model_config import OnnxModelConfig, ScoreActivation

FloatArray = NDArray[np.floating]
# Scores [B, A] of all rows, and a function from an image index and rows (int array[N]) to boxes [N, 4].
RawRows = tuple[FloatArray, Callable[[int, NDArray[np.intp]], FloatArray]]
Role = Literal["boxes", "scores", "labels"]

# Names of the outputs in torchvision, RT-DETR, D-FINE, DEIM, MMDeploy, TensorFlow, TensorRT's NMS, super-gradients and
# Transformers. `labels` of RF-DETR are class scores.
KNOWN_NAMES: dict[Role, tuple[str, ...]] = {
    "boxes": ("boxes", "dets", "bboxes", "detection_boxes", "det_boxes", "pred_boxes"),
    "scores": ("scores", "detection_scores", "det_scores", "pred_scores", "logits", "pred_logits"),
    "labels": ("labels", "detection_classes", "det_classes", "pred_classes"),
}
COUNT_NAMES = ("count", "num_detections", "num_dets", "num_predictions")


def read_boxes_scores(outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int]) -> RawRows:
    """Read boxes, scores and labels of detections.

    Args:
        outputs: Boxes [B, N, 4] or [B, N, 5] with the score, scores [B, N], labels [B, N] and the number of valid rows
            [B]. Without the axis B for one image. Scores and labels can be absent.
        config: Output conventions.
        input_hw: Height and width of the model input in pixels.

    Returns:
        Scores of persons, and a function from rows to boxes.

    Raises:
        ValueError: The outputs have other names or shapes.
    """
    named = {name.partition(":")[0]: array for name, array in outputs.items()}  # TensorFlow names end in ":0"
    counts = [array for name, array in named.items() if name in COUNT_NAMES]
    arrays = _find_arrays({name: array for name, array in named.items() if name not in COUNT_NAMES}, config)
    boxes = arrays["boxes"]
    is_single = boxes.ndim == 2
    boxes = boxes[None] if is_single else boxes
    if boxes.ndim != 3 or boxes.shape[2] not in (4, 5):
        raise ValueError(f"expected boxes [B, N, 4] or [B, N, 5], got {list(boxes.shape)}")
    if "scores" not in arrays and boxes.shape[2] == 4:
        raise ValueError(f"expected outputs boxes and scores, got {', '.join(outputs)}")
    scores = arrays["scores"] if "scores" in arrays else boxes[..., 4]
    labels = arrays.get("labels")
    if is_single and "scores" in arrays:
        scores = scores[None]
    if is_single and labels is not None:
        labels = labels[None]
    for name, array in (("scores", scores), ("labels", labels)):
        if array is not None and array.shape != boxes.shape[:2]:
            raise ValueError(
                f"expected boxes [B, N, 4] and {name} [B, N], got {list(boxes.shape)}, {list(array.shape)}"
            )
    scores = _select_persons(activate_scores(scores, config.score_activation), labels, config)
    if counts:
        scores = np.where(np.arange(scores.shape[1]) < counts[0].reshape(-1, 1), scores, 0)
    return scores, lambda index, rows: convert_boxes(boxes[index, rows, :4], config, input_hw)


def read_boxes_classes(
    outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int]
) -> RawRows:
    """Read boxes and the scores of all classes, in one output or in two.

    Args:
        outputs: One output [B, N, 4 + classes], or boxes [B, N, 4] and class scores [B, N, classes].
        config: Output conventions.
        input_hw: Height and width of the model input in pixels.

    Returns:
        Scores of persons, and a function from rows to boxes.

    Raises:
        ValueError: The outputs have other shapes.
    """
    if len(outputs) == 1:
        (raw,) = outputs.values()
        if raw.ndim != 3 or raw.shape[2] < 5:
            raise ValueError(f"expected [B, N, 4 + classes], got {list(raw.shape)}")
        boxes, classes = raw[..., :4], raw[..., 4:]
    else:
        arrays = _find_arrays(outputs, config)
        boxes, classes = arrays["boxes"], arrays["scores"] if "scores" in arrays else arrays["labels"]
        if boxes.ndim != 3 or boxes.shape[2] != 4 or classes.ndim != 3 or classes.shape[:2] != boxes.shape[:2]:
            shapes = f"{list(boxes.shape)}, {list(classes.shape)}"
            raise ValueError(f"expected boxes [B, N, 4] and class scores [B, N, classes], got {shapes}")
    if config.score_activation == "softmax":
        classes = activate_scores(classes, "softmax")
        scores = select_class_scores(classes, config)
    else:
        scores = activate_scores(select_class_scores(classes, config), config.score_activation)
    return scores, lambda index, rows: convert_boxes(boxes[index, rows], config, input_hw)


def read_detection_output(
    outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int]
) -> RawRows:
    """Read the operator DetectionOutput of Caffe and OpenVINO: one list of detections for the whole batch.

    Args:
        outputs: [1, 1, N, 7]: image index, label, score, x1, y1, x2, y2 relative to the input. A negative image index
            ends the list.
        config: Output conventions.
        input_hw: Height and width of the model input in pixels.

    Returns:
        Scores of persons, one row per image of the batch, and a function from rows to boxes.

    Raises:
        ValueError: The output has another shape.
    """
    raw = next(iter(outputs.values()))
    if raw.ndim != 4 or raw.shape[3] != 7:
        raise ValueError(f"expected [1, 1, N, 7], got {list(raw.shape)}")
    raw = raw.reshape(-1, 7)
    ends = np.flatnonzero(raw[:, 0] < 0)
    raw = raw[: ends[0]] if len(ends) else raw
    num_images = int(raw[:, 0].max(initial=0)) + 1  # later images of the batch have no detection
    scores = _select_persons(raw[:, 2], raw[:, 1], config)
    per_image = np.where(raw[:, 0] == np.arange(num_images)[:, None], scores, 0)
    boxes = raw[:, 3:] * _make_sides(input_hw)
    return per_image, lambda _index, rows: boxes[rows]


def read_class_score_boxes(
    outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int]
) -> RawRows:
    """Read the detections of PaddleDetection with NMS: rows of class, score, x1, y1, x2, y2 of one image.

    Args:
        outputs: [N, 6], and the number of rows [1].
        config: Output conventions.
        input_hw: Height and width of the model input in pixels.

    Returns:
        Scores of persons, and a function from rows to boxes.

    Raises:
        ValueError: The outputs have other shapes, or contain several images.
    """
    tables = [array for array in outputs.values() if array.ndim == 2 and array.shape[1] == 6]
    if len(tables) != 1:
        shapes = [list(array.shape) for array in outputs.values()]
        raise ValueError(f"expected one output [N, 6] and the number of rows, got {shapes}")
    counts = [array for array in outputs.values() if array.ndim < 2]
    if counts and counts[0].size != 1:
        raise ValueError(f"expected a batch of one image, got {counts[0].size}. Export the model with batch size 1")
    raw = tables[0][: int(counts[0].reshape(-1)[0])] if counts else tables[0]
    scores = _select_persons(raw[:, 1], raw[:, 0], config)
    return scores[None], lambda _index, rows: convert_boxes(raw[rows, 2:], config, input_hw)


def convert_boxes(boxes: FloatArray, config: OnnxModelConfig, input_hw: tuple[int, int]) -> FloatArray:
    """Convert boxes to xyxy in input pixels.

    Args:
        boxes (array[N, 4]): In the format `config.box_format`, in pixels or relative to the input.
        config: Output conventions.
        input_hw: Height and width of the model input in pixels.

    Returns:
        array[N, 4]: xyxy, input pixels.
    """
    if config.box_format == "cxcywh":
        boxes = xyxy_from_cxcywh(boxes)
    elif config.box_format == "yxyx":
        boxes = boxes[..., [1, 0, 3, 2]]
    return boxes * _make_sides(input_hw) if config.normalized_boxes else boxes


def xyxy_from_cxcywh(boxes_cxcywh: FloatArray) -> FloatArray:
    """Convert boxes from center and size to corners.

    Args:
        boxes_cxcywh (array[..., 4]): Center x, center y, width, height.

    Returns:
        array[..., 4]: xyxy.
    """
    centers, half_sides = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return np.concatenate([centers - half_sides, centers + half_sides], -1)


def select_class_scores(scores: FloatArray, config: OnnxModelConfig) -> FloatArray:
    """Return the scores of persons.

    Args:
        scores (array[..., classes]): Scores of all classes.
        config: Output conventions.

    Returns:
        array[...]: Scores of the class `config.person_class_id`; the largest score if it is None.

    Raises:
        ValueError: The output does not have this class.
    """
    if config.person_class_id is None:
        return np.asarray(scores.max(-1))
    if config.person_class_id >= scores.shape[-1]:
        raise ValueError(f"person_class_id is {config.person_class_id}, but the output has {scores.shape[-1]} classes")
    return scores[..., config.person_class_id]


def activate_scores(scores: FloatArray, activation: ScoreActivation) -> FloatArray:
    """Apply the function that converts the scores of a model to 0 to 1.

    Args:
        scores (array[..., classes]): Outputs of the model.
        activation: "softmax" is over the last axis.

    Returns:
        array[..., classes]: Scores.
    """
    if activation == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-np.maximum(scores, -80, dtype=np.float32))))  # exp(89) is infinite
    if activation == "softmax":
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.asarray(weights / weights.sum(-1, keepdims=True))
    return scores


def _find_arrays(outputs: Mapping[str, FloatArray], config: OnnxModelConfig) -> dict[Role, FloatArray]:
    """Return the arrays of each role. Raise ValueError if the boxes are not found or not unique."""
    requested: dict[Role, str] = {
        "boxes": config.boxes_output, "scores": config.scores_output, "labels": config.labels_output,
    }  # fmt: skip
    found: dict[Role, FloatArray] = {}
    for role, name in requested.items():
        if name and name not in outputs:
            raise ValueError(f"{role}_output is {name}, but the outputs are {', '.join(outputs)}")
        known = [name] if name else [known for known in KNOWN_NAMES[role] if known in outputs]
        if known:
            found[role] = outputs[known[0]]
    if "boxes" not in found and not any(requested.values()):
        found = _find_by_shape(list(outputs.values()))
    if "boxes" not in found:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
        raise ValueError(f"expected outputs boxes and scores, got {shapes}. Set boxes_output and scores_output")
    return found


def _find_by_shape(arrays: Sequence[FloatArray]) -> dict[Role, FloatArray]:
    """Return the only array with rows of 4 or 5 numbers as boxes, floats as scores and integers as labels."""
    tables = [array for array in arrays if array.ndim >= 2 and array.shape[-1] in (4, 5) and array.dtype.kind == "f"]
    if len(tables) != 1:
        return {}
    found: dict[Role, FloatArray] = {"boxes": tables[0]}
    for role, kinds in (("scores", "f"), ("labels", "iu")):
        others = [array for array in arrays if array is not tables[0] and array.dtype.kind in kinds]
        if len(others) > 1:
            return {}
        if others:
            found["scores" if role == "scores" else "labels"] = others[0]
    return found


def _select_persons(scores: FloatArray, labels: FloatArray | None, config: OnnxModelConfig) -> FloatArray:
    """Set the scores of other classes to 0."""
    if labels is None or config.person_class_id is None:
        return scores
    return np.where(labels == config.person_class_id, scores, 0)


def _make_sides(input_hw: tuple[int, int]) -> FloatArray:
    return np.array([input_hw[1], input_hw[0]] * 2, np.float32)
