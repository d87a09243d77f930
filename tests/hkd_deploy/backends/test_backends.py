"""Tests that all backends of this machine give the same results. The fixture `open_with` covers all of them."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from hkd_deploy import Detector, open_detector
from hkd_deploy.backends import open_backend
from hkd_deploy.backends.openvino import write_openvino_directory
from hkd_deploy.model_metadata import PREPROCESS_FLOAT01, PREPROCESS_IN_GRAPH
from hkd_det.errors import DataError, UsageError

DYNAMIC = {"hkd.dynamic": "true"}
IN_GRAPH = {"hkd.preprocess": json.dumps(PREPROCESS_IN_GRAPH), "hkd.max_imgsz": "[300, 400]"}
Open = Callable[..., AbstractContextManager[Detector]]


@pytest.fixture(params=["onnxruntime", "openvino", "openvino folder"])
def open_with(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Open an ONNX file with the backend of this parameter; convert it to an OpenVINO directory first if needed."""

    def open_model(onnx: Path, **kwargs: object) -> AbstractContextManager[Detector]:
        if request.param == "openvino folder":
            write_openvino_directory(onnx, tmp_path / "tiny_openvino")
            return open_detector(tmp_path / "tiny_openvino", threads=1, **kwargs)  # type: ignore[arg-type]
        return open_detector(onnx, threads=1, backend=request.param, **kwargs)  # type: ignore[arg-type]

    return open_model


def frame_with_box(size_hw: tuple[int, int], box_xyxy: tuple[int, int, int, int]) -> np.ndarray:
    x1, y1, x2, y2 = box_xyxy
    frame = np.zeros((*size_hw, 3), np.uint8)
    frame[y1:y2, x1:x2] = 255
    return frame


def test_call_frame_of_input_size_returns_exact_box(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    with open_with(tiny_onnx()) as detector:
        detections = detector(frame_with_box((96, 160), (30, 10, 50, 90)))
        no_detections = detector(np.zeros((96, 160, 3), np.uint8))
        assert detector.metadata.model == "tiny" and detector.metadata.data == "nothing"
    assert detections.boxes_xyxy.tolist() == [[30, 10, 50, 90]] and len(no_detections) == 0
    assert detections.scores.tolist() == pytest.approx([20 * 80 / (96 * 160)])


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_call_list_of_mixed_sizes_equals_single_calls(
    tiny_onnx: Callable[..., Path], open_with: Open, batch: int | None
) -> None:
    """Batch 4 pads six frames, batch 1 loops. Multiples of the input size give exact boxes."""
    sizes = (1, 2, 3, 1, 2, 1)
    expected = [(10 * k, 20 * k, 60 * k, 80 * k) for k in sizes]
    frames = [frame_with_box((96 * k, 160 * k), box) for k, box in zip(sizes, expected, strict=True)]
    with open_with(tiny_onnx(batch=batch)) as detector:
        batched = detector(frames)
        single = [detector(frame) for frame in frames]
        assert detector([]) == []
    assert [detections.boxes_xyxy.tolist() for detections in batched] == [[list(box)] for box in expected]
    for first, second in zip(batched, single, strict=True):
        assert np.array_equal(first.boxes_xyxy, second.boxes_xyxy) and np.array_equal(first.scores, second.scores)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "max_batch"), [(None, 5), (1, 1), (4, 4)])
def test_call_list_uses_batches_of_the_graph(
    tiny_onnx: Callable[..., Path], open_with: Open, batch: int | None, max_batch: int
) -> None:
    shapes: list[tuple[int, ...]] = []
    with open_with(tiny_onnx(batch=batch)) as detector:
        runtime = detector._runtime
        run = runtime.run
        runtime.run = lambda images: (shapes.append(images.shape), run(images))[1]  # type: ignore[method-assign]
        detector([frame_with_box((50, 70), (0, 0, 20, 20))] * 5)
    assert {shape[0] for shape in shapes} == {max_batch} and len(shapes) == -(-5 // max_batch)


@pytest.mark.slow
def test_call_from_many_threads_returns_own_outputs(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    """If threads shared output memory, a thread would get the box of another frame."""
    boxes = [(x, y, x + 30, y + 40) for x in range(0, 130, 10) for y in range(0, 56, 14)]
    frames = [frame_with_box((96, 160), box) for box in boxes]
    start = threading.Barrier(8)

    def work(first: int) -> list[tuple[int, list[list[float]]]]:
        start.wait()
        indices = [(first + step) % len(frames) for step in range(len(frames))]
        return [(index, detector(frames[index]).boxes_xyxy.tolist()) for index in indices]

    with open_with(tiny_onnx()) as detector, ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(0, 40, 5)):
            assert all(detected == [list(boxes[index])] for index, detected in results)


def test_run_second_call_keeps_first_outputs(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    with open_with(tiny_onnx()) as detector:
        first = detector._runtime.run(frame_with_box((96, 160), (30, 10, 50, 90))[None])
        detector._runtime.run(frame_with_box((96, 160), (1, 2, 150, 40))[None])
    assert first[0][0, 0].tolist() == [30, 10, 50, 90] and first[1][0, 0] == pytest.approx(20 * 80 / (96 * 160))


def test_call_free_size_uses_smallest_input(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    """A 96x192 frame in a graph of up to 160x96 is scaled to 48x96, in an input of 64x96."""
    shapes: list[tuple[int, ...]] = []
    frame = frame_with_box((192, 96), (20, 40, 60, 160))
    with open_with(tiny_onnx(free_size=True, changes=DYNAMIC)) as detector:
        runtime = detector._runtime
        assert runtime.input_hw is None
        run = runtime.run
        runtime.run = lambda images: (shapes.append(images.shape), run(images))[1]  # type: ignore[method-assign]
        results = detector([frame, frame_with_box((96, 160), (1, 2, 100, 90)), frame])
    assert sorted(shapes) == [(1, 96, 160, 3), (2, 96, 64, 3)]
    boxes = [detections.boxes_xyxy.tolist() for detections in results]
    assert boxes == [[[20, 40, 60, 160]], [[1, 2, 100, 90]], [[20, 40, 60, 160]]]


def test_call_letterbox_in_graph_passes_frames_unchanged(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    frames = [frame_with_box((300, 400), (20, 40, 390, 299)), frame_with_box((33, 57), (1, 2, 50, 30))]
    with open_with(tiny_onnx(free_size=True, changes=IN_GRAPH)) as detector:
        boxes = [detections.boxes_xyxy.tolist() for detections in detector(frames)]
        assert boxes == [[[20, 40, 390, 299]], [[1, 2, 50, 30]]]
        _, times = detector.predict_timed(frames[0])
        assert times.preprocess_ms < times.inference_ms
        with pytest.raises(
            DataError, match=r"frame of 400x301 exceeds the limit of 400x300. Export .* --max-imgsz 400x301"
        ):
            detector(np.zeros((301, 400, 3), np.uint8))


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"hkd.raw": "true"}, "--raw"),
        ({"hkd.preprocess": json.dumps(PREPROCESS_FLOAT01)}, "--no-preprocess"),
    ],
)
def test_open_unsupported_graph_names_export_flag(
    tiny_onnx: Callable[..., Path], open_with: Open, changes: dict[str, str], flag: str
) -> None:
    with pytest.raises(DataError, match=f"exported with {flag}, which no backend supports"):
        open_with(tiny_onnx(changes=changes)).__enter__()


