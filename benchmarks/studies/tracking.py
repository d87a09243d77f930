"""Tracking, line crossings and stays in zones against exact ground truth.

    python benchmarks/studies/tracking.py SEQUENCE ... --model hkd-cpu
    python benchmarks/studies/tracking.py SEQUENCE ... --noise 0.02 --misses 0.1

A sequence is a directory of the MOTChallenge form: `gt/gt.txt`, `seqinfo.ini`, and the images in `img1` or a video
`*.mp4`. With a file `truth.json`, crossings and stays are evaluated too. It contains `fps`, `line` and `zone` in
pixels, `counts` (`left`, `right`) and `stays` (`first_frame`, `last_frame`, from 0). HOTA, MOTA and IDF1 are computed
by the package `trackers`, whose code follows TrackEval. Boxes are those of the detector (`--model`), or the annotated
ones with noise (`--noise`).
"""

import argparse
import configparser
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from tabulate import tabulate
from trackers.eval import evaluate_mot_sequence

from hkd_deploy import open_detector
from hkd_deploy.demo.base import CountEvent
from hkd_deploy.demo.cameras import Line, Zone
from hkd_deploy.demo.counting import LEFT, RIGHT, SceneCounter
from hkd_deploy.demo.tracking import NO_TRACK, PersonTracker
from hkd_deploy.streams import open_source
from hkd_det.structures import Detections

MAX_DWELL_ERROR_S = 1.0
NOISE_CONF = 0.3


@dataclass
class TrackingResult:
    """Result of one sequence.

    Attributes:
        rows: Tracked boxes in the MOTChallenge form: frame from 1, id, box x, y, width, height.
        events: Crossings, entries and exits.
        inference_ms, tracking_ms, counting_ms: Time of each frame.
    """

    rows: list[str] = field(default_factory=list)
    events: list[CountEvent] = field(default_factory=list)
    inference_ms: list[float] = field(default_factory=list)
    tracking_ms: list[float] = field(default_factory=list)
    counting_ms: list[float] = field(default_factory=list)


def main() -> None:
    """Print a table with a row for each sequence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequences", type=Path, nargs="+", metavar="SEQUENCE")
    parser.add_argument("--model", default="hkd-cpu", help="detector (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the detector (default: %(default)s)")
    parser.add_argument("--conf", type=float, help="minimum score (default: that of the model)")
    parser.add_argument("--noise", type=float, help="use annotated boxes; standard deviation of each side, box heights")
    parser.add_argument("--misses", type=float, default=0.1, help="ratio of missing boxes with --noise (%(default)s)")
    parser.add_argument("--min-visible", type=float, default=0.3, help="visible ratio of boxes with --noise")
    parser.add_argument("--frame-step", type=int, default=1, help="use every Nth frame (default: %(default)s)")
    flags = parser.parse_args()
    rows = [evaluate_sequence(directory, flags) for directory in flags.sequences]
    print(tabulate(rows, headers="keys", floatfmt=".3f"))


def evaluate_sequence(directory: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Track one sequence and compare it with the ground truth.

    Args:
        directory: The sequence.
        flags: Arguments of the command.

    Returns:
        Columns of the table.
    """
    truth_path = directory / "truth.json"
    truth = json.loads(truth_path.read_text(encoding="utf-8")) if truth_path.exists() else None
    info = configparser.ConfigParser()
    info.read(directory / "seqinfo.ini")
    size_wh = info.getint("Sequence", "imWidth"), info.getint("Sequence", "imHeight")
    fps = info.getfloat("Sequence", "frameRate")
    counter = SceneCounter(
        [Line("line", tuple(normalize(truth["line"], size_wh)))] if truth else [],
        [Zone("zone", tuple(normalize(truth["zone"], size_wh)))] if truth else [],
    )
    if flags.noise is None:
        frames, conf = detect_frames(directory, flags)
    else:
        frames, conf = perturb_ground_truth(directory, flags), NOISE_CONF
    result = track_frames(frames, conf, counter, size_wh[::-1], fps, flags.frame_step)
    columns = {"sequence": directory.name, **score_tracks(directory, result.rows, flags.frame_step)}
    if truth:
        columns |= score_counts(truth, result.events)
    for name in ("inference", "tracking", "counting"):
        times = getattr(result, f"{name}_ms")
        columns[f"{name} ms"] = float(np.mean(times)) if times else 0.0
    return columns


