"""Tests of the video and image files that the demo writes."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from hkd_deploy.demo.output import ENCODERS, VideoWriter, open_image_writer, open_video_writer
from hkd_det.errors import DataError, UsageError


def make_image(level: int, size_hw: tuple[int, int] = (48, 64)) -> np.ndarray:
    return np.full((*size_hw, 3), level, np.uint8)


def read_video(path: Path) -> tuple[float, list[np.ndarray]]:
    reader = cv2.VideoCapture(str(path))
    frames = []
    while True:
        has_frame, frame_bgr = reader.read()
        if not has_frame:
            return reader.get(cv2.CAP_PROP_FPS), frames
        frames.append(frame_bgr[..., ::-1])


@pytest.mark.parametrize("suffix", sorted(ENCODERS))
def test_open_video_writer_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / "folder" / f"video{suffix}"
    with open_video_writer(path, fps=12) as writer:
        for index in range(30):
            writer.write(make_image(5 * index))
        assert not path.exists()  # the file appears when it is complete
    fps, frames = read_video(path)
    assert fps == pytest.approx(12, rel=0.01)
    levels = np.array([frame.mean() for frame in frames])
    assert len(levels) == 30
    assert np.abs(levels - 5 * np.arange(30)).max() < 12  # lossy
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_open_video_writer_keeps_rgb_order(tmp_path: Path) -> None:
    with open_video_writer(tmp_path / "video.mp4", fps=10) as writer:
        for _ in range(3):
            writer.write(np.full((48, 64, 3), (200, 30, 30), np.uint8))
    color = read_video(tmp_path / "video.mp4")[1][0].mean(axis=(0, 1))
    assert np.abs(color - (200, 30, 30)).max() < 15


def test_write_other_size_is_letterboxed(tmp_path: Path) -> None:
    with open_video_writer(tmp_path / "video.avi", fps=10) as writer:
        writer.write(make_image(0))
        writer.write(make_image(250, (100, 50)))
    _, frames = read_video(tmp_path / "video.avi")
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 2
    assert frames[1][:, :20].mean() > 235
    assert frames[1][:, 40:].mean() == pytest.approx(114, abs=8)


def test_write_odd_size(tmp_path: Path) -> None:
    with open_video_writer(tmp_path / "video.mp4", fps=10) as writer:
        for _ in range(5):
            writer.write(make_image(100, (47, 63)))
    assert len(read_video(tmp_path / "video.mp4")[1]) == 5


class CountingWriter:
    """Fake of cv2.VideoWriter."""

    def __init__(self, *_: object) -> None:
        self.written = 0

    def isOpened(self) -> bool:  # noqa: N802 - name of OpenCV
        return True

    def write(self, _: object) -> None:
        self.written += 1


def test_write_live_frames_keeps_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoWriter", type("Writer", (CountingWriter,), {"fourcc": staticmethod(lambda *_: 0)}))
    writer = VideoWriter(Path("video.mp4"), fps=10)
    counts = []
    for captured_s in (100.0, 100.1, 100.5, 100.51, 100.6, 100.9, 160.0, 160.1, 160.2):
        writer.write(make_image(0), captured_s)
        counts.append(writer.num_frames)
    # One per frame; 0.4 s repeated; two close frames, so the second is early; caught up; a gap of 59 s becomes 2 s.
    assert counts == [1, 2, 6, 7, 8, 10, 30, 31, 32]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), DataError("source: damaged")])
def test_open_video_writer_interrupted_keeps_frames(tmp_path: Path, stop: BaseException) -> None:
    path = tmp_path / "video.mp4"
    with pytest.raises(type(stop)) as caught, open_video_writer(path, fps=10) as writer:
        for _ in range(7):
            writer.write(make_image(9))
        raise stop
    assert caught.value is stop
    assert len(read_video(path)[1]) == 7
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), DataError("source: damaged"), ZeroDivisionError()])
def test_open_video_writer_no_frame_keeps_old_file(tmp_path: Path, stop: BaseException) -> None:
    path = tmp_path / "video.mp4"
    path.write_text("old content")
    with pytest.raises(type(stop)), open_video_writer(path, fps=10):
        raise stop
    assert path.read_text() == "old content"
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]


def test_open_video_writer_other_error_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_video_writer(tmp_path / "video.mp4", fps=10) as writer:
        writer.write(make_image(9))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_open_video_writer_no_frame_raises(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"video.mp4: not written: the source returned no frame"),
        open_video_writer(tmp_path / "video.mp4", 10),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["video.mov", "video", "video.gif", "video.png"])
def test_open_video_writer_unknown_suffix_raises(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(UsageError, match=r"expected a file ending in .mp4, .avi, .webm"),
        open_video_writer(tmp_path / name, 10),
    ):
        pass


def test_write_unsupported_size_raises(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"cannot write a .mp4 video of 9000x2"),
        open_video_writer(tmp_path / "a.mp4", 10) as writer,
    ):
        writer.write(make_image(0, (2, 9000)))
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from hkd_deploy.demo.output import open_video_writer
from hkd_det.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # a full disk: no file may grow larger
noise = np.random.default_rng(0)
try:
    with open_video_writer(Path(sys.argv[1]), 10) as writer:
        for _ in range(60):
            writer.write(noise.integers(0, 256, (240, 320, 3), dtype=np.uint8))
except DataError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", sorted(ENCODERS))
def test_open_video_writer_full_disk_raises(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"video{suffix}"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path}: the video is incomplete. Check the free disk space.\n"
    assert list(tmp_path.iterdir()) == []


def test_open_image_writer_round_trip(tmp_path: Path) -> None:
    with open_image_writer(tmp_path / "new" / "out.png") as writer:
        writer.write(np.full((5, 7, 3), (9, 8, 7), np.uint8))
    assert cv2.imread(str(tmp_path / "new" / "out.png"))[0, 0].tolist() == [7, 8, 9]


def test_open_image_writer_failure_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imwrite", lambda *_: False)
    with (
        pytest.raises(DataError, match="cannot write the image"),
        open_image_writer(tmp_path / "out.png") as writer,
    ):
        writer.write(make_image(0))
    assert list(tmp_path.iterdir()) == []
