"""People that cross lines and stay in zones of a camera image, by the bottom center of their boxes.

Lines and zones have normalized coordinates: 0 to 1, relative to the width and height of the image. A count survives
changes of the track id (`hkd_deploy.demo.linking`), and jitter at a line or at the border of a zone (hysteresis).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_deploy.demo.base import CountEvent
from hkd_deploy.demo.cameras import Line, Point, Zone
from hkd_deploy.demo.density import DensityWindow
from hkd_deploy.demo.linking import MAX_LINK_S, PersonLinker, TrackedPerson
from hkd_det.structures import Detections

HYSTERESIS = 0.1  # of the box height: distance from a line or a border at which the side is certain
SETTLE_S = 0.5  # a person that is on the same side of a zone's border for this time is there, however near
LEFT, RIGHT = "left", "right"


@dataclass
class _LineState:
    """Position of a person relative to a line.

    Attributes:
        last_s: Time of the last detection.
        distance: Signed distance from the endless line at that time, pixels; right is positive.
        side: Side on which the person certainly was: -1, 1, or 0 if not known.
        passed_s: Time at which the endless line was passed.
        is_on_segment: True if it was passed between the end points.
        pending: Crossings that wait until the track is long enough: direction and time.
    """

    last_s: float
    distance: float
    side: int
    passed_s: float
    is_on_segment: bool
    pending: list[tuple[str, float]]


class LineCounter:
    """Counts the people that cross a line between its end points, in each direction.

    A person crosses if the feet were certainly on one side (`HYSTERESIS`) and then certainly on the other.

    Args:
        name: Name of the line.
        points: First and second end, normalized.

    Attributes:
        counts: Number of crossings to the "left" and to the "right", seen from the first point to the second.
    """

    def __init__(self, name: str, points: Sequence[Point]) -> None:
        self.name, self.points = name, tuple(points)
        self.counts = {LEFT: 0, RIGHT: 0}
        self._states: dict[int, _LineState] = {}
        self._start, self._end = np.zeros(2), np.ones(2)

    def set_image_size(self, width: int, height: int) -> None:
        """Set the size of the images, and forget the persons.

        Args:
            width: Pixels.
            height: Pixels.
        """
        self._start, self._end = np.array(self.points) * (width, height)
        self._states.clear()

    def update(self, persons: Sequence[TrackedPerson], timestamp_s: float) -> list[CountEvent]:
        """Count the crossings of a frame.

        Args:
            persons: Persons of the frame.
            timestamp_s: Time of the frame, seconds.

        Returns:
            The crossings that this frame confirms.
        """
        events = []
        for person in persons:
            state = self._follow(person, timestamp_s)
            if state.pending and person.is_established:
                for direction, passed_s in state.pending:
                    self.counts[direction] += 1
                    events.append(CountEvent("crossing", self.name, person.track_id, passed_s, direction))
                state.pending.clear()
        self._states = {key: state for key, state in self._states.items() if timestamp_s - state.last_s <= MAX_LINK_S}
        return events

    def to_dict(self) -> dict[str, int]:
        """Return the counts."""
        return dict(self.counts)

    def _follow(self, person: TrackedPerson, timestamp_s: float) -> _LineState:
        distance, position = self._locate(person.x, person.y)
        side = 1 if distance > 0 else -1
        is_certain = abs(distance) >= HYSTERESIS * person.height
        state = self._states.get(person.person_id)
        if state is None:
            state = _LineState(timestamp_s, distance, side if is_certain else 0, timestamp_s, False, [])
            self._states[person.person_id] = state
            return state
        if (distance > 0) != (state.distance > 0):
            ratio = abs(state.distance) / (abs(state.distance) + abs(distance))
            state.passed_s = state.last_s + ratio * (timestamp_s - state.last_s)
            state.is_on_segment = 0 <= position <= 1
        if is_certain and side != state.side:
            if state.side and state.is_on_segment:
                state.pending.append((RIGHT if side > 0 else LEFT, state.passed_s))
            state.side = side
        state.last_s, state.distance = timestamp_s, distance
        return state

    def _locate(self, x: float, y: float) -> tuple[float, float]:
        """Return the signed distance from the endless line, and the position along it: 0 and 1 at the end points."""
        along_x, along_y = (self._end - self._start).tolist()
        to_x, to_y = x - float(self._start[0]), y - float(self._start[1])
        length = max(float(np.hypot(along_x, along_y)), 1e-6)
        return (along_x * to_y - along_y * to_x) / length, (along_x * to_x + along_y * to_y) / length**2


@dataclass
class _ZoneState:
    """Position of a person relative to a zone.

    Attributes:
        last_s: Time of the last detection.
        distance: Signed distance from the border at that time, pixels; inside is positive.
        changed_s: Time at which the border was passed.
        is_inside: True after the person certainly entered.
        is_counted: True after the stay is counted.
        entered_s: Time of the entry.
        track_id: Last track id.
    """

    last_s: float
    distance: float
    changed_s: float
    is_inside: bool
    is_counted: bool
    entered_s: float
    track_id: int


class ZoneCounter:
    """Counts the people in a polygon, their entries and exits, and the time that they stay.

    A stay begins when the feet pass the border, or with the first detection of a person inside. It ends when they pass
    the border, or, for a person that is lost for longer than `MAX_LINK_S`, with the last detection.

    Args:
        name: Name of the zone.
        points: At least three corners, normalized.

    Attributes:
        num_entries, num_exits: Number of stays that began and ended.
    """

    def __init__(self, name: str, points: Sequence[Point]) -> None:
        self.name, self.points = name, tuple(points)
        self.num_entries = self.num_exits = 0
        self._polygon = np.zeros((len(points), 2), np.float32)
        self._states: dict[int, _ZoneState] = {}
        self._total_dwell_s = 0.0
        self._density = DensityWindow()

    @property
    def num_persons(self) -> int:
        """Number of persons in the zone. Persons that are lost for at most `MAX_LINK_S` are included."""
        return sum(state.is_counted for state in self._states.values())

    @property
    def mean_dwell_s(self) -> float:
        """Mean duration of the stays that ended, seconds."""
        return self._total_dwell_s / self.num_exits if self.num_exits else 0.0

    def set_image_size(self, width: int, height: int) -> None:
        """Set the size of the images, and end the stays.

        Args:
            width: Pixels.
            height: Pixels.
        """
        self._polygon = (np.array(self.points) * (width, height)).astype(np.float32)
        for state in self._states.values():
            self._end_stay(state, state.last_s)
        self._states.clear()

    def update(self, persons: Sequence[TrackedPerson], timestamp_s: float) -> list[CountEvent]:
        """Follow the persons into the next frame.

        Args:
            persons: Persons of the frame.
            timestamp_s: Time of the frame, seconds.

        Returns:
            The entries and exits that this frame confirms.
        """
        events = []
        for person in persons:
            events += self._follow(person, timestamp_s)
        for person_id, state in list(self._states.items()):
            if _is_lost(state, timestamp_s):
                events += self._end_stay(state, state.last_s)
                del self._states[person_id]
        self._density.add(timestamp_s, self.num_persons)
        return events

    def compute_dwell_times(self, timestamp_s: float) -> dict[int, float]:
        """Compute how long the persons in the zone have been there.

        Args:
            timestamp_s: Time of the frame, seconds.

        Returns:
            Seconds by track id.
        """
        return {state.track_id: timestamp_s - state.entered_s for state in self._states.values() if state.is_counted}

    def to_dict(self) -> dict[str, float]:
        """Return the counts and the crowd density: the mean and maximum number of persons over the last minute."""
        return {
            "persons": self.num_persons,
            "entries": self.num_entries,
            "exits": self.num_exits,
            "mean_dwell_s": round(self.mean_dwell_s, 2),
            "mean_persons_60s": round(self._density.mean, 2),
            "max_persons_60s": self._density.maximum,
        }

    def _follow(self, person: TrackedPerson, timestamp_s: float) -> list[CountEvent]:
        distance = float(cv2.pointPolygonTest(self._polygon, (person.x, person.y), True))
        state = self._states.get(person.person_id)
        if state is None:
            state = _ZoneState(timestamp_s, distance, timestamp_s, False, False, timestamp_s, person.track_id)
            self._states[person.person_id] = state
        elif (distance >= 0) != (state.distance >= 0):
            ratio = abs(state.distance) / max(abs(state.distance) + abs(distance), 1e-6)
            state.changed_s = state.last_s + ratio * (timestamp_s - state.last_s)
        is_certain = abs(distance) >= HYSTERESIS * person.height or timestamp_s - state.changed_s >= SETTLE_S
        events = []
        if is_certain and distance >= 0 and not state.is_inside:
            state.is_inside, state.entered_s = True, state.changed_s
        elif is_certain and distance < 0 and state.is_inside:
            events = self._end_stay(state, state.changed_s)
        if state.is_inside and not state.is_counted and person.is_established:
            state.is_counted = True
            self.num_entries += 1
            events.append(CountEvent("enter", self.name, person.track_id, state.entered_s))
        state.last_s, state.distance, state.track_id = timestamp_s, distance, person.track_id
        return events

    def _end_stay(self, state: _ZoneState, end_s: float) -> list[CountEvent]:
        was_counted, state.is_inside, state.is_counted = state.is_counted, False, False
        if not was_counted:
            return []
        dwell_s = max(end_s - state.entered_s, 0.0)
        self.num_exits += 1
        self._total_dwell_s += dwell_s
        return [CountEvent("exit", self.name, state.track_id, end_s, dwell_s=dwell_s)]


def _is_lost(state: _LineState | _ZoneState, timestamp_s: float) -> bool:
    """Return whether a person is lost for too long. The time is negative after a video starts again."""
    return not 0 <= timestamp_s - state.last_s <= MAX_LINK_S


class SceneCounter:
    """All lines and zones of one camera. It is a `Counter` of the demo.

    Args:
        lines: The lines.
        zones: The zones.

    Attributes:
        lines: The line counters.
        zones: The zone counters.
        new_events: Crossings, entries and exits that the last frame confirms.
    """

    def __init__(self, lines: Sequence[Line] = (), zones: Sequence[Zone] = ()) -> None:
        self.lines = [LineCounter(line.name, line.points) for line in lines]
        self.zones = [ZoneCounter(zone.name, zone.points) for zone in zones]
        self.new_events: list[CountEvent] = []
        self._counters: list[LineCounter | ZoneCounter] = [*self.lines, *self.zones]
        self._linker = PersonLinker()
        self._image_hw = (0, 0)

    def with_shapes(self, lines: Sequence[Line], zones: Sequence[Zone]) -> "SceneCounter":
        """Create a counter of other lines and zones. Those that do not change keep their counts and persons.

        Args:
            lines: The lines.
            zones: The zones.

        Returns:
            The counter that replaces this one. It shares its objects, so only one of both may be used.
        """
        other = SceneCounter(lines, zones)
        line_counters = {(counter.name, counter.points): counter for counter in self.lines}
        zone_counters = {(counter.name, counter.points): counter for counter in self.zones}
        for counter in other._counters:
            counter.set_image_size(self._image_hw[1], self._image_hw[0])
        other.lines = [line_counters.get((counter.name, counter.points), counter) for counter in other.lines]
        other.zones = [zone_counters.get((counter.name, counter.points), counter) for counter in other.zones]
        other._counters = [*other.lines, *other.zones]
        other._linker, other._image_hw = self._linker, self._image_hw
        return other

    def update(
        self,
        detections: Detections,
        track_ids: NDArray[np.int64] | None,
        image_hw: tuple[int, int],
        timestamp_s: float,
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Count the people of a frame.

        Args:
            detections: Detections, pixels.
            track_ids (int64[N]): Track ids. Detections without one (-1) are not counted.
            image_hw: Height and width of the frame, pixels. The persons are forgotten if it changes.
            timestamp_s: Time of the frame, seconds.

        Returns:
            All counts so far: `lines` and `zones`, each by name.

        Raises:
            ValueError: There are no track ids.
        """
        if track_ids is None:
            raise ValueError("expected track ids, got None")
        if image_hw != self._image_hw:
            self._image_hw = image_hw
            self._linker.reset()
            for counter in self._counters:
                counter.set_image_size(image_hw[1], image_hw[0])
        persons = self._linker.update(detections.boxes_xyxy, track_ids, timestamp_s)
        self.new_events = [event for counter in self._counters for event in counter.update(persons, timestamp_s)]
        return {
            "lines": {counter.name: counter.to_dict() for counter in self.lines},
            "zones": {counter.name: counter.to_dict() for counter in self.zones},
        }
