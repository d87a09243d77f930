"""Scores of detection files by one protocol, and miss rates of measured models on one or several ground truths.

`PROTOCOLS` maps the values of `--protocol` to functions. A new protocol is one function and one entry.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hkd_bench.result import AccuracyResult, StoredCurve
from hkd_bench.score_hints import find_hint
from hkd_deploy.precision.report import compute_recall
from hkd_det.datasets.caltech import parse_sets
from hkd_det.errors import DataError, UsageError
from hkd_det.metrics import caltech, citypersons, coco
from hkd_det.metrics.bootstrap import (
    NUM_RESAMPLES,
    MissRateDifference,
    MissRateInterval,
    compute_differences,
    compute_intervals,
)
from hkd_det.metrics.caltech import read_caltech_detections, read_caltech_ground_truth
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.coco_files import read_coco_detections, read_coco_ground_truth
from hkd_det.metrics.matching import MissRateResult, suggest_operating_point
from hkd_det.metrics.tables import DetectionTable
from hkd_det.structures import Detections, Sample


@dataclass(frozen=True)
class ScoreConfig:
    """Options of `score_files`.

    Attributes:
        annotations: Ground truth, in a form that the protocol reads.
        protocol: Key of `PROTOCOLS`.
        setups: Names of the setups; empty for all.
        caltech_sets: Sets of Caltech, for example "set06-set10"; empty for the test sets.
        zero_recall_before_curve: CityPersons only: use recall 0 at FPPI points before the curve.
        category: Names of the categories to evaluate, for COCO JSON; empty for the person class.
    """

    annotations: Path
    protocol: str
    setups: tuple[str, ...] = ()
    caltech_sets: str = ""
    zero_recall_before_curve: bool = False
    category: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ScoreResult:
    """Scores of one detection file.

    Attributes:
        detections: Path of the file or directory.
        num_detections: Number of detections.
        num_out_of_range: Number of scores outside 0 to 1.
        miss_rates: Miss rate of each setup; empty for protocols without a miss rate.
        metrics: Other metrics as fractions, by name; -1 without ground truth.
        hint: Probable reason why the detections miss most persons; empty if there is none.
    """

    detections: Path
    num_detections: int
    num_out_of_range: int
    miss_rates: dict[str, MissRateResult] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    hint: str = ""

    @classmethod
    def from_table(
        cls,
        path: Path,
        detections: DetectionTable,
        miss_rates: dict[str, MissRateResult] | None = None,
        metrics: dict[str, float] | None = None,
        hint: str = "",
    ) -> "ScoreResult":
        """Build a result and count the detections.

        Args:
            path: Path of the detection file.
            detections: Its detections.
            miss_rates: Miss rate of each setup.
            metrics: Other metrics as fractions.
            hint: Probable reason why the detections miss most persons.

        Returns:
            The result.
        """
        num_out_of_range = int(np.count_nonzero((detections.scores < 0) | (detections.scores > 1)))
        return cls(path, len(detections), num_out_of_range, miss_rates or {}, metrics or {}, hint)


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of all detection files on one ground truth.

    Attributes:
        config: Ground truth and options.
        scores: Result of each detection file, by its name.
        intervals: 95 % intervals of the miss rates, by file and setup; empty without bootstrap.
        differences: Differences to the first detection file on the same images, by file and setup.
    """

    config: ScoreConfig
    scores: dict[str, ScoreResult]
    intervals: dict[str, dict[str, MissRateInterval]]
    differences: dict[str, dict[str, MissRateDifference]]


def compare_scores(config: ScoreConfig, scores: dict[str, ScoreResult], num_resamples: int) -> ScoreTable:
    """Compute intervals of the miss rates, and differences to the first detection file.

    Args:
        config: Ground truth and options.
        scores: Result of each detection file, by its name; at least one.
        num_resamples: Number of resamples of the images; 0 computes neither.

    Returns:
        The scores with intervals and differences.
    """
    if not num_resamples:
        return ScoreTable(config, scores, {}, {})
    (_, first), *others = scores.items()
    return ScoreTable(
        config,
        scores,
        {name: compute_intervals(score.miss_rates, num_resamples) for name, score in scores.items()},
        {name: compute_differences(score.miss_rates, first.miss_rates, num_resamples) for name, score in others},
    )


def score_citypersons(config: ScoreConfig, detections: Sequence[Path]) -> Iterator[ScoreResult]:
    """Yield the CityPersons miss rates of each detection file (COCO JSON).

    Args:
        config: Ground truth and options.
        detections: Detection files (COCO JSON).
    """
    setups = [citypersons.SETUPS[name] for name in _select_setups(config, citypersons.SETUPS)]
    ground_truth = read_coco_ground_truth(config.annotations, config.category)
    for path in detections:
        table = read_coco_detections(path, ground_truth)
        miss_rates = citypersons.evaluate(ground_truth.table, table, setups, config.zero_recall_before_curve)
        yield ScoreResult.from_table(path, table, miss_rates, hint=find_hint(path, ground_truth, table))


