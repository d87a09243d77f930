"""Tests of the page: frames, access, saving of lines and zones, viewers that do not read."""

import http.client
import json
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest
import yaml

from hkd_deploy.backends.base import StageTimes
from hkd_deploy.demo import web_views
from hkd_deploy.demo.base import FrameResult
from hkd_deploy.demo.camera_file import parse_scene, write_scene
from hkd_deploy.demo.cameras import CameraConfig, name_sources, read_cameras
from hkd_deploy.demo.cli import main
from hkd_deploy.demo.run import CameraPipeline
from hkd_deploy.demo.web import WebSink
from hkd_deploy.demo.web_views import CameraView, make_page_name, read_power_w, read_temperature_c
from hkd_deploy.streams import Frame, open_source
from hkd_det.errors import DataError, UsageError
from hkd_det.structures import Detections

CAMERAS = (
    CameraConfig("door", "rtsp://user:pass@10.0.0.5/secret/path"),
    CameraConfig("http://***@cam.example/x", "http://u:p@cam.example/x"),
)
COMMAND = [sys.executable, "-c", "import sys; from hkd_deploy.demo.cli import main; sys.exit(main())"]
SCENE = {"lines": {"gate": [[0.1, 0.5], [0.9, 0.5]]}, "zones": {"Tür 1": [[0, 0], [1, 0], [1, 0.123456]]}}


def write_image(path: Path) -> Path:
    cv2.imwrite(str(path), np.zeros((90, 160, 3), np.uint8))
    return path


def make_result(camera: str = "door", level: int = 100, **values: Any) -> FrameResult:
    boxes = np.array([[16, 9, 80, 81]], np.float32)
    detections = Detections(boxes, np.array([0.8], np.float32))
    defaults: dict[str, Any] = {"timestamp_s": time.monotonic(), "age_ms": 40.0, "times": StageTimes(1, 2, 3)}
    image = np.full((90, 160, 3), level, np.uint8)
    return FrameResult(camera, 0, image, detections, detections, 0.3, **{**defaults, **values})


@pytest.fixture
def make_page() -> Iterator[Callable[..., WebSink]]:
    """Function that starts a page, `make_page(cameras, host=..., camera_file=...)`."""
    pages: list[WebSink] = []

    def make(cameras: Any = CAMERAS, pipelines: Any = (), **values: Any) -> WebSink:
        pages.append(WebSink(cameras, pipelines, 0, **values))
        return pages[-1]

    yield make
    for page in pages:
        page.close()


