"""Box functions and detections, compared with counted pixels, torchvision and the plain arrays."""

import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import nms as torchvision_nms

from hkd_det.draw import draw_detections
from hkd_det.errors import UnavailableError, UsageError
from hkd_det.image import ImageReference
from hkd_det.structures import (
    Detection,
    Detections,
    GroundTruth,
    box_area,
    box_intersection,
    box_iou,
    nms,
    xywh_from_xyxy,
    xyxy_from_xywh,
)

RANDOM_BOXES = st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 20)] * 2).map(
    lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]]
)
BOXES = np.array([[0, 1, 20, 31], [2, 3, 12, 43], [5, 5, 30, 55]], np.float32)
SCORES = np.array([0.9, 0.5, 0.2], np.float32)
IMAGE = np.full((60, 40, 3), (10, 90, 200), np.uint8)


def draw_mask(box: list[int]) -> np.ndarray:
    mask = np.zeros((60, 60), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


@settings(deadline=None)
@given(st.lists(RANDOM_BOXES, min_size=1, max_size=4), st.lists(RANDOM_BOXES, min_size=1, max_size=4))
def test_overlaps_equal_counted_pixels(first: list[list[int]], second: list[list[int]]) -> None:
    boxes1, boxes2 = np.array(first, float), np.array(second, float)
    intersection, iou = box_intersection(boxes1, boxes2), box_iou(boxes1, boxes2)
    for i, box1 in enumerate(first):
        for j, box2 in enumerate(second):
            expected = int((draw_mask(box1) & draw_mask(box2)).sum())
            assert intersection[i, j] == expected
            assert iou[i, j] == pytest.approx(expected / (draw_mask(box1) | draw_mask(box2)).sum())
    np.testing.assert_array_equal(xyxy_from_xywh(xywh_from_xyxy(boxes1)), boxes1)


def test_empty_and_inverted_boxes_have_no_area() -> None:
    no_boxes = np.zeros((0, 4))
    assert box_iou(no_boxes, no_boxes).shape == (0, 0)
    assert box_area(np.array([[5.0, 5.0, 1.0, 9.0]])).tolist() == [0]
    point = np.array([[3.0, 3.0, 3.0, 3.0]])
    assert box_iou(point, point).tolist() == [[0]]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(0, 40), st.floats(0.05, 0.95))
def test_nms_equals_torchvision(seed: int, count: int, iou_threshold: float) -> None:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 40, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (count, 2))], 1)
    scores = torch.arange(count, 0, -1, dtype=torch.float64)
    expected = torchvision_nms(torch.from_numpy(boxes), scores, iou_threshold)
    assert nms(boxes, iou_threshold).tolist() == expected.tolist()


def test_detections_are_sorted_by_score() -> None:
    detections = Detections(np.arange(12, dtype=np.float64).reshape(3, 4), np.array([0.1, 0.9, 0.5]))
    np.testing.assert_allclose(detections.scores, [0.9, 0.5, 0.1])
    assert detections.boxes_xyxy[0].tolist() == [4, 5, 6, 7] and detections.boxes_xyxy.dtype == np.float32
    assert len(detections.filter(0.5)) == 2 and len(Detections.empty()) == 0


def test_arrays_of_different_lengths_are_rejected() -> None:
    with pytest.raises(ValueError, match="2 boxes but 1 scores"):
        Detections(np.zeros((2, 4)), np.zeros(1))
    boxes = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="2 labels"):
        GroundTruth(boxes, np.zeros(1, bool), boxes, ("person", "person"))


@pytest.fixture
def detections() -> Detections:
    return Detections(BOXES, SCORES)


def test_iteration_gives_box_and_score(detections: Detections) -> None:
    pairs = [(box.tolist(), score) for box, score in detections]
    assert pairs == list(zip(BOXES.tolist(), SCORES.tolist(), strict=True))
    assert list(Detections.empty()) == []
    assert all(isinstance(row, Detection) and isinstance(row.score, float) for row in detections)


def test_integer_index_is_one_detection(detections: Detections) -> None:
    for index in (0, 2, -1, np.int64(1)):
        assert detections[index].box_xyxy.tolist() == BOXES[index].tolist()
        assert detections[index].score == SCORES[index]
    with pytest.raises(IndexError):
        detections[3]
    with pytest.raises(TypeError):
        detections["0"]  # type: ignore[call-overload]


