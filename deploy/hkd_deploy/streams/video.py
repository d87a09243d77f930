"""Video files: all frames with their times in the file.

The times come from the container, because phones, screen recorders, browsers and network recorders write variable frame
rates. The frame count of many containers is an estimate (duration times rate), so a video counts as damaged only if
the file is shorter than its container states, or if stored frames cannot be decoded.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from hkd_deploy.streams.base import Frame, FrameSource, limit_gap, sanitize_fps, wait_forever
from hkd_deploy.streams.containers import AVI, MP4, has_hidden_frames, identify_container, measure_intact_ratio
from hkd_det.errors import DataError

DEFAULT_FPS = 25.0  # for a video without times and without a frame rate
MAX_VARIABLE_FPS = 60.0  # display rate of a video with a variable rate
NUM_SCANNED_FRAMES = 3000  # stored frames whose times determine the frame rate
CONSTANT_RATIO = 0.9  # part of the intervals that agree with a constant rate
INTERVAL_TOLERANCE_S = 0.0015  # containers round times to milliseconds
MAX_MISSING_RATIO = 0.05
MAX_HIDDEN_S = 1.0  # the edit list of a trimmed MP4 hides the frames between a key frame and the start
CODEC_NAMES = {"av01": "AV1", "hevc": "H.265", "hvc1": "H.265", "hev1": "H.265", "vvc1": "H.266", "avc1": "H.264"}


class VideoSource(FrameSource):
    """A video file.

    Args:
        path: The video.

    Raises:
        DataError: OpenCV cannot read the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            raise DataError(f"{path}: not a readable video (wrong format or truncated). Try to play it with ffplay.")
        self._container = identify_container(path)
        stated_fps = self._capture.get(cv2.CAP_PROP_FPS)
        times_s = [] if self._container == AVI else list(islice(_iterate_stored_times(path), NUM_SCANNED_FRAMES + 1))
        self._stated_count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        num_frames = len(times_s) if 0 < len(times_s) <= NUM_SCANNED_FRAMES else self._stated_count
        fps = estimate_fps(times_s[:NUM_SCANNED_FRAMES], stated_fps)
        super().__init__(str(path), is_live=False, fps=fps, num_frames=num_frames or None)

    def iterate_frames(self, on_idle: Callable[[], bool] = wait_forever) -> Iterator[Frame]:  # noqa: ARG002 - not live
        """Iterate over the frames.

        Args:
            on_idle: No effect.

        Yields:
            The frames, with their position in the video as timestamp. Long gaps are shortened by `limit_gap`.

        Raises:
            DataError: The file is truncated, more than 5 % of its frames cannot be decoded, or there is no frame.
        """
        step_s = 1 / (self.fps or DEFAULT_FPS)
        index, position_s, timestamp_s = 0, 0.0, 0.0
        while True:
            has_frame, image_bgr = self._capture.read()
            if not has_frame:
                break
            previous_s, position_s = position_s, self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
            if self._container == AVI:  # a constant rate; OpenCV reports wrong times of B-frames
                timestamp_s = index * step_s
            elif index:
                timestamp_s += limit_gap(position_s - previous_s, step_s)
            yield Frame(cv2.cvtColor(image_bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False), timestamp_s)
            index += 1
        self._check_complete(index)

    def close(self) -> None:
        """Close the file."""
        self._capture.release()

    def _check_complete(self, num_decoded: int) -> None:
        if num_decoded == 0:
            codec = _format_codec(self._capture)
            raise DataError(
                f"{self.name}: no frame can be decoded. The codec is {codec}, which OpenCV {cv2.__version__} may not "
                f"support. Convert the video: ffmpeg -i {self._path.name} -c:v libx264 out.mp4."
            )
        if self._stated_count and num_decoded >= self._stated_count * (1 - MAX_MISSING_RATIO):
            return
        num_expected = self._stated_count
        if self._container != MP4 or has_hidden_frames(self._path):  # the stated count is an estimate
            num_expected = sum(1 for _ in _iterate_stored_times(self._path))
        max_missing = num_expected * MAX_MISSING_RATIO
        if self._container == MP4 and num_expected != self._stated_count:
            max_missing = max(max_missing, MAX_HIDDEN_S * (self.fps or DEFAULT_FPS))
        is_undecodable = num_expected - num_decoded > max_missing
        if is_undecodable or measure_intact_ratio(self._path) < 1 - MAX_MISSING_RATIO:
            expected = max(self._stated_count, num_expected)
            frames = f"{num_decoded} of {expected}" if expected > num_decoded else f"{num_decoded}"
            raise DataError(f"{self.name}: truncated or damaged after {frames} frames. Copy the video again.")


def estimate_fps(times_s: Sequence[float], stated_fps: float) -> float | None:
    """Estimate the frame rate of a video.

    Args:
        times_s: Times of stored frames in any order, seconds. Can be empty.
        stated_fps: Frame rate that the container states: the rate, its mean, or the clock of the times.

    Returns:
        The stated rate if the times agree with it. Otherwise the rate of the shortest intervals, at most 60. None if
        unknown.
    """
    fps = sanitize_fps(stated_fps)
    intervals = np.diff(np.unique(np.array(times_s)))
    if len(intervals) < 2:
        return fps
    if fps:
        tolerance_s = max(INTERVAL_TOLERANCE_S, 0.1 / fps)
        if np.mean(np.abs(intervals - 1 / fps) <= tolerance_s) >= CONSTANT_RATIO:
            return fps
    return round(min(MAX_VARIABLE_FPS, 1 / float(np.percentile(intervals, 10))), 2)


def _iterate_stored_times(path: Path) -> Iterator[float]:
    """Yield the time of each stored frame in seconds, in the order of the file, without decoding."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        if path.is_file() and capture.set(cv2.CAP_PROP_FORMAT, -1):  # -1: return encoded frames
            while capture.grab():
                yield capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
    finally:
        capture.release()


def _format_codec(capture: cv2.VideoCapture) -> str:
    code = int(capture.get(cv2.CAP_PROP_FOURCC)) & 0xFFFFFFFF
    text = code.to_bytes(4, "little").decode("latin-1")
    return CODEC_NAMES.get(text.lower(), text if text.isprintable() else f"0x{code:08x}")
