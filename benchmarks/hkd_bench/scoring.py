"""Scores of detection files by one protocol, and hints why the detections of a file miss.

`PROTOCOLS` maps the values of `--protocol` to functions. A new protocol is one function and one entry.

`find_hint` reads the boxes of a file in other ways: boxes of another form or size, another category, other image ids. A
hint names the way in which far more persons match a detection than in the form that COCO defines. It never changes a
metric.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.caltech import parse_sets
from hkd_det.errors import UsageError
from hkd_det.metrics import caltech, citypersons, coco
from hkd_det.metrics.bootstrap import MissRateDifference, MissRateInterval, compute_differences, compute_intervals
from hkd_det.metrics.caltech import read_caltech_detections, read_caltech_ground_truth
from hkd_det.metrics.coco_files import (
    CocoGroundTruth,
    find_images_by_name,
    read_coco_detections,
    read_coco_ground_truth,
    read_other_categories,
)
from hkd_det.metrics.matching import MissRateResult
from hkd_det.metrics.tables import DetectionTable, Floats

# Of find_hint.
MAX_IMAGES = 500  # images with persons that are compared
MAX_DETECTIONS_PER_IMAGE = 10
MIN_IOU = 0.5
MAX_MATCHED_RATIO = 0.5  # no hint if at least this part of the persons matches
MIN_GAIN = 0.3  # a hint needs so many more matching persons, as a part of all
MIN_MATCHED = 3  # fewer persons can match by chance
BOX_FORMS = {
    "[x, y, width, height]": "",
    "[x1, y1, x2, y2]": "corners (xyxy)",
    "[center x, center y, width, height]": "center, width and height",
    "[y1, x1, y2, x2]": "corners with y first",
}
FACTORS = (2, 3, 4, 8, 1.5, 4 / 3, 3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 8)
NETWORK_SIDES = (
    *range(224, 865, 32), 300, 896, 960, 1024, 1088, 1152, 1216, 1280, 1333, 1536, 1920,
)  # fmt: skip


@dataclass(frozen=True)
class ScoreConfig:
    """Options of `score_files`.

    Attributes:
        annotations: Ground truth, in a form that the protocol reads.
        protocol: Key of `PROTOCOLS`.
        setups: Names of the setups; empty for all.
        caltech_sets: Sets of Caltech, for example "set06-set10"; empty for the test sets.
        zero_recall_before_curve: CityPersons only: use recall 0 at FPPI points before the curve.
        category: Names of the categories to evaluate, for COCO JSON; empty for the person class.
    """

    annotations: Path
    protocol: str
    setups: tuple[str, ...] = ()
    caltech_sets: str = ""
    zero_recall_before_curve: bool = False
    category: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ScoreResult:
    """Scores of one detection file.

    Attributes:
        detections: Path of the file or directory.
        num_detections: Number of detections.
        num_out_of_range: Number of scores outside 0 to 1.
        miss_rates: Miss rate of each setup; empty for protocols without a miss rate.
        metrics: Other metrics as fractions, by name; -1 without ground truth.
        hint: Probable reason why the detections miss most persons; empty if there is none.
    """

    detections: Path
    num_detections: int
    num_out_of_range: int
    miss_rates: dict[str, MissRateResult] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    hint: str = ""

    @classmethod
    def from_table(
        cls,
        path: Path,
        detections: DetectionTable,
        miss_rates: dict[str, MissRateResult] | None = None,
        metrics: dict[str, float] | None = None,
        hint: str = "",
    ) -> "ScoreResult":
        """Build a result and count the detections.

        Args:
            path: Path of the detection file.
            detections: Its detections.
            miss_rates: Miss rate of each setup.
            metrics: Other metrics as fractions.
            hint: Probable reason why the detections miss most persons.

        Returns:
            The result.
        """
        num_out_of_range = int(np.count_nonzero((detections.scores < 0) | (detections.scores > 1)))
        return cls(path, len(detections), num_out_of_range, miss_rates or {}, metrics or {}, hint)


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of all detection files on one ground truth.

    Attributes:
        config: Ground truth and options.
        scores: Result of each detection file, by its name.
        intervals: 95 % intervals of the miss rates, by file and setup; empty without bootstrap.
        differences: Differences to the first detection file on the same images, by file and setup.
    """

    config: ScoreConfig
    scores: dict[str, ScoreResult]
    intervals: dict[str, dict[str, MissRateInterval]]
    differences: dict[str, dict[str, MissRateDifference]]


