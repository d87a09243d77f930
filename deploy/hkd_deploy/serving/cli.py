"""Flags `--serving triton,deepstream` of `hkd-export`, which write the files of an inference server."""

import argparse
from pathlib import Path

from hkd_deploy.serving.deepstream import write_deepstream
from hkd_deploy.serving.model_file import ModelFile, read_model_file
from hkd_deploy.serving.triton import write_triton_repository
from hkd_det.config import check_range
from hkd_det.errors import UsageError

SERVING_FORMATS = ("triton", "deepstream")
SERVING_FLAGS = ("serving_dir", "serving_device", "max_batch")  # argparse names; each requires --serving
DEFAULT_MAX_BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this module.

    Args:
        parser: The parser of hkd-export.
    """
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
