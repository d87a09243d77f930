"""Tests of the command `hkd-demo`: videos, images, cameras, Ctrl-C and error messages."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import cv2
import numpy as np
import pytest

from hkd_deploy.demo.cli import main, save_video
from hkd_deploy.demo.events import EventWriter
from hkd_deploy.demo.run import CameraPipeline, run_cameras
from hkd_deploy.demo.sinks import WindowSink
from hkd_deploy.pipeline import open_detector
from hkd_deploy.streams import open_source
from hkd_det.draw import MatchStatus

COMMAND = [sys.executable, "-c", "import sys; from hkd_deploy.demo.cli import main; sys.exit(main())"]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """60 frames of 320x240 with a white rectangle that moves 4 px per frame."""
    path = tmp_path / "walk.avi"
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 20, (320, 240))
    for index in range(60):
        frame = np.full((240, 320, 3), 40, np.uint8)
        frame[120:220, 20 + 4 * index : 60 + 4 * index] = 255
        writer.write(frame)
    writer.release()
    return path


def read_frames(path: Path) -> list[np.ndarray]:
    reader = cv2.VideoCapture(str(path))
    frames = []
    while True:
        has_frame, frame_bgr = reader.read()
        if not has_frame:
            return frames
        frames.append(frame_bgr[..., ::-1])


def test_save_video_contains_boxes(
    tiny_onnx: Callable[..., Path], video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out.mp4"
    assert main([str(tiny_onnx()), "--source", str(video), "--conf", "0", "--save", str(out), "--threads", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("60 frames, ")
    assert printed.out.endswith(f"saved {out}\n")
    assert "60/60" in printed.err  # the progress line
    frames = read_frames(out)
    assert len(frames) == 60
    assert frames[0].shape == (240, 320, 3)
    for index in (5, 30, 55):
        edge = frames[index][150:210, 18 + 4 * index : 23 + 4 * index].astype(int)
        near_green = np.abs(edge - MatchStatus.TRUE_POSITIVE.value).sum(axis=2).min(axis=1)
        assert near_green.mean() < 120, index
    assert cv2.VideoCapture(str(out)).get(cv2.CAP_PROP_FPS) == pytest.approx(20)


def test_conf_hides_lower_scores(tiny_onnx: Callable[..., Path], video: Path, tmp_path: Path) -> None:
    all_path = tmp_path / "all.mp4"
    none_path = tmp_path / "none.mp4"
    assert save_video(tiny_onnx(), str(video), all_path, conf=0.0, max_frames=3).num_frames == 3
    assert save_video(tiny_onnx(), str(video), none_path, conf=0.99, max_frames=3).num_frames == 3
    below_overlay = [read_frames(path)[2][120:].astype(int) for path in (all_path, none_path)]
    green = [(np.abs(image - MatchStatus.TRUE_POSITIVE.value).sum(axis=2) < 90).sum() for image in below_overlay]
    assert green[0] > 100
    assert green[1] == 0


@pytest.mark.parametrize(
    ("changes", "flags", "is_drawn"),
    [
        ({"hkd.conf": "0.99"}, [], False),  # the score of the box is below 0.99 and above 0.3
        ({"hkd.conf": "0.99"}, ["--conf", "0.2"], True),
        ({"hkd.conf": "0.2"}, [], True),
        ({}, [], True),
        ({}, ["--conf", "0"], True),
        ({}, ["--conf", "0.99"], False),
    ],
)
def test_default_conf_is_that_of_the_model(
    tiny_onnx: Callable[..., Path], tmp_path: Path, changes: dict[str, str], flags: list[str], is_drawn: bool
) -> None:
    source, out = tmp_path / "one.png", tmp_path / "out.png"
    image = np.zeros((192, 320, 3), np.uint8)
    image[:, 160:] = 240  # half of the image: the score is 0.47
    cv2.imwrite(str(source), image)
    assert main([str(tiny_onnx(changes=changes)), "--source", str(source), "--save", str(out), *flags]) == 0
    left_edge = cv2.imread(str(out))[120:180, 160, ::-1]
    assert (left_edge == MatchStatus.TRUE_POSITIVE.value).all() == is_drawn


def test_save_single_image_writes_image(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    source, out = tmp_path / "one.png", tmp_path / "out.png"
    cv2.imwrite(str(source), np.full((200, 300, 3), 240, np.uint8))
    assert main([str(tiny_onnx()), "--source", str(source), "--save", str(out)]) == 0
    assert cv2.imread(str(out)).shape == (200, 300, 3)


def test_save_directory_writes_video(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index, size in enumerate(((100, 160), (160, 100), (100, 160))):
        cv2.imwrite(str(folder / f"{index}.png"), np.full((*size, 3), 100, np.uint8))
    assert main([str(tiny_onnx()), "--source", str(folder), "--save", str(tmp_path / "out.avi")]) == 0
    assert [frame.shape for frame in read_frames(tmp_path / "out.avi")] == [(100, 160, 3)] * 3


def test_no_show_prints_statistics_only(
    tiny_onnx: Callable[..., Path], video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--no-show", "--headless"):
        assert main([str(tiny_onnx()), "--source", str(video), flag, "--max-frames", "5"]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("5 frames, ")
        assert "saved" not in printed


def test_a_real_film(tiny_onnx: Callable[..., Path], real_video: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    stats = save_video(tiny_onnx(), str(real_video), out, conf=0.3, max_frames=40)
    assert stats.num_frames == len(read_frames(out)) == 40


class ClosingWindow:
    """A window that the user closes after a number of images."""

    def __init__(self, num_images: int) -> None:
        self.remaining = num_images

    def show(self, image_rgb: np.ndarray) -> None:
        assert image_rgb.dtype == np.uint8
        self.remaining -= 1

    def is_open(self, wait_ms: int = 1) -> bool:
        assert wait_ms >= 1
        return self.remaining > 0


def test_run_demo_closed_window_stops(tiny_onnx: Callable[..., Path], video: Path) -> None:
    window = WindowSink(ClosingWindow(4), ["walk"])  # type: ignore[arg-type]
    with open_detector(tiny_onnx()) as detector, open_source(str(video)) as source:
        pipeline = CameraPipeline("walk", source, 0.3, [window])
        run_cameras([pipeline], detector, window)
    assert pipeline.stats.num_frames == 4


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--source", "VIDEO", "--conf", "1.5", "--no-show"], 2, "--conf: expected 0 to 1, got 1.5."),
        (["--source", "VIDEO", "--conf", "nan", "--no-show"], 2, "--conf: expected a finite number, got nan."),
        (["--source", "VIDEO", "--max-frames", "0", "--no-show"], 2, "--max-frames: expected at least 1, got 0."),
        (["--source", "VIDEO", "--threads", "0", "--no-show"], 2, "--threads: expected at least 1, got 0."),
        (["--source", "VIDEO", "--device", "tpu", "--no-show"], 2, "--device: expected cpu, cuda or cuda:N, got tpu."),
        (["--source", "VIDEO", "--save", "out.mkv"], 2, "--save out.mkv: expected a file ending in .mp4, .avi, .webm"),
        (["--source", "VIDEO", "--save", "out.png"], 2, "--save out.png: expected a file ending in"),
        (["--source", "VIDEO", "--save", "VIDEO"], 2, "this file is the source"),
        (["--source", "none.mp4", "--no-show"], 1, "none.mp4: no such file or directory"),
        (["--source", "gopher://a:b@c", "--no-show"], 2, "--source gopher://***@c: unknown URL scheme"),
        (["--source", "97", "--no-show"], 1, "camera 97: the camera returns no image"),
        (["--source", "MODEL", "--no-show"], 1, "not a readable video"),
        (["--source", "VIDEO", "--save", "MODEL/out.mp4"], 1, "File exists"),
    ],
)
def test_error_prints_one_line(
    tiny_onnx: Callable[..., Path],
    video: Path,
    capfd: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    message: str,
) -> None:
    model = tiny_onnx()
    flags = [flag.replace("VIDEO", str(video)).replace("MODEL", str(model)) for flag in flags]
    assert main([str(model), *flags]) == code
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("hkd-demo: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_unreachable_camera_prints_one_line(tiny_onnx: Callable[..., Path]) -> None:
    # In a separate process: FFmpeg reads the log level only once, before its first use.
    flags = [str(tiny_onnx()), "--source", "rtsp://me:secret@127.0.0.1:9/x", "--no-show"]
    done = subprocess.run([*COMMAND, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("hkd-demo: rtsp://***@127.0.0.1:9/x: nothing listens at port 9. Check")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


def test_show_with_headless_opencv_raises(
    tiny_onnx: Callable[..., Path], video: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GUI:   NONE\n")
    assert main([str(tiny_onnx()), "--source", str(video)]) == 1
    assert "pip install opencv-python" in capsys.readouterr().err


def test_truncated_video_raises_and_keeps_frames(
    tiny_onnx: Callable[..., Path], video: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    out = tmp_path / "out.mp4"
    assert main([str(tiny_onnx()), "--source", str(video), "--save", str(out)]) == 1
    printed = capfd.readouterr()
    assert re.search(r"truncated or damaged after \d+ of 60 frames", printed.err.splitlines()[-1])
    assert printed.out.endswith(f"saved {out}\n")
    assert 10 < len(read_frames(out)) < 60


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_leaves_playable_video(
    tiny_onnx: Callable[..., Path], camera: object, tmp_path: Path, stop: signal.Signals
) -> None:
    out = tmp_path / "out" / "out.mp4"
    source = camera.address  # type: ignore[attr-defined]
    process = subprocess.Popen(
        [*COMMAND, str(tiny_onnx()), "--source", source, "--save", str(out), "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s and not any(path.stat().st_size for path in out.parent.glob(".out.mp4-*/*")):
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(stop)
    printed, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "since capture" in printed
    assert printed.endswith(f"saved {out}\n")
    assert [file.name for file in out.parent.iterdir()] == ["out.mp4"]
    assert len(read_frames(out)) >= 5


@pytest.mark.slow
def test_signal_ends_a_camera_that_hangs(tiny_onnx: Callable[..., Path], camera: object) -> None:
    camera.hang()  # type: ignore[attr-defined]
    flags = [str(tiny_onnx()), "--source", camera.address, "--no-show", "--threads", "1"]  # type: ignore[attr-defined]
    process = subprocess.Popen([*COMMAND, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s and camera.connections == 0:  # type: ignore[attr-defined]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


def test_events_are_one_line_of_json_per_frame(
    tiny_onnx: Callable[..., Path], video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "events.jsonl"
    flags = [str(tiny_onnx()), "--source", str(video), "--conf", "0", "--threads", "1", "--max-frames", "5"]
    assert main([*flags, "--events", str(out)]) == 0
    events = [json.loads(line) for line in out.read_text().splitlines()]
    assert [event["frame"] for event in events] == list(range(5))
    assert {(event["version"], event["event"], event["camera"]) for event in events} == {(1, "frame", str(video))}
    assert [event["position_s"] for event in events] == pytest.approx([n / 20 for n in range(5)], abs=1e-3)
    for event in events:
        assert event["image_wh"] == [320, 240] and event["num_persons"] == len(event["persons"]) == 1
        assert "age_ms" not in event and datetime.fromisoformat(event["time"]).tzinfo is not None
    with open_detector(flags[0]) as detector, open_source(str(video)) as source:
        expected = detector(next(iter(source)).image_rgb)
    person = events[0]["persons"][0]
    assert person["box_xyxy"] == pytest.approx(expected.boxes_xyxy[0].tolist(), abs=0.1)
    assert person["score"] == pytest.approx(float(expected.scores[0]), abs=1e-3)
    capsys.readouterr()
    assert main([*flags, "--events", "-"]) == 0
    printed = capsys.readouterr()
    assert len([json.loads(line) for line in printed.out.splitlines()]) == 5
    assert "5 frames, " in printed.err


def test_events_of_a_camera_have_ages_and_its_status(tiny_onnx: Callable[..., Path], camera: object) -> None:
    stream = io.StringIO()
    with open_detector(tiny_onnx()) as detector, open_source(camera.address) as source:  # type: ignore[attr-defined]
        events = EventWriter(stream)
        run_cameras([CameraPipeline("entrance", source, 0.3, [events])], detector, max_frames=3)
        events.write_status("entrance", "camera lost: no data")
        events.write_status("entrance", "")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["frame"] * 3 + ["status"] * 2
    assert {line["camera"] for line in lines} == {"entrance"}
    assert all(0 <= line["age_ms"] < 5000 and "position_s" not in line for line in lines[:3])
    assert [line["status"] for line in lines[3:]] == ["camera lost: no data", "ok"]


@pytest.mark.parametrize("redaction", ["blur", "pixelate", "fill"])
def test_privacy_hides_people_and_nothing_else(tiny_onnx: Callable[..., Path], tmp_path: Path, redaction: str) -> None:
    paths = [tmp_path / "plain.png", tmp_path / "hidden.png"]
    image = tmp_path / "image.png"
    stripes = np.full((240, 320, 3), 20, np.uint8)
    stripes[60:180, 100:160] = 255
    stripes[60:180:4, 100:160] = 210  # detail inside the person
    cv2.imwrite(str(image), stripes)
    for path, flags in zip(paths, ([], ["--privacy", redaction]), strict=True):
        assert main([str(tiny_onnx()), "--source", str(image), "--conf", "0", "--save", str(path), *flags]) == 0
    plain, hidden = (cv2.imread(str(path)).astype(int) for path in paths)
    inside = np.s_[80:160, 110:150]
    row_contrast = [np.abs(np.diff(picture[inside], axis=0)).mean() for picture in (plain, hidden)]
    assert row_contrast[0] > 10 and row_contrast[1] < 3
    assert np.array_equal(plain[200:], hidden[200:]) and np.array_equal(
        plain[120:, 200:], hidden[120:, 200:]
    )  # the times stand at the top