def send(
    page: WebSink, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, Any, bytes]:
    """Send a request and return status, headers and body. Header names are given with _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request(method, path, body, named)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content


def get_frames(page: WebSink, after: str) -> list[tuple[dict[str, Any], np.ndarray]]:
    content = send(page, f"/frames?after={after}")[2]
    (length,) = struct.unpack(">I", content[:4])
    offset, frames = 4 + length, []
    for header in json.loads(content[4:offset]):
        jpeg = np.frombuffer(content[offset : offset + header["bytes"]], np.uint8)
        frames.append((header, cv2.imdecode(jpeg, cv2.IMREAD_COLOR)))
        offset += header["bytes"]
    assert offset == len(content)
    return frames


def post_scene(page: WebSink, scene: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    allowed = {"Origin": f"http://127.0.0.1:{page.port}", "Content_Type": "application/json"}
    body = scene if isinstance(scene, bytes) else json.dumps(scene).encode()
    status, _, content = send(page, "/cameras/0/scene", "POST", body, **{**allowed, **headers})
    with suppress(ValueError):
        return status, json.loads(content)
    return status, {}


def test_frames_follow_the_camera(make_page: Callable[..., WebSink]) -> None:
    page = make_page()
    page.write(make_result(level=50, track_ids=np.array([7])))
    ((header, first),) = get_frames(page, "0:0,1:0")
    assert header["camera"] == 0 and header["seq"] == 1 and header["ids"] == [7]
    assert header["boxes"] == [[0.1, 0.1, 0.5, 0.9]]  # fractions of 160x90
    page.write(make_result(level=200))
    page.write(make_result(CAMERAS[1].name, level=120))
    frames = get_frames(page, "0:1,1:0")
    assert [header["seq"] for header, _ in frames] == [2, 1]
    assert [round(float(image.mean())) for _, image in frames] == pytest.approx([200, 120], abs=2)
    assert abs(first.mean() - 50) < 2
    ((header, _),) = get_frames(page, "1:0")  # only the cameras that the viewer shows
    assert header["camera"] == 1
    assert len(get_frames(page, "0:370")) == 1  # the viewer of a previous run


def test_request_waits_for_the_next_frame(make_page: Callable[..., WebSink]) -> None:
    page = make_page()
    page.write(make_result())
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
    connection.request("GET", "/frames?after=0:1")
    time.sleep(0.3)
    start_s = time.monotonic()
    page.write(make_result(level=10))
    header = connection.getresponse().read()
    assert json.loads(header[4 : 4 + struct.unpack(">I", header[:4])[0]])[0]["seq"] == 2
    assert time.monotonic() - start_s < 5  # without the signal, it would wait for ten seconds
    connection.close()


def test_privacy_applies_to_images(make_page: Callable[..., WebSink]) -> None:
    page = make_page()
    page.write(make_result(level=250, privacy="fill"))
    ((_, image),) = get_frames(page, "0:0")
    assert abs(image[30:60, 30:60].mean() - 128) < 3 and image[:, 110:].mean() > 245


def test_jpeg_is_encoded_once_and_on_request_only(
    make_page: Callable[..., WebSink], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = web_views.encode_jpeg
    monkeypatch.setattr(web_views, "encode_jpeg", lambda image: encoded.append(1) or encode(image))
    page = make_page()
    for _ in range(20):
        page.write(make_result())
    assert not encoded
    for _ in range(10):
        assert len(get_frames(page, "0:0")) == 1
    assert len(encoded) == 1


def test_wide_image_is_reduced() -> None:
    jpeg = web_views.encode_jpeg(np.zeros((1080, 1920, 3), np.uint8))
    assert cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR).shape == (720, 1280, 3)


@pytest.mark.slow
def test_viewers_that_do_not_read_do_not_block_the_detector(make_page: Callable[..., WebSink]) -> None:
    page = make_page()
    noise = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)
    viewers = [socket.create_connection(("127.0.0.1", page.port)) for _ in range(10)]
    pipelined = b"".join(f"GET /frames?after=0:{n} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for n in range(40))
    for viewer in viewers:
        viewer.sendall(pipelined)
    durations_s = []
    for _ in range(60):  # 10 viewers x 40 images of about 1 MB: far more than the sockets hold
        result = make_result()
        object.__setattr__(result, "original_rgb", noise)
        start_s = time.perf_counter()
        page.write(result)
        durations_s.append(time.perf_counter() - start_s)
        time.sleep(0.01)
    assert np.median(durations_s) < 0.01
    assert len(get_frames(page, "0:0")) == 1  # another viewer is served
    start_s = time.monotonic()
    page.close()
    assert time.monotonic() - start_s < 2
    for viewer in viewers:
        viewer.close()


def test_state_has_no_address(make_page: Callable[..., WebSink]) -> None:
    page = make_page()
    page.write(make_result(counts={"lines": {"gate": {"left": np.int64(3)}}}, overlay=("tiny",)))
    page.write_status(CAMERAS[1].name, "camera lost: http://***@cam.example/x: unknown host cam.example:80. Check it.")
    page.write_status("door", "camera lost: 10.0.0.5: no route. See rtsp://10.0.0.5/secret/path.")
    content = send(page, "/state")[2].decode()
    for secret in ("10.0.0.5", "cam.example", "secret", "user", "rtsp", "http:"):
        assert secret not in content
    first, second = json.loads(content)["cameras"]
    assert [first["name"], second["name"]] == ["door", "camera 2"]
    assert first["is_down"] and first["status"] == "camera lost: the camera: no route. See the camera."
    assert second["is_down"] and second["status"].startswith("camera lost: camera 2: unknown host")
    assert first["counts"] == {"lines": {"gate": {"left": 3}}}
    assert first["stages_ms"] == {"preprocess": 1, "inference": 2, "postprocess": 3}
    page.write(make_result())
    first = json.loads(send(page, "/state")[2])["cameras"][0]
    assert not first["is_down"] and first["persons"] == 1 and first["age_percentiles_ms"] == [40, 40]
    assert [persons for _, persons in first["history"]] == [1] * len(first["history"]) != []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("rtsp://u:p@10.0.0.5/x", "camera 3"),
        ("0", "camera 0"),
        ("/home/me/street.mp4", "street.mp4"),
        ("udp://@239.0.0.1:1234", "camera 3"),
    ],
)
def test_page_name_has_no_address(source: str, expected: str) -> None:
    assert make_page_name(name_sources([source])[0], 3) == expected


def test_page_name_of_the_file_is_kept_unless_it_is_the_address() -> None:
    assert make_page_name(CameraConfig("Hall 2", "rtsp://10.0.0.5/x"), 1) == "Hall 2"
    assert make_page_name(CameraConfig("cam 10.0.0.5", "rtsp://h/x"), 1) == "camera 1"
    assert make_page_name(CameraConfig("nvr.local 4", "rtsp://u:p@NVR.local:554/x"), 1) == "camera 1"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        (socket.gethostname(), 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example:x", 403),
        ("", 403),
    ],
)
def test_host_header_is_checked(make_page: Callable[..., WebSink], host: str, status: int) -> None:
    page = make_page()
    for path in ("/", "/state", "/page.js", "/missing"):
        expected = 404 if (status, path) == (200, "/missing") else status
        assert send(page, path, Host=host)[0] == expected


def test_no_path_reaches_the_file_system(make_page: Callable[..., WebSink]) -> None:
    page = make_page()
    for path in ("/../web.py", "/%2e%2e/web.py", "/page/../../web.py", "//etc/passwd", "/index.html", "/page.js/"):
        assert send(page, path)[0] == 404
    headers = send(page, "/")[1]
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["X-Frame-Options"] == "DENY"


def test_other_address_requires_the_token(make_page: Callable[..., WebSink]) -> None:
    page = make_page(host="0.0.0.0")
    address = urlsplit(page.url)
    token = address.query.removeprefix("token=")
    assert len(token) >= 43 and address.port == page.port
    for path in ("/", "/state", "/frames?after=0:0", "/page.js", "/?token=", f"/?token={token[:-1]}", "/?token=%ff%00"):
        assert send(page, path)[0] == 401
    assert send(page, f"/state?token={token}")[0] == 401  # only the first page takes it
    status, headers, content = send(page, f"/?token={token}")
    assert status == 200 and b"refresh" in content and token.encode() not in content
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert send(page, "/state", Cookie=cookie.partition(";")[0])[0] == 200
    assert send(page, "/state", Cookie=cookie.partition("=")[0] + "=wrong")[0] == 401
    assert post_scene(page, SCENE)[0] == 401
    assert make_page(host="0.0.0.0").url.partition("token=")[2] != token


def test_local_page_has_no_token(make_page: Callable[..., WebSink]) -> None:
    page = make_page(host="localhost")
    assert "token" not in page.url
    with urllib.request.urlopen(page.url, timeout=10) as response:
        assert response.status == 200


CAMERA_FILE = """# All cameras
cameras:
  - name: door   # front
    source: rtsp://user:p%40ss@10.0.0.5/x
    lines: # old
      a: [[0, 0], [1, 1]]  # diagonal
    # behind the lines
    conf: 0.4

  # the yard
  - {name: yard, source: "0", zones: {}}
