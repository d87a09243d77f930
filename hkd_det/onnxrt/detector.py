"""ONNX detectors and ensembles of them: images to `Detections`, and decoding of the output formats of common detectors.

An ensemble is a YAML file. Paths are relative to it:

    models:
      - {model: yolox_nano.onnx, model_config: yolox.yaml}
      - {model: picodet_s.onnx}        # described by picodet_s.yaml or by its metadata
    iou: 0.55
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.config import check_range, dataclass_from_dict
from hkd_det.errors import DataError, UsageError
from hkd_det.files import read_yaml
from hkd_det.letterbox import Letterbox
from hkd_det.onnxrt.model_config import (
    OnnxModelConfig,
    OutputFormat,
    load_model_config,
    normalize_input,
    read_input_info,
)
from hkd_det.onnxrt.session import open_session
from hkd_det.structures import FUSION_IOU, Detections, fuse_detections, nms

FloatArray = NDArray[np.floating]
# Scores [B, A] of all rows, and a function from an image index and rows (int array[N]) to boxes [N, 4].
RawRows = tuple[FloatArray, Callable[[int, NDArray[np.intp]], FloatArray]]
Reader = Callable[[Mapping[str, FloatArray], OnnxModelConfig, tuple[int, int]], RawRows]

PRE_NMS_TOPK = 1000  # boxes per image that enter NMS


class OnnxDetector:
    """An open ONNX detector.

    Attributes:
        path: ONNX file.
        config: Input and output conventions.
        batch: Number of images per run of the graph, or None if it is dynamic.
        input_hw: Height and width of the model input in pixels.

    Args:
        path: ONNX file, for error messages.
        session: `onnxruntime.InferenceSession` of the file.
        config: Input and output conventions.

    Raises:
        DataError: The input of the graph does not match the configuration.
    """

    def __init__(self, path: Path, session: Any, config: OnnxModelConfig) -> None:
        self.path, self.config = path, config
        self._session = session
        self._input_name, self._input_dtype, self.batch, self.input_hw = read_input_info(path, session, config)
        self._output_names = [value.name for value in session.get_outputs()]

    def __call__(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detect persons in images of any size.

        Args:
            images_rgb (list of array[H, W, 3]): RGB, uint8.

        Returns:
            Detections per image, in pixels of that image.

        Raises:
            DataError: The outputs do not have the shapes of `config.output_format`.
        """
        detections: list[Detections] = []
        step = self.batch or max(1, len(images_rgb))
        for start in range(0, len(images_rgb), step):
            letterboxes, batch = self.preprocess(images_rgb[start : start + step])
            detections += self.postprocess(self.run(batch), letterboxes)
        return detections

    def preprocess(self, images_rgb: Sequence[NDArray[np.uint8]]) -> tuple[list[Letterbox], NDArray[np.generic]]:
        """Resize and normalize images.

        Args:
            images_rgb (list of array[H, W, 3]): RGB, uint8; at least one, and at most `batch`.

        Returns:
            letterboxes: Position of each image in the model input.
            batch (array[B, ...]): Model input. Unused rows of a fixed batch contain the first image.
        """
        letterboxes = [
            Letterbox(
                (image.shape[0], image.shape[1]),
                self.input_hw,
                self.config.resize_mode,
                self.config.pad_value,
                self.config.interpolation,
            )
            for image in images_rgb
        ]
        inputs = [letterbox.apply(image) for letterbox, image in zip(letterboxes, images_rgb, strict=True)]
        inputs += [inputs[0]] * ((self.batch or len(inputs)) - len(inputs))  # fill a graph of fixed batch size
        images = inputs[0][None] if len(inputs) == 1 else np.stack(inputs)
        return letterboxes, normalize_input(images, self.config, self._input_dtype)

    def run(self, batch: NDArray[np.generic]) -> dict[str, NDArray[Any]]:
        """Run the graph.

        Args:
            batch (array[B, ...]): Model input of `preprocess`.

        Returns:
            Output arrays by name.
        """
        outputs = self._session.run(self._output_names, {self._input_name: batch})
        return dict(zip(self._output_names, outputs, strict=True))

    def postprocess(self, outputs: dict[str, NDArray[Any]], letterboxes: Sequence[Letterbox]) -> list[Detections]:
        """Decode outputs, suppress duplicates and map boxes to the images.

        Args:
            outputs: Output arrays by name.
            letterboxes: Position of each image in the model input.

        Returns:
            Detections per image, in pixels of that image.

        Raises:
            DataError: The outputs do not have the shapes of `config.output_format`.
        """
        try:
            decoded = list(decode_outputs(outputs, self.config, self.input_hw))
        except ValueError as error:
            raise DataError(
                f"{self.path}: the outputs are not in the format {self.config.output_format}: {error}. "
                "Change output_format in the model configuration."
            ) from None
        return [
            Detections(letterbox.boxes_to_source(boxes), scores)
            for letterbox, (boxes, scores) in zip(letterboxes, decoded, strict=False)  # without the filled images
        ]


