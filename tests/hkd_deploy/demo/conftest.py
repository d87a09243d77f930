"""Simulated people on known paths, with the exact crossings and stays: ground truth of tracking and counting.

`simulate_street`: people walk over a vertical line and through a rectangular zone. The detections of them have jitter,
misses and hidden people; the frames have irregular times. The ground truth is read off the paths, without the package.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from hkd_det.structures import Detections

SIZE_HW = (720, 1280)
LINE_X = 500.0
ZONE_XYXY = (800.0, 300.0, 1000.0, 600.0)
HEIGHT_PX = 150.0


@dataclass
class SimulatedFrame:
    time_s: float
    detections: Detections
    person_ids: np.ndarray  # of each detection


@dataclass
class SimulatedStreet:
    frames: list[SimulatedFrame] = field(default_factory=list)
    crossings: dict[str, int] = field(default_factory=lambda: {"left": 0, "right": 0})
    stays: list[tuple[float, float]] = field(default_factory=list)  # begin and end, seconds

    size_hw = SIZE_HW
    line = ((LINE_X / 1280, 1.0), (LINE_X / 1280, 0.2))  # upwards: larger x is to the right
    zone = tuple((ZONE_XYXY[i] / 1280, ZONE_XYXY[j] / 720) for i, j in ((0, 1), (2, 1), (2, 3), (0, 3)))


def make_path(kind: str, start_s: float, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Return the corners of a path: time, x, y."""
    is_from_left, speed, y = rng.random() < 0.5, rng.uniform(100, 160), rng.uniform(330, 690)
    start, end = (-40.0, 1320.0) if is_from_left else (1320.0, -40.0)
    side = -1 if is_from_left else 1
    stops = {
        "through": [(end, 0.0)],
        "touch": [(LINE_X + 0.3 * HEIGHT_PX * side, 0.0), (start, 0.0)],
        "return": [(LINE_X - 0.6 * HEIGHT_PX * side, 0.0), (start, 0.0)],
        "stay": [(rng.uniform(850, 950), rng.uniform(3, 8)), (end, 0.0)],
    }[kind]
    corners = [(start_s, start, y)]
    for x, wait_s in stops:
        corners.append((corners[-1][0] + abs(x - corners[-1][1]) / speed, x, y))
        if wait_s:
            corners.append((corners[-1][0] + wait_s, x, y))
    return corners


def locate(path: list[tuple[float, float, float]], time_s: float) -> tuple[float, float] | None:
    """Return the position at a time, None before and after the path."""
    if not path[0][0] <= time_s <= path[-1][0]:
        return None
    times, xs, ys = zip(*path, strict=True)
    return float(np.interp(time_s, times, xs)), float(np.interp(time_s, times, ys))


def add_ground_truth(street: SimulatedStreet, path: list[tuple[float, float, float]], end_s: float) -> None:
    times = np.arange(path[0][0], min(path[-1][0], end_s), 0.01)
    points = [locate(path, float(time)) for time in times]
    points_xy = [point for point in points if point]
    for before, after in pairwise(point[0] > LINE_X for point in points_xy):
        if before != after:
            street.crossings["right" if after else "left"] += 1
    x1, y1, x2, y2 = ZONE_XYXY
    inside = [x1 <= x <= x2 and y1 <= y <= y2 for x, y in points_xy]
    edges = np.flatnonzero(np.diff([False, *inside, False]))
    for first, last in edges.reshape(-1, 2):
        street.stays.append((float(times[first]), float(times[last - 1])))


def is_hidden(feet: tuple[float, float], others: list[tuple[float, float]]) -> bool:
    """Return whether a nearer person covers most of this one."""
    return any(abs(x - feet[0]) < 25 and 0 < y - feet[1] < 60 for x, y in others)


def simulate(
    seconds: float = 120,
    fps: float = 12,
    jitter: float = 0.02,
    misses: float = 0.1,
    gap_s: float = 0.9,
    every_s: float = 2,
    seed: int = 0,
) -> SimulatedStreet:
    """Simulate people whose boxes are HEIGHT_PX high.

    Args:
        seconds: Duration.
        fps: Mean number of frames per second. A quarter of the frames is skipped.
        jitter: Standard deviation of each side of a box, relative to its height.
        misses: Ratio of missing detections.
        gap_s: Each person is missed once for up to this time, seconds.
        every_s: Time between two persons.
        seed: Seed.
    """
    rng = np.random.default_rng(seed)
    kinds = ("through", "touch", "through", "return", "stay")
    starts = np.arange(0, seconds - 12, every_s)
    paths = [make_path(kinds[index % 5], float(start), rng) for index, start in enumerate(starts)]
    gaps = [
        (gap, gap + gap_s * rng.uniform(0.3, 1)) for gap in (rng.uniform(path[0][0], path[-1][0]) for path in paths)
    ]
    street = SimulatedStreet()
    for path in paths:
        add_ground_truth(street, path, seconds)
    for number in range(round(seconds * fps / 0.75)):
        if rng.random() < 0.25:
            continue
        time_s = number / fps * 0.75
        feet = {index: point for index, path in enumerate(paths) if (point := locate(path, time_s))}
        boxes, person_ids = [], []
        for index, (x, y) in feet.items():
            is_missed = rng.random() < misses or gaps[index][0] <= time_s < gaps[index][1]
            others = [point for other, point in feet.items() if other != index]
            if is_missed or is_hidden((x, y), others):
                continue
            box = np.array([x - 0.2 * HEIGHT_PX, y - HEIGHT_PX, x + 0.2 * HEIGHT_PX, y])
            boxes.append(box + rng.normal(0, jitter * HEIGHT_PX, 4))
            person_ids.append(index)
        scores = rng.uniform(0.4, 0.9, len(boxes))
        order = np.argsort(-scores)
        detections = Detections(np.reshape(boxes, (-1, 4))[order], scores[order])
        street.frames.append(SimulatedFrame(time_s, detections, np.array(person_ids, np.int64)[order]))
    return street


@pytest.fixture(scope="session")
def simulate_street() -> Callable[..., SimulatedStreet]:
    return simulate
