"""Log-average miss rate by the Caltech protocol, in the two versions that papers use, and readers of its files.

ORIGINAL uses the original annotations (.vbb) and Dollár's dbEval.m 3.2.1. CORRECTED uses the corrected annotations
(text files of Zhang et al. 2016) and the programs of CSP, ALFNet and Pedestron. The two versions differ in the labels
that count, in the limits of the ranges, and in whether the width of detections is standardized.

Ground truth: a directory of `set06/V000.vbb` (original annotations) or of text files (corrected annotations), or a
`gt-SETUP.mat` written by an official program. Detections: one `set06/V000.txt` per video, with lines of
`frame x y w h score` and frames counted from 1. Coordinates stay 1-based pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from math import inf
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
from hkd_det.metrics.matching import MissRateResult, compute_miss_rate, compute_overlaps, match_detections
from hkd_det.metrics.tables import DetectionTable, Floats, GroundTruthTable, is_valid_box

FPPI_POINTS = tuple((10.0 ** np.arange(-2, 0.25, 0.25)).tolist())
PERSON_ASPECT_RATIO = 0.41  # width / height of every ground-truth box
BOUNDS_XYXY = (5, 5, 635, 475)  # 1-based pixels of 640 x 480; boxes that extend beyond are ignored

# Evaluated frames (every 30th) of each test video, 4,024 in all, in the order of the videos. The lists of test images
# that detectors for the corrected annotations use (set06_V000_I00029.jpg, ...) have the same counts.
NUM_TEST_FRAMES = {
    "set06": (61, 61, 59, 59, *[61] * 15),
    "set07": (61, 61, 61, 61, 65, 72, 61, 61, 61, 61, 61, 60),
    "set08": (59, 59, 61, 61, 61, 61, 61, 61, 61, 56, 56),
    "set09": (62, 62, 61, 61, 59, 66, 61, 61, 61, 61, 61, 62),
    "set10": (*[61] * 11, 57),
}
CORRECTED_PERSON_LABELS = ("person", "person?", "people")  # treated alike by the programs for corrected annotations


class AnnotationVersion(Enum):
    """Version of the Caltech annotations and their evaluation program. The values are names of `--protocol`."""

    ORIGINAL = "caltech"
    CORRECTED = "caltech-new"


@dataclass(frozen=True)
class CaltechSetup:
    """Subset of the ground truth that is evaluated, and the matching rules.

    Attributes:
        name: Name of the setup, for example Reasonable.
        height_px: Range of the box height in pixels.
        visible_ratio: Range of the visible part, 0 to 1. (inf, inf) selects boxes that are not occluded.
        aspect_deviation: Limit of |width / height - `PERSON_ASPECT_RATIO`|. A positive value selects the boxes below
            the limit, a negative value those above its amount. 0 selects all boxes.
        iou_threshold: Smallest overlap of a match, 0 to 1.
        height_margin: Factor by which detections may be outside the height range.
    """

    name: str
    height_px: tuple[float, float]
    visible_ratio: tuple[float, float]
    aspect_deviation: float = 0
    iou_threshold: float = 0.5
    height_margin: float = 1.25


REASONABLE = CaltechSetup("Reasonable", (50, inf), (0.65, inf))
SETUPS: dict[str, CaltechSetup] = {
    setup.name: setup
    for setup in (
        REASONABLE,
        CaltechSetup("All", (20, inf), (0.2, inf)),
        CaltechSetup("Overall", (20, inf), (0.2, inf)),  # the first name of All in the benchmark
        CaltechSetup("Scale=large", (100, inf), (inf, inf)),
        CaltechSetup("Scale=near", (80, inf), (inf, inf)),
        CaltechSetup("Scale=medium", (30, 80), (inf, inf)),
        CaltechSetup("Scale=far", (20, 30), (inf, inf)),
        CaltechSetup("Occ=none", (50, inf), (inf, inf)),
        CaltechSetup("Occ=partial", (50, inf), (0.65, 1)),
        CaltechSetup("Occ=heavy", (50, inf), (0.2, 0.65)),
        CaltechSetup("Ar=all", (50, inf), (inf, inf)),
        CaltechSetup("Ar=typical", (50, inf), (inf, inf), aspect_deviation=0.1),
        CaltechSetup("Ar=atypical", (50, inf), (inf, inf), aspect_deviation=-0.1),
        CaltechSetup("Overlap=25", (50, inf), (0.65, inf), iou_threshold=0.25),
        CaltechSetup("Overlap=50", (50, inf), (0.65, inf), iou_threshold=0.5),
        CaltechSetup("Overlap=75", (50, inf), (0.65, inf), iou_threshold=0.75),
        CaltechSetup("Expand=100", (50, inf), (0.65, inf), height_margin=1.0),
        CaltechSetup("Expand=125", (50, inf), (0.65, inf), height_margin=1.25),
        CaltechSetup("Expand=150", (50, inf), (0.65, inf), height_margin=1.5),
    )
}


def evaluate(
    ground_truth: GroundTruthTable,
    detections: DetectionTable,
    annotation_version: AnnotationVersion,
    setups: Iterable[CaltechSetup] = SETUPS.values(),
    is_prefiltered: bool = False,
) -> dict[str, MissRateResult]:
    """Compute the miss rate of each setup. Boxes are in 1-based pixels, as in the benchmark's files.

    Args:
        ground_truth: Ground truth of all frames. `ignore` contains the ignore regions that follow from the labels;
            `visible_ratio` of boxes that are not occluded is inf (ORIGINAL) or 1 (CORRECTED).
        detections: Detections in the same frames.
        annotation_version: Version of the annotations.
        setups: Setups to evaluate.
        is_prefiltered: The ground truth comes from a gt-SETUP.mat of the official program: the setup is already
            applied and the boxes are reshaped.

    Returns:
        The result of each setup, by its name.
    """
    setups = list(setups)
    if annotation_version is AnnotationVersion.ORIGINAL:
        detections = _standardize_detections(detections)
    gt_boxes = ground_truth.boxes_xywh if is_prefiltered else standardize_aspect_ratio(ground_truth.boxes_xywh)
    min_overlap = min((setup.iou_threshold for setup in setups), default=0.5)
    pairs = compute_overlaps(detections, ground_truth.image_index, gt_boxes, ground_truth.boxes_xywh, min_overlap)
    order = np.argsort(-detections.scores, kind="stable")
    results = {}
    for setup in setups:
        gt_ignore = ground_truth.ignore
        if not is_prefiltered:
            gt_ignore = gt_ignore | ~_is_in_caltech_setup(ground_truth, setup, annotation_version)
        eval_mask = _compute_caltech_eval_mask(detections, setup)
        match_status, _ = match_detections(pairs, eval_mask, gt_ignore, setup.iou_threshold)
        results[setup.name] = compute_miss_rate(
            ground_truth, gt_ignore, detections, match_status, order[eval_mask[order]], FPPI_POINTS, True
        )
    return results


def standardize_aspect_ratio(boxes_xywh: Floats) -> Floats:
    """Set the width of boxes to `PERSON_ASPECT_RATIO` times their height, as bbApply('resize', bb, 1, 0, 0.41).

    Args:
        boxes_xywh (float64 array[N, 4]): Boxes in pixels.

    Returns:
        boxes_xywh (float64 array[N, 4]): Boxes with the same height and center.
    """
    x, y, width, height = boxes_xywh.T
    added_width = height * PERSON_ASPECT_RATIO - width
    return np.stack([x - added_width / 2, y, width + added_width, height], axis=1)


def count_test_frames() -> dict[str, int]:
    """Return the number of evaluated frames of each test video (`set06/V000`, ...), in order."""
    return {
        f"{name}/V{number:03}": count for name, counts in NUM_TEST_FRAMES.items() for number, count in enumerate(counts)
    }


def _standardize_detections(detections: DetectionTable) -> DetectionTable:
    boxes = standardize_aspect_ratio(detections.boxes_xywh)
    return DetectionTable(detections.image_index, boxes, detections.scores, detections.source_row)


def _compute_caltech_eval_mask(detections: DetectionTable, setup: CaltechSetup) -> NDArray[np.bool_]:
    heights = detections.boxes_xywh[:, 3]
    return (heights >= setup.height_px[0] * (1 / setup.height_margin)) & (
        heights < setup.height_px[1] * setup.height_margin
    )


def _is_in_caltech_setup(
    ground_truth: GroundTruthTable, setup: CaltechSetup, annotation_version: AnnotationVersion
) -> NDArray[np.bool_]:
    """Return the boxes, bool array[N], in the ranges of the setup and inside `BOUNDS_XYXY`."""
    is_original = annotation_version is AnnotationVersion.ORIGINAL
    x, y, width, height = ground_truth.boxes_xywh.T
    low, high = setup.height_px
    is_height_in_range = (height >= low) & ((height < high) if is_original else (height <= high))
    min_ratio, max_ratio = setup.visible_ratio
    if not is_original and min_ratio == inf:
        min_ratio = max_ratio = 1.0
    ratio = ground_truth.visible_ratio  # NaN for a box without area: outside in ORIGINAL, inside in CORRECTED
    is_visible = (
        (ratio >= min_ratio) & (ratio <= max_ratio) if is_original else ~((ratio < min_ratio) | (ratio > max_ratio))
    )
    x_min, y_min, x_max, y_max = BOUNDS_XYXY
    is_inside = (x >= x_min) & (x + width <= x_max) & (y >= y_min) & (y + height <= y_max)
    if not is_original:  # the corrected version's programs compare both ends with both limits
        is_inside &= (x <= x_max) & (x + width >= x_min) & (y <= y_max) & (y + height >= y_min)
    return is_height_in_range & is_visible & is_inside & _is_in_aspect_range(width, height, setup.aspect_deviation)


def _is_in_aspect_range(width: Floats, height: Floats, aspect_deviation: float) -> NDArray[np.bool_]:
    if not aspect_deviation:
        return np.ones(len(width), bool)
    ratio = np.divide(width, height, out=np.full(len(width), np.nan), where=height > 0)
    return np.sign(aspect_deviation) * np.abs(ratio - PERSON_ASPECT_RATIO) < aspect_deviation


@dataclass(frozen=True, eq=False)
class CaltechGroundTruth:
    """Ground truth of the evaluated frames.

    Attributes:
        path: Directory or file that was read.
        frames: (video, frame counted from 1) of each image; empty if the file does not contain them.
        table: Ground-truth boxes of all frames.
        is_prefiltered: True for a gt-SETUP.mat, to which the official program has already applied its setup.
    """

    path: Path
    frames: tuple[tuple[str, int], ...]
    table: GroundTruthTable
    is_prefiltered: bool


def read_caltech_ground_truth(
    path: Path, annotation_version: AnnotationVersion, set_names: list[str] | None = None
) -> CaltechGroundTruth:
    """Read the ground truth of every 30th frame.

    Args:
        path: Directory of annotations or a gt-SETUP.mat.
        annotation_version: Version of the annotations in the directory.
        set_names: Sets to read. The default is every test set (set06 to set10) in the directory.

    Returns:
        Ground-truth table and the frame of each image.

    Raises:
        DataError: A file is missing or invalid; the message names it.
    """
    if path.is_file():
        return _read_gt_mat(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such file or directory. Expected a directory of annotations or a gt-SETUP.mat.")
    selected = set_names or [name for name in TEST_SETS if next(path.rglob(f"*{name}*"), None)]
    if not selected:
        raise DataError(
            f"{path}: contains none of the test sets {TEST_SETS[0]} to {TEST_SETS[-1]}. "
            "Select others with --caltech-sets."
        )
    is_original = annotation_version is AnnotationVersion.ORIGINAL
    read_annotations = read_original_annotations if is_original else read_corrected_annotations
    frames = list(read_annotations(path, selected, TEST_FRAME_STEP))
    frame_ids = tuple((frame.video, frame.index + 1) for frame in frames)
    return CaltechGroundTruth(path, frame_ids, _build_gt_table(frames, annotation_version), False)


def read_caltech_detections(folder: Path, ground_truth: CaltechGroundTruth) -> DetectionTable:
    """Read the detections of all videos; detections in frames that are not evaluated are dropped.

    Args:
        folder: Directory with one `set06/V000.txt` per video.
        ground_truth: Ground truth that selects the frames.

    Returns:
        The detections, sorted by image and descending score.

    Raises:
        DataError: A file is missing or a line is invalid; the message names both.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such directory. Expected one with files set06/V000.txt.")
    frame_index = {
        frame: index for index, frame in enumerate(ground_truth.frames or _infer_frames(folder, ground_truth))
    }
    image_indices, rows = [np.zeros(0, np.intp)], [np.zeros((0, 6))]
    for video in dict.fromkeys(video for video, _ in frame_index):
        video_rows = _read_video_detections(folder / f"{video}.txt")
        image_index = np.array([frame_index.get((video, int(frame)), -1) for frame in video_rows[:, 0]], np.intp)
        if len(video_rows) and (image_index < 0).all():
            raise DataError(
                f"{folder / video}.txt: none of its frames ({int(video_rows[0, 0])}, ...) is evaluated. Count frames "
                f"from 1; every {TEST_FRAME_STEP}th is evaluated ({TEST_FRAME_STEP}, {2 * TEST_FRAME_STEP}, ...)."
            )
        image_indices.append(image_index[image_index >= 0])
        rows.append(video_rows[image_index >= 0])
    all_rows = np.concatenate(rows)
    return DetectionTable.from_rows(np.concatenate(image_indices), all_rows[:, 1:5], all_rows[:, 5])


