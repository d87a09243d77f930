"""Judging a trained detector: miss rate in total and by height, average precision, and what it weighs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from hkd_det.datasets import Sample
from hkd_det.detections import Detections
from hkd_det.metrics import coco
from hkd_det.metrics.citypersons import REASONABLE, SETUPS, Setup, evaluate
from hkd_det.metrics.coco_files import CocoTruth
from hkd_det.metrics.tables import DetectionTable, TruthTable
from hkd_det.models.family import PersonDetector
from hkd_det.models.sizes import cost
from hkd_det.train.validate import detect_all

EDGES_PX = (20.0, 50.0, 100.0, 200.0)


def heights() -> list[Setup]:
    """People by height, as visible as in the setup All; the ranges are closed, so each ends just below the next."""
    ends = [*(float(np.nextafter(edge, 0)) for edge in EDGES_PX[1:]), 1e10]
    names = [*(f"{low:g}-{high:g} px" for low, high in pairwise(EDGES_PX)), "200 px and more"]
    return [Setup(name, span, (0.2, 1e10)) for name, span in zip(names, zip(EDGES_PX, ends, strict=True), strict=True)]


JUDGED_SETUPS = (REASONABLE, SETUPS["All"], *heights())


@dataclass(frozen=True)
class Judged:
    """What a detector is worth and what it costs.

    miss_rates: MR^-2 by setup, fractions, -1 where nobody was to be found. people: to be found, by setup.
    ap, ap50: COCO's, fractions. parameters: numbers; flops: a picture. imgsz_hw: of the input.
    """

    miss_rates: dict[str, float]
    people: dict[str, int]
    ap: float
    ap50: float
    parameters: int
    flops: int
    imgsz_hw: tuple[int, int]


def judge(
    detector: PersonDetector,
    samples: Sequence[Sample],
    imgsz_hw: tuple[int, int],
    bf16: bool,
    setup: str = "Reasonable",
) -> tuple[Judged, list[Detections]]:
    """Measure a detector on samples, in `setup` and those of JUDGED_SETUPS; its detections come along."""
    found = detect_all(detector, samples, imgsz_hw, bf16)
    table, detections = TruthTable.of([sample.truth for sample in samples]), DetectionTable.of(found)
    rates = evaluate(table, detections, dict.fromkeys((SETUPS[setup], *JUDGED_SETUPS)))
    area_px = table.boxes_xywh[:, 2] * table.boxes_xywh[:, 3]
    truth = CocoTruth(Path(), tuple(range(len(samples))), 1, table, area_px, np.zeros(len(area_px), bool))
    precision = coco.evaluate(truth, detections)
    weight = cost(detector, imgsz_hw)
    return Judged(
        {name: rate.value for name, rate in rates.items()},
        {name: rate.people for name, rate in rates.items()},
        precision["AP"],
        precision["AP50"],
        weight.parameters,
        weight.flops,
        imgsz_hw,
    ), found
