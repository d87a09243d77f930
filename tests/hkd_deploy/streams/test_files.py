"""Tests of image files, directories and videos as sources."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from hkd_deploy.streams import open_source, redact_url
from hkd_deploy.streams.sources import list_images
from hkd_det.errors import DataError, UsageError


def write_video(path: Path, num_frames: int, fps: float = 10.0) -> Path:
    """Write a gray video in which frame n has level 5 n. Motion JPEG keeps the levels."""
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), fps, (64, 48))
    for index in range(num_frames):
        writer.write(np.full((48, 64, 3), 5 * index, np.uint8))
    writer.release()
    return path


def read_all(text: str) -> list[tuple[int, float]]:
    with open_source(text) as source:
        return [(int(image[0, 0, 0]), time_s) for image, time_s in source]


def test_video_returns_all_frames_in_order(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.avi", 40)
    with open_source(str(path)) as source:
        assert (source.name, source.is_live, source.fps, source.num_frames) == (str(path), False, 10.0, 40)
        frames = list(source)
        assert (source.num_dropped, source.status) == (0, "")
    levels = np.array([frame.image_rgb.mean() for frame in frames])
    assert np.abs(levels - 5 * np.arange(40)).max() < 2
    assert [frame.timestamp_s for frame in frames] == pytest.approx(np.arange(40) / 10)
    assert frames[0].image_rgb.shape == (48, 64, 3)
    assert frames[0].image_rgb.dtype == np.uint8


def test_video_real_file(real_video: Path) -> None:
    with open_source(str(real_video)) as source:
        frame = next(iter(source))
        assert source.num_frames == 370
        assert source.fps == pytest.approx(29.97, abs=0.01)
        reader = cv2.VideoCapture(str(real_video))
        _, image_bgr = reader.read()
        assert np.array_equal(frame.image_rgb, image_bgr[..., ::-1])


def test_pattern_matches_images_or_one_video(tmp_path: Path) -> None:
    for name, level in (("b/2.png", 20), ("a/1.png", 10), ("a/3.PNG", 30), ("[x]*.png", 40)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.full((8, 8, 3), level, np.uint8))
    (tmp_path / "a" / "notes.txt").touch()
    write_video(tmp_path / "a" / "video.avi", 3)
    assert [level for level, _ in read_all(f"{tmp_path}/**/?.png")] == [10, 20]
    assert [level for level, _ in read_all(f"{tmp_path}/a/*.[pP][nN][gG]")] == [10, 30]
    assert [level for level, _ in read_all(f"{tmp_path}/[x]*.png")] == [40]  # a file of this name exists
    assert len(read_all(f"{tmp_path}/a/*.avi")) == 3
    with pytest.raises(DataError, match="no file matches this pattern"):
        read_all(f"{tmp_path}/*.jpg")
    with pytest.raises(UsageError, match=r"2 of 4 files that match are no images, such as notes\.txt"):
        read_all(f"{tmp_path}/a/*")


@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_video_truncated_raises_after_last_frame(real_video: Path, tmp_path: Path, ratio: float) -> None:
    content = real_video.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[: int(ratio * len(content))])
    count = 0
    with (
        pytest.raises(DataError, match=r"cut.mp4: truncated or damaged after \d+ of 370 frames"),
        open_source(str(path)) as source,
    ):
        for _ in source:
            count += 1
    assert 0.5 * ratio * 370 < count < 370  # readable frames are returned first


def test_video_without_index_raises(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for index in range(30):
        writer.write(np.full((48, 64, 3), index, np.uint8))
    writer.release()
    path.write_bytes(path.read_bytes()[:-200])  # OpenCV writes the index of an .mp4 at the end
    with pytest.raises(DataError, match=r"video.mp4: not a readable video .*truncated"), open_source(str(path)):
        pass


@pytest.mark.parametrize("content", [b"", b"not a video\n" * 500, bytes(5000)])
def test_video_other_content_raises(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"notes.mp4: not a readable video"), open_source(str(path)):
        pass


def test_directory_returns_images_by_name(tmp_path: Path) -> None:
    for name, level in (("b.png", 20), ("a.PNG", 10), ("c.bmp", 30), (".hidden.png", 90)):
        cv2.imwrite(str(tmp_path / name.lower()), np.full((5, 7, 3), level, np.uint8))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "sub").mkdir()
    assert read_all(str(tmp_path)) == [(10, 0.0), (20, 0.5), (30, 1.0)]


def test_image_is_rgb(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "one.png"), np.full((5, 7, 3), (1, 2, 3), np.uint8))
    with open_source(str(tmp_path / "one.png")) as source:
        (frame,) = source
        assert source.num_frames == 1
    assert frame.image_rgb[0, 0].tolist() == [3, 2, 1]


def test_image_applies_exif_orientation(tmp_path: Path) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :20] = 255  # stored: bright left; rotated by 90 degrees clockwise: bright top
    encoded = bytes(cv2.imencode(".jpg", image)[1])
    orientation = (
        b"MM\0*\0\0\0\x08" + b"\0\x01" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + bytes(4)
    )  # EXIF: orientation 6
    exif = b"\xff\xe1" + (len(orientation) + 8).to_bytes(2, "big") + b"Exif\0\0" + orientation
    (tmp_path / "phone.jpg").write_bytes(encoded[:2] + exif + encoded[2:])
    with open_source(str(tmp_path / "phone.jpg")) as source:
        (frame,) = source
    assert frame.image_rgb.shape == (60, 40, 3)
    assert frame.image_rgb[:18].mean() > 240
    assert frame.image_rgb[22:].mean() < 15


def test_directory_without_images_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images in this directory"), open_source(str(tmp_path)):
        pass


def test_directory_with_images_below_names_their_directory(tmp_path: Path) -> None:
    (tmp_path / "val" / "aachen").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("")
    cv2.imwrite(str(tmp_path / "val" / "aachen" / "1.png"), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=f"but in {tmp_path}/val/aachen. Give that directory.$"):
        list_images(tmp_path)


def test_image_truncated_raises(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "cut.jpg"), noise)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    with pytest.raises(DataError, match=r"cut.jpg: not a readable image"):
        read_all(str(tmp_path))


def test_open_missing_file_raises(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"none.mp4: no such file or directory"),
        open_source(str(tmp_path / "none.mp4")),
    ):
        pass


@pytest.mark.parametrize("text", ["ftp://admin:secret@host/video", "file:///etc/passwd", "rtps://admin:secret@host"])
def test_open_unknown_scheme_raises(text: str) -> None:
    with pytest.raises(UsageError, match=r"unknown URL scheme\. Supported schemes: rtsp") as caught, open_source(text):
        pass
    assert "secret" not in str(caught.value)


def test_open_mistyped_url_hides_password() -> None:
    with pytest.raises(DataError, match="no such file") as caught, open_source("rtsp:/admin:secret@host/x"):
        pass
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("rtsp://admin:secret@10.0.0.2:554/live", "rtsp://***@10.0.0.2:554/live"),
        ("rtsp://admin@host/live", "rtsp://***@host/live"),
        ("rtsp://a:p/w?x#y@z@host/live", "rtsp://***@host/live"),
        ("http://host/video?user=a&password=b", "http://host/video?***"),
        ("http://host:80/video.mjpg", "http://host:80/video.mjpg"),
        ("rtsp://host/user=admin_password=secret?channel=1", "rtsp://host/***?***"),
        ("rtsp://host/live#user=admin&password=secret", "rtsp://host/live#***"),
        ("rtsp://a:b@host/x?user=a&password=b#b", "rtsp://***@host/x?***"),
        ("rtsp://host/a\x1b[2J\nb", "rtsp://host/a\\x1b[2J\\nb"),
        ("video of me@home.mp4", "video of me@home.mp4"),
        ("C:\\videos\\me@home.mp4", "C:\\videos\\me@home.mp4"),
    ],
)
def test_redact_url(address: str, expected: str) -> None:
    assert redact_url(address) == expected
