"""Every runtime that runs here says the same: one fixture, `open_with`, over all of them."""

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
from hkd_deploy.export.openvino import write_openvino_folder
from hkd_deploy.model_metadata import PREPROCESS_FLOAT01, PREPROCESS_IN_GRAPH
from hkd_det.errors import DataError, UsageError

FORMAT_2 = {"hkd.format": "2", "hkd.max_hw": "[96, 160]", "hkd.dynamic_size": "false", "hkd.raw": "false"}
FREE = {**FORMAT_2, "hkd.dynamic_size": "true"}
IN_GRAPH = {**FORMAT_2, "hkd.preprocess": json.dumps(PREPROCESS_IN_GRAPH), "hkd.max_hw": "[300, 400]"}
Open = Callable[..., AbstractContextManager[Detector]]


@pytest.fixture(params=["onnxruntime", "openvino", "openvino folder"])
def open_with(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens an ONNX file on this runtime; an OpenVINO folder is made of it first."""

    def opened(onnx: Path, **wanted: object) -> AbstractContextManager[Detector]:
        if request.param == "openvino folder":
            write_openvino_folder(onnx, tmp_path / "tiny_openvino")
            return open_detector(tmp_path / "tiny_openvino", threads=1, **wanted)  # type: ignore[arg-type]
        return open_detector(onnx, threads=1, backend=request.param, **wanted)  # type: ignore[arg-type]

    return opened


def frame_with_box(size_hw: tuple[int, int], box_xyxy: tuple[int, int, int, int]) -> np.ndarray:
    x1, y1, x2, y2 = box_xyxy
    frame = np.zeros((*size_hw, 3), np.uint8)
    frame[y1:y2, x1:x2] = 255
    return frame


def test_a_frame_of_the_input_size_is_exact(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    with open_with(tiny_onnx()) as detector:
        found = detector(frame_with_box((96, 160), (30, 10, 50, 90)))
        nobody = detector(np.zeros((96, 160, 3), np.uint8))
        assert detector.metadata.model == "tiny" and detector.metadata.data == "nothing"
    assert found.boxes_xyxy.tolist() == [[30, 10, 50, 90]] and len(nobody) == 0
    assert found.scores.tolist() == pytest.approx([20 * 80 / (96 * 160)])


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_a_list_of_frames_of_any_size(tiny_onnx: Callable[..., Path], open_with: Open, batch: int | None) -> None:
    """Six frames: a batch of four is filled up, one of one loops. Whole multiples of the input come back exactly."""
    sizes = (1, 2, 3, 1, 2, 1)
    wanted = [(10 * k, 20 * k, 60 * k, 80 * k) for k in sizes]
    frames = [frame_with_box((96 * k, 160 * k), box) for k, box in zip(sizes, wanted, strict=True)]
    with open_with(tiny_onnx(batch=batch)) as detector:
        found = detector(frames)
        alone = [detector(frame) for frame in frames]
        assert detector([]) == []
    assert [one.boxes_xyxy.tolist() for one in found] == [[list(box)] for box in wanted]
    for one, other in zip(found, alone, strict=True):
        assert np.array_equal(one.boxes_xyxy, other.boxes_xyxy) and np.array_equal(one.scores, other.scores)


@pytest.mark.parametrize(("batch", "most"), [(None, 5), (1, 1), (4, 4)])
def test_a_list_goes_through_in_the_batches_the_graph_takes(
    tiny_onnx: Callable[..., Path], open_with: Open, batch: int | None, most: int
) -> None:
    seen: list[tuple[int, ...]] = []
    with open_with(tiny_onnx(batch=batch)) as detector:
        runtime = detector._runtime
        run = runtime.run
        runtime.run = lambda pictures: (seen.append(pictures.shape), run(pictures))[1]  # type: ignore[method-assign]
        detector([frame_with_box((50, 70), (0, 0, 20, 20))] * 5)
    assert {shape[0] for shape in seen} == {most} and len(seen) == -(-5 // most)


def test_many_threads_on_one_detector(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    """All at once, each many times: an answer that another thread wrote over would name another box."""
    boxes = [(x, y, x + 30, y + 40) for x in range(0, 130, 10) for y in range(0, 56, 14)]
    frames = [frame_with_box((96, 160), box) for box in boxes]
    start = threading.Barrier(8)

    def work(first: int) -> list[tuple[int, list[list[float]]]]:
        start.wait()
        places = [(first + step) % len(frames) for step in range(len(frames))]
        return [(place, detector(frames[place]).boxes_xyxy.tolist()) for place in places]

    with open_with(tiny_onnx()) as detector, ThreadPoolExecutor(8) as pool:
        for answers in pool.map(work, range(0, 40, 5)):
            assert all(found == [list(boxes[place])] for place, found in answers)


def test_an_answer_is_the_callers_own(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    """Not a view of memory that the next call writes to."""
    with open_with(tiny_onnx()) as detector:
        first = detector._runtime.run(frame_with_box((96, 160), (30, 10, 50, 90))[None])
        detector._runtime.run(frame_with_box((96, 160), (1, 2, 150, 40))[None])
    assert first[0][0, 0].tolist() == [30, 10, 50, 90] and first[1][0, 0] == pytest.approx(20 * 80 / (96 * 160))


def test_a_free_size_is_the_smallest_that_holds_the_picture(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    """A frame twice as tall as wide, in a graph of up to 160x96: seen at 48x96, in an input 64 wide."""
    seen: list[tuple[int, ...]] = []
    frame = frame_with_box((192, 96), (20, 40, 60, 160))
    with open_with(tiny_onnx(free_size=True, changes=FREE)) as detector:
        runtime = detector._runtime
        assert runtime.input_hw is None
        run = runtime.run
        runtime.run = lambda pictures: (seen.append(pictures.shape), run(pictures))[1]  # type: ignore[method-assign]
        found = detector([frame, frame_with_box((96, 160), (1, 2, 100, 90)), frame])
    assert sorted(seen) == [(1, 96, 160, 3), (2, 96, 64, 3)]
    assert [one.boxes_xyxy.tolist() for one in found] == [[[20, 40, 60, 160]], [[1, 2, 100, 90]], [[20, 40, 60, 160]]]


def test_a_graph_that_letterboxes_takes_frames_as_they_are(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    frames = [frame_with_box((300, 400), (20, 40, 390, 299)), frame_with_box((33, 57), (1, 2, 50, 30))]
    with open_with(tiny_onnx(free_size=True, changes=IN_GRAPH)) as detector:
        assert [one.boxes_xyxy.tolist() for one in detector(frames)] == [[[20, 40, 390, 299]], [[1, 2, 50, 30]]]
        _, times = detector.predict_timed(frames[0])
        assert times.preprocess_ms < times.inference_ms
        with pytest.raises(DataError, match=r"a frame of 400x301, the graph takes up to 400x300; export it with"):
            detector(np.zeros((301, 400, 3), np.uint8))


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({**FORMAT_2, "hkd.raw": "true"}, "--raw"),
        ({**FORMAT_2, "hkd.preprocess": json.dumps(PREPROCESS_FLOAT01)}, "--no-preprocess"),
    ],
)
def test_graphs_for_programs_of_ones_own(
    tiny_onnx: Callable[..., Path], open_with: Open, changes: dict[str, str], flag: str
) -> None:
    with pytest.raises(DataError, match=f"exported with {flag}, for a program of your own"):
        open_with(tiny_onnx(changes=changes)).__enter__()


def test_another_tools_model(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    with pytest.raises(DataError, match="not an hkd-det model"):
        open_with(tiny_onnx(changes={"hkd.format": None})).__enter__()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (
            {"input_name": "input"},
            r"expected one input images uint8 \(B, H, W, 3\), found input uint8 \(\?, 96, 160, 3\)",
        ),
        ({"output_name": "output0"}, "found output0 float32"),
        ({"changes": {"imgsz": "[160, 96]"}}, r"metadata says imgsz \(160, 96\), the graph takes \(96, 160\)"),
        ({"changes": FREE}, r"metadata says imgsz any, the graph takes \(96, 160\)"),
        ({"free_size": True}, r"metadata says imgsz \(96, 160\), the graph takes any"),
    ],
)
def test_a_graph_that_is_not_as_its_metadata_says(
    tiny_onnx: Callable[..., Path], open_with: Open, wanted: dict[str, object], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        open_with(tiny_onnx(**wanted)).__enter__()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("text", [b"hkd.weights_sha256", b"0f0f0f", b"x1_at", b"nothing"])
def test_a_text_that_is_damaged(tiny_onnx: Callable[..., Path], backend: str, text: bytes) -> None:
    """A byte in a name or in the metadata: neither runtime looks, and both fail where it is read."""
    path = tiny_onnx()
    path.write_bytes(path.read_bytes().replace(text, text[:2] + b"\xff" + text[3:], 1))
    with pytest.raises(DataError, match=f"^{path}: [^\n]+$"), open_detector(path, backend=backend):
        pass


def test_a_closed_detector_says_so(tiny_onnx: Callable[..., Path], open_with: Open) -> None:
    with open_with(tiny_onnx()) as detector:
        pass
    with pytest.raises(ValueError, match="has been closed"):
        detector(np.zeros((96, 160, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "backend", "words"),
    [
        ("tiny.onnx", "onnx", "--backend onnx: expected onnxruntime, openvino"),
        ("tiny.onnx", "tensorrt", r"hkd-export .*tiny\.onnx --trt"),
        ("tiny.onnx", "ort-tensorrt", "--device cpu: runs on an NVIDIA GPU only"),
        ("none.onnx", None, r"none\.onnx: no such model file"),
        ("none.onnx", "openvino", r"none\.onnx: no such model file"),
        ("none_openvino", None, r"none_openvino: no such model file"),
        ("best.pt", None, r"hkd-export .*best\.pt makes an \.onnx file"),
        ("notes.txt", None, "expected an .onnx file, an .engine file or an OpenVINO folder"),
        (".", None, r"not an OpenVINO folder: expected model\.xml, model\.bin, metadata\.yaml, found 0 \.xml files"),
    ],
)
def test_what_nothing_opens(
    tiny_onnx: Callable[..., Path], tmp_path: Path, name: str, backend: str | None, words: str
) -> None:
    tiny_onnx()
    for present in ("best.pt", "notes.txt"):
        (tmp_path / present).touch()
    with pytest.raises((DataError, UsageError), match=words), open_backend(tmp_path / name, backend=backend):
        pass


def test_a_hint_is_openvinos(tiny_onnx: Callable[..., Path]) -> None:
    with (
        pytest.raises(UsageError, match="hint throughput: only for openvino, not for onnxruntime"),
        open_detector(tiny_onnx(), performance_hint="throughput"),
    ):
        pass
