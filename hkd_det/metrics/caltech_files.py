"""Caltech's truth and detections as its benchmark has them on disk, 1-based pixels kept as they are.

Truth: a folder of `set06/V000.vbb` (old annotations), of text files (new ones), or a `gt-SETUP.mat` that an official
program has written. Detections: `set06/V000.txt` a video, lines of `frame x y w h score`, frames from 1.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.caltech import (
    PERSON,
    TEST_FRAME_STEP,
    TEST_SETS,
    CaltechFrame,
    read_corrected_annotations,
    read_original_annotations,
)
from hkd_det.datasets.mat_file import read_mat, to_float_array
from hkd_det.errors import DataError
from hkd_det.metrics.caltech import AnnotationVersion, count_test_frames
from hkd_det.metrics.tables import DetectionTable, Floats, GroundTruthTable, is_valid_box

CORRECTED_PERSON_LABELS = ("person", "person?", "people")  # of these the new annotations' programs make no difference


@dataclass(frozen=True, eq=False)
class CaltechGroundTruth:
    """frames: (video, frame from 1) of each picture, none where the file does not say. filtered: see `evaluate`."""

    path: Path
    frames: tuple[tuple[str, int], ...]
    table: GroundTruthTable
    is_prefiltered: bool


def read_caltech_ground_truth(
    path: Path, annotation_version: AnnotationVersion, set_names: list[str] | None = None
) -> CaltechGroundTruth:
    """The truth of the sets; by default of the test sets (set06 to set10) that are there.

    Raises DataError, naming the file, for what is missing or wrong.
    """
    if path.is_file():
        return _read_gt_mat(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder of annotations, or gt-SETUP.mat")
    wanted = set_names or [name for name in TEST_SETS if next(path.rglob(f"*{name}*"), None)]
    if not wanted:
        raise DataError(f"{path}: holds none of the test sets {TEST_SETS[0]} to {TEST_SETS[-1]}; --sets takes others")
    read = read_original_annotations if annotation_version is AnnotationVersion.ORIGINAL else read_corrected_annotations
    frames = list(read(path, wanted, TEST_FRAME_STEP))
    return CaltechGroundTruth(
        path, tuple((one.video, one.index + 1) for one in frames), _build_gt_table(frames, annotation_version), False
    )


def read_caltech_detections(folder: Path, ground_truth: CaltechGroundTruth) -> DetectionTable:
    """All videos' detections in the truth's frames; those in other frames are left out, as the benchmark does.

    Raises DataError, naming file and line, for a missing video and for wrong lines.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; Caltech's detections are files set06/V000.txt in one")
    frames = ground_truth.frames or _infer_frames(folder, ground_truth)
    index = {frame: number for number, frame in enumerate(frames)}
    picture, rows = [], [np.zeros((0, 6))]
    for video in dict.fromkeys(video for video, _ in frames):
        lines = _read_video_detections(folder / f"{video}.txt")
        places = np.array([index.get((video, int(frame)), -1) for frame in lines[:, 0]], np.intp)
        if len(lines) and (places < 0).all():
            raise DataError(
                f"{folder / video}.txt: none of its frames {int(lines[0, 0])}, ... is evaluated; "
                f"frames count from 1, every {TEST_FRAME_STEP}th is ({TEST_FRAME_STEP}, {2 * TEST_FRAME_STEP}, ...)"
            )
        picture.append(places[places >= 0])
        rows.append(lines[places >= 0])
    found = np.concatenate(rows)
    where = np.concatenate(picture) if picture else np.zeros(0, np.intp)
    return DetectionTable.from_rows(where, found[:, 1:5], found[:, 5])


def _build_gt_table(frames: list[CaltechFrame], annotation_version: AnnotationVersion) -> GroundTruthTable:
    kept = [_has_known_label(frame) for frame in frames]
    boxes = np.concatenate([one.annotations.boxes_xywh[keep] for one, keep in zip(frames, kept, strict=True)])
    return GroundTruthTable(
        len(frames),
        np.repeat(np.arange(len(frames)), [int(keep.sum()) for keep in kept]),
        boxes,
        boxes[:, 3],
        np.concatenate(
            [_compute_visible_ratios(one, annotation_version)[keep] for one, keep in zip(frames, kept, strict=True)]
        ),
        np.concatenate(
            [_compute_ignore_mask(one, annotation_version)[keep] for one, keep in zip(frames, kept, strict=True)]
        ),
    )


def _has_known_label(frame: CaltechFrame) -> NDArray[np.bool_]:
    """The labels that the official programs load; `person-fa` is none of them."""
    return np.array([label in (*CORRECTED_PERSON_LABELS, "ignore") for label in frame.annotations.labels], bool)


