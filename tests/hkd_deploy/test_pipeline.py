"""Tests of the pipeline: boxes are in image pixels for any image size."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_deploy import open_detector
from hkd_deploy.backends import OpenedBackend
from hkd_deploy.backends.base import Backend, RuntimeOutputs
from hkd_deploy.backends.onnxruntime import open_onnx_runtime
from hkd_deploy.pipeline import ExportedDetector
from hkd_det.errors import DataError
from hkd_det.letterbox import Letterbox


def frame_with_box(size_hw: tuple[int, int], box_xyxy: tuple[int, int, int, int]) -> np.ndarray:
    x1, y1, x2, y2 = box_xyxy
    frame = np.zeros((*size_hw, 3), np.uint8)
    frame[y1:y2, x1:x2] = 255
    return frame


def test_missing_model_is_an_error_of_the_call(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.onnx: no such model file"):
        open_detector(tmp_path / "none.onnx")


def test_call_image_of_input_size_returns_exact_box(tiny_onnx: Callable[..., Path]) -> None:
    with open_detector(tiny_onnx(), threads=1) as detector:
        detections = detector(frame_with_box((96, 160), (30, 10, 50, 90)))
    assert detections.boxes_xyxy.tolist() == [[30, 10, 50, 90]]
    assert detections.scores.tolist() == pytest.approx([20 * 80 / (96 * 160)])
    assert detections.boxes_xyxy.dtype == detections.scores.dtype == np.float32


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_call_any_size_returns_image_pixels(tiny_onnx: Callable[..., Path], data: st.DataObject) -> None:
    height, width = data.draw(st.integers(40, 400)), data.draw(st.integers(40, 400))
    x1, y1 = data.draw(st.integers(0, width - 20)), data.draw(st.integers(0, height - 20))
    x2, y2 = data.draw(st.integers(x1 + 20, width)), data.draw(st.integers(y1 + 20, height))
    with open_detector(tiny_onnx(), threads=1) as detector:
        detections = detector(frame_with_box((height, width), (x1, y1, x2, y2)))
    # An edge is between two input pixels, and each covers 1 / scale image pixels.
    pixel = max(width / 160, height / 96, 1)
    assert len(detections) == 1
    assert np.abs(detections.boxes_xyxy[0] - [x1, y1, x2, y2]).max() <= pixel + 1.5


def test_call_black_image_returns_no_detections(tiny_onnx: Callable[..., Path]) -> None:
    with open_detector(tiny_onnx()) as detector:
        assert len(detector(np.zeros((50, 70, 3), np.uint8))) == 0


def test_call_uses_letterbox_of_training(tiny_onnx: Callable[..., Path]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (333, 517, 3), dtype=np.uint8)
    frame[:5, :5] = 255  # bright pixels make row 0 valid
    path = tiny_onnx()
    with open_onnx_runtime(path) as runtime:
        boxes, scores, count = runtime.run(Letterbox((333, 517), (96, 160)).apply(frame)[None])
    with open_detector(path) as detector:
        detections = detector(frame)
    assert count[0] == len(detections) == 1
    assert detections.scores[0] == scores[0, 0]
    assert detections.boxes_xyxy[0] == pytest.approx(Letterbox((333, 517), (96, 160)).boxes_to_source(boxes[0, :1])[0])


def test_call_expects_rgb(tiny_onnx: Callable[..., Path]) -> None:
    frame = np.full((96, 160, 3), (255, 200, 200), np.uint8)
    with open_detector(tiny_onnx()) as detector:
        assert detector(frame).scores[0] == pytest.approx(1.0)
        assert detector(frame[..., ::-1]).scores[0] == pytest.approx(200 / 255)  # a view with negative strides


def test_predict_timed_equals_call(tiny_onnx: Callable[..., Path]) -> None:
    frame = frame_with_box((200, 200), (20, 30, 90, 120))
    with open_detector(tiny_onnx()) as detector:
        detections, times = detector.predict_timed(frame)
        again = detector(frame)
    assert np.array_equal(detections.boxes_xyxy, again.boxes_xyxy)
    parts = (times.preprocess_ms, times.inference_ms, times.postprocess_ms)
    assert min(parts) > 0
    assert times.total_ms == pytest.approx(sum(parts))


def test_call_from_several_threads(tiny_onnx: Callable[..., Path]) -> None:
    corners = [(x, y) for x in range(0, 80, 10) for y in range(0, 48, 12)]
    frames = [frame_with_box((96, 160), (x, y, x + 60, y + 40)) for x, y in corners]
    with open_detector(tiny_onnx(), threads=1) as detector, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(detector, frames))
    assert [tuple(detections.boxes_xyxy[0][:2]) for detections in results] == corners


class RecordingBackend:
    """A backend that records the shapes of its batches."""

    def __init__(self, session: Backend, batch: int | None) -> None:
        self.path, self.device, self.metadata = session.path, session.device, session.metadata
        self.batch, self.input_hw = batch, session.input_hw
        self.shapes: list[tuple[int, ...]] = []
        self._session = session

    def run(self, images: np.ndarray) -> RuntimeOutputs:
        self.shapes.append(images.shape)
        return self._session.run(images)

    def close(self) -> None:
        """Do nothing: the test closes the session."""


@pytest.mark.parametrize(
    ("batch", "num_requests", "max_batch", "batches"),
    [
        (None, 1, None, [10]),
        (None, 1, 4, [2, 4, 4]),  # an engine with batches up to 4
        (4, 1, None, [4, 4, 4]),
        (1, 1, None, [1] * 10),
        (None, 3, None, [1] * 10),  # three concurrent requests
        (4, 3, None, [4, 4, 4]),
    ],
)
def test_call_list_is_split_into_batches(
    tiny_onnx: Callable[..., Path], batch: int | None, num_requests: int, max_batch: int | None, batches: list[int]
) -> None:
    corners = [(x, x // 2) for x in range(0, 100, 10)]
    frames = [frame_with_box((96, 160), (x, y, x + 60, y + 40)) for x, y in corners]
    with open_onnx_runtime(tiny_onnx(), threads=1) as session:
        recording = RecordingBackend(session, batch)
        results = ExportedDetector(OpenedBackend(recording, "onnxruntime", num_requests, max_batch))(frames)
    assert sorted(shape[0] for shape in recording.shapes) == batches
    assert [tuple(detections.boxes_xyxy[0][:2]) for detections in results] == corners


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((10, 10), np.uint8), r"\(10, 10\)"),
        (np.zeros((10, 10, 4), np.uint8), r"\(10, 10, 4\)"),
        (np.zeros((10, 10, 3), np.float32), "float32"),
        (np.zeros((1, 10, 10, 3), np.uint8), r"\(1, 10, 10, 3\)"),
        (np.zeros((0, 10, 3), np.uint8), "at least one pixel"),
        (np.zeros((10, 0, 3), np.uint8), "at least one pixel"),
        (None, "NoneType"),
        ([[[0, 0, 0]]], "list"),
    ],
)
def test_call_not_an_image_raises(tiny_onnx: Callable[..., Path], image: object, message: str) -> None:
    with open_detector(tiny_onnx()) as detector, pytest.raises(ValueError, match=message):
        detector(image)  # type: ignore[arg-type]


def test_open_metadata_unlike_graph_raises(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx(imgsz_hw=(96, 160), changes={"imgsz": "[160, 96]"})
    with (
        pytest.raises(DataError, match=r"tiny.onnx: imgsz \(160, 96\) in the metadata, but \(96, 160\) in the graph"),
        open_detector(path),
    ):
        pass


def test_open_graph_without_metadata_raises(tiny_onnx: Callable[..., Path]) -> None:
    with (
        pytest.raises(DataError, match="not exported by hkd-export, and no model conf"),
        open_detector(tiny_onnx(changes={"hkd.format": None})),
    ):
        pass
