"""Tests of the loop over several cameras: fairness, failing cameras, batches, redaction. The cameras are readers in
memory, so that rates and failures are exact."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from hkd_deploy.backends.base import Detector, StageTimes
from hkd_deploy.demo.base import FrameResult
from hkd_deploy.demo.run import CameraPipeline, run_cameras
from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.pipeline import open_detector
from hkd_deploy.streams.live import CameraFrame, LiveSource, ReconnectPolicy
from hkd_deploy.streams.sources import ImageSource
from hkd_det.errors import DataError, HkdError, UnavailableError
from hkd_det.structures import Detections

POLICY = ReconnectPolicy(open_timeout_s=2, read_timeout_s=0.4, retry_s=0.02)


class Reader:
    """A connection that returns an image of a gray level every `interval_s`. `trouble` is called before each image."""

    def __init__(self, level: int, interval_s: float, trouble: Callable[[], object] = lambda: None) -> None:
        self.fps: float | None = None
        self.decoder = ""
        self._image = np.full((24, 32, 3), level, np.uint8)
        self._interval_s, self._trouble = interval_s, trouble

    def read(self) -> CameraFrame:
        time.sleep(self._interval_s)
        self._trouble()
        return CameraFrame(lambda: self._image, time.monotonic())

    def close(self) -> None:
        pass


class FakeDetector(Detector):
    """Takes `duration_s` per call. The box has the gray level of the image as its right edge."""

    backend, device = "none", "cpu"

    def __init__(self, duration_s: float = 0.0, max_batch: int | None = 1, refused_level: int = -1) -> None:
        self.metadata = ModelMetadata("fake", (24, 32), 1, 0, None, "", "", "", "", "", (24, 32))
        self.max_batch = max_batch
        self.batch_sizes: list[int] = []
        self._duration_s, self._refused_level = duration_s, refused_level

    def predict_timed(self, image_rgb: np.ndarray) -> tuple[Detections, StageTimes]:
        return self.predict_timed_batch([image_rgb])[0]

    def predict_timed_batch(self, images_rgb: Sequence[np.ndarray]) -> list[tuple[Detections, StageTimes]]:
        levels = [int(image[0, 0, 0]) for image in images_rgb]
        if self._refused_level in levels:
            raise DataError("fake: the image is too large. Use another size.")
        self.batch_sizes.append(len(levels))
        time.sleep(self._duration_s)
        boxes = [np.array([[1, 1, level, 9]], np.float32) for level in levels]
        return [
            (Detections(box, np.array([0.5], np.float32)), StageTimes(0, 1e3 * self._duration_s, 0)) for box in boxes
        ]

    def predict_batches(self, images_rgb: Sequence[np.ndarray]) -> list[Detections]:
        raise NotImplementedError


class RecordingSink:
    """Keeps results and statuses."""

    def __init__(self) -> None:
        self.results: list[FrameResult] = []
        self.statuses: list[tuple[str, str]] = []

    def write(self, result: FrameResult) -> None:
        self.results.append(result)

    def write_status(self, camera: str, status: str) -> None:
        self.statuses.append((camera, status))

    def close(self) -> None:
        pass

    def count(self, camera: str) -> int:
        return sum(result.camera == camera for result in self.results)


@contextmanager
def open_cameras(
    readers: dict[str, Callable[[], Reader]], sink: RecordingSink
) -> Iterator[tuple[list[CameraPipeline], Event]]:
    new_frame = Event()
    sources = {name: LiveSource(name, make, POLICY, new_frame.set) for name, make in readers.items()}  # type: ignore[arg-type]
    try:
        yield [CameraPipeline(name, source, 0.3, [sink]) for name, source in sources.items()], new_frame
    finally:
        for source in sources.values():
            source.stop()
        for source in sources.values():
            source.close()


def run_for(seconds: float, pipelines: list[CameraPipeline], detector: Detector, new_frame: Event) -> None:
    end_s = time.monotonic() + seconds
    run_cameras(pipelines, detector, new_frame=new_frame, should_stop=lambda: time.monotonic() > end_s)


def test_cameras_that_flood_have_equal_shares() -> None:
    sink = RecordingSink()
    with open_cameras({name: lambda: Reader(9, 0.001) for name in "abc"}, sink) as (pipelines, new_frame):
        run_cameras(pipelines, FakeDetector(0.02), max_frames=60, new_frame=new_frame)
    assert len(sink.results) == 60
    assert all(19 <= sink.count(name) <= 21 for name in "abc")
    assert all(pipeline.source.num_dropped > 100 for pipeline in pipelines)  # not queued


def test_camera_with_an_unexpected_error_is_reported_and_opened_again() -> None:
    def fail_at_first() -> None:
        if len(calls) < 3:
            calls.append(0)
            raise ZeroDivisionError("division by zero")

    sink, calls = RecordingSink(), list[int]()
    with open_cameras({"a": lambda: Reader(9, 0.01, fail_at_first), "b": lambda: Reader(9, 0.01)}, sink) as (
        pipelines,
        new_frame,
    ):
        run_for(0.5, pipelines, FakeDetector(), new_frame)
    assert sink.count("a") > 5 and sink.count("b") > 5
    assert any(camera == "a" and "ZeroDivisionError: division by zero" in status for camera, status in sink.statuses)


@pytest.mark.slow
def test_camera_that_floods_takes_no_frames_from_a_slow_one() -> None:
    sink = RecordingSink()
    readers = {"flood": lambda: Reader(9, 0.001), "slow": lambda: Reader(9, 0.2)}
    with open_cameras(readers, sink) as (pipelines, new_frame):
        run_for(3, pipelines, FakeDetector(0.04), new_frame)
    slow = [result for result in sink.results if result.camera == "slow"]
    assert pipelines[1].source.num_dropped <= 1  # 1: after the end of the run
    assert len(slow) >= 12  # of 15
    # At most one frame of the other camera is processed between a frame of the slow one and its result.
    assert np.median([result.age_ms for result in slow]) < 2.5 * 40
    assert sink.count("flood") > 40


def test_results_are_of_the_newest_frame() -> None:
    sink = RecordingSink()
    with open_cameras({name: lambda: Reader(9, 0.005) for name in "abcd"}, sink) as (pipelines, new_frame):
        run_cameras(pipelines, FakeDetector(0.05), max_frames=24, new_frame=new_frame)
    ages = [result.age_ms for result in sink.results if result.age_ms is not None]
    assert len(ages) == 24
    assert np.percentile(ages, 90) < 110  # a queue would add 50 ms for each camera


@pytest.mark.slow
def test_cameras_that_cannot_be_opened_or_hang_do_not_delay_others() -> None:
    sink, hangs = RecordingSink(), Event()

    def refuse() -> Reader:
        raise UnavailableError("dead: nothing listens at port 9. Check the port.")

    def hang_at_open() -> Reader:
        hangs.wait(20)
        raise UnavailableError("closed. Check it.")

    readers = {
        "dead": refuse,
        "opening": hang_at_open,
        "hangs": lambda: Reader(9, 0.01, lambda: hangs.wait(20) if sink.count("hangs") > 3 else None),
        "live": lambda: Reader(9, 0.02),
    }
    start_s = time.monotonic()
    with open_cameras(readers, sink) as (pipelines, new_frame):
        run_for(2, pipelines, FakeDetector(0.001), new_frame)
        end_s = time.monotonic()
    assert end_s - start_s < 3 and time.monotonic() - end_s < 1.5  # close waits for all cameras together
    hangs.set()
    live = [result.timestamp_s for result in sink.results if result.camera == "live"]
    assert len(live) > 70 and max(np.diff(live)) < 0.25
    assert sink.statuses.count(("dead", "camera lost: nothing listens at port 9. Check the port.")) == 1
    assert ("opening", "camera lost: no data for 0.4 s") in sink.statuses
    assert ("hangs", "camera lost: no data for 0.4 s") in sink.statuses
    assert [pipeline.num_lost for pipeline in pipelines] == [1, 1, 1, 0]


def test_camera_that_is_off_at_the_start_delivers_later() -> None:
    sink, is_on = RecordingSink(), Event()

    def open_reader() -> Reader:
        if not is_on.is_set():
            raise UnavailableError("late: off. Switch it on.")
        return Reader(9, 0.02)

    readers = {"live": lambda: Reader(9, 0.02, lambda: is_on.set() if sink.count("live") == 5 else None)}
    with open_cameras(readers | {"late": open_reader}, sink) as (pipelines, new_frame):
        run_for(1, pipelines, FakeDetector(), new_frame)
    assert sink.count("late") > 5
    assert [status for camera, status in sink.statuses if camera == "late"] == ["camera lost: off. Switch it on.", ""]


def test_no_camera_can_be_opened() -> None:
    def refuse() -> Reader:
        raise UnavailableError("gate: nothing listens. Check it.")

    sink = RecordingSink()
    with (
        open_cameras({"gate": refuse, "yard": refuse}, sink) as (pipelines, new_frame),
        pytest.raises(UnavailableError, match=r"^gate: nothing listens\. Check it\. None of 2 cameras"),
    ):
        run_for(5, pipelines, FakeDetector(), new_frame)


def test_batches_have_one_frame_of_each_camera() -> None:
    sink, detector = RecordingSink(), FakeDetector(0.05, max_batch=2)
    readers: dict[str, Callable[[], Reader]] = {
        "a": lambda: Reader(10, 0.001),
        "b": lambda: Reader(20, 0.001),
        "c": lambda: Reader(30, 0.001),
    }
    with open_cameras(readers, sink) as (pipelines, new_frame):
        run_cameras(pipelines, detector, max_frames=31, new_frame=new_frame)
    assert len(sink.results) == 31
    assert set(detector.batch_sizes[3:-1]) == {1, 2}  # two of three cameras, then the third
    for result in sink.results:
        assert result.detections.boxes_xyxy[0, 2] == {"a": 10, "b": 20, "c": 30}[result.camera]


def test_frame_that_the_model_refuses_ends_its_camera_only() -> None:
    sink, detector = RecordingSink(), FakeDetector(0.01, max_batch=None, refused_level=20)
    readers = {"good": lambda: Reader(10, 0.001), "bad": lambda: Reader(20, 0.001)}
    with open_cameras(readers, sink) as (pipelines, new_frame):
        run_for(0.5, pipelines, detector, new_frame)
    assert sink.count("good") > 5 and sink.count("bad") == 0
    assert sink.statuses == [("bad", "ended: fake: the image is too large. Use another size.")]


@pytest.mark.parametrize("batch", [1, None])
def test_batches_of_a_model_give_the_results_of_single_images(
    tiny_onnx: Callable[..., Path], tmp_path: Path, batch: int | None
) -> None:
    import cv2

    rng = np.random.default_rng(0)
    sources = []
    for index in range(3):
        image = np.zeros((100 + 10 * index, 160, 3), np.uint8)
        x, y = rng.integers(0, 60, 2)
        image[y : y + 30, x : x + 40] = 240
        path = tmp_path / f"{index}.png"
        cv2.imwrite(str(path), image)
        sources.append((path, image))
    sink = RecordingSink()
    with open_detector(tiny_onnx(batch=batch)) as detector:
        assert detector.max_batch == batch
        pipelines = [CameraPipeline(path.name, ImageSource(path.name, [path]), 0, [sink]) for path, _ in sources]
        run_cameras(pipelines, detector)
        expected = [detector(image) for _, image in sources]
    assert [result.camera for result in sink.results] == ["0.png", "1.png", "2.png"]
    for result, detections in zip(sink.results, expected, strict=True):
        assert np.allclose(result.all_detections.boxes_xyxy, detections.boxes_xyxy)
        assert np.allclose(result.all_detections.scores, detections.scores)


class Numbering:
    """A tracker and counter that shows what it receives."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def update(self, detections: Detections, *args: object) -> np.ndarray:
        self.times_s.append(float(args[-1]))  # type: ignore[arg-type]
        return 7 + np.arange(len(detections.scores))


