"""The detector in a Python program: opened without `with`, with files and PIL images, BGR arrays and `conf`."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from hkd_deploy import open_detector
from hkd_deploy.backends import base
from hkd_deploy.backends.onnxruntime import OnnxRuntimeBackend
from hkd_det.draw import draw_detections
from hkd_det.errors import DataError, UsageError
from hkd_det.structures import Detections

SIZE_HW = (96, 160)


def make_image(box_xyxy: tuple[int, int, int, int], rgb: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Return a black image with one bright box, which the tiny model detects."""
    x1, y1, x2, y2 = box_xyxy
    image = np.zeros((*SIZE_HW, 3), np.uint8)
    image[y1:y2, x1:x2] = rgb
    return image


def count_closed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that receives the path of each closed model."""
    closed: list[Path] = []
    close = OnnxRuntimeBackend.close
    monkeypatch.setattr(OnnxRuntimeBackend, "close", lambda self: (closed.append(self.path), close(self))[1])
    return closed


def test_detector_works_without_with(tiny_onnx: Callable[..., Path]) -> None:
    detector = open_detector(str(tiny_onnx()))
    assert detector(make_image((30, 10, 50, 90))).boxes_xyxy.tolist() == [[30, 10, 50, 90]]
    detector.close()
    detector.close()
    with pytest.raises(ValueError, match="the model is closed"):
        detector(make_image((30, 10, 50, 90)))


@pytest.mark.slow
def test_detector_is_closed_once(tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By `close`, at the end of a block, or when the program releases the detector."""
    path, closed = tiny_onnx(), count_closed(monkeypatch)
    with open_detector(path) as detector:
        assert closed == []
    assert closed == [path]
    del detector
    detector = open_detector(path)
    detector.close()
    assert closed == [path] * 2
    detector = open_detector(path)
    reference = weakref.ref(detector)
    del detector
    gc.collect()
    assert reference() is None and closed == [path] * 3


