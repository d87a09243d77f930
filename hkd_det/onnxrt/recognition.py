"""Recognition of a detector: its configuration from a YAML file, from its metadata, or from its graph if that is safe.

A graph is recognized only if its metadata or the names and shapes of its outputs leave no doubt about preprocessing,
output format and class of persons. Otherwise `load_model_config` raises an error that names configurations that fit.
"""

import ast
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hkd_det.config import dataclass_from_dict
from hkd_det.errors import DataError, UsageError, first_error_line
from hkd_det.onnxrt.graph_io import GraphIO
from hkd_det.onnxrt.model_config import (
    OnnxModelConfig,
    find_person_class,
    list_builtin_configs,
    read_model_config,
)

NATIVE_FORMAT = "1"  # metadata key hkd.format in the files of hkd-export
CONFIG_KEY = "hkd.model_config"  # metadata key of a file that hkd-export --precision converted: JSON
NUM_COCO_IDS = 91  # COCO's category ids are 1 to 90: models that use them as class index have 91 classes
COCO_PERSON_ID = 1
FASTESTV2_CHANNELS = 95  # 3 anchors with 5 values each and 80 classes
OMZ_PERSON_PREFIXES = ("person-detection-", "pedestrian-detection-")  # detectors of persons only


def load_model_config(model_path: Path, graph: GraphIO, config_path: Path | None = None) -> OnnxModelConfig:
    """Load the configuration of an ONNX or OpenVINO model from the first source that exists.

    The sources are `config_path`, the metadata of hkd-export, a `.yaml` file next to the model, and the recognition of
    files of Ultralytics, YOLOv5, RF-DETR and the Open Model Zoo.

    Args:
        model_path: Model file.
        graph: Inputs, outputs and metadata of the model.
        config_path: YAML file of the configuration, or a name of `list_builtin_configs`.

    Returns:
        The configuration.

    Raises:
        DataError: No source exists, or the source is invalid.
    """
    if config_path is not None:
        return read_model_config(config_path)
    if "hkd.format" in graph.metadata:
        return _read_native_config(model_path, graph)
    if CONFIG_KEY in graph.metadata:
        return _read_stored_config(model_path, graph)
    default_path = model_path.with_suffix(".yaml")
    if default_path.is_file():
        return read_model_config(default_path)
    if graph.metadata.get("author") == "Ultralytics":
        return _read_ultralytics_config(model_path, graph)
    config = _recognize_yolov5(graph) or _recognize_rf_detr(graph) or _recognize_open_model_zoo(model_path, graph)
    if config is None:
        raise DataError(
            f"{model_path}: not exported by hkd-export, and no model configuration found. {_format_suggestion(graph)} "
            f"Pass --model-config NAME or FILE (hkd-train: --teacher-config, --audit-config), or write "
            f"{default_path.name} in the same directory."
        )
    return config


def make_config_metadata(config: OnnxModelConfig) -> str:
    """Return the metadata value of `CONFIG_KEY`, with which a file needs no other configuration.

    Args:
        config: Configuration of the model.
    """
    return json.dumps(asdict(config))


def suggest_configs(graph: GraphIO) -> list[str]:
    """Return the configurations of the package whose models have such inputs and outputs.

    Args:
        graph: Inputs and outputs of a model.

    Returns:
        Names of `list_builtin_configs`; empty if none fits.
    """
    inputs = {value.name for value in graph.inputs}
    outputs = {value.name.partition(":")[0]: value.shape for value in graph.outputs}
    shapes = list(outputs.values())
    ranks = sorted(map(len, shapes))
    single = shapes[0] if len(shapes) == 1 else ()
    has_class_scores = len(outputs.get("labels", ())) == 3
    is_level_list = ranks in ([3] * 6, [3] * 8)
    rules: tuple[tuple[bool, list[str]], ...] = (
        ("orig_target_sizes" in inputs, ["rt-detr", "d-fine", "deim", "deimv2"]),
        ("scale_factor" in inputs, ["picodet-nms", "pp-yoloe"]),
        ("detection_boxes" in outputs, ["tf-ssd"]),
        ({"pred_boxes", "logits"} <= outputs.keys(), ["rt-detr-transformers"]),
        ({"dets", "labels"} <= outputs.keys(), ["rf-detr"] if has_class_scores else ["rtmdet"]),
        (single[3:] == (7,), ["open-model-zoo-ssd"]),
        (any(shape[3:] == (FASTESTV2_CHANNELS,) for shape in shapes), ["yolo-fastestv2"]),
        (len(single) == 4, ["fastestdet"]),
        (ranks == [1, 1, 2], ["torchvision"]),
        (ranks == [1, 2], ["open-model-zoo-boxes"]),
        (is_level_list, ["nanodet"] if len(ranks) == 6 else ["picodet"]),
        (single[2:] == (6,), ["yolo26"]),
        (single[2:] == (85,), ["yolox", "yolov5", "yolov7"]),
        (single[-1:] == (FASTESTV2_CHANNELS,), ["yolo-fastestv2"]),
        (single[2:] == (112,), ["nanodet-plus"]),
        (len(single) == 3 and (single[2] or 0) > (single[1] or 0), ["yolov8"]),
    )
    return next((names for fits, names in rules if fits), [])