def compare_scores(config: ScoreConfig, scores: dict[str, ScoreResult], num_resamples: int) -> ScoreTable:
    """Compute intervals of the miss rates, and differences to the first detection file.

    Args:
        config: Ground truth and options.
        scores: Result of each detection file, by its name; at least one.
        num_resamples: Number of resamples of the images; 0 computes neither.

    Returns:
        The scores with intervals and differences.
    """
    if not num_resamples:
        return ScoreTable(config, scores, {}, {})
    (_, first), *others = scores.items()
    return ScoreTable(
        config,
        scores,
        {name: compute_intervals(score.miss_rates, num_resamples) for name, score in scores.items()},
        {name: compute_differences(score.miss_rates, first.miss_rates, num_resamples) for name, score in others},
    )


def score_citypersons(config: ScoreConfig, detections: Sequence[Path]) -> Iterator[ScoreResult]:
    """Yield the CityPersons miss rates of each detection file (COCO JSON).

    Args:
        config: Ground truth and options.
        detections: Detection files (COCO JSON).
    """
    setups = [citypersons.SETUPS[name] for name in _select_setups(config, citypersons.SETUPS)]
    ground_truth = read_coco_ground_truth(config.annotations, config.category)
    for path in detections:
        table = read_coco_detections(path, ground_truth)
        miss_rates = citypersons.evaluate(ground_truth.table, table, setups, config.zero_recall_before_curve)
        yield ScoreResult.from_table(path, table, miss_rates, hint=find_hint(path, ground_truth, table))


def score_caltech(config: ScoreConfig, detections: Sequence[Path]) -> Iterator[ScoreResult]:
    """Yield the Caltech miss rates of each directory of detections.

    Args:
        config: Ground truth and options.
        detections: Directories of detections, as the official toolbox reads them.
    """
    version = caltech.AnnotationVersion(config.protocol)
    names = _select_setups(config, caltech.SETUPS)
    set_names = parse_sets(config.caltech_sets) if config.caltech_sets else None
    ground_truth = read_caltech_ground_truth(config.annotations, version, set_names)
    if ground_truth.is_prefiltered:
        names = [_infer_setup(config)]
    setups = [caltech.SETUPS[name] for name in names]
    for path in detections:
        table = read_caltech_detections(path, ground_truth)
        miss_rates = caltech.evaluate(ground_truth.table, table, version, setups, ground_truth.is_prefiltered)
        yield ScoreResult.from_table(path, table, miss_rates)


def score_coco(config: ScoreConfig, detections: Sequence[Path]) -> Iterator[ScoreResult]:
    """Yield COCO's metrics of each detection file (COCO JSON).

    Args:
        config: Ground truth and options.
        detections: Detection files (COCO JSON).
    """
    if config.setups:
        raise UsageError("--setup: the protocol coco has no setups. Omit the flag.")
    ground_truth = read_coco_ground_truth(config.annotations, config.category)
    for path in detections:
        table = read_coco_detections(path, ground_truth)
        metrics = coco.evaluate(ground_truth, table)
        yield ScoreResult.from_table(path, table, metrics=metrics, hint=find_hint(path, ground_truth, table))


PROTOCOLS: dict[str, Callable[[ScoreConfig, Sequence[Path]], Iterator[ScoreResult]]] = {
    "citypersons": score_citypersons,
    caltech.AnnotationVersion.ORIGINAL.value: score_caltech,
    caltech.AnnotationVersion.CORRECTED.value: score_caltech,
    "coco": score_coco,
}


def score_files(config: ScoreConfig, detections: Sequence[Path]) -> Iterator[ScoreResult]:
    """Yield the scores of each detection file; the ground truth is read once.

    Args:
        config: Ground truth, protocol and options.
        detections: Detection files or directories, in the form of the protocol.

    Raises:
        UsageError: An option does not fit the protocol.
        DataError: A file is missing or invalid.
    """
    return PROTOCOLS[config.protocol](config, detections)


def _infer_setup(config: ScoreConfig) -> str:
    """Return the setup of a gt-SETUP.mat. The file is already filtered, and only its name contains the setup."""
    if len(config.setups) == 1:
        return config.setups[0]
    stem = config.annotations.stem.removeprefix("gt-")
    names = [name for name in caltech.SETUPS if stem == name or stem.startswith(f"{name}-")]
    if config.setups or not names:
        raise UsageError(
            f"--setup: required, because {config.annotations} contains the boxes of one setup. Expected one of "
            f"{', '.join(caltech.SETUPS)}."
        )
    return names[0]