@given(
    st.one_of(
        st.slices(3),
        st.lists(st.booleans(), min_size=3, max_size=3),
        st.lists(st.integers(-3, 2), unique=True, max_size=3),
    )
)
def test_slice_or_mask_selects_rows(index: slice | list[bool] | list[int]) -> None:
    """The same rows as of the arrays, in the order of their scores."""
    expected = sorted(np.arange(3)[np.array(index, int) if index == [] else index].tolist())
    selected = Detections(BOXES, SCORES)[index]
    assert selected.boxes_xyxy.tolist() == BOXES[expected].tolist()
    assert selected.scores.tolist() == SCORES[expected].tolist()


def test_mask_of_boxes_or_scores(detections: Detections) -> None:
    tall = detections[detections.boxes_xyxy[:, 3] - detections.boxes_xyxy[:, 1] >= 40]
    assert tall.scores.tolist() == SCORES[1:].tolist()
    assert detections.filter(0.5).scores.tolist() == SCORES[:2].tolist()  # inclusive
    assert len(detections.filter(0.95)) == 0
    with pytest.raises(IndexError):
        detections[np.array([True])]


def test_dict_and_json_restore_the_detections(detections: Detections) -> None:
    values = detections.to_dict()
    assert values == {"boxes_xyxy": BOXES.tolist(), "scores": SCORES.tolist()}
    assert json.loads(detections.to_json()) == values
    restored = Detections(**json.loads(detections.to_json()))
    assert np.array_equal(restored.boxes_xyxy, BOXES) and np.array_equal(restored.scores, SCORES)
    assert len(Detections(**json.loads(Detections.empty().to_json()))) == 0


def test_pickle_leaves_out_the_image() -> None:
    restored = pickle.loads(pickle.dumps(Detections(BOXES, SCORES, ImageReference(IMAGE, False))))
    assert np.array_equal(restored.boxes_xyxy, BOXES) and restored.source is None


def test_to_supervision_names_the_install_command(detections: Detections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UnavailableError, match=r"supervision: .*\. Run pip install supervision\.$"):
        detections.to_supervision()


def test_to_supervision_passes_its_fields(detections: Detections, monkeypatch: pytest.MonkeyPatch) -> None:
    """`supervision.Detections` takes these keywords; the test below runs the package if it is installed."""
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    converted = detections.to_supervision()
    assert np.array_equal(converted.xyxy, BOXES) and np.array_equal(converted.confidence, SCORES)
    assert converted.class_id.tolist() == [0, 0, 0] and converted.data["class_name"].tolist() == ["person"] * 3


def test_supervision_annotates(detections: Detections) -> None:
    supervision = pytest.importorskip("supervision")
    converted = detections.to_supervision()
    assert len(converted[converted.confidence > 0.3]) == 2 and len(Detections.empty().to_supervision()) == 0
    annotated = supervision.BoxAnnotator().annotate(IMAGE.copy(), converted)
    assert (annotated != IMAGE).any()


def test_plot_draws_on_a_copy(detections: Detections, tmp_path: Path) -> None:
    before, expected = IMAGE.copy(), draw_detections(IMAGE, detections)
    assert np.array_equal(detections.plot(IMAGE), expected) and np.array_equal(IMAGE, before)
    assert (expected != IMAGE).any()
    path = tmp_path / "image.png"
    Image.fromarray(IMAGE).save(path)
    for image in (path, str(path), Image.open(path)):
        assert np.array_equal(detections.plot(image), expected)
        assert np.array_equal(detections.plot(image, bgr=True), expected)  # RGB: not an array
    bgr = np.ascontiguousarray(IMAGE[..., ::-1])
    assert np.array_equal(detections.plot(bgr, bgr=True), expected[..., ::-1])
    plain = draw_detections(IMAGE, detections, show_scores=False)
    assert np.array_equal(detections.plot(IMAGE, show_scores=False), plain)


def test_plot_uses_the_image_of_the_detector() -> None:
    image = IMAGE.copy()
    expected = draw_detections(IMAGE, Detections(BOXES, SCORES).filter(0.4))
    detections = Detections(BOXES, SCORES, ImageReference(image, False))
    assert np.array_equal(detections.filter(0.4).plot(), expected)
    assert np.array_equal(detections[:2].plot(), expected)
    as_bgr = Detections(BOXES, SCORES, ImageReference(image, True))
    assert np.array_equal(as_bgr.plot(), draw_detections(IMAGE[..., ::-1], as_bgr)[..., ::-1])
    del image
    for lost in (detections, Detections(BOXES, SCORES)):
        with pytest.raises(UsageError, match=r"not in memory\. Pass it: detections\.plot\(image\)\."):
            lost.plot()
