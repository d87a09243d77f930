"""Detections as JSON Lines for other programs: `hkd-demo --events FILE` or `--events -`.

Each line is one object (docs/reference/events.md): `frame` for each processed frame, `status` for each change of the
status of a camera.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, TextIO

from hkd_det.structures import Detections

SCHEMA_VERSION = 1
STDOUT = "-"
OK_STATUS = "ok"


class EventWriter:
    """Writes one JSON object per line and flushes it.

    Args:
        stream: Text stream.
        camera: Name of the source, without credentials.
    """

    def __init__(self, stream: TextIO, camera: str) -> None:
        self._stream, self._camera = stream, camera
        self._status = OK_STATUS

    def write_frame(
        self,
        index: int,
        image_hw: tuple[int, int],
        detections: Detections,
        position_s: float | None = None,
        age_ms: float | None = None,
    ) -> None:
        """Write the detections of a frame.

        Args:
            index: Number of processed frames before this one.
            image_hw: Height and width of the frame, pixels.
            detections: Detections in pixels of the frame.
            position_s: Position in a recorded source, seconds. None for a live source.
            age_ms: Time since the capture in a live source, ms. None for a recorded one.
        """
        persons = [
            {"box_xyxy": [round(side, 1) for side in box], "score": round(score, 4)}
            for box, score in zip(detections.boxes_xyxy.tolist(), detections.scores.tolist(), strict=True)
        ]
        values: dict[str, Any] = {"frame": index, "image_wh": [image_hw[1], image_hw[0]]}
        if age_ms is not None:
            values["age_ms"] = round(age_ms, 1)
        if position_s is not None:
            values["position_s"] = round(position_s, 4)
        self._write("frame", values | {"num_persons": len(persons), "persons": persons})

    def write_status(self, status: str) -> None:
        """Write the status of a camera if it changed.

        Args:
            status: Description of a problem. Empty if there is none.
        """
        status = status or OK_STATUS
        if status != self._status:
            self._status = status
            self._write("status", {"status": status})

    def _write(self, event: str, values: dict[str, Any]) -> None:
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"version": SCHEMA_VERSION, "event": event, "camera": self._camera, "time": time, **values}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


@contextmanager
def open_events(target: str, camera: str) -> Iterator[EventWriter]:
    """Open a file for events. Events are appended to an existing file.

    Args:
        target: File, or "-" for stdout.
        camera: Name of the source, without credentials.

    Yields:
        The writer.
    """
    if target == STDOUT:
        yield EventWriter(sys.stdout, camera)
        return
    with open(target, "a", encoding="utf-8") as stream:  # noqa: PTH123 - a name, as the flag states it
        yield EventWriter(stream, camera)