def _select_setups(
    config: ScoreConfig, setups: dict[str, citypersons.CityPersonsSetup] | dict[str, caltech.CaltechSetup]
) -> list[str]:
    for name in config.setups:
        if name not in setups:
            raise UsageError(
                f"--setup: expected one of {', '.join(setups)} for the protocol {config.protocol}, got {name}."
            )
    return list(config.setups or setups)


class _Pairs:
    """All pairs of a person and a detection of the same image.

    Args:
        ground_truth: Persons; the first `MAX_IMAGES` images with persons are used.
        detections: Detections; the best of each image are used.
    """

    def __init__(self, ground_truth: CocoGroundTruth, detections: DetectionTable) -> None:
        table = ground_truth.table
        persons = np.flatnonzero(~table.ignore)
        used_images = np.unique(table.image_index[persons])[:MAX_IMAGES]
        persons = persons[np.isin(table.image_index[persons], used_images)]
        is_used = np.isin(detections.image_index, used_images)
        detections = detections.select(is_used & (detections.rank_per_image() < MAX_DETECTIONS_PER_IMAGE))
        person_images = table.image_index[persons]
        starts, ends = (np.searchsorted(detections.image_index, person_images, side) for side in ("left", "right"))
        self.num_persons = len(persons)
        self.person_rows = np.repeat(np.arange(len(persons)), ends - starts)
        self.detection_rows = np.concatenate(
            [np.arange(start, end) for start, end in zip(starts, ends, strict=True)] or [np.zeros(0, np.intp)]
        ).astype(np.intp)
        self.persons_xywh = table.boxes_xywh[persons]
        self.boxes = detections.boxes_xywh
        sizes = ground_truth.sizes_hw
        self.sizes_hw = np.full((len(self.boxes), 2), np.nan) if sizes is None else sizes[detections.image_index]

    def count_matched(self, boxes_xywh: Floats) -> int:
        """Count the persons that a detection overlaps."""
        iou = _compute_pair_iou(self.persons_xywh[self.person_rows], boxes_xywh[self.detection_rows])
        return len(np.unique(self.person_rows[iou >= MIN_IOU]))


def find_hint(path: Path, ground_truth: CocoGroundTruth, detections: DetectionTable) -> str:
    """Explain why most persons match no detection of a file.

    Args:
        path: Detection file.
        ground_truth: Persons and images.
        detections: Detections of the file.

    Returns:
        One or two sentences, or an empty string if enough persons match or no explanation is found.
    """
    pairs = _Pairs(ground_truth, detections)
    matched = pairs.count_matched(pairs.boxes)
    if not pairs.num_persons or matched >= MAX_MATCHED_RATIO * pairs.num_persons:
        return ""
    best, explanation = max(matched + MIN_GAIN * pairs.num_persons, MIN_MATCHED - 1), ""
    for num_matched, text in _iterate_explanations(path, ground_truth, detections, pairs):
        if num_matched > best and num_matched >= 2 * matched:
            best, explanation = num_matched, text
    if explanation:
        counts = f"{matched} of {pairs.num_persons} persons match a detection, but {best:g} would match"
        return f"{counts} {explanation}"
    if matched or not len(detections):
        return ""
    num_outside = _count_outside(pairs)
    outside = f"; {num_outside} of {len(pairs.boxes)} boxes reach beyond their image" if num_outside else ""
    return (
        f"none of {pairs.num_persons} persons matches a detection{outside}. Expected a bbox [x, y, width, height] in "
        "pixels of the image, and the image_id and category_id of the ground truth."
    )


def _iterate_explanations(
    path: Path, ground_truth: CocoGroundTruth, detections: DetectionTable, pairs: _Pairs
) -> Iterator[tuple[int, str]]:
    """Yield the number of matched persons and the explanation of each reading of the file, simple ones first."""
    for text, boxes in _iterate_boxes(pairs):
        yield pairs.count_matched(boxes), text
    for category_id, table in read_other_categories(path, ground_truth).items():
        other = _Pairs(ground_truth, table)
        yield (
            other.count_matched(other.boxes),
            f"with the detections of category_id {category_id!r}. Use the category ids of the ground truth.",
        )
    for text, image_index in _iterate_image_indices(ground_truth, detections):
        known = image_index >= 0
        moved = DetectionTable.from_rows(image_index[known], detections.boxes_xywh[known], detections.scores[known])
        other = _Pairs(ground_truth, moved)
        yield other.count_matched(other.boxes), text


