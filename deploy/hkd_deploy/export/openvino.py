"""The OpenVINO folder: model.xml, model.bin, and metadata.yaml, which Ultralytics' readers know as well."""

import argparse
import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hkd_deploy.backends.openvino import (
    FOLDER_FILES,
    METADATA_FILE,
    MODEL_FILE,
    list_model_files,
    open_openvino,
    read_model,
)
from hkd_det.errors import DataError, first_error_line
from hkd_det.files import atomic_write_dir

LITERAL_KEYS = ("stride", "batch", "imgsz", "names")  # numbers, a list and a mapping in the YAML; all else is text


# Called with a finished folder's name and where it still lies; raises if it must not get that name.
FolderCheck = Callable[[Path, Path], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """hkd-export's flag."""
    group = parser.add_argument_group("OpenVINO")
    group.add_argument("--openvino", action="store_true", help="write the folder OpenVINO opens, NAME_openvino, too")


def export_openvino(onnx_path: Path, folder: Path | None = None, check: FolderCheck | None = None) -> Path:
    """Write `folder`, by default NAME_openvino beside NAME.onnx, and say so; its path.

    What `check` raises for is not written.
    """
    folder = folder or onnx_path.with_name(f"{onnx_path.stem}_openvino")
    write_openvino_folder(onnx_path, folder, check)
    size_mib = sum(file.stat().st_size for file in list_model_files(folder)) / 2**20
    print(f"{folder}: OpenVINO's form of {onnx_path}, {size_mib:.1f} MiB, weights as they were")
    return folder


def write_openvino_folder(onnx_path: Path, folder: Path, check: FolderCheck | None = None) -> None:
    """Write the folder from an ONNX file of hkd-export, weights as they are, in one step.

    Raises DataError for a file that OpenVINO can't read, where `folder` holds anything else than such a model, or where
    the disk does not take it.
    """
    _check_replaceable(folder)
    with open_openvino(onnx_path) as runtime:  # what can't be opened is not written
        metadata = runtime.metadata
    with atomic_write_dir(folder) as aside:
        model = read_model(onnx_path)
        try:
            importlib.import_module("openvino").save_model(model, aside / MODEL_FILE, compress_to_fp16=False)
        except RuntimeError as error:  # "basic_ios::clear: iostream error": OpenVINO says no more of a full disk
            raise DataError(
                f"{folder}: OpenVINO cannot write it: {first_error_line(error)}; is the disk full?"
            ) from None
        text = yaml.safe_dump({key: _parse_literal(key, value) for key, value in metadata.items()}, sort_keys=False)
        (aside / METADATA_FILE).write_text(text, encoding="utf-8")
        with open_openvino(aside):
            pass
        if check:
            check(folder, aside)


def _check_replaceable(folder: Path) -> None:
    """A folder of the user's own is not thrown away."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: a file; name a folder")
    if folder.is_dir():
        odd = sorted(file.name for file in folder.iterdir() if file.name not in FOLDER_FILES)
        if odd:
            raise DataError(f"{folder}: holds {odd[0]}, which is not of an OpenVINO model; name another folder")


def _parse_literal(key: str, value: str) -> Any:
    try:
        return ast.literal_eval(value) if key in LITERAL_KEYS else value
    except (ValueError, SyntaxError):
        return value  # batch: dynamic