def test_open_model_of_other_tool_raises(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    with pytest.raises(DataError, match=r"not an hkd-det model|not exported by hkd-export"):
        open_with(tiny_onnx(changes={"hkd.format": None})).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"input_name": "input"},
            r"expected one input images uint8 \(B, H, W, 3\), got input uint8 \(\?, 96, 160, 3\)",
        ),
        ({"output_name": "output0"}, "got output0 float32"),
        ({"changes": {"imgsz": "[160, 96]"}}, r"imgsz \(160, 96\) in the metadata, but \(96, 160\) in the graph"),
        ({"changes": DYNAMIC}, r"imgsz any in the metadata, but \(96, 160\) in the graph"),
        ({"free_size": True}, r"imgsz \(96, 160\) in the metadata, but any in the graph"),
    ],
)
def test_open_graph_unlike_metadata_raises(
    tiny_onnx: Callable[..., Path], open_with: Open, kwargs: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_with(tiny_onnx(**kwargs)).__enter__()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("text", [b"hkd.weights_sha256", b"0f0f0f", b"x1_at", b"nothing"])
def test_open_invalid_utf8_raises_one_line(tiny_onnx: Callable[..., Path], backend: str, text: bytes) -> None:
    """A damaged byte in a name or in the metadata. Both runtimes fail only when the text is read."""
    path = tiny_onnx()
    path.write_bytes(path.read_bytes().replace(text, text[:2] + b"\xff" + text[3:], 1))
    with pytest.raises(DataError, match=f"^{path}: [^\n]+$"), open_detector(path, backend=backend):
        pass


def test_call_closed_detector_raises(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    with open_with(tiny_onnx()) as detector:
        pass
    with pytest.raises(ValueError, match="the model is closed"):
        detector(np.zeros((96, 160, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "backend", "message"),
    [
        ("tiny.onnx", "onnx", "--backend: expected one of onnxruntime, openvino"),
        ("tiny.onnx", "tensorrt", r"hkd-export .*tiny\.onnx --trt"),
        ("tiny.onnx", "ort-tensorrt", "--device cpu: expected an NVIDIA GPU"),
        ("none.onnx", None, r"none\.onnx: no such model file"),
        ("none.onnx", "openvino", r"none\.onnx: no such model file"),
        ("none_openvino", None, r"none_openvino: no such model file"),
        ("best.pt", None, r"Create an \.onnx file with hkd-export .*best\.pt"),
        ("notes.txt", None, "expected an .onnx file, an .engine file or an OpenVINO directory"),
        (".", None, r"not an OpenVINO directory: expected model\.xml, model\.bin, metadata\.yaml, got 0 \.xml files"),
    ],
)
def test_open_backend_unsupported_path_raises(
    tiny_onnx: Callable[..., Path], tmp_path: Path, name: str, backend: str | None, message: str
) -> None:
    tiny_onnx()
    for existing in ("best.pt", "notes.txt"):
        (tmp_path / existing).touch()
    with pytest.raises((DataError, UsageError), match=message), open_backend(tmp_path / name, backend=backend):
        pass


def test_open_detector_throughput_requires_openvino(tiny_onnx: Callable[..., Path]) -> None:
    with (
        pytest.raises(UsageError, match="performance_hint throughput: backend onnxruntime supports latency only"),
        open_detector(tiny_onnx(), performance_hint="throughput"),
    ):
        pass
