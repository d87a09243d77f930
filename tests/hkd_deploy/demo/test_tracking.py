"""Track ids of simulated people: stable while frames are skipped, new after a gap, and never used twice."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hkd_deploy.demo.tracking import NO_TRACK, PersonTracker
from hkd_det.errors import UnavailableError
from hkd_det.structures import Detections

HW = (720, 1280)


def make_detections(*boxes: tuple[float, ...], scores: tuple[float, ...] | None = None) -> Detections:
    return Detections(np.array(boxes, float).reshape(-1, 4), np.array(scores or [0.9] * len(boxes)))


def walk(time_s: float, speed: float = 150, y: float = 0) -> tuple[float, ...]:
    """Return the box of a person that is 150 px high and walks to the right."""
    return 100 + speed * time_s, y, 160 + speed * time_s, y + 150


@pytest.mark.parametrize("interval_s", [0.04, 0.1, 0.25])
def test_id_is_stable_at_any_frame_rate(interval_s: float) -> None:
    tracker = PersonTracker(0.3)
    ids = [
        tracker.update(make_detections(walk(number * interval_s)), HW, number * interval_s)[0] for number in range(20)
    ]
    assert set(ids[2:]) == {1}


def test_id_survives_irregular_frames_and_misses() -> None:
    tracker, rng, ids = PersonTracker(0.3), np.random.default_rng(1), []
    for time_s in np.cumsum(rng.uniform(0.03, 0.25, 60)):
        if 3.0 < time_s < 3.6:
            tracker.update(Detections.empty(), HW, time_s)
        else:
            ids.append(tracker.update(make_detections(walk(time_s)), HW, time_s)[0])
    assert set(ids[2:]) == {1}


def test_ids_belong_to_the_detections_in_any_order() -> None:
    """Detections are sorted by score; the score of two people exceeds that of the other in turn."""
    tracker = PersonTracker(0.3)
    for number in range(12):
        scores = (0.9, 0.5) if number % 2 else (0.5, 0.9)
        boxes = walk(number / 10), walk(number / 10, -100, 400)
        ids = tracker.update(detections := make_detections(*boxes, scores=scores), HW, number / 10)
        if number == 5:
            of_upper = {int(detections.boxes_xyxy[row, 1] == 0): ids[row] for row in (0, 1)}
    assert {int(detections.boxes_xyxy[row, 1] == 0): ids[row] for row in (0, 1)} == of_upper
    assert set(of_upper.values()) == {1, 2}


def test_low_score_continues_but_does_not_start_a_track() -> None:
    tracker = PersonTracker(0.5)
    for number in range(8):
        score = 0.9 if number < 4 else 0.3
        boxes = walk(number / 10), walk(number / 10, 100, 400)
        detections = make_detections(*boxes, scores=(score, 0.29))
        ids = dict(zip(detections.boxes_xyxy[:, 1], tracker.update(detections, HW, number / 10), strict=True))
    assert ids == {0.0: 1, 400.0: NO_TRACK}


def test_long_gap_starts_new_ids() -> None:
    tracker = PersonTracker(0.3, max_lost_s=1.5)
    start_times_s = (0.0, 1.4, 10.0, 3.0)  # the last one is before the previous frame
    ids = [
        [tracker.update(make_detections(walk(0)), HW, start_s + number / 10)[0] for number in range(4)][-1]
        for start_s in start_times_s
    ]
    assert ids == [1, 1, 2, 3]


def test_equal_times_and_empty_frames() -> None:
    tracker = PersonTracker(0.3)
    assert all(len(tracker.update(Detections.empty(), HW, time_s)) == 0 for time_s in (0.0, 0.0, 5.0))
    for _ in range(3):
        ids = tracker.update(make_detections(walk(0)), HW, 5.0)
    assert ids.tolist() == [1]


@pytest.mark.slow
def test_people_who_meet_keep_their_ids(simulate_street: Callable[..., Any]) -> None:
    street = simulate_street(seconds=90, gap_s=0, seed=3)
    tracker, ids_of_person = PersonTracker(0.3), {}
    for frame in street.frames:
        for person, track_id in zip(frame.person_ids, tracker.update(frame.detections, HW, frame.time_s), strict=True):
            if track_id != NO_TRACK:
                ids_of_person.setdefault(int(person), []).append(int(track_id))
    main_ids = [max(set(ids), key=ids.count) for ids in ids_of_person.values()]
    num_right = sum(ids.count(main_id) for ids, main_id in zip(ids_of_person.values(), main_ids, strict=True))
    assert len(set(main_ids)) >= 0.9 * len(main_ids)
    assert num_right >= 0.85 * sum(map(len, ids_of_person.values()))


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(UnavailableError, match=r"^trackers: not installed\. Run pip install 'hkd-det\[track\]'\.$"):
        PersonTracker(0.3)
