"""`hkd-export --precision`: flags, and conversion of an FP32 file to reduced precision."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from hkd_deploy.precision.graph import convert_to_half, find_graph_regions
from hkd_deploy.precision.int8 import SEED, quantize
from hkd_deploy.precision.model import Fp32Model, get_eval_backend, load_eval_samples, read_fp32_model, save_model
from hkd_deploy.precision.report import (
    DEFAULT_CONF,
    Accuracy,
    PrecisionReport,
    compare_latency,
    evaluate_accuracy,
    format_not_measured,
)
from hkd_det.config import check_range
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import HkdError, UsageError, first_error_line
from hkd_det.files import atomic_write
from hkd_det.metrics.matching import MissRateResult
from hkd_det.structures import Sample

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
FLAGS = ("model_config", "calib_data", "calib_images", "max_mr_increase", "conf", "eval_device", "force")
MIN_RECOMMENDED_IMAGES = 300  # with fewer images the ranges depend on the selection
BF16_SKIP_REASON = "ONNX Runtime has no bfloat16 convolution; build a TensorRT engine and measure it with hkd-bench"

# Miss rate of the whole val split on the CPU, by file and runtime.
MissRates = dict[tuple[Path, str], MissRateResult]


class PrecisionError(HkdError):
    """The converted file exceeds the limit of the miss rate increase."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the precision flags to `parser`. The command defines `--data` and `--output`.

    Args:
        parser: Parser of hkd-export.
    """
    group = parser.add_argument_group("precision", "evaluated on the val split of --data")
    group.add_argument(
        "--precision",
        "--quantize",
        choices=PRECISIONS,
        default="fp32",
        help="precision of the written file (default: %(default)s)",
    )
    group.add_argument(
        "--model-config",
        type=Path,
        metavar="YAML",
        help="file or name of the configuration of an ONNX file of another tool (default: see docs/reference/"
        "onnx-model-config.md); requires --data. The written file contains it",
    )
    group.add_argument(
        "--calib-data", metavar="DATA", help="int8: dataset whose train split is used for calibration (default: --data)"
    )
    group.add_argument(
        "--calib-images",
        type=int,
        default=512,
        metavar="N",
        help="int8: number of calibration images (default: %(default)s)",
    )
    group.add_argument(
        "--max-mr-increase",
        type=float,
        default=0.5,
        metavar="POINTS",
        help="limit of the miss rate increase in percentage points (default: %(default)s)",
    )
    group.add_argument(
        "--conf",
        type=float,
        help=f"score threshold of the recall (default: the suggested one of the file, or {DEFAULT_CONF:g})",
    )
    group.add_argument(
        "--eval-device",
        default="cpu",
        metavar="DEVICE",
        help="device for the evaluation: cpu, cuda or cuda:N (default: %(default)s)",
    )
    group.add_argument(
        "--force", action="store_true", help="write the file even if the miss rate increase exceeds the limit"
    )


def convert_precision(fp32: Path, output: Path | None, flags: argparse.Namespace) -> tuple[Path, MissRates]:
    """Convert an FP32 file to the precision of `--precision`, evaluate it, and print the report.

    Args:
        fp32: FP32 file of hkd-export or of another tool.
        output: File to write, NAME.PRECISION.onnx next to `fp32` by default.
        flags: Parsed command line.

    Returns:
        The written file, and the miss rates that were measured.

    Raises:
        PrecisionError: If the miss rate increase exceeds `--max-mr-increase` without `--force`. No file is written.
        UsageError: If a flag has an invalid value.
        HkdError: If the file or the dataset cannot be read.
    """
    path = output or fp32.with_suffix(f".{flags.precision}.onnx")
    if path.resolve() == fp32.resolve():
        raise UsageError(f"--output {path}: this file is the FP32 input. Choose another name.")
    _check_flags(flags)
    source = read_fp32_model(fp32, flags.model_config)
    conf = flags.conf or source.model_metadata.conf or DEFAULT_CONF
    flags = argparse.Namespace(**{**vars(flags), "conf": conf})
    if flags.precision == "bf16":
        line, miss_rates = _write_bf16(source, path), MissRates()
    else:
        report = _write_evaluated(source, path, flags)
        line, miss_rates = report.format_log_line(), _collect_miss_rates(source.path, path, report, flags.eval_device)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB; {line}")
    return path, miss_rates


def load_calibration_samples(data: str, count: int) -> list[Sample]:
    """Select images of a train split with a fixed seed; print a warning if they are few.

    Args:
        data: Dataset name or data YAML.
        count: Number of images. All images are returned if the split has fewer.

    Returns:
        The samples in dataset order.

    Raises:
        UsageError: If `count` is below 1.
        HkdError: If the dataset cannot be read.
    """
    check_range("--calib-images", count, 1)
    try:
        samples = load_dataset(data, "train")
    except HkdError as error:
        raise type(error)(
            f"calibration images: {first_error_line(error)}. Set --calib-data to another dataset."
        ) from error
    indices = sorted(Random(SEED).sample(range(len(samples)), min(count, len(samples))))
    if len(indices) < MIN_RECOMMENDED_IMAGES:
        warning = f"{len(indices)} calibration images; at least {MIN_RECOMMENDED_IMAGES} are recommended"
        print(f"hkd-export: warning: {warning}", file=sys.stderr)
    return [samples[index] for index in indices]


def _check_flags(flags: argparse.Namespace) -> None:
    check_range("--max-mr-increase", flags.max_mr_increase, 0)
    if flags.conf is not None and not 0 < flags.conf < 1:
        raise UsageError(f"--conf {flags.conf:g}: expected a score between 0 and 1.")
    if flags.calib_data and flags.precision != "int8":
        raise UsageError(f"--calib-data {flags.calib_data}: requires --precision int8. Omit it.")


def _write_bf16(source: Fp32Model, path: Path) -> str:
    """Write a bfloat16 file, which no runtime of this package can evaluate; return the log line."""
    line, report = format_not_measured("bf16", BF16_SKIP_REASON)
    with atomic_write(path) as temp_path:
        model = convert_to_half(source.model, find_graph_regions(source.model), "bf16")
        save_model(source, model, temp_path, "bf16", {}, report)
    return line


def _write_evaluated(source: Fp32Model, path: Path, flags: argparse.Namespace) -> PrecisionReport:
    data = flags.data or source.model_metadata.data
    if not data:
        raise UsageError(f"{source.path}: the file does not name its dataset. Set --data.")
    samples = load_eval_samples(data)  # before the conversion, which may take long
    before, model, quantization = _convert_model(source, samples, data, flags)
    with atomic_write(path) as temp_path:
        save_model(source, model, temp_path, flags.precision, quantization, {})
        after = evaluate_accuracy(temp_path, flags.eval_device, samples, flags.conf, flags.precision)
        latencies, speedup_interval = compare_latency(
            source.path, temp_path, flags.eval_device, samples, flags.model_config
        )
        report = PrecisionReport(
            precision=flags.precision,
            before=before,
            after=after,
            eval_backend=get_eval_backend(flags.eval_device),
            latencies=latencies,
            speedup_interval=speedup_interval,
            conf=flags.conf,
            max_mr_increase=flags.max_mr_increase,
        )
        if report.mr_increase > flags.max_mr_increase and not flags.force:
            raise PrecisionError(_format_refusal(path, report, quantization))
        save_model(source, model, temp_path, flags.precision, quantization, report.to_metadata())
    return report


def _convert_model(
    source: Fp32Model, samples: Sequence[Sample], data: str, flags: argparse.Namespace
) -> tuple[Accuracy, Any, dict[str, Any]]:
    """Return the accuracy of the FP32 file, the converted onnx.ModelProto, and the INT8 settings."""

    def evaluate_fp32() -> Accuracy:
        return evaluate_accuracy(source.path, flags.eval_device, samples, flags.conf, "fp32", flags.model_config)

    if flags.precision == "fp16":
        return evaluate_fp32(), convert_to_half(source.model, find_graph_regions(source.model), "fp16"), {}
    calib_data = flags.calib_data or data
    calibration = load_calibration_samples(calib_data, flags.calib_images)
    before = evaluate_fp32()

    def measure_mr_increase(trial: Path, desc: str) -> float:
        accuracy = evaluate_accuracy(trial, flags.eval_device, samples, flags.conf, desc)
        return 100 * (accuracy.miss_rate - before.miss_rate)

    result = quantize(source, calibration, measure_mr_increase, flags.max_mr_increase)
    return before, result.model, result.to_metadata(calib_data, len(calibration))


def _collect_miss_rates(fp32: Path, path: Path, report: PrecisionReport, device: str) -> MissRates:
    if device != "cpu":
        return {}
    backend = report.eval_backend
    return {(fp32, backend): report.before.result, (path, backend): report.after.result}


def _format_refusal(path: Path, report: PrecisionReport, quantization: dict[str, Any]) -> str:
    excluded, hint, (low, high) = "", "Use the fp32 file", report.mr_interval
    if quantization:
        num_excluded, num_layers = len(quantization["excluded_nodes"]), quantization["num_layers"]
        excluded = f" with {num_excluded} of {num_layers} layers excluded"
        hint = "Set more --calib-images or other --calib-data"
    return (
        f"{path}: not written: the miss rate increases by {report.mr_increase:.2f} points (95 % interval on "
        f"{report.before.result.num_images} images: {low:+.2f} to {high:+.2f}){excluded}, more than "
        f"--max-mr-increase {report.max_mr_increase:g}. {hint}, or set --force to write it anyway."
    )
