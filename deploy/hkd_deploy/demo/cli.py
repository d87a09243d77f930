"""Command `hkd-demo`: run an exported model on a video, images, a webcam or a network camera."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from time import monotonic, perf_counter
from types import TracebackType
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends import BACKENDS
from hkd_deploy.backends.base import DEFAULT_CONF, Detector, StageTimes
from hkd_deploy.demo.events import STDOUT, EventWriter, open_events
from hkd_deploy.demo.output import (
    IMAGE_OUTPUT_SUFFIXES,
    FrameStats,
    Window,
    open_image_writer,
    open_video_writer,
    open_window,
)
from hkd_deploy.pipeline import open_detector
from hkd_deploy.streams import Frame, FrameSource, is_live_address, open_source
from hkd_det import __version__
from hkd_det.config import check_range
from hkd_det.draw import REDACTIONS, Redaction, draw_detections, draw_overlay, redact_boxes
from hkd_det.errors import UsageError, run_command
from hkd_det.letterbox import format_imgsz
from hkd_det.shipped import DEFAULT_MODEL

MAX_REDACTION_CONF = 0.1  # boxes with this score are redacted even if they are not drawn: a missed person is worse
DEFAULT_OUTPUT_FPS = 25.0  # frame rate of a saved video if the source has none


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments. None for those of the process.

    Returns:
        The exit code.
    """
    return run_command("hkd-demo", _run_demo_command, argv)


def _run_demo_command(argv: Sequence[str] | None) -> int:
    flags = _parse_demo_arguments(argv)
    _silence_opencv()
    # SIGTERM and SIGHUP, which stop a service, complete the saved video like Ctrl-C.
    stop_signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # not on Windows
    previous_handlers = [signal.signal(number, signal.default_int_handler) for number in stop_signals]
    stats, num_dropped, mtime_ns = FrameStats(), 0, _get_mtime_ns(flags.save)
    try:
        with ExitStack() as stack:
            window = stack.enter_context(open_window("hkd-demo (q closes)")) if flags.show else None
            detector = stack.enter_context(
                open_detector(flags.model, flags.device, flags.threads, flags.backend, model_config=flags.model_config)
            )
            source = stack.enter_context(open_source(flags.source))
            output = open_output(stack, flags.save, source) if flags.save else None
            events = stack.enter_context(open_events(flags.events, source.name)) if flags.events else None
            conf = detector.default_conf if flags.conf is None else flags.conf
            stats = FrameStats()  # starts its clock after everything is open
            try:
                run_demo(detector, source, conf, stats, output, window, flags.max_frames, events, flags.privacy)
            finally:
                num_dropped = source.num_dropped
    except KeyboardInterrupt:
        if not is_live_address(flags.source):
            raise  # a camera has no other end
    finally:
        for number, handler in zip(stop_signals, previous_handlers, strict=True):
            signal.signal(number, handler)
        if stats.num_frames:
            text_output = sys.stderr if flags.events == STDOUT else sys.stdout
            print(stats.format_summary(num_dropped), file=text_output)
            if _get_mtime_ns(flags.save) != mtime_ns:
                print(f"saved {flags.save}", file=text_output)
    return 0


