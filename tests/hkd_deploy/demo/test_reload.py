"""Tests of a changed file of `--cameras`: what a reload changes, and that all else goes on."""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from hkd_deploy.backends.base import StageTimes
from hkd_deploy.demo.analytics import create_analytics, make_added_pipeline
from hkd_deploy.demo.base import REMOVED_STATUS, FrameResult
from hkd_deploy.demo.camera_file import CameraReloader
from hkd_deploy.demo.cameras import CameraConfig, read_cameras
from hkd_deploy.demo.cli import main
from hkd_deploy.demo.run import CameraPipeline
from hkd_deploy.demo.service import ReloadSignal
from hkd_deploy.demo.web import WebSink
from hkd_deploy.streams import Frame, FrameSource, open_source
from hkd_det.structures import Detections

COMMAND = [sys.executable, "-c", "import sys; from hkd_deploy.demo.cli import main; sys.exit(main())"]
WIDTH, PERIOD = 96, 60  # of the camera of the tests, pixels, and of the walk of its person, frames


def encode_walk(number: int) -> bytes:
    """Encode a frame in which one person walks to and fro over the middle of the image."""
    phase = number % PERIOD / PERIOD
    x = round(10 + 50 * (2 * phase if phase < 0.5 else 2 - 2 * phase))
    image = np.full((64, WIDTH, 3), 60, np.uint8)
    image[10:54, x : x + 26] = 255
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1])


def wait_for(condition: Callable[[], Any], timeout_s: float = 20) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not become true"
        time.sleep(0.05)


def read_events(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def count_crossings(frames: list[dict[str, Any]]) -> int:
    """Count how often the center of the person changes the half of the image."""
    centers = [box[0] + box[2] for frame in frames for box in [person["box_xyxy"] for person in frame["persons"]]]
    return sum(before != after for before, after in pairwise(center > WIDTH for center in centers))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="SIGUSR1 does not exist on this system")
