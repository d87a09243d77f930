"""Norpix films: a real one, all codecs written as the toolbox does, and every way a film can be broken."""

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

from hkd_det.datasets.seq import open_seq
from hkd_det.errors import DataError

PEDS30 = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "caltech" / "peds30.seq"
real = pytest.mark.skipif(not PEDS30.is_file(), reason="HKD_TEST_DATA is not set")
Write = Callable[..., list[bytes]]


def pictures(count: int = 3, height: int = 24, width: int = 32, grey: bool = False) -> list[NDArray[np.uint8]]:
    """A film of a bright bar that moves to the right, with as many different colours as JPEG keeps well."""
    shots = []
    for index in range(count):
        shot = np.full((height, width, 3), (200, 120, 40), np.uint8)
        shot[:, index * 8 % width : index * 8 % width + 8] = (20, 60, 220)
        shots.append(shot[..., 0].copy() if grey else shot)
    return shots


@real
def test_the_toolboxs_own_film() -> None:
    raw = PEDS30.read_bytes()
    with open_seq(PEDS30) as film:
        assert (len(film), film.size_hw, film.is_jpeg) == (30, (480, 640), True)
        # The frame rate that seqIo(..., 'getInfo') reckons; the first and last times as the file has them.
        assert film.fps == pytest.approx(1000 / 33) and (film.timestamps_s[0], film.timestamps_s[-1]) == (9.9, 10.857)
        at = 1024
        for index in range(30):
            size = struct.unpack_from("<I", raw, at)[0]
            packed = raw[at + 4 : at + size]
            assert film.read_raw(index) == packed and packed[:2] == b"\xff\xd8" and packed[-2:] == b"\xff\xd9"
            at += size + 16
        assert at == len(raw)
        for index in (29, 0, 17):  # in any order
            expected = cv2.imdecode(np.frombuffer(film.read_raw(index), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            np.testing.assert_array_equal(film.read_frame(index), expected)
        # A blue sky above a grey road: channels are not swapped.
        sky = film.read_frame(0)[10:60].reshape(-1, 3).mean(axis=0)
        assert sky[2] > sky[0] + 20


@real
@pytest.mark.parametrize(("end", "whole"), [(-1, 30), (-16, 30), (-17, 29), (400_000, 10), (1024, 0), (1030, 0)])
def test_a_film_that_is_cut_off_says_how_much_is_whole(tmp_path: Path, end: int, whole: int) -> None:
    path = tmp_path / "cut.seq"
    path.write_bytes(PEDS30.read_bytes()[:end])
    if whole == 30:  # the last picture is there, of its time and padding there need not be anything
        with open_seq(path) as film:
            assert film.read_frame(29).shape == (480, 640, 3) and np.isnan(film.timestamps_s[29]) == (end == -16)
            assert film.fps == pytest.approx(1000 / 33)
        return
    with pytest.raises(DataError, match=rf"cut\.seq: {whole} of 30 frames are whole"), open_seq(path):
        pass


@pytest.mark.parametrize("padding", [2, 10])
@pytest.mark.parametrize(("codec", "grey"), [(201, False), (102, True), (2, False), (1, True)])
def test_compressed_films_with_and_without_empty_bytes(
    tmp_path: Path, write_seq: Write, codec: int, grey: bool, padding: int
) -> None:
    path, shots = tmp_path / "film.seq", pictures(grey=grey)
    frames = write_seq(path, shots, codec, padding)
    with open_seq(path) as film:
        assert len(film) == 3 and film.timestamps_s.tolist() == [7.0, 7.04, 7.08] and film.fps == pytest.approx(25)
        assert film.is_jpeg == (codec > 100)
        for index in (2, 0, 1):
            assert film.read_raw(index) == frames[index]
            wanted = np.stack([shots[index]] * 3, axis=-1) if grey else shots[index]
            error = np.abs(film.read_frame(index).astype(int) - wanted)
            assert film.read_frame(index).dtype == np.uint8 and error.mean() <= (8 if codec > 100 else 0)


@pytest.mark.parametrize(("codec", "grey"), [(200, False), (100, True), (200, True)])
def test_uncompressed_films_are_exact(tmp_path: Path, write_seq: Write, codec: int, grey: bool) -> None:
    shots = pictures(5, grey=grey)
    write_seq(tmp_path / "film.seq", shots, codec)
    with open_seq(tmp_path / "film.seq") as film:
        assert len(film) == 5 and not film.is_jpeg and film.timestamps_s[4] == 7.16
        for index in (4, 0, 2):
            np.testing.assert_array_equal(
                film.read_frame(index), np.stack([shots[index]] * 3, axis=-1) if grey else shots[index]
            )


@pytest.mark.parametrize("codec", [101, 103])
def test_mosaics_get_their_colours_back(tmp_path: Path, write_seq: Write, codec: int) -> None:
    mosaic = np.zeros((16, 16), np.uint8)
    mosaic[::2, ::2], mosaic[::2, 1::2], mosaic[1::2, ::2], mosaic[1::2, 1::2] = 30, 100, 100, 220
    write_seq(tmp_path / "film.seq", [mosaic], codec)
    with open_seq(tmp_path / "film.seq") as film:
        assert not film.is_jpeg
        np.testing.assert_allclose(film.read_frame(0)[8, 8], [220, 100, 30], atol=0 if codec == 101 else 30)


def test_a_header_without_a_number_of_frames_is_counted(tmp_path: Path, write_seq: Write) -> None:
    write_seq(tmp_path / "film.seq", pictures(4), 201, frames=0)
    with open_seq(tmp_path / "film.seq") as film:
        assert len(film) == 4
    whole = (tmp_path / "film.seq").read_bytes()
    (tmp_path / "film.seq").write_bytes(whole[:-40])
    with pytest.raises(DataError, match=": 3 frames are whole"), open_seq(tmp_path / "film.seq"):
        pass


def test_one_frame_alone_and_equal_times_take_the_headers_rate(tmp_path: Path, write_seq: Write) -> None:
    write_seq(tmp_path / "film.seq", pictures(1), 201, fps=12.5)
    with open_seq(tmp_path / "film.seq") as film:
        assert film.fps == 12.5 and len(film) == 1
        for index in (-1, 1):
            with pytest.raises(IndexError):
                film.read_frame(index)
    write_seq(tmp_path / "film.seq", pictures(1), 201, fps=float("nan"))
    with open_seq(tmp_path / "film.seq") as film:
        assert film.fps == 0


@pytest.mark.parametrize(
    ("codec", "changes", "message"),
    [
        (201, {"magic": 0xFEEE}, "no Norpix header"),
        (201, {"version": 5}, "version 5, header of 1024 bytes, origin 0; read are versions up to 4 with 1024 and 0"),
        (201, {"size": 8192}, "header of 8192 bytes"),
        (201, {"origin": 1}, "origin 1; read are"),
        (201, {"format": 300}, "codec 300; read are 100, 200"),
        (201, {"real": 10}, "10 bits each"),
        (201, {"width": 0}, "0 x 24 pixels"),
        (201, {"width": 2**20, "height": 2**20}, "cannot be read"),
        (201, {"width": 31}, "frame 0 is no picture of 31 x 24"),
        (201, {"frames": 4}, "3 of 4 frames are whole"),
        (201, {"frames": 2**32 - 1}, "3 of 4294967295 frames are whole"),
        (200, {"frames": 2**32 - 1}, "3 of 4294967295 frames are whole"),
        (200, {"frames": 0}, "0 uncompressed frames"),
        (200, {"room": 2304}, "uncompressed frames of 2304 bytes"),
        (200, {"depth": 32}, "32 x 24 pixels of 4 bytes"),
        (200, {"bytes": 99}, "do not make 99 bytes"),
        (101, {}, "32 x 24 pixels of 3 bytes"),
        (2, {"format": 201}, "0 of 3 frames are whole"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, write_seq: Write, codec: int, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "film.seq"
    write_seq(path, pictures(), codec, **changes)
    with pytest.raises(DataError, match=message) as caught, open_seq(path) as film:
        film.read_frame(0)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_spoiled_frame_is_told_and_the_others_are_read(tmp_path: Path, write_seq: Write) -> None:
    path = tmp_path / "film.seq"
    frames = write_seq(path, pictures(), 201)
    raw = bytearray(path.read_bytes())
    at = 1024 + 4 + len(frames[0]) + 16 + 4
    raw[at + len(frames[1]) - 1] = 0  # the second picture's end mark
    path.write_bytes(raw)
    with open_seq(path) as film:
        assert film.read_frame(0).shape == film.read_frame(2).shape == (24, 32, 3)
        with pytest.raises(DataError, match="frame 1 is no whole JPEG"):
            film.read_raw(1)
    raw[1024:1028] = bytes(4)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"0 of 3 frames are whole: .* byte 1024"), open_seq(path):
        pass


def test_missing_files_folders_and_other_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.seq").write_text("no film")
    for path, message in (("gone.seq", "no such film"), (".", "a folder"), ("text.seq", "no Norpix header")):
        with pytest.raises(DataError, match=message), open_seq(tmp_path / path):
            pass


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from([201, 103, 200, 101, 2]))
def test_a_mutated_film_raises_nothing_but_our_errors(
    tmp_path: Path, write_seq: Write, data: st.DataObject, codec: int
) -> None:
    source, spoiled = tmp_path / f"{codec}.seq", tmp_path / "spoiled.seq"
    if not source.exists():
        write_seq(source, pictures(grey=codec in (101, 103)), codec)
    raw = bytearray(source.read_bytes())
    places = st.one_of(st.integers(540, 592), st.integers(1024, 1200), st.integers(1024, len(raw) - 1))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(places)] = data.draw(st.sampled_from([0, 1, 2, 3, 127, 128, 255]))
    spoiled.write_bytes(raw[: data.draw(st.integers(1000, len(raw)))])
    try:
        with open_seq(spoiled) as film:
            assert len(film.timestamps_s) == len(film) and np.isfinite(film.fps)
            for index in range(len(film)):
                assert film.read_frame(index).shape == (*film.size_hw, 3)
    except DataError as error:
        assert str(spoiled) in str(error) and "\n" not in str(error)
