"""`Description`: what has to be known of a foreign ONNX detector to feed it and to read its answers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from hkd_det.config import dataclass_from_dict
from hkd_det.errors import DataError, UsageError

OutputFormat = Literal["yolox-raw", "yolo-raw", "yolo-e2e", "boxes-scores"]


NATIVE_FORMAT = "1"  # of hkd-export's files: hkd.format in their metadata


@dataclass(frozen=True)
class OnnxModelConfig:
    """A foreign detector's interface. Batch, size and number type of the input stand in the file itself.

    output: how its answers are written, see below.
    layout, colours: of the input. white: the number that the brightest pixel becomes, before mean and std.
    mean, std: taken off and divided by, one a channel, in the order of `colours`.
    placement: where a picture of other proportions lies in the input; "stretch" changes its proportions. pad: the grey
    of the rest, 0..255. imgsz_hw: of the input, where the file leaves it open.
    person: number of the person's class. strides: of yolox-raw's levels, fine to coarse.
    conf: least score that counts. iou: overlap from which the worse of two boxes goes, where the model leaves
    suppression to us (yolox-raw, yolo-raw).

    yolox-raw     [B, A, 5 + classes]: cx, cy, w, h against the cell's corner and stride, objectness, class scores
    yolo-raw      [B, 4 + classes, A]: cx, cy, w, h in input pixels, class scores (YOLOv8, YOLO11)
    yolo-e2e      [B, N, 6]: x1, y1, x2, y2 in input pixels, score, class (YOLOv10, YOLO26)
    boxes-scores  outputs boxes [B, N, 4] xyxy in input pixels, scores [B, N] and, if there are several classes,
                  labels [B, N]
    """

    output_format: OutputFormat
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    color_order: Literal["rgb", "bgr"] = "rgb"
    input_scale: float = 255.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resize_mode: Literal["top-left", "center", "stretch"] = "top-left"
    pad_value: int = 114
    imgsz_hw: tuple[int, ...] | None = None
    person_class_id: int = 0
    strides: tuple[int, ...] = (8, 16, 32)
    conf: float = 0.01
    iou: float = 0.65

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError("mean and std: three numbers, those of std above 0")
        if self.input_scale <= 0 or not 0 <= self.pad_value <= 255:
            raise UsageError("white: above 0; pad: 0..255")
        if self.imgsz_hw is not None and (len(self.imgsz_hw) != 2 or min(self.imgsz_hw) < 1):
            raise UsageError(f"imgsz_hw: {list(self.imgsz_hw)}: height and width in pixels")
        if not self.strides or min(self.strides) < 1 or self.person_class_id < 0:
            raise UsageError("strides: whole numbers from 1 on; person: a class number from 0 on")
        if not 0 <= self.conf <= 1 or not 0 < self.iou <= 1:
            raise UsageError("conf and iou: 0..1")


def load_model_config(
    model_path: Path, metadata: Mapping[str, str], config_path: Path | None = None
) -> OnnxModelConfig:
    """The description of the model file: the one given, else what hkd-export wrote inside, else model.yaml beside it.

    metadata: the ONNX file's own. Raises DataError for a file that is missing or wrong.
    """
    if config_path is not None:
        return read_model_config(config_path)
    if "hkd.format" in metadata:
        return _read_native_config(model_path, metadata)
    beside = model_path.with_suffix(".yaml")
    if not beside.is_file():
        raise DataError(
            f"{model_path}: none of hkd-export's models, and nothing says how to read it; describe it in {beside.name} "
            "beside it, or in a file that --teacher-config names (recipes/foreign/ has examples)"
        )
    return read_model_config(beside)


def read_model_config(path: Path) -> OnnxModelConfig:
    """A description from its YAML file, read strictly."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such description of a model") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not readable YAML: {' '.join(str(error).split())}") from None
    try:
        return dataclass_from_dict(OnnxModelConfig, content)
    except UsageError as error:
        raise DataError(f"{path}: {error}") from None


def _read_native_config(model_path: Path, metadata: Mapping[str, str]) -> OnnxModelConfig:
    if metadata["hkd.format"] != NATIVE_FORMAT:
        raise DataError(
            f"{model_path}: written in format {metadata['hkd.format']} by another hkd-det, this one reads {NATIVE_FORMAT}"
        )
    try:
        asked = json.loads(metadata["hkd.preprocess"])
        values = {"layout": asked["layout"], "color_order": asked["color"].lower(), "resize_mode": asked["letterbox"]}
        return dataclass_from_dict(
            OnnxModelConfig, {**values, "pad_value": asked["pad"], "output_format": "boxes-scores", "conf": 0.0}
        )
    except (KeyError, ValueError, TypeError, AttributeError, UsageError) as error:
        raise DataError(f"{model_path}: its metadata hkd.preprocess is damaged ({error}); export it again") from None
