"""The loop of the demo: frames of one or several cameras, one detector, and the outputs (`FrameSink`).

Each camera has a thread that keeps its newest frame (`LiveSource`); one thread runs the detector. A pass over the
cameras takes at most one frame of each, so a fast camera takes no time from a slow one, and no frames queue up. A
camera that is lost, hangs or fails has no frame and is skipped.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from threading import Event
from time import monotonic
from typing import Any

from hkd_deploy.backends.base import Detector, StageTimes
from hkd_deploy.demo.base import REMOVED_STATUS, Counter, FrameResult, FrameSink, FrameWindow, Tracker
from hkd_deploy.demo.cameras import Line, Zone
from hkd_deploy.demo.output import FrameStats
from hkd_deploy.streams import Frame, FrameSource, LiveSource
from hkd_det.draw import Redaction
from hkd_det.errors import HkdError, UnavailableError
from hkd_det.letterbox import format_imgsz
from hkd_det.structures import Detections

IDLE_INTERVAL_S = 0.1  # longest time between two checks of signals, window events and statuses


class CameraPipeline:
    """One camera with its outputs, its statistics and its tracker.

    Args:
        name: Unique name of the camera.
        source: The opened source.
        conf: Minimum score of shown detections, 0 to 1.
        sinks: Outputs, in the order in which they are called.
        privacy: How people are made unrecognizable. None shows them.
        tracker: Tracker of this camera.
        counters: Counters of this camera. Their counts are merged.
        lines: Lines of this camera, to draw them.
        zones: Zones of this camera, to draw them.

    Attributes:
        stats: Statistics of the camera.
        error: Error that ended the camera. None if there was none.
        is_ended: Whether the source has no further frames.
        is_removed: Whether the camera was removed from the run.
        num_lost: How often the camera was lost.
    """

    def __init__(
        self,
        name: str,
        source: FrameSource,
        conf: float,
        sinks: Sequence[FrameSink] = (),
        privacy: Redaction | None = None,
        tracker: Tracker | None = None,
        counters: Sequence[Counter] = (),
        lines: Sequence[Line] = (),
        zones: Sequence[Zone] = (),
    ) -> None:
        self.name, self.source, self.conf, self.privacy = name, source, conf, privacy
        self.sinks, self.tracker, self.counters = list(sinks), tracker, list(counters)
        self.lines, self.zones = tuple(lines), tuple(zones)
        self._scenes: deque[tuple[Tracker | None, Sequence[Counter], Sequence[Line], Sequence[Zone]]] = deque()
        self.stats = FrameStats()
        self.error: HkdError | None = None
        self.is_ended, self.is_removed, self.num_lost = False, False, 0
        self._frames: Iterator[Frame] | None = None
        self._reported_status = ""
        self._time_s = 0.0

    @property
    def status(self) -> str:
        """Problem of the camera. Empty if there is none."""
        if self.is_removed:
            return REMOVED_STATUS
        return f"ended: {self.error}" if self.error else self.source.status

    def take_frame(self) -> Frame | None:
        """Return the next frame of a recorded source, or the newest one of a camera. Sets `is_ended` at the end.

        Returns:
            The frame, or None.
        """
        if isinstance(self.source, LiveSource):
            frame = self.source.take_frame()
            if frame is not None and not self.stats.num_frames:
                self.stats = FrameStats()  # the rate counts from the first frame
            return frame
        if self._frames is None:
            self._frames = iter(self.source)
        frame = next(self._frames, None)
        self.is_ended = frame is None
        return frame

    def set_scene(
        self, tracker: Tracker | None, counters: Sequence[Counter], lines: Sequence[Line], zones: Sequence[Zone]
    ) -> None:
        """Replace tracker, counters, lines and zones before the next frame. Any thread may call it.

        Args:
            tracker: Tracker of this camera.
            counters: Counters of this camera.
            lines: Lines of this camera.
            zones: Zones of this camera.
        """
        self._scenes.append((tracker, counters, lines, zones))

    def apply_scenes(self) -> None:
        """Apply what `set_scene` set. Only the thread that runs the detector calls it."""
        while self._scenes:
            self.tracker, counters, lines, zones = self._scenes.popleft()
            self.counters, self.lines, self.zones = list(counters), tuple(lines), tuple(zones)

    def replace_source(self, source: FrameSource) -> None:
        """Continue with another source: statistics, tracker and counts stay. The caller closes the old one.

        Args:
            source: The opened source.
        """
        self.source, self._frames, self._time_s = source, None, 0.0
        self.error, self.is_ended, self.is_removed = None, False, False

    def remove(self) -> None:
        """End the camera without an error. `replace_source` continues it. The caller closes the source."""
        self.error, self.is_ended, self.is_removed = None, True, True
        self.report_status()

    def fail(self, error: HkdError) -> None:
        """End the camera with an error. The other cameras go on."""
        self.error, self.is_ended = error, True

    def write(self, detector: Detector, frame: Frame, found: Detections, times: StageTimes, age_ms: float) -> None:
        """Track, count and write the detections of a frame to the sinks.

        Args:
            detector: The detector, for its name.
            frame: The frame.
            found: All detections of the model, pixels of the frame.
            times: Time of each stage.
            age_ms: Time from the capture to the detections, ms. No effect for a recorded source.
        """
        image_hw = (frame.image_rgb.shape[0], frame.image_rgb.shape[1])
        known_age_ms = age_ms if self.source.is_live else None
        self.apply_scenes()
        self.stats.add(times, known_age_ms)
        shown = found.filter(self.conf)
        self._time_s = max(self._time_s, frame.timestamp_s)  # estimated capture times can step back
        track_ids = None
        if self.tracker:
            track_ids = self.tracker.update(found, image_hw, self._time_s)[found.scores >= self.conf]
        counts: dict[str, Any] = {}
        for counter in self.counters:
            counts |= counter.update(shown, track_ids, image_hw, self._time_s)
        count_events = tuple(event for counter in self.counters for event in counter.new_events)
        num_dropped = self.source.num_dropped
        result = FrameResult(
            camera=self.name,
            index=self.stats.num_frames - 1,
            original_rgb=frame.image_rgb,
            detections=shown,
            all_detections=found,
            conf=self.conf,
            timestamp_s=frame.timestamp_s,
            age_ms=known_age_ms,
            times=times,
            status=self.source.status,
            privacy=self.privacy,
            overlay=tuple(_format_overlay(detector, self.stats, times, len(shown), known_age_ms, num_dropped)),
            track_ids=track_ids,
            counts=counts,
            count_events=count_events,
            lines=self.lines,
            zones=self.zones,
        )
        self.report_status()
        for sink in self.sinks:
            sink.write(result)

    def report_status(self) -> None:
        """Write the status of the camera to the sinks if it changed."""
        status = self.status
        if status == self._reported_status:
            return
        self.num_lost += status.startswith("camera lost") and not self._reported_status.startswith("camera lost")
        self._reported_status = status
        for sink in self.sinks:
            sink.write_status(self.name, status)


def run_cameras(
    pipelines: Sequence[CameraPipeline],
    detector: Detector,
    window: FrameWindow | None = None,
    max_frames: int | None = None,
    new_frame: Event | None = None,
    on_pass: Callable[[], object] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Process frames until all sources end, `max_frames` is reached, or the user closes the window.

    Args:
        pipelines: The cameras. `on_pass` may append cameras.
        detector: The detector.
        window: Window of the run. Recorded sources are then processed in real time at most.
        max_frames: Maximum number of frames of all cameras together. None for no limit.
        new_frame: Set by each camera that has a new frame, so that the loop does not wait for the next check.
        on_pass: Called after each pass over the cameras, at least ten times per second between slow frames.
        should_stop: Returns True to end the run. Called between two frames.

    Raises:
        HkdError: All cameras ended, and at least one with an error; or no camera could be opened.
    """
    new_frame = new_frame or Event()
    start_s, due_s = monotonic(), defaultdict[CameraPipeline, float](float)
    while active := [pipeline for pipeline in pipelines if not pipeline.is_ended]:
        new_frame.clear()
        had_frame, remaining = False, _count_remaining(pipelines, max_frames)
        for batch in _iterate_batches(active, due_s, detector.max_batch, remaining):
            _process_batch(detector, batch)
            had_frame = True
            if window:
                due_s |= {pipeline: start_s + frame.timestamp_s for pipeline, frame in batch if not _is_live(pipeline)}
            if should_stop():
                return
        if not any(pipeline.stats.num_frames for pipeline in pipelines):
            _check_any_opened(pipelines)
        for pipeline in active:
            pipeline.report_status()
        on_pass()
        if should_stop() or _count_remaining(pipelines, max_frames) == 0:
            return
        if window and not window.is_open(max(1, round(1e3 * _compute_wait_s(active, due_s)))):
            return
        if not had_frame and any(map(_is_live, active)):
            new_frame.wait(IDLE_INTERVAL_S)
    if window and all(pipeline.source.num_frames == 1 for pipeline in pipelines):
        while window.is_open(wait_ms=50) and not should_stop():  # keep images visible
            pass
    errors = [pipeline.error for pipeline in pipelines if pipeline.error]
    if errors:
        raise errors[0]


