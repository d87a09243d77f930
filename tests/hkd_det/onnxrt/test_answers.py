"""Foreign answers: decoding against literal scalar code, suppression against torchvision's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms as torchvision_nms

from hkd_det.boxes import nms
from hkd_det.onnxrt.detector import decode_outputs
from hkd_det.onnxrt.model_config import OnnxModelConfig, OutputFormat

INPUT_HW = (64, 96)
PERSON = 2
Rows = list[tuple[float, ...]]


def described(output: OutputFormat, **changes: float) -> OnnxModelConfig:
    return OnnxModelConfig(output, **{"person_class_id": PERSON, "conf": 0.1, "iou": 1.0, **changes})  # type: ignore[arg-type]


def said(
    output: OutputFormat, *arrays: np.ndarray, names: tuple[str, ...] = ("output",), **changes: float
) -> list[Rows]:
    """For each picture rows x1, y1, x2, y2, score."""
    found = decode_outputs(dict(zip(names, arrays, strict=True)), described(output, **changes), INPUT_HW)
    return [
        [(*box, score) for box, score in zip(boxes.tolist(), scores.tolist(), strict=True)] for boxes, scores in found
    ]


def test_yolox_is_decoded_as_its_authors_do() -> None:
    """Cell by cell, in the order of levels, rows and columns; every number by plain arithmetic."""
    raw = np.random.default_rng(0).normal(size=(2, 126, 5 + 4)).astype(np.float32)
    raw[..., 4:] = 1 / (1 + np.exp(-raw[..., 4:]))
    expected: list[Rows] = []
    for picture in raw.astype(np.float64):
        rows, point = [], 0
        for stride in (8, 16, 32):
            for row in range(INPUT_HW[0] // stride):
                for column in range(INPUT_HW[1] // stride):
                    x, y, width, height, objectness, *classes = picture[point]
                    x, y = (x + column) * stride, (y + row) * stride
                    width, height = math.exp(width) * stride, math.exp(height) * stride
                    score = objectness * classes[PERSON]
                    if score >= 0.1:
                        rows.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2, score))
                    point += 1
        assert point == 126
        expected.append(sorted(rows, key=lambda one: -one[-1]))
    for mine, theirs in zip(said("yolox-raw", raw), expected, strict=True):
        assert 20 < len(theirs) < 126
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-3)


def test_yolo_raw_has_its_answers_in_columns() -> None:
    columns = [[50, 40, 20, 30, 0.1, 0.2, 0.9], [10, 20, 4, 8, 0.8, 0.9, 0.05], [30, 30, 10, 10, 0, 0, 0.95]]
    raw = np.array([columns], np.float32).transpose(0, 2, 1)
    first, second = said("yolo-raw", raw)[0]
    assert first == pytest.approx((25, 25, 35, 35, 0.95)) and second == pytest.approx((40, 25, 60, 55, 0.9))


def test_finished_detections_are_taken_as_they_are_save_other_classes() -> None:
    rows = [[1, 2, 30, 40, 0.5, PERSON], [1, 2, 31, 41, 0.4, PERSON], [5, 5, 9, 9, 0.9, 0], [0, 0, 3, 3, 0.05, PERSON]]
    wanted = [(1, 2, 30, 40, 0.5), (1, 2, 31, 41, pytest.approx(0.4))]  # they overlap: nobody is suppressed here
    assert said("yolo-e2e", np.array([rows], np.float32)) == [wanted]
    boxes, scores, labels = np.split(np.array([rows], np.float32), (4, 5), axis=2)
    names = ("scores", "labels", "boxes")  # outputs go by their names, not by their order
    assert said("boxes-scores", scores[..., 0], labels[..., 0], boxes, names=names) == [wanted]
    without = said("boxes-scores", boxes, scores[..., 0], names=("boxes", "scores"))
    assert [row[-1] for row in without[0]] == pytest.approx([0.9, 0.5, 0.4])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(0, 40), st.floats(0.05, 0.95))
def test_suppression_keeps_whom_torchvision_keeps(seed: int, count: int, iou: float) -> None:
    chance = np.random.default_rng(seed)
    corner = chance.uniform(0, 40, (count, 2))
    boxes = np.concatenate([corner, corner + chance.uniform(5, 40, (count, 2))], 1)
    falling = torch.arange(count, 0, -1, dtype=torch.float64)
    assert nms(boxes, iou).tolist() == torchvision_nms(torch.from_numpy(boxes), falling, iou).tolist()


def test_the_description_s_overlap_decides_who_is_suppressed() -> None:
    columns = [[50, 40, 20, 30, 0, 0, 0.9], [52, 40, 20, 30, 0, 0, 0.8]]  # IoU 18 / 22
    raw = np.array([columns], np.float32).transpose(0, 2, 1)
    assert [len(said("yolo-raw", raw, iou=iou)[0]) for iou in (0.8, 0.83)] == [1, 2]


def test_no_answer_of_score_zero_comes_through_even_where_every_score_counts() -> None:
    raw = np.zeros((1, 5, 6), np.float32)
    assert said("yolo-e2e", raw, conf=0.0, person_class_id=0) == [[]]


@pytest.mark.parametrize(
    ("output", "shape", "match"),
    [
        ("yolox-raw", (1, 100, 9), "100 points where strides .* have 126"),
        ("yolox-raw", (1, 126, 7), "has 2 classes"),
        ("yolo-raw", (1, 6, 126), "has 2 classes"),
        ("yolo-e2e", (1, 5, 7), r"\[B, N, 6\], found \[1, 5, 7\]"),
        ("yolo-e2e", (5, 6), "3 dimensions"),
        ("boxes-scores", (1, 5, 4), "outputs boxes and scores, found output"),
    ],
)
def test_other_shapes_than_described_are_told(output: OutputFormat, shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        said(output, np.zeros(shape, np.float32))
