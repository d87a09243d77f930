"""Tests of the CityPersons protocol against a second implementation and on the official validation annotations."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_det.datasets.citypersons import _read_mat_samples
from hkd_det.metrics.citypersons import REASONABLE, SETUPS, evaluate, evaluate_detections, match_image
from hkd_det.metrics.matching import MissRateResult
from hkd_det.metrics.tables import DetectionTable, GroundTruthTable
from hkd_det.structures import Detections, GroundTruth, Sample, xyxy_from_xywh

spec = importlib.util.spec_from_file_location("official", Path(__file__).with_name("official_citypersons.py"))
assert spec is not None and spec.loader is not None
official = importlib.util.module_from_spec(spec)
sys.modules["official"] = official
spec.loader.exec_module(official)

CITYPERSONS = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "citypersons"

ImageData = tuple[list[dict[str, Any]], list[tuple[list[float], float]]]

# Integer pixels and few scores give overlaps of exactly 0.5 and ties. Decimal fractions reveal a different order of
# floating-point operations.
integer_boxes = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 60), st.integers(15, 160)).map(list)
decimal_boxes = integer_boxes.map(lambda box: [round(value * 1.1, 1) for value in box])
boxes = st.one_of(integer_boxes, decimal_boxes)
annotations = st.fixed_dictionaries(
    {
        "bbox": boxes,
        "ratio": st.sampled_from([0.1, 0.3, 0.65, 0.7, 0.9, 1.0]),
        "ignore": st.booleans(),
        "extra_height": st.sampled_from([0, 0, 0.5]),
    }
)
detections = st.tuples(boxes, st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]))
images = st.lists(
    st.tuples(st.lists(annotations, max_size=6), st.lists(detections, max_size=9)), min_size=1, max_size=8
)


def to_ground_truth(records: list[dict[str, Any]]) -> GroundTruth:
    boxes = np.array([record["bbox"] for record in records], np.float64).reshape(-1, 4)
    visible = np.array([record["vis_bbox"] for record in records], np.float64).reshape(-1, 4)
    return GroundTruth(
        xyxy_from_xywh(boxes).astype(np.float32),
        np.array([bool(record["ignore"]) for record in records], bool),
        xyxy_from_xywh(visible).astype(np.float32),
        tuple("pedestrian" for _ in records),
    )


def to_detections(rows: list[tuple[list[float], float]]) -> Detections:
    boxes = np.array([box for box, _ in rows], np.float64).reshape(-1, 4)
    return Detections(xyxy_from_xywh(boxes).astype(np.float32), np.array([score for _, score in rows], np.float32))


def complete(record: dict[str, Any]) -> dict[str, Any]:
    """Add a visible box of integer height and the ratio that follows from it."""
    x, y, width, height = record["bbox"]
    visible_height = max(1, round(height * record["ratio"]))
    return {
        **record,
        "vis_bbox": [x, y, width, visible_height],
        "height": height + record.get("extra_height", 0),
        "vis_ratio": visible_height / height,
    }


def tables(data: list[ImageData]) -> tuple[GroundTruthTable, DetectionTable]:
    """Build tables in double precision; `height` and `vis_ratio` are those of the file, not computed from the box."""
    records = [(index, record) for index, (some, _) in enumerate(data) for record in some]
    dt = [(index, box, score) for index, (_, rows) in enumerate(data) for box, score in rows]
    ground_truth = GroundTruthTable(
        len(data),
        np.array([index for index, _ in records], np.intp),
        np.array([record["bbox"] for _, record in records], np.float64).reshape(-1, 4),
        np.array([record["height"] for _, record in records], np.float64),
        np.array([record["vis_ratio"] for _, record in records], np.float64),
        np.array([bool(record["ignore"]) for _, record in records], bool),
    )
    return ground_truth, DetectionTable.from_rows(
        np.array([index for index, _, _ in dt], np.intp),
        np.array([box for _, box, _ in dt], np.float64).reshape(-1, 4),
        np.array([score for _, _, score in dt], np.float64),
    )


def evaluate_both(data: list[ImageData], zero_recall_before_curve: bool = False) -> list[tuple[float, float]]:
    results = evaluate(*tables(data), zero_recall_before_curve=zero_recall_before_curve)
    return [
        (
            results[name].value,
            official.miss_rate(data, setup.height_px, setup.visible_ratio, zero_recall_before_curve),
        )
        for name, setup in SETUPS.items()
    ]


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(images, st.booleans())
def test_evaluate_equals_second_implementation(data: Any, zero_recall_before_curve: bool) -> None:
    data = [([complete(record) for record in records], rows) for records, rows in data]
    for value, expected in evaluate_both(data, zero_recall_before_curve):
        assert abs(value - expected) < 1e-9


def test_evaluate_keeps_1000_detections_per_image() -> None:
    """The limit is applied before the height margin."""
    rng = np.random.default_rng(0)
    records = [
        complete({"bbox": [100 * i, 0, 40, 100], "ratio": 1.0, "ignore": False, "extra_height": 0}) for i in range(8)
    ]
    rows = [
        ([int(x), 0, 40, int(height)], round(float(s), 2))
        for x, s, height in zip(
            rng.integers(0, 800, 1500), rng.random(1500), rng.choice([30, 95, 100], 1500), strict=True
        )
    ]
    for value, expected in evaluate_both([(records, rows), (records, [])]):
        assert abs(value - expected) < 1e-9
    result = evaluate(*tables([(records, rows)]))["Reasonable"]
    assert len(result.scores) < sum(box[3] > 40 for box, _ in rows) - 200


def evaluate_reasonable(ground_truths: list[GroundTruth], detections: list[Detections]) -> MissRateResult:
    samples = [Sample(index, Path(f"{index}.png"), one) for index, one in enumerate(ground_truths)]
    return evaluate_detections(samples, detections, [REASONABLE])["Reasonable"]


def test_evaluate_detections_closed_forms() -> None:
    person = complete({"bbox": [0, 0, 40, 100], "ratio": 1.0, "ignore": False})
    far_off = [500, 0, 40, 100]
    gt, tp, fp = to_ground_truth([person]), to_detections([([0, 0, 40, 100], 0.9)]), to_detections([(far_off, 0.9)])
    assert evaluate_reasonable([gt], [tp]).value == 0.0
    assert evaluate_reasonable([gt], [Detections.empty()]).value == 1.0
    assert evaluate_reasonable([gt], [fp]).value == 1.0
    assert evaluate_reasonable([GroundTruth.empty()], [fp]).value == -1
    assert evaluate_reasonable([gt], []).num_gt == 1  # no detections at all
    # One true positive for two boxes, no false positive: the miss rate is 0.5 at every point.
    assert evaluate_reasonable([gt, gt], [tp, Detections.empty()]).value == pytest.approx(0.5, abs=1e-12)


def test_match_image_returns_status_and_missed_boxes() -> None:
    person = complete({"bbox": [0, 0, 40, 100], "ratio": 1.0, "ignore": False})
    occluded = complete({"bbox": [100, 0, 40, 100], "ratio": 0.3, "ignore": False})
    other = complete({"bbox": [200, 0, 40, 100], "ratio": 1.0, "ignore": False})
    dt = to_detections(
        [([0, 0, 40, 100], 0.9), ([100, 0, 40, 100], 0.8), ([400, 0, 40, 100], 0.7), ([0, 0, 10, 20], 0.6)]
    )
    result = match_image(to_ground_truth([person, occluded, other]), dt, REASONABLE)
    assert result.eval_indices.tolist() == [0, 1, 2] and result.match_status.tolist() == [1, -1, 0]
    assert result.matched_gt.tolist() == [0, 1, -1] and result.missed_gt.tolist() == [2]


def test_evaluate_before_curve_uses_last_recall() -> None:
    """A false positive with the highest score, then a true positive, for two boxes in two images: FPPI is 0.5.

    The first seven points are before the curve. The official program's index -1 gives them the last recall, 0.5; the
    other two points have the same recall.
    """
    person = complete({"bbox": [0, 0, 40, 100], "ratio": 1.0, "ignore": False})
    gt = to_ground_truth([person])
    dt = to_detections([([500, 0, 40, 100], 0.9), ([0, 0, 40, 100], 0.8)])
    result = evaluate_reasonable([gt, gt], [dt, Detections.empty()])
    assert result.fppi.tolist() == [0.5, 0.5] and result.miss_rate.tolist() == [1.0, 0.5]
    assert result.value == pytest.approx(0.5, abs=1e-12)
    # With one more false positive at the end (FPPI 1) the last recall is still 0.5.
    more = to_detections([([500, 0, 40, 100], 0.9), ([0, 0, 40, 100], 0.8), ([800, 0, 40, 100], 0.1)])
    assert evaluate_reasonable([gt, gt], [more, Detections.empty()]).value == pytest.approx(0.5, abs=1e-12)
    # With recall 0 before the curve, the miss rate is 1 at seven points: the mean is 0.5 ** (2 / 9).
    tables_of_two = (
        GroundTruthTable.from_samples([gt, gt]),
        DetectionTable.from_detections([dt, Detections.empty()]),
    )
    result = evaluate(*tables_of_two, [REASONABLE], zero_recall_before_curve=True)["Reasonable"]
    assert result.value == pytest.approx(0.5 ** (2 / 9), abs=1e-12)


def jitter_box(box: list[float], rng: np.random.Generator, round_pixels: bool) -> list[float]:
    """Move and scale a box (xywh) by about 8 % of its sides; the corners are float32 numbers."""
    x, y, width, height = box
    shift = rng.normal(0, 0.08, 4) * [width, height, width, height]
    corners = np.array([x, y, x + width, y + height]) + (np.rint(shift) if round_pixels else shift)
    corners[2:] = np.maximum(corners[2:], corners[:2] + 1)
    left, top, right, bottom = corners.astype(np.float32).astype(float).tolist()
    return [left, top, right - left, bottom - top]


@pytest.mark.parametrize("round_pixels", [True, False])
@pytest.mark.skipif(not CITYPERSONS.is_dir(), reason="HKD_TEST_DATA is not set")
def test_mat_reader_equals_official_json(round_pixels: bool) -> None:
    """anno_val.mat through the reader and val_gt.json through the second implementation give the same miss rate."""
    content = json.loads((CITYPERSONS / "val_gt.json").read_text())
    records_by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for record in content["annotations"]:
        records_by_image[record["image_id"]].append(record)
    rng = np.random.default_rng(0)
    data: list[ImageData] = []
    for records in records_by_image.values():
        rows = [
            (jitter_box(record["bbox"], rng, round_pixels), float(rng.random()))
            for record in records
            if rng.random() < 0.7
        ]
        rows += [([int(rng.integers(0, 2000)), 400, 40, 98], float(rng.random() ** 2)) for _ in range(3)]
        data.append((records, [(box, float(np.float32(score))) for box, score in rows]))
    samples = _read_mat_samples(CITYPERSONS / "anno_val.mat", CITYPERSONS)
    from_reader = evaluate_detections(samples, [to_detections(rows) for _, rows in data])
    from_file = evaluate(*tables(data))
    for name, setup in SETUPS.items():
        expected = official.miss_rate(data, setup.height_px, setup.visible_ratio)
        assert from_reader[name].value == pytest.approx(expected, abs=1e-9)
        assert from_file[name].value == pytest.approx(expected, abs=1e-9)
        assert 0.1 < expected < 0.9
