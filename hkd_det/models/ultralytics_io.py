"""The package ultralytics (AGPL-3.0, an extra): importing it without side effects, and its model definitions.

At import, Ultralytics resolves a host name to test whether it is online. It sets thread counts, print options and
warning filters, and replaces `torch.save` and `PIL.Image.open`. `import_tasks` disables network access and output, and
restores this state after the import. It keeps the settings file that Ultralytics creates in the user's configuration.
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

# WORLD_SIZE: under torchrun, the import would wait for the other processes, which import at another time.
QUIET_ENV = {"YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false", "WORLD_SIZE": "1"}
DETECTION_HEADS = ("Detect", "v10Detect")
MODEL_NAME_PATTERN = re.compile(r"(yolov?\d+)([nslmx])(-[\w-]+)?")  # family, size, variant
ARCHITECTURE_KEYS = ("nc", "scales", "scale", "end2end", "reg_max", "activation", "depth_multiple", "width_multiple")


def import_tasks() -> Any:
    """Import `ultralytics.nn.tasks`, which builds and loads the networks.

    Returns:
        The module.

    Raises:
        UnavailableError: If the package is missing or too old.
    """
    if "ultralytics.nn.tasks" not in sys.modules:
        with _preserve_global_state():
            _import_ultralytics()
    tasks: Any = sys.modules["ultralytics.nn.tasks"]
    if not hasattr(tasks, "SAFE_LOAD"):
        raise UnavailableError("ultralytics: the version is too old. Run pip install --upgrade 'hkd-det[yolo]'.")
    return tasks


@contextmanager
def restrict_layer_types(tasks: Any) -> Iterator[None]:
    """Let Ultralytics load files and build networks without running foreign code, inside a `with` block.

    Without it, its files (pickles) and its model definitions (`activation` is passed to `eval`) can run any code.
    Ultralytics raises TypeError for everything that is not a known layer.

    Args:
        tasks: The module `ultralytics.nn.tasks`.
    """
    safe_globals, safe_load = torch.serialization.get_safe_globals(), tasks.SAFE_LOAD
    tasks.SAFE_LOAD = True
    try:
        yield
    finally:
        tasks.SAFE_LOAD = safe_load
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(safe_globals)


def load_model_yaml(name: str) -> dict[str, Any]:
    """Load Ultralytics' definition of a detector of one size.

    Args:
        name: Ultralytics' name, such as yolo11n, yolov8s-p2 or yolov9c.

    Returns:
        The definition as of `filter_model_yaml`.

    Raises:
        UsageError: If there is no such detector; the message suggests similar names.
        UnavailableError: If the package is missing or too old.
    """
    files = _list_model_yamls()
    match = MODEL_NAME_PATTERN.fullmatch(name)
    path = files.get(name) or (files.get(match[1] + (match[3] or "")) if match else None)
    if path is None or not is_detection_model(model_yaml := _read_yaml(path)):
        raise UsageError(f"--model {name}: Ultralytics has no such detector.{_suggest_names(name, files)}")
    scales = model_yaml.get("scales")
    if not scales:
        return filter_model_yaml(model_yaml)
    if not match or match[2] not in scales:
        raise UsageError(f"--model {name}: the size is missing.{_suggest_names(name, files)}")
    return filter_model_yaml({**model_yaml, "scale": match[2]})


def is_detection_model(model_yaml: dict[str, Any]) -> bool:
    """Return whether the head of a definition returns boxes and scores only."""
    return model_yaml["head"][-1][2] in DETECTION_HEADS


def filter_model_yaml(model_yaml: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a definition that determine the architecture."""
    return {key: model_yaml[key] for key in (*ARCHITECTURE_KEYS, "backbone", "head") if model_yaml.get(key) is not None}


def _import_ultralytics() -> None:
    try:
        import ultralytics.nn.tasks  # noqa: F401, PLC0415 - AGPL-3.0: only imported for YOLO models
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UnavailableError(
            f"{package}: not installed. YOLO models require it (AGPL-3.0). Run pip install 'hkd-det[yolo]'."
        ) from None


@contextmanager
def _preserve_global_state() -> Iterator[None]:
    environment, num_threads, print_options = dict(os.environ), cv2.getNumThreads(), np.get_printoptions()
    torch_save, image_open = torch.save, PIL.Image.open
    os.environ.update(QUIET_ENV)
    try:
        with warnings.catch_warnings(), torch._tensor_str.printoptions():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        cv2.setNumThreads(num_threads)
        np.set_printoptions(**print_options)
        torch.save, PIL.Image.open = torch_save, image_open


def _list_model_yamls() -> dict[str, Path]:
    directory = Path(str(import_tasks().__file__)).parents[1] / "cfg" / "models"
    return {path.stem: path for path in sorted(directory.rglob("yolo*.yaml"))}


def _read_yaml(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def _suggest_names(name: str, files: dict[str, Path]) -> str:
    names = []
    for stem, path in files.items():
        model_yaml = _read_yaml(path)
        family = re.fullmatch(r"(yolov?\d+)(.*)", stem)
        if not family or not is_detection_model(model_yaml):
            continue
        if model_yaml.get("scales") and not MODEL_NAME_PATTERN.fullmatch(stem):
            names += [f"{family[1]}{size}{family[2]}" for size in model_yaml["scales"]]
        else:
            names.append(stem)
    similar = difflib.get_close_matches(name, names, 5, 0.5)
    return f" Similar names: {', '.join(similar)}." if similar else ""
