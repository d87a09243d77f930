"""`--monitor` with simulated cameras: drift that is known, events, metrics, and the baseline of a camera."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from hkd_deploy.backends.base import StageTimes
from hkd_deploy.demo.base import FrameResult
from hkd_deploy.demo.cli import main
from hkd_deploy.demo.metrics import DemoMetrics
from hkd_deploy.demo.monitor import DriftMonitor, read_baselines
from hkd_deploy.drift import CHUNKS_PER_WINDOW, DriftReference, build_baseline, build_reference, count_values
from hkd_det.errors import UsageError
from hkd_det.structures import Detections

IMAGE = np.zeros((480, 640, 3), np.uint8)


def sample_detections(rng: np.random.Generator, shift: float = 0.0, mean_persons: float = 2.0) -> Detections:
    count = rng.poisson(mean_persons)
    heights = np.exp(rng.normal(-1.5, 0.4, count)) * 480
    boxes = np.stack([np.full(count, 10), np.full(count, 5), np.full(count, 50), 5 + heights], 1)
    return Detections(boxes, np.clip(rng.normal(0.65 + shift, 0.15, count), 0.06, 0.99))


def make_result(time_s: float, detections: Detections, camera: str = "door") -> FrameResult:
    return FrameResult(
        camera, 0, IMAGE, detections.filter(0.3), detections, 0.3, time_s, None, StageTimes(0.0, 0.0, 0.0)
    )


@pytest.fixture(scope="module")
def reference() -> DriftReference:
    rng = np.random.default_rng(0)
    result = build_reference([count_values(sample_detections(rng), 480, 0.3) for _ in range(400)], 0.3)
    assert result is not None
    return result


class Camera:
    """A monitor of a window of ten minutes, with what it publishes and reports."""

    def __init__(
        self, reference: DriftReference | None, baseline_s: float = 0.0, baseline_path: Path | None = None
    ) -> None:
        self.events: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.monitor = DriftMonitor(600, reference, baseline_s, [self.events.append], self.report, baseline_path)
        self.time_s, self.rng = 1000.0, np.random.default_rng(1)

    def report(self, message: str, camera: str = "", level: str = "info") -> None:  # noqa: ARG002
        self.lines.append(f"{camera}: {message}" if camera else message)

    def run(self, seconds: float, fps: float = 1.0, **options: float) -> None:
        for _ in range(round(seconds * fps)):
            self.monitor.write(make_result(self.time_s, sample_detections(self.rng, **options)))
            self.time_s += 1 / fps


def test_drift_begins_and_ends_with_a_line_and_events(reference: DriftReference) -> None:
    camera = Camera(reference)
    camera.run(1200)
    assert not camera.lines
    assert {event["state"] for event in camera.events} == {"ok"}
    camera.run(600, shift=-0.2)
    assert len(camera.lines) == 1
    assert camera.lines[0].startswith("door: drift from the validation images: ") and "score PSI" in camera.lines[0]
    event = camera.events[-1]
    assert (event["event"], event["camera"], event["state"], event["reference"]) == ("drift", "door", "drift", "model")
    score = event["quantities"]["score"]
    assert score["drift"] and score["psi"] > score["threshold"] >= 0.25
    camera.run(900)
    assert camera.lines[1:] == ["door: drift is over."]
    assert json.loads(json.dumps(camera.events[-1]))["state"] == "ok"


@pytest.mark.slow
def test_frames_of_one_second_count_once(reference: DriftReference) -> None:
    """A window of 600 s has 600 frames at 10 per second, at 1 per second with jitter, and 300 at one per 2 s."""
    for fps, expected in ((10.0, 600), (1.0, 600), (0.5, 300)):
        camera = Camera(reference)
        camera.run(900, fps)
        assert camera.events[-1]["num_frames"] == pytest.approx(expected, rel=0.02)


def test_empty_camera_has_drift_of_persons_only(reference: DriftReference) -> None:
    camera = Camera(reference)
    camera.run(900, mean_persons=0)
    quantities = camera.events[-1]["quantities"]
    assert quantities["persons"]["drift"]
    assert quantities["score"] == quantities["height"] == {"psi": None, "threshold": None, "drift": False}


def test_few_values_are_not_compared(reference: DriftReference) -> None:
    camera = Camera(reference)
    camera.run(530, shift=-0.3)
    assert not camera.events  # the window is not full
    camera.run(100, shift=-0.3)
    assert camera.events
    camera = Camera(reference)
    camera.run(620, mean_persons=0.1)
    assert [one["psi"] is None for one in camera.events[-1]["quantities"].values()] == [True, True, False]


def test_camera_that_was_lost_fills_its_window_again(reference: DriftReference) -> None:
    camera = Camera(reference)
    camera.run(620)
    num_events = len(camera.events)
    camera.time_s += 3600
    camera.run(500, shift=-0.3)
    assert len(camera.events) == num_events
    camera.run(100, shift=-0.3)
    assert camera.events[-1]["num_frames"] == pytest.approx(580, abs=20)


def wait_for_baseline(camera: Camera) -> None:
    end_s = time.monotonic() + 60
    while camera.monitor._cameras["door"].reference is None and time.monotonic() < end_s:
        time.sleep(0.02)


@pytest.mark.slow
def test_baseline_of_the_camera_replaces_the_validation_images(tmp_path: Path) -> None:
    """A camera with small people, which differ from validation images, has drift only when it changes itself."""
    path = tmp_path / "new" / "baselines.json"
    camera = Camera(None, 2400, path)
    camera.run(2420, shift=-0.2, mean_persons=1)
    assert not camera.events
    wait_for_baseline(camera)
    camera.run(900, shift=-0.2, mean_persons=1)
    assert camera.lines == ["door: the baseline of drift is complete."]
    assert camera.events[-1]["reference"] == "camera" and camera.events[-1]["state"] == "ok"
    restarted = Camera(None, 2400, path)
    for one in (camera, restarted):  # the second one has the baseline from the file
        one.run(700, shift=0.1, mean_persons=1)
        assert "the baseline of this camera" in one.lines[-1]
    assert len(restarted.lines) == 1
    with pytest.raises(UsageError, match="expected --drift-window 600s, got 3600s"):
        read_baselines(path, 3600)
    path.write_text("{}")
    with pytest.raises(UsageError, match="not a file of baselines"):
        read_baselines(path, 600)


@pytest.mark.slow
def test_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    camera = Camera(None, 2400, tmp_path / "file" / "baselines.json")
    camera.run(2420)
    wait_for_baseline(camera)
    camera.monitor._cameras["door"]._thread.join(10)  # type: ignore[union-attr]
    assert len(camera.lines) == 2 and "The baseline of door ends with the program." in camera.lines[1]


@pytest.mark.slow
def test_baseline_contains_the_changes_of_a_day() -> None:
    """Windows alternate between two scores: the threshold is the largest PSI of one of them against the others."""
    rng, chunks = np.random.default_rng(2), []
    for index in range(8 * CHUNKS_PER_WINDOW):
        shift = 0.15 if index // CHUNKS_PER_WINDOW % 2 else -0.15
        frames = [count_values(sample_detections(rng, shift), 480, 0.3) for _ in range(5)]
        chunks.append({name: sum(frame[name] for frame in frames) for name in frames[0]})
    same = build_baseline(chunks[:CHUNKS_PER_WINDOW] * 8, 0.3).distributions["score"]
    changing = build_baseline(chunks, 0.3).distributions["score"]
    assert same.min_threshold == 0.25
    assert changing.min_threshold > 0.5


def test_metrics_have_gauges(reference: DriftReference) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    client = pytest.importorskip("prometheus_client")
    camera = Camera(reference)
    camera.run(700, shift=-0.2)
    metrics = DemoMetrics("0", ["door"])
    try:
        monitor = camera.monitor
        metrics.add_gauge("drift_psi", "PSI", ("camera", "quantity"), lambda: monitor.iterate_values("psi"))
        metrics.add_gauge("drift", "Drift", ("camera",), lambda: monitor.iterate_values("is_drift"))
        text = client.generate_latest(metrics._registry).decode()
    finally:
        metrics.close()
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["hkd_drift", "door"] == 1
    expected = camera.events[-1]["quantities"]["score"]["psi"]
    assert values["hkd_drift_psi", "door", "score"] == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def bright_video(tmp_path: Path) -> str:
    """A directory of images at 2 per second: a bright box that the tiny model detects."""
    rng = np.random.default_rng(0)
    for index in range(300):
        image = np.zeros((96, 160, 3), np.uint8)
        top = int(rng.integers(0, 40))
        image[top : top + 40, 20:40] = 255
        cv2.imwrite(str(tmp_path / f"{index:04d}.png"), image)
    return str(tmp_path)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text().splitlines())


def test_command_writes_events(
    tiny_onnx: Callable[..., Path], bright_video: str, reference: DriftReference, tmp_path_factory: Any, capfd: Any
) -> None:
    """All images have one box with the score 1, unlike the reference."""
    model = tiny_onnx(changes={"hkd.reference": reference.to_json()})
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    flags = ["--source", bright_video, "--monitor", "--drift-window", "2m", "--events", str(path)]
    assert main([str(model), *flags]) == 0
    drift = [event for event in read_events(path) if event["event"] == "drift"]
    assert len(drift) >= 12 and drift[-1]["state"] == "drift"
    assert "drift from the validation images" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--monitor"], "--monitor: the file of tiny has no reference (metadata hkd.reference). Export it again"),
        (["--monitor", "--drift-window", "1m"], "--drift-window 1m: expected at least 120s."),
        (["--monitor", "--drift-baseline-file", "x"], "--drift-baseline-file: requires --drift-baseline."),
        (["--drift-baseline", "24h"], "--drift-baseline: requires --monitor."),
        (["--monitor", "--drift-baseline", "3h"], "--drift-baseline 3h: expected at least 4 times --drift-window"),
        (["--collect", "out", "--collect-per-hour", "0"], "--collect-per-hour"),
        (["--collect", f"{sys.executable}/x"], "Choose another directory."),
    ],
)
def test_wrong_flags_are_usage_errors(
    flags: list[str], message: str, tiny_onnx: Callable[..., Path], bright_video: str, capsys: Any
) -> None:
    assert main([str(tiny_onnx()), "--source", bright_video, *flags]) == 2
    assert message in capsys.readouterr().err