def score_caltech(config: ScoreConfig, detections: Sequence[Path]) -> Iterator[ScoreResult]:
    """Yield the Caltech miss rates of each directory of detections.

    Args:
        config: Ground truth and options.
        detections: Directories of detections, as the official toolbox reads them.
    """
    version = caltech.AnnotationVersion(config.protocol)
    names = _select_setups(config, caltech.SETUPS)
    set_names = parse_sets(config.caltech_sets) if config.caltech_sets else None
    ground_truth = read_caltech_ground_truth(config.annotations, version, set_names)
    if ground_truth.is_prefiltered:
        names = [_infer_setup(config)]
    setups = [caltech.SETUPS[name] for name in names]
    for path in detections:
        table = read_caltech_detections(path, ground_truth)
        miss_rates = caltech.evaluate(ground_truth.table, table, version, setups, ground_truth.is_prefiltered)
        yield ScoreResult.from_table(path, table, miss_rates)


def score_coco(config: ScoreConfig, detections: Sequence[Path]) -> Iterator[ScoreResult]:
    """Yield COCO's metrics of each detection file (COCO JSON).

    Args:
        config: Ground truth and options.
        detections: Detection files (COCO JSON).
    """
    if config.setups:
        raise UsageError("--setup: the protocol coco has no setups. Omit the flag.")
    ground_truth = read_coco_ground_truth(config.annotations, config.category)
    for path in detections:
        table = read_coco_detections(path, ground_truth)
        metrics = coco.evaluate(ground_truth, table)
        yield ScoreResult.from_table(path, table, metrics=metrics, hint=find_hint(path, ground_truth, table))


PROTOCOLS: dict[str, Callable[[ScoreConfig, Sequence[Path]], Iterator[ScoreResult]]] = {
    "citypersons": score_citypersons,
    caltech.AnnotationVersion.ORIGINAL.value: score_caltech,
    caltech.AnnotationVersion.CORRECTED.value: score_caltech,
    "coco": score_coco,
}


def score_files(config: ScoreConfig, detections: Sequence[Path]) -> Iterator[ScoreResult]:
    """Yield the scores of each detection file; the ground truth is read once.

    Args:
        config: Ground truth, protocol and options.
        detections: Detection files or directories, in the form of the protocol.

    Raises:
        UsageError: An option does not fit the protocol.
        DataError: A file is missing or invalid.
    """
    return PROTOCOLS[config.protocol](config, detections)


def _infer_setup(config: ScoreConfig) -> str:
    """Return the setup of a gt-SETUP.mat. The file is already filtered, and only its name contains the setup."""
    if len(config.setups) == 1:
        return config.setups[0]
    stem = config.annotations.stem.removeprefix("gt-")
    names = [name for name in caltech.SETUPS if stem == name or stem.startswith(f"{name}-")]
    if config.setups or not names:
        raise UsageError(
            f"--setup: required, because {config.annotations} contains the boxes of one setup. Expected one of "
            f"{', '.join(caltech.SETUPS)}."
        )
    return names[0]


def _select_setups(
    config: ScoreConfig, setups: dict[str, citypersons.CityPersonsSetup] | dict[str, caltech.CaltechSetup]
) -> list[str]:
    for name in config.setups:
        if name not in setups:
            raise UsageError(
                f"--setup: expected one of {', '.join(setups)} for the protocol {config.protocol}, got {name}."
            )
    return list(config.setups or setups)


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
        precisions = [_compute_average_precision(samples, model_detections) for model_detections in detections]
        rows = enumerate(zip(miss_rates, precisions, confs, strict=True))
        by_ground_truth.append(
            [
                _make_accuracy_result(name, rates, precision, conf, miss_rates[0] if index else None, num_resamples)
                for index, (rates, precision, conf) in rows
            ]
        )
    return list(zip(*by_ground_truth, strict=True))


def _compute_average_precision(samples: Sequence[Sample], detections: Sequence[Detections]) -> dict[str, float | None]:
    """Return COCO's AP and AP50 as fractions, or None without ground truth."""
    if not any((~sample.ground_truth.ignore).any() for sample in samples):
        return {"AP": None, "AP50": None}
    return {**coco.evaluate_average_precision(samples, detections)}


def _make_accuracy_result(
    name: str,
    miss_rates: dict[str, MissRateResult],
    precision: dict[str, float | None],
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
    )
