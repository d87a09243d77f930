"""Drift of the detections of each camera: `hkd-demo --monitor`.

A sliding window holds histograms of the newest detections. Once per sixtieth of the window they are compared with the
distributions of the model file, or of the first hours of the camera (`--drift-baseline`). See `hkd_deploy.drift`.
"""

import argparse
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.demo.base import REMOVED_STATUS, FrameResult
from hkd_deploy.demo.delivery import Report
from hkd_deploy.demo.events import make_drift_event
from hkd_deploy.drift import (
    CHUNKS_PER_WINDOW,
    MIN_COUNT,
    QUANTITIES,
    DriftReference,
    build_baseline,
    compute_psi,
    count_values,
    merge_bins,
)
from hkd_deploy.model_metadata import ModelMetadata
from hkd_det.config import parse_duration_s
from hkd_det.errors import UsageError
from hkd_det.files import atomic_write

FILE_VERSION = 1
SAMPLE_INTERVAL_S = 1.0  # consecutive frames show the same people
MIN_WINDOW_S, MIN_BASELINE_WINDOWS = 120.0, 4
MIN_FULL_RATIO = 0.9  # time in the window of the first comparison
END_RATIO = 0.8  # drift is over below this ratio of the threshold

FineCounts = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class QuantityDrift:
    """Comparison of one quantity.

    Attributes:
        psi: Population stability index. None if the window has fewer than `MIN_COUNT` values.
        threshold: PSI above which there is drift. None as for `psi`.
        is_drift: Whether the threshold was crossed, until the PSI is below `END_RATIO` of it.
    """

    psi: float | None
    threshold: float | None
    is_drift: bool


@dataclass(frozen=True)
class CameraDrift:
    """Comparison of the window of a camera with its reference.

    Attributes:
        num_frames: Number of frames in the window.
        quantities: Comparison of each quantity.
    """

    num_frames: int
    quantities: dict[str, QuantityDrift]

    @property
    def is_drift(self) -> bool:
        """Whether there is drift of any quantity."""
        return any(one.is_drift for one in self.quantities.values())


class _Chunk:
    """Histograms of a part of the window: begin in seconds, number of frames, counts in fine bins."""

    def __init__(self, start_s: float) -> None:
        self.start_s, self.num_frames = start_s, 0
        self.counts: FineCounts = {}

    def add(self, counts: FineCounts) -> None:
        self.num_frames += 1
        self.counts = {name: self.counts.get(name, 0) + counts[name] for name in QUANTITIES}


class CameraMonitor:
    """Window, reference and drift of one camera.

    Args:
        window_s: Length of the window, seconds.
        reference: Reference of the model. None to build one from the camera.
        baseline_s: Time from which a reference is built, seconds. 0 with `reference`.
        on_baseline: Called by a thread with a reference that was built.

    Attributes:
        drift: The last comparison. None before the first.
    """

    def __init__(
        self,
        window_s: float,
        reference: DriftReference | None,
        baseline_s: float = 0.0,
        on_baseline: Callable[[DriftReference], None] = lambda _reference: None,
    ) -> None:
        self._on_baseline = on_baseline
        self._window_s, self._reference, self._baseline_s = window_s, reference, baseline_s
        self._chunks: deque[_Chunk] = deque()
        self._chunk: _Chunk | None = None
        self._last_slot = -np.inf
        self._thread: Thread | None = None
        self.drift: CameraDrift | None = None

    @property
    def reference(self) -> DriftReference | None:
        """The reference. None before the end of the baseline."""
        return self._reference

    def add(self, result: FrameResult) -> CameraDrift | None:
        """Add a frame, if it is the first one of its second.

        Args:
            result: The frame.

        Returns:
            A new comparison, if a part of the window is complete and there is a reference.
        """
        now_s = result.timestamp_s
        slot = now_s // SAMPLE_INTERVAL_S  # of the clock: the frames of a camera with one per second are all counted
        if slot <= self._last_slot:
            return None
        self._last_slot = slot
        completed = self._begin_chunk(now_s)
        conf = self._reference.conf if self._reference else result.conf
        assert self._chunk is not None
        self._chunk.add(count_values(result.all_detections, result.original_rgb.shape[0], conf))
        if not completed:
            return None
        if self._reference is None:
            if now_s - self._chunks[0].start_s >= self._baseline_s and self._thread is None:
                self._build_baseline(result.conf)
            return None
        while self._chunks and self._chunks[0].start_s < now_s - self._window_s - 1e-6:
            self._chunks.popleft()
        if not self._chunks or now_s - self._chunks[0].start_s < MIN_FULL_RATIO * self._window_s:
            return None  # the first minutes of a camera show few people
        self.drift = self._compare(self._reference)
        return self.drift

    def _begin_chunk(self, now_s: float) -> bool:
        """Begin a part of the window if the last one is complete, and return whether it was."""
        length_s = self._window_s / CHUNKS_PER_WINDOW
        if self._chunk is not None and now_s - self._chunk.start_s < length_s - 1e-6:
            return False
        is_first = self._chunk is None
        if self._chunk is not None:
            self._chunks.append(self._chunk)
        self._chunk = _Chunk(now_s)
        return not is_first

    def _compare(self, reference: DriftReference) -> CameraDrift:
        quantities = {}
        for name, expected in reference.distributions.items():
            was_drift = self.drift is not None and self.drift.quantities[name].is_drift
            fine: Any = sum(chunk.counts[name] for chunk in self._chunks)
            num_values = int(np.sum(fine))
            if num_values < MIN_COUNT:
                quantities[name] = QuantityDrift(None, None, was_drift)
                continue
            psi = float(compute_psi(merge_bins(name, expected.edges, fine), expected.counts))
            threshold = expected.compute_threshold(num_values)
            quantities[name] = QuantityDrift(psi, threshold, psi > (END_RATIO * threshold if was_drift else threshold))
        return CameraDrift(sum(chunk.num_frames for chunk in self._chunks), quantities)

    def _build_baseline(self, conf: float) -> None:
        """Build the reference in a thread: the simulation takes seconds."""
        chunks = list(self._chunks)

        def build() -> None:
            self._reference = build_baseline([chunk.counts for chunk in chunks], conf)
            self._on_baseline(self._reference)

        self._thread = Thread(target=build, name="drift baseline", daemon=True)
        self._thread.start()


