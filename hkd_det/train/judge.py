"""Judging a trained detector: miss rate in total and by height, average precision, and what it weighs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from hkd_det.datasets import Sample
from hkd_det.detections import Detections
from hkd_det.metrics import coco
from hkd_det.metrics.citypersons import REASONABLE, SETUPS, CityPersonsSetup, evaluate
from hkd_det.metrics.coco_files import CocoGroundTruth
from hkd_det.metrics.tables import DetectionTable, GroundTruthTable
from hkd_det.models.family import BaseDetector
from hkd_det.models.sizes import count_params_and_flops
from hkd_det.train.validate import predict_dataset

HEIGHT_BINS_PX = (20.0, 50.0, 100.0, 200.0)


def height_setups() -> list[CityPersonsSetup]:
    """People by height, as visible as in the setup All; the ranges are closed, so each ends just below the next."""
    ends = [*(float(np.nextafter(edge, 0)) for edge in HEIGHT_BINS_PX[1:]), 1e10]
    names = [*(f"{low:g}-{high:g} px" for low, high in pairwise(HEIGHT_BINS_PX)), "200 px and more"]
    return [
        CityPersonsSetup(name, span, (0.2, 1e10))
        for name, span in zip(names, zip(HEIGHT_BINS_PX, ends, strict=True), strict=True)
    ]


EVAL_SETUPS = (REASONABLE, SETUPS["All"], *height_setups())


@dataclass(frozen=True)
class EvalResult:
    """What a detector is worth and what it costs.

    miss_rates: MR^-2 by setup, fractions, -1 where nobody was to be found. people: to be found, by setup.
    ap, ap50: COCO's, fractions. parameters: numbers; flops: a picture. imgsz_hw: of the input.
    """

    miss_rates: dict[str, float]
    num_gt: dict[str, int]
    ap: float
    ap50: float
    parameters: int
    flops: int
    imgsz_hw: tuple[int, int]


def evaluate_detector(
    detector: BaseDetector,
    samples: Sequence[Sample],
    imgsz_hw: tuple[int, int],
    bf16: bool,
    setup: str = "Reasonable",
) -> tuple[EvalResult, list[Detections]]:
    """Measure a detector on samples, in `setup` and those of JUDGED_SETUPS; its detections come along."""
    found = predict_dataset(detector, samples, imgsz_hw, bf16)
    table, detections = (
        GroundTruthTable.from_samples([sample.ground_truth for sample in samples]),
        DetectionTable.from_detections(found),
    )
    rates = evaluate(table, detections, dict.fromkeys((SETUPS[setup], *EVAL_SETUPS)))
    area_px = table.boxes_xywh[:, 2] * table.boxes_xywh[:, 3]
    truth = CocoGroundTruth(Path(), tuple(range(len(samples))), 1, table, area_px, np.zeros(len(area_px), bool))
    precision = coco.evaluate(truth, detections)
    weight = count_params_and_flops(detector, imgsz_hw)
    return EvalResult(
        {name: rate.value for name, rate in rates.items()},
        {name: rate.num_gt for name, rate in rates.items()},
        precision["AP"],
        precision["AP50"],
        weight.num_params,
        weight.flops,
        imgsz_hw,
    ), found
