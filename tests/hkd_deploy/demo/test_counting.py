"""Crossings, stays and density of simulated people, with jitter, misses and wrong ids, against exact ground truth."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from hkd_deploy.demo.base import CountEvent
from hkd_deploy.demo.cameras import Line, Zone
from hkd_deploy.demo.counting import SceneCounter
from hkd_deploy.demo.density import DensityWindow, HeatMap
from hkd_deploy.demo.tracking import PersonTracker
from hkd_det.structures import Detections

HW = (720, 1280)
LINE = ((0.5, 1.0), (0.5, 0.25))  # x = 640, y from 720 to 180, upwards
ZONE = ((0.25, 0.25), (0.5, 0.25), (0.5, 0.75), (0.25, 0.75))  # x 320 to 640, y 180 to 540


def count(
    counter: SceneCounter, track: Iterable[tuple[float, int, float, float]], end_s: float | None = 100
) -> list[CountEvent]:
    """Count people that are 150 px high, given as time, id, x and y of the feet. Rows of the same time are a frame."""
    events, rows = [], list(track)
    for time_s in sorted({row[0] for row in rows}):
        feet = [row for row in rows if row[0] == time_s]
        boxes = [(x - 30, y - 150, x + 30, y) for _, _, x, y in feet]
        detections = Detections(np.array(boxes), np.full(len(feet), 0.9))
        counter.update(detections, np.array([row[1] for row in feet]), HW, time_s)
        events += counter.new_events
    if end_s is not None:
        counter.update(Detections.empty(), np.zeros(0, np.int64), HW, end_s)
        events += counter.new_events
    return events


def walk(
    start_x: float, end_x: float, start_s: float = 0, seconds: float = 4, track_id: int = 1, y: float = 400
) -> list[tuple[float, int, float, float]]:
    """Return a track with 10 frames per second."""
    times = start_s + np.arange(0, seconds, 0.1)
    xs = np.linspace(start_x, end_x, len(times))
    return [(round(float(time), 3), track_id, float(x), y) for time, x in zip(times, xs, strict=True)]


def compute_stay_errors(events: list[CountEvent], true_stays: list[tuple[float, float]]) -> np.ndarray:
    """Match stays by their common time. Return the differences of the durations, seconds."""
    stays = np.array([(e.timestamp_s - e.dwell_s, e.timestamp_s) for e in events if e.dwell_s is not None])
    truth = np.array(true_stays)
    common = np.minimum(stays[:, None, 1], truth[:, 1]) - np.maximum(stays[:, None, 0], truth[:, 0])
    rows, columns = linear_sum_assignment(-np.maximum(common, 0))
    dwell_s = np.zeros(len(truth))
    dwell_s[columns] = (stays[:, 1] - stays[:, 0])[rows]
    return np.abs(dwell_s - (truth[:, 1] - truth[:, 0]))


def run_street(street: Any, track: Callable[[Any], np.ndarray]) -> tuple[SceneCounter, list[CountEvent]]:
    counter, events = SceneCounter([Line("line", street.line)], [Zone("zone", street.zone)]), []
    for frame in street.frames:
        counter.update(frame.detections, track(frame), street.size_hw, frame.time_s)
        events += counter.new_events
    counter.update(Detections.empty(), np.zeros(0, np.int64), street.size_hw, 1e4)
    events += counter.new_events
    return counter, events


@pytest.mark.slow
def test_tracked_people_are_counted(simulate_street: Callable[..., Any]) -> None:
    """The bounds: crossings within 2 %, stays within 1 s; over twice 2 minutes with misses and skipped frames."""
    num_counted, num_true, errors, num_stays = 0, 0, [], 0
    for seed in (2, 4):
        street = simulate_street(seed=seed, fps=10)
        tracker = PersonTracker(0.3)
        counter, events = run_street(
            street, lambda frame, t=tracker, street=street: t.update(frame.detections, street.size_hw, frame.time_s)
        )
        num_counted += sum(counter.lines[0].counts.values())
        num_true += sum(street.crossings.values())
        errors += compute_stay_errors(events, street.stays).tolist()
        num_stays += counter.zones[0].num_exits
    assert num_true > 100
    assert num_counted == pytest.approx(num_true, rel=0.02)
    assert num_stays == pytest.approx(len(errors), rel=0.02)
    assert np.mean(np.array(errors) <= 1) >= 0.97
    assert np.median(errors) < 0.1


class WrongIds:
    """Ids that change every three seconds, and that two people exchange every two seconds."""

    def __init__(self, seed: int) -> None:
        self._rng, self._ids = np.random.default_rng(seed), {}
        self._num_ids, self._swap_s, self._last_s = 0, 2.0, 0.0

    def __call__(self, frame: Any) -> np.ndarray:
        step_s, self._last_s = frame.time_s - self._last_s, frame.time_s
        persons = frame.person_ids.tolist()
        for person in persons:
            if person not in self._ids or self._rng.random() < step_s / 3:
                self._num_ids += 1
                self._ids[person] = self._num_ids
        if frame.time_s > self._swap_s and len(persons) >= 2:
            first, second = self._rng.choice(persons, 2, replace=False).tolist()
            self._ids[first], self._ids[second] = self._ids[second], self._ids[first]
            self._swap_s += 2
        return np.array([self._ids[person] for person in persons], np.int64)


def count_by_id(street: Any, track: Callable[[Any], np.ndarray]) -> int:
    """Count every change of the side of an id: the simplest counter."""
    side_of_id: dict[int, bool] = {}
    num_crossings = 0
    for frame in street.frames:
        for track_id, box in zip(track(frame).tolist(), frame.detections.boxes_xyxy, strict=True):
            is_right = (box[0] + box[2]) / 2 > street.line[0][0] * 1280
            num_crossings += side_of_id.setdefault(track_id, is_right) != is_right
            side_of_id[track_id] = is_right
    return num_crossings


@pytest.mark.slow
def test_wrong_ids_do_not_change_counts(simulate_street: Callable[..., Any]) -> None:
    num_counted, num_simple, num_true, errors = 0, 0, 0, []
    for seed in (0, 1, 2):
        street = simulate_street(seed=seed, gap_s=0.3)
        counter, events = run_street(street, WrongIds(seed))
        num_counted += sum(counter.lines[0].counts.values())
        num_simple += count_by_id(street, WrongIds(seed))
        num_true += sum(street.crossings.values())
        errors += compute_stay_errors(events, street.stays).tolist()
    assert num_counted == pytest.approx(num_true, rel=0.02)
    assert np.mean(np.array(errors) <= 1) >= 0.95
    assert num_simple > 1.1 * num_true  # ids alone are not sufficient


@pytest.mark.parametrize(("start_x", "end_x", "direction"), [(400, 880, "right"), (880, 400, "left")])
def test_crossing_has_direction_and_time(start_x: float, end_x: float, direction: str) -> None:
    events = count(SceneCounter([Line("door", LINE)]), walk(start_x, end_x))
    assert [(e.event, e.name, e.track_id, e.direction) for e in events] == [("crossing", "door", 1, direction)]
    assert events[0].timestamp_s == pytest.approx(1.95, abs=0.01)  # half of the way
    assert events[0].to_dict() == {"line": "door", "track_id": 1, "direction": direction}


def test_other_shapes_keep_counts_and_persons() -> None:
    """The lines change while a person is between two of them."""
    first, second, third = (Line(name, ((x, 1), (x, 0.2))) for name, x in (("a", 0.4), ("b", 0.5), ("c", 0.6)))
    counter = SceneCounter([first, second], [Zone("zone", ZONE)])
    track = walk(400, 1000)
    middle = [x > 0.45 * 1280 for _, _, x, _ in track].index(True)
    count(counter, track[:middle], end_s=None)
    other = counter.with_shapes([third, second], [])
    count(other, track[middle:], end_s=None)
    assert [line.name for line in other.lines] == ["c", "b"] and not other.zones
    assert [line.counts["right"] for line in other.lines] == [1, 1]
    assert other.with_shapes([first, third], []).lines[0].counts == {"left": 0, "right": 0}
    assert other.with_shapes([first, third], []).lines[1].counts == {"left": 0, "right": 1}


def test_direction_of_a_sloped_line() -> None:
    """Seen from the first point, downwards to the right, the upper right corner of the image is on the left."""
    counter = SceneCounter([Line("line", ((0, 0), (1, 1)))])
    events = count(counter, [(time, 1, x, 700 - (x - 300)) for time, _, x, _ in walk(300, 900)])
    assert [event.direction for event in events] == ["left"]


@pytest.mark.parametrize("y", [100, 720])
def test_line_has_end_points(y: float) -> None:
    counter = SceneCounter([Line("line", ((0.5, 0.9), (0.5, 0.25)))])
    assert count(counter, walk(400, 880, y=y)) == []


def test_person_on_the_line_is_not_counted() -> None:
    rng = np.random.default_rng(0)
    walked = walk(400, 640)
    stood = [(4 + number / 10, 1, 640 + rng.normal(0, 6), 400.0) for number in range(200)]
    back = walk(640, 400, start_s=24)
    counter = SceneCounter([Line("line", LINE)])
    assert count(counter, walked + stood + back) == []


def test_crossing_and_return_count_twice() -> None:
    counter = SceneCounter([Line("line", LINE)])
    count(counter, walk(400, 700) + walk(700, 400, start_s=4))
    assert counter.lines[0].to_dict() == {"left": 1, "right": 1}


def test_short_track_is_not_counted() -> None:
    assert count(SceneCounter([Line("line", LINE)], [Zone("zone", ZONE)]), walk(600, 700, seconds=0.2)) == []


@pytest.mark.parametrize(
    ("gap_s", "new_x", "expected"),
    [(1.0, 700, 1), (1.0, 1200, 0), (3.0, 700, 0)],
    ids=["near", "too far", "too late"],
)
def test_lost_and_found_across_the_line(gap_s: float, new_x: float, expected: int) -> None:
    track = walk(400, 600, seconds=2) + walk(new_x, new_x + 200, start_s=2 + gap_s, seconds=2, track_id=9)
    events = count(SceneCounter([Line("line", LINE)]), track)
    assert len(events) == expected
    assert all(event.track_id == 9 for event in events)


def test_stay_has_exact_times() -> None:
    """The border is passed at x = 320 and 640, at 100 px per second, and the person stops for 5 s."""
    stood = [(round(3 + number / 10, 3), 1, 500.0, 400.0) for number in range(50)]
    counter = SceneCounter([], [Zone("yard", ZONE)])
    track = walk(200, 497, seconds=3) + stood + walk(500, 798, start_s=8, seconds=3)
    events = count(counter, track)
    assert [(event.event, event.name) for event in events] == [("enter", "yard"), ("exit", "yard")]
    assert events[0].timestamp_s == pytest.approx(1.2, abs=0.1)
    assert events[1].timestamp_s == pytest.approx(9.4, abs=0.1)
    assert events[1].dwell_s == pytest.approx(8.2, abs=0.2)


def test_zone_state_during_and_after_a_stay() -> None:
    counter = SceneCounter([], [Zone("yard", ZONE)])
    count(counter, [(number / 10, 7, 500.0, 400.0) for number in range(31)], end_s=None)
    assert counter.zones[0].compute_dwell_times(3.0) == {7: pytest.approx(3.0)}
    assert counter.zones[0].to_dict()["persons"] == 1
    exits = count(counter, [], end_s=4.0)  # a lost person remains for two seconds
    assert exits == []
    assert counter.zones[0].num_persons == 1
    exits = count(counter, [], end_s=5.5)
    assert exits[0].dwell_s == pytest.approx(3.0)
    expected = {"persons": 0, "entries": 1, "exits": 1, "mean_dwell_s": 3.0, "max_persons_60s": 1}
    assert counter.zones[0].to_dict().items() >= expected.items()


def test_changed_image_size_forgets_persons_and_keeps_counts() -> None:
    counter = SceneCounter([Line("line", LINE)], [Zone("zone", ZONE)])
    count(counter, walk(400, 880), end_s=None)
    boxes = Detections(np.array([(610, 250, 670, 400)]), np.array([0.9]))
    for number in range(20):
        counter.update(boxes, np.array([1]), (1440, 2560), 4 + number / 10)
    assert counter.lines[0].to_dict() == {"left": 0, "right": 1}


def test_repeated_video_keeps_counting() -> None:
    counter = SceneCounter([Line("line", LINE)], [Zone("zone", ZONE)])
    for track_id in (1, 2):  # the times start again
        count(counter, walk(400, 880, track_id=track_id), end_s=None)
    assert counter.lines[0].to_dict() == {"left": 0, "right": 2}
    assert counter.zones[0].num_persons == 0


def test_density_is_weighted_by_time() -> None:
    density = DensityWindow()
    for time_s, num_persons in ((0, 9), (1, 2), (2, 2), (2.5, 6), (3, 6)):
        density.add(time_s, num_persons)
    assert density.mean == pytest.approx((2 * 2 + 6) / 3)
    assert density.maximum == 9
    for second in range(62, 130):
        density.add(second, 1)
    assert (density.mean, density.maximum) == (1, 1)


def test_heat_map_has_seconds_and_places(tmp_path: Path) -> None:
    heat_map, image = HeatMap(), np.full((*HW, 3), 90, np.uint8)
    for number in range(101):
        boxes = [(970, 200, 1030, 400), (170, 300, 230, 500), (570, 500, 630, 720)]  # the last one is cut by the image
        heat_map.add(np.array(boxes, np.float32), number / 10, HW)
    assert heat_map.person_seconds == pytest.approx(20, rel=0.01)
    heat_map.save(tmp_path / "heat.png", image)
    saved = cv2.imread(str(tmp_path / "heat.png"))
    changed = np.abs(saved.astype(int) - 90).sum(-1)
    assert saved.shape == image.shape
    assert changed[390:410, 990:1010].min() > 60
    assert changed[490:510, 190:210].min() > 60
    assert changed[600:, :].max() == changed[:200, :].max() == 0
