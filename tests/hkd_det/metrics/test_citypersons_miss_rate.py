"""CityPersons' miss rate against a literal second implementation, on anything and on the official val annotations."""

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

from hkd_det.boxes import xyxy_from_xywh
from hkd_det.datasets import GroundTruth
from hkd_det.datasets.citypersons import _read_mat_samples
from hkd_det.metrics.citypersons import REASONABLE, SETUPS, evaluate, match_image
from hkd_det.metrics.matching import MissRateResult
from hkd_det.metrics.tables import DetectionTable, GroundTruthTable
from hkd_det.structures import Detections

spec = importlib.util.spec_from_file_location("official", Path(__file__).with_name("official_citypersons.py"))
assert spec is not None and spec.loader is not None
official = importlib.util.module_from_spec(spec)
sys.modules["official"] = official
spec.loader.exec_module(official)

CITYPERSONS = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "citypersons"

Picture = tuple[list[dict[str, Any]], list[tuple[list[float], float]]]

# Whole pixels and few scores: overlaps of exactly a half, and ties, are what the details are about. Decimal fractions
# besides: a rounding in another order than the official one would show.
whole = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 60), st.integers(15, 160)).map(list)
tenths = whole.map(lambda box: [round(value * 1.1, 1) for value in box])
boxes = st.one_of(whole, tenths)
truths = st.fixed_dictionaries(
    {
        "bbox": boxes,
        "share": st.sampled_from([0.1, 0.3, 0.65, 0.7, 0.9, 1.0]),
        "ignore": st.booleans(),
        "more": st.sampled_from([0, 0, 0.5]),
    }
)
detections = st.tuples(boxes, st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]))
pictures = st.lists(st.tuples(st.lists(truths, max_size=6), st.lists(detections, max_size=9)), min_size=1, max_size=8)


def as_truth(records: list[dict[str, Any]]) -> GroundTruth:
    whole = np.array([record["bbox"] for record in records], np.float64).reshape(-1, 4)
    visible = np.array([record["vis_bbox"] for record in records], np.float64).reshape(-1, 4)
    return GroundTruth(
        xyxy_from_xywh(whole).astype(np.float32),
        np.array([bool(record["ignore"]) for record in records], bool),
        xyxy_from_xywh(visible).astype(np.float32),
        tuple("pedestrian" for _ in records),
    )


def as_detections(found: list[tuple[list[float], float]]) -> Detections:
    whole = np.array([box for box, _ in found], np.float64).reshape(-1, 4)
    return Detections(xyxy_from_xywh(whole).astype(np.float32), np.array([score for _, score in found], np.float32))


def completed(record: dict[str, Any]) -> dict[str, Any]:
    """With a visible box of whole pixels and the ratio that follows from it."""
    x, y, width, height = record["bbox"]
    seen = max(1, round(height * record["share"]))
    return {
        **record,
        "vis_bbox": [x, y, width, seen],
        "height": height + record.get("more", 0),
        "vis_ratio": seen / height,
    }


def tables(data: list[Picture]) -> tuple[GroundTruthTable, DetectionTable]:
    """As stored, in double precision: `height` and `vis_ratio` are the file's, not reckoned from the box."""
    records = [(number, record) for number, (truths, _) in enumerate(data) for record in truths]
    found = [(number, box, score) for number, (_, found) in enumerate(data) for box, score in found]
    truth = GroundTruthTable(
        len(data),
        np.array([number for number, _ in records], np.intp),
        np.array([record["bbox"] for _, record in records], np.float64).reshape(-1, 4),
        np.array([record["height"] for _, record in records], np.float64),
        np.array([record["vis_ratio"] for _, record in records], np.float64),
        np.array([bool(record["ignore"]) for _, record in records], bool),
    )
    return truth, DetectionTable.from_rows(
        np.array([number for number, _, _ in found], np.intp),
        np.array([box for _, box, _ in found], np.float64).reshape(-1, 4),
        np.array([score for _, _, score in found], np.float64),
    )


def both(data: list[Picture], strict: bool = False) -> list[tuple[float, float]]:
    ours = evaluate(*tables(data), zero_recall_before_curve=strict)
    return [
        (ours[name].value, official.miss_rate(data, setup.height_px, setup.visible_ratio, strict))
        for name, setup in SETUPS.items()
    ]


@settings(deadline=None, max_examples=300)
@given(pictures, st.booleans())
def test_equals_the_literal_program_on_anything(data: Any, strict: bool) -> None:
    data = [([completed(record) for record in records], found) for records, found in data]
    for ours, theirs in both(data, strict):
        assert abs(ours - theirs) < 1e-9


def test_more_than_a_thousand_detections_a_picture() -> None:
    """Of 1,500 the 1,000 best by score take part, counted before the height margin."""
    chance = np.random.default_rng(0)
    records = [completed({"bbox": [100 * i, 0, 40, 100], "share": 1.0, "ignore": False, "more": 0}) for i in range(8)]
    found = [
        ([int(x), 0, 40, int(height)], round(float(s), 2))
        for x, s, height in zip(
            chance.integers(0, 800, 1500), chance.random(1500), chance.choice([30, 95, 100], 1500), strict=True
        )
    ]
    for ours, theirs in both([(records, found), (records, [])]):
        assert abs(ours - theirs) < 1e-9
    all_of_them = evaluate(*tables([(records, found)]))["Reasonable"]
    assert len(all_of_them.scores) < sum(box[3] > 40 for box, _ in found) - 200


def judged(truths: list[GroundTruth], found: list[Detections]) -> MissRateResult:
    return evaluate(GroundTruthTable.from_samples(truths), DetectionTable.from_detections(found), [REASONABLE])[
        "Reasonable"
    ]