def open_onnx_detector(
    path: Path, device: str = "cpu", config_path: Path | None = None, threads: int | None = None
) -> OnnxDetector:
    """Open an ONNX detector on the requested device, without fallback to another device.

    Args:
        path: ONNX file.
        device: "cpu", "cuda" or "cuda:N".
        config_path: YAML file of the model configuration (default: see `load_model_config`).
        threads: CPU threads per operator (default: one per physical core).

    Returns:
        The open detector.

    Raises:
        UsageError: The device or the number of threads is invalid.
        DataError: The model or its configuration is missing or invalid.
        UnavailableError: ONNX Runtime or the device is not available.
    """
    session = open_session(path, device, threads)
    config = load_model_config(path, session.get_modelmeta().custom_metadata_map, config_path)
    return OnnxDetector(path, session, config)


@dataclass(frozen=True)
class EnsembleMember:
    """A detector of an ensemble.

    Attributes:
        model: ONNX file.
        model_config: YAML file that describes it, or "" to look next to or inside the file.
    """

    model: str
    model_config: str = ""


@dataclass(frozen=True)
class EnsembleConfig:
    """Contents of an ensemble file.

    Attributes:
        models: The detectors.
        iou: Boxes are fused if their IoU is larger, 0 to 1.
    """

    models: tuple[EnsembleMember, ...]
    iou: float = FUSION_IOU

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("models: expected at least one `{model: FILE.onnx}`.")
        check_range("iou", self.iou, 0, 1)


class OnnxEnsemble:
    """Several open ONNX detectors that are used as one.

    Args:
        detectors: The detectors.
        iou: Boxes are fused if their IoU is larger.
    """

    def __init__(self, detectors: Sequence[OnnxDetector], iou: float) -> None:
        self.detectors, self.iou = tuple(detectors), iou

    def __call__(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detect persons in images of any size.

        Args:
            images_rgb (list of array[H, W, 3]): RGB, uint8.

        Returns:
            Fused detections per image, in pixels of that image.
        """
        per_model = [detector(images_rgb) for detector in self.detectors]
        return [fuse_detections(detections, self.iou)[0] for detections in zip(*per_model, strict=True)]


def open_onnx_ensemble(path: Path, device: str = "cpu", threads: int | None = None) -> OnnxEnsemble:
    """Open the detectors of an ensemble file.

    Args:
        path: YAML file.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads per operator (default: one per physical core).

    Returns:
        The open ensemble.

    Raises:
        DataError: The file is not readable, or a model is missing or invalid.
        UsageError: The file is not an ensemble, or a setting is out of range.
        UnavailableError: ONNX Runtime or the device is not available.
    """
    config = dataclass_from_dict(EnsembleConfig, read_yaml(path), f"{path}:")
    detectors = []
    for member in config.models:
        description = path.parent / member.model_config if member.model_config else None
        detectors.append(open_onnx_detector(path.parent / member.model, device, description, threads))
    return OnnxEnsemble(detectors, config.iou)


def decode_outputs(
    outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int]
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Decode the outputs of a model to person boxes and scores.

    Only the rows with a score of at least `config.conf` are decoded.

    Args:
        outputs: Output arrays by name, in the order of the graph.
        config: Output conventions.
        input_hw: Height and width of the model input in pixels.

    Yields:
        Per image, boxes (array[N, 4], xyxy, input pixels) and scores (array[N], descending, at least `config.conf`).

    Raises:
        ValueError: The shapes do not match `config.output_format`.
    """
    scores, decode_rows = READERS[config.output_format](outputs, config, input_hw)
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
    scores = raw[..., 4] * _select_class_scores(raw[..., 5:], config.person_class_id)

    def decode_rows(index: int, rows: NDArray[np.intp]) -> FloatArray:
        values = raw[index, rows, :4]
        centers, sides = (values[:, :2] + corners[rows]) * strides[rows], np.exp(values[:, 2:]) * strides[rows]
        return _xyxy_from_cxcywh(np.concatenate([centers, sides], 1))

    return scores, decode_rows


def _read_yolo(outputs: Mapping[str, FloatArray], config: OnnxModelConfig, _: tuple[int, int]) -> RawRows:
    raw = _get_first_output(outputs, 3)  # [B, 4 + classes, A]
    scores = _select_class_scores(raw[:, 4:].swapaxes(1, 2), config.person_class_id)
    return scores, lambda index, rows: _xyxy_from_cxcywh(raw[index, :4, rows])


def _read_yolo_e2e(outputs: Mapping[str, FloatArray], config: OnnxModelConfig, _: tuple[int, int]) -> RawRows:
    raw = _get_first_output(outputs, 3)
    if raw.shape[2] != 6:
        raise ValueError(f"expected [B, N, 6], got {list(raw.shape)}")
    scores = np.where(raw[..., 5] == config.person_class_id, raw[..., 4], 0)
    return scores, lambda index, rows: raw[index, rows, :4]


def _read_gfl(outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int]) -> RawRows:
    """Generalized Focal Loss head (Li et al. 2020): each side is the expected value over distance bins."""
    class_scores, bins = _split_gfl_outputs(list(outputs.values()), config)
    corners, strides = _make_grid(input_hw, config.strides)
    _check_num_points(class_scores.shape[1], input_hw, config.strides)
    scores = 1 / (1 + np.exp(-class_scores)) if config.score_activation == "sigmoid" else class_scores
    distances = np.arange(config.num_bins, dtype=np.float32)

    def decode_rows(index: int, rows: NDArray[np.intp]) -> FloatArray:
        logits = bins[index, rows].reshape(-1, 4, config.num_bins)
        weights = np.exp(logits - logits.max(2, keepdims=True))
        sides = (weights @ distances) / weights.sum(2) * strides[rows]  # [N, 4]: left, top, right, bottom
        points = (corners[rows] + config.point_offset) * strides[rows]
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
    return np.concatenate([_select_class_scores(level, config.person_class_id) for level in classes], 1), bins


