"""The pipeline: boxes come back to where the bright thing is in the frame, whatever its size."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_deploy import Detector, open_detector
from hkd_deploy.backends import OpenedBackend
from hkd_deploy.backends.base import Backend, RuntimeOutputs
from hkd_deploy.backends.onnxruntime import open_onnx_runtime
from hkd_det.errors import DataError
from hkd_det.letterbox import Letterbox


def frame_with_box(size_hw: tuple[int, int], box_xyxy: tuple[int, int, int, int]) -> np.ndarray:
    x1, y1, x2, y2 = box_xyxy
    frame = np.zeros((*size_hw, 3), np.uint8)
    frame[y1:y2, x1:x2] = 255
    return frame


def test_a_frame_of_the_input_size_is_exact(tiny_onnx: Callable[..., Path]) -> None:
    with open_detector(tiny_onnx(), threads=1) as detector:
        detections = detector(frame_with_box((96, 160), (30, 10, 50, 90)))
    assert detections.boxes_xyxy.tolist() == [[30, 10, 50, 90]]
    assert detections.scores.tolist() == pytest.approx([20 * 80 / (96 * 160)])
    assert detections.boxes_xyxy.dtype == detections.scores.dtype == np.float32


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_boxes_come_back_to_frame_pixels(tiny_onnx: Callable[..., Path], data: st.DataObject) -> None:
    height, width = data.draw(st.integers(40, 400)), data.draw(st.integers(40, 400))
    x1, y1 = data.draw(st.integers(0, width - 20)), data.draw(st.integers(0, height - 20))
    x2, y2 = data.draw(st.integers(x1 + 20, width)), data.draw(st.integers(y1 + 20, height))
    with open_detector(tiny_onnx(), threads=1) as detector:
        detections = detector(frame_with_box((height, width), (x1, y1, x2, y2)))
    # An edge lies between two input pixels, of which each covers 1 / scale frame pixels.
    pixel = max(width / 160, height / 96, 1)
    assert len(detections) == 1
    assert np.abs(detections.boxes_xyxy[0] - [x1, y1, x2, y2]).max() <= pixel + 1.5


def test_nobody(tiny_onnx: Callable[..., Path]) -> None:
    with open_detector(tiny_onnx()) as detector:
        assert len(detector(np.zeros((50, 70, 3), np.uint8))) == 0


def test_the_letterbox_is_the_one_of_training(tiny_onnx: Callable[..., Path]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (333, 517, 3), dtype=np.uint8)
    frame[:5, :5] = 255  # bright, so that the row is valid
    path = tiny_onnx()
    with open_onnx_runtime(path) as runtime:
        boxes, scores, count = runtime.run(Letterbox((333, 517), (96, 160)).apply(frame)[None])
    with open_detector(path) as detector:
        found = detector(frame)
    assert count[0] == len(found) == 1
    assert found.scores[0] == scores[0, 0]
    assert found.boxes_xyxy[0] == pytest.approx(Letterbox((333, 517), (96, 160)).boxes_to_source(boxes[0, :1])[0])


def test_channels_are_red_green_blue(tiny_onnx: Callable[..., Path]) -> None:
    frame = np.full((96, 160, 3), (255, 200, 200), np.uint8)
    with open_detector(tiny_onnx()) as detector:
        assert detector(frame).scores[0] == pytest.approx(1.0)
        assert detector(frame[..., ::-1]).scores[0] == pytest.approx(200 / 255)  # a view with negative strides as well


def test_timed_gives_the_same_and_times(tiny_onnx: Callable[..., Path]) -> None:
    frame = frame_with_box((200, 200), (20, 30, 90, 120))
    with open_detector(tiny_onnx()) as detector:
        detections, times = detector.predict_timed(frame)
        again = detector(frame)
    assert np.array_equal(detections.boxes_xyxy, again.boxes_xyxy)
    parts = (times.preprocess_ms, times.inference_ms, times.postprocess_ms)
    assert min(parts) > 0
    assert times.total_ms == pytest.approx(sum(parts))


def test_several_threads_share_a_detector(tiny_onnx: Callable[..., Path]) -> None:
    corners = [(x, y) for x in range(0, 80, 10) for y in range(0, 48, 12)]
    frames = [frame_with_box((96, 160), (x, y, x + 60, y + 40)) for x, y in corners]
    with open_detector(tiny_onnx(), threads=1) as detector, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(detector, frames))
    assert [tuple(each.boxes_xyxy[0][:2]) for each in found] == corners


class Recording:
    """A session whose batches are written down."""

    def __init__(self, session: Backend, batch: int | None) -> None:
        self.path, self.device, self.metadata = session.path, session.device, session.metadata
        self.batch, self.input_hw = batch, session.input_hw
        self.shapes: list[tuple[int, ...]] = []
        self._session = session

    def run(self, pictures: np.ndarray) -> RuntimeOutputs:
        self.shapes.append(pictures.shape)
        return self._session.run(pictures)

    def close(self) -> None:
        """Not ours."""


@pytest.mark.parametrize(
    ("batch", "parallel", "max_batch", "batches"),
    [
        (None, 1, None, [10]),
        (None, 1, 4, [2, 4, 4]),  # an engine of up to four
        (4, 1, None, [4, 4, 4]),
        (1, 1, None, [1] * 10),
        (None, 3, None, [1] * 10),  # three calls at once
        (4, 3, None, [4, 4, 4]),
    ],
)
def test_how_a_list_is_split(
    tiny_onnx: Callable[..., Path], batch: int | None, parallel: int, max_batch: int | None, batches: list[int]
) -> None:
    corners = [(x, x // 2) for x in range(0, 100, 10)]
    frames = [frame_with_box((96, 160), (x, y, x + 60, y + 40)) for x, y in corners]
    with open_onnx_runtime(tiny_onnx(), threads=1) as session:
        recording = Recording(session, batch)
        found = Detector(OpenedBackend(recording, "onnxruntime", parallel, max_batch))(frames)
    assert sorted(shape[0] for shape in recording.shapes) == batches
    assert [tuple(each.boxes_xyxy[0][:2]) for each in found] == corners


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (np.zeros((10, 10), np.uint8), r"\(10, 10\)"),
        (np.zeros((10, 10, 4), np.uint8), r"\(10, 10, 4\)"),
        (np.zeros((10, 10, 3), np.float32), "float32"),
        (np.zeros((1, 10, 10, 3), np.uint8), r"\(1, 10, 10, 3\)"),
        (np.zeros((0, 10, 3), np.uint8), "empty"),
        (np.zeros((10, 0, 3), np.uint8), "empty"),
        (None, "NoneType"),
        ([[[0, 0, 0]]], "list"),
    ],
)
def test_what_is_no_frame(tiny_onnx: Callable[..., Path], frame: object, words: str) -> None:
    with open_detector(tiny_onnx()) as detector, pytest.raises(ValueError, match=words):
        detector(frame)  # type: ignore[arg-type]


def test_metadata_against_the_graph(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx(imgsz_hw=(96, 160), changes={"imgsz": "[160, 96]"})
    with (
        pytest.raises(DataError, match=r"tiny.onnx: metadata says imgsz \(160, 96\), the graph takes \(96, 160\)"),
        open_detector(path),
    ):
        pass


def test_a_foreign_graph_with_the_right_ends(tiny_onnx: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="not an hkd-det model"), open_detector(tiny_onnx(changes={"hkd.format": None})):
        pass
