"""Tests of the file of `--cameras` and of the names of `--source`."""

import re
from pathlib import Path

import pytest

from hkd_deploy.demo.cameras import CameraConfig, Line, Zone, name_sources, read_cameras
from hkd_det.errors import UsageError

VALID = """
cameras:
  - name: entrance
    source: rtsp://admin:secret@10.0.0.5/stream
    conf: 0.4
    privacy: blur
    lines: {door: [[0.1, 0.5], [0.9, 0.5]]}
    zones:
      platform: [[0, 0], [1, 0], [1, 0.5]]
  - {name: yard, source: 0}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cameras.yaml"
    path.write_text(text)
    return path


def test_read_cameras(tmp_path: Path) -> None:
    assert read_cameras(write(tmp_path, VALID)) == [
        CameraConfig(
            name="entrance",
            source="rtsp://admin:secret@10.0.0.5/stream",
            conf=0.4,
            privacy="blur",
            lines=(Line("door", ((0.1, 0.5), (0.9, 0.5))),),
            zones=(Zone("platform", ((0.0, 0.0), (1.0, 0.0), (1.0, 0.5))),),
        ),
        CameraConfig(name="yard", source="0"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("conf: 0.4", "config: 0.4", "cameras[0].config: no such setting. Did you mean conf?"),
        ("source: rtsp://admin:secret@10.0.0.5/stream", "", "cameras[0]: missing source."),
        ("source: 0", "source: [0]", "cameras[1].source: expected one source as text"),
        ("name: yard", "name: entrance", "cameras[1].name: entrance is the name of two cameras"),
        ("name: yard", "name: ' '", "cameras[1].name: expected a printable name"),
        ("conf: 0.4", "conf: 4", "entrance.conf: expected 0 to 1, got 4"),
        ("privacy: blur", "privacy: hide", "cameras[0].privacy: expected one of blur, pixelate, fill, got 'hide'"),
        ("[0.9, 0.5]", "[0.9]", "cameras[0].lines.door: expected 2 values, got 1"),
        ("[0.9, 0.5]", "[high, 0.5]", "lines.door: expected a number, got 'high'"),
        ("[0.9, 0.5]", "[640, 0.5]", "entrance.lines.door: expected fractions of width and height, 0 to 1, got [640,"),
        ("[0.9, 0.5]", "[0.1, 0.5]", "entrance.lines.door: expected two different points"),
        ("[1, 0], [1, 0.5]", "[1, 0.5]", "entrance.zones.platform: expected at least three points"),
        ("[1, 0], [1, 0.5]", "[0.5, 0], [1, 0]", "entrance.zones.platform: expected at least three points"),
        ("lines: {door: [[0.1, 0.5], [0.9, 0.5]]}", "lines: [1]", "cameras[0].lines: expected a mapping, got [1]"),
        ("cameras:", "camera:", "expected one key, cameras"),
        (VALID, "cameras: []", "cameras: expected a list with at least one camera"),
        (VALID, "cameras: [rtsp://a:secret@b]", "cameras[0]: expected a mapping of name, source"),
    ],
)
def test_invalid_file_names_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in VALID
    path = write(tmp_path, VALID.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        read_cameras(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and message in text
    assert "secret" not in text and "\n" not in text


def test_file_of_the_guide_is_valid(tmp_path: Path) -> None:
    guide = Path(__file__).parents[3] / "docs" / "how-to" / "several-cameras.md"
    (text,) = re.findall(r"^```yaml\n(.*?)^```", guide.read_text(), re.MULTILINE | re.DOTALL)
    entrance, yard = read_cameras(write(tmp_path, text))
    assert entrance.lines[0].name == "door" and yard.zones[0].name == "platform"


def test_names_of_sources_are_unique_and_without_password() -> None:
    sources = ["rtsp://me:secret@cam/1", "rtsp://me:other@cam/1", "0", "street.mp4", "street.mp4", "street.mp4"]
    cameras = name_sources(sources)
    assert [camera.source for camera in cameras] == sources
    names = ["rtsp://***@cam/1", "rtsp://***@cam/1 (2)", "camera 0", "street.mp4", "street.mp4 (2)", "street.mp4 (3)"]
    assert [camera.name for camera in cameras] == names