def _build_gt_table(frames: list[CaltechFrame], annotation_version: AnnotationVersion) -> GroundTruthTable:
    masks = [_has_known_label(frame) for frame in frames]
    pairs = list(zip(frames, masks, strict=True))
    boxes = np.concatenate([frame.annotations.boxes_xywh[mask] for frame, mask in pairs])
    return GroundTruthTable(
        len(frames),
        np.repeat(np.arange(len(frames)), [int(mask.sum()) for mask in masks]),
        boxes,
        boxes[:, 3],
        np.concatenate([_compute_visible_ratios(frame, annotation_version)[mask] for frame, mask in pairs]),
        np.concatenate([_compute_ignore_mask(frame, annotation_version)[mask] for frame, mask in pairs]),
    )


def _has_known_label(frame: CaltechFrame) -> NDArray[np.bool_]:
    """Select the labels that the official programs load; `person-fa` is not one of them."""
    return np.array([label in (*CORRECTED_PERSON_LABELS, "ignore") for label in frame.annotations.labels], bool)


def _compute_ignore_mask(frame: CaltechFrame, annotation_version: AnnotationVersion) -> NDArray[np.bool_]:
    labels = frame.annotations.labels
    if annotation_version is AnnotationVersion.ORIGINAL:
        return np.array([label != PERSON for label in labels], bool)
    return frame.annotations.ignore | np.array([label not in CORRECTED_PERSON_LABELS for label in labels], bool)


