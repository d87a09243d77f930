"""From files to figures: one truth, any number of detection files, one protocol."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hkd_det.datasets.caltech import parse_sets
from hkd_det.errors import UsageError
from hkd_det.metrics import caltech, caltech_files, citypersons, coco, coco_files
from hkd_det.metrics.curve import MissRate
from hkd_det.metrics.tables import DetectionTable

CITYPERSONS, COCO = "citypersons", "coco"
PROTOCOLS = (CITYPERSONS, *(version.value for version in caltech.Version), COCO)


@dataclass(frozen=True)
class Request:
    """What to score. setups: names; none means all. sets: of Caltech, as "set06-set10"; empty: the test sets.

    strict: CityPersons' points before the curve count as nothing found (the official program takes the last recall).
    """

    annotations: Path
    protocol: str
    setups: tuple[str, ...] = ()
    sets: str = ""
    strict: bool = False


@dataclass(frozen=True, eq=False)
class Score:
    """Of one detection file. rates: by setup, none for COCO. precision: COCO's twelve figures, else none."""

    detections: Path
    count: int
    odd_scores: int
    rates: dict[str, MissRate]
    precision: dict[str, float]


def judge(request: Request, detections: Sequence[Path]) -> Iterator[Score]:
    """A score a detection file; the truth is read once. Raises UsageError and DataError, naming flag or file."""
    if request.protocol == CITYPERSONS:
        yield from _citypersons(request, detections)
    elif request.protocol == COCO:
        yield from _coco(request, detections)
    else:
        yield from _caltech(request, detections)


def _citypersons(request: Request, detections: Sequence[Path]) -> Iterator[Score]:
    setups = [citypersons.SETUPS[name] for name in _chosen(request, citypersons.SETUPS)]
    truth = coco_files.read_truth(request.annotations)
    for path in detections:
        found = coco_files.read_detections(path, truth)
        yield _score(path, found, citypersons.evaluate(truth.table, found, setups, request.strict))


def _coco(request: Request, detections: Sequence[Path]) -> Iterator[Score]:
    if request.setups:
        raise UsageError("--setup: COCO's measure has none; leave it out")
    truth = coco_files.read_truth(request.annotations)
    for path in detections:
        found = coco_files.read_detections(path, truth)
        yield _score(path, found, {}, coco.evaluate(truth, found))


def _caltech(request: Request, detections: Sequence[Path]) -> Iterator[Score]:
    version = caltech.Version(request.protocol)
    names = _chosen(request, caltech.SETUPS)
    truth = caltech_files.read_truth(request.annotations, version, parse_sets(request.sets) if request.sets else None)
    if truth.filtered:
        names = [_setup_of(request)]
    setups = [caltech.SETUPS[name] for name in names]
    for path in detections:
        found = caltech_files.read_detections(path, truth)
        yield _score(path, found, caltech.evaluate(truth.table, found, version, setups, truth.filtered))


def _setup_of(request: Request) -> str:
    """Of a gt-SETUP.mat: the official program has applied it, and its name alone says which it was."""
    named = request.annotations.stem.removeprefix("gt-")
    if len(request.setups) == 1:
        return request.setups[0]
    near = [name for name in caltech.SETUPS if named == name or named.startswith(f"{name}-")]
    if request.setups or not near:
        raise UsageError(
            f"--setup: {request.annotations} holds the people of one setup; name that one: {', '.join(caltech.SETUPS)}"
        )
    return near[0]


def _chosen(request: Request, known: dict[str, citypersons.Setup] | dict[str, caltech.Setup]) -> list[str]:
    for name in request.setups:
        if name not in known:
            raise UsageError(f"--setup {name}: {request.protocol} has {', '.join(known)}")
    return list(request.setups or known)


def _score(
    path: Path, found: DetectionTable, rates: dict[str, MissRate], precision: dict[str, float] | None = None
) -> Score:
    odd = int(np.count_nonzero((found.scores < 0) | (found.scores > 1)))
    return Score(path, len(found), odd, rates, precision or {})
