"""Configuration of an ONNX detector: how to prepare its input and how to decode its outputs.

`normalize_input` and `graph_io` apply the conventions of the input; `decoding` applies those of the outputs. The
package contains the configurations of common detectors (`list_builtin_configs`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hkd_det.config import check_range, dataclass_from_dict
from hkd_det.errors import DataError, UsageError
from hkd_det.files import read_yaml
from hkd_det.letterbox import PAD_VALUE, Align, Interpolation

OutputFormat = Literal[
    "yolox-raw", "yolov5-raw", "yolo-raw", "yolo-e2e", "gfl-raw", "fastestdet-raw", "yolo-fastestv2-raw",
    "boxes-scores", "boxes-classes", "detection-output", "class-score-boxes",
]  # fmt: skip
BoxFormat = Literal["xyxy", "cxcywh", "yxyx"]
ScoreActivation = Literal["none", "sigmoid", "softmax"]

# Width and height in pixels of the anchors of Yolo-FastestV2 for COCO: three of stride 16, three of stride 32.
FASTESTV2_ANCHORS = (12.64, 19.39, 37.88, 51.48, 55.71, 138.31, 126.91, 78.23, 131.57, 214.55, 279.92, 258.87)

# In the wheel, the files of recipes/onnx are in `configs` next to this file.
_CONFIG_DIRS = (Path(__file__).parent / "configs", Path(__file__).parents[2] / "recipes" / "onnx")
MAX_SHOWN_NAMES = 5


@dataclass(frozen=True)
class OnnxModelConfig:
    """Input and output conventions of an ONNX detector.

    The ONNX file itself contains the batch size, the input size and the number type.

    Output formats:

    * `yolox-raw`: [B, A, 5 + classes]: cx, cy, w, h relative to cell corner and stride, objectness, class scores.
    * `yolov5-raw`: [B, A, 5 + classes]: cx, cy, w, h in input pixels, objectness, class scores (YOLOv5, YOLOv7).
    * `yolo-raw`: [B, 4 + classes, A]: cx, cy, w, h in input pixels, class scores (YOLOv8, YOLO11).
    * `yolo-e2e`: [B, N, 6]: box, score, class (YOLOv10, YOLO26, Ultralytics with NMS).
    * `gfl-raw`: class scores and, for each side, the logits of `num_bins` distances in strides (PicoDet, NanoDet):
      one output [B, A, classes + 4 * num_bins], or the class scores of each level, then the distances of each level.
    * `fastestdet-raw`: [B, 5 + classes, H, W]: objectness, x, y, w, h, class scores (FastestDet).
    * `yolo-fastestv2-raw`: [B, A, 5 * anchors + classes] or [B, H, W, 5 * anchors + classes] of each level: x, y, w, h
      of each anchor, objectness of each anchor, class scores (Yolo-FastestV2).
    * `boxes-scores`: boxes [B, N, 4], scores [B, N] and, for several classes, labels [B, N]; or boxes [B, N, 5] with
      the scores. Without the axis B for one image.
    * `boxes-classes`: boxes [B, N, 4] and class scores [B, N, classes], in two outputs or in one.
    * `detection-output`: [1, 1, N, 7]: image index, class, score, x1, y1, x2, y2 relative to the input (OpenVINO).
    * `class-score-boxes`: [N, 6]: class, score, x1, y1, x2, y2 in input pixels, and the number of rows
      (PaddleDetection with NMS).

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
        default_imgsz_hw: As `imgsz_hw`, but a fixed input size of the file has priority.
        person_class_id: Class index of persons. None if every class is a person.
        box_format: Order of the four numbers of a box of `yolo-e2e`, `boxes-scores` and `boxes-classes`.
        normalized_boxes: Whether these boxes are relative to the input, 0 to 1.
        boxes_output: Name of the output with the boxes; "" to find it.
        scores_output: Name of the output with the scores; "" to find it.
        labels_output: Name of the output with the classes; "" to find it.
        strides: Strides of the feature levels of `yolox-raw`, `gfl-raw` and `yolo-fastestv2-raw`, in the order of the
            output.
        num_bins: Distances per side of `gfl-raw`.
        point_offset: Position of the anchor points of `gfl-raw` in their cells, 0 (corner) to 1, usually 0 or 0.5.
        point_shift_px: Distance in pixels by which these anchor points are moved right and down.
        anchors: Width and height in pixels of each anchor of `yolo-fastestv2-raw`, level by level.
        score_activation: Function that converts the class scores of `gfl-raw`, `boxes-scores` and `boxes-classes`.
        conf: Minimum score of a detection, 0 to 1.
        iou: IoU threshold of NMS.
        nms: Whether NMS runs after the graph. None for the formats `...-raw`.
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
    default_imgsz_hw: tuple[int, ...] | None = None
    person_class_id: int | None = 0
    box_format: BoxFormat = "xyxy"
    normalized_boxes: bool = False
    boxes_output: str = ""
    scores_output: str = ""
    labels_output: str = ""
    strides: tuple[int, ...] = (8, 16, 32)
    num_bins: int = 8
    point_offset: float = 0.5
    point_shift_px: float = 0.0
    anchors: tuple[float, ...] = FASTESTV2_ANCHORS
    score_activation: ScoreActivation = "none"
    conf: float = 0.01
    iou: float = 0.65
    nms: bool | None = None
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
        if self.person_class_id is not None:
            check_range("person_class_id", self.person_class_id, 0)
        check_range("conf", self.conf, 0, 1)
        check_range("iou", self.iou, 0, 1, is_open=True)
        for key in ("imgsz_hw", "default_imgsz_hw"):
            size = getattr(self, key)
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise UsageError(f"{key}: expected height and width in pixels, got {list(size)}.")
        if not self.strides or min(self.strides) < 1:
            raise UsageError(f"strides: expected integers of at least 1, got {list(self.strides)}.")
        if self.output_format == "yolo-fastestv2-raw" and len(self.anchors) % (2 * len(self.strides)):
            raise UsageError(
                f"anchors: expected width and height of the same number of anchors for each of the "
                f"{len(self.strides)} strides, got {len(self.anchors)} numbers."
            )

    @property
    def needs_nms(self) -> bool:
        """Whether the outputs contain several boxes per object."""
        return self.output_format.endswith("-raw") if self.nms is None else self.nms