def _compute_ignore_mask(frame: CaltechFrame, annotation_version: AnnotationVersion) -> NDArray[np.bool_]:
    if annotation_version is AnnotationVersion.ORIGINAL:
        return np.array([label != PERSON for label in frame.annotations.labels], bool)
    return frame.annotations.ignore | np.array(
        [label not in CORRECTED_PERSON_LABELS for label in frame.annotations.labels], bool
    )


def _compute_visible_ratios(frame: CaltechFrame, annotation_version: AnnotationVersion) -> Floats:
    """Of people who are not occluded: inf (old) or 1 (new). Where the visible box is the box: 1 (old) or 0 (new)."""
    whole, seen = frame.annotations.boxes_xywh, frame.annotations.visible_xywh
    unmarked = (seen == 0).all(1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a box without area has the share that MATLAB gives it
        share = (seen[:, 2] * seen[:, 3]) / (whole[:, 2] * whole[:, 3])
    if annotation_version is AnnotationVersion.ORIGINAL:
        return np.where(unmarked, np.inf, share)
    return np.where(~frame.annotations.occluded | unmarked, 1.0, np.where((seen == whole).all(1), 0.0, share))


def _read_gt_mat(path: Path) -> CaltechGroundTruth:
    """A cell array `gt` of (1, pictures), rows x y w h ignore."""
    cells = read_mat(path).get("gt")
    if not isinstance(cells, np.ndarray) or cells.dtype != object:
        raise DataError(f"{path}: holds no cell array gt; expected a gt-SETUP.mat of the official programs")
    parts = []
    for number, cell in enumerate(cells.ravel(), 1):
        try:
            rows = to_float_array(cell)
        except ValueError as error:
            raise DataError(f"{path}: picture {number}: {error}") from None
        if rows.size and (rows.ndim != 2 or rows.shape[1] != 5):
            raise DataError(f"{path}: picture {number}: rows of the shape {rows.shape}, expected x y w h ignore")
        rows = rows.reshape(-1, 5)
        wrong = ~(is_valid_box(rows[:, :4]) & np.isfinite(rows[:, 4]))
        if wrong.any():
            row = rows[wrong][0].tolist()
            raise DataError(f"{path}: picture {number}: {row} is not x y w h ignore with finite sizes from 0")
        parts.append(rows)
    rows = np.concatenate([np.zeros((0, 5)), *parts])
    table = GroundTruthTable(
        len(parts),
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        rows[:, :4],
        rows[:, 3],
        np.ones(len(rows)),
        rows[:, 4] != 0,
    )
    return CaltechGroundTruth(path, (), table, True)


def _infer_frames(folder: Path, ground_truth: CaltechGroundTruth) -> tuple[tuple[str, int], ...]:
    """The frames of a gt-SETUP.mat, which names none: as far as the detections reach, else those of the test sets."""
    videos = sorted(path for name in TEST_SETS for path in (folder / name).glob("V*.txt"))
    counts = {
        f"{path.parent.name}/{path.stem}": int(_read_video_detections(path)[:, 0].max(initial=0)) // TEST_FRAME_STEP
        for path in videos
    }
    reach, measured = sum(counts.values()), count_test_frames()
    if reach != ground_truth.table.num_images == sum(measured.values()):
        counts = measured  # a detector that is silent in some video's last frame reaches less far
    elif reach != ground_truth.table.num_images:
        raise DataError(
            f"{ground_truth.path}: has {ground_truth.table.num_images} frames but does not say of which videos, and the detections in "
            f"{folder} reach {reach}; give the folder of annotations in its place"
        )
    return tuple((video, TEST_FRAME_STEP * number) for video, count in counts.items() for number in range(1, count + 1))


def _read_video_detections(path: Path) -> Floats:
    """[D, 6] frame, x, y, w, h, score."""
    try:
        text = path.read_text(encoding="utf-8-sig").replace(",", " ")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a video in which nothing was found has an empty one") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file; expected lines of `frame x y w h score`") from None
    lines = [line.split() for line in text.splitlines() if line.strip()]
    try:
        rows = np.array(lines, np.float64).reshape(-1, 6)
    except ValueError:
        rows = np.full((1, 6), np.nan)
    if not _is_valid_detection(rows).all() or len(rows) != len(lines):
        raise DataError(_format_first_error(path, text))
    return rows


def _is_valid_detection(rows: Floats) -> NDArray[np.bool_]:
    frames = rows[:, 0]
    return np.isfinite(rows).all(1) & is_valid_box(rows[:, 1:5]) & (frames >= 1) & (frames == np.floor(frames))


def _format_first_error(path: Path, text: str) -> str:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            row = [np.nan]
        if row and not (len(row) == 6 and _is_valid_detection(np.array([row]))[0]):
            told = line.strip()[:60]
            return f"{path}, line {number}: {told!r} is not `frame x y w h score` with frames from 1, sizes from 0"
    return f"{path}: not lines of `frame x y w h score`"
