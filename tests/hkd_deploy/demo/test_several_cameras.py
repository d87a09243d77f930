"""Tests of `hkd-demo` with several sources: events, files, settings of each camera, window."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from hkd_deploy.backends.base import StageTimes
from hkd_deploy.demo.base import FrameResult
from hkd_deploy.demo.cli import main
from hkd_deploy.demo.sinks import WindowSink, arrange_grid, make_file_paths
from hkd_det.errors import UsageError
from hkd_det.structures import Detections


def write_video(path: Path, num_frames: int, level: int = 255) -> Path:
    """Write a video with a rectangle that the tiny model detects."""
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 10, (160, 96))
    for _ in range(num_frames):
        frame = np.full((96, 160, 3), 20, np.uint8)
        frame[20:80, 40:100] = level
        writer.write(frame)
    writer.release()
    return path


def count_frames(path: Path) -> int:
    return int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT))


def read_events(text: str) -> dict[str, list[dict[str, Any]]]:
    cameras: dict[str, list[dict[str, Any]]] = {}
    for line in text.splitlines():
        event = json.loads(line)
        cameras.setdefault(event["camera"], []).append(event)
    return cameras


def test_videos_run_to_their_ends(
    tiny_onnx: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = [write_video(tmp_path / f"{name}.avi", count) for name, count in (("a", 12), ("b", 5))]
    folder = tmp_path / "out"
    flags = ["--source", str(videos[0]), "--source", str(videos[1]), "--events", "-", "--save", str(folder)]
    assert main([str(tiny_onnx()), *flags]) == 0
    printed = capsys.readouterr()
    cameras = read_events(printed.out)
    for video, count in zip(videos, (12, 5), strict=True):
        events = cameras[str(video)]
        assert [event["frame"] for event in events] == list(range(count))
        assert [event["position_s"] for event in events] == pytest.approx([n / 10 for n in range(count)], abs=1e-3)
    assert sorted(count_frames(path) for path in folder.iterdir()) == [5, 12]
    for path in folder.iterdir():
        assert f"saved {path}" in printed.err
    rows = [line for line in printed.err.splitlines() if line.startswith(str(tmp_path))]
    assert [row.split()[1:3] for row in rows] == [["12", "0"], ["5", "0"]]


def test_damaged_video_does_not_end_the_others(
    tiny_onnx: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write_video(tmp_path / "good.avi", 20), write_video(tmp_path / "bad.avi", 20)
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    assert main([str(tiny_onnx()), "--source", str(bad), "--source", str(good), "--events", "-"]) == 1
    printed = capsys.readouterr()
    cameras = read_events(printed.out)
    assert len(cameras[str(good)]) == 20
    assert cameras[str(bad)][-1]["status"].startswith(f"ended: {bad}: truncated or damaged")
    assert printed.err.splitlines()[-1].startswith(f"hkd-demo: {bad}: truncated or damaged")


@pytest.mark.slow
def test_cameras_have_their_own_settings(tiny_onnx: Callable[..., Path], make_camera: Any, tmp_path: Path) -> None:
    live, off = make_camera(), make_camera()
    off.off()
    video = write_video(tmp_path / "v.avi", 4)
    config, events, folder = tmp_path / "cameras.yaml", tmp_path / "events.jsonl", tmp_path / "out"
    config.write_text(
        f"cameras:\n- {{name: low, source: {video}, conf: 0, privacy: fill}}\n- {{name: high, source: {video}}}\n"
        f"- {{name: live, source: {live.address}}}\n- {{name: dead/cam, source: {off.address}}}\n"
    )
    flags = ["--cameras", str(config), "--conf", "0.9", "--events", str(events), "--save", str(folder)]
    assert main([str(tiny_onnx()), *flags, "--max-frames", "40"]) == 0
    cameras = read_events(events.read_text())
    assert [event["num_persons"] for event in cameras["low"]] == [1] * 4
    assert [event["num_persons"] for event in cameras["high"]] == [0] * 4
    assert len(cameras["live"]) == 32 and all(event["age_ms"] < 3000 for event in cameras["live"])
    assert [event["status"].partition(":")[0] for event in cameras["dead/cam"]] == ["camera lost"]
    assert sorted(path.name for path in folder.iterdir()) == ["high.mp4", "live.mp4", "low.mp4"]
    person = np.s_[86:90, 60:90]  # below the text
    images = [cv2.VideoCapture(str(folder / name)).read()[1] for name in ("low.mp4", "high.mp4")]
    inside = [image[60:78, 50:90].mean() for image in images]
    assert inside[0] < 150 and inside[1] > 200
    assert abs(images[0][person].mean() - images[1][person].mean()) < 30


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "VIDEO", "--cameras", "x.yaml"], "not allowed with argument --source"),
        (["--no-show"], "one of the arguments --source --cameras is required"),
    ],
)
def test_source_or_cameras_is_required(
    tiny_onnx: Callable[..., Path], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main([str(tiny_onnx()), *flags])
    assert message in capsys.readouterr().err


def test_save_of_several_cameras_is_a_directory(
    tiny_onnx: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = str(write_video(tmp_path / "v.avi", 2))
    assert main([str(tiny_onnx()), "--source", video, "--source", video, "--save", str(tmp_path / "out.mp4")]) == 2
    assert "out.mp4: expected a directory, because there are 2 cameras." in capsys.readouterr().err


def test_make_file_paths_are_unique_and_safe() -> None:
    names = ["rtsp://***@cam/1", "rtsp:/***@cam/1", "../../etc/passwd", "...", "Tür 1"]
    paths = [str(path) for path in make_file_paths(Path("out"), names)]
    assert paths == [
        "out/rtsp_cam_1.mp4",
        "out/rtsp_cam_1_2.mp4",
        "out/etc_passwd.mp4",
        "out/camera.mp4",
        "out/Tür_1.mp4",
    ]
    with pytest.raises(UsageError, match="expected a directory"):
        make_file_paths(Path("out.png"), names)


class FakeWindow:
    def __init__(self) -> None:
        self.shown: list[np.ndarray] = []

    def show(self, image_rgb: np.ndarray) -> None:
        self.shown.append(image_rgb.copy())

    def is_open(self, wait_ms: int = 1) -> bool:
        return wait_ms >= 1


def make_result(camera: str, level: int) -> FrameResult:
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    image = np.full((360, 640, 3), level, np.uint8)
    return FrameResult(camera, 0, image, none, none, 0.3, 0.0, None, StageTimes(0, 0, 0))


def test_window_shows_a_grid_with_lost_cameras() -> None:
    window = FakeWindow()
    sink = WindowSink(window, ["a", "b", "c"])  # type: ignore[arg-type]
    sink.write(make_result("a", 50))
    sink.write(make_result("b", 150))
    assert sink.is_open() and sink.is_open()
    sink.write_status("b", "camera lost: off")
    sink.write_status("c", "camera lost: off")
    assert sink.is_open()
    first, second = window.shown  # without changes, nothing is shown
    assert first.shape == (720, 1280, 3)
    for grid, levels in ((first, (50, 150, 0)), (second, (50, 50, 0))):  # a lost camera is dark
        assert [grid[y, x, 0] for y, x in ((340, 600), (340, 1240), (700, 600))] == list(levels)
    assert second[360:400, :640].max() > 100  # text in the cell of the camera without an image


def test_grid_of_one_camera_is_its_image() -> None:
    image = np.zeros((5, 7, 3), np.uint8)
    assert arrange_grid([image]) is image
    assert arrange_grid([None, image, None, None, None]).shape == (720, 1280, 3)
