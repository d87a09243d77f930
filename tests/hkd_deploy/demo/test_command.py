"""`hkd-demo` as a user runs it: films, pictures, cameras, Ctrl-C, and one line for every mistake."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from hkd_deploy.demo.cli import main
from hkd_deploy.demo.run import FrameStats, run_demo, save_video
from hkd_deploy.draw import MatchStatus
from hkd_deploy.pipeline import open_detector
from hkd_deploy.streams import open_source

COMMAND = [sys.executable, "-c", "import sys; from hkd_deploy.demo.cli import main; sys.exit(main())"]


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """60 frames of 320x240, in which a white rectangle walks 4 px a frame."""
    path = tmp_path / "walk.avi"
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 20, (320, 240))
    for index in range(60):
        frame = np.full((240, 320, 3), 40, np.uint8)
        frame[120:220, 20 + 4 * index : 60 + 4 * index] = 255
        writer.write(frame)
    writer.release()
    return path


def frames_of(path: Path) -> list[np.ndarray]:
    reader = cv2.VideoCapture(str(path))
    frames = []
    while True:
        found, frame_bgr = reader.read()
        if not found:
            return frames
        frames.append(frame_bgr[..., ::-1])


def test_a_film_is_saved_with_its_boxes(
    tiny_onnx: Callable[..., Path], film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "seen.mp4"
    assert main([str(tiny_onnx()), "--source", str(film), "--conf", "0", "--save", str(out), "--threads", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("60 frames, ")
    assert printed.out.endswith(f"saved {out}\n")
    assert "60/60" in printed.err  # the bar
    frames = frames_of(out)
    assert len(frames) == 60
    assert frames[0].shape == (240, 320, 3)
    for index in (5, 30, 55):
        edge = frames[index][150:210, 18 + 4 * index : 23 + 4 * index].astype(int)
        near_green = np.abs(edge - MatchStatus.TRUE_POSITIVE.value).sum(axis=2).min(axis=1)
        assert near_green.mean() < 120, index
    assert cv2.VideoCapture(str(out)).get(cv2.CAP_PROP_FPS) == pytest.approx(20)


def test_scores_below_conf_are_not_drawn(tiny_onnx: Callable[..., Path], film: Path, tmp_path: Path) -> None:
    everything = tmp_path / "all.mp4"
    nothing = tmp_path / "none.mp4"
    assert save_video(tiny_onnx(), str(film), everything, conf=0.0, max_frames=3).num_frames == 3
    assert save_video(tiny_onnx(), str(film), nothing, conf=0.99, max_frames=3).num_frames == 3
    below_panel = [frames_of(path)[2][120:].astype(int) for path in (everything, nothing)]
    green = [(np.abs(picture - MatchStatus.TRUE_POSITIVE.value).sum(axis=2) < 90).sum() for picture in below_panel]
    assert green[0] > 100
    assert green[1] == 0


def test_a_picture_is_saved_as_a_picture(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    source, out = tmp_path / "one.png", tmp_path / "seen.png"
    cv2.imwrite(str(source), np.full((200, 300, 3), 240, np.uint8))
    assert main([str(tiny_onnx()), "--source", str(source), "--save", str(out)]) == 0
    assert cv2.imread(str(out)).shape == (200, 300, 3)


def test_a_folder_becomes_a_film(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, size in enumerate(((100, 160), (160, 100), (100, 160))):
        cv2.imwrite(str(folder / f"{index}.png"), np.full((*size, 3), 100, np.uint8))
    assert main([str(tiny_onnx()), "--source", str(folder), "--save", str(tmp_path / "seen.avi")]) == 0
    assert [frame.shape for frame in frames_of(tmp_path / "seen.avi")] == [(100, 160, 3)] * 3


def test_no_window_only_measures(
    tiny_onnx: Callable[..., Path], film: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--no-window", "--headless"):
        assert main([str(tiny_onnx()), "--source", str(film), flag, "--max-frames", "5"]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("5 frames, ")
        assert "saved" not in printed


def test_a_real_film(tiny_onnx: Callable[..., Path], real_film: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen.mp4"
    tally = save_video(tiny_onnx(), str(real_film), out, conf=0.3, max_frames=40)
    assert tally.num_frames == len(frames_of(out)) == 40


class ClosedAfter:
    """A window that the user closes after so many pictures."""

    def __init__(self, pictures: int) -> None:
        self.left = pictures

    def show(self, picture_rgb: np.ndarray) -> None:
        assert picture_rgb.dtype == np.uint8
        self.left -= 1

    def stays_open(self, wait_ms: int = 1) -> bool:
        assert wait_ms >= 1
        return self.left > 0


def test_closing_the_window_ends_the_run(tiny_onnx: Callable[..., Path], film: Path) -> None:
    tally = FrameStats()
    with open_detector(tiny_onnx()) as detector, open_source(str(film)) as source:
        run_demo(detector, source, 0.3, tally, window=ClosedAfter(4))  # type: ignore[arg-type]
    assert tally.num_frames == 4


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--source", "FILM", "--conf", "1.5", "--no-window"], 2, "--conf 1.5: expected a score from 0 to 1"),
        (["--source", "FILM", "--conf", "nan", "--no-window"], 2, "--conf nan"),
        (["--source", "FILM", "--max-frames", "0", "--no-window"], 2, "--max-frames 0: at least 1"),
        (["--source", "FILM", "--threads", "0", "--no-window"], 2, "--threads 0: at least 1"),
        (["--source", "FILM", "--device", "tpu", "--no-window"], 2, "--device tpu: expected cpu, cuda or cuda:0"),
        (["--source", "FILM", "--save", "out.mkv"], 2, "--save out.mkv: expected a file ending in .mp4, .avi, .webm"),
        (["--source", "FILM", "--save", "out.png"], 2, "--save out.png: expected a file ending in"),
        (["--source", "FILM", "--save", "FILM"], 2, "this is the source itself"),
        (["--source", "none.mp4", "--no-window"], 1, "none.mp4: no such file or folder"),
        (["--source", "gopher://a:b@c", "--no-window"], 2, "--source gopher://***@c: unknown kind of address"),
        (["--source", "97", "--no-window"], 1, "camera 97: gives no picture"),
        (["--source", "MODEL", "--no-window"], 1, "not a film"),
        (["--source", "FILM", "--save", "MODEL/out.mp4"], 1, "File exists"),
    ],
)
def test_mistakes_get_one_line(
    tiny_onnx: Callable[..., Path],
    film: Path,
    capfd: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    words: str,
) -> None:
    model = tiny_onnx()
    flags = [flag.replace("FILM", str(film)).replace("MODEL", str(model)) for flag in flags]
    assert main([str(model), *flags]) == code
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("hkd-demo: ")
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_a_camera_that_is_not_there_gets_one_line(tiny_onnx: Callable[..., Path]) -> None:
    # In a process of its own: the command quietens FFmpeg, which listens once, before its first use.
    flags = [str(tiny_onnx()), "--source", "rtsp://me:secret@127.0.0.1:9/x", "--no-window"]
    done = subprocess.run([*COMMAND, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("hkd-demo: rtsp://***@127.0.0.1:9/x: gives no picture; check")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


def test_a_headless_opencv_is_explained(
    tiny_onnx: Callable[..., Path], film: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GUI:   NONE\n")
    assert main([str(tiny_onnx()), "--source", str(film)]) == 1
    assert "pip install opencv-python" in capsys.readouterr().err


def test_a_damaged_film_is_said_and_what_could_be_read_is_kept(
    tiny_onnx: Callable[..., Path], film: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    out = tmp_path / "seen.mp4"
    assert main([str(tiny_onnx()), "--source", str(film), "--save", str(out)]) == 1
    printed = capfd.readouterr()
    assert "of 60 frames: cut off or damaged" in printed.err.splitlines()[-1]
    assert printed.out.endswith(f"saved {out}\n")
    assert 10 < len(frames_of(out)) < 60


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_a_playable_film(
    tiny_onnx: Callable[..., Path], camera: object, tmp_path: Path, stop: signal.Signals
) -> None:
    out = tmp_path / "out" / "seen.mp4"
    source = camera.address  # type: ignore[attr-defined]
    process = subprocess.Popen(
        [*COMMAND, str(tiny_onnx()), "--source", source, "--save", str(out), "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s and not any(each.stat().st_size > 0 for each in out.parent.glob(".seen-*")):
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(stop)
    printed, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.endswith("hkd-demo: interrupted\n")
    assert "Traceback" not in errors
    assert "camera to boxes" in printed
    assert printed.endswith(f"saved {out}\n")
    assert [each.name for each in out.parent.iterdir()] == ["seen.mp4"]
    assert len(frames_of(out)) >= 5
