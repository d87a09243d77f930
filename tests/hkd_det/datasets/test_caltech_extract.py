"""Extraction of images from Caltech videos."""

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
FRAMES = [np.full((16, 24, 3), (index * 20, 60, 200), np.uint8) for index in range(7)]


def test_every_third_frame_is_extracted(tmp_path: Path, write_seq: Write, capsys: pytest.CaptureFixture[str]) -> None:
    frames = write_seq(tmp_path / "videos/set00/V000.seq", FRAMES, 201)
    write_seq(tmp_path / "videos/set06/V001.seq", FRAMES[:3], 200)
    assert main([str(tmp_path), "--frame-step", "3", "--sets", "set00-set06"]) == 0
    images = tmp_path / "images"
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.*"))
    assert names == ["set00/V000/I00002.jpg", "set00/V000/I00005.jpg", "set06/V001/I00002.png"]
    assert (images / names[0]).read_bytes() == frames[2] and (images / names[1]).read_bytes() == frames[5]
    np.testing.assert_array_equal(cv2.imread(str(images / names[2]))[..., ::-1], FRAMES[2])
    out = capsys.readouterr().out
    assert f"set00: 1 videos, 2 images written to {images / 'set00'}, 0 existed" in out
    assert "set01: 0 videos, 0 images" in out and "set06: 1 videos, 1 images" in out


def test_interrupted_extraction_continues(
    tmp_path: Path, write_seq: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = write_seq(tmp_path / "set06" / "V000.seq", FRAMES, 201)
    encode_frame, indices = caltech_extract._encode_frame, []

    def encode_and_stop(video: object, index: int) -> bytes:
        indices.append(index)
        if len(indices) == 3:
            raise KeyboardInterrupt
        return encode_frame(video, index)  # type: ignore[arg-type]  # object instead of SeqVideo

    monkeypatch.setattr(caltech_extract, "_encode_frame", encode_and_stop)
    assert main([str(tmp_path), "--frame-step", "2"]) == 130
    folder = tmp_path / "images" / "set06" / "V000"
    assert sorted(path.name for path in folder.iterdir()) == [
        "I00001.jpg",
        "I00003.jpg",
    ]
    (folder / "I00001.jpg").write_bytes(b"kept unchanged")
    assert main([str(tmp_path), "--frame-step", "2"]) == 0
    assert indices == [1, 3, 5, 5] and "set06: 1 videos, 1 images written" in capsys.readouterr().out
    assert (folder / "I00001.jpg").read_bytes() == b"kept unchanged"
    assert (folder / "I00005.jpg").read_bytes() == frames[5]


def test_errors_are_one_line(tmp_path: Path, write_seq: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write_seq(tmp_path / "set06" / "V000.seq", FRAMES, 201, frames=9)
    for argv, code, message in (
        ([str(tmp_path), "--frame-step", "0"], 2, "--frame-step: expected at least 1, got 0"),
        ([str(tmp_path), "--sets", "set12"], 2, "expected a set or a range of sets"),
        ([str(tmp_path), "--sets", "set00"], 1, "no videos. Expected videos/set00/V*.seq or set00/V*.seq"),
        ([str(tmp_path / "gone")], 1, "no videos"),
        ([str(tmp_path)], 1, "7 of 9 frames are complete"),
    ):
        assert main(argv) == code
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("caltech_extract: ") and message in error
    assert not (tmp_path / "images").exists()


@pytest.mark.skipif(not PEDS30.is_file(), reason="HKD_TEST_DATA is not set")
def test_official_video_gives_the_frame_of_the_protocol(tmp_path: Path) -> None:
    (tmp_path / "set06").mkdir()
    (tmp_path / "set06" / "V000.seq").symlink_to(PEDS30)
    assert main([str(tmp_path)]) == 0
    image = tmp_path / "images" / "set06" / "V000" / "I00029.jpg"
    assert list((tmp_path / "images").rglob("*.*")) == [image]
    assert image.read_bytes() in PEDS30.read_bytes() and cv2.imread(str(image)).shape == (480, 640, 3)
