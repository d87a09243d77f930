"""Tests of video files: times of variable rates, wrong frame counts, damage, codecs."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from hkd_deploy.demo.output import open_video_writer
from hkd_deploy.streams import open_source
from hkd_deploy.streams.sources import limit_gap
from hkd_deploy.streams.video import estimate_fps, has_hidden_frames, identify_container, measure_intact_ratio
from hkd_det.errors import DataError

NIGHT_MODE = [*(index / 20 for index in range(40)), *(2 + index / 2 for index in range(12))]
Writer = Callable[..., Path]


def read_times(path: Path) -> tuple[float | None, list[float]]:
    with open_source(str(path)) as source:
        times_s = []
        for number, frame in enumerate(source):
            assert abs(frame.image_rgb.mean() - 2 * number) < 6
            times_s.append(frame.timestamp_s)
        return source.fps, times_s


def save(path: Path, output: Path) -> tuple[float, list[float]]:
    """Copy a video as the demo does; return the rate and the levels of the frames."""
    with open_source(str(path)) as source, open_video_writer(output, source.fps or 25) as writer:
        for frame in source:
            writer.write(frame.image_rgb, frame.timestamp_s)
    reader, levels = cv2.VideoCapture(str(output)), []
    while (result := reader.read())[0]:
        levels.append(float(result[1].mean()))
    return reader.get(cv2.CAP_PROP_FPS), levels


@pytest.mark.parametrize("duration_s", [8.0, 60.0])
def test_variable_rate_keeps_times(write_matroska: Writer, duration_s: float) -> None:
    """The duration can be that of a longer sound track: the estimated frame count is too large."""
    path = write_matroska(NIGHT_MODE, duration_s=duration_s, fps=30)
    assert read_times(path) == (20.0, pytest.approx(NIGHT_MODE, abs=1e-6))


def test_variable_rate_of_mp4_keeps_times(write_mp4: Writer) -> None:
    path = write_mp4([50] * 40 + [500] * 12)
    assert read_times(path) == (20.0, pytest.approx(NIGHT_MODE, abs=2e-3))


def test_saved_video_has_times_of_source(write_matroska: Writer, tmp_path: Path) -> None:
    fps, levels = save(write_matroska(NIGHT_MODE, fps=30), tmp_path / "out.avi")
    assert fps == pytest.approx(20) and len(levels) == 151  # 7.5 s and the last frame
    for time_s, number in ((1.0, 20), (2.3, 40), (2.6, 41), (7.2, 50)):
        assert abs(levels[round(time_s * fps)] - 2 * number) < 1.5


def test_saved_video_keeps_times_if_the_rate_rises(write_matroska: Writer, tmp_path: Path) -> None:
    times_s = [*(index / 2 for index in range(10)), *(5 + index / 20 for index in range(60))]
    fps, levels = save(write_matroska(times_s), tmp_path / "out.avi")
    assert len(levels) / fps == pytest.approx(8, abs=0.1)


def test_clock_rate_is_not_the_frame_rate(write_matroska: Writer) -> None:
    """Browsers write times in ms without a rate. OpenCV then states 1000 frames per second."""
    times_s = np.cumsum([0.017, 0.050, 0.050, 0.036] * 12).tolist()
    fps, read = read_times(write_matroska(times_s, "video.webm", is_live=True))
    assert fps == pytest.approx(58.82, abs=0.01)
    assert read == pytest.approx(np.array(times_s) - times_s[0], abs=1e-6)


@pytest.mark.parametrize("jump_s", [3600.0, -1.0])
def test_jump_of_the_clock_is_shortened(write_matroska: Writer, jump_s: float) -> None:
    second_part = [2 + jump_s + index / 25 for index in range(50)]
    _, read = read_times(write_matroska([*(index / 25 for index in range(50)), *second_part], fps=25))
    assert len(read) == 100 and (np.diff(read) > 0).all()
    assert read[-1] == pytest.approx(3.92 + (2.0 if jump_s > 0 else 0.04), abs=0.05)


def test_limit_gap_bounds_the_time_between_frames() -> None:
    gaps_s = [0.5, 9.0, 11.0, 1e9, 0.0, -3.0, float("nan")]
    assert [limit_gap(gap_s, 0.04) for gap_s in gaps_s] == [0.5, 9.0, 2.0, 2.0, 0.04, 0.04, 0.04]
    assert [limit_gap(gap_s, 30.0) for gap_s in (30.0, 60.0, 61.0)] == [30.0, 60.0, 30.0]  # a time lapse


def test_estimate_fps_of_other_rates() -> None:
    assert estimate_fps([], 25) == 25 and estimate_fps([0, 1], 0) is None and estimate_fps([], 90_000) is None
    assert estimate_fps([0.0] * 50, 25) == 25  # no times
    ntsc_ms = [round(index * 1001 / 30) / 1000 for index in range(90)]
    assert estimate_fps(ntsc_ms, 30_000 / 1001) == 30_000 / 1001
    assert estimate_fps(np.arange(100) / 240, 240) == 240
    assert estimate_fps(np.arange(100) / 25, 1000) == 25
    assert estimate_fps(np.arange(100) / 500, 0) == 60


def test_live_recording_without_sizes_is_complete(write_matroska: Writer) -> None:
    times_s = [index / 25 for index in range(50)]
    path = write_matroska(times_s, is_live=True, fps=25)
    assert measure_intact_ratio(path) == 1
    assert read_times(path) == (25.0, pytest.approx(times_s, abs=1e-6))


@pytest.mark.parametrize("is_live", [False, True])
def test_zeros_in_matroska_are_damage(write_matroska: Writer, is_live: bool) -> None:
    path = write_matroska([index / 25 for index in range(100)], duration_s=4.0, is_live=is_live, fps=25)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] + bytes(len(raw) // 2))
    with pytest.raises(DataError, match=r"video\.mkv: truncated or damaged after \d+( of \d+)? frames"):
        read_times(path)


def test_truncated_matroska_is_an_error(write_matroska: Writer) -> None:
    path = write_matroska([index / 25 for index in range(100)], duration_s=4.0, fps=25)
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(DataError, match=r"video\.mkv: truncated or damaged after \d+( of \d+)? frames"):
        read_times(path)


def test_codec_that_cannot_be_decoded_is_named(write_matroska: Writer) -> None:
    path = write_matroska([index / 25 for index in range(20)], codec="V_AV1")
    with pytest.raises(DataError, match=r"The codec is AV1, .* Convert the video: ffmpeg -i video\.mkv"):
        read_times(path)


def test_edit_list_that_hides_frames_is_found(write_mp4: Writer) -> None:
    path = write_mp4([40] * 50)
    assert identify_container(path) == "MP4" and not has_hidden_frames(path)
    raw = path.read_bytes()
    offset = raw.index(b"elst") + 12
    path.write_bytes(raw[:offset] + (200).to_bytes(4, "big") + raw[offset + 4 :])
    assert has_hidden_frames(path)


@pytest.mark.parametrize(
    "content", [b"", b"RIFF", b"\x1a\x45\xdf\xa3", b"\0\0\0\x18ftyp", b"\0\0\0\x08moov", bytes(99)]
)
def test_container_functions_accept_any_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "video"
    path.write_bytes(content)
    assert not has_hidden_frames(path)
    assert 0 <= measure_intact_ratio(path) <= 1


def write_avi(path: Path) -> bytes:
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for number in range(50):
        writer.write(np.full((48, 64, 3), 2 * number, np.uint8))
    writer.release()
    return path.read_bytes()


def test_wrong_frame_count_of_avi_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "video.avi"
    raw = write_avi(path)
    count = (50).to_bytes(4, "little")
    header = raw.index(b"strh") + 8 + 32  # the length of the stream
    assert raw[header : header + 4] == count
    path.write_bytes(raw[:header] + (90).to_bytes(4, "little") + raw[header + 4 :])
    assert len(read_times(path)[1]) == 50


@pytest.mark.parametrize("fill", [b"\0", b""])
def test_damaged_avi_is_an_error(tmp_path: Path, fill: bytes) -> None:
    path = tmp_path / "video.avi"
    raw = write_avi(path)
    path.write_bytes(raw[: len(raw) // 2] + fill * (len(raw) // 2))
    with pytest.raises(DataError, match=r"video\.avi: truncated or damaged after \d+ of 50 frames"):
        read_times(path)