class PersonCounter:
    new_events = ()

    def update(self, detections: Detections, track_ids: np.ndarray | None, *_: object) -> dict[str, int]:
        assert track_ids is not None and len(track_ids) == len(detections.scores)
        return {"total": int(track_ids.sum())}


def test_tracker_and_counters_are_those_of_the_camera() -> None:
    sink, tracker = RecordingSink(), Numbering()
    with open_cameras({"a": lambda: Reader(10, 0.01), "b": lambda: Reader(20, 0.01)}, sink) as (pipelines, new_frame):
        pipelines[0].tracker, pipelines[0].counters = tracker, [PersonCounter()]
        run_cameras(pipelines, FakeDetector(), max_frames=10, new_frame=new_frame)
    for result in sink.results:
        assert (result.track_ids is None) == (result.camera == "b")
        assert result.counts == ({"total": 7} if result.camera == "a" else {})
    assert tracker.times_s == sorted(tracker.times_s) and len(tracker.times_s) == sink.count("a")


def test_sinks_get_an_image_without_people() -> None:
    image = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    boxes = np.array([[10, 10, 40, 60], [60, 10, 90, 60]], np.float32)
    found = Detections(boxes, np.array([0.9, 0.15], np.float32))
    result = FrameResult("a", 0, image, found.filter(0.3), found, 0.3, 0.0, None, StageTimes(1, 1, 1), privacy="fill")
    for y in (20, 50):  # also people whose score is too low to be shown
        assert np.ptp(result.image_rgb[y, 12:38]) == np.ptp(result.image_rgb[y, 62:88]) == 0
    assert np.array_equal(result.image_rgb[70:], image[70:])
    assert result.drawn_rgb is result.drawn_rgb and np.array_equal(result.original_rgb, image)
    assert not np.array_equal(result.drawn_rgb, result.image_rgb)


def test_error_of_a_file_is_raised_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    sink = RecordingSink()
    pipelines = [CameraPipeline("bad", ImageSource("bad", [tmp_path / "bad.png"]), 0.3, [sink])]
    with pytest.raises(HkdError, match=r"bad\.png"):
        run_cameras(pipelines, FakeDetector())
    assert sink.statuses[0][1].startswith("ended: ")