class DriftMonitor:
    """Compares all cameras with their references. It is a `FrameSink`.

    Args:
        window_s: Length of the window, seconds.
        reference: Reference of the model. None to build one for each camera.
        baseline_s: Time from which a reference is built, seconds. 0 with `reference`.
        publish: Functions that receive an event `drift` for each comparison.
        report: Called with one line when drift begins or ends.
        baseline_path: File in which the references of cameras are stored, and from which they are read. None for none.

    Raises:
        UsageError: The file cannot be read, or its references are those of another window.
    """

    def __init__(
        self,
        window_s: float,
        reference: DriftReference | None,
        baseline_s: float,
        publish: Sequence[Callable[[dict[str, Any]], None]],
        report: Report,
        baseline_path: Path | None = None,
    ) -> None:
        self._baseline_path, self._lock = baseline_path, Lock()
        self._baselines = read_baselines(baseline_path, window_s) if baseline_path else {}
        self._window_s, self._reference, self._baseline_s = window_s, reference, baseline_s
        self._publish, self._report = publish, report
        self._cameras: dict[str, CameraMonitor] = {}

    def write(self, result: FrameResult) -> None:
        """Add a frame to the window of its camera; see `FrameSink.write`."""
        camera = self._cameras.get(result.camera)
        if camera is None:
            known = self._reference or self._baselines.get(result.camera)
            store = partial(self._store_baseline, result.camera)
            camera = CameraMonitor(self._window_s, known, self._baseline_s, store)
            self._cameras[result.camera] = camera
        was_drift = camera.drift is not None and camera.drift.is_drift
        drift = camera.add(result)
        if drift is None:
            return
        for publish in self._publish:
            publish(make_drift_event(result.camera, self._describe(drift)))
        if drift.is_drift != was_drift:
            self._report(
                _format_drift(drift, self._reference_kind), result.camera, "warning" if drift.is_drift else "info"
            )

    def describe(self, name: str) -> dict[str, Any] | None:
        """Return the state and the last comparison of a camera, as in the event `drift`.

        Args:
            name: Name of the camera.

        Returns:
            The fields of the event. None before the first comparison.
        """
        camera = self._cameras.get(name)
        return self._describe(camera.drift) if camera and camera.drift else None

    @property
    def _reference_kind(self) -> str:
        return "camera" if self._reference is None else "model"

    def _describe(self, drift: CameraDrift) -> dict[str, Any]:
        return {
            "state": "drift" if drift.is_drift else "ok",
            "reference": self._reference_kind,
            "window_s": self._window_s,
            "num_frames": drift.num_frames,
            "quantities": {
                name: {"psi": _round(one.psi), "threshold": _round(one.threshold), "drift": one.is_drift}
                for name, one in drift.quantities.items()
            },
        }

    def write_status(self, camera: str, status: str) -> None:
        """Forget a camera that was removed. A lost camera keeps its window; see `FrameSink.write_status`."""
        if status == REMOVED_STATUS:
            self._cameras.pop(camera, None)

    def close(self) -> None:
        """Do nothing."""

    def _store_baseline(self, camera: str, reference: DriftReference) -> None:
        """Report the end of a baseline, and write the file."""
        self._report("the baseline of drift is complete.", camera)
        if self._baseline_path is None:
            return
        with self._lock:
            self._baselines[camera] = reference
            cameras = {name: json.loads(one.to_json()) for name, one in self._baselines.items()}
            content = {"version": FILE_VERSION, "window_s": self._window_s, "cameras": cameras}
            try:
                with atomic_write(self._baseline_path) as temp_path:
                    temp_path.write_text(json.dumps(content, indent=1), encoding="utf-8")
            except OSError as error:
                text = f"{error.strerror}. The baseline of {camera} ends with the program."
                self._report(f"--drift-baseline-file {self._baseline_path}: {text}", camera, "error")

    def iterate_values(self, key: str) -> Iterator[tuple[tuple[str, ...], float]]:
        """Yield the values of a metric.

        Args:
            key: `psi` or `threshold`, by camera and quantity, or `is_drift`, by camera.

        Yields:
            Labels and value.
        """
        for name, camera in list(self._cameras.items()):
            if camera.drift is None:
                continue
            if key == "is_drift":
                yield (name,), float(camera.drift.is_drift)
                continue
            for quantity, one in camera.drift.quantities.items():
                if (value := getattr(one, key)) is not None:
                    yield (name, quantity), value


