"""Norpix `.seq` videos: an official one, all codecs, and invalid files."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hkd_det.datasets.caltech_extract import open_seq
from hkd_det.errors import DataError

PEDS30 = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "caltech" / "peds30.seq"
needs_official_video = pytest.mark.skipif(not PEDS30.is_file(), reason="HKD_TEST_DATA is not set")
Write = Callable[..., list[bytes]]


def make_frames(count: int = 3, height: int = 24, width: int = 32, gray: bool = False) -> list[NDArray[np.uint8]]:
    """Return frames of a bright bar that moves to the right."""
    frames = []
    for index in range(count):
        frame = np.full((height, width, 3), (200, 120, 40), np.uint8)
        frame[:, index * 8 % width : index * 8 % width + 8] = (20, 60, 220)
        frames.append(frame[..., 0].copy() if gray else frame)
    return frames


@needs_official_video
def test_official_video_of_the_toolbox() -> None:
    raw = PEDS30.read_bytes()
    with open_seq(PEDS30) as video:
        assert (len(video), video.size_hw, video.is_jpeg) == (30, (480, 640), True)
        offset = 1024
        for index in range(30):
            size = struct.unpack_from("<I", raw, offset)[0]
            encoded = raw[offset + 4 : offset + size]
            assert video.read_raw(index) == encoded and encoded[:2] == b"\xff\xd8" and encoded[-2:] == b"\xff\xd9"
            offset += size + 16
        assert offset == len(raw)
        for index in (29, 0, 17):  # in any order
            expected = cv2.imdecode(np.frombuffer(video.read_raw(index), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            np.testing.assert_array_equal(video.read_frame(index), expected)
        # A blue sky above a gray road: the channels are not swapped.
        sky = video.read_frame(0)[10:60].reshape(-1, 3).mean(axis=0)
        assert sky[2] > sky[0] + 20


@needs_official_video
@pytest.mark.parametrize(("end", "num_complete"), [(-1, 30), (-16, 30), (-17, 29), (400_000, 10), (1024, 0), (1030, 0)])
def test_truncated_video_reports_complete_frames(tmp_path: Path, end: int, num_complete: int) -> None:
    path = tmp_path / "cut.seq"
    path.write_bytes(PEDS30.read_bytes()[:end])
    if num_complete == 30:  # the timestamp and the padding of the last frame are optional
        with open_seq(path) as video:
            assert video.read_frame(29).shape == (480, 640, 3)
        return
    with (
        pytest.raises(DataError, match=rf"cut\.seq: truncated .*; {num_complete} of 30 frames are complete"),
        open_seq(path),
    ):
        pass


@pytest.mark.parametrize("padding", [2, 10])
@pytest.mark.parametrize(("codec", "gray"), [(201, False), (102, True), (2, False), (1, True)])
def test_compressed_video_with_both_paddings(
    tmp_path: Path, write_seq: Write, codec: int, gray: bool, padding: int
) -> None:
    path, frames = tmp_path / "video.seq", make_frames(gray=gray)
    encoded = write_seq(path, frames, codec, padding)
    with open_seq(path) as video:
        assert len(video) == 3
        assert video.is_jpeg == (codec > 100)
        for index in (2, 0, 1):
            assert video.read_raw(index) == encoded[index]
            expected = np.stack([frames[index]] * 3, axis=-1) if gray else frames[index]
            error = np.abs(video.read_frame(index).astype(int) - expected)
            assert video.read_frame(index).dtype == np.uint8 and error.mean() <= (8 if codec > 100 else 0)


@pytest.mark.parametrize(("codec", "gray"), [(200, False), (100, True), (200, True)])
def test_uncompressed_video_is_exact(tmp_path: Path, write_seq: Write, codec: int, gray: bool) -> None:
    frames = make_frames(5, gray=gray)
    write_seq(tmp_path / "video.seq", frames, codec)
    with open_seq(tmp_path / "video.seq") as video:
        assert len(video) == 5 and not video.is_jpeg
        for index in (4, 0, 2):
            np.testing.assert_array_equal(
                video.read_frame(index), np.stack([frames[index]] * 3, axis=-1) if gray else frames[index]
            )


@pytest.mark.parametrize("codec", [101, 103])
def test_bayer_frames_become_color(tmp_path: Path, write_seq: Write, codec: int) -> None:
    mosaic = np.zeros((16, 16), np.uint8)
    mosaic[::2, ::2], mosaic[::2, 1::2], mosaic[1::2, ::2], mosaic[1::2, 1::2] = 30, 100, 100, 220
    write_seq(tmp_path / "video.seq", [mosaic], codec)
    with open_seq(tmp_path / "video.seq") as video:
        assert not video.is_jpeg
        np.testing.assert_allclose(video.read_frame(0)[8, 8], [220, 100, 30], atol=0 if codec == 101 else 30)


def test_frames_are_counted_without_a_header_value(tmp_path: Path, write_seq: Write) -> None:
    write_seq(tmp_path / "video.seq", make_frames(4), 201, frames=0)
    with open_seq(tmp_path / "video.seq") as video:
        assert len(video) == 4
    complete = (tmp_path / "video.seq").read_bytes()
    (tmp_path / "video.seq").write_bytes(complete[:-40])
    with pytest.raises(DataError, match="; 3 frames are complete"), open_seq(tmp_path / "video.seq"):
        pass


def test_frame_index_out_of_range_is_an_error(tmp_path: Path, write_seq: Write) -> None:
    write_seq(tmp_path / "video.seq", make_frames(1), 201)
    with open_seq(tmp_path / "video.seq") as video:
        assert len(video) == 1
        for index in (-1, 1):
            with pytest.raises(IndexError):
                video.read_frame(index)


@pytest.mark.parametrize(
    ("codec", "changes", "message"),
    [
        (201, {"magic": 0xFEEE}, "no Norpix header"),
        (
            201,
            {"version": 5},
            "version 5, header of 1024 bytes, origin 0 are not supported. Expected a version up to 4",
        ),
        (201, {"size": 8192}, "header of 8192 bytes"),
        (201, {"origin": 1}, "origin 1 are not supported"),
        (201, {"format": 300}, "codec 300 is not supported. Expected one of 100, 200"),
        (201, {"used_depth": 10}, "got 10 bits"),
        (201, {"width": 0}, "0 x 24 pixels"),
        (201, {"width": 2**20, "height": 2**20}, "got 8 bits and 1048576 x 1048576 pixels"),
        (201, {"width": 31}, "frame 0 is not an image of 31 x 24"),
        (201, {"frames": 4}, "3 of 4 frames are complete"),
        (201, {"frames": 2**32 - 1}, "3 of 4294967295 frames are complete"),
        (200, {"frames": 2**32 - 1}, "3 of 4294967295 frames are complete"),
        (200, {"frames": 0}, "0 uncompressed frames"),
        (200, {"stride": 2304}, "uncompressed frames of 2304 bytes"),
        (200, {"depth": 32}, "32 x 24 pixels of 4 bytes"),
        (200, {"bytes": 99}, "do not match frames of 99 bytes"),
        (101, {}, "32 x 24 pixels of 3 bytes"),
        (2, {"format": 201}, "0 of 3 frames are complete"),
    ],
)
def test_invalid_video_is_one_line(
    tmp_path: Path, write_seq: Write, codec: int, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "video.seq"
    write_seq(path, make_frames(), codec, **changes)
    with pytest.raises(DataError, match=message) as caught, open_seq(path) as video:
        video.read_frame(0)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_damaged_frame_is_reported_and_others_read(tmp_path: Path, write_seq: Write) -> None:
    path = tmp_path / "video.seq"
    frames = write_seq(path, make_frames(), 201)
    raw = bytearray(path.read_bytes())
    offset = 1024 + 4 + len(frames[0]) + 16 + 4
    raw[offset + len(frames[1]) - 1] = 0  # end marker of the second frame
    path.write_bytes(raw)
    with open_seq(path) as video:
        assert video.read_frame(0).shape == video.read_frame(2).shape == (24, 32, 3)
        with pytest.raises(DataError, match="frame 1 is not a complete JPEG"):
            video.read_raw(1)
    raw[1024:1028] = bytes(4)
    path.write_bytes(raw)
    with pytest.raises(DataError, match="damaged at byte 1024; 0 of 3 frames are complete"), open_seq(path):
        pass


def test_missing_and_other_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.seq").write_text("not a video")
    for path, message in (("gone.seq", "no such video"), (".", "got a directory"), ("text.seq", "no Norpix header")):
        with pytest.raises(DataError, match=message), open_seq(tmp_path / path):
            pass


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from([201, 103, 200, 101, 2]))
def test_mutated_video_raises_only_data_errors(
    tmp_path: Path, write_seq: Write, data: st.DataObject, codec: int
) -> None:
    source, damaged = tmp_path / f"{codec}.seq", tmp_path / "damaged.seq"
    if not source.exists():
        write_seq(source, make_frames(gray=codec in (101, 103)), codec)
    raw = bytearray(source.read_bytes())
    offsets = st.one_of(st.integers(540, 592), st.integers(1024, 1200), st.integers(1024, len(raw) - 1))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(offsets)] = data.draw(st.sampled_from([0, 1, 2, 3, 127, 128, 255]))
    damaged.write_bytes(raw[: data.draw(st.integers(1000, len(raw)))])
    try:
        with open_seq(damaged) as video:
            for index in range(len(video)):
                assert video.read_frame(index).shape == (*video.size_hw, 3)
    except DataError as error:
        assert str(damaged) in str(error) and "\n" not in str(error)