def _parse_demo_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hkd-demo",
        description="Run a detector on a video, images, a webcam or a network camera; show or save the result.",
        epilog="example: hkd-demo --source street.mp4 --save out.mp4",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "model",
        type=Path,
        nargs="?",
        help="file or directory written by hkd-export, an ONNX file of another tool, or the name of a shipped model "
        f"(default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--model-config",
        type=Path,
        metavar="YAML",
        help="configuration of an ONNX file that hkd-export did not write (default: MODEL.yaml next to MODEL.onnx)",
    )
    parser.add_argument(
        "--source", required=True, help="video, image, directory of images, webcam (0), rtsp:// or http:// URL"
    )
    parser.add_argument(
        "--conf",
        type=float,
        help="minimum score of drawn boxes, 0 to 1 (default: the value that the model file suggests, "
        f"otherwise {DEFAULT_CONF})",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default: %(default)s)")
    parser.add_argument("--backend", help=f"{', '.join(BACKENDS)} (default: by file type)")
    parser.add_argument("--threads", type=int, help="number of CPU threads (default: one per physical core)")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="output video .mp4, .avi or .webm; .png or .jpg for one image"
    )
    parser.add_argument(
        "--show",
        action=argparse.BooleanOptionalAction,
        help="show a window (default: unless --save or --events is set)",
    )
    parser.add_argument("--headless", dest="show", action="store_false", help="alias of --no-show")
    parser.add_argument(
        "--events",
        metavar="FILE",
        help="write the detections of each frame as a line of JSON to FILE, or to stdout with -",
    )
    parser.add_argument(
        "--privacy",
        choices=REDACTIONS,
        help="blur, pixelate or fill people in everything that is shown or saved",
    )
    parser.add_argument("--max-frames", type=int, metavar="N", help="stop after N frames (default: no limit)")
    flags = parser.parse_args(argv)
    if flags.conf is not None:
        check_range("--conf", flags.conf, 0, 1)
    if flags.max_frames is not None:
        check_range("--max-frames", flags.max_frames, 1)
    if flags.show is None:
        flags.show = flags.save is None and flags.events is None
    return flags


def _get_mtime_ns(path: Path | None) -> int | None:
    """Return the modification time of a file, or None. It changes if this run writes the file."""
    return path.stat().st_mtime_ns if path and path.exists() else None


