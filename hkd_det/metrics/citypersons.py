"""Log-average miss rate by the CityPersons protocol, as the official `eval_MR_multisetup.py` computes it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det.metrics import matching
from hkd_det.metrics.matching import MissRateResult, compute_curve, log_average_miss_rate, make_result
from hkd_det.metrics.tables import DetectionTable, GroundTruthTable
from hkd_det.structures import Detections, GroundTruth, Sample

FPPI_POINTS = (0.0100, 0.0178, 0.0316, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.0000)
HEIGHT_MARGIN = 1.25
MAX_DETECTIONS = 1000  # a picture, before the height margin
IOU_THRESHOLD = min(0.5, 1 - 1e-10)


@dataclass(frozen=True)
class CityPersonsSetup:
    """Which people are to be found: closed ranges of height in pixels and of visibility. Others are ignored."""

    name: str
    height_px: tuple[float, float]
    visible_ratio: tuple[float, float]


REASONABLE = CityPersonsSetup("Reasonable", (50, 1e10), (0.65, 1e10))
SETUPS: dict[str, CityPersonsSetup] = {
    setup.name: setup
    for setup in (
        REASONABLE,
        CityPersonsSetup("Reasonable_small", (50, 75), (0.65, 1e10)),
        CityPersonsSetup("Reasonable_occ=heavy", (50, 1e10), (0.2, 0.65)),
        CityPersonsSetup("All", (20, 1e10), (0.2, 1e10)),
        # As papers report them beside the official four. Their heavy is not the official one: it has no lower end.
        CityPersonsSetup("bare", (50, 1e10), (0.9, 1e10)),
        CityPersonsSetup("partial", (50, 1e10), (0.65, 0.9)),
        CityPersonsSetup("heavy", (50, 1e10), (0.0, 0.65)),
    )
}


def evaluate(
    ground_truth: GroundTruthTable,
    detections: DetectionTable,
    setups: Iterable[CityPersonsSetup] = SETUPS.values(),
    zero_recall_before_curve: bool = False,
) -> dict[str, MissRateResult]:
    """The miss rates by setup.

    strict: at FPPI points before the curve's beginning nothing is found; the official program takes the curve's
    last recall there (its index -1).
    """
    best = detections.select(detections.rank_per_image() < MAX_DETECTIONS)
    pairs = matching.compute_overlaps(
        best, ground_truth.image_index, ground_truth.boxes_xywh, ground_truth.boxes_xywh, IOU_THRESHOLD
    )
    order = np.argsort(-best.scores, kind="stable")
    found = {}
    for setup in setups:
        ignored, kept = _compute_gt_ignore(ground_truth, setup), _compute_citypersons_eval_mask(best, setup)
        verdict, _ = matching.match_detections(pairs, kept, ignored, IOU_THRESHOLD)
        people = int((~ignored).sum())
        line = compute_curve(best.scores, verdict, order[kept[order]], people, ground_truth.num_images)
        before = 0.0 if zero_recall_before_curve or not len(line.recall) else float(line.recall[-1])
        found[setup.name] = make_result(
            line, log_average_miss_rate(line, FPPI_POINTS, before), people, ground_truth.num_images
        )
    return found


def evaluate_detections(
    samples: Sequence[Sample],
    detections: Sequence[Detections],
    setups: Iterable[CityPersonsSetup] = SETUPS.values(),
) -> dict[str, MissRateResult]:
    """Compute the miss rate of detections in memory.

    Args:
        samples: Annotated images.
        detections: Detections of each sample, in the same order. An empty sequence means no detections at all.
        setups: Setups to evaluate.

    Returns:
        The result of each setup, by its name.
    """
    ground_truth = GroundTruthTable.from_samples([sample.ground_truth for sample in samples])
    return evaluate(ground_truth, DetectionTable.from_detections(detections), setups)


@dataclass(frozen=True, eq=False)
class ImageMatches:
    """One picture's detections judged in one setup.

    kept: [K] indices of the detections that take part, best first. verdict: [K] TRUE, FALSE or IGNORED.
    partner: [K] index of the truth taken, -1 for none. ignored: [N] bool, the truths not to be found.
    """

    eval_indices: NDArray[np.intp]
    match_status: NDArray[np.int8]
    matched_gt: NDArray[np.intp]
    gt_ignore: NDArray[np.bool_]

    @property
    def missed_gt(self) -> NDArray[np.intp]:
        """Indices of the truths that were to be found and were not."""
        found = np.zeros(len(self.gt_ignore), bool)
        found[self.matched_gt[self.match_status == matching.TRUE_POSITIVE]] = True
        return np.flatnonzero(~found & ~self.gt_ignore)


def match_image(ground_truth: GroundTruth, detections: Detections, setup: CityPersonsSetup) -> ImageMatches:
    """Judge one picture's detections, to look at."""
    people, found = GroundTruthTable.from_samples([ground_truth]), DetectionTable.from_detections([detections])
    ignored = _compute_gt_ignore(people, setup)
    kept = _compute_citypersons_eval_mask(found, setup) & (found.rank_per_image() < MAX_DETECTIONS)
    pairs = matching.compute_overlaps(found, people.image_index, people.boxes_xywh, people.boxes_xywh, IOU_THRESHOLD)
    verdict, partner = matching.match_detections(pairs, kept, ignored, IOU_THRESHOLD)
    return ImageMatches(np.flatnonzero(kept), verdict[kept], partner[kept], ignored)


def _compute_gt_ignore(ground_truth: GroundTruthTable, setup: CityPersonsSetup) -> NDArray[np.bool_]:
    return (
        ground_truth.ignore
        | (ground_truth.height_px < setup.height_px[0])
        | (ground_truth.height_px > setup.height_px[1])
        | (ground_truth.visible_ratio < setup.visible_ratio[0])
        | (ground_truth.visible_ratio > setup.visible_ratio[1])
    )


def _compute_citypersons_eval_mask(detections: DetectionTable, setup: CityPersonsSetup) -> NDArray[np.bool_]:
    heights = detections.boxes_xywh[:, 3]
    return (heights >= setup.height_px[0] / HEIGHT_MARGIN) & (heights < setup.height_px[1] * HEIGHT_MARGIN)