def _iterate_boxes(pairs: _Pairs) -> Iterator[tuple[str, Floats]]:
    """Yield an explanation and the converted boxes of each box form and image size."""
    remedy = "Write bbox as [x, y, width, height] in pixels of the image."
    forms = {form: _convert_form(pairs.boxes, form) for form in BOX_FORMS}
    for form, boxes in forms.items():
        yield f"if bbox is read as {form}, {BOX_FORMS[form]}. {remedy}", boxes
    height, width = pairs.sizes_hw.T
    full_size = np.stack([width, height, width, height], axis=1)
    for form, boxes in forms.items():
        description = f" and {form}" if BOX_FORMS[form] else ""
        text = f"if bbox is read as relative to the image size (normalized){description}. {remedy}"
        yield text, boxes * full_size
    for form, boxes in forms.items():
        description = f" and bbox is read as {form}" if BOX_FORMS[form] else ""
        for text, factors, offsets in _iterate_scales(pairs.sizes_hw):
            yield f"if boxes are scaled {text}{description}. {remedy}", (boxes - offsets) * factors


def _iterate_scales(sizes_hw: Floats) -> Iterator[tuple[str, Floats, Floats]]:
    """Yield the name, the factors and the offsets of boxes in images of another size."""
    height, width = sizes_hw.T
    zeros = np.zeros((len(sizes_hw), 4))
    for factor in FACTORS:
        size = "smaller" if factor > 1 else "larger"
        yield f"by {factor:.3g}: they are in pixels of a {size} image", np.full((len(sizes_hw), 1), factor), zeros
    for side in NETWORK_SIDES:
        name = f"from the network input size {side}"
        stretched = np.stack([width, height, width, height], axis=1) / side
        yield f"{name} x {side}", stretched, zeros
        factor = np.maximum(width, height)[:, None] / side
        yield f"{name} (letterbox)", factor, zeros
        padding = np.stack([(side - width / factor[:, 0]) / 2, (side - height / factor[:, 0]) / 2], axis=1)
        yield f"{name} (centered letterbox)", factor, np.concatenate([padding, np.zeros_like(padding)], axis=1)


def _iterate_image_indices(
    ground_truth: CocoGroundTruth, detections: DetectionTable
) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Yield an explanation and the image of each detection for other meanings of `image_id`; -1 for no image."""
    ids = ground_truth.image_ids
    index_by_number = {
        int(name): index for name, index in find_images_by_name(ground_truth).items() if name.isdecimal()
    }
    index_by_id = {image_id: index for index, image_id in enumerate(ids)}
    meanings = {"the number in the file name": index_by_number}
    if all(isinstance(image_id, int) for image_id in ids):
        for shift in (1, -1):
            numbers = f"counted from {'0' if shift == 1 else '1'}"
            meanings[numbers] = {int(key) - shift: index for key, index in index_by_id.items()}
    for name, indices in meanings.items():
        lookup = np.array([indices.get(image_id, -1) if isinstance(image_id, int) else -1 for image_id in ids])
        text = f"if image_id is read as {name}. Use the image ids of the ground truth."
        yield text, lookup[detections.image_index].astype(np.intp)


def _convert_form(boxes: Floats, form: str) -> Floats:
    """Convert boxes of a form of `BOX_FORMS` to xywh."""
    a, b, c, d = boxes.T
    columns = {
        "[x, y, width, height]": (a, b, c, d),
        "[x1, y1, x2, y2]": (a, b, c - a, d - b),
        "[center x, center y, width, height]": (a - c / 2, b - d / 2, c, d),
        "[y1, x1, y2, x2]": (b, a, d - b, c - a),
    }
    return np.stack(columns[form], axis=1)


def _compute_pair_iou(first_xywh: Floats, second_xywh: Floats) -> Floats:
    """Return the IoU of each row of two arrays; 0 for boxes of negative size or unknown position."""
    low = np.maximum(first_xywh[:, :2], second_xywh[:, :2])
    high = np.minimum(first_xywh[:, :2] + first_xywh[:, 2:], second_xywh[:, :2] + second_xywh[:, 2:])
    overlap = np.maximum(high - low, 0).prod(axis=1)
    union = first_xywh[:, 2:].prod(axis=1) + np.maximum(second_xywh[:, 2:], 0).prod(axis=1) - overlap
    return np.nan_to_num(np.divide(overlap, union, out=np.zeros_like(union), where=union > 0))


def _count_outside(pairs: _Pairs) -> int:
    """Count boxes that end more than 10 % beyond their image."""
    ends = pairs.boxes[:, :2] + pairs.boxes[:, 2:]
    return int((ends > 1.1 * pairs.sizes_hw[:, ::-1]).any(axis=1).sum())
