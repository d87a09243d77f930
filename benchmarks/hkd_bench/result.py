"""Result of `hkd-bench` with its JSON form, and accuracy from detections."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from hkd_bench.cameras import CameraResult
from hkd_bench.device_state import DeviceState, RunConditions
from hkd_bench.energy import EnergyResult, PowerSource
from hkd_bench.host import HostField
from hkd_bench.latency import LatencySummary, summarize_latency
from hkd_bench.scenarios import ScenarioResult
from hkd_bench.sustained import SustainedResult
from hkd_deploy.precision.report import compute_recall
from hkd_det.config import dataclass_from_dict
from hkd_det.errors import DataError, UsageError, first_error_line
from hkd_det.files import read_json, write_text
from hkd_det.metrics import coco
from hkd_det.metrics.bootstrap import (
    NUM_RESAMPLES,
    MissRateDifference,
    MissRateInterval,
    compute_differences,
    compute_intervals,
    compute_recall_interval,
)
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.coco_bootstrap import compute_ap_intervals
from hkd_det.metrics.matching import MissRateResult, suggest_operating_point
from hkd_det.metrics.tables import DetectionTable
from hkd_det.structures import Detections, Sample

SCHEMA_VERSION = 5
READABLE_SCHEMAS = (3, 4, 5)
# 4 adds energy, device state and GPU memory. 5 adds scenarios, sustained runs, memory at the build, and intervals of AP
# and recall.
MAX_CURVE_POINTS = 2000


@dataclass(frozen=True)
class StoredCurve:
    """Miss-rate curve by descending score, with at most `MAX_CURVE_POINTS` points.

    Attributes:
        fppi: False positives per image.
        miss_rate: Miss rate, 0 to 1.
    """

    fppi: tuple[float, ...]
    miss_rate: tuple[float, ...]

    @classmethod
    def from_miss_rate(cls, result: MissRateResult) -> "StoredCurve":
        """Select points evenly on a logarithmic axis, including the first and the last.

        Args:
            result: Miss rate with its complete curve.

        Returns:
            The stored curve.
        """
        num_points = len(result.fppi)
        indices = np.arange(num_points)
        if num_points > MAX_CURVE_POINTS:
            indices = np.unique(np.geomspace(1, num_points, MAX_CURVE_POINTS).round().astype(int)) - 1
        return cls(tuple(result.fppi[indices].tolist()), tuple(result.miss_rate[indices].tolist()))


@dataclass(frozen=True)
class AccuracyResult:
    """Accuracy of one model on one ground truth: miss rates by the CityPersons protocol, AP by that of COCO.

    Attributes:
        data: Name or path of the dataset.
        miss_rates: MR^-2 of each setup as a fraction; None without ground truth.
        intervals: 95 % interval over images of each setup with ground truth.
        differences: Difference to the first model on the same images, of each setup with ground truth; empty for the
            first model.
        num_gt: Number of ground-truth boxes of each setup.
        ap: AP of COCO over all boxes, 0 to 1; None without ground truth.
        ap50: AP at IoU 0.5, 0 to 1; None without ground truth.
        recall: Recall of the setup Reasonable at `threshold`, 0 to 1; None without ground truth in this setup.
        threshold: Score threshold of `recall`, 0 to 1.
        threshold_source: "model" if the model file contains the threshold. Otherwise "images": it has the highest F1
            score on these images, in the setup Reasonable.
        curve: Curve of the setup Reasonable.
        curve_all: Curve of the setup All.
        ap_interval: 95 % interval of `ap` over images; None without ground truth or detections.
        ap50_interval: 95 % interval of `ap50`.
        recall_interval: 95 % interval of `recall` at this threshold.
    """

    data: str
    miss_rates: dict[str, float | None]
    intervals: dict[str, MissRateInterval]
    differences: dict[str, MissRateDifference]
    num_gt: dict[str, int]
    ap: float | None
    ap50: float | None
    recall: float | None
    threshold: float | None
    threshold_source: Literal["model", "images"]
    curve: StoredCurve
    curve_all: StoredCurve
    ap_interval: tuple[float, float] | None = None
    ap50_interval: tuple[float, float] | None = None
    recall_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class StageSamples:
    """Latency of each stage in milliseconds, one entry per run.

    Attributes:
        preprocess_ms: Letterbox and, for a model of another tool, normalization.
        inference_ms: Network with decoding; of another tool, the graph.
        postprocess_ms: Conversion of the boxes to the pixels of the frame and, for a model of another tool, decoding
            and NMS.
    """

    preprocess_ms: tuple[float, ...]
    inference_ms: tuple[float, ...]
    postprocess_ms: tuple[float, ...]


@dataclass(frozen=True)
class ModelResult:
    """Measurements of one model file on one backend.

    Attributes:
        name: Name in tables and plots.
        path: Path as given.
        sha256: Digest of the file, or of the digests of a directory's files.
        backend: Backend that ran the model.
        model: Name of the architecture, from the model metadata.
        license: License of the weights, from the model metadata or the model configuration.
        parameters: Number of parameters.
        flops: FLOPs per image; a multiply-add counts as two. None if unknown.
        imgsz_hw: Input size in pixels.
        file_mib: Size of the file or directory in MiB.
        accuracy: Miss rates on each ground truth; the first is that of `BenchResult.data`.
        e2e_ms: Latency from frame to detections in milliseconds, one entry per run.
        stages: Latency of each stage.
        load_ms: Time to open the model in milliseconds, one entry per round.
        peak_memory_mib: Peak resident memory of the process from the opening of the model to the end of the timed
            runs, in MiB; the maximum over the rounds.
        baseline_mib: Resident memory of the same round before the model was opened: interpreter, libraries and
            decoded images.
        energy: Energy per frame.
        conditions: State of the device during the runs, and what makes them incomparable.
        gpu_memory_mib: GPU memory of the process after timing, by NVML, in MiB; the maximum over the rounds. None if it
            was not measured.
        gpu_memory_reason: Reason why `gpu_memory_mib` is None; empty otherwise.
        build_memory_mib: Peak resident memory of the process while the model was opened and its engine or session was
            built, in MiB; the maximum over the rounds. None in files of older versions. TensorRT engines are built by
            hkd-export, and only read here.
        gpu_build_memory_mib: GPU memory of the process after the model was opened, by NVML, in MiB; the maximum over
            the rounds. None if it was not measured, with the reason of `gpu_memory_mib`.
        engine_build_memory_mib: Peak resident memory of hkd-export while it built the TensorRT engine, in MiB; None for
            other files.
        engine_build_gpu_memory_mib: Highest increase of the memory in use on the GPU during that build, in MiB.
        context_mib: GPU memory of activations and workspace in MiB, as TensorRT states it at the build of the engine.
            None for other runtimes.
        context_reason: Reason why `context_mib` is None; empty otherwise.
        cameras: Number of cameras that the model holds; None if it was not searched.
        scenarios: Results of the load scenarios, in the order of `--scenario`.
        sustained: Latency, clocks, temperature and power over time; None if it was not measured.
    """

    name: str
    path: str
    sha256: str
    backend: str
    model: str
    license: str
    parameters: int
    flops: int | None
    imgsz_hw: tuple[int, int]
    file_mib: float
    accuracy: tuple[AccuracyResult, ...]
    e2e_ms: tuple[float, ...]
    stages: StageSamples
    load_ms: tuple[float, ...]
    peak_memory_mib: float
    baseline_mib: float
    energy: EnergyResult = field(default_factory=EnergyResult)
    conditions: RunConditions = field(default_factory=RunConditions)
    gpu_memory_mib: float | None = None
    gpu_memory_reason: str = "not measured"
    build_memory_mib: float | None = None
    gpu_build_memory_mib: float | None = None
    engine_build_memory_mib: float | None = None
    engine_build_gpu_memory_mib: float | None = None
    context_mib: float | None = None
    context_reason: str = "not measured"
    cameras: CameraResult | None = None
    scenarios: tuple[ScenarioResult, ...] = ()
    sustained: SustainedResult | None = None

    @property
    def miss_rates(self) -> dict[str, float | None]:
        """MR^-2 of each setup on the first ground truth, as a fraction; None without ground truth."""
        return self.accuracy[0].miss_rates

    @property
    def num_gt(self) -> dict[str, int]:
        """Number of boxes of each setup in the first ground truth."""
        return self.accuracy[0].num_gt

    @property
    def latency(self) -> LatencySummary:
        """Statistics of `e2e_ms`."""
        return summarize_latency(self.e2e_ms)

    @property
    def memory_mib(self) -> float:
        """Memory in MiB that the model adds to the process, at its peak."""
        return self.peak_memory_mib - self.baseline_mib


@dataclass(frozen=True)
class BenchResult:
    """Measurements of several models on one machine and one dataset.

    Attributes:
        schema: `SCHEMA_VERSION` of the JSON form.
        command: Command line; empty if called from Python.
        date: Date and time, ISO 8601.
        host: Fields that describe the machine.
        device: Device that ran the models.
        threads: CPU threads of an operator; None for the default of the runtime.
        data: Name or path of the dataset or image directory.
        split: Split of the dataset.
        num_images: Number of evaluated images; 0 if only time and memory were measured.
        num_timed_images: Number of different images that were timed.
        runs: Timed runs per model, over all rounds.
        rounds: Number of processes per model, in turn with the other models.
        warmup: Minimum number of untimed runs per round.
        warmup_s: Minimum duration of the untimed runs per round, in seconds.
        models: Measurements of each model.
        power: Power sensors and idle power; without sensors if energy was not requested.
        state_before: State of the device before the measurement.
        state_after: State of the device after it.
        imgsz_sweep: Widths in pixels of the inputs at which each model was measured; empty for the size of the file.
    """

    schema: int
    command: str
    date: str
    host: tuple[HostField, ...]
    device: str
    threads: int | None
    data: str
    split: str
    num_images: int
    num_timed_images: int
    runs: int
    rounds: int
    warmup: int
    warmup_s: float
    models: tuple[ModelResult, ...]
    power: PowerSource = field(default_factory=PowerSource)
    state_before: DeviceState | None = None
    state_after: DeviceState | None = None
    imgsz_sweep: tuple[int, ...] = ()

    @property
    def has_energy(self) -> bool:
        """Whether energy was requested."""
        return bool(self.power.sensors or self.power.missing)


def align_samples(samples: Sequence[Sample], other_samples: Sequence[Sample], other_name: str) -> list[Sample]:
    """Order the samples of a second ground truth as the images of the first.

    Args:
        samples: Images with the first ground truth.
        other_samples: The same images, and possibly more, with the second ground truth.
        other_name: Name of the second dataset, for error messages.

    Returns:
        One sample of `other_samples` per sample of `samples`.

    Raises:
        DataError: The second ground truth lacks an image.
    """
    by_path: dict[Path, Sample] = {sample.path.resolve(): sample for sample in other_samples}
    missing = [sample.path for sample in samples if sample.path.resolve() not in by_path]
    if missing:
        raise DataError(
            f"--data {other_name}: lacks {len(missing)} of {len(samples)} images of the first dataset, such as "
            f"{missing[0]}. Name datasets with the same image files."
        )
    return [by_path[sample.path.resolve()] for sample in samples]


def measure_accuracy(
    ground_truths: Mapping[str, Sequence[Sample]],
    detections: Sequence[Sequence[Detections]],
    confs: Sequence[float | None],
    num_resamples: int = NUM_RESAMPLES,
) -> list[tuple[AccuracyResult, ...]]:
    """Compute miss rates, AP and recall of all models on each ground truth.

    Args:
        ground_truths: Annotated images by name of the dataset, at least one. All contain the same images in the same
            order.
        detections: Detections of each model in each image.
        confs: Score threshold of each model; None selects the one with the highest F1 score on the images.
        num_resamples: Number of resamples of the images for intervals and differences.

    Returns:
        The accuracy of each model on each ground truth.
    """
    by_ground_truth = []
    for name, samples in ground_truths.items():
        miss_rates = [evaluate_detections(samples, model_detections) for model_detections in detections]
        precisions = [_compute_average_precision(samples, found, num_resamples) for found in detections]
        rows = enumerate(zip(miss_rates, precisions, confs, strict=True))
        by_ground_truth.append(
            [
                _make_accuracy_result(
                    name, rates, precision, ap_intervals, conf, miss_rates[0] if index else None, num_resamples
                )
                for index, (rates, (precision, ap_intervals), conf) in rows
            ]
        )
    return list(zip(*by_ground_truth, strict=True))


def write_result(path: Path, result: BenchResult) -> None:
    """Write a result as JSON; the file is replaced atomically.

    Args:
        path: Output file (.json).
        result: Measurements of all models.
    """
    write_text(path, json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False) + "\n")


def read_result(path: Path) -> BenchResult:
    """Read a result that `write_result` wrote.

    Args:
        path: File of `hkd-bench --json`.

    Returns:
        The measurements.

    Raises:
        DataError: The file is missing or invalid; the message names it and the key.
    """
    content = read_json(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in READABLE_SCHEMAS:
        is_newer = isinstance(schema, int) and schema > SCHEMA_VERSION
        hint = "Update hkd-det." if is_newer else "Measure again with hkd-bench --json."
        expected = f"{', '.join(map(str, READABLE_SCHEMAS[:-1]))} or {SCHEMA_VERSION}"
        raise DataError(f"{path}: expected a result of hkd-bench with schema {expected}, got {schema}. {hint}")
    try:
        return dataclass_from_dict(BenchResult, content)
    except UsageError as error:
        raise DataError(f"{path}: {first_error_line(error)}. Measure again with hkd-bench --json.") from None


def _compute_average_precision(
    samples: Sequence[Sample], detections: Sequence[Detections], num_resamples: int
) -> tuple[dict[str, float | None], dict[str, tuple[float, float]]]:
    """Return COCO's AP and AP50 as fractions, None without ground truth, and their 95 % intervals, as far as known."""
    if not any((~sample.ground_truth.ignore).any() for sample in samples):
        return {"AP": None, "AP50": None}, {}
    table = DetectionTable.from_detections(detections)
    if not len(table):
        return {"AP": 0.0, "AP50": 0.0}, {}
    coco_eval = coco.match_boxes(coco.make_ground_truth(samples), table)
    return {**coco.summarize_matches(coco_eval)}, compute_ap_intervals(coco_eval, num_resamples)


