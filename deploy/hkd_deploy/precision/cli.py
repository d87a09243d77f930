"""Writing a smaller file: what its source said of itself comes along, and what was done to it.

`hkd-export --precision`: the flags, and the way from an FP32 file to a smaller one with its verdict.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hkd_deploy.precision.calibration import load_calibration_samples
from hkd_deploy.precision.float16 import convert_to_half
from hkd_deploy.precision.graph_regions import find_graph_regions
from hkd_deploy.precision.model import Fp32Model, import_onnx, read_fp32_model
from hkd_deploy.precision.quantize import quantize
from hkd_deploy.precision.report import (
    Accuracy,
    PrecisionReport,
    compare_latency,
    eval_backend,
    evaluate_accuracy,
    load_eval_samples,
    not_measured,
)
from hkd_det.errors import HkdError, UsageError
from hkd_det.files import atomic_write
from hkd_det.structures import Sample


def save_model(
    source: Fp32Model,
    model: Any,
    path: Path,
    precision: str,
    quantization: dict[str, Any],
    precision_report: dict[str, Any],
) -> None:
    """Write `model` with its source's metadata and with

    hkd.precision: fp16, bf16 or int8. hkd.quantization: JSON, how INT8 was made; {} of others. hkd.precision_report: JSON.
    hkd.source_sha256: of the FP32 file.
    """
    onnx = import_onnx()
    onnx.helper.set_model_props(
        model,
        {
            **source.get_metadata(),
            "hkd.precision": precision,
            "hkd.quantization": json.dumps(quantization),
            "hkd.precision_report": json.dumps(precision_report),
            "hkd.source_sha256": source.sha256,
        },
    )
    onnx.save(model, path)


PRECISIONS = ("fp32", "fp16", "bf16", "int8")


FLAGS = ("calib", "calib_images", "max_mr_rise", "conf", "measure_on", "force")


BF16_SKIP_REASON = "ONNX Runtime has no bfloat16 convolution; it is for TensorRT: measure it there with hkd-bench"


# Fractions, on all pictures of the val split, by file and backend on the CPU.
MissRates = dict[tuple[Path, str], float]


class PrecisionError(HkdError):
    """The file would see too little."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of hkd-export that this package reads; --data and --output are the command's own."""
    group = parser.add_argument_group(
        "precision", "smaller numbers than float32, judged on --data's val split (docs/export/precision.md)"
    )
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help="numbers of the written file")
    group.add_argument("--calib", metavar="DATA", help="int8: calibrate on its train split; by default --data's")
    group.add_argument("--calib-images", type=int, default=512, metavar="N", help="pictures to calibrate on")
    group.add_argument(
        "--max-mr-rise", type=float, default=0.5, metavar="POINTS", help="how much the miss rate may rise"
    )
    group.add_argument("--conf", type=float, default=0.3, help="score from which a detection counts for recall")
    group.add_argument("--measure-on", default="cpu", metavar="DEVICE", help="device to judge it on: cpu, cuda, cuda:N")
    group.add_argument("--force", action="store_true", help="write the file even if the miss rate rises by more")


def write_precision(fp32: Path, output: Path | None, flags: argparse.Namespace) -> tuple[Path, MissRates]:
    """Make the file that --precision asks for of an FP32 ONNX file, and print its verdict.

    Gives its path and the miss rates that were measured for it.
    output: by default NAME.PRECISION.onnx beside it.

    Raises PrecisionError, and writes nothing, if the miss rate rises by more than --max-mr-rise without --force; else
    as reading, calibrating and judging raise.
    """
    path = output or fp32.with_suffix(f".{flags.precision}.onnx")
    if path.resolve() == fp32.resolve():
        raise UsageError(f"--output {path}: is the FP32 file itself; name another")
    _check_flags(flags)
    source = read_fp32_model(fp32)
    if flags.precision == "bf16":
        line, facts = not_measured("bf16", BF16_SKIP_REASON)
        known: MissRates = {}
        with atomic_write(path) as aside:
            save_model(
                source,
                convert_to_half(source.model, find_graph_regions(source.model), "bf16"),
                aside,
                "bf16",
                {},
                facts,
            )
    else:
        verdict = _write_evaluated(source, path, flags)
        line, known = verdict.log_line(), _collect_miss_rates(source.path, path, verdict, flags.measure_on)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB; {line}")
    return path, known