def test_failed_open_closes_the_model(tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, closed = tiny_onnx(changes={"imgsz": "[160, 96]"}), count_closed(monkeypatch)
    with pytest.raises(DataError, match="in the metadata"):
        open_detector(path)
    assert closed == [path]


def test_missing_model_names_shipped_models() -> None:
    with pytest.raises(DataError, match=r"^hkd-cpuu: no such model file\. .*: hkd-cpu\.$"):
        open_detector("hkd-cpuu")


def test_array_file_and_pil_image_are_equal(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    box, color = (30, 10, 50, 90), (255, 220, 200)
    image = make_image(box, color)
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    detector = open_detector(tiny_onnx())
    expected = detector(image)
    assert expected.boxes_xyxy.tolist() == [list(box)]
    assert expected.scores.tolist() == pytest.approx([20 * 80 / (96 * 160)])  # mean of red
    for same in (path, str(path), Image.open(path), Image.open(path).convert("RGBA")):
        detections = detector(same)
        assert np.array_equal(detections.boxes_xyxy, expected.boxes_xyxy)
        assert np.array_equal(detections.scores, expected.scores)
    mixed = [image, path, str(path), Image.open(path)]
    assert [one.scores.tolist() for one in detector(mixed)] == [expected.scores.tolist()] * 4
    assert [one.scores.tolist() for one in detector(tuple(mixed))] == [expected.scores.tolist()] * 4


def test_bgr_array_of_opencv(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image((0, 0, 160, 96), (255, 200, 160))
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    detector = open_detector(tiny_onnx())
    assert detector(image).scores.tolist() == pytest.approx([1])
    assert detector(cv2.imread(str(path))).scores.tolist() == pytest.approx([160 / 255])  # read as RGB
    assert detector(cv2.imread(str(path)), bgr=True).scores.tolist() == pytest.approx([1])
    results = detector([cv2.imread(str(path)), path, Image.open(path)], bgr=True)
    assert [one.scores.tolist() for one in results] == [pytest.approx([1])] * 3


def test_conf_is_an_inclusive_minimum(tiny_onnx: Callable[..., Path]) -> None:
    detector = open_detector(tiny_onnx())
    image = make_image((0, 0, 80, 96))  # score 0.5
    assert [len(detector(image, conf=conf)) for conf in (None, 0.0, 0.5, 0.51)] == [1, 1, 1, 0]
    assert [len(one) for one in detector([image, make_image((0, 0, 160, 96))], conf=0.6)] == [0, 1]
    with pytest.raises(UsageError, match=r"^conf: expected 0 to 1, got 30\.$"):
        detector(image, conf=30)


def test_files_of_a_list_are_read_in_parts(
    tiny_onnx: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = [(x, 5, x + 30, 60) for x in range(0, 70, 10)]
    paths = [tmp_path / f"{index}.png" for index in range(len(boxes))]
    for path, box in zip(paths, boxes, strict=True):
        Image.fromarray(make_image(box)).save(path)
    monkeypatch.setattr(base, "MAX_LOADED_FILES", 3)
    detector = open_detector(tiny_onnx())
    num_images: list[int] = []
    predict = detector.predict_batches
    monkeypatch.setattr(
        detector, "predict_batches", lambda images: (num_images.append(len(images)), predict(images))[1]
    )
    assert [one.boxes_xyxy.tolist() for one in detector(paths)] == [[list(box)] for box in boxes]
    assert num_images == [3, 3, 1]
    with pytest.raises(DataError, match=r"none\.png: no such image file"):
        detector([*paths, tmp_path / "none.png"])


def test_plot_needs_no_image_that_is_known(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image((30, 10, 50, 90))
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    detector = open_detector(tiny_onnx())
    expected = draw_detections(image, detector(image))
    for source in (image, path, Image.open(path)):
        assert np.array_equal(detector(source).plot(source), expected)
    assert np.array_equal(detector(path).plot(), expected) and np.array_equal(detector(image).plot(), expected)
    first, second = detector([path, image], conf=0.01)
    assert np.array_equal(first.plot(), expected) and np.array_equal(second.plot(), expected)


@pytest.mark.parametrize(("value", "expected"), [(None, 0.3), ("0.42", 0.42)])
def test_default_conf_is_that_of_the_file(tiny_onnx: Callable[..., Path], value: str | None, expected: float) -> None:
    detector = open_detector(tiny_onnx(changes={"hkd.conf": value}))
    assert detector.default_conf == expected
    assert detector.metadata.conf == (None if value is None else expected)


@pytest.mark.parametrize("value", ["high", "1.5", "nan"])
def test_wrong_suggested_conf_is_an_error(tiny_onnx: Callable[..., Path], value: str) -> None:
    with pytest.raises(DataError, match=r"tiny\.onnx: metadata hkd\.conf: invalid value"):
        open_detector(tiny_onnx(changes={"hkd.conf": value}))


# The code of a notebook cell: no `if __name__` guard, no `with`, and the detector still open at the end.
CELL = """
import sys
import numpy as np
from hkd_deploy import open_detector

detector = open_detector(sys.argv[1], threads=1, backend=sys.argv[2], performance_hint=sys.argv[3])
detections = detector([np.full((96, 160, 3), 255, np.uint8)] * 5)
print([len(one) for one in detections])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "hint"), [("onnxruntime", "latency"), ("openvino", "throughput")])
def test_program_may_end_without_close(tiny_onnx: Callable[..., Path], backend: str, hint: str) -> None:
    command = [sys.executable, "-W", "error", "-", str(tiny_onnx()), backend, hint]
    done = subprocess.run(command, input=CELL, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1, 1, 1, 1, 1]\n", "")


def test_wrong_array_in_a_list_raises(tiny_onnx: Callable[..., Path]) -> None:
    detector = open_detector(tiny_onnx())
    assert detector([]) == []
    with pytest.raises(ValueError, match="Pass a list of images"):
        detector(np.zeros((2, 96, 160, 3), np.uint8))
    with pytest.raises(ValueError, match="got list"):
        detector([[1, 2, 3]])  # type: ignore[list-item]
    assert isinstance(detector(make_image((0, 0, 5, 5))), Detections)