def read_baselines(path: Path, window_s: float) -> dict[str, DriftReference]:
    """Read the references of cameras.

    Args:
        path: File of `--drift-baseline-file`. It need not exist.
        window_s: Length of the window, seconds.

    Returns:
        References by camera.

    Raises:
        UsageError: The file cannot be read, or its references are those of another window.
    """
    if not path.exists():
        return {}
    where, hint = f"--drift-baseline-file {path}", "Set another file, or delete it to begin again."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stored_s = float(content["window_s"])
        baselines = {name: DriftReference.from_json(json.dumps(one)) for name, one in content["cameras"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{where}: not a file of baselines. {hint}") from None
    if stored_s != window_s:
        raise UsageError(f"{where}: expected --drift-window {stored_s:g}s, got {window_s:g}s. {hint}")
    return baselines


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _format_drift(drift: CameraDrift, kind: str) -> str:
    if not drift.is_drift:
        return "drift is over."
    parts = [
        f"{name} PSI {one.psi:.2f} above {one.threshold:.2f}"
        for name, one in drift.quantities.items()
        if one.is_drift and one.psi is not None
    ]
    expected = "the validation images" if kind == "model" else "the baseline of this camera"
    return f"drift from {expected}: {', '.join(parts)}. Check the camera, or collect images with --collect."


def add_monitor_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags.

    Args:
        parser: Parser of hkd-demo.
    """
    group = parser.add_argument_group("monitoring")
    group.add_argument(
        "--monitor",
        action="store_true",
        help="compare scores, box heights and numbers of persons with those of the validation images, and report drift",
    )
    group.add_argument(
        "--drift-window",
        default="1h",
        metavar="T",
        help="time over which they are counted: 30m, 1h, 24h (default: %(default)s)",
    )
    group.add_argument(
        "--drift-baseline",
        metavar="T",
        help="compare each camera with its own first T, such as 24h or 7d, instead of the validation images; "
        f"at least {MIN_BASELINE_WINDOWS} windows",
    )
    group.add_argument(
        "--drift-baseline-file",
        type=Path,
        metavar="FILE",
        help="JSON file that keeps the baselines of --drift-baseline when the program restarts",
    )


def check_monitor_flags(flags: argparse.Namespace) -> None:
    """Check values that argparse does not check.

    Args:
        flags: Parsed flags.

    Raises:
        UsageError: A duration is invalid, or a flag requires `--monitor`.
    """
    window_s = parse_duration_s("--drift-window", flags.drift_window)
    if window_s < MIN_WINDOW_S:
        raise UsageError(f"--drift-window {flags.drift_window}: expected at least {MIN_WINDOW_S:.0f}s.")
    if flags.drift_baseline is None:
        if flags.drift_baseline_file:
            raise UsageError("--drift-baseline-file: requires --drift-baseline. Add it, or omit --drift-baseline-file.")
        return
    if not flags.monitor:
        raise UsageError("--drift-baseline: requires --monitor. Add it, or omit --drift-baseline.")
    if parse_duration_s("--drift-baseline", flags.drift_baseline) < MIN_BASELINE_WINDOWS * window_s:
        raise UsageError(
            f"--drift-baseline {flags.drift_baseline}: expected at least {MIN_BASELINE_WINDOWS} times --drift-window, "
            f"which is {flags.drift_window}."
        )


def make_monitor(
    flags: argparse.Namespace,
    metadata: ModelMetadata,
    publish: Sequence[Callable[[dict[str, Any]], None]],
    report: Report,
) -> DriftMonitor:
    """Create the sink of `--monitor`.

    Args:
        flags: Parsed flags.
        metadata: Metadata of the model.
        publish: Functions that receive the events.
        report: Called with one line when drift begins or ends.

    Returns:
        The sink.

    Raises:
        UsageError: The model has no reference, and `--drift-baseline` is not set; or the file of baselines is invalid.
    """
    window_s = parse_duration_s("--drift-window", flags.drift_window)
    if flags.drift_baseline:
        baseline_s = parse_duration_s("--drift-baseline", flags.drift_baseline)
        return DriftMonitor(window_s, None, baseline_s, publish, report, flags.drift_baseline_file)
    if metadata.reference is None:
        raise UsageError(
            f"--monitor: the file of {metadata.model} has no reference (metadata hkd.reference). Export it again with "
            "hkd-export best.pt --data DATA (at least 50 val images and 100 detected persons), or add "
            "--drift-baseline 24h."
        )
    return DriftMonitor(window_s, metadata.reference, 0.0, publish, report)
