"""Tests of the Triton client with a local KServe v2 server that runs the exported file."""

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import onnxruntime
import pytest

from hkd_deploy import open_detector

SCRIPT = Path(__file__).parents[3] / "deploy" / "triton" / "client.py"
KSERVE = {"tensor(uint8)": "UINT8", "tensor(float)": "FP32", "tensor(int64)": "INT64"}


class Server:
    """Server at `url` for the two requests of the client and one model named student.

    It implements the "Binary Tensor Data Extension" of kserve/docs and rejects invalid requests.
    """

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path))
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.describe(self)

            def do_POST(self) -> None:
                server.infer(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Discard the log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def describe(self, request: BaseHTTPRequestHandler) -> None:
        if request.path == "/v2/models/odd":
            self._send(request, 200, b"{}")
            return
        if request.path != "/v2/models/student":
            self._send(request, 404, json.dumps({"error": f"no model at {request.path}"}).encode())
            return
        tensors = {
            kind: [
                {"name": value.name, "datatype": KSERVE[value.type], "shape": [-1, *value.shape[1:]]}
                for value in values
            ]
            for kind, values in (("inputs", self.session.get_inputs()), ("outputs", self.session.get_outputs()))
        }
        self._send(request, 200, json.dumps({"name": "student", "platform": "onnxruntime_onnx", **tensors}).encode())

    def infer(self, request: BaseHTTPRequestHandler) -> None:
        assert request.path == "/v2/models/student/infer"
        content = request.rfile.read(int(request.headers["Content-Length"]))
        length = int(request.headers["Inference-Header-Content-Length"])
        head, pixels = json.loads(content[:length]), content[length:]
        (images,) = head["inputs"]
        assert (images["name"], images["datatype"]) == ("images", "UINT8")
        assert images["parameters"]["binary_data_size"] == len(pixels) == np.prod(images["shape"])
        assert head["parameters"]["binary_data_output"] is True
        batch = np.frombuffer(pixels, np.uint8).reshape(images["shape"])
        names = ["count", "boxes", "scores"]  # an order unlike that of the graph
        outputs, tail = [], b""
        for name, value in zip(names, self.session.run(names, {"images": batch}), strict=True):
            shaped = value[:, None] if value.ndim == 1 else value  # the reshape of `count` in config.pbtxt
            output = {"name": name, "shape": list(shaped.shape)}
            output["datatype"] = {"float32": "FP32", "int64": "INT64"}[str(shaped.dtype)]
            outputs.append({**output, "parameters": {"binary_data_size": shaped.nbytes}})
            tail += shaped.tobytes()
        response = json.dumps({"model_name": "student", "model_version": "1", "outputs": outputs}).encode()
        self._send(request, 200, response + tail, {"Inference-Header-Content-Length": str(len(response))})

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture(scope="module")
def client() -> ModuleType:
    spec = importlib.util.spec_from_file_location("triton_client", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(tiny_onnx: Callable[..., Path]) -> Iterator[Server]:
    running = Server(tiny_onnx())
    yield running
    running.close()


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    """A dark image of another aspect ratio than the model input, with one bright, reddish person."""
    pixels = np.full((300, 400, 3), 20, np.uint8)
    pixels[60:240, 100:180] = (200, 210, 255)  # BGR
    cv2.imwrite(str(tmp_path / "street.png"), pixels)
    return tmp_path / "street.png"


def test_request_detections_equals_pipeline(
    client: ModuleType, server: Server, tiny_onnx: Callable[..., Path], image_path: Path
) -> None:
    frame_rgb = np.ascontiguousarray(cv2.imread(str(image_path))[:, :, ::-1])
    actual = client.request_detections(server.url, "student", frame_rgb)
    with open_detector(tiny_onnx()) as detector:
        expected = detector(frame_rgb)
    assert len(actual) == len(expected) == 1
    np.testing.assert_array_equal(actual.boxes_xyxy, expected.boxes_xyxy)
    np.testing.assert_array_equal(actual.scores, expected.scores)
    np.testing.assert_allclose(actual.boxes_xyxy[0], [100, 60, 180, 240], atol=4)  # input pixels are 3 image pixels


def test_client_command(
    client: ModuleType, server: Server, image_path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert client.main([str(image_path), "--url", f"{server.url}/", "--conf", "0.1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    x1, y1, x2, y2, score = map(float, line.split())
    assert 95 < x1 < 105 and 235 < y2 < 245 and 0.1 < score < 0.5 and x2 > x1 and y2 > y1
    assert client.main([str(image_path), "--url", server.url, "--conf", "0.9"]) == 0
    assert capsys.readouterr().out == ""
    for flags, message in (
        ([str(image_path), "--url", server.url, "--model", "teacher"], "404"),
        ([str(image_path), "--url", server.url, "--model", "odd"], "expected the response of a detector"),
        ([str(image_path), "--url", "http://127.0.0.1:1"], "Check that tritonserver is running"),
        ([str(tmp_path / "none.png"), "--url", server.url], "none.png"),
    ):
        assert client.main(flags) == 1
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