def _is_live(pipeline: CameraPipeline) -> bool:
    return pipeline.source.is_live


def _count_remaining(pipelines: Sequence[CameraPipeline], max_frames: int | None) -> int | None:
    """Return how many frames may still be processed. None for no limit."""
    return None if max_frames is None else max_frames - sum(pipeline.stats.num_frames for pipeline in pipelines)


def _iterate_batches(
    active: Sequence[CameraPipeline], due_s: dict[CameraPipeline, float], max_batch: int | None, remaining: int | None
) -> Iterator[list[tuple[CameraPipeline, Frame]]]:
    """Yield batches of at most one frame of each camera, at most `remaining` frames, each taken when it is needed."""
    max_batch = max_batch or len(active)
    batch: list[tuple[CameraPipeline, Frame]] = []
    num_taken = 0
    for pipeline in active:
        if num_taken == remaining:
            break
        frame = _take_due_frame(pipeline, due_s[pipeline])
        if frame is not None:
            batch.append((pipeline, frame))
            num_taken += 1
        if len(batch) == max_batch:
            yield batch
            batch = []
    if batch:
        yield batch


def _process_batch(detector: Detector, batch: Sequence[tuple[CameraPipeline, Frame]]) -> None:
    """Run the detector and write the results. An error, such as of a frame that is too large, ends its camera."""
    try:
        outputs = detector.predict_timed_batch([frame.image_rgb for _, frame in batch])
    except HkdError as error:
        if len(batch) == 1:
            batch[0][0].fail(error)
            return
        for item in batch:  # find the frame that fails
            _process_batch(detector, [item])
        return
    detected_s = monotonic()
    for (pipeline, frame), (found, times) in zip(batch, outputs, strict=True):
        try:
            pipeline.write(detector, frame, found, times, 1e3 * (detected_s - frame.timestamp_s))
        except HkdError as error:
            pipeline.fail(error)


