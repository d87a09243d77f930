"""Fixtures of the deployment tests.

`tiny_onnx`: writes a detector whose output can be checked by hand: it returns the bounding box of all bright pixels.
`camera`: a network camera on this machine (MJPEG over HTTP) that can be switched off and on and made to hang.
`make_camera`: starts several of them.
`real_video`: a video of walking people from HKD_TEST_DATA.
`tensorrt_python`: a Python interpreter with a real TensorRT parser and builder, without a GPU.
`tensorrt_builds`: parses and builds a file with it. Running the engine needs a GPU.
"""

import base64
import importlib.util
import json
import os
import shutil
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

TENSORRT = Path(__file__).parents[2] / "deploy" / "tensorrt_cpu.py"
VIDEOS = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "videos"

BRIGHT = 200  # threshold of the channel mean


def metadata(imgsz_hw: tuple[int, int], batch: int | None) -> dict[str, str]:
    """Return the metadata that hkd-export writes."""
    return {
        "description": "tiny",
        "author": "test",
        "date": "2026-01-02T03:04:05+00:00",
        "version": "0.1.0",
        "license": "Apache-2.0",
        "task": "detect",
        "stride": "32",
        "batch": "dynamic" if batch is None else str(batch),
        "imgsz": f"[{imgsz_hw[0]}, {imgsz_hw[1]}]",
        "names": "{0: 'person'}",
        "hkd.format": "1",
        "hkd.model": "tiny",
        "hkd.parameters": "12",
        "hkd.flops": "3456",
        "hkd.preprocess": json.dumps(
            {"layout": "NHWC", "color": "RGB", "dtype": "uint8", "letterbox": "top-left", "pad": 114}
        ),
        "hkd.weights_sha256": "0f" * 32,
        "hkd.max_imgsz": f"[{imgsz_hw[0]}, {imgsz_hw[1]}]",
        "hkd.dynamic": "false",
        "hkd.raw": "false",
        "hkd.data": "nothing",
    }


def write_tiny_onnx(
    path: Path,
    imgsz_hw: tuple[int, int] = (96, 160),
    batch: int | None = None,
    changes: dict[str, str | None] | None = None,
    input_name: str = "images",
    output_name: str = "boxes",
    free_size: bool = False,
) -> Path:
    """Write a model with the interface of hkd-export.

    Row 0 is the bounding box of the pixels whose channel mean is at least 200. Its score is the mean of red / 255.
    Row 1 is never valid. `changes` replaces metadata keys; None removes a key. `free_size` frees height and width.
    """
    outputs = [
        helper.make_tensor_value_info(output_name, TensorProto.FLOAT, [batch or "batch", 2, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch or "batch", 2]),
        helper.make_tensor_value_info("count", TensorProto.INT64, [batch or "batch"]),
    ]
    shape = [batch or "batch", *(("height", "width") if free_size else imgsz_hw), 3]
    images = helper.make_tensor_value_info(input_name, TensorProto.UINT8, shape)
    graph = helper.make_graph(_make_nodes(input_name, output_name), "tiny", [images], outputs, _make_constants())
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    entries = {**metadata(imgsz_hw, batch), **(changes or {})}
    helper.set_model_props(model, {key: value for key, value in entries.items() if value is not None})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def _make_constants() -> list[onnx.TensorProto]:
    values = {
        "bright": np.array(BRIGHT, np.float32),
        "one": np.array(1, np.float32),
        "to_score": np.array([1 / 255, 0, 0], np.float32),
        "zero": np.zeros((1, 1), np.float32),
        "axis_1": np.array([1], np.int64),
    }
    return [numpy_helper.from_array(value, name) for name, value in values.items()]


def _make_nodes(input_name: str, output_name: str) -> list[onnx.NodeProto]:
    def node(op: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], **attributes)

    return [
        node("Cast", [input_name], "float", to=TensorProto.FLOAT),
        node("ReduceMean", ["float"], "gray", axes=[3], keepdims=0),  # [B, H, W]
        node("GreaterOrEqual", ["gray", "bright"], "is_bright"),
        node("Cast", ["is_bright"], "mask", to=TensorProto.FLOAT),
        node("ReduceMax", ["mask"], "rows", axes=[2], keepdims=0),  # [B, H]
        node("ReduceMax", ["mask"], "columns", axes=[1], keepdims=0),  # [B, W]
        *[
            step
            for name, line, last in (("x1", "columns", 0), ("y1", "rows", 0), ("x2", "columns", 1), ("y2", "rows", 1))
            for step in (
                node("ArgMax", [line], f"{name}_at", axis=1, keepdims=1, select_last_index=last),
                node("Cast", [f"{name}_at"], f"{name}_low", to=TensorProto.FLOAT),
            )
        ],
        node("Add", ["x2_low", "one"], "x2_high"),  # exclusive edges
        node("Add", ["y2_low", "one"], "y2_high"),
        node("Concat", ["x1_low", "y1_low", "x2_high", "y2_high"], "box", axis=1),
        node("Unsqueeze", ["box", "axis_1"], "box_row"),
        node("Concat", ["box_row", "box_row"], output_name, axis=1),
        node("ReduceMean", ["float"], "color", axes=[1, 2], keepdims=0),  # [B, 3]
        node("Mul", ["color", "to_score"], "red"),
        node("ReduceSum", ["red", "axis_1"], "score", keepdims=1),  # [B, 1]
        node("Mul", ["score", "zero"], "no_score"),
        node("Concat", ["score", "no_score"], "scores", axis=1),
        node("ReduceMax", ["mask"], "any", axes=[1, 2], keepdims=0),
        node("Cast", ["any"], "count", to=TensorProto.INT64),
    ]