def normalize(points: list[list[float]], size_wh: tuple[int, int]) -> list[tuple[float, float]]:
    """Convert pixels to 0 to 1.

    Args:
        points: x, y in pixels.
        size_wh: Width and height of the images, pixels.
    """
    return [(x / size_wh[0], y / size_wh[1]) for x, y in points]


def detect_frames(directory: Path, flags: argparse.Namespace) -> tuple[Iterator[tuple[int, Detections, float]], float]:
    """Run the detector on the images.

    Args:
        directory: The sequence.
        flags: Arguments of the command.

    Returns:
        frames: Frame number from 0, detections, and inference time in ms.
        conf: Minimum score.
    """
    images = directory / "img1"
    path = images if images.is_dir() else next(iter(sorted(directory.glob("*.mp4"))))
    detector = open_detector(flags.model, threads=flags.threads)

    def iterate() -> Iterator[tuple[int, Detections, float]]:
        with detector, open_source(str(path)) as source:
            for index, frame in enumerate(source):
                if index % flags.frame_step == 0:
                    detections, times = detector.predict_timed(frame.image_rgb)
                    yield index, detections, times.total_ms

    return iterate(), detector.default_conf if flags.conf is None else flags.conf


def perturb_ground_truth(directory: Path, flags: argparse.Namespace) -> Iterator[tuple[int, Detections, float]]:
    """Use the annotated boxes as detections, with noise and misses.

    Args:
        directory: The sequence.
        flags: Arguments of the command.

    Yields:
        Frame number from 0, detections, and 0.
    """
    rng = np.random.default_rng(0)
    rows = np.loadtxt(directory / "gt" / "gt.txt", delimiter=",")
    for index in range(0, int(rows[:, 0].max()), flags.frame_step):
        boxes = rows[(rows[:, 0] == index + 1) & (rows[:, 8] >= flags.min_visible)][:, 2:6]
        boxes = boxes[rng.random(len(boxes)) >= flags.misses] - (1, 1, 0, 0)
        noise = rng.normal(0, flags.noise, boxes.shape) * boxes[:, 3:4]
        boxes[:, 2:] += boxes[:, :2]
        yield index, Detections(boxes + noise, rng.uniform(NOISE_CONF, 1, len(boxes))), 0.0


def track_frames(
    frames: Iterator[tuple[int, Detections, float]],
    conf: float,
    counter: SceneCounter,
    image_hw: tuple[int, int],
    fps: float,
    frame_step: int,
) -> TrackingResult:
    """Track and count.

    Args:
        frames: Frame number from 0, detections, inference time.
        conf: Minimum score.
        counter: Lines and zones.
        image_hw: Height and width of the images, pixels.
        fps: Frames per second.
        frame_step: Only every Nth frame is used.

    Returns:
        Tracks, events and times.
    """
    tracker, result, timestamp_s = PersonTracker(conf), TrackingResult(), 0.0
    for index, detections, inference_ms in frames:
        timestamp_s = index / fps
        start_s = perf_counter()
        track_ids = tracker.update(detections, image_hw, timestamp_s)
        tracked_s = perf_counter()
        is_shown = detections.scores >= conf
        shown, track_ids = detections[is_shown], track_ids[is_shown]
        counter.update(shown, track_ids, image_hw, timestamp_s)
        result.events += counter.new_events
        result.inference_ms.append(inference_ms)
        result.tracking_ms.append(1e3 * (tracked_s - start_s))
        result.counting_ms.append(1e3 * (perf_counter() - tracked_s))
        for (x1, y1, x2, y2), track_id in zip(shown.boxes_xyxy.tolist(), track_ids.tolist(), strict=True):
            if track_id == NO_TRACK:
                continue
            box = f"{x1 + 1:.2f},{y1 + 1:.2f},{x2 - x1:.2f},{y2 - y1:.2f}"
            result.rows.append(f"{index // frame_step + 1},{track_id},{box},1,-1,-1,-1")
    end_s = timestamp_s + 60  # all stays have ended
    counter.update(Detections.empty(), np.zeros(0, np.int64), image_hw, end_s)
    result.events += counter.new_events
    return result


