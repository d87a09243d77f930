"""Pictures out of films: which, byte for byte, once; and what is said about it."""

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from hkd_det.datasets import caltech_extract
from hkd_det.datasets.caltech_extract import main

PEDS30 = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "caltech" / "peds30.seq"
Write = Callable[..., list[bytes]]
SHOTS = [np.full((16, 24, 3), (index * 20, 60, 200), np.uint8) for index in range(7)]


def test_every_third_frame_of_each_film_in_the_order_of_the_sets(
    tmp_path: Path, write_seq: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = write_seq(tmp_path / "videos/set00/V000.seq", SHOTS, 201)
    write_seq(tmp_path / "videos/set06/V001.seq", SHOTS[:3], 200)
    assert main([str(tmp_path), "--frame-step", "3", "--sets", "set00-set06"]) == 0
    images = tmp_path / "images"
    found = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.*"))
    assert found == ["set00/V000/I00002.jpg", "set00/V000/I00005.jpg", "set06/V001/I00002.png"]
    assert (images / found[0]).read_bytes() == frames[2] and (images / found[1]).read_bytes() == frames[5]
    np.testing.assert_array_equal(cv2.imread(str(images / found[2]))[..., ::-1], SHOTS[2])
    out = capsys.readouterr().out
    assert f"set00: 1 films, 2 pictures written to {images / 'set00'}, 0 were there" in out
    assert "set01: 0 films, 0 pictures" in out and "set06: 1 films, 1 pictures" in out


def test_it_goes_on_where_it_was_stopped(
    tmp_path: Path, write_seq: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = write_seq(tmp_path / "set06" / "V000.seq", SHOTS, 201)
    real, shown = caltech_extract._encode_frame, []

    def stopped(film: object, index: int) -> bytes:
        shown.append(index)
        if len(shown) == 3:
            raise KeyboardInterrupt
        return real(film, index)  # type: ignore[arg-type]

    monkeypatch.setattr(caltech_extract, "_encode_frame", stopped)
    assert main([str(tmp_path), "--frame-step", "2"]) == 130
    folder = tmp_path / "images" / "set06" / "V000"
    assert sorted(path.name for path in folder.iterdir()) == ["I00001.jpg", "I00003.jpg"]  # no half of a third
    (folder / "I00001.jpg").write_bytes(b"kept as it is")
    assert main([str(tmp_path), "--frame-step", "2"]) == 0
    assert shown == [1, 3, 5, 5] and "set06: 1 films, 1 pictures written" in capsys.readouterr().out
    assert (folder / "I00001.jpg").read_bytes() == b"kept as it is"
    assert (folder / "I00005.jpg").read_bytes() == frames[5]


def test_mistakes_are_one_line(tmp_path: Path, write_seq: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write_seq(tmp_path / "set06" / "V000.seq", SHOTS, 201, frames=9)
    for argv, code, message in (
        ([str(tmp_path), "--frame-step", "0"], 2, "--frame-step 0 must be 1 or more"),
        ([str(tmp_path), "--sets", "set12"], 2, "no sets of Caltech"),
        ([str(tmp_path), "--sets", "set00"], 1, "no films videos/set00/V*.seq or set00/V*.seq"),
        ([str(tmp_path / "gone")], 1, "no films"),
        ([str(tmp_path)], 1, "V000.seq: 7 of 9 frames are whole"),
    ):
        assert main(argv) == code
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("caltech_extract: ") and message in error
    assert not (tmp_path / "images").exists()


@pytest.mark.skipif(not PEDS30.is_file(), reason="HKD_TEST_DATA is not set")
def test_the_real_film_gives_the_frame_the_test_uses(tmp_path: Path) -> None:
    (tmp_path / "set06").mkdir()
    (tmp_path / "set06" / "V000.seq").symlink_to(PEDS30)
    assert main([str(tmp_path)]) == 0
    picture = tmp_path / "images" / "set06" / "V000" / "I00029.jpg"
    assert list((tmp_path / "images").rglob("*.*")) == [picture]
    assert picture.read_bytes() in PEDS30.read_bytes() and cv2.imread(str(picture)).shape == (480, 640, 3)
