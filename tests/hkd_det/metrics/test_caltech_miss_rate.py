"""Tests of both Caltech protocols against a second implementation and closed forms."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_det.metrics.caltech import SETUPS, AnnotationVersion, evaluate, standardize_aspect_ratio
from hkd_det.metrics.tables import DetectionTable, GroundTruthTable

spec = importlib.util.spec_from_file_location("official_caltech", Path(__file__).with_name("official_caltech.py"))
assert spec is not None and spec.loader is not None
official = importlib.util.module_from_spec(spec)
sys.modules["official_caltech"] = official
spec.loader.exec_module(official)

ImageData = tuple[list[dict[str, Any]], list[list[float]]]

# Heights and borders at the limits of the ranges; boxes on a coarse grid, which gives overlaps of 0.5 and ties.
heights = st.sampled_from([19, 20, 24, 29, 30, 40, 49, 50, 62.5, 79, 80, 99, 100, 130, 50 * (1 / 1.5)])
boxes = st.tuples(
    st.sampled_from([3, 5, 10, 20, 25, 30.5, 600, 615]),
    st.sampled_from([4, 5, 10, 300, 375, 395, 425.5]),
    st.sampled_from([8, 10, 20, 20.5, 25, 33, 41]),
    heights,
).map(list)


def visible_box(box: list[float], kind: int) -> list[float]:
    x, y, width, height = box
    return [[0, 0, 0, 0], box, [x, y, width, height * 0.65], [x, y, width, height * 0.2], [x, y, width / 2, height]][
        kind
    ]


objects = st.builds(
    lambda label, box, kind, occluded, ignore: {
        "lbl": label,
        "bb": box,
        "bbv": visible_box(box, kind),
        "occ": occluded,
        "ign": ignore,
    },
    st.sampled_from(["person", "person", "person", "person?", "people", "ignore"]),
    boxes,
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from([False, False, False, True]),
)
detections = st.tuples(boxes, st.sampled_from([-1.5, 0.1, 0.5, 2, 37.25])).map(lambda pair: [*pair[0], pair[1]])
images = st.lists(st.tuples(st.lists(objects, max_size=6), st.lists(detections, max_size=9)), min_size=1, max_size=8)


def tables(data: list[ImageData], version: AnnotationVersion) -> tuple[GroundTruthTable, DetectionTable]:
    annotations = [(index, one) for index, (some, _) in enumerate(data) for one in some]
    dt = [(index, row) for index, (_, rows) in enumerate(data) for row in rows]
    box = np.array([one["bb"] for _, one in annotations], np.float64).reshape(-1, 4)
    visible = np.array([one["bbv"] for _, one in annotations], np.float64).reshape(-1, 4)
    occluded = np.array([one["occ"] for _, one in annotations], bool)
    ratio = visible[:, 2] * visible[:, 3] / (box[:, 2] * box[:, 3])
    label = np.array([one["lbl"] for _, one in annotations], str)
    if version is AnnotationVersion.ORIGINAL:
        visible_ratio, ignore = np.where((visible == 0).all(1), np.inf, ratio), label != "person"
    else:
        occluded_ratio = np.where((visible == box).all(1), 0.0, ratio)
        visible_ratio = np.where(~occluded | (visible == 0).all(1), 1.0, occluded_ratio)
        ignore = np.array([one["ign"] for _, one in annotations], bool) | (label == "ignore")
    rows = np.array([row for _, row in dt], np.float64).reshape(-1, 5)
    image_index = np.array([index for index, _ in annotations], np.intp)
    return (
        GroundTruthTable(len(data), image_index, box, box[:, 3], visible_ratio, ignore),
        DetectionTable.from_rows(np.array([index for index, _ in dt], np.intp), rows[:, :4], rows[:, 4]),
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(images, st.sampled_from(list(AnnotationVersion)))
def test_evaluate_equals_second_implementation(data: list[ImageData], version: AnnotationVersion) -> None:
    results = evaluate(*tables(data, version), version)
    for name, setup in SETUPS.items():
        expected = official.miss_rate(
            data,
            version.value,
            setup.height_px,
            setup.visible_ratio,
            setup.aspect_deviation,
            setup.iou_threshold,
            setup.height_margin,
        )
        assert abs(results[name].value - expected) < 1e-9, name


def person(x: float, height: float = 100, label: str = "person") -> dict[str, Any]:
    return {"lbl": label, "bb": [x, 50, height * 0.41, height], "bbv": [0, 0, 0, 0], "occ": False, "ign": False}


def value(data: list[ImageData], version: AnnotationVersion, setup: str = "Reasonable") -> float:
    return evaluate(*tables(data, version), version, [SETUPS[setup]])[setup].value


@pytest.mark.parametrize("version", list(AnnotationVersion))
def test_evaluate_closed_forms(version: AnnotationVersion) -> None:
    tp, fp = [100, 50, 41, 100, 0.9], [300, 50, 41, 100, 0.5]
    assert value([([person(100)], [tp])], version) == 0
    assert value([([person(100)], [])], version) == 1
    assert value([([], [fp])], version) == -1
    # Two true positives for three boxes, then a false positive: the miss rate is 1/3 at every point.
    data: list[ImageData] = [([person(100)], [tp]), ([person(100)], [tp]), ([person(200)], [fp])]
    assert value(data, version) == pytest.approx(1 / 3, abs=1e-12)


def test_evaluate_before_curve_has_zero_recall() -> None:
    """A false positive has the highest score: FPPI is 1 from the start, so only the last point has a recall."""
    data: list[ImageData] = [([person(100), person(300)], [[500, 50, 41, 100, 0.9], [100, 50, 41, 100, 0.8]])]
    for version in AnnotationVersion:
        assert value(data, version) == pytest.approx(0.5 ** (1 / 9), abs=1e-12)


def test_evaluate_versions_differ_in_labels_and_widths() -> None:
    tp = [100, 50, 41, 100, 0.9]
    unsure: list[ImageData] = [([person(300), person(100, label="person?")], [tp])]
    assert value(unsure, AnnotationVersion.ORIGINAL) == 1  # ignored: neither a true nor a false positive
    assert value(unsure, AnnotationVersion.CORRECTED) == pytest.approx(0.5, abs=1e-12)  # a person: true positive
    wide = [60, 50, 121, 100, 0.9]  # same center, three times as wide: IoU 1 after reshaping
    assert value([([person(100)], [wide])], AnnotationVersion.ORIGINAL) == 0
    assert value([([person(100)], [wide])], AnnotationVersion.CORRECTED) == pytest.approx(1, abs=1e-12)
    edge: list[ImageData] = [([person(100, height=80)], [])]
    assert (
        value(edge, AnnotationVersion.ORIGINAL, "Scale=medium") == -1
        and value(edge, AnnotationVersion.CORRECTED, "Scale=medium") == 1
    )


def test_evaluate_prefiltered_applies_no_setup() -> None:
    """A box of visible ratio 0.1 at the border counts; the other box is ignored by the file."""
    ground_truth = GroundTruthTable(
        1,
        np.array([0, 0]),
        np.array([[1, 50, 41, 100], [300, 50, 41, 100]], np.float64),
        np.array([100.0, 100.0]),
        np.array([0.1, 1.0]),
        np.array([False, True]),
    )
    dt = DetectionTable.from_rows(
        np.zeros(2, np.intp), np.array([[1, 50, 41, 100], [300, 50, 41, 100]], np.float64), np.array([0.5, 0.9])
    )
    result = evaluate(ground_truth, dt, AnnotationVersion.CORRECTED, [SETUPS["Reasonable"]], is_prefiltered=True)[
        "Reasonable"
    ]
    assert (result.num_gt, result.value, result.fppi.tolist()) == (1, 0, [0])


def test_standardize_aspect_ratio_keeps_height_and_center() -> None:
    boxes = np.array([[10, 20, 30, 100], [0, 0, 41, 100]], np.float64)
    reshaped = standardize_aspect_ratio(boxes)
    assert reshaped[:, 2].tolist() == pytest.approx([41, 41]) and reshaped[:, 3].tolist() == [100, 100]
    assert (reshaped[:, 0] + reshaped[:, 2] / 2).tolist() == pytest.approx([25, 20.5])
