"""Comparison of a distilled student with the same student trained without its teacher."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from hkd_det.console import format_table
from hkd_det.datasets import Sample
from hkd_det.datasets.catalog import load_dataset
from hkd_det.distill import load_method
from hkd_det.errors import UsageError
from hkd_det.files import write_text
from hkd_det.metrics.bootstrap import MissRateDifference, compare_miss_rates
from hkd_det.metrics.citypersons import REASONABLE, SETUPS, CityPersonsSetup, evaluate_detections
from hkd_det.metrics.coco import evaluate_average_precision
from hkd_det.metrics.matching import suggest_operating_point
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import load_detector_checkpoint
from hkd_det.models.zoo import count_params_and_flops
from hkd_det.structures import Detections
from hkd_det.train.config import TrainConfig
from hkd_det.train.context import resolve_device
from hkd_det.train.engine import predict_dataset

HEIGHT_BINS_PX = (20.0, 50.0, 100.0, 200.0)


def make_height_setups() -> list[CityPersonsSetup]:
    """Return one setup per height range, with the visible ratio of the setup All.

    Ranges are closed intervals, so each ends at the largest float below the next.
    """
    ends = [*(float(np.nextafter(edge, 0)) for edge in HEIGHT_BINS_PX[1:]), 1e10]
    names = [*(f"{low:g}-{high:g} px" for low, high in pairwise(HEIGHT_BINS_PX)), "200 px and more"]
    ranges = zip(HEIGHT_BINS_PX, ends, strict=True)
    return [CityPersonsSetup(name, height_px, (0.2, 1e10)) for name, height_px in zip(names, ranges, strict=True)]


EVAL_SETUPS = (REASONABLE, SETUPS["All"], *make_height_setups())


@dataclass(frozen=True)
class DetectorMetrics:
    """Accuracy and size of a detector.

    Attributes:
        miss_rates: MR^-2 by setup, fraction; -1 for a setup without ground truth.
        num_gt: Ground-truth boxes by setup.
        ap: COCO average precision, fraction.
        ap50: COCO average precision at IoU 0.5, fraction.
        recall: Recall at `threshold` in the setup of the run, fraction.
        threshold: Score threshold with the highest F1 score in the setup of the run.
        parameters: Number of parameters.
        flops: FLOPs per image.
        imgsz_hw: Input height and width, pixels.
    """

    miss_rates: dict[str, float]
    num_gt: dict[str, int]
    ap: float
    ap50: float
    recall: float
    threshold: float
    parameters: int
    flops: int
    imgsz_hw: tuple[int, int]


def measure_detector(
    detector: BaseDetector, samples: Sequence[Sample], imgsz_hw: tuple[int, int], setup: str = "Reasonable"
) -> tuple[DetectorMetrics, list[Detections]]:
    """Measure accuracy and size of a detector.

    Args:
        detector: Detector in evaluation mode.
        samples: Annotated images.
        imgsz_hw: Input height and width, pixels.
        setup: Setup to evaluate in addition to `EVAL_SETUPS`.

    Returns:
        metrics: Accuracy and size.
        detections: Detections of each image, source pixels.
    """
    detections = predict_dataset(detector, samples, imgsz_hw)
    results = evaluate_detections(samples, detections, dict.fromkeys((SETUPS[setup], *EVAL_SETUPS)))
    precision = evaluate_average_precision(samples, detections)
    point = suggest_operating_point(results[setup])
    complexity = count_params_and_flops(detector, imgsz_hw)
    metrics = DetectorMetrics(
        {name: result.value for name, result in results.items()},
        {name: result.num_gt for name, result in results.items()},
        precision["AP"],
        precision["AP50"],
        point.recall,
        point.threshold,
        complexity.num_params,
        complexity.flops,
        imgsz_hw,
    )
    return metrics, detections


@dataclass(frozen=True)
class BaselineComparison:
    """Effect of the teacher, measured on one split.

    Attributes:
        setup: Setup of the run.
        distilled: Student with the teacher.
        baseline: Student without the teacher.
        difference: Difference in miss rate (distilled minus baseline) over resampled images; the variation between
            seeds is not included. None without ground truth.
    """

    setup: str
    distilled: DetectorMetrics
    baseline: DetectorMetrics
    difference: MissRateDifference | None


def make_baseline_config(config: TrainConfig) -> TrainConfig:
    """Return the configuration of the run without the teacher, in its own directory.

    Unlabeled images are left out. The labeled ones come in the same steps, augmentations and order.

    Args:
        config: Configuration of a distilled run.

    Raises:
        UsageError: For a run without a teacher, a student that is made from its teacher, or a teacher that the baseline
            would overwrite.
    """
    if not config.teacher:
        raise UsageError("--baseline: requires --teacher and --distill. It measures the effect of the teacher.")
    for name in config.distill:
        if load_method(name).student_source != "config":
            raise UsageError(
                f"--baseline: {name} derives the student from the teacher, so there is no student without it. "
                "Omit --baseline."
            )
    baseline = replace(
        config, teacher="", teacher_config="", unlabeled=(), distill={}, save_dir=f"{config.save_dir}-baseline"
    )
    if Path(config.teacher).resolve() == (baseline.save_path / "best.pt").resolve():
        raise UsageError(f"--teacher {config.teacher}: the baseline run would overwrite it. Choose another --name.")
    return baseline


def compare_with_baseline(config: TrainConfig, split: str = "val") -> BaselineComparison:
    """Evaluate `best.pt` of both runs and write `baseline.json` to the directory of the distilled run.

    Args:
        config: Configuration of the distilled run.
        split: Split to evaluate.

    Returns:
        The comparison.
    """
    samples, device = load_dataset(config.data, split), resolve_device(config.device)
    (distilled, detections), (baseline, baseline_detections) = (
        measure_detector(
            load_detector_checkpoint(Path(directory) / "best.pt").build().to(device),
            samples,
            config.imgsz_hw,
            config.setup,
        )
        for directory in (config.save_dir, make_baseline_config(config).save_dir)
    )
    setups = [SETUPS[config.setup]]
    difference = compare_miss_rates(
        evaluate_detections(samples, detections, setups)[config.setup],
        evaluate_detections(samples, baseline_detections, setups)[config.setup],
    )
    comparison = BaselineComparison(config.setup, distilled, baseline, difference)
    write_text(config.save_path / "baseline.json", json.dumps(asdict(comparison), indent=1) + "\n")
    return comparison


def format_comparison(comparison: BaselineComparison) -> str:
    """Format a comparison as a table for the terminal.

    Args:
        comparison: Result of `compare_with_baseline`.

    Returns:
        Lines of text.
    """
    distilled, baseline = comparison.distilled, comparison.baseline
    rows = [
        _make_row(f"MR^-2 {name}", distilled.miss_rates[name], baseline.miss_rates[name])
        for name, num_gt in distilled.num_gt.items()
        if num_gt
    ]
    rows += [_make_row("AP50", distilled.ap50, baseline.ap50), _make_row("AP", distilled.ap, baseline.ap)]
    thresholds = f"{distilled.threshold:.2f} and {baseline.threshold:.2f}"
    rows.append(_make_row(f"recall at {thresholds}", distilled.recall, baseline.recall))
    return (
        f"{format_table(rows, ('', 'distilled', 'baseline', 'difference'))}\n"
        f"Effect of the teacher, MR^-2 {comparison.setup}: {_format_effect(comparison.difference)}"
    )


def _format_effect(difference: MissRateDifference | None) -> str:
    return "not measured: no ground truth" if difference is None else f"{difference.summary()}; one seed"


def _make_row(name: str, distilled: float, baseline: float) -> tuple[str, str, str, str]:
    difference = f"{100 * (distilled - baseline):+.2f}"
    return name, f"{100 * distilled:.2f} %", f"{100 * baseline:.2f} %", difference
