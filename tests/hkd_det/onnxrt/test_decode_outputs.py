"""Decoding of each output format against scalar code, and input normalization."""

import math

import numpy as np
import pytest

from hkd_det.onnxrt.decoding import decode_outputs
from hkd_det.onnxrt.model_config import OnnxModelConfig, OutputFormat, normalize_input

INPUT_HW = (64, 96)
PERSON = 2
Rows = list[tuple[float, ...]]


def decode(
    output_format: OutputFormat, *arrays: np.ndarray, names: tuple[str, ...] = ("output",), **changes: object
) -> list[Rows]:
    """Per image, rows of x1, y1, x2, y2, score."""
    values = {"person_class_id": PERSON, "conf": 0.1, "iou": 1.0, **changes}
    config = OnnxModelConfig(output_format, **values)  # type: ignore[arg-type]  # values of several types
    decoded = decode_outputs(dict(zip(names, arrays, strict=True)), config, INPUT_HW)
    return [
        [(*box, score) for box, score in zip(boxes.tolist(), scores.tolist(), strict=True)] for boxes, scores in decoded
    ]


def test_yolox_equals_scalar_decoding() -> None:
    """Cells in the order of levels, rows and columns."""
    raw = np.random.default_rng(0).normal(size=(2, 126, 5 + 4)).astype(np.float32)
    raw[..., 4:] = 1 / (1 + np.exp(-raw[..., 4:]))
    expected: list[Rows] = []
    for image in raw.astype(np.float64):
        rows, anchor = [], 0
        for stride in (8, 16, 32):
            for row in range(INPUT_HW[0] // stride):
                for column in range(INPUT_HW[1] // stride):
                    x, y, width, height, objectness, *classes = image[anchor]
                    x, y = (x + column) * stride, (y + row) * stride
                    width, height = math.exp(width) * stride, math.exp(height) * stride
                    score = objectness * classes[PERSON]
                    if score >= 0.1:
                        rows.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2, score))
                    anchor += 1
        assert anchor == 126
        expected.append(sorted(rows, key=lambda values: -values[-1]))
    for actual_rows, expected_rows in zip(decode("yolox-raw", raw), expected, strict=True):
        assert 20 < len(expected_rows) < 126
        np.testing.assert_allclose(actual_rows, expected_rows, rtol=1e-4, atol=1e-3)


def make_gfl_rows(classes: np.ndarray, bins: np.ndarray) -> Rows:
    """Decode one image of a GFL head with four distances per side and the anchor points in the cell centers."""
    rows, anchor = [], 0
    for stride in (16, 64):
        for row in range(math.ceil(INPUT_HW[0] / stride)):
            for column in range(math.ceil(INPUT_HW[1] / stride)):
                sides = []
                for logits in bins[anchor].reshape(4, 4).tolist():
                    weights = [math.exp(logit) for logit in logits]
                    sides.append(stride * sum(i * weight for i, weight in enumerate(weights)) / sum(weights))
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                left, top, right, bottom = sides
                score = 1 / (1 + math.exp(-classes[anchor, PERSON]))
                if score >= 0.1:
                    rows.append((x - left, y - top, x + right, y + bottom, score))
                anchor += 1
    assert anchor == len(classes)
    return sorted(rows, key=lambda values: -values[-1])


@pytest.mark.parametrize("is_one_output", [True, False])
def test_gfl_equals_scalar_decoding(is_one_output: bool) -> None:
    """96 pixels are one and a half cells of stride 64, which the network rounds up to two."""
    rng = np.random.default_rng(0)
    classes, bins = rng.normal(-1, 1, (2, 26, 3)).astype(np.float32), rng.normal(0, 2, (2, 26, 16)).astype(np.float32)
    expected = [make_gfl_rows(*image) for image in zip(classes, bins, strict=True)]
    arrays = [np.concatenate([classes, bins], 2)] if is_one_output else [*_split(classes), *_split(bins)]
    names = tuple(f"output{number}" for number in range(len(arrays)))
    values = {"strides": (16, 64), "num_bins": 4, "score_activation": "sigmoid"}
    decoded = decode("gfl-raw", *arrays, names=names, **values)
    for actual_rows, expected_rows in zip(decoded, expected, strict=True):
        assert 10 < len(expected_rows) < 26
        np.testing.assert_allclose(actual_rows, expected_rows, rtol=1e-4, atol=1e-3)


def _split(values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, [24], axis=1)  # 4 x 6 cells of stride 16, 1 x 2 cells of stride 64


def test_gfl_point_offset_and_scores_without_activation() -> None:
    raw = np.zeros((1, 24, 3 + 16), np.float32)
    raw[0, 7, PERSON] = 0.5  # second row, second column; equal logits give a distance of 1.5 strides
    (row,) = decode("gfl-raw", raw, strides=(16,), num_bins=4, point_offset=0.0)[0]
    assert row == pytest.approx((16 - 24, 16 - 24, 16 + 24, 16 + 24, 0.5))


