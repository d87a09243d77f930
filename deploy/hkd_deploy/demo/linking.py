"""Persons across changes of the track id: the input of line and zone counters.

A tracker loses people who are hidden for longer, and then returns another id, or exchanges the ids of two people. The
linker follows positions instead: an id that appears where a person was lost belongs to this person, and an id that
jumps belongs to another one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NO_TRACK = -1
MIN_TRACK_S = 0.4  # shorter tracks are not counted
MIN_TRACK_DETECTIONS = 3
MAX_LINK_S = 2.0  # time that a person may be lost
# Deviation from the prediction in box heights, and its growth per second: of a person whose id is unchanged, so that an
# exchange of ids is noticed, and of a lost person. The first is smaller because a person that exceeds it is lost.
SAME_ID_GATE = (0.2, 1.0)
LINK_GATE = (0.5, 0.75)
MAX_SIZE_RATIO = 1.6  # between the box heights of a lost person and of the person that is found
VELOCITY_TIME_S = 0.5  # time constant of the estimated velocity
MAX_PREDICTION_S = 2.0


@dataclass
class TrackedPerson:
    """A person in the image of a camera.

    Attributes:
        person_id: Identifier, from 0. It stays the same if the track id changes.
        track_id: Last track id.
        x, y: Bottom center of the last box, pixels: the position of the feet.
        height: Height of the last box, pixels.
        first_s, last_s: Times of the first and last detection, seconds.
        num_detections: Number of detections.
        vx, vy: Velocity, pixels per second.
    """

    person_id: int
    track_id: int
    x: float
    y: float
    height: float
    first_s: float
    last_s: float
    num_detections: int = 1
    vx: float = 0.0
    vy: float = 0.0

    @property
    def is_established(self) -> bool:
        """True if the track is long enough to be counted."""
        return self.num_detections >= MIN_TRACK_DETECTIONS and self.last_s - self.first_s >= MIN_TRACK_S

    def predict(self, timestamp_s: float) -> tuple[float, float]:
        """Predict the position.

        Args:
            timestamp_s: Time, seconds.

        Returns:
            x, y in pixels.
        """
        step_s = min(timestamp_s - self.last_s, MAX_PREDICTION_S)
        return self.x + self.vx * step_s, self.y + self.vy * step_s

    def move(self, x: float, y: float, height: float, timestamp_s: float) -> None:
        """Set the position of the next detection.

        Args:
            x: Bottom center of the box, pixels.
            y: Bottom center of the box, pixels.
            height: Height of the box, pixels.
            timestamp_s: Time, seconds.
        """
        step_s = timestamp_s - self.last_s
        if step_s > 0:
            weight = max(1 - np.exp(-step_s / VELOCITY_TIME_S), 1 / (self.num_detections + 1))
            self.vx += weight * ((x - self.x) / step_s - self.vx)
            self.vy += weight * ((y - self.y) / step_s - self.vy)
        self.x, self.y, self.height, self.last_s = x, y, height, timestamp_s
        self.num_detections += 1


class PersonLinker:
    """Assigns track ids to persons.

    Args:
        max_link_s: Time after which a lost person is forgotten, seconds.
    """

    def __init__(self, max_link_s: float = MAX_LINK_S) -> None:
        self._max_link_s = max_link_s
        self._persons: dict[int, TrackedPerson] = {}
        self._person_of_track: dict[int, int] = {}
        self._next_id = 0

    def update(
        self, boxes_xyxy: NDArray[np.float32], track_ids: NDArray[np.int64], timestamp_s: float
    ) -> list[TrackedPerson]:
        """Follow the persons into the next frame.

        Args:
            boxes_xyxy (array[N, 4]): Boxes, pixels.
            track_ids (int64[N]): Track ids. Boxes without one (-1) are not used.
            timestamp_s: Time of the frame, seconds.

        Returns:
            The persons of this frame. The objects are the same in later frames.
        """
        self._forget(timestamp_s)
        persons: list[TrackedPerson] = []
        unassigned = []
        for (x1, y1, x2, y2), track_id in zip(boxes_xyxy.tolist(), track_ids.tolist(), strict=True):
            if track_id == NO_TRACK:
                continue
            x, y, height = (x1 + x2) / 2, y2, max(y2 - y1, 1.0)
            person = self._persons.get(self._person_of_track.get(track_id, -1))
            if person and _compute_gap(person, x, y, height, timestamp_s, SAME_ID_GATE) <= 1:
                person.move(x, y, height, timestamp_s)
                persons.append(person)
            else:
                unassigned.append((track_id, x, y, height))
        for track_id, person in self._link(unassigned, timestamp_s):
            self._person_of_track = {
                track: number for track, number in self._person_of_track.items() if number != person.person_id
            }
            self._person_of_track[track_id], person.track_id = person.person_id, track_id
            persons.append(person)
        return persons

    def reset(self) -> None:
        """Forget all persons. Later persons have new identifiers."""
        self._persons.clear()
        self._person_of_track.clear()

    def _forget(self, timestamp_s: float) -> None:
        for person in list(self._persons.values()):
            if not 0 <= timestamp_s - person.last_s <= self._max_link_s:
                del self._persons[person.person_id]
        self._person_of_track = {
            track: number for track, number in self._person_of_track.items() if number in self._persons
        }

    def _link(
        self, unassigned: list[tuple[int, float, float, float]], timestamp_s: float
    ) -> list[tuple[int, TrackedPerson]]:
        """Assign boxes to lost persons, the nearest first; the others are new persons."""
        lost = [person for person in self._persons.values() if person.last_s < timestamp_s]
        gaps = sorted(
            (gap, row, person.person_id)
            for row, (_, x, y, height) in enumerate(unassigned)
            for person in lost
            if 1 / MAX_SIZE_RATIO <= height / person.height <= MAX_SIZE_RATIO
            and (gap := _compute_gap(person, x, y, height, timestamp_s, LINK_GATE)) <= 1
        )
        linked: dict[int, TrackedPerson] = {}
        for _, row, person_id in gaps:
            person = self._persons[person_id]
            if row not in linked and person.last_s < timestamp_s:
                person.move(*unassigned[row][1:], timestamp_s)
                linked[row] = person
        for row, (track_id, x, y, height) in enumerate(unassigned):
            if row not in linked:
                person = TrackedPerson(self._next_id, track_id, x, y, height, timestamp_s, timestamp_s)
                self._persons[self._next_id] = linked[row] = person
                self._next_id += 1
        return [(unassigned[row][0], person) for row, person in linked.items()]


def _compute_gap(
    person: TrackedPerson, x: float, y: float, height: float, timestamp_s: float, gate: tuple[float, float]
) -> float:
    """Return the distance from the way to the predicted position, relative to the limit for the same person."""
    to_x, to_y = x - person.x, y - person.y
    ahead_x, ahead_y = (
        end - start for end, start in zip(person.predict(timestamp_s), (person.x, person.y), strict=True)
    )
    along = (to_x * ahead_x + to_y * ahead_y) / max(ahead_x**2 + ahead_y**2, 1e-9)
    along = min(max(along, 0.0), 1.0)  # people may stop
    limit = (height + person.height) / 2 * (gate[0] + gate[1] * (timestamp_s - person.last_s))
    return float(np.hypot(to_x - along * ahead_x, to_y - along * ahead_y)) / limit