def _compute_visible_ratios(frame: CaltechFrame, annotation_version: AnnotationVersion) -> Floats:
    """Compute the visible part of each box, float64 array[N].

    Boxes that are not occluded have inf (ORIGINAL) or 1 (CORRECTED). Occluded boxes whose visible box equals the whole
    box have 1 (ORIGINAL) or 0 (CORRECTED).
    """
    boxes, visible_boxes = frame.annotations.boxes_xywh, frame.annotations.visible_xywh
    has_no_visible_box = (visible_boxes == 0).all(1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a box without area gets NaN or inf, as in MATLAB
        ratio = (visible_boxes[:, 2] * visible_boxes[:, 3]) / (boxes[:, 2] * boxes[:, 3])
    if annotation_version is AnnotationVersion.ORIGINAL:
        return np.where(has_no_visible_box, np.inf, ratio)
    occluded_ratio = np.where((visible_boxes == boxes).all(1), 0.0, ratio)
    return np.where(~frame.annotations.occluded | has_no_visible_box, 1.0, occluded_ratio)


def _read_gt_mat(path: Path) -> CaltechGroundTruth:
    """Read a cell array `gt` of shape (1, images) with rows of x y w h ignore."""
    cells = read_mat(path).get("gt")
    if not isinstance(cells, np.ndarray) or cells.dtype != object:
        raise DataError(f"{path}: contains no cell array gt. Expected a gt-SETUP.mat of the official programs.")
    parts = []
    for number, cell in enumerate(cells.ravel(), 1):
        try:
            rows = to_float_array(cell)
        except ValueError as error:
            raise DataError(f"{path}: image {number}: {error}. Correct the file.") from None
        if rows.size and (rows.ndim != 2 or rows.shape[1] != 5):
            raise DataError(f"{path}: image {number}: expected rows of x y w h ignore, got shape {rows.shape}.")
        rows = rows.reshape(-1, 5)
        is_invalid = ~(is_valid_box(rows[:, :4]) & np.isfinite(rows[:, 4]))
        if is_invalid.any():
            row = rows[is_invalid][0].tolist()
            raise DataError(
                f"{path}: image {number}: expected x y w h ignore with finite sizes of at least 0, got {row}."
            )
        parts.append(rows)
    all_rows = np.concatenate([np.zeros((0, 5)), *parts])
    table = GroundTruthTable(
        len(parts),
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        all_rows[:, :4],
        all_rows[:, 3],
        np.ones(len(all_rows)),
        all_rows[:, 4] != 0,
    )
    return CaltechGroundTruth(path, (), table, True)


def _infer_frames(folder: Path, ground_truth: CaltechGroundTruth) -> list[tuple[str, int]]:
    """Infer the frames of a gt-SETUP.mat, which does not contain them.

    The last detection of each video gives its number of frames. If these do not add up, the frames are those of the
    complete test set.
    """
    video_paths = sorted(path for name in TEST_SETS for path in (folder / name).glob("V*.txt"))
    num_frames = {
        f"{path.parent.name}/{path.stem}": int(_read_video_detections(path)[:, 0].max(initial=0)) // TEST_FRAME_STEP
        for path in video_paths
    }
    num_inferred, num_expected, test_frames = (
        sum(num_frames.values()),
        ground_truth.table.num_images,
        count_test_frames(),
    )
    if num_inferred != num_expected and num_expected == sum(test_frames.values()):
        num_frames = test_frames  # a video without detections in its last frames gives a number that is too low
    elif num_inferred != num_expected:
        raise DataError(
            f"{ground_truth.path}: contains {num_expected} frames but not their videos, and the detections in {folder} "
            f"extend over {num_inferred} frames. Set --annotations to the directory of annotations instead."
        )
    return [(video, TEST_FRAME_STEP * number) for video, count in num_frames.items() for number in range(1, count + 1)]


def _read_video_detections(path: Path) -> Floats:
    """Read rows of frame, x, y, w, h, score; float64 array[D, 6]."""
    try:
        text = path.read_text(encoding="utf-8-sig").replace(",", " ")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Write an empty file for a video without detections.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file. Expected lines of `frame x y w h score`.") from None
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
    expected = "expected `frame x y w h score` with frames from 1 and sizes of at least 0"
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            row = [np.nan]
        if row and not (len(row) == 6 and _is_valid_detection(np.array([row]))[0]):
            return f"{path}, line {number}: {expected}, got {line.strip()[:60]!r}."
    return f"{path}: {expected} in every line."
