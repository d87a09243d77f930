"""Detections as JSON Lines for other programs: `hkd-demo --events FILE` or `--events -`.

Each line is one object (docs/reference/events.md): `frame` for each processed frame, `status` for each change of the
status of a camera, `crossing`, `enter` and `exit` for people at lines and zones, and `drift` of `--monitor`.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, TextIO

from hkd_deploy.demo.base import FrameResult

SCHEMA_VERSION = 1
STDOUT = "-"
OK_STATUS = "ok"


class EventWriter:
    """Writes one JSON object per line and flushes it. It is a `FrameSink` for any number of cameras.

    Args:
        stream: Text stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, result: FrameResult) -> None:
        """Write the detections of a frame, and what was counted; see `FrameSink.write`."""
        for event in (make_frame_event(result), *make_count_events(result)):
            self.publish(event)

    def write_status(self, camera: str, status: str) -> None:
        """Write the status of a camera; see `FrameSink.write_status`."""
        self.publish(make_status_event(camera, status))

    def close(self) -> None:
        """Do nothing: each line is flushed, and `open_events` closes the file."""

    def publish(self, event: dict[str, Any]) -> None:
        """Write an event of another output.

        Args:
            event: Values that can be written as JSON.
        """
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()


def make_frame_event(result: FrameResult) -> dict[str, Any]:
    """Create the event `frame`.

    Args:
        result: The frame.

    Returns:
        Values that can be written as JSON.
    """
    persons: list[dict[str, Any]] = [
        {"box_xyxy": [round(side, 1) for side in box], "score": round(score, 4)}
        for box, score in zip(result.detections.boxes_xyxy.tolist(), result.detections.scores.tolist(), strict=True)
    ]
    if result.track_ids is not None:
        for person, track_id in zip(persons, result.track_ids.tolist(), strict=True):
            person["track_id"] = track_id if track_id >= 0 else None
    height, width = result.original_rgb.shape[:2]
    values: dict[str, Any] = {"frame": result.index, "image_wh": [width, height]}
    if result.age_ms is not None:
        values["age_ms"] = round(result.age_ms, 1)
    else:
        values["position_s"] = round(result.timestamp_s, 4)
    values |= {"num_persons": len(persons), "persons": persons}
    if result.counts:
        values["counts"] = dict(result.counts)
    return _make_event("frame", result.camera, values)


def make_count_events(result: FrameResult) -> list[dict[str, Any]]:
    """Create the events `crossing`, `enter` and `exit`.

    Args:
        result: The frame.

    Returns:
        One event for each that the frame confirms. Values that can be written as JSON.
    """
    events = []
    for event in result.count_events:
        values: dict[str, Any] = {"frame": result.index}
        if result.age_ms is not None:
            values["age_ms"] = round(result.age_ms + 1e3 * (result.timestamp_s - event.timestamp_s), 1)
        else:
            values["position_s"] = round(event.timestamp_s, 4)
        events.append(_make_event(event.event, result.camera, values | event.to_dict()))
    return events


def make_status_event(camera: str, status: str) -> dict[str, Any]:
    """Create the event `status`.

    Args:
        camera: Name of the camera.
        status: Description of a problem. Empty if there is none.

    Returns:
        Values that can be written as JSON.
    """
    return _make_event("status", camera, {"status": status or OK_STATUS})


def make_drift_event(camera: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Create the event `drift`.

    Args:
        camera: Name of the camera.
        values: State and comparison of each quantity.

    Returns:
        Values that can be written as JSON.
    """
    return _make_event("drift", camera, dict(values))


def _make_event(event: str, camera: str, values: dict[str, Any]) -> dict[str, Any]:
    time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return {"version": SCHEMA_VERSION, "event": event, "camera": camera, "time": time, **values}


@contextmanager
def open_events(target: str) -> Iterator[EventWriter]:
    """Open a file for events. Events are appended to an existing file.

    Args:
        target: File, or "-" for stdout.

    Yields:
        The writer.
    """
    if target == STDOUT:
        yield EventWriter(sys.stdout)
        return
    with open(target, "a", encoding="utf-8") as stream:  # noqa: PTH123 - a name, as the flag states it
        yield EventWriter(stream)