def _compute_wait_s(active: Sequence[CameraPipeline], due_s: dict[CameraPipeline, float]) -> float:
    """Return the time until the next recorded frame is due, so that a fast machine shows a video in real time."""
    if any(pipeline.source.is_live for pipeline in active):
        return 0.0
    return min(IDLE_INTERVAL_S, max(0.0, min(due_s[pipeline] for pipeline in active) - monotonic()))


def _take_due_frame(pipeline: CameraPipeline, due_s: float) -> Frame | None:
    """Return a frame of a camera, or None if there is none or it is not due. An error ends the camera."""
    if due_s > monotonic():
        return None
    try:
        return pipeline.take_frame()
    except HkdError as error:
        pipeline.fail(error)
        return None


def _check_any_opened(pipelines: Sequence[CameraPipeline]) -> None:
    """Raise the error of the first camera if no camera could be opened and there is no other source."""
    errors = [pipeline.source.open_error for pipeline in pipelines if isinstance(pipeline.source, LiveSource)]
    if len(errors) == len(pipelines) and errors[0] is not None and None not in errors:
        count = f" None of {len(errors)} cameras can be opened." if len(errors) > 1 else ""
        raise UnavailableError(f"{errors[0]}{count}")


def _format_overlay(
    detector: Detector,
    stats: FrameStats,
    times: StageTimes,
    num_detections: int,
    age_ms: float | None,
    num_dropped: int,
) -> list[str]:
    metadata = detector.metadata
    lines = [
        f"{metadata.model}  {format_imgsz(metadata.imgsz_hw)}  {detector.backend} {detector.device}",
        f"{stats.recent_fps:.1f} fps   persons {num_detections}",
        f"{times.total_ms:.1f} ms = {times.preprocess_ms:.1f} pre + {times.inference_ms:.1f} inference"
        f" + {times.postprocess_ms:.1f} post",
    ]
    if age_ms is not None:
        lines.append(f"frame age {age_ms:.0f} ms   {num_dropped} dropped")
    return lines
