"""Films: readable again, whole or as far as they came, and never half a file."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from hkd_deploy.demo.output import ENCODERS, VideoWriter, open_image_writer, open_video_writer
from hkd_det.errors import DataError, UsageError


def picture(level: int, size_hw: tuple[int, int] = (48, 64)) -> np.ndarray:
    return np.full((*size_hw, 3), level, np.uint8)


def read_back(path: Path) -> tuple[float, list[np.ndarray]]:
    reader = cv2.VideoCapture(str(path))
    frames = []
    while True:
        found, frame_bgr = reader.read()
        if not found:
            return reader.get(cv2.CAP_PROP_FPS), frames
        frames.append(frame_bgr[..., ::-1])


@pytest.mark.parametrize("suffix", sorted(ENCODERS))
def test_a_film_reads_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / "folder" / f"film{suffix}"
    with open_video_writer(path, fps=12) as film:
        for index in range(30):
            film.write(picture(5 * index))
        assert not path.exists()  # not before it is whole
    fps, frames = read_back(path)
    assert fps == pytest.approx(12, rel=0.01)
    levels = np.array([frame.mean() for frame in frames])
    assert len(levels) == 30
    assert np.abs(levels - 5 * np.arange(30)).max() < 12  # lossy
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_red_stays_red(tmp_path: Path) -> None:
    with open_video_writer(tmp_path / "film.mp4", fps=10) as film:
        for _ in range(3):
            film.write(np.full((48, 64, 3), (200, 30, 30), np.uint8))
    colour = read_back(tmp_path / "film.mp4")[1][0].mean(axis=(0, 1))
    assert np.abs(colour - (200, 30, 30)).max() < 15


def test_another_size_is_letterboxed_into_the_first(tmp_path: Path) -> None:
    with open_video_writer(tmp_path / "film.avi", fps=10) as film:
        film.write(picture(0))
        film.write(picture(250, (100, 50)))
    _, frames = read_back(tmp_path / "film.avi")
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 2
    assert frames[1][:, :20].mean() > 235
    assert frames[1][:, 40:].mean() == pytest.approx(114, abs=8)


def test_odd_sizes_are_written(tmp_path: Path) -> None:
    with open_video_writer(tmp_path / "film.mp4", fps=10) as film:
        for _ in range(5):
            film.write(picture(100, (47, 63)))
    assert len(read_back(tmp_path / "film.mp4")[1]) == 5


class Counting:
    """Stands for OpenCV's writer."""

    def __init__(self, *_: object) -> None:
        self.written = 0

    def isOpened(self) -> bool:  # noqa: N802 (OpenCV's name)
        return True

    def write(self, _: object) -> None:
        self.written += 1


def test_a_live_film_keeps_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoWriter", type("Writer", (Counting,), {"fourcc": staticmethod(lambda *_: 0)}))
    film = VideoWriter(Path("film.mp4"), fps=10)
    counts = []
    for captured_s in (100.0, 100.1, 100.5, 100.51, 100.6, 100.9, 160.0, 160.1, 160.2):
        film.write(picture(0), captured_s)
        counts.append(film.num_frames)
    # One for each; 0.4 s held; two so close that the second is early by one; caught up; a minute's silence is 2.1 s.
    assert counts == [1, 2, 6, 7, 8, 10, 31, 32, 33]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), DataError("source: damaged")])
def test_what_was_seen_is_kept(tmp_path: Path, stop: BaseException) -> None:
    path = tmp_path / "film.mp4"
    with pytest.raises(type(stop)) as caught, open_video_writer(path, fps=10) as film:
        for _ in range(7):
            film.write(picture(9))
        raise stop
    assert caught.value is stop
    assert len(read_back(path)[1]) == 7
    assert [each.name for each in tmp_path.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), DataError("source: damaged"), ZeroDivisionError()])
def test_nothing_seen_leaves_what_was_there(tmp_path: Path, stop: BaseException) -> None:
    path = tmp_path / "film.mp4"
    path.write_text("the film of yesterday")
    with pytest.raises(type(stop)), open_video_writer(path, fps=10):
        raise stop
    assert path.read_text() == "the film of yesterday"
    assert [each.name for each in tmp_path.iterdir()] == ["film.mp4"]


def test_a_bug_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_video_writer(tmp_path / "film.mp4", fps=10) as film:
        film.write(picture(9))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_no_frame_at_all(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"film.mp4: not written, no frame came"),
        open_video_writer(tmp_path / "film.mp4", 10),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["film.mov", "film", "film.gif", "film.png"])
def test_a_suffix_without_an_encoder(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(UsageError, match=r"expected a file ending in .mp4, .avi, .webm"),
        open_video_writer(tmp_path / name, 10),
    ):
        pass


def test_a_size_no_encoder_takes(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"cannot write a .mp4 film of 9000x2"),
        open_video_writer(tmp_path / "a.mp4", 10) as film,
    ):
        film.write(picture(0, (2, 9000)))
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from hkd_deploy.demo.output import open_film
from hkd_det.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # no file may grow larger: as a disk that is full
noise = np.random.default_rng(0)
try:
    with open_film(Path(sys.argv[1]), 10) as film:
        for _ in range(60):
            film.write(noise.integers(0, 256, (240, 320, 3), dtype=np.uint8))
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", sorted(ENCODERS))
def test_a_full_disk_is_said(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"film{suffix}"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path}: the film could not be written whole; is the disk full?\n"
    assert list(tmp_path.iterdir()) == []


def test_a_still(tmp_path: Path) -> None:
    with open_image_writer(tmp_path / "new" / "seen.png") as still:
        still.write(np.full((5, 7, 3), (9, 8, 7), np.uint8))
    assert cv2.imread(str(tmp_path / "new" / "seen.png"))[0, 0].tolist() == [7, 8, 9]


def test_a_still_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imwrite", lambda *_: False)
    with (
        pytest.raises(DataError, match="cannot write a picture here"),
        open_image_writer(tmp_path / "seen.png") as still,
    ):
        still.write(picture(0))
    assert list(tmp_path.iterdir()) == []