def _format_suggestion(graph: GraphIO) -> str:
    names = suggest_configs(graph)
    if names:
        return f"Its inputs and outputs are those of {' or '.join(names)}."
    return f"The configurations of the package are {', '.join(list_builtin_configs())}."


def _read_native_config(model_path: Path, graph: GraphIO) -> OnnxModelConfig:
    metadata = graph.metadata
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


def _read_stored_config(model_path: Path, graph: GraphIO) -> OnnxModelConfig:
    try:
        return dataclass_from_dict(OnnxModelConfig, json.loads(graph.metadata[CONFIG_KEY]))
    except (ValueError, UsageError) as error:
        raise DataError(
            f"{model_path}: metadata {CONFIG_KEY} is damaged ({first_error_line(error)}). Convert the model again."
        ) from None


def _read_ultralytics_config(model_path: Path, graph: GraphIO) -> OnnxModelConfig:
    """Derive the configuration of `yolo export format=onnx` or `format=openvino` from its metadata."""
    metadata = graph.metadata
    try:
        if metadata["task"] != "detect":
            raise ValueError(f"expected the task detect, got {metadata['task']}")
        names = _parse_class_names(metadata["names"])
        values: dict[str, Any] = {
            **_find_ultralytics_format(graph, len(names)),
            "input_scale": 1,
            "imgsz_hw": ast.literal_eval(metadata["imgsz"]),
            "person_class_id": find_person_class(names),
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


def _find_ultralytics_format(graph: GraphIO, num_classes: int) -> dict[str, Any]:
    """Return output format and resize mode: YOLO with or without NMS, or RT-DETR."""
    metadata, shape = graph.metadata, graph.outputs[0].shape
    columns = shape[2] if len(shape) == 3 else None
    head = metadata.get("head", "")  # since version 8.4
    is_rtdetr = head.startswith("RTDETR") or "detr" in metadata.get("description", "").lower()
    if is_rtdetr or (not head and columns == 4 + num_classes != 6 and shape[1] != columns):
        # Its predictor stretches the image. Older versions export the scores of all classes.
        has_scores = columns == 4 + num_classes and not (head and columns == 6)
        boxes = {"box_format": "cxcywh", "normalized_boxes": True, "resize_mode": "stretch"}
        return {"output_format": "boxes-classes" if has_scores else "yolo-e2e", **boxes}
    has_nms = bool(ast.literal_eval(metadata.get("args", "{}")).get("nms"))
    is_end2end = metadata.get("end2end") == "True" or has_nms or (columns == 6 and num_classes != 2)
    return {"output_format": "yolo-e2e" if is_end2end else "yolo-raw", "resize_mode": "center"}


def _recognize_yolov5(graph: GraphIO) -> OnnxModelConfig | None:
    """Recognize an export of the repository ultralytics/yolov5: metadata stride and names, three anchors per cell."""
    if not {"stride", "names"} <= graph.metadata.keys() or len(graph.image_inputs) != 1:
        return None
    try:
        names = _parse_class_names(graph.metadata["names"])
        person_class_id = find_person_class(names)
    except (ValueError, SyntaxError, TypeError, AttributeError):
        return None
    shape, (_, _, height, width) = graph.outputs[0].shape, graph.image_inputs[0].shape
    if len(shape) != 3 or shape[2] != 5 + len(names) or height is None or width is None:
        return None
    num_points = sum((height // stride) * (width // stride) for stride in (8, 16, 32))
    if shape[1] != 3 * num_points:
        return None
    return replace(read_model_config(Path("yolov5")), person_class_id=person_class_id)


def _recognize_rf_detr(graph: GraphIO) -> OnnxModelConfig | None:
    """Recognize RF-DETR with the classes of COCO by the names and shapes of its outputs."""
    outputs = {value.name: value.shape for value in graph.outputs}
    if outputs.keys() != {"dets", "labels"} or len(graph.inputs) != 1:
        return None
    boxes, classes = outputs["dets"], outputs["labels"]
    if len(boxes) == len(classes) == 3 and boxes[2] == 4 and classes[2] == NUM_COCO_IDS:
        return replace(read_model_config(Path("rf-detr")), person_class_id=COCO_PERSON_ID)
    return None


def _recognize_open_model_zoo(model_path: Path, graph: GraphIO) -> OnnxModelConfig | None:
    """Recognize the detectors of persons in Intel's Open Model Zoo by the name of the network or of the file."""
    names = [name for name in (graph.name, model_path.stem) if name.startswith(OMZ_PERSON_PREFIXES)]
    if not names or not graph.outputs or graph.metadata:
        return None
    name = "open-model-zoo-ssd" if graph.outputs[0].shape[3:] == (7,) else "open-model-zoo-boxes"
    if name == "open-model-zoo-boxes" and not any(value.shape[-1:] == (5,) for value in graph.outputs):
        return None
    return replace(read_model_config(Path(name)), person_class_id=None, name=names[0])


def _parse_class_names(text: str) -> list[str]:
    """Return the class names of a Python dict or list literal, as Ultralytics writes it."""
    names = ast.literal_eval(text)
    ordered = [names[index] for index in sorted(names)] if isinstance(names, dict) else list(names)
    return [str(name) for name in ordered]