"""


def write_camera_file(tmp_path: Path, text: str = CAMERA_FILE) -> Path:
    path = tmp_path / "cameras.yaml"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


def test_saved_scene_is_in_the_file(make_page: Callable[..., WebSink], tmp_path: Path) -> None:
    path = write_camera_file(tmp_path)
    page = make_page(read_cameras(path), camera_file=path)
    assert post_scene(page, SCENE) == (200, {"is_active": False})
    door, yard = read_cameras(path)
    assert [(line.name, line.points) for line in door.lines] == [("gate", ((0.1, 0.5), (0.9, 0.5)))]
    assert [(zone.name, zone.points[2]) for zone in door.zones] == [("Tür 1", (1, 0.1235))]
    assert door.conf == 0.4 and door.source == "rtsp://user:p%40ss@10.0.0.5/x" and not yard.zones
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # it contains a password
    assert list(tmp_path.iterdir()) == [path]
    state = json.loads(send(page, "/state")[2])
    assert state["can_save"] and list(state["cameras"][0]["zones"]) == ["Tür 1"]


@pytest.mark.slow
def test_saved_scene_is_counted_from_the_next_frame(
    make_page: Callable[..., WebSink], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_camera_file(tmp_path)
    with ExitStack() as stack:
        source = stack.enter_context(open_source(str(write_image(tmp_path / "image.png"))))
        page = make_page(read_cameras(path), camera_file=path, pipelines=[CameraPipeline("door", source, 0.3)])
        pipeline = page._pipelines[0]
        monkeypatch.setattr(pipeline, "sinks", [page])
        detector = SimpleNamespace(metadata=SimpleNamespace(model="m", imgsz_hw=(32, 32)), backend="b", device="cpu")
        frame = Frame(np.zeros((90, 160, 3), np.uint8), 0.0)
        pipeline.write(detector, frame, Detections.empty(), StageTimes(1, 2, 3), 5.0)
        assert json.loads(send(page, "/state")[2])["cameras"][0]["counts"] == {}
        assert post_scene(page, SCENE) == (200, {"is_active": True})
        pipeline.write(detector, frame, Detections.empty(), StageTimes(1, 2, 3), 5.0)
        counts = json.loads(send(page, "/state")[2])["cameras"][0]["counts"]
        assert counts["lines"] == {"gate": {"left": 0, "right": 0}} and list(counts["zones"]) == ["Tür 1"]
        monkeypatch.setitem(sys.modules, "trackers", None)
        pipeline.tracker = None
        before = path.read_bytes()
        status, answer = post_scene(page, {**SCENE, "zones": {}})
        assert status == 400 and "hkd-det[track]" in answer["error"]
        assert path.read_bytes() == before  # with it, the command would not start


def test_scene_is_refused(make_page: Callable[..., WebSink], tmp_path: Path) -> None:
    path = write_camera_file(tmp_path)
    page = make_page(read_cameras(path), camera_file=path)
    for origin in ("http://evil.example", "null", "", f"http://127.0.0.1:{page.port + 1}"):
        assert post_scene(page, SCENE, Origin=origin)[0] == 403
    assert post_scene(page, SCENE, Content_Type="text/plain")[0] == 415
    assert post_scene(page, b"[" * 60_000)[0] == 400
    assert post_scene(page, b" " * 70_000)[0] == 413
    for scene, message in (
        ({"lines": {}}, "missing zones"),
        ({**SCENE, "source": "x"}, "source: no such setting"),
        ({"lines": {"a": [[0, 0], [2, 0]]}, "zones": {}}, "scene.lines.a: expected fractions"),
        ({"lines": {"a": [[0, 0], [1e999, 0]]}, "zones": {}}, "scene.lines.a: expected fractions"),
        ({"lines": {"a": [[0, 0]]}, "zones": {}}, "expected two different points"),
        ({"lines": {}, "zones": {"a\nb": [[0, 0], [1, 0], [1, 1]]}}, "expected a printable name"),
        ({"lines": {str(n): [[0, 0], [1, 1]] for n in range(51)}, "zones": {}}, "at most 50"),
    ):
        status, answer = post_scene(page, scene)
        assert status == 400 and message in answer["error"]
    assert path.read_text(encoding="utf-8") == CAMERA_FILE
    assert post_scene(make_page(), SCENE)[0] == 409


def test_error_of_the_file_is_in_the_log_only(
    make_page: Callable[..., WebSink], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_camera_file(tmp_path)
    page = make_page(read_cameras(path), camera_file=path)
    path.unlink()
    status, answer = post_scene(page, SCENE)
    assert status == 500 and str(tmp_path) not in answer["error"]
    assert "cameras.yaml: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "is_text_kept"),
    [
        (CAMERA_FILE, True),
        (CAMERA_FILE.replace("\n", "\r\n"), True),
        ("cameras: [{name: door, source: x}, {name: yard, source: y, conf: 0.2}]", True),
        ("cameras:\n- name: door\n  source: x # end", True),
        ("cameras:\n- lines:\n    {}\n  zones: {}\n  name: door\n  source: x\n# end\n", True),
        (
            "cameras:\n- name: door\n  source: x\n  zones:\n    b:\n    - [0, 0]\n    - [1, 0]\n    - [1, 1]\n\n# end",
            True,
        ),
        ("cameras:\n- {name: door, source: x,}\n", False),  # written again
        (
            "cameras:\n- name: door\n  source: x\n  lines: &a {a: [[0, 0], [1, 1]]}\n- {name: b, source: y, lines: *a}",
            False,
        ),
    ],
)
def test_other_keys_and_comments_are_kept(tmp_path: Path, text: str, is_text_kept: bool) -> None:
    path = write_camera_file(tmp_path)
    path.write_bytes(text.encode())
    before = yaml.safe_load(text)
    write_scene(path, "door", *parse_scene(SCENE))
    expected = {"gate": [[0.1, 0.5], [0.9, 0.5]]}, {"Tür 1": [[0, 0], [1, 0], [1, 0.1235]]}
    before["cameras"][0]["lines"], before["cameras"][0]["zones"] = expected
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == before
    if is_text_kept:
        changed = path.read_bytes().decode()
        comments = [line.strip() for line in text.splitlines() if line.strip().startswith("#")]
        assert [line.strip() for line in changed.splitlines() if line.strip().startswith("#")] == comments
        assert ("\r\n" in changed) == ("\r\n" in text)
        assert "[1.0, 0.1235]" in changed or "[1, 0.1235]" in changed
    write_scene(path, "door", (), ())
    door = read_cameras(path)[0]
    assert not door.lines and not door.zones


def test_camera_that_is_not_in_the_file_is_an_error(tmp_path: Path) -> None:
    path = write_camera_file(tmp_path)
    with pytest.raises(DataError, match="no camera hall"):
        write_scene(path, "hall", (), ())


def test_port_in_use_is_an_error(make_page: Callable[..., WebSink]) -> None:
    page = make_page()
    with pytest.raises(UsageError, match=rf"--web {page.port}: cannot listen on 127\.0\.0\.1: Address already in use"):
        WebSink(CAMERAS, [], page.port)
    with pytest.raises(UsageError, match=r"--host nohost\.invalid: unknown host"):
        WebSink(CAMERAS, [], 0, "nohost.invalid")


def test_flags_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--source", "x", "--host", "0.0.0.0"]) == 2
    assert "--host: requires --web" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--source", "x", "--web", "student.onnx"])
    assert "Write the model before --web." in capsys.readouterr().err


def test_temperature_is_that_of_the_hottest_sensor(tmp_path: Path) -> None:
    for number, text in enumerate(("41500\n", "67250\n", "-274000\n", "no\n")):
        (tmp_path / f"thermal_zone{number}").mkdir()
        (tmp_path / f"thermal_zone{number}" / "temp").write_text(text)
    assert read_temperature_c(tmp_path) == 67.25
    assert read_temperature_c(tmp_path / "missing") is None


def test_power_is_that_of_the_module(tmp_path: Path) -> None:
    hwmon = tmp_path / "sys/class/hwmon"

    def write(folder: str, **values: object) -> None:
        (hwmon / folder).mkdir(parents=True)
        for name, value in values.items():
            (hwmon / folder / name).write_text(f"{value}\n")

    assert read_power_w(tmp_path) is None and read_power_w(tmp_path / "missing") is None
    write("hwmon0", name="nvme", in1_label="VDD_IN", in1_input=1, curr1_input=1)
    cpu = {"in1_label": "VDD_CPU_GPU_CV", "in1_input": 5000, "curr1_input": 800}
    write("hwmon1", name="ina3221", **cpu)
    assert read_power_w(tmp_path) is None
    write("hwmon2", name="ina3221", in2_label="VDD_IN", in2_input=4968, curr2_input=1500, **cpu)
    assert read_power_w(tmp_path) == pytest.approx(4.968 * 1.5)
    (hwmon / "hwmon2" / "curr2_input").unlink()
    assert read_power_w(tmp_path) is None


def test_drift_is_shown_only_if_it_is_monitored(make_page: Callable[..., WebSink]) -> None:
    drift = {"state": "drift", "quantities": {"score": {"psi": 0.4, "threshold": 0.25, "drift": True}}}
    drifts = {"door": drift, CAMERAS[1].name: None}
    for describe, expected in ((drifts.get, [drift, {"state": "waiting"}]), (None, [None, None])):
        page = make_page(describe_drift=describe)
        with urllib.request.urlopen(f"{page.url}state", timeout=10) as response:
            assert [camera.get("drift") for camera in json.load(response)["cameras"]] == expected


@pytest.mark.slow
def test_ten_viewers_share_fifty_responses_per_second(make_page: Callable[..., WebSink]) -> None:
    page = make_page()
    end_s, counts = time.monotonic() + 2.0, [0] * 10

    def view(number: int) -> None:
        seq = 0
        while time.monotonic() < end_s:
            _, _, content = send(page, f"/frames?after=0:{seq}")
            (frame,) = json.loads(content[4 : 4 + struct.unpack(">I", content[:4])[0]])
            assert frame["seq"] > seq
            seq, counts[number] = frame["seq"], counts[number] + 1

    threads = [Thread(target=view, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        page.write(make_result())
        time.sleep(0.005)
    assert 10 < sum(counts) <= 120 and min(counts) >= 1  # 20 of them at the begin and the end


def test_status_is_hidden_with_word_boundaries() -> None:
    view = CameraView(CameraConfig("a", "http://cam/x"), 1)
    assert view.hide_address("camera lost: cam: cam:80 refuses") == "camera lost: the camera: the camera refuses"


@pytest.mark.slow
def test_command_serves_a_lost_camera_and_ends_within_two_seconds(
    tiny_onnx: Callable[..., Path], make_camera: Callable[..., Any]
) -> None:
    good, lost = make_camera(), make_camera()
    lost.off()
    flags = ["--source", good.address, "--source", lost.address, "--web", "0"]
    process = subprocess.Popen([*COMMAND, str(tiny_onnx()), *flags], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = process.stderr.readline().partition("page: ")[2].strip()
    deadline_s = time.monotonic() + 30
    states: list[dict[str, Any]] = []
    while time.monotonic() < deadline_s:
        with suppress(OSError), urllib.request.urlopen(f"{url}state", timeout=5) as response:
            states = json.load(response)["cameras"]
            if states[0]["num_frames"] > 5 and states[1]["is_down"]:
                break
        time.sleep(0.1)
    assert states[0]["status"] == "" and states[0]["persons"] >= 0
    assert states[1]["status"].startswith("camera lost")
    waiting = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port))  # a viewer of the lost camera
    waiting.sendall(b"GET /frames?after=1:0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    time.sleep(0.3)
    stop_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - stop_s < 2
    assert process.returncode == 0 and "Traceback" not in errors
    waiting.close()