def list_builtin_configs() -> dict[str, Path]:
    """Return the configurations of the package: name to YAML file."""
    folder = next((path for path in _CONFIG_DIRS if path.is_dir()), _CONFIG_DIRS[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml")) if path.stem != "ensemble"}


def resolve_model_config(path: Path) -> Path:
    """Return the YAML file of a configuration.

    Args:
        path: The file, or a name of `list_builtin_configs`. An existing file has priority over a name.

    Returns:
        The file. It need not exist if `path` is not a name.
    """
    return path if path.exists() else list_builtin_configs().get(str(path), path)


def read_model_config(path: Path) -> OnnxModelConfig:
    """Read a model configuration from a YAML file.

    Args:
        path: YAML file with the fields of `OnnxModelConfig` as keys, or a name of `list_builtin_configs`.

    Returns:
        The configuration.

    Raises:
        DataError: The file is missing, is not YAML, or has an unknown key or an invalid value.
    """
    resolved = resolve_model_config(path)
    if not resolved.exists() and not path.suffix:
        raise DataError(
            f"{path}: no such model configuration. Give a YAML file, or one of {', '.join(list_builtin_configs())}."
        )
    content = read_yaml(resolved)
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


def find_person_class(names: Sequence[str]) -> int:
    """Return the index of the class of persons.

    Args:
        names: Names of all classes.

    Returns:
        The index of person or pedestrian, or 0 if there is only one class.

    Raises:
        ValueError: No class has such a name.
    """
    for index, name in enumerate(names):
        if len(names) == 1 or name.lower() in ("person", "pedestrian"):
            return index
    more = f" and {len(names) - MAX_SHOWN_NAMES} more" if len(names) > MAX_SHOWN_NAMES else ""
    raise ValueError(f"expected a class person or pedestrian, got {', '.join(names[:MAX_SHOWN_NAMES])}{more}")


def _scale_channels(images: NDArray[np.uint8], config: OnnxModelConfig) -> NDArray[np.float32]:
    """Subtract mean and divide by std, one channel at a time: broadcasting over the last axis is ten times slower."""
    planes = np.empty((3, *images.shape[:3]), np.float32)
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        np.multiply(images[..., channel], np.float32(config.input_scale / 255 / std), out=planes[channel])
        planes[channel] -= np.float32(mean / std)
    return planes.transpose(1, 2, 3, 0)  # [B, H, W, 3]