def test_fastestdet_equals_scalar_decoding() -> None:
    raw = np.random.default_rng(0).normal(0.3, 0.5, (2, 5 + 4, 4, 6)).astype(np.float32)
    decoded = decode("fastestdet-raw", raw)
    for image, actual_rows in zip(raw.tolist(), decoded, strict=True):
        expected = []
        for row in range(4):
            for column in range(6):
                objectness, x, y, width, height, *classes = (channel[row][column] for channel in image)
                x, y = (column + math.tanh(x)) / 6 * INPUT_HW[1], (row + math.tanh(y)) / 4 * INPUT_HW[0]
                width, height = INPUT_HW[1] / (1 + math.exp(-width)), INPUT_HW[0] / (1 + math.exp(-height))
                score = min(max(objectness, 0), 1) ** 0.6 * min(max(classes[PERSON], 0), 1) ** 0.4
                if score >= 0.1:
                    expected.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2, score))
        assert 5 < len(expected) < 24
        expected.sort(key=lambda values: -values[-1])
        np.testing.assert_allclose(actual_rows, expected, rtol=1e-4, atol=1e-3)


def test_yolo_raw_has_detections_in_columns() -> None:
    columns = [[50, 40, 20, 30, 0.1, 0.2, 0.9], [10, 20, 4, 8, 0.8, 0.9, 0.05], [30, 30, 10, 10, 0, 0, 0.95]]
    raw = np.array([columns], np.float32).transpose(0, 2, 1)
    first, second = decode("yolo-raw", raw)[0]
    assert first == pytest.approx((25, 25, 35, 35, 0.95)) and second == pytest.approx((40, 25, 60, 55, 0.9))


def test_final_detections_are_kept_except_other_classes() -> None:
    rows = [[1, 2, 30, 40, 0.5, PERSON], [1, 2, 31, 41, 0.4, PERSON], [5, 5, 9, 9, 0.9, 0], [0, 0, 3, 3, 0.05, PERSON]]
    expected = [(1, 2, 30, 40, 0.5), (1, 2, 31, 41, pytest.approx(0.4))]  # overlapping, but without NMS
    assert decode("yolo-e2e", np.array([rows], np.float32)) == [expected]
    boxes, scores, labels = np.split(np.array([rows], np.float32), (4, 5), axis=2)
    names = ("scores", "labels", "boxes")  # outputs are selected by name, not by order
    assert decode("boxes-scores", scores[..., 0], labels[..., 0], boxes, names=names) == [expected]
    without_labels = decode("boxes-scores", boxes, scores[..., 0], names=("boxes", "scores"))
    assert [row[-1] for row in without_labels[0]] == pytest.approx([0.9, 0.5, 0.4])


def test_iou_of_the_config_is_the_nms_threshold() -> None:
    columns = [[50, 40, 20, 30, 0, 0, 0.9], [52, 40, 20, 30, 0, 0, 0.8]]  # IoU 18 / 22
    raw = np.array([columns], np.float32).transpose(0, 2, 1)
    assert [len(decode("yolo-raw", raw, iou=iou)[0]) for iou in (0.8, 0.83)] == [1, 2]


def test_score_zero_is_dropped_even_at_conf_zero() -> None:
    raw = np.zeros((1, 5, 6), np.float32)
    assert decode("yolo-e2e", raw, conf=0.0, person_class_id=0) == [[]]


@pytest.mark.parametrize(
    ("output_format", "shape", "match"),
    [
        ("yolox-raw", (1, 100, 9), "expected 126 anchor points .*, got 100"),
        ("yolox-raw", (1, 126, 7), "has 2 classes"),
        ("yolo-raw", (1, 6, 126), "has 2 classes"),
        ("yolo-e2e", (1, 5, 7), r"\[B, N, 6\], got \[1, 5, 7\]"),
        ("yolo-e2e", (5, 6), "3 dimensions"),
        ("gfl-raw", (1, 126, 34), "has 2 classes"),
        ("gfl-raw", (1, 125, 35), "expected 126 anchor points .*, got 125"),
        ("gfl-raw", (126, 35), r"expected one output \[B, A, classes \+ 32\], or 3 outputs"),
        ("fastestdet-raw", (1, 7, 4, 6), "has 2 classes"),
        ("fastestdet-raw", (1, 126, 9), "4 dimensions"),
        ("boxes-scores", (1, 5, 4), "outputs boxes and scores, got output"),
    ],
)
def test_output_of_another_shape_is_rejected(output_format: OutputFormat, shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        decode(output_format, np.zeros(shape, np.float32))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("color_order", ["rgb", "bgr"])
def test_input_follows_the_config_pixel_by_pixel(layout: str, color_order: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3)).astype(np.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    config = OnnxModelConfig("yolo-raw", layout=layout, color_order=color_order, input_scale=1.0, mean=mean, std=std)  # type: ignore[arg-type]  # str parameters
    batch = normalize_input(images, config, np.float32)
    assert batch.dtype == np.float32 and batch.flags.c_contiguous
    for b, y, x, c in np.ndindex(images.shape):
        channel = c if color_order == "rgb" else 2 - c
        index = (b, channel, y, x) if layout == "NCHW" else (b, y, x, channel)
        assert batch[index] == pytest.approx((images[b, y, x, c] / 255 - mean[channel]) / std[channel], rel=1e-5)


def test_uint8_input_stays_unchanged() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 3)).astype(np.uint8)
    batch = normalize_input(images, OnnxModelConfig("boxes-scores", layout="NHWC"), np.uint8)
    assert batch.dtype == np.uint8 and np.array_equal(batch, images)
