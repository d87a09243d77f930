"""Collection of images for training: `hkd-demo --collect DIR`.

Per camera, the time is divided into equal intervals, as many per hour as images are allowed. Each interval saves at
most one image: the most uncertain one, otherwise the one that differs most from the saved images. The uncertainty of
an image is the sum over its detections, which selected best in Brust et al. 2019 (Active Learning for Deep Object
Detection). Images are encoded and written by a thread. `hkd-train --unlabeled DIR` reads the directory.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_deploy.demo.base import FrameResult
from hkd_deploy.demo.camera_recorder import MIN_FREE_BYTES, make_segment_path
from hkd_deploy.demo.cameras import make_slugs
from hkd_deploy.demo.delivery import Report
from hkd_deploy.drift import MIN_SCORE
from hkd_det.config import check_range
from hkd_det.errors import UsageError
from hkd_det.files import atomic_write

DEFAULT_PER_HOUR, DEFAULT_MAX_IMAGES = 60, 10_000
INDEX_NAME, INDEX_VERSION = "frames.jsonl", 1
UNCERTAIN_MARGIN = 0.15  # a score this far from the threshold or farther is certain
CANDIDATES_PER_INTERVAL = 30  # frames that are examined, so that a high frame rate costs no more
THUMBNAIL_WH, MAX_THUMBNAILS = (32, 18), 500
MIN_DISTANCE, DIVERSE_DISTANCE = 1.0, 8.0  # gray levels: a near-duplicate is below, a new scene above
JPEG_QUALITY = 95
QUEUE_SIZE, CLOSE_TIMEOUT_S, HOUR_S = 8, 1.0, 3600.0


@dataclass(frozen=True)
class CollectConfig:
    """What is collected.

    Attributes:
        directory: Directory. Each camera has a subdirectory.
        per_hour: Maximum number of images per hour and camera.
        max_images: Maximum number of images in the directory.
    """

    directory: Path
    per_hour: int = DEFAULT_PER_HOUR
    max_images: int = DEFAULT_MAX_IMAGES


@dataclass(frozen=True)
class Candidate:
    """A frame that may be saved.

    Attributes:
        result: The frame.
        utc_s: Capture time of a live source, otherwise time of processing, seconds since 1970.
        thumbnail (float32[18, 32]): Gray levels, 0 to 255.
        uncertainty: Sum over detections of 1 at the threshold, falling to 0 at `UNCERTAIN_MARGIN` from it.
        distance: Mean difference from the most similar saved image, gray levels. None for the first image.
    """

    result: FrameResult
    utc_s: float
    thumbnail: NDArray[np.float32] = field(repr=False)
    uncertainty: float
    distance: float | None

    @property
    def reasons(self) -> list[str]:
        """Reasons to save it: `uncertain`, `diverse`. Empty for a frame that is not worth it."""
        distance = np.inf if self.distance is None else self.distance
        is_new = distance >= MIN_DISTANCE
        names = ["uncertain"] if self.uncertainty > 0 and is_new else []
        return names + (["diverse"] if distance >= DIVERSE_DISTANCE else [])

    @property
    def rank(self) -> tuple[float, float]:
        """Key by which candidates are compared. The largest one is saved."""
        return self.uncertainty, np.inf if self.distance is None else self.distance


class FrameSelector:
    """Selects the frames of one camera.

    Args:
        per_hour: Maximum number of frames in any hour, at least 1.
    """

    def __init__(self, per_hour: int) -> None:
        self._interval_s = HOUR_S / per_hour
        self._selected_s: deque[float] = deque(maxlen=per_hour)
        self._thumbnails: deque[NDArray[np.float32]] = deque(maxlen=MAX_THUMBNAILS)
        self._best: Candidate | None = None
        self._end_s: float | None = None
        self._next_s = -np.inf

    def add(self, result: FrameResult) -> Candidate | None:
        """Examine a frame.

        Args:
            result: The frame.

        Returns:
            The best frame of the last interval, at its end. None if there is none.
        """
        now_s = result.timestamp_s
        selected = self.take_best() if self._end_s is not None and now_s >= self._end_s else None
        if self._end_s is None or now_s >= self._end_s:
            self._end_s = now_s + self._interval_s
        has_limit = len(self._selected_s) == self._selected_s.maxlen and now_s - self._selected_s[0] < HOUR_S
        if now_s >= self._next_s and not has_limit:
            self._next_s = now_s + self._interval_s / CANDIDATES_PER_INTERVAL
            candidate = self._examine(result)
            if candidate.reasons and (self._best is None or candidate.rank > self._best.rank):
                self._best = candidate
        return selected

    def take_best(self) -> Candidate | None:
        """End the interval and return its best frame. None if there is none."""
        best, self._best = self._best, None
        if best:
            self._selected_s.append(best.result.timestamp_s)
            self._thumbnails.append(best.thumbnail)
        return best

    def _examine(self, result: FrameResult) -> Candidate:
        thumbnail = compute_gray_levels(result.original_rgb)
        distance = None
        if self._thumbnails:
            distance = float(np.abs(np.stack(self._thumbnails) - thumbnail).mean((1, 2)).min())
        margins = np.abs(result.all_detections.scores.astype(np.float64) - result.conf)
        uncertainty = float(np.clip(1 - margins / UNCERTAIN_MARGIN, 0, None).sum())
        utc_s = time.time() - 1e-3 * (result.age_ms or 0.0)
        return Candidate(result, utc_s, thumbnail, uncertainty, distance)


def compute_gray_levels(image_rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Reduce an image to mean gray levels.

    Args:
        image_rgb (uint8[H, W, 3]): RGB.

    Returns:
        float32[18, 32]: 0 to 255.
    """
    gray = cv2.cvtColor(cv2.resize(image_rgb, THUMBNAIL_WH, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    return gray.astype(np.float32)


class Collector:
    """Saves selected frames of all cameras. It is a `FrameSink`.

    Args:
        config: What is collected.
        cameras: Names of the cameras.
        report: Called with one line when collection stops or continues.

    Attributes:
        num_saved: Number of images that this run saved.

    Raises:
        UsageError: Files cannot be created in the directory.
    """

    def __init__(self, config: CollectConfig, cameras: Sequence[str], report: Report) -> None:
        try:
            config.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=config.directory):
                pass
        except OSError as error:
            raise UsageError(f"--collect {config.directory}: {error.strerror}. Choose another directory.") from None
        self._config, self._report = config, report
        self._slugs: dict[str, str] = {}
        self._selectors: dict[str, FrameSelector] = {}
        for camera in cameras:
            self._add_camera(camera)
        self._num_images = self._count_images()
        self._problem, self._is_failing = "", False
        self.num_saved = 0
        self._queue: Queue[Candidate | None] = Queue(QUEUE_SIZE)
        self._thread = Thread(target=self._run, name="collect", daemon=True)
        self._thread.start()

    def write(self, result: FrameResult) -> None:
        """Examine a frame; see `FrameSink.write`."""
        if result.camera not in self._selectors:
            self._add_camera(result.camera)
        if selected := self._selectors[result.camera].add(result):
            self._enqueue(selected)

    def write_status(self, camera: str, status: str) -> None:
        """Do nothing: a lost camera has no frames."""

    def close(self) -> None:
        """Save the best frame of the current interval of each camera, at most for a second."""
        end_s = time.monotonic() + CLOSE_TIMEOUT_S
        items = [best for selector in self._selectors.values() if (best := selector.take_best())]
        for item in (*items, None):
            try:
                self._queue.put(item, timeout=max(0.0, end_s - time.monotonic()))
            except Full:
                return  # the disk hangs
        self._thread.join(max(0.0, end_s - time.monotonic()))

    def _add_camera(self, camera: str) -> None:
        self._slugs = make_slugs([*self._slugs, camera])
        self._selectors[camera] = FrameSelector(self._config.per_hour)

    def _enqueue(self, candidate: Candidate) -> None:
        try:
            self._queue.put(candidate, timeout=None if candidate.result.age_ms is None else 0.001)
        except Full:
            self._set_problem("the disk is too slow. Images are left out.")

    def _run(self) -> None:
        """Body of the thread."""
        while (candidate := self._queue.get()) is not None:
            if self._num_images >= self._config.max_images:
                self._num_images = self._count_images()  # the user may have moved some
            if self._num_images >= self._config.max_images:
                limit = self._config.max_images
                self._set_problem(
                    f"{limit} images are reached. Nothing more is saved; move them, or raise --collect-max."
                )
                continue
            try:
                if self._is_failing and shutil.disk_usage(self._config.directory).free < MIN_FREE_BYTES:
                    continue  # a smaller image may fit, and the next one not
                self._save(candidate)
            except OSError as error:
                self._is_failing = True
                reason = error.strerror or type(error).__name__
                self._set_problem(f"{reason}. Images are left out until the disk accepts data.")
                continue
            self._is_failing = False
            self._num_images += 1
            self.num_saved += 1
            self._set_problem("")

    def _count_images(self) -> int:
        return sum(1 for _ in self._config.directory.glob("*/*.jpg"))

    def _set_problem(self, problem: str) -> None:
        """Report a change. An empty text means that images are saved."""
        if problem != self._problem:
            self._problem = problem
            text = f"--collect {self._config.directory}: {problem or 'images are saved again.'}"
            self._report(text, level="warning" if problem else "info")

    def _save(self, candidate: Candidate) -> None:
        """Write the image, then its line in the index. Without the line, the image is removed."""
        result, directory = candidate.result, self._config.directory
        bgr = cv2.cvtColor(result.image_rgb, cv2.COLOR_RGB2BGR)
        encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
        path = make_segment_path(directory / self._slugs[result.camera], candidate.utc_s, ".jpg")
        with atomic_write(path) as temp_path:
            temp_path.write_bytes(encoded)
        try:
            append_line(directory / INDEX_NAME, json.dumps(_describe(candidate, path.relative_to(directory))))
        except OSError:
            path.unlink(missing_ok=True)
            raise


def append_line(path: Path, line: str) -> None:
    """Append a line to a file. After an error, the file is as before.

    Args:
        path: The file. It is created if it does not exist.
        line: The line.

    Raises:
        OSError: The line cannot be written.
    """
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            content = f"{line}\n".encode()
            if file.write(content) != len(content):
                raise OSError("the line was written in part")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _describe(candidate: Candidate, path: Path) -> dict[str, Any]:
    """Return the line of an image in the index."""
    result = candidate.result
    height, width = result.original_rgb.shape[:2]
    kept = result.all_detections.filter(min(MIN_SCORE, result.conf))
    moment = datetime.fromtimestamp(candidate.utc_s, timezone.utc).isoformat(timespec="milliseconds")
    values: dict[str, Any] = {
        "version": INDEX_VERSION,
        "file": path.as_posix(),
        "camera": result.camera,
        "time": moment,
    }
    if result.age_ms is None:
        values["position_s"] = round(result.timestamp_s, 4)
    distance = None if candidate.distance is None else round(candidate.distance, 2)
    return values | {
        "image_wh": [width, height],
        "conf": result.conf,
        "detections": [
            {"box_xyxy": [round(side, 1) for side in box], "score": round(score, 4)}
            for box, score in zip(kept.boxes_xyxy.tolist(), kept.scores.tolist(), strict=True)
        ],
        "reasons": candidate.reasons,
        "uncertainty": round(candidate.uncertainty, 3),
        "distance": distance,
        "privacy": result.privacy,
    }


def add_collect_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags.

    Args:
        parser: Parser of hkd-demo.
    """
    group = parser.add_argument_group("collection of images for training")
    group.add_argument(
        "--collect",
        type=Path,
        metavar="DIR",
        help="save uncertain and diverse frames to DIR, for hkd-train --unlabeled DIR; redacted with --privacy",
    )
    group.add_argument(
        "--collect-per-hour",
        type=int,
        default=DEFAULT_PER_HOUR,
        metavar="N",
        help="maximum number of images per hour and camera (default: %(default)s)",
    )
    group.add_argument(
        "--collect-max",
        type=int,
        default=DEFAULT_MAX_IMAGES,
        metavar="N",
        help="maximum number of images in DIR, those of earlier runs included (default: %(default)s)",
    )


def make_collect_config(flags: argparse.Namespace) -> CollectConfig | None:
    """Create the settings of `--collect`.

    Args:
        flags: Parsed flags.

    Returns:
        The settings. None without `--collect`.

    Raises:
        UsageError: A value is invalid.
    """
    check_range("--collect-per-hour", flags.collect_per_hour, 1)
    check_range("--collect-max", flags.collect_max, 1)
    if flags.collect is None:
        return None
    return CollectConfig(flags.collect, flags.collect_per_hour, flags.collect_max)
