"""Flags --track, --line, --zone and --heatmap: events, drawing, heat map and error messages of hkd-demo."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from hkd_deploy.demo.cameras import Line, Zone
from hkd_deploy.demo.cli import main
from hkd_deploy.demo.scene_drawing import LINE_COLOR, ZONE_COLOR, draw_scene
from hkd_det.draw import MatchStatus, draw_detections
from hkd_det.structures import Detections

LINE = "door=0.5,1,0.5,0.2"  # x = 160, upwards
ZONE = "yard=0.3,0.5,0.7,0.5,0.7,1,0.3,1"  # x 96 to 224


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """80 frames of 320x240, 20 per second: a bright person, 40x100 px, walks to the right with 4 px per frame."""
    path = tmp_path / "walk.avi"
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 20, (320, 240))
    for index in range(80):
        frame = np.full((240, 320, 3), 40, np.uint8)
        if index < 65:
            frame[120:220, 4 * index : 40 + 4 * index] = 255
        writer.write(frame)
    writer.release()
    return path


@pytest.fixture
def run_demo(tiny_onnx: Callable[..., Path], video: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Function that runs hkd-demo on the video with flags and returns its events."""

    def run(*flags: str) -> list[dict[str, Any]]:
        events = tmp_path / "events.jsonl"
        arguments = [str(tiny_onnx()), "--source", str(video), "--conf", "0.1", "--threads", "1"]
        assert main([*arguments, "--events", str(events), *flags]) == 0
        return [json.loads(line) for line in events.read_text().splitlines()]

    return run


def test_line_and_zone_write_events(run_demo: Callable[..., list[dict[str, Any]]]) -> None:
    events = run_demo("--line", LINE, "--zone", ZONE)
    frames = [event for event in events if event["event"] == "frame"]
    assert {person["track_id"] for event in frames[:2] for person in event["persons"]} == {None, 1}
    assert {person["track_id"] for event in frames[2:] for person in event["persons"]} == {1}
    (crossing,) = [event for event in events if event["event"] == "crossing"]
    assert crossing.items() >= {"version": 1, "line": "door", "direction": "right", "track_id": 1}.items()
    # The middle of the person, 20 + 4 * index px, passes 160 px at frame 35, and the zone at 19 and 51.
    assert crossing["position_s"] == pytest.approx(35 / 20, abs=0.1)
    (enter,) = [event for event in events if event["event"] == "enter"]
    (end,) = [event for event in events if event["event"] == "exit"]
    assert enter["position_s"] == pytest.approx(19 / 20, abs=0.1)
    assert end.items() >= {"zone": "yard", "track_id": 1}.items()
    assert end["dwell_s"] == pytest.approx(32 / 20, abs=0.1)
    assert frames[-1]["counts"]["lines"] == {"door": {"left": 0, "right": 1}}
    assert frames[-1]["counts"]["zones"]["yard"].items() >= {"persons": 0, "entries": 1, "exits": 1}.items()
    assert frames[40]["counts"]["zones"]["yard"]["persons"] == 1


def test_track_alone_has_ids_and_no_counts(run_demo: Callable[..., list[dict[str, Any]]]) -> None:
    frames = run_demo("--track")
    assert frames[10]["persons"][0]["track_id"] == 1
    assert all("counts" not in event for event in frames)


def test_without_flags_events_are_unchanged(run_demo: Callable[..., list[dict[str, Any]]]) -> None:
    frames = run_demo()
    assert set(frames[10]["persons"][0]) == {"box_xyxy", "score"}
    assert all("counts" not in event for event in frames)