def _collect_miss_rates(fp32: Path, path: Path, report: PrecisionReport, device: str) -> MissRates:
    if device != "cpu":
        return {}
    on = report.eval_backend
    return {(fp32, on): report.before.miss_rate, (path, on): report.after.miss_rate}


def _write_evaluated(source: Fp32Model, path: Path, flags: argparse.Namespace) -> PrecisionReport:
    """Make, judge and write the file; the verdict. What the data lacks is said before an hour has gone by."""
    data = flags.data or source.model_metadata.data
    samples = load_eval_samples(data)
    before, model, quantised = _make_model(source, samples, data, flags)
    with atomic_write(path) as aside:
        save_model(source, model, aside, flags.precision, quantised, {})
        after = evaluate_accuracy(aside, flags.measure_on, samples, flags.conf, flags.precision)
        races = tuple(compare_latency(source.path, aside, flags.measure_on, samples))
        judged_on = eval_backend(flags.measure_on)
        verdict = PrecisionReport(flags.precision, before, after, judged_on, races, flags.conf, flags.max_mr_rise)
        if verdict.mr_increase > flags.max_mr_rise and not flags.force:
            raise PrecisionError(_format_refusal(path, verdict, quantised))
        save_model(source, model, aside, flags.precision, quantised, verdict.to_metadata())
    return verdict


def _make_model(
    source: Fp32Model, samples: Sequence[Sample], data: str, flags: argparse.Namespace
) -> tuple[Accuracy, Any, dict[str, Any]]:
    """How well FP32 sees, the smaller model, and how INT8 was made."""
    if flags.precision == "fp16":
        before = evaluate_accuracy(source.path, flags.measure_on, samples, flags.conf, "fp32")
        return before, convert_to_half(source.model, find_graph_regions(source.model), "fp16"), {}
    calib = flags.calib or data
    calibration = load_calibration_samples(calib, flags.calib_images)
    before = evaluate_accuracy(source.path, flags.measure_on, samples, flags.conf, "fp32")

    def rise_of(trial: Path, what: str) -> float:
        seen = evaluate_accuracy(trial, flags.measure_on, samples, flags.conf, what)
        return 100 * (seen.miss_rate - before.miss_rate)

    made = quantize(source, calibration, rise_of, flags.max_mr_rise)
    return before, made.model, made.to_metadata(calib, len(calibration))


def _format_refusal(path: Path, report: PrecisionReport, quantization: dict[str, Any]) -> str:
    tried, remedy = "", "stay with fp32"
    if quantization:
        tried = f", even with {len(quantization['left_out'])} of {quantization['layers']} layers left out"
        remedy = "try more --calib-images or other --calib data"
    return (
        f"{path}: not written: the miss rate rises by {report.mr_increase:.2f} points{tried}, more than "
        f"--max-mr-rise {report.max_mr_increase:g}; {remedy}, or --force"
    )


def _check_flags(flags: argparse.Namespace) -> None:
    if not (math.isfinite(flags.max_mr_rise) and flags.max_mr_rise >= 0):
        raise UsageError(f"--max-mr-rise {flags.max_mr_rise}: percentage points, from 0 up")
    if not 0 < flags.conf < 1:
        raise UsageError(f"--conf {flags.conf}: between 0 and 1")
    if flags.calib and flags.precision != "int8":
        raise UsageError(f"--calib {flags.calib}: only --precision int8 is calibrated")