def _silence_opencv() -> None:
    """Turn off the logs of OpenCV and its FFmpeg. Errors are raised as exceptions."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # the only setting that FFmpeg inside OpenCV reads
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class ProgressLine:
    """Progress on one line of stderr. (tqdm is not installed on a device that only runs a model.)

    Args:
        name: Name of the source.
        num_frames: Total number of frames. None if unknown.
    """

    def __init__(self, name: str, num_frames: int | None) -> None:
        self._name = name
        self._total = "" if num_frames is None else f"/{num_frames}"
        self._interval_s = 0.1 if sys.stderr.isatty() else 10.0
        self._text = self._status = ""
        self._printed_s = -self._interval_s

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._text:
            self._print(end="\n")

    def update(self, stats: FrameStats, num_dropped: int = 0, status: str = "") -> None:
        """Set the state and print it, at most ten times per second in a terminal.

        Args:
            stats: Statistics of the run.
            num_dropped: Number of dropped frames of a live source.
            status: Text at the end of the line. A change is printed immediately.
        """
        width = len(self._text)
        parts = [f"{stats.num_frames}{self._total} frames", f"{stats.recent_fps:.1f} fps"]
        parts += [f"{num_dropped} dropped"] * (num_dropped > 0) + [status] * bool(status)
        self._text = f"{self._name}: {', '.join(parts)}".ljust(width)  # overwrite the previous text
        if status != self._status or perf_counter() - self._printed_s >= self._interval_s:
            self._status, self._printed_s = status, perf_counter()
            self._print(end="")

    def _print(self, end: str) -> None:
        print(f"\r{self._text}", end=end, file=sys.stderr, flush=True)


class FrameWriter(Protocol):
    """A video or an image that is written."""

    def write(self, image_rgb: NDArray[np.uint8], captured_s: float | None = None) -> None:
        """Append a frame.

        Args:
            image_rgb (uint8[H, W, 3]): RGB.
            captured_s: Capture time of a live source or position in a recorded one, seconds.
        """


def save_video(
    model: Path | str,
    source: str,
    path: Path | str,
    conf: float | None = None,
    device: str = "cpu",
    max_frames: int | None = None,
) -> FrameStats:
    """Run a model on a source and save the result, as `hkd-demo MODEL --source SOURCE --save PATH` does.

    Args:
        model: File or directory written by `hkd-export`.
        source: Image source, as for `open_source`.
        path: Video to write, or image if the source is one image.
        conf: Minimum score of drawn boxes, 0 to 1. None for `Detector.default_conf`.
        device: cpu, cuda or cuda:N.
        max_frames: Maximum number of frames. None for no limit.

    Returns:
        Statistics of the run.
    """
    stats = FrameStats()
    with ExitStack() as stack:
        detector = stack.enter_context(open_detector(model, device))
        frame_source = stack.enter_context(open_source(source))
        output = open_output(stack, Path(path), frame_source)
        min_score = detector.default_conf if conf is None else conf
        run_demo(detector, frame_source, min_score, stats, output=output, max_frames=max_frames)
    return stats


def open_output(stack: ExitStack, path: Path, source: FrameSource) -> FrameWriter:
    """Open the file of `--save`: an image if the source is one image, otherwise a video.

    Args:
        stack: Exit stack that closes the file.
        path: The file.
        source: The opened source.

    Returns:
        The writer.

    Raises:
        UsageError: The suffix is not supported, or the file is the source itself.
    """
    if path.exists() and Path(source.name).exists() and path.samefile(source.name):
        raise UsageError(f"--save {path}: this file is the source. Choose another name.")
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
    events: EventWriter | None = None,
    privacy: Redaction | None = None,
) -> None:
    """Process frames until the source ends, `max_frames` is reached or the user closes the window.

    Args:
        detector: The detector.
        source: The image source.
        conf: Minimum score of drawn boxes, 0 to 1.
        stats: Filled during the run, so it is valid after Ctrl-C too.
        output: File for the drawn frames.
        window: Window for the drawn frames.
        max_frames: Maximum number of frames. None for no limit.
        events: Writer of the detections.
        privacy: How people are made unrecognizable in `output` and `window`. None shows them.
    """
    total = min(filter(None, (source.num_frames, max_frames)), default=None)
    canvas: NDArray[np.uint8] | None = None
    with ProgressLine(source.name, total) as progress:

        def handle_idle() -> bool:
            """Show the status of a live source without a frame. Return False after the window is closed."""
            progress.update(stats, source.num_dropped, source.status)
            if events:
                events.write_status(source.status)
            return window is None or _update_idle_window(window, canvas, source.status)

        start_s = monotonic()
        for frame in islice(source.iterate_frames(handle_idle), max_frames):
            detections, times = detector.predict_timed(frame.image_rgb)
            age_ms = 1e3 * (monotonic() - frame.timestamp_s) if source.is_live else None
            stats.add(times, age_ms)
            drawn = detections.filter(conf)
            if events:
                events.write_status(source.status)
                position_s = None if source.is_live else frame.timestamp_s
                events.write_frame(stats.num_frames - 1, frame.image_rgb.shape[:2], drawn, position_s, age_ms)
            if output or window:
                image_rgb = frame.image_rgb
                if privacy:
                    redacted = detections.filter(min(conf, MAX_REDACTION_CONF))
                    image_rgb = redact_boxes(image_rgb, redacted.boxes_xyxy, privacy)
                canvas = draw_detections(image_rgb, drawn)
                draw_overlay(canvas, _format_overlay(detector, stats, times, len(drawn), age_ms, source.num_dropped))
                if output:
                    output.write(canvas, frame.timestamp_s)
                if window:
                    window.show(canvas)
            progress.update(stats, source.num_dropped, source.status)
            if window and not window.is_open(_compute_wait_ms(source, frame, start_s)):
                return
    if window and source.num_frames == 1:
        while window.is_open(wait_ms=50):  # keep a single image visible
            pass


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


def _compute_wait_ms(source: FrameSource, frame: Frame, start_s: float) -> int:
    """Return the time until a recorded frame is due, so that a fast machine shows a video in real time."""
    if source.is_live:
        return 1
    return max(1, round(1e3 * (start_s + frame.timestamp_s - monotonic())))


def _update_idle_window(window: Window, last_canvas: NDArray[np.uint8] | None, status: str) -> bool:
    """Process window events. If the camera is lost, darken the last image and show the status."""
    if status and last_canvas is not None:
        dark_canvas = last_canvas // 3
        draw_overlay(dark_canvas, [], warning=status)
        window.show(dark_canvas)
    return window.is_open()