def _read_fastestdet(outputs: Mapping[str, FloatArray], config: OnnxModelConfig, input_hw: tuple[int, int]) -> RawRows:
    """FastestDet, decoded as its `utils.tool.handle_preds` does."""
    maps = _get_first_output(outputs, 4)
    batch, num_channels, height, width = maps.shape
    raw = maps.reshape(batch, num_channels, height * width).swapaxes(1, 2)  # [B, A, 5 + classes]
    person_scores = _select_class_scores(raw[..., 5:], config.person_class_id)
    scores = np.clip(raw[..., 0], 0, 1) ** 0.6 * np.clip(person_scores, 0, 1) ** 0.4
    input_wh, map_wh = np.array(input_hw[::-1], np.float32), np.array([width, height], np.float32)

    def decode_rows(index: int, rows: NDArray[np.intp]) -> FloatArray:
        values, corners = raw[index, rows], np.stack([rows % width, rows // width], 1)
        centers = (corners + np.tanh(values[:, 1:3])) / map_wh * input_wh
        sides = input_wh / (1 + np.exp(-values[:, 3:5]))
        return _xyxy_from_cxcywh(np.concatenate([centers, sides], 1))

    return scores, decode_rows


def _read_named_outputs(outputs: Mapping[str, FloatArray], config: OnnxModelConfig, _: tuple[int, int]) -> RawRows:
    if not {"boxes", "scores"} <= outputs.keys():
        raise ValueError(f"expected outputs boxes and scores, got {', '.join(outputs)}")
    boxes, scores, labels = outputs["boxes"], outputs["scores"], outputs.get("labels")
    if boxes.ndim != 3 or boxes.shape[2] != 4 or scores.shape != boxes.shape[:2]:
        raise ValueError(f"expected boxes [B, N, 4] and scores [B, N], got {list(boxes.shape)}, {list(scores.shape)}")
    if labels is not None:
        scores = np.where(labels == config.person_class_id, scores, 0)
    return scores, lambda index, rows: boxes[index, rows]


READERS: dict[OutputFormat, Reader] = {
    "yolox-raw": _read_yolox,
    "yolo-raw": _read_yolo,
    "yolo-e2e": _read_yolo_e2e,
    "gfl-raw": _read_gfl,
    "fastestdet-raw": _read_fastestdet,
    "boxes-scores": _read_named_outputs,
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


def _select_class_scores(scores: FloatArray, person_class_id: int) -> FloatArray:
    if person_class_id >= scores.shape[-1]:
        raise ValueError(f"person_class_id is {person_class_id}, but the output has {scores.shape[-1]} classes")
    return scores[..., person_class_id]


def _xyxy_from_cxcywh(boxes_cxcywh: FloatArray) -> FloatArray:
    centers, half_sides = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return np.concatenate([centers - half_sides, centers + half_sides], -1)
