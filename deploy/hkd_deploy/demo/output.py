"""Outputs of the demo: a video file, an image file, a window, and the frame statistics."""

import os
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends.base import StageTimes
from hkd_deploy.streams.sources import limit_gap
from hkd_det.errors import DataError, HkdError, UnavailableError, UsageError
from hkd_det.files import atomic_write
from hkd_det.letterbox import Letterbox

# Encoders in the pip wheels of OpenCV, which have no H.264. Browsers play only .webm.
ENCODERS = {".mp4": "mp4v", ".avi": "MJPG", ".webm": "VP80"}
IMAGE_OUTPUT_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
MAX_FRAMES_AHEAD = 1  # frames that the video may be ahead of the source; a frame that is earlier is omitted
CLOSE_KEYS = (ord("q"), ord("Q"), 27)  # 27: Esc
FPS_WINDOW = 30  # number of frames of the displayed rate
MAX_SAMPLES = 100_000  # number of frames of the summary; bounds the memory for an unlimited source
PERCENTILES = (50, 90, 99)


class VideoWriter:
    """A video file. The first frame determines its size; other sizes are letterboxed.

    Args:
        path: The file. Its suffix determines the encoder.
        fps: Frames per second.

    Attributes:
        num_frames: Number of written frames.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self._path = path
        self._fps = fps
        self._size_hw = (0, 0)
        self._time_s = 0.0
        self._last_captured_s: float | None = None
        self._last_bgr = np.zeros((0, 0, 3), np.uint8)
        self._writer: cv2.VideoWriter | None = None
        self.num_frames = 0

    def write(self, image_rgb: NDArray[np.uint8], captured_s: float | None = None) -> None:
        """Append a frame.

        Args:
            image_rgb (uint8[H, W, 3]): RGB.
            captured_s: Capture time of a live source or position in a video, seconds. The previous frame is repeated
                until the video reaches this time, so that the video has the times of the source. None writes the frame
                once.

        Raises:
            DataError: OpenCV cannot write a video of this size.
        """
        size_hw = (image_rgb.shape[0], image_rgb.shape[1])
        if self._writer is None:
            self._writer = self._open(size_hw)
            self._size_hw = size_hw
        if size_hw != self._size_hw:
            image_rgb = Letterbox(size_hw, self._size_hw).apply(image_rgb)
        image_bgr = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR)
        num_ahead = 0
        if captured_s is not None:
            position = self._compute_position(captured_s)
            for _ in range(position - self.num_frames):
                self._append(self._last_bgr)
            num_ahead = self.num_frames - position
        if num_ahead <= MAX_FRAMES_AHEAD:
            self._append(image_bgr)
        self._last_bgr = image_bgr

    def close(self) -> None:
        """Complete the file."""
        if self._writer is not None:
            self._writer.release()

    def _open(self, size_hw: tuple[int, int]) -> cv2.VideoWriter:
        encoder = cv2.VideoWriter.fourcc(*ENCODERS[self._path.suffix.lower()])
        writer = cv2.VideoWriter(str(self._path), cv2.CAP_FFMPEG, encoder, self._fps, size_hw[::-1])
        if not writer.isOpened():
            description = f"{size_hw[1]}x{size_hw[0]} at {self._fps:g} fps"
            raise DataError(
                f"{self._path.name}: OpenCV cannot write a {self._path.suffix} video of {description}. "
                "Choose another suffix or size."
            )
        return writer

    def _append(self, image_bgr: NDArray[np.uint8]) -> None:
        if self._writer is not None:
            self._writer.write(image_bgr)
            self.num_frames += 1

    def _compute_position(self, captured_s: float) -> int:
        """Return the index of the frame at `captured_s`."""
        if self._last_captured_s is not None:
            self._time_s += limit_gap(captured_s - self._last_captured_s, 1 / self._fps)
        self._last_captured_s = captured_s
        return round(self._time_s * self._fps)


@contextmanager
def open_video_writer(path: Path, fps: float) -> Iterator[VideoWriter]:
    """Open a video file for writing. The file appears under its name when it is complete.

    After Ctrl-C or an error of the source, the frames so far are kept and the exception is raised again.

    Args:
        path: The file: .mp4, .avi or .webm.
        fps: Frames per second.

    Yields:
        The writer.

    Raises:
        UsageError: The suffix is not supported.
        DataError: There was no frame, or the disk is full.
    """
    check_video_suffix(path)
    interruption: BaseException | None = None
    with atomic_write(path) as temp_path:
        writer = VideoWriter(temp_path, fps)
        try:
            yield writer
        except (KeyboardInterrupt, HkdError) as error:
            if writer.num_frames == 0:
                raise
            interruption = error
        finally:
            writer.close()
        _check_video_file(temp_path, path, writer.num_frames)
    if interruption is not None:
        raise interruption


def check_video_suffix(path: Path) -> None:
    """Check the suffix of a video.

    Args:
        path: The file.

    Raises:
        UsageError: There is no encoder for the suffix.
    """
    if path.suffix.lower() not in ENCODERS:
        raise UsageError(f"--save {path}: expected a file ending in {', '.join(ENCODERS)}.")


def _check_video_file(temp_path: Path, path: Path, num_frames: int) -> None:
    """Read back the frame count: OpenCV reports no error if the disk is full."""
    if num_frames == 0:
        raise DataError(f"{path}: not written: the source returned no frame. Check --source.")
    reader = cv2.VideoCapture(str(temp_path), cv2.CAP_FFMPEG)
    count = reader.get(cv2.CAP_PROP_FRAME_COUNT) if reader.isOpened() else 0
    is_readable = reader.isOpened() and reader.read()[0]
    reader.release()
    if not is_readable or count < 0.99 * num_frames - 1:  # tolerance: .webm stores a duration instead of a count
        raise DataError(f"{path}: the video is incomplete. Check the free disk space.")


class ImageWriter:
    """An image file.

    Args:
        path: The file: .png or .jpg.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, image_rgb: NDArray[np.uint8], captured_s: float | None = None) -> None:  # noqa: ARG002 - FrameWriter
        """Write the image.

        Args:
            image_rgb (uint8[H, W, 3]): RGB.
            captured_s: No effect.

        Raises:
            DataError: OpenCV cannot write the file.
        """
        if not cv2.imwrite(str(self._path), cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR)):
            raise DataError(f"{self._path.name}: OpenCV cannot write the image. Check the free disk space.")


