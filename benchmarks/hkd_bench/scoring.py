"""Scores of detection files: any number of detection files on one ground truth, one protocol.

`PROTOCOLS` maps the values of `--protocol` to functions. A new protocol is one function and one entry.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hkd_det.datasets.caltech import parse_sets
from hkd_det.errors import UsageError
from hkd_det.metrics import caltech, citypersons, coco
from hkd_det.metrics.bootstrap import (
    MissRateDifference,
    MissRateInterval,
    compute_differences,
    compute_intervals,
)
from hkd_det.metrics.caltech_files import read_caltech_detections, read_caltech_ground_truth
from hkd_det.metrics.coco import read_coco_detections, read_coco_ground_truth
from hkd_det.metrics.matching import MissRateResult
from hkd_det.metrics.tables import DetectionTable


@dataclass(frozen=True)
class ScoreConfig:
    """Options of `score_files`.

    Attributes:
        annotations: Ground truth, in a form that the protocol reads.
        protocol: Key of `PROTOCOLS`.
        setups: Names of the setups; empty for all.
        caltech_sets: Sets of Caltech, for example "set06-set10"; empty for the test sets.
        zero_recall_before_curve: CityPersons only: use recall 0 at FPPI points before the curve.
    """

    annotations: Path
    protocol: str
    setups: tuple[str, ...] = ()
    caltech_sets: str = ""
    zero_recall_before_curve: bool = False


@dataclass(frozen=True, eq=False)
class ScoreResult:
    """Scores of one detection file.

    Attributes:
        detections: Path of the file or directory.
        num_detections: Number of detections.
        num_out_of_range: Number of scores outside 0 to 1.
        miss_rates: Miss rate of each setup; empty for protocols without a miss rate.
        metrics: Other metrics as fractions, by name; -1 without ground truth.
    """

    detections: Path
    num_detections: int
    num_out_of_range: int
    miss_rates: dict[str, MissRateResult] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_table(
        cls,
        path: Path,
        detections: DetectionTable,
        miss_rates: dict[str, MissRateResult] | None = None,
        metrics: dict[str, float] | None = None,
    ) -> "ScoreResult":
        """Build a result and count the detections.

        Args:
            path: Path of the detection file.
            detections: Its detections.
            miss_rates: Miss rate of each setup.
            metrics: Other metrics as fractions.

        Returns:
            The result.
        """
        num_out_of_range = int(np.count_nonzero((detections.scores < 0) | (detections.scores > 1)))
        return cls(path, len(detections), num_out_of_range, miss_rates or {}, metrics or {})


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
    ground_truth = read_coco_ground_truth(config.annotations)
    for path in detections:
        table = read_coco_detections(path, ground_truth)
        yield ScoreResult.from_table(
            path, table, citypersons.evaluate(ground_truth.table, table, setups, config.zero_recall_before_curve)
        )


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
    ground_truth = read_coco_ground_truth(config.annotations)
    for path in detections:
        table = read_coco_detections(path, ground_truth)
        yield ScoreResult.from_table(path, table, metrics=coco.evaluate(ground_truth, table))


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
