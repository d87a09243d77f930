"""`hkd-export --target triton,deepstream`: the folders that other people's servers load."""

import argparse
from pathlib import Path

from hkd_deploy.serving.deepstream import write_deepstream
from hkd_deploy.serving.model_file import ModelFile, read_model_file
from hkd_deploy.serving.triton import write_triton_repository
from hkd_det.errors import UsageError

SERVING_FORMATS = ("triton", "deepstream")


SERVING_FLAGS = ("target_dir", "target_device", "max_batch")  # that say nothing without --target


DEFAULT_MAX_BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, in a group of their own."""
    group = parser.add_argument_group("targets")
    group.add_argument(
        "--target",
        action="extend",
        type=_parse_serving_formats,
        default=[],
        metavar="triton,deepstream",
        help="also write what Triton or DeepStream loads",
    )
    group.add_argument(
        "--target-dir", type=Path, metavar="DIR", help="where (default: triton/ and deepstream/ beside the model)"
    )
    group.add_argument(
        "--target-device",
        choices=("cpu", "gpu"),
        help="where Triton runs it (default: gpu for an engine, else cpu)",
    )
    group.add_argument(
        "--max-batch",
        type=int,
        metavar="N",
        help=f"pictures in one call at most, where the file leaves the batch free (default: {DEFAULT_MAX_BATCH}, or an "
        "engine's largest)",
    )


def write_serving_folders(path: Path, flags: argparse.Namespace) -> None:
    """Write what `--target` names for the model file at `path`, an .onnx or an .engine, and say where it lies."""
    if not flags.target:
        return
    model = read_model_file(path)
    max_batch = _resolve_max_batch(model, flags.max_batch)
    for target in dict.fromkeys(flags.target):
        folder = (flags.target_dir or path.parent) / target
        match target:
            case "triton":
                written = write_triton_repository(model, folder, flags.target_device, max_batch)
                print(f"{written}: tritonserver --model-repository {folder}")
            case "deepstream":
                written = write_deepstream(model, folder, max_batch)
                print(f"{written}: run make in it on the device, and give nvinfer its config_infer_primary.txt")


def _resolve_max_batch(model: ModelFile, requested: int | None) -> int:
    if requested is not None and requested < 1:
        raise UsageError(f"--max-batch {requested}: at least 1")
    if requested is not None and model.max_batch is not None and requested > model.max_batch:
        raise UsageError(f"--max-batch {requested}: {model.path} was built for {model.max_batch} at most (--trt-profile)")
    return requested or model.max_batch or DEFAULT_MAX_BATCH


def _parse_serving_formats(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SERVING_FORMATS:
            raise UsageError(f"--target {text}: expected {' or '.join(SERVING_FORMATS)}, or both with a comma")
    return names
