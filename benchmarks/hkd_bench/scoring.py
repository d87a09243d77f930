"""From files to figures: one truth, any number of detection files, one protocol."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hkd_det.datasets.caltech import parse_sets
from hkd_det.errors import UsageError
from hkd_det.metrics import caltech, caltech_files, citypersons, coco
from hkd_det.metrics import coco as coco_files
from hkd_det.metrics.matching import MissRateResult
from hkd_det.metrics.tables import DetectionTable

CITYPERSONS, COCO = "citypersons", "coco"


PROTOCOLS = (CITYPERSONS, *(version.value for version in caltech.AnnotationVersion), COCO)


@dataclass(frozen=True)
class ScoreConfig:
    """What to score. setups: names; none means all. sets: of Caltech, as "set06-set10"; empty: the test sets.

    strict: CityPersons' points before the curve count as nothing found (the official program takes the last recall).
    """

    annotations: Path
    protocol: str
    setups: tuple[str, ...] = ()
    caltech_sets: str = ""
    zero_recall_before_curve: bool = False


@dataclass(frozen=True, eq=False)
class ScoreResult:
    """Of one detection file. rates: by setup, none for COCO. precision: COCO's twelve figures, else none."""

    detections: Path
    num_detections: int
    out_of_range_scores: int
    miss_rates: dict[str, MissRateResult]
    coco_metrics: dict[str, float]


def score_files(config: ScoreConfig, detections: Sequence[Path]) -> Iterator[ScoreResult]:
    """A score a detection file; the truth is read once. Raises UsageError and DataError, naming flag or file."""
    if config.protocol == CITYPERSONS:
        yield from _score_citypersons(config, detections)
    elif config.protocol == COCO:
        yield from _score_coco(config, detections)
    else:
        yield from _score_caltech(config, detections)


def _score_citypersons(config: ScoreConfig, detections: Sequence[Path]) -> Iterator[ScoreResult]:
    setups = [citypersons.SETUPS[name] for name in _select_setups(config, citypersons.SETUPS)]
    truth = coco_files.read_coco_ground_truth(config.annotations)
    for path in detections:
        found = coco_files.read_coco_detections(path, truth)
        yield _make_score_result(
            path, found, citypersons.evaluate(truth.table, found, setups, config.zero_recall_before_curve)
        )


def _score_coco(config: ScoreConfig, detections: Sequence[Path]) -> Iterator[ScoreResult]:
    if config.setups:
        raise UsageError("--setup: COCO's measure has none; leave it out")
    truth = coco_files.read_coco_ground_truth(config.annotations)
    for path in detections:
        found = coco_files.read_coco_detections(path, truth)
        yield _make_score_result(path, found, {}, coco.evaluate(truth, found))


def _score_caltech(config: ScoreConfig, detections: Sequence[Path]) -> Iterator[ScoreResult]:
    version = caltech.AnnotationVersion(config.protocol)
    names = _select_setups(config, caltech.SETUPS)
    truth = caltech_files.read_caltech_ground_truth(
        config.annotations, version, parse_sets(config.caltech_sets) if config.caltech_sets else None
    )
    if truth.is_prefiltered:
        names = [_infer_setup(config)]
    setups = [caltech.SETUPS[name] for name in names]
    for path in detections:
        found = caltech_files.read_caltech_detections(path, truth)
        yield _make_score_result(
            path, found, caltech.evaluate(truth.table, found, version, setups, truth.is_prefiltered)
        )


def _infer_setup(config: ScoreConfig) -> str:
    """Of a gt-SETUP.mat: the official program has applied it, and its name alone says which it was."""
    named = config.annotations.stem.removeprefix("gt-")
    if len(config.setups) == 1:
        return config.setups[0]
    near = [name for name in caltech.SETUPS if named == name or named.startswith(f"{name}-")]
    if config.setups or not near:
        raise UsageError(
            f"--setup: {config.annotations} holds the people of one setup; name that one: {', '.join(caltech.SETUPS)}"
        )
    return near[0]


def _select_setups(
    config: ScoreConfig, known: dict[str, citypersons.CityPersonsSetup] | dict[str, caltech.CaltechSetup]
) -> list[str]:
    for name in config.setups:
        if name not in known:
            raise UsageError(f"--setup {name}: {config.protocol} has {', '.join(known)}")
    return list(config.setups or known)


def _make_score_result(
    path: Path,
    detections: DetectionTable,
    miss_rates: dict[str, MissRateResult],
    coco_metrics: dict[str, float] | None = None,
) -> ScoreResult:
    odd = int(np.count_nonzero((detections.scores < 0) | (detections.scores > 1)))
    return ScoreResult(path, len(detections), odd, miss_rates, coco_metrics or {})
