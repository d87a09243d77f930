"""Export of an ONNX file to an OpenVINO directory: model.xml, model.bin and metadata.yaml as Ultralytics writes it."""

import argparse
import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hkd_deploy.backends.openvino import (
    DIRECTORY_FILES,
    METADATA_FILE,
    MODEL_FILE,
    list_model_files,
    open_openvino,
    read_model,
)
from hkd_det.errors import DataError, first_error_line
from hkd_det.files import atomic_write_dir

LITERAL_KEYS = ("stride", "batch", "imgsz", "names")  # metadata written as numbers, lists or mappings, not as text

# Called with the final and the temporary path of the directory. An exception prevents the final rename.
FolderCheck = Callable[[Path, Path], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the OpenVINO flag to `parser`.

    Args:
        parser: Parser of hkd-export.
    """
    group = parser.add_argument_group("OpenVINO")
    group.add_argument(
        "--openvino", action="store_true", help="write an OpenVINO directory (default name: NAME_openvino)"
    )


def export_openvino(onnx_path: Path, folder: Path | None = None, check: FolderCheck | None = None) -> Path:
    """Write an OpenVINO directory and print its size.

    Args:
        onnx_path: ONNX file of hkd-export.
        folder: Directory to write, NAME_openvino next to NAME.onnx by default.
        check: Check of the directory before it is renamed to `folder`.

    Returns:
        The directory.

    Raises:
        DataError: See `write_openvino_directory`.
    """
    folder = folder or onnx_path.with_name(f"{onnx_path.stem}_openvino")
    write_openvino_directory(onnx_path, folder, check)
    size_mib = sum(file.stat().st_size for file in list_model_files(folder)) / 2**20
    print(f"{folder}: OpenVINO model of {onnx_path}, {size_mib:.1f} MiB, weights unchanged")
    return folder


def write_openvino_directory(onnx_path: Path, folder: Path, check: FolderCheck | None = None) -> None:
    """Write an OpenVINO directory with the weights of an ONNX file unchanged.

    Args:
        onnx_path: ONNX file of hkd-export.
        folder: Directory to write. It is replaced if it contains an OpenVINO model and nothing else.
        check: Check of the directory before it is renamed to `folder`.

    Raises:
        DataError: If OpenVINO cannot read the file, `folder` contains other files, or the disk is full.
    """
    _check_replaceable(folder)
    with open_openvino(onnx_path) as runtime:
        metadata = runtime.metadata
    with atomic_write_dir(folder) as temp_dir:
        model = read_model(onnx_path)
        try:
            importlib.import_module("openvino").save_model(model, temp_dir / MODEL_FILE, compress_to_fp16=False)
        except RuntimeError as error:  # a full disk gives "basic_ios::clear: iostream error"
            reason = first_error_line(error)
            raise DataError(f"{folder}: OpenVINO cannot write it: {reason}. Check the free disk space.") from None
        text = yaml.safe_dump({key: _parse_literal(key, value) for key, value in metadata.items()}, sort_keys=False)
        (temp_dir / METADATA_FILE).write_text(text, encoding="utf-8")
        with open_openvino(temp_dir):  # check that OpenVINO can read the written files
            pass
        if check:
            check(folder, temp_dir)


def _check_replaceable(folder: Path) -> None:
    """Raise DataError if `folder` is a file, or contains anything except an OpenVINO model."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: expected a directory, got a file. Set --output to a directory.")
    if folder.is_dir():
        other_files = sorted(file.name for file in folder.iterdir() if file.name not in DIRECTORY_FILES)
        if other_files:
            raise DataError(
                f"{folder}: contains {other_files[0]}, which is not part of an OpenVINO model. "
                "Set --output to another directory."
            )


def _parse_literal(key: str, value: str) -> Any:
    try:
        return ast.literal_eval(value) if key in LITERAL_KEYS else value
    except (ValueError, SyntaxError):
        return value  # "dynamic" of the key batch
