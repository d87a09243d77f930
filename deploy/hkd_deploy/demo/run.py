"""`Tally`: what a run of the demo has measured so far.

The demo's body: each frame through the detector, drawn, shown and saved.
"""

from collections import deque
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from time import monotonic, perf_counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hkd_deploy.demo.output import IMAGE_OUTPUT_SUFFIXES, Window, open_image_writer, open_video_writer
from hkd_deploy.draw import draw_detections, draw_overlay
from hkd_deploy.pipeline import Detector, StageTimes, open_detector
from hkd_deploy.streams import Frame, FrameSource, open_source
from hkd_det.errors import UsageError
from hkd_det.letterbox import format_imgsz

FPS_WINDOW = 30  # frames the shown rate is taken over


MAX_SAMPLES = 100_000  # frames the summary is taken over, the last ones: a camera never ends, memory does


PERCENTILES = (50, 90, 99)


class FrameStats:
    """Counts `frames` and keeps the times of each."""

    def __init__(self) -> None:
        self._times: deque[StageTimes] = deque(maxlen=MAX_SAMPLES)
        self._ages_ms: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._ticks_s = deque([perf_counter()], maxlen=FPS_WINDOW + 1)
        self._start_s = self._ticks_s[0]
        self.num_frames = 0

    def add(self, times: StageTimes, age_ms: float | None) -> None:
        """Record one frame; age_ms from its capture to its detections, None where no clock says."""
        self.num_frames += 1
        self._times.append(times)
        if age_ms is not None:
            self._ages_ms.append(age_ms)
        self._ticks_s.append(perf_counter())

    @property
    def recent_fps(self) -> float:
        """Frames a second over the last 30 frames: reading, drawing and saving included."""
        span_s = self._ticks_s[-1] - self._ticks_s[0]
        return (len(self._ticks_s) - 1) / span_s if span_s > 0 else 0.0

    @property
    def mean_fps(self) -> float:
        """Frames a second from start to the last frame: reading, drawing and saving included."""
        span_s = self._ticks_s[-1] - self._start_s
        return self.num_frames / span_s if span_s > 0 else 0.0

    def summary(self, num_dropped: int) -> str:
        """Frames, rate and a table of stage percentiles in milliseconds, to be printed."""
        if not self._times:
            return "no frames"
        rows = {
            "preprocess": [times.preprocess_ms for times in self._times],
            "inference": [times.inference_ms for times in self._times],
            "postprocess": [times.postprocess_ms for times in self._times],
            "frame to boxes": [times.total_ms for times in self._times],
        }
        if self._ages_ms:
            rows["camera to boxes"] = list(self._ages_ms)
        drops = f", {num_dropped} dropped" if num_dropped else ""
        lines = [
            f"{self.num_frames} frames{drops}, {self.mean_fps:.1f} a second with reading and drawing",
            f"{'milliseconds':<16}" + "".join(f"{f'p{percent}':>9}" for percent in PERCENTILES),
        ]
        for name, values in rows.items():
            lines.append(f"{name:<16}" + "".join(f"{value:9.2f}" for value in np.percentile(values, PERCENTILES)))
        return "\n".join(lines)


DEFAULT_OUTPUT_FPS = 25.0  # of a film whose source does not say


class FrameWriter(Protocol):
    """A film or a picture that is being written."""

    def write(self, image_rgb: NDArray[np.uint8], captured_s: float | None = None) -> None:
        """Append uint8 RGB (H, W, 3), captured at `captured_s` if its source is live."""


def save_video(
    model: Path | str, source: str, path: Path | str, conf: float, device: str = "cpu", max_frames: int | None = None
) -> FrameStats:
    """Run a model over a source and save what it sees, as `hkd-demo MODEL --source ... --save PATH` does."""
    tally = FrameStats()
    with ExitStack() as stack:
        detector = stack.enter_context(open_detector(model, device))
        frames = stack.enter_context(open_source(source))
        output = open_output(stack, Path(path), frames)
        run_demo(detector, frames, conf, tally, output=output, max_frames=max_frames)
    return tally


