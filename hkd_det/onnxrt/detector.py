"""Answers: from a foreign model's output arrays to people's boxes and scores, picture by picture.

A foreign model, open: pictures in, people out, without torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.boxes import nms
from hkd_det.errors import DataError
from hkd_det.letterbox import AlignedLetterbox, normalize_input
from hkd_det.onnxrt.model_config import OnnxModelConfig, load_model_config
from hkd_det.onnxrt.session import open_session
from hkd_det.structures import Detections

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


INPUT_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


class OnnxDetector:
    """An open session with its description. `batch`: pictures a call of the graph takes, None for any number."""

    def __init__(self, path: Path, session: Any, config: OnnxModelConfig) -> None:
        self.path, self.config = path, config
        self._session = session
        self._input_name, self._input_dtype, self.batch, self.input_hw = _read_input_info(path, session, config)
        self._output_names = [value.name for value in session.get_outputs()]

    def __call__(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """People in pictures (H, W, 3) uint8 RGB, each of any size, in pixels of it.

        Raises DataError where the answers are not what the description says.
        """
        found: list[Detections] = []
        step = self.batch or max(1, len(images_rgb))
        for start in range(0, len(images_rgb), step):
            found += self._predict_batch(images_rgb[start : start + step])
        return found

    def _predict_batch(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        places = [
            AlignedLetterbox.from_resize_mode(
                (picture.shape[0], picture.shape[1]), self.input_hw, self.config.resize_mode
            )
            for picture in images_rgb
        ]
        placed = [
            place.apply(picture, self.config.pad_value) for place, picture in zip(places, images_rgb, strict=True)
        ]
        filled = placed + [placed[0]] * ((self.batch or len(placed)) - len(placed))  # a graph of a fixed batch
        numbers = normalize_input(np.stack(filled), self.config, self._input_dtype)
        outputs = self._session.run(self._output_names, {self._input_name: numbers})
        try:
            answers = list(
                decode_outputs(dict(zip(self._output_names, outputs, strict=True)), self.config, self.input_hw)
            )
        except ValueError as error:
            raise DataError(
                f"{self.path}: not what its description says of {self.config.output_format}: {error}"
            ) from None
        return [
            Detections(place.boxes_to_source(boxes), scores)
            for place, (boxes, scores) in zip(places, answers, strict=False)
        ]


def open_onnx_detector(
    path: Path, device: str = "cpu", config_path: Path | None = None, threads: int | None = None
) -> OnnxDetector:
    """Open an ONNX detector on cpu, cuda or cuda:N, and on nothing else.

    description: its YAML file; by default what hkd-export wrote into the model, or the .yaml of its name beside it.
    Raises UsageError, DataError or UnavailableError, each saying what to do.
    """
    session = open_session(path, device, threads)
    return OnnxDetector(
        path, session, load_model_config(path, session.get_modelmeta().custom_metadata_map, config_path)
    )


def _read_input_info(
    path: Path, session: Any, config: OnnxModelConfig
) -> tuple[str, type[np.generic], int | None, tuple[int, int]]:
    """Name, number type, batch and (height, width) of the one input."""
    inputs = session.get_inputs()
    found = [(value.name, value.type, value.shape) for value in inputs]
    if len(inputs) != 1 or inputs[0].type not in INPUT_DTYPES or len(inputs[0].shape) != 4:
        raise DataError(
            f"{path}: expected one input of pictures, 4 dimensions of uint8 or float numbers, found {found}"
        )
    shape = list(inputs[0].shape)
    colours, sides = (shape[1], shape[2:]) if config.layout == "NCHW" else (shape[3], shape[1:3])
    if isinstance(colours, int) and colours != 3:
        raise DataError(f"{path}: its input {shape} has no three colours in the layout {config.layout}")
    return (
        inputs[0].name,
        INPUT_DTYPES[inputs[0].type],
        _get_static_dim(shape[0]),
        _resolve_input_hw(path, sides, config),
    )


def _resolve_input_hw(path: Path, input_dims: Sequence[int | str | None], config: OnnxModelConfig) -> tuple[int, int]:
    asked = config.imgsz_hw or (None, None)
    found = [_get_static_dim(side) or wanted for side, wanted in zip(input_dims, asked, strict=True)]
    if config.imgsz_hw and tuple(found) != tuple(asked):
        raise DataError(f"{path}: its description says imgsz_hw {list(asked)}, the file takes {list(input_dims)}")
    height, width = found
    if height is None or width is None:
        raise DataError(f"{path}: leaves the size of its input open; say it in its description: imgsz_hw: [H, W]")
    return height, width


def _get_static_dim(dimension: int | str | None) -> int | None:
    """A dimension of a graph, None where any number will do."""
    return dimension if isinstance(dimension, int) and dimension > 0 else None