def test_heatmap_hides_people_with_privacy(run_demo: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    path = tmp_path / "new" / "heat.png"
    run_demo("--heatmap", str(path), "--privacy", "fill", "--max-frames", "30")
    image = cv2.imread(str(path)).astype(int)
    assert image.shape == (240, 320, 3)
    assert image[130:180].max() < 200  # the white person of the last frame is filled with gray
    assert np.ptp(image[219, 70:120], axis=-1).min() > 30  # colors at the feet, none above
    assert np.ptp(image[:110], axis=-1).max() < 30


def test_cameras_file_has_lines(tiny_onnx: Callable[..., Path], video: Path, tmp_path: Path) -> None:
    cameras = [
        {"name": "a", "source": str(video), "lines": {"door": [[0.5, 1], [0.5, 0.2]]}},
        {"name": "b", "source": str(video)},
    ]
    (tmp_path / "cameras.yaml").write_text(json.dumps({"cameras": cameras}))
    events = tmp_path / "events.jsonl"
    arguments = ["--cameras", str(tmp_path / "cameras.yaml"), "--events", str(events), "--conf", "0.1"]
    assert main([str(tiny_onnx()), *arguments, "--heatmap", str(tmp_path / "maps")]) == 0
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert [event["camera"] for event in lines if event["event"] == "crossing"] == ["a"]
    assert all(("counts" in event) == (event["camera"] == "a") for event in lines if event["event"] == "frame")
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--line", "door"], "--line door: expected NAME=X1,Y1,X2,Y2 with fractions"),
        (["--line", "=0,0,1,1"], "--line =0,0,1,1: expected NAME="),
        (["--line", "a=0,0,1"], "--line a=0,0,1: expected NAME="),
        (["--line", "a=0,0,1,nan"], "--line a: expected fractions of width and height, 0 to 1"),
        (["--line", "a=0,0,640,360"], "--line a: expected fractions of width and height, 0 to 1"),
        (["--line", "a=0,0,0,0"], "--line a: expected two different points"),
        (["--line", "a=0,0,1,1", "--line", "a=0,0,1,0"], "--line a: this name is used twice. Choose another name."),
        (["--zone", "a=0,0,1,1"], "--zone a: expected at least three points"),
        (["--zone", "a=0,0,1,1,0.5,0.5"], "--zone a: expected at least three points of a polygon with an area"),
        (["--heatmap", "map.jpg"], "--heatmap map.jpg: expected a file ending in .png."),
        (["--source", "b.mp4", "--line", "a=0,0,1,1"], "--line: requires a single camera."),
    ],
)
def test_invalid_flags(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert main(["--source", "a.mp4", *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"hkd-demo: {message}")
    assert printed.count("\n") == 1


def test_missing_package_is_one_line(
    tiny_onnx: Callable[..., Path], video: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    assert main([str(tiny_onnx()), "--source", str(video), "--no-show", "--track"]) == 1
    assert "hkd-demo: trackers: not installed. Run pip install 'hkd-det[track]'.\n" in capsys.readouterr().err


def test_drawing_of_lines_and_zones() -> None:
    canvas = np.full((240, 320, 3), 128, np.uint8)
    lines = [Line("door", ((0.5, 1.0), (0.5, 0.3)))]
    zones = [Zone("yard", ((0.1, 0.6), (0.3, 0.6), (0.3, 0.9), (0.1, 0.9)))]
    draw_scene(canvas, lines, zones, {"lines": {"door": {"left": 1, "right": 2}}, "zones": {}})
    assert tuple(canvas[200, 160]) == LINE_COLOR
    assert tuple(canvas[156, 166]) == LINE_COLOR  # the arrow, on the right side as seen from the first point
    assert (canvas[156, 150] == 128).all()
    assert tuple(canvas[180, 32]) == ZONE_COLOR
    assert (canvas[230:, 200:] == 128).all()


def test_drawing_of_track_ids_replaces_scores() -> None:
    image = np.full((240, 320, 3), 128, np.uint8)
    detections = Detections(np.array([(50, 100, 150, 200)]), np.array([0.5]))
    without_id = draw_detections(image, detections)
    assert (draw_detections(image, detections, track_ids=np.array([-1])) == without_id).all()
    drawn = draw_detections(image, detections, track_ids=np.array([7]))
    assert tuple(drawn[150, 50]) == MatchStatus.TRUE_POSITIVE.value
    assert (drawn != without_id).any()