def open_output(stack: ExitStack, path: Path, source: FrameSource) -> FrameWriter:
    """Open what --save asks for: a film, or a picture if the source is one."""
    if path.exists() and Path(source.name).exists() and path.samefile(source.name):
        raise UsageError(f"--save {path}: this is the source itself; choose another name")
    if path.suffix.lower() in IMAGE_OUTPUT_SUFFIXES and source.num_frames == 1:
        return stack.enter_context(open_image_writer(path))
    return stack.enter_context(open_video_writer(path, source.fps or DEFAULT_OUTPUT_FPS))


def run_demo(
    detector: Detector,
    source: FrameSource,
    conf: float,
    stats: FrameStats,
    output: FrameWriter | None = None,
    window: Window | None = None,
    max_frames: int | None = None,
) -> None:
    """Detect in every frame until the source ends, `max_frames` are done or the window is closed.

    conf: the least score that is drawn, 0..1. `tally` is filled as it goes, so that it holds what was
    measured when Ctrl-C ends the run.
    """
    total = min(filter(None, (source.num_frames, max_frames)), default=None)
    canvas: NDArray[np.uint8] | None = None
    with tqdm(total=total, unit=" frames", desc=source.name) as bar:

        def waiting() -> bool:
            """While a live source has no frame: say so, and keep the window alive."""
            bar.set_postfix_str(source.status)
            return window is None or _update_idle_window(window, canvas, source.status)

        start_s = monotonic()
        for frame in islice(source.iterate_frames(waiting), max_frames):
            detections, times = detector.predict_timed(frame.image_rgb)
            age_ms = 1e3 * (monotonic() - frame.timestamp_s) if source.is_live else None
            stats.add(times, age_ms)
            if output or window:
                people = detections.filter(conf)
                canvas = draw_detections(frame.image_rgb, people)
                draw_overlay(canvas, _format_overlay(detector, stats, times, len(people), age_ms, source.num_dropped))
                if output:
                    output.write(canvas, frame.timestamp_s if source.is_live else None)
                if window:
                    window.show(canvas)
            bar.update()
            bar.set_postfix_str(f"{source.num_dropped} dropped" if source.is_live else "", refresh=False)
            if window and not window.is_open(_compute_wait_ms(source, frame, start_s)):
                return
    if window and source.num_frames == 1:
        while window.is_open(wait_ms=50):  # a single picture is there to be looked at
            pass


def _format_overlay(
    detector: Detector,
    stats: FrameStats,
    times: StageTimes,
    num_detections: int,
    age_ms: float | None,
    num_dropped: int,
) -> list[str]:
    """The panel's lines."""
    manifest = detector.metadata
    lines = [
        f"{manifest.model}  {format_imgsz(manifest.imgsz_hw)}  {detector.backend} {detector.device}",
        f"{stats.recent_fps:.1f} fps   people {num_detections}",
        f"{times.total_ms:.1f} ms = {times.preprocess_ms:.1f} pre + {times.inference_ms:.1f} net"
        f" + {times.postprocess_ms:.1f} post",
    ]
    if age_ms is not None:
        lines.append(f"frame age {age_ms:.0f} ms   {num_dropped} dropped")
    return lines


def _compute_wait_ms(source: FrameSource, frame: Frame, start_s: float) -> int:
    """Until a recorded frame's time has come, so that a fast machine does not show people running."""
    if source.is_live:
        return 1
    return max(1, round(1e3 * (start_s + frame.timestamp_s - monotonic())))


def _update_idle_window(window: Window, last_canvas: NDArray[np.uint8] | None, status: str) -> bool:
    """Keep a window alive; in trouble the last picture goes dark under the reason, so that nobody takes it for now."""
    if status and last_canvas is not None:
        dark = last_canvas // 3
        draw_overlay(dark, [], warning=status)
        window.show(dark)
    return window.is_open()