def test_signal_reloads_cameras_of_a_running_process(
    tiny_onnx: Callable[..., Path], make_camera: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cameras = [make_camera() for _ in range(3)]
    monkeypatch.setattr(f"{type(cameras[0]).__module__}.encode_frame", encode_walk)
    config, events = tmp_path / "cameras.yaml", tmp_path / "events.jsonl"
    door = f"- {{name: door, source: '{cameras[0].address}', lines: {{middle: [[0.5, 1], [0.5, 0]]}}"
    yard = f"- {{name: yard, source: '{cameras[1].address}'"
    config.write_text(f"cameras:\n{door}}}\n{yard}}}\n")
    command = [*COMMAND, str(tiny_onnx()), "--cameras", str(config), "--events", str(events), "--conf", "0.1"]
    log_path = tmp_path / "log"
    with log_path.open("w") as log:
        process = subprocess.Popen([*command, "--no-show"], stdout=subprocess.DEVNULL, stderr=log)

    def select(name: str, kind: str = "frame") -> list[dict[str, Any]]:
        return [event for event in read_events(events) if (event["camera"], event["event"]) == (name, kind)]

    def reload(content: str) -> str:
        num_lines = log_path.read_text().count(" reload: ")
        config.write_text(content)
        process.send_signal(signal.SIGUSR1)
        wait_for(lambda: log_path.read_text().count(" reload: ") > num_lines)
        return [line for line in log_path.read_text().splitlines() if " reload: " in line][-1].partition(" reload: ")[2]

    try:
        wait_for(lambda: len(select("door", "crossing")) >= 2 and len(select("yard")) > 5)
        zone = "zones: {left half: [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]}"
        gate = f"- {{name: gate, source: '{cameras[2].address}', conf: 0.9}}\n"
        num_before = len(select("door"))
        assert reload(f"cameras:\n{door}, {zone}}}\n{gate}") == "added gate; removed yard; changed door."
        wait_for(lambda: len(select("gate")) > 5 and len(select("door")) > num_before + 2 * PERIOD)
        invalid = reload(f"cameras:\n{door}, conf: 7}}\n{gate}")
        assert invalid.startswith(f"{config}: door.conf: expected") and invalid.endswith("stays as it was.")
        assert reload(f"cameras:\n{door}, conf: 0.9}}\n{yard}}}\n") == "added yard; removed gate; changed door."
        num_yard = len(select("yard"))
        wait_for(lambda: len(select("yard")) > num_yard + 5)
    finally:
        process.send_signal(signal.SIGHUP)
        assert process.wait(10) == 0
    assert "Traceback" not in log_path.read_text()
    frames = select("door")
    assert [event["frame"] for event in frames] == list(range(len(frames)))
    assert cameras[0].connections == 1 and cameras[1].connections == 2
    visible = [frame for frame in frames if frame["persons"]]
    assert {person["track_id"] for frame in visible[5:] for person in frame["persons"]} == {
        visible[5]["persons"][0]["track_id"]
    }
    counts = [sum(frame["counts"]["lines"]["middle"].values()) for frame in frames]
    assert counts == sorted(counts) and abs(counts[len(visible) - 1] - count_crossings(visible)) <= 1
    assert "left half" in frames[num_before + 2 * PERIOD]["counts"]["zones"] and not frames[-1]["counts"]["zones"]
    assert len(visible) > num_before + PERIOD and not frames[-1]["persons"]  # below the new threshold
    assert not any(frame["persons"] for frame in select("gate"))
    assert [event["status"] for event in select("yard", "status")] == [REMOVED_STATUS, "ok"]
    assert [event["frame"] for event in select("yard")] == list(range(len(select("yard"))))


class FakeSource(FrameSource):
    """A camera without frames."""

    def __init__(self) -> None:
        super().__init__("fake", is_live=True, fps=None, num_frames=None)

    def iterate_frames(self, *_: object) -> Iterator[Frame]:
        return iter(())

    def close(self) -> None:
        pass


class Run:
    """Cameras of a file, with a reloader, without a detector."""

    def __init__(self, path: Path, content: str, page: WebSink | None = None) -> None:
        self.path, self.lines = path, list[str]()
        path.write_text(content)
        cameras = read_cameras(path)
        self.pipelines = [self.make_pipeline(camera, FakeSource()) for camera in cameras]
        read = lambda: read_cameras(path)  # noqa: E731
        open_camera = partial(open_source, on_frame=lambda: None)
        self.reloader = CameraReloader(
            read,
            cameras,
            self.pipelines,
            self.make_pipeline,
            0.3,
            "fill",
            open_camera,
            lambda text, *_, **__: self.lines.append(text),
            page,
        )

    def make_pipeline(self, camera: CameraConfig, source: FrameSource) -> CameraPipeline:
        tracker, counters = create_analytics(camera, 0.3, False)
        return CameraPipeline(camera.name, source, 0.3, [], "fill", tracker, counters, camera.lines, camera.zones)

    def reload(self, content: str) -> str:
        self.path.write_text(content)
        self.reloader.reload()
        return self.lines[-1]


def test_settings_of_the_file_and_of_the_run_are_applied(tmp_path: Path) -> None:
    run = Run(tmp_path / "c.yaml", "cameras:\n- {name: a, source: '0', lines: {x: [[0, 0], [1, 1]]}}\n")
    pipeline, tracker = run.pipelines[0], run.pipelines[0].tracker
    lines = "lines: {x: [[0, 0], [1, 1]], y: [[0, 1], [1, 0]]}"
    new = f"cameras:\n- {{name: a, source: '0', conf: 0.6, privacy: blur, {lines}}}\n"
    assert run.reload(new) == "reload: changed a."
    pipeline.apply_scenes()
    assert (pipeline.conf, pipeline.privacy, pipeline.tracker) == (0.6, "blur", tracker)
    assert tracker is not None and tracker.min_score == 0.6  # type: ignore[attr-defined]
    assert [line.name for line in pipeline.lines] == ["x", "y"]
    assert run.reload("cameras:\n- {name: a, source: '0'}\n") == "reload: changed a."
    pipeline.apply_scenes()
    assert (pipeline.conf, pipeline.privacy, pipeline.counters, pipeline.lines) == (0.3, "fill", [], ())
    assert run.reload("cameras:\n- {name: a, source: '0'}\n") == "reload: no changes."
    assert run.reload("cameras:\n- {name: b, source: nothing.mp4}\n").startswith("reload: nothing.mp4: no such file")
    assert not pipeline.is_removed and len(run.pipelines) == 1
    run.path.unlink()
    run.reloader.reload()
    assert run.lines[-1].startswith(f"reload: {run.path}: ") and "\n" not in run.lines[-1]


def test_other_address_keeps_statistics_and_closes_the_old_connection(
    tmp_path: Path, make_camera: Callable[..., Any]
) -> None:
    cameras = [make_camera() for _ in range(3)]
    text = "cameras:\n- {{name: a, source: '{}'}}\n"
    run = Run(tmp_path / "c.yaml", text.format("0"))
    for number, camera in enumerate(cameras):
        assert run.reload(text.format(camera.address)) == "reload: changed a."
        wait_for(run.pipelines[0].take_frame)
        run.pipelines[0].stats.add(StageTimes(1, 1, 1), 5)
        assert run.pipelines[0].stats.num_frames == number + 1
    sent = [camera.sent for camera in cameras]
    time.sleep(0.6)
    assert cameras[2].sent > sent[2] and cameras[0].sent - sent[0] <= 20
    run.reloader.close()


def test_outputs_with_one_file_per_camera_refuse_a_new_one(tmp_path: Path) -> None:
    run = Run(tmp_path / "c.yaml", "cameras:\n- {name: a, source: '0'}\n")
    for values in ({"save": Path("x.mp4"), "heatmap": None}, {"save": None, "heatmap": Path("x.png")}):
        flags = argparse.Namespace(**values, track=False, privacy=None)
        run.reloader._make_pipeline = partial(make_added_pipeline, flags, 0.3, [])
        entries = "- {name: a, source: '0', conf: 0.8}\n- {name: b, source: 'http://127.0.0.1:9/x'}"
        message = run.reload(f"cameras:\n{entries}\n")
        assert message.startswith("reload: --") and "no file for the new camera b" in message
        assert len(run.pipelines) == 1 and run.pipelines[0].conf == 0.3


def test_page_shows_added_cameras_and_hides_removed_ones(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("cameras:\n- {name: a, source: '0', privacy: pixelate}\n")
    pipelines: list[CameraPipeline] = []
    page = WebSink(read_cameras(path), pipelines, 0, camera_file=path)
    try:
        run = Run(path, path.read_text(), page)
        run.pipelines.extend(pipelines)
        image = np.repeat(np.repeat(np.arange(0, 240, 24, np.uint8), 16)[None, :, None], 90, 0).repeat(3, 2)
        people = Detections(np.array([[16, 9, 80, 81]], np.float32), np.array([0.8], np.float32))
        page.write(FrameResult("a", 0, image, people, people, 0.3, 0.0, 1.0, StageTimes(1, 1, 1), privacy="pixelate"))
        view = page._views["a"]
        before = cv2.imdecode(np.frombuffer(view.encode()[1], np.uint8), cv2.IMREAD_COLOR)
        run.reload("cameras:\n- {name: a, source: '0', privacy: fill}\n- {name: b, source: 'http://127.0.0.1:9/x'}\n")
        after = cv2.imdecode(np.frombuffer(view.encode()[1], np.uint8), cv2.IMREAD_COLOR)
        assert before[20:70, 30:70].std() > 10 > after[20:70, 30:70].std()  # also without a new frame
        assert [other.name for other in page._view_list] == ["a", "b"]
        run.reload("cameras:\n- {name: b, source: 'http://127.0.0.1:9/x'}\n")
        states = [view.describe(pipeline, 0) for view, pipeline in zip(page._view_list, run.pipelines, strict=True)]
        assert [state["is_removed"] for state in states] == [True, False]
        run.reloader.close()
    finally:
        page.close()


def test_signals_are_one_request_and_the_handler_is_restored(
    camera: Any, tiny_onnx: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with ReloadSignal() as reload_signal:
        assert not reload_signal.take()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert reload_signal.take() and not reload_signal.take()
    assert main([str(tiny_onnx()), "--source", camera.address, "--no-show", "--max-frames", "3"]) == 0
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert "reload" not in capsys.readouterr().err
