"""The names of Ultralytics' detectors, and the definition that lies behind each: yolo11n, yolov8s-p2, yolov9c."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from hkd_det.errors import UsageError
from hkd_det.models.yolo_package import import_tasks

DETECTION_HEADS = ("Detect", "v10Detect")
MODEL_NAME_PATTERN = re.compile(r"(yolov?\d+)([nslmx])(-[\w-]+)?")  # family, size, variant: as Ultralytics parts a name
ARCHITECTURE_KEYS = ("nc", "scales", "scale", "end2end", "reg_max", "activation", "depth_multiple", "width_multiple")


def load_model_yaml(name: str) -> dict[str, Any]:
    """Ultralytics' definition of a detector, with its size chosen.

    Raises UsageError for a name there is none of (the nearest are named) and for a model that is no detector.
    """
    files = _list_model_yamls()
    match = MODEL_NAME_PATTERN.fullmatch(name)
    path = files.get(name) or (files.get(match[1] + (match[3] or "")) if match else None)
    if path is None or not is_detection_model(layout := _read_yaml(path)):
        raise UsageError(f"--model {name}: Ultralytics defines no such detector{_suggest_names(name, files)}")
    scales = layout.get("scales")
    if not scales:
        return filter_model_yaml(layout)
    if not match or match[2] not in scales:
        raise UsageError(f"--model {name}: its size is missing{_suggest_names(name, files)}")
    return filter_model_yaml({**layout, "scale": match[2]})


def is_detection_model(model_yaml: dict[str, Any]) -> bool:
    """Whether a definition ends in a head that gives boxes and scores and nothing else."""
    return model_yaml["head"][-1][2] in DETECTION_HEADS


def filter_model_yaml(model_yaml: dict[str, Any]) -> dict[str, Any]:
    """The part of a definition that shapes the network."""
    return {key: model_yaml[key] for key in (*ARCHITECTURE_KEYS, "backbone", "head") if model_yaml.get(key) is not None}


def _list_model_yamls() -> dict[str, Path]:
    folder = Path(str(import_tasks().__file__)).parents[1] / "cfg" / "models"
    return {path.stem: path for path in sorted(folder.rglob("yolo*.yaml"))}


def _read_yaml(path: Path) -> dict[str, Any]:
    layout: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return layout


def _suggest_names(name: str, files: dict[str, Path]) -> str:
    names = []
    for stem, path in files.items():
        layout = _read_yaml(path)
        family = re.fullmatch(r"(yolov?\d+)(.*)", stem)
        if family and is_detection_model(layout) and layout.get("scales") and not MODEL_NAME_PATTERN.fullmatch(stem):
            names += [f"{family[1]}{size}{family[2]}" for size in layout["scales"]]
        elif family and is_detection_model(layout):
            names.append(stem)
    near = difflib.get_close_matches(name, names, 5, 0.5)
    return f"; there are {', '.join(near)}" if near else ""