def score_tracks(directory: Path, rows: list[str], frame_step: int) -> dict[str, Any]:
    """Compute HOTA, MOTA and IDF1.

    Args:
        directory: The sequence.
        rows: Tracks in the MOTChallenge form.
        frame_step: Only every Nth frame is used.

    Returns:
        Columns of the table.
    """
    annotated = []
    for line in (directory / "gt" / "gt.txt").read_text(encoding="utf-8").splitlines():
        number, rest = line.split(",", 1)
        if (int(number) - 1) % frame_step == 0:
            annotated.append(f"{(int(number) - 1) // frame_step + 1},{rest}")
    with tempfile.TemporaryDirectory() as temp_dir:
        paths = Path(temp_dir) / "gt.txt", Path(temp_dir) / "tracks.txt"
        for path, lines in zip(paths, (annotated, rows), strict=True):
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        metrics = evaluate_mot_sequence(*paths, metrics=["CLEAR", "HOTA", "Identity"])
    return {
        "HOTA": metrics.HOTA.HOTA,
        "MOTA": metrics.CLEAR.MOTA,
        "IDF1": metrics.Identity.IDF1,
        "recall": metrics.CLEAR.CLR_Re,
        "id switches": int(metrics.CLEAR.IDSW),
    }


def score_counts(truth: dict[str, Any], events: list[CountEvent]) -> dict[str, Any]:
    """Compare crossings and stays with the ground truth.

    Args:
        truth: Content of `truth.json`.
        events: Events of the counters.

    Returns:
        Columns of the table.
    """
    columns: dict[str, Any] = {}
    for direction in (LEFT, RIGHT):
        count = sum(event.event == "crossing" and event.direction == direction for event in events)
        columns[direction] = f"{count} of {truth['counts'][direction]}"
    stays = np.array(
        [(event.timestamp_s - event.dwell_s, event.timestamp_s) for event in events if event.dwell_s is not None]
    )
    true_stays = np.array([(stay["first_frame"], stay["last_frame"] + 1) for stay in truth["stays"]]) / truth["fps"]
    errors_s = compute_dwell_errors(stays.reshape(-1, 2), true_stays.reshape(-1, 2))
    return columns | {
        "stays": f"{len(stays)} of {len(true_stays)}",
        "within 1 s": f"{np.mean(errors_s <= MAX_DWELL_ERROR_S):.0%}",
        "median error s": float(np.median(errors_s)),
    }


def compute_dwell_errors(stays: NDArray[np.float64], true_stays: NDArray[np.float64]) -> NDArray[np.float64]:
    """Match stays by their common time, and compute the difference of the durations.

    Args:
        stays (array[N, 2]): Begin and end, seconds.
        true_stays (array[M, 2]): Begin and end, seconds.

    Returns:
        array[M]: Absolute difference, seconds. The duration of a true stay without a match.
    """
    common = np.minimum(stays[:, None, 1], true_stays[None, :, 1]) - np.maximum(
        stays[:, None, 0], true_stays[None, :, 0]
    )
    rows, columns = linear_sum_assignment(-np.maximum(common, 0))
    dwell_s = np.zeros(len(true_stays))
    for row, column in zip(rows, columns, strict=True):
        if common[row, column] > 0:
            dwell_s[column] = stays[row, 1] - stays[row, 0]
    return np.abs(dwell_s - (true_stays[:, 1] - true_stays[:, 0]))


if __name__ == "__main__":
    main()
