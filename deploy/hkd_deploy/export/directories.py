"""Directories that `hkd-export` writes from a finished model: for OpenVINO, and for the inference servers.

An OpenVINO directory contains model.xml, model.bin and metadata.yaml as Ultralytics writes it.
"""

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
from hkd_deploy.serving.model_file import ModelFile, read_model_file
from hkd_deploy.serving.writers import write_deepstream, write_triton_repository
from hkd_det.config import check_range
from hkd_det.errors import DataError, UsageError, first_error_line
from hkd_det.files import atomic_write_dir

LITERAL_KEYS = ("stride", "batch", "imgsz", "names")  # metadata written as numbers, lists or mappings, not as text
SERVING_FORMATS = ("triton", "deepstream")
SERVING_FLAGS = ("serving_dir", "serving_device", "max_batch")  # argparse names; each requires --serving
DEFAULT_MAX_BATCH = 8
# Called with the final and the temporary path of the directory. An exception prevents the final rename.
FolderCheck = Callable[[Path, Path], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of OpenVINO and of inference servers to `parser`.

    Args:
        parser: Parser of hkd-export.
    """
    group = parser.add_argument_group("OpenVINO")
    group.add_argument(
        "--openvino", action="store_true", help="write an OpenVINO directory (default name: NAME_openvino)"
    )
    group = parser.add_argument_group("inference servers")
    group.add_argument(
        "--serving",
        action="extend",
        type=_parse_serving_formats,
        default=[],
        metavar="triton,deepstream",
        help="also write the files that Triton or DeepStream loads",
    )
    group.add_argument(
        "--serving-dir",
        type=Path,
        metavar="DIR",
        help="output directory; requires --serving (default: triton/ and deepstream/ next to the model)",
    )
    group.add_argument(
        "--serving-device",
        choices=("cpu", "gpu"),
        help="device of the Triton model instance; requires --serving (default: gpu for an engine, else cpu)",
    )
    group.add_argument(
        "--max-batch",
        type=int,
        metavar="N",
        help=f"largest batch if the batch of the model is free; requires --serving (default: {DEFAULT_MAX_BATCH}, "
        "or the limit of an engine)",
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


def write_serving_folders(path: Path, flags: argparse.Namespace) -> None:
    """Write the files that `--serving` requests and print their location.

    Args:
        path: The .onnx or .engine file.
        flags: Parsed flags of `add_arguments`.

    Raises:
        UsageError: A flag is invalid, or the server cannot run the model.
        DataError: The model file is damaged.
    """
    if not flags.serving:
        return
    model = read_model_file(path)
    max_batch = _resolve_max_batch(model, flags.max_batch)
    for server in dict.fromkeys(flags.serving):
        folder = (flags.serving_dir or path.parent) / server
        match server:
            case "triton":
                written = write_triton_repository(model, folder, flags.serving_device, max_batch)
                print(f"{written}: run tritonserver --model-repository {folder}")
            case "deepstream":
                written = write_deepstream(model, folder, max_batch)
                print(f"{written}: run make there on the device, then pass config_infer_primary.txt to nvinfer")


def _resolve_max_batch(model: ModelFile, requested: int | None) -> int:
    if requested is not None:
        check_range("--max-batch", requested, 1)
    if requested is not None and model.max_batch is not None and requested > model.max_batch:
        raise UsageError(
            f"--max-batch {requested}: {model.path} supports at most {model.max_batch}. "
            "Build an engine with a larger --trt-profile."
        )
    return requested or model.max_batch or DEFAULT_MAX_BATCH


def _parse_serving_formats(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SERVING_FORMATS:
            raise UsageError(
                f"--serving {text}: expected {' or '.join(SERVING_FORMATS)}, or both separated by a comma."
            )
    return names
