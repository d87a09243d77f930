"""Caltech's miss rate, old and new, against a literal second implementation and closed forms."""

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

Picture = tuple[list[dict[str, Any]], list[list[float]]]

# Heights and borders lie where the ranges end, boxes on a coarse grid so that they overlap by halves and tie.
heights = st.sampled_from([19, 20, 24, 29, 30, 40, 49, 50, 62.5, 79, 80, 99, 100, 130, 50 * (1 / 1.5)])
boxes = st.tuples(
    st.sampled_from([3, 5, 10, 20, 25, 30.5, 600, 615]),
    st.sampled_from([4, 5, 10, 300, 375, 395, 425.5]),
    st.sampled_from([8, 10, 20, 20.5, 25, 33, 41]),
    heights,
).map(list)


def visible(box: list[float], kind: int) -> list[float]:
    x, y, width, height = box
    return [[0, 0, 0, 0], box, [x, y, width, height * 0.65], [x, y, width, height * 0.2], [x, y, width / 2, height]][
        kind
    ]


objects = st.builds(
    lambda label, box, kind, occluded, ignore: {
        "lbl": label,
        "bb": box,
        "bbv": visible(box, kind),
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
pictures = st.lists(st.tuples(st.lists(objects, max_size=6), st.lists(detections, max_size=9)), min_size=1, max_size=8)


def tables(data: list[Picture], version: AnnotationVersion) -> tuple[GroundTruthTable, DetectionTable]:
    flat = [(number, one) for number, (some, _) in enumerate(data) for one in some]
    found = [(number, row) for number, (_, rows) in enumerate(data) for row in rows]
    box = np.array([one["bb"] for _, one in flat], np.float64).reshape(-1, 4)
    shown = np.array([one["bbv"] for _, one in flat], np.float64).reshape(-1, 4)
    occluded = np.array([one["occ"] for _, one in flat], bool)
    share = shown[:, 2] * shown[:, 3] / (box[:, 2] * box[:, 3])
    label = np.array([one["lbl"] for _, one in flat], str)
    if version is AnnotationVersion.ORIGINAL:
        visibility, ignore = np.where((shown == 0).all(1), np.inf, share), label != "person"
    else:
        hidden = np.where((shown == box).all(1), 0.0, share)
        visibility = np.where(~occluded | (shown == 0).all(1), 1.0, hidden)
        ignore = np.array([one["ign"] for _, one in flat], bool) | (label == "ignore")
    rows = np.array([row for _, row in found], np.float64).reshape(-1, 5)
    return (
        GroundTruthTable(len(data), np.array([n for n, _ in flat], np.intp), box, box[:, 3], visibility, ignore),
        DetectionTable.from_rows(np.array([n for n, _ in found], np.intp), rows[:, :4], rows[:, 4]),
    )


@settings(deadline=None, max_examples=200)
@given(pictures, st.sampled_from(list(AnnotationVersion)))
def test_equals_the_literal_program_on_anything(data: list[Picture], version: AnnotationVersion) -> None:
    ours = evaluate(*tables(data, version), version)
    for name, setup in SETUPS.items():
        theirs = official.miss_rate(
            data,
            version.value,
            setup.height_px,
            setup.visible_ratio,
            setup.aspect_deviation,
            setup.iou_threshold,
            setup.height_margin,
        )
        assert abs(ours[name].value - theirs) < 1e-9, name


def person(x: float, height: float = 100, label: str = "person") -> dict[str, Any]:
    return {"lbl": label, "bb": [x, 50, height * 0.41, height], "bbv": [0, 0, 0, 0], "occ": False, "ign": False}


def value(data: list[Picture], version: AnnotationVersion, setup: str = "Reasonable") -> float:
    return evaluate(*tables(data, version), version, [SETUPS[setup]])[setup].value


@pytest.mark.parametrize("version", list(AnnotationVersion))
def test_closed_forms(version: AnnotationVersion) -> None:
    hit, miss = [100, 50, 41, 100, 0.9], [300, 50, 41, 100, 0.5]
    assert value([([person(100)], [hit])], version) == 0
    assert value([([person(100)], [])], version) == 1
    assert value([([], [miss])], version) == -1
    # Two of three people found at once, the false alarm after them: a third is missed at every point.
    data: list[Picture] = [([person(100)], [hit]), ([person(100)], [hit]), ([person(200)], [miss])]
    assert value(data, version) == pytest.approx(1 / 3, abs=1e-12)


def test_a_curve_that_begins_beyond_a_point_has_recall_0_there() -> None:
    """The false alarm comes first: FPPI 1 from the start, so that only the last point sees the person found."""
    data: list[Picture] = [([person(100), person(300)], [[500, 50, 41, 100, 0.9], [100, 50, 41, 100, 0.8]])]
    for version in AnnotationVersion:
        assert value(data, version) == pytest.approx(0.5 ** (1 / 9), abs=1e-12)


def test_where_the_two_versions_differ() -> None:
    hit = [100, 50, 41, 100, 0.9]
    unsure: list[Picture] = [([person(300), person(100, label="person?")], [hit])]
    assert value(unsure, AnnotationVersion.ORIGINAL) == 1  # ignored: nobody found, no false alarm
    assert value(unsure, AnnotationVersion.CORRECTED) == pytest.approx(0.5, abs=1e-12)  # a person, found
    wide = [60, 50, 121, 100, 0.9]  # the same centre, three times as wide: reshaped it is a perfect hit
    assert value([([person(100)], [wide])], AnnotationVersion.ORIGINAL) == 0
    assert value([([person(100)], [wide])], AnnotationVersion.CORRECTED) == pytest.approx(1, abs=1e-12)
    edge: list[Picture] = [([person(100, height=80)], [])]
    assert (
        value(edge, AnnotationVersion.ORIGINAL, "Scale=medium") == -1
        and value(edge, AnnotationVersion.CORRECTED, "Scale=medium") == 1
    )


def test_truth_that_the_official_program_has_filtered_is_taken_as_it_is() -> None:
    """A person of 10 pixels at the border and an ignored one of 100: no setup is applied a second time."""
    truth = GroundTruthTable(
        1,
        np.array([0, 0]),
        np.array([[1, 50, 41, 100], [300, 50, 41, 100]], np.float64),
        np.array([100.0, 100.0]),
        np.array([0.1, 1.0]),
        np.array([False, True]),
    )
    found = DetectionTable.from_rows(
        np.zeros(2, np.intp), np.array([[1, 50, 41, 100], [300, 50, 41, 100]], np.float64), np.array([0.5, 0.9])
    )
    rate = evaluate(truth, found, AnnotationVersion.CORRECTED, [SETUPS["Reasonable"]], is_prefiltered=True)[
        "Reasonable"
    ]
    assert (rate.num_gt, rate.value, rate.fppi.tolist()) == (1, 0, [0])


def test_the_standard_aspect_keeps_height_and_centre() -> None:
    boxes = np.array([[10, 20, 30, 100], [0, 0, 41, 100]], np.float64)
    reshaped = standardize_aspect_ratio(boxes)
    assert reshaped[:, 2].tolist() == pytest.approx([41, 41]) and reshaped[:, 3].tolist() == [100, 100]
    assert (reshaped[:, 0] + reshaped[:, 2] / 2).tolist() == pytest.approx([25, 20.5])
