"""Configuration of an ONNX detector: how to prepare its input and how to decode its outputs.

`read_input_info` and `normalize_input` apply the conventions of the input; `detector` applies those of the outputs.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hkd_det.config import check_range, dataclass_from_dict
from hkd_det.errors import DataError, UsageError, first_error_line
from hkd_det.files import read_yaml
from hkd_det.letterbox import PAD_VALUE, Align, Interpolation

OutputFormat = Literal["yolox-raw", "yolo-raw", "yolo-e2e", "gfl-raw", "fastestdet-raw", "boxes-scores"]

NATIVE_FORMAT = "1"  # metadata key hkd.format in the files of hkd-export

INPUT_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True)
class OnnxModelConfig:
    """Input and output conventions of an ONNX detector.

    The ONNX file itself contains the batch size, the input size and the number type.

    Output formats:

    * `yolox-raw`: [B, A, 5 + classes]: cx, cy, w, h relative to cell corner and stride, objectness, class scores.
    * `yolo-raw`: [B, 4 + classes, A]: cx, cy, w, h in input pixels, class scores (YOLOv8, YOLO11).
    * `yolo-e2e`: [B, N, 6]: x1, y1, x2, y2 in input pixels, score, class (YOLOv10, YOLO26).
    * `gfl-raw`: class scores and, for each side, the logits of `num_bins` distances in strides (PicoDet, NanoDet-Plus):
      one output [B, A, classes + 4 * num_bins], or the class scores of each level, then the distances of each level.
    * `fastestdet-raw`: [B, 5 + classes, H, W]: objectness, x, y, w, h, class scores (FastestDet).
    * `boxes-scores`: outputs named `boxes` [B, N, 4] (xyxy, input pixels), `scores` [B, N] and, for several
      classes, `labels` [B, N].

    Attributes:
        output_format: One of the formats above.
        layout: Axis order of the input.
        color_order: Channel order of the input.
        input_scale: Value of the brightest pixel before mean and std, usually 255 or 1.
        mean: Value subtracted per channel, in the order of `color_order`.
        std: Divisor per channel, in the order of `color_order`.
        resize_mode: Position of the resized image in the input, as in `Letterbox.align`.
        pad_value: Gray value of the padding, 0 to 255.
        interpolation: Method of the resize, as in `Letterbox.interpolation`.
        imgsz_hw: Input height and width in pixels; required if the file has a dynamic input size.
        person_class_id: Class index of persons.
        strides: Strides of the feature levels of `yolox-raw` and `gfl-raw`, in the order of the output.
        num_bins: Distances per side of `gfl-raw`.
        point_offset: Position of the anchor points of `gfl-raw` in their cells, 0 (corner) to 1, usually 0 or 0.5.
        score_activation: Function that `gfl-raw` applies to the class scores: "none" or "sigmoid".
        conf: Minimum score of a detection, 0 to 1.
        iou: IoU threshold of NMS for the formats that need NMS (`...-raw`).
        name: Name of the model, for tables.
        license: License of the weights.
        homepage: Origin of the weights.
    """

    output_format: OutputFormat
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    color_order: Literal["rgb", "bgr"] = "rgb"
    input_scale: float = 255.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resize_mode: Align = "top-left"
    pad_value: int = PAD_VALUE
    interpolation: Interpolation = "linear"
    imgsz_hw: tuple[int, ...] | None = None
    person_class_id: int = 0
    strides: tuple[int, ...] = (8, 16, 32)
    num_bins: int = 8
    point_offset: float = 0.5
    score_activation: Literal["none", "sigmoid"] = "none"
    conf: float = 0.01
    iou: float = 0.65
    name: str = ""
    license: str = ""
    homepage: str = ""

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError("mean and std: expected three numbers each, those of std above 0.")
        check_range("input_scale", self.input_scale, 0, is_open=True)
        check_range("pad_value", self.pad_value, 0, 255)
        check_range("num_bins", self.num_bins, 2)
        check_range("point_offset", self.point_offset, 0, 1)
        check_range("person_class_id", self.person_class_id, 0)
        check_range("conf", self.conf, 0, 1)
        check_range("iou", self.iou, 0, 1, is_open=True)
        if self.imgsz_hw is not None and (len(self.imgsz_hw) != 2 or min(self.imgsz_hw) < 1):
            raise UsageError(f"imgsz_hw: expected height and width in pixels, got {list(self.imgsz_hw)}.")
        if not self.strides or min(self.strides) < 1:
            raise UsageError(f"strides: expected integers of at least 1, got {list(self.strides)}.")

    @property
    def needs_nms(self) -> bool:
        """Whether the outputs contain several boxes per object."""
        return self.output_format.endswith("-raw")


def load_model_config(
    model_path: Path, metadata: Mapping[str, str], config_path: Path | None = None
) -> OnnxModelConfig:
    """Load the configuration of an ONNX model from the first source that exists.

    The sources are `config_path`, the metadata of hkd-export, a `.yaml` file next to the model, and the metadata of
    Ultralytics.

    Args:
        model_path: ONNX file.
        metadata: Custom metadata of the ONNX file.
        config_path: YAML file of the configuration.

    Returns:
        The configuration.

    Raises:
        DataError: No source exists, or the source is invalid.
    """
    if config_path is not None:
        return read_model_config(config_path)
    if "hkd.format" in metadata:
        return _read_native_config(model_path, metadata)
    default_path = model_path.with_suffix(".yaml")
    if not default_path.is_file() and metadata.get("author") == "Ultralytics":
        return _read_ultralytics_config(model_path, metadata)
    if not default_path.is_file():
        raise DataError(
            f"{model_path}: not exported by hkd-export, and no model configuration found. Write {default_path.name} "
            "in the same directory, or pass --model-config FILE (hkd-train: --teacher-config, --audit-config). "
            "Examples are in recipes/onnx/."
        )
    return read_model_config(default_path)


def read_model_config(path: Path) -> OnnxModelConfig:
    """Read a model configuration from a YAML file.

    Args:
        path: YAML file with the fields of `OnnxModelConfig` as keys.

    Returns:
        The configuration.

    Raises:
        DataError: The file is missing, is not YAML, or has an unknown key or an invalid value.
    """
    content = read_yaml(path)
    try:
        return dataclass_from_dict(OnnxModelConfig, content)
    except UsageError as error:
        raise DataError(f"{path}: {error}") from None


def normalize_input(
    images_rgb: NDArray[np.uint8], config: OnnxModelConfig, dtype: type[np.generic]
) -> NDArray[np.generic]:
    """Convert a batch of images to the value range, channel order, layout and number type of the model.

    Args:
        images_rgb (array[B, H, W, 3]): RGB, uint8.
        config: Input conventions.
        dtype: Number type of the model input.

    Returns:
        array[B, 3, H, W] or array[B, H, W, 3]: Contiguous, of type `dtype`.
    """
    images: NDArray[Any] = images_rgb if config.color_order == "rgb" else images_rgb[..., ::-1]
    is_identity = config.input_scale == 255 and set(config.mean) == {0.0} and set(config.std) == {1.0}
    if not is_identity:
        images = _scale_channels(images, config)
    if config.layout == "NCHW":
        images = images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images, dtype=dtype)


def read_input_info(
    path: Path, session: Any, config: OnnxModelConfig
) -> tuple[str, type[np.generic], int | None, tuple[int, int]]:
    """Read the properties of the only input.

    Args:
        path: ONNX file, for error messages.
        session: `onnxruntime.InferenceSession` of the file.
        config: Input conventions.

    Returns:
        name: Name of the input.
        dtype: Number type.
        batch: Batch size, or None if it is dynamic.
        input_hw: Height and width in pixels.

    Raises:
        DataError: The input does not match the configuration.
    """
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in INPUT_DTYPES or len(inputs[0].shape) != 4:
        actual = [(value.name, value.type, value.shape) for value in inputs]
        raise DataError(f"{path}: expected one input of 4 dimensions and type uint8 or float, got {actual}.")
    shape = list(inputs[0].shape)
    channels, sides = (shape[1], shape[2:]) if config.layout == "NCHW" else (shape[3], shape[1:3])
    if isinstance(channels, int) and channels != 3:
        raise DataError(
            f"{path}: expected 3 channels in the layout {config.layout}, got the input shape {shape}. Check the key "
            "layout of the model configuration."
        )
    input_hw = _resolve_input_hw(path, sides, config)
    return inputs[0].name, INPUT_DTYPES[inputs[0].type], _get_static_dim(shape[0]), input_hw


def _read_native_config(model_path: Path, metadata: Mapping[str, str]) -> OnnxModelConfig:
    if metadata["hkd.format"] != NATIVE_FORMAT:
        raise DataError(
            f"{model_path}: metadata hkd.format: expected {NATIVE_FORMAT}, got {metadata['hkd.format']}. "
            "Export the model again."
        )
    if metadata.get("hkd.raw") == "true" or metadata.get("hkd.dynamic") == "true":
        raise DataError(f"{model_path}: exported with --raw or --dynamic size. Export the teacher without these flags.")
    try:
        preprocess = json.loads(metadata["hkd.preprocess"])
        if preprocess.get("dtype", "uint8") != "uint8":
            raise ValueError("expected dtype uint8, as exported without --no-preprocess")
        values = {
            "output_format": "boxes-scores",
            "layout": preprocess["layout"],
            "color_order": preprocess["color"].lower(),
            "resize_mode": preprocess["letterbox"],
            "pad_value": preprocess["pad"],
            "conf": 0.0,
        }
        return dataclass_from_dict(OnnxModelConfig, values)
    except (KeyError, ValueError, TypeError, AttributeError, UsageError) as error:
        raise DataError(
            f"{model_path}: metadata hkd.preprocess is damaged ({first_error_line(error)}). Export the model again."
        ) from None


def _read_ultralytics_config(model_path: Path, metadata: Mapping[str, str]) -> OnnxModelConfig:
    """Derive the configuration of `yolo export format=onnx` from its metadata."""
    try:
        if metadata["task"] != "detect":
            raise ValueError(f"expected the task detect, got {metadata['task']}")
        is_end2end = metadata.get("end2end") == "True"
        has_nms = bool(ast.literal_eval(metadata.get("args", "{}")).get("nms"))
        values = {
            "output_format": "yolo-e2e" if is_end2end or has_nms else "yolo-raw",
            "input_scale": 1,
            "resize_mode": "center",
            "imgsz_hw": ast.literal_eval(metadata["imgsz"]),
            "person_class_id": _find_person_class(ast.literal_eval(metadata["names"])),
            "iou": 0.7,
            "name": metadata.get("description", ""),
            "license": metadata.get("license", ""),
            "homepage": metadata.get("docs", ""),
        }
        return dataclass_from_dict(OnnxModelConfig, values)
    except (KeyError, ValueError, TypeError, SyntaxError, AttributeError, UsageError) as error:
        raise DataError(
            f"{model_path}: the metadata of Ultralytics does not describe a person detector ({error}). "
            f"Write {model_path.with_suffix('.yaml').name} in the same directory. Examples are in recipes/onnx/."
        ) from None


def _find_person_class(names: Mapping[int, str]) -> int:
    for index, name in names.items():
        if len(names) == 1 or name.lower() in ("person", "pedestrian"):
            return index
    raise ValueError(f"expected a class person or pedestrian, got {', '.join(names.values())}")


def _scale_channels(images: NDArray[np.uint8], config: OnnxModelConfig) -> NDArray[np.float32]:
    """Subtract mean and divide by std, one channel at a time: broadcasting over the last axis is ten times slower."""
    planes = np.empty((3, *images.shape[:3]), np.float32)
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        np.multiply(images[..., channel], np.float32(config.input_scale / 255 / std), out=planes[channel])
        planes[channel] -= np.float32(mean / std)
    return planes.transpose(1, 2, 3, 0)  # [B, H, W, 3]


def _resolve_input_hw(path: Path, input_dims: Sequence[int | str | None], config: OnnxModelConfig) -> tuple[int, int]:
    requested = config.imgsz_hw or (None, None)
    resolved = [_get_static_dim(dim) or side for dim, side in zip(input_dims, requested, strict=True)]
    if config.imgsz_hw and tuple(resolved) != tuple(requested):
        raise DataError(
            f"{path}: imgsz_hw is {list(requested)} in the model configuration, but the input is {list(input_dims)}. "
            "Omit imgsz_hw, or set the size of the input."
        )
    height, width = resolved
    if height is None or width is None:
        raise DataError(f"{path}: the input size is dynamic. Set imgsz_hw: [H, W] in the model configuration.")
    return height, width


def _get_static_dim(dimension: int | str | None) -> int | None:
    """Return a dimension of the graph, or None if it is dynamic."""
    return dimension if isinstance(dimension, int) and dimension > 0 else None
