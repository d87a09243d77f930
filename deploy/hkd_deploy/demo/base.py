"""Interfaces of the demo: the result of a frame, and the outputs, trackers and counters that process it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends.base import StageTimes
from hkd_deploy.demo.cameras import Line, Zone
from hkd_deploy.demo.scene_drawing import draw_scene
from hkd_det.draw import Redaction, draw_detections, draw_overlay, redact_boxes
from hkd_det.structures import Detections

REMOVED_STATUS = "ended: removed from the file of --cameras"
MAX_REDACTION_CONF = 0.1  # boxes with this score are redacted even if they are not drawn: a missed person is worse


@dataclass(frozen=True)
class CountEvent:
    """One crossing of a line, or the begin or end of a stay in a zone.

    Attributes:
        event: "crossing", "enter" or "exit".
        name: Name of the line or zone.
        track_id: Track id of the person.
        timestamp_s: Time at which it happened, seconds. It is earlier than the frame that confirms it.
        direction: Of a crossing: "left" or "right", the side on which the person is afterwards, seen from the first
            point of the line to the second.
        dwell_s: Of an exit: duration of the stay, seconds.
    """

    event: str
    name: str
    track_id: int
    timestamp_s: float
    direction: str = ""
    dwell_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the event, without those that it does not have."""
        key = "line" if self.event == "crossing" else "zone"
        values: dict[str, Any] = {key: self.name, "track_id": self.track_id}
        if self.direction:
            values["direction"] = self.direction
        if self.dwell_s is not None:
            values["dwell_s"] = round(self.dwell_s, 2)
        return values


@dataclass(frozen=True)
class FrameResult:
    """One processed frame. Sinks must not change its arrays.

    Attributes:
        camera: Name of the camera.
        index: Number of processed frames of this camera before this one.
        original_rgb (uint8[H, W, 3]): The frame with all people visible. Sinks use `image_rgb` instead.
        detections: Detections with a score of at least `conf`, in pixels of the frame.
        all_detections: All detections of the model, also those with a low score.
        conf: Minimum score of shown detections.
        timestamp_s: Capture time by `time.monotonic()` for a live source, otherwise the position in the video.
        age_ms: Time from the capture to the detections, ms. None for a recorded source.
        times: Time of each stage.
        status: Problem of the camera, such as late images. Empty if there is none.
        privacy: How people are made unrecognizable in `image_rgb`. None shows them.
        overlay: Lines of text for `drawn_rgb`.
        track_ids: Track of each detection, int64[N]; -1 for none. None without a tracker.
        counts: Counts of lines and zones. Empty without counters.
        count_events: Crossings, entries and exits that this frame confirms.
        lines: Lines of the camera.
        zones: Zones of the camera.
    """

    camera: str
    index: int
    original_rgb: NDArray[np.uint8]
    detections: Detections
    all_detections: Detections
    conf: float
    timestamp_s: float
    age_ms: float | None
    times: StageTimes
    status: str = ""
    privacy: Redaction | None = None
    overlay: tuple[str, ...] = ()
    track_ids: NDArray[np.int64] | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)
    count_events: tuple[CountEvent, ...] = ()
    lines: tuple[Line, ...] = ()
    zones: tuple[Zone, ...] = ()

    @cached_property
    def image_rgb(self) -> NDArray[np.uint8]:
        """The frame for everything that is shown or stored (uint8[H, W, 3]): people are hidden if `privacy` is set."""
        if self.privacy is None:
            return self.original_rgb
        redacted = self.all_detections.filter(min(self.conf, MAX_REDACTION_CONF))
        return redact_boxes(self.original_rgb, redacted.boxes_xyxy, self.privacy)

    @cached_property
    def drawn_rgb(self) -> NDArray[np.uint8]:
        """`image_rgb` with boxes, lines, zones and text (uint8[H, W, 3]). It is drawn once for all sinks."""
        canvas = draw_detections(self.image_rgb, self.detections, track_ids=self.track_ids)
        draw_scene(canvas, self.lines, self.zones, self.counts)
        if self.overlay or self.status:
            draw_overlay(canvas, self.overlay, warning=self.status)
        return canvas


class FrameSink(Protocol):
    """An output of the run. It is called by the thread of the detector, so it must return soon.

    A sink can serve one camera or several: results and statuses state the camera.
    """

    def write(self, result: FrameResult) -> None:
        """Process a frame.

        Args:
            result: The frame.
        """

    def write_status(self, camera: str, status: str) -> None:
        """Process a change of the status of a camera.

        Args:
            camera: Name of the camera.
            status: Description of a problem. Empty if the problem is over.
        """

    def close(self) -> None:
        """Complete the output. Called once at the end of the run, also after an error."""


class FrameWindow(Protocol):
    """A sink that the user can close."""

    def is_open(self, wait_ms: int = 1) -> bool:
        """Process events for at least `wait_ms` and return False after the user closed the window."""


class Tracker(Protocol):
    """Tracks people in the frames of one camera."""

    def update(self, detections: Detections, image_hw: tuple[int, int], timestamp_s: float) -> NDArray[np.int64]:
        """Assign detections to tracks.

        Args:
            detections: All detections of the model in a frame, also those with a low score.
            image_hw: Height and width of the frame, pixels.
            timestamp_s: Time of the frame, seconds. It never decreases, also across losses of the camera.

        Returns:
            Track of each detection, int64[N]; -1 for none.
        """


class Counter(Protocol):
    """Counts people of one camera.

    Attributes:
        new_events: Crossings, entries and exits that the last frame confirms.
    """

    @property
    def new_events(self) -> Sequence[CountEvent]: ...

    def update(
        self,
        detections: Detections,
        track_ids: NDArray[np.int64] | None,
        image_hw: tuple[int, int],
        timestamp_s: float,
    ) -> Mapping[str, Any]:
        """Update the counts with a frame.

        Args:
            detections: Shown detections, pixels of the frame.
            track_ids: Track of each detection, int64[N]. None without a tracker.
            image_hw: Height and width of the frame, pixels.
            timestamp_s: Time of the frame, seconds.

        Returns:
            Counts by name, for `FrameResult.counts`. The values can be written as JSON.
        """