@contextmanager
def open_image_writer(path: Path) -> Iterator[ImageWriter]:
    """Open an image file for writing. The file appears under its name when it is complete.

    Args:
        path: The file: .png or .jpg.

    Yields:
        The writer.
    """
    with atomic_write(path) as temp_path:
        yield ImageWriter(temp_path)


class Window:
    """A window. The user closes it with q, Esc or its close button.

    Args:
        title: Title of the window.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._has_image = False

    def show(self, image_rgb: NDArray[np.uint8]) -> None:
        """Show an image.

        Args:
            image_rgb (uint8[H, W, 3]): RGB.
        """
        cv2.imshow(self._title, cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))
        self._has_image = True

    def is_open(self, wait_ms: int = 1) -> bool:
        """Process window events and return whether the window is open.

        Args:
            wait_ms: Time for events, at least 1 ms.

        Returns:
            False after the user closed the window.
        """
        if cv2.waitKey(max(1, wait_ms)) & 0xFF in CLOSE_KEYS:
            return False
        # Some window systems report a window as invisible before its first image.
        return not self._has_image or cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) >= 1


@contextmanager
def open_window(title: str) -> Iterator[Window]:
    """Open a window.

    Args:
        title: Title of the window.

    Yields:
        The window.

    Raises:
        UnavailableError: OpenCV or the machine does not support windows.
    """
    reason = explain_missing_display(cv2.getBuildInformation(), sys.platform, os.environ)
    if reason:
        raise UnavailableError(reason)
    try:
        cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
    except cv2.error as error:
        raise UnavailableError(
            f"--show: {str(error).strip()}. Open a page in a browser (--web) or save a video (--save out.mp4)."
        ) from None
    try:
        yield Window(title)
    finally:
        cv2.destroyAllWindows()


def explain_missing_display(build_information: str, platform: str, environment: Mapping[str, str]) -> str:
    """Explain why a window cannot be opened.

    The check runs before the window opens, because Qt inside OpenCV aborts the process if there is no display.

    Args:
        build_information: Result of `cv2.getBuildInformation()`.
        platform: Value of `sys.platform`.
        environment: Environment variables.

    Returns:
        The reason with a remedy. Empty if a window can be opened.
    """
    if re.search(r"^\s*GUI:\s*NONE\s*$", build_information, re.MULTILINE):
        return (
            "--show: this OpenCV build does not support windows. Open a page in a browser (--web), save a video "
            "(--save out.mp4), write events (--events -), or run pip uninstall -y opencv-python-headless && "
            "pip install opencv-python."
        )
    if platform.startswith("linux") and not (environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY")):
        return "--show: no display (DISPLAY is not set). Use a page (--web) or save a video (--save out.mp4)."
    return ""


class FrameStats:
    """Number of frames and time of each stage.

    Attributes:
        num_frames: Number of frames so far.
    """

    def __init__(self) -> None:
        # Stages and age of the newest frames, a ring of 16 bytes per frame. Pages are allocated when they are written.
        self._samples = np.empty((MAX_SAMPLES, 4), np.float32)
        self._ticks_s = deque([perf_counter()], maxlen=FPS_WINDOW + 1)
        self._start_s = self._ticks_s[0]
        self.num_frames = 0

    def add(self, times: StageTimes, age_ms: float | None) -> None:
        """Record one frame.

        Args:
            times: Time of each stage.
            age_ms: Time from capture to detections, ms. None for a recorded source.
        """
        row = (times.preprocess_ms, times.inference_ms, times.postprocess_ms, np.nan if age_ms is None else age_ms)
        self._samples[self.num_frames % MAX_SAMPLES] = row
        self.num_frames += 1
        self._ticks_s.append(perf_counter())

    @property
    def recent_fps(self) -> float:
        """Frames per second over the last 30 frames, including reading, drawing and saving."""
        span_s = self._ticks_s[-1] - self._ticks_s[0]
        return (len(self._ticks_s) - 1) / span_s if span_s > 0 else 0.0

    @property
    def mean_fps(self) -> float:
        """Frames per second over all frames, including reading, drawing and saving."""
        span_s = self._ticks_s[-1] - self._start_s
        return self.num_frames / span_s if span_s > 0 else 0.0

    def compute_latencies(self) -> list[float]:
        """Compute the 50th, 90th and 99th percentile of the age of frames, or of the total time without ages, in ms.

        Returns:
            Three times in ms; empty without frames.
        """
        stages_ms, ages_ms = self._get_samples()
        values = ages_ms if len(ages_ms) else stages_ms.sum(axis=1)
        return [float(value) for value in np.percentile(values, PERCENTILES)] if len(values) else []

    def format_summary(self, num_dropped: int) -> str:
        """Format frame count, rate and a table of stage percentiles.

        Args:
            num_dropped: Number of dropped frames of a live source.

        Returns:
            The text, times in milliseconds.
        """
        if not self.num_frames:
            return "no frames"
        stages_ms, ages_ms = self._get_samples()
        rows = dict(zip(("preprocess", "inference", "postprocess"), stages_ms.T, strict=True))
        rows["total"] = stages_ms.sum(axis=1)
        if len(ages_ms):
            rows["since capture"] = ages_ms
        dropped = f", {num_dropped} dropped" if num_dropped else ""
        lines = [
            f"{self.num_frames} frames{dropped}, {self.mean_fps:.1f} fps including reading and drawing",
            f"{'milliseconds':<16}" + "".join(f"{f'p{percent}':>9}" for percent in PERCENTILES),
        ]
        for name, values in rows.items():
            lines.append(f"{name:<16}" + "".join(f"{value:9.2f}" for value in np.percentile(values, PERCENTILES)))
        return "\n".join(lines)

    def _get_samples(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the times of the stages (float32[N, 3]) and the ages of the frames that have one (float32[M]), ms."""
        samples = self._samples[: self.num_frames]
        return samples[:, :3], samples[~np.isnan(samples[:, 3]), 3]
