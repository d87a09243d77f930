"""Input sizes of `hkd-bench --imgsz-sweep`, for models with a dynamic size."""

import re
from collections.abc import Sequence
from pathlib import Path

from hkd_deploy.external import is_external_model
from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.pipeline import check_imgsz
from hkd_deploy.trt.engine_info import read_engine_info
from hkd_deploy.trt.onnx_file import read_onnx_metadata
from hkd_det.errors import DataError, UsageError
from hkd_det.letterbox import STRIDE
from hkd_det.onnxrt.openvino import read_openvino_metadata

MAX_SIZES = 64  # a sweep of more sizes is a typing error


def parse_imgsz_sweep(text: str) -> tuple[int, ...]:
    """Parse the value of `--imgsz-sweep`.

    Args:
        text: START:STOP:STEP in pixels, for example "192:640:64".

    Returns:
        The widths in ascending order, with the last one if it is reached.

    Raises:
        UsageError: The text has another form, or a value is not a multiple of 32.
    """
    match = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5}):([0-9]{1,5})", text)
    if not match:
        raise UsageError(f"--imgsz-sweep {text}: expected START:STOP:STEP in pixels, for example 192:640:64.")
    start, stop, step = map(int, match.groups())
    if any(value == 0 or value % STRIDE for value in (start, stop, step)):
        raise UsageError(
            f"--imgsz-sweep {text}: START, STOP and STEP must be positive multiples of {STRIDE}. Try 192:640:64."
        )
    if start > stop:
        raise UsageError(f"--imgsz-sweep {text}: START exceeds STOP. Give the smaller size first.")
    if (stop - start) % step:
        raise UsageError(
            f"--imgsz-sweep {text}: STOP is not START plus a multiple of STEP. The last size below it is "
            f"{stop - (stop - start) % step}."
        )
    sizes = tuple(range(start, stop + 1, step))
    if len(sizes) > MAX_SIZES:
        raise UsageError(f"--imgsz-sweep {text}: {len(sizes)} sizes, at most {MAX_SIZES}. Set a larger STEP.")
    return sizes


def list_sweep_sizes(path: Path, widths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the input sizes of a model at several widths; the heights have the aspect ratio of its export.

    Args:
        path: Model with a dynamic size.
        widths: Widths in pixels, multiples of 32.

    Returns:
        Height and width of each input in pixels; the height is the nearest multiple of 32.

    Raises:
        UsageError: The size of the model is fixed, or a width exceeds that of the export.
        DataError: The file is missing or damaged.
    """
    if is_external_model(path):
        raise _make_fixed_size_error(path)
    metadata = _read_metadata(path)
    if not metadata.dynamic:
        raise _make_fixed_size_error(path)
    height, width = metadata.imgsz_hw
    sizes = [(max(STRIDE, round(height * one / width / STRIDE) * STRIDE), one) for one in widths]
    for imgsz_hw in sizes:
        check_imgsz(metadata, imgsz_hw, path)
    return sizes


def _read_metadata(path: Path) -> ModelMetadata:
    """Read the metadata of a model file without its runtime."""
    if not path.exists():
        raise DataError(f"{path}: no such model file. Create it with hkd-export.")
    if path.is_dir() or path.suffix == ".xml":
        metadata = read_openvino_metadata(path if path.is_dir() else path.parent)
    elif path.suffix == ".onnx":
        metadata = read_onnx_metadata(path)
    else:
        metadata = read_engine_info(path).metadata
    return ModelMetadata.from_metadata(metadata, path)


def _make_fixed_size_error(path: Path) -> UsageError:
    return UsageError(
        f"--imgsz-sweep: {path} has a fixed input size. Export it with hkd-export --dynamic size, or give one file for "
        "each size as MODEL."
    )