def _make_accuracy_result(
    name: str,
    miss_rates: dict[str, MissRateResult],
    precision: dict[str, float | None],
    ap_intervals: dict[str, tuple[float, float]],
    conf: float | None,
    reference: dict[str, MissRateResult] | None,
    num_resamples: int,
) -> AccuracyResult:
    reasonable = miss_rates[REASONABLE.name]
    threshold = suggest_operating_point(reasonable).threshold if conf is None else conf
    return AccuracyResult(
        data=name,
        miss_rates={setup: result.value if result.num_gt else None for setup, result in miss_rates.items()},
        intervals=compute_intervals(miss_rates, num_resamples),
        differences=compute_differences(miss_rates, reference, num_resamples) if reference else {},
        num_gt={setup: result.num_gt for setup, result in miss_rates.items()},
        ap=precision["AP"],
        ap50=precision["AP50"],
        recall=compute_recall(reasonable, threshold) if reasonable.num_gt else None,
        threshold=threshold if reasonable.num_gt else None,
        threshold_source="images" if conf is None else "model",
        curve=StoredCurve.from_miss_rate(reasonable),
        curve_all=StoredCurve.from_miss_rate(miss_rates["All"]),
        ap_interval=ap_intervals.get("AP"),
        ap50_interval=ap_intervals.get("AP50"),
        recall_interval=compute_recall_interval(reasonable, threshold, num_resamples) if reasonable.num_gt else None,
    )