@pytest.fixture
def tiny_onnx(tmp_path: Path) -> Callable[..., Path]:
    """Function that writes a tiny model, `tiny_onnx(imgsz_hw=..., changes={...})`, and returns its path."""

    def write(name: str = "tiny.onnx", **kwargs: object) -> Path:
        return write_tiny_onnx(tmp_path / name, **kwargs)  # type: ignore[arg-type]

    return write


@pytest.fixture
def model_metadata() -> Callable[..., dict[str, str]]:
    """Function `model_metadata(imgsz_hw, batch)` that returns the metadata of hkd-export."""
    return metadata


@pytest.fixture
def real_video() -> Path:
    """A real video, 370 frames of 640x360. Skips the test if HKD_TEST_DATA has none."""
    path = VIDEOS / "crossing.mp4"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    return path


SIZE_HW = (64, 96)


def encode_frame(number: int) -> bytes:
    """Encode frame `number` as a JPEG of gray level 20 + number % 200."""
    image = np.full((*SIZE_HW, 3), 20 + number % 200, np.uint8)
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 100])[1])


class Camera:
    """A network camera at `address`. `off()` and `on()` switch it; `hang()` keeps connections open without data.

    `bytes_per_s` is the speed of the line: a slow one delivers every image late. `made_s` has the time of each image.
    With a `page`, it sends this text instead of images.
    """

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.hangs = self.is_frozen = False
        self.bytes_per_s: float | None = None
        self.login: tuple[str, str] | None = None
        self.path, self.page = "/video.mjpg", b""
        self.made_s: dict[int, float] = {}
        self.connections = 0
        self.sent = 0
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.on()
        self.address = f"http://127.0.0.1:{self._port}/video.mjpg"

    def on(self) -> None:
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera.connections += 1
                with suppress(OSError):
                    if camera.login and self.headers.get("Authorization") != camera.expected_authorization:
                        self.send_response(401)
                        self.send_header("WWW-Authenticate", 'Basic realm="camera"')
                        self.end_headers()
                    elif camera.page:
                        self.send_response(200)
                        self.send_header("Content-Type", "text/html")
                        self.end_headers()
                        self.wfile.write(camera.page)
                    elif self.path != camera.path:
                        self.send_error(404)
                    else:
                        camera.stream(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Discard the log."""

        self.hangs = False
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def expected_authorization(self) -> str:
        return "Basic " + base64.b64encode(":".join(self.login or ()).encode()).decode()

    def stream(self, handler: BaseHTTPRequestHandler) -> None:
        server = self._server
        handler.send_response(200)
        handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        handler.end_headers()
        made_s = time.monotonic()
        while self._server is server:
            if not self.hangs:
                number = self.sent - self.is_frozen
                self.made_s[number % 200] = made_s
                image = encode_frame(number)
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(image)}\r\n\r\n"
                self.send_slowly(handler, head.encode() + image + b"\r\n")
                self.sent += not self.is_frozen
            made_s = max(made_s + 1 / self.fps, time.monotonic() if self.bytes_per_s is None else 0)
            time.sleep(max(0.0, made_s - time.monotonic()))
        handler.connection.shutdown(2)

    def send_slowly(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        for start in range(0, len(data), step := -(-len(data) // 10)):
            handler.wfile.write(data[start : start + step])
            if self.bytes_per_s is not None:
                time.sleep(step / self.bytes_per_s)

    def resume(self) -> None:
        self.hangs = False

    def hang(self) -> None:
        self.hangs = True

    def off(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            socketserver.TCPServer.server_close(server)


@pytest.fixture
def camera() -> Iterator[Camera]:
    """A camera with 100 frames per second."""
    running = Camera(fps=100)
    yield running
    running.off()


@pytest.fixture
def make_camera() -> Iterator[Callable[..., Camera]]:
    """Function `make_camera(fps)` that starts a further camera."""
    running: list[Camera] = []

    def make(fps: float = 20) -> Camera:
        running.append(Camera(fps))
        return running[-1]

    yield make
    for camera in running:
        camera.off()


@pytest.fixture(scope="session")
def tensorrt_python() -> Path:
    """Interpreter that can import tensorrt. It is downloaded on first use."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("TensorRT without a GPU requires Linux x86-64 and gcc")
    spec = importlib.util.spec_from_file_location("tensorrt_cpu", TENSORRT)
    assert spec is not None and spec.loader is not None
    tensorrt_cpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tensorrt_cpu)
    launcher: Path = tensorrt_cpu.install_tensorrt(
        Path(os.environ.get("HKD_TENSORRT") or TENSORRT.parents[1] / ".tensorrt")
    )
    return launcher


@pytest.fixture(scope="session")
def tensorrt_builds(tensorrt_python: Path) -> Callable[..., dict[str, Any]]:
    """Function that builds an engine and returns its properties. Raises ValueError with the messages of the parser."""

    def build(path: Path, smallest: tuple[int, ...] = (), largest: tuple[int, ...] = ()) -> dict[str, Any]:
        profile = [",".join(map(str, sizes)) for sizes in (smallest, largest) if sizes]
        command = [tensorrt_python, Path(__file__).with_name("build_with_tensorrt.py"), path, *profile]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(done.stderr)
        properties: dict[str, Any] = json.loads(done.stdout)
        return properties

    return build
