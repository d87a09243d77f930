"""The names of Ultralytics' detectors, and the definition that lies behind each: yolo11n, yolov8s-p2, yolov9c."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from hkd_det.errors import UsageError
from hkd_det.models.yolo_package import import_tasks

HEADS = ("Detect", "v10Detect")
SIZE = re.compile(r"(yolov?\d+)([nslmx])(-[\w-]+)?")  # family, size, variant: as Ultralytics parts a name
KEPT = ("nc", "scales", "scale", "end2end", "reg_max", "activation", "depth_multiple", "width_multiple")


def definition(name: str) -> dict[str, Any]:
    """Ultralytics' definition of a detector, with its size chosen.

    Raises UsageError for a name there is none of (the nearest are named) and for a model that is no detector.
    """
    files = _files()
    match = SIZE.fullmatch(name)
    path = files.get(name) or (files.get(match[1] + (match[3] or "")) if match else None)
    if path is None or not fits(layout := _read(path)):
        raise UsageError(f"--model {name}: Ultralytics defines no such detector{_near(name, files)}")
    scales = layout.get("scales")
    if not scales:
        return plain(layout)
    if not match or match[2] not in scales:
        raise UsageError(f"--model {name}: its size is missing{_near(name, files)}")
    return plain({**layout, "scale": match[2]})


def fits(layout: dict[str, Any]) -> bool:
    """Whether a definition ends in a head that gives boxes and scores and nothing else."""
    return layout["head"][-1][2] in HEADS


def plain(layout: dict[str, Any]) -> dict[str, Any]:
    """The part of a definition that shapes the network."""
    return {key: layout[key] for key in (*KEPT, "backbone", "head") if layout.get(key) is not None}


def _files() -> dict[str, Path]:
    folder = Path(str(import_tasks().__file__)).parents[1] / "cfg" / "models"
    return {path.stem: path for path in sorted(folder.rglob("yolo*.yaml"))}


def _read(path: Path) -> dict[str, Any]:
    layout: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return layout


def _near(name: str, files: dict[str, Path]) -> str:
    names = []
    for stem, path in files.items():
        layout = _read(path)
        family = re.fullmatch(r"(yolov?\d+)(.*)", stem)
        if family and fits(layout) and layout.get("scales") and not SIZE.fullmatch(stem):
            names += [f"{family[1]}{size}{family[2]}" for size in layout["scales"]]
        elif family and fits(layout):
            names.append(stem)
    near = difflib.get_close_matches(name, names, 5, 0.5)
    return f"; there are {', '.join(near)}" if near else ""
