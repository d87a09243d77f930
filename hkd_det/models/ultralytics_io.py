"""Ultralytics' package, imported when a YOLO model is asked for and not before; it is AGPL-3.0 and an extra.

At import it asks a name server whether it is online, sets thread counts, print options and warning filters, and
replaces `torch.save` and `PIL.Image.open`. Here it is told that it is offline and to be quiet, and what it changed
outside itself is put back. Its settings file is the user's own and stays.

The names of Ultralytics' detectors, and the definition that lies behind each: yolo11n, yolov8s-p2, yolov9c.
"""

import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import torch
import yaml

from hkd_det.errors import UnavailableError, UsageError

# WORLD_SIZE: under torchrun its ranks would wait for one another, each at its own time.
QUIET_ENV = {"YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false", "WORLD_SIZE": "1"}


def import_tasks() -> Any:
    """`ultralytics.nn.tasks`, where its networks are built and read; UnavailableError without the package."""
    if "ultralytics.nn.tasks" not in sys.modules:
        with _preserve_global_state():
            _import_ultralytics()
    tasks: Any = sys.modules["ultralytics.nn.tasks"]
    if not hasattr(tasks, "SAFE_LOAD"):
        raise UnavailableError("this ultralytics is too old for hkd-det: pip install --upgrade 'hkd-det[yolo]'")
    return tasks


@contextmanager
def restrict_layer_types(tasks: Any) -> Iterator[None]:
    """Within, Ultralytics reads files without running code in them and builds networks of layers it knows.

    Both its files (pickles) and its network definitions (`activation` is given to `eval`) could otherwise run
    anything. TypeError for what is refused.
    """
    safe_globals, safe_load = torch.serialization.get_safe_globals(), tasks.SAFE_LOAD
    tasks.SAFE_LOAD = True
    try:
        yield
    finally:
        tasks.SAFE_LOAD = safe_load
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(safe_globals)


def _import_ultralytics() -> None:
    try:
        import ultralytics.nn.tasks  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UnavailableError(
            f"{package} is not installed; YOLO models need: pip install 'hkd-det[yolo]' (AGPL-3.0)"
        ) from None


@contextmanager
def _preserve_global_state() -> Iterator[None]:
    environment, threads, printing = dict(os.environ), cv2.getNumThreads(), np.get_printoptions()
    save, open_picture = torch.save, PIL.Image.open
    os.environ.update(QUIET_ENV)
    try:
        with warnings.catch_warnings(), torch._tensor_str.printoptions():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        cv2.setNumThreads(threads)
        np.set_printoptions(**printing)
        torch.save, PIL.Image.open = save, open_picture


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