def test_closed_forms() -> None:
    person = completed({"bbox": [0, 0, 40, 100], "share": 1.0, "ignore": False})
    far_off = [500, 0, 40, 100]
    truth, hit, miss = as_truth([person]), as_detections([([0, 0, 40, 100], 0.9)]), as_detections([(far_off, 0.9)])
    assert judged([truth], [hit]).value == 0.0
    assert judged([truth], [Detections.empty()]).value == 1.0
    assert judged([truth], [miss]).value == 1.0
    assert judged([GroundTruth.empty()], [miss]).value == -1  # the official mark for nobody to be found
    # Two people, one found without a false alarm: a miss rate of a half at every point.
    assert judged([truth, truth], [hit, Detections.empty()]).value == pytest.approx(0.5, abs=1e-12)


def test_match_tells_hits_misses_and_what_is_ignored() -> None:
    person = completed({"bbox": [0, 0, 40, 100], "share": 1.0, "ignore": False})
    hidden = completed({"bbox": [100, 0, 40, 100], "share": 0.3, "ignore": False})
    other = completed({"bbox": [200, 0, 40, 100], "share": 1.0, "ignore": False})
    found = as_detections(
        [([0, 0, 40, 100], 0.9), ([100, 0, 40, 100], 0.8), ([400, 0, 40, 100], 0.7), ([0, 0, 10, 20], 0.6)]
    )
    result = match_image(as_truth([person, hidden, other]), found, REASONABLE)
    assert result.eval_indices.tolist() == [0, 1, 2] and result.match_status.tolist() == [1, -1, 0]
    assert result.matched_gt.tolist() == [0, 1, -1] and result.missed_gt.tolist() == [2]


def test_a_curve_that_begins_beyond_a_point_takes_its_last_recall_there() -> None:
    """Best detection false, the next right, in two pictures of one person each: FPPI is 0.5 throughout.

    The first seven points lie before the curve: the official program's index -1 gives them its last recall, and
    the two beyond see the same recall of a half.
    """
    person = completed({"bbox": [0, 0, 40, 100], "share": 1.0, "ignore": False})
    truth = as_truth([person])
    found = as_detections([([500, 0, 40, 100], 0.9), ([0, 0, 40, 100], 0.8)])
    result = judged([truth, truth], [found, Detections.empty()])
    assert result.fppi.tolist() == [0.5, 0.5] and result.miss_rate.tolist() == [1.0, 0.5]
    assert result.value == pytest.approx(0.5, abs=1e-12)
    # With one more false alarm at the end (FPPI 1) the last recall is still that half: not zero, not one.
    more = as_detections([([500, 0, 40, 100], 0.9), ([0, 0, 40, 100], 0.8), ([800, 0, 40, 100], 0.1)])
    assert judged([truth, truth], [more, Detections.empty()]).value == pytest.approx(0.5, abs=1e-12)
    # The strict reading has recall 0, a miss rate of 1, at the seven points: 0.5 ** (2 / 9) in the mean.
    tables_of = (
        GroundTruthTable.from_samples([truth, truth]),
        DetectionTable.from_detections([found, Detections.empty()]),
    )
    strict = evaluate(*tables_of, [REASONABLE], zero_recall_before_curve=True)["Reasonable"]
    assert strict.value == pytest.approx(0.5 ** (2 / 9), abs=1e-12)


def jittered(box: list[float], chance: np.random.Generator, whole_pixels: bool) -> list[float]:
    """The box moved and stretched by some 8 % of its sides; xywh whose corners are float32 numbers."""
    x, y, width, height = box
    shift = chance.normal(0, 0.08, 4) * [width, height, width, height]
    corners = np.array([x, y, x + width, y + height]) + (np.rint(shift) if whole_pixels else shift)
    corners[2:] = np.maximum(corners[2:], corners[:2] + 1)
    left, top, right, bottom = corners.astype(np.float32).astype(float).tolist()
    return [left, top, right - left, bottom - top]


@pytest.mark.parametrize("whole_pixels", [True, False])
@pytest.mark.skipif(not CITYPERSONS.is_dir(), reason="HKD_TEST_DATA is not set")
def test_our_reader_is_judged_as_the_official_ground_truth_file(whole_pixels: bool) -> None:
    """anno_val.mat through our reader and val_gt.json through the literal program: one miss rate."""
    content = json.loads((CITYPERSONS / "val_gt.json").read_text())
    by_picture: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for record in content["annotations"]:
        by_picture[record["image_id"]].append(record)
    chance = np.random.default_rng(0)
    data: list[Picture] = []
    for records in by_picture.values():
        found = [
            (jittered(record["bbox"], chance, whole_pixels), float(chance.random()))
            for record in records
            if chance.random() < 0.7
        ]
        found += [([int(chance.integers(0, 2000)), 400, 40, 98], float(chance.random() ** 2)) for _ in range(3)]
        data.append((records, [(box, float(np.float32(score))) for box, score in found]))
    samples = _read_mat_samples(CITYPERSONS / "anno_val.mat", CITYPERSONS)
    ours = [sample.ground_truth for sample in samples]
    values = evaluate(
        GroundTruthTable.from_samples(ours), DetectionTable.from_detections([as_detections(found) for _, found in data])
    )
    from_file = evaluate(*tables(data))
    for name, setup in SETUPS.items():
        theirs = official.miss_rate(data, setup.height_px, setup.visible_ratio)
        assert values[name].value == pytest.approx(theirs, abs=1e-9)
        assert from_file[name].value == pytest.approx(theirs, abs=1e-9)
        assert 0.1 < theirs < 0.9
