"""Pages on which the images where two models differ are browsed: persons that only one detects, and false positives.

Each model keeps the detections from its score threshold on, the threshold of its recall. The protocol of the miss rate
matches them to the ground truth of the setup Reasonable. A false positive belongs to both models if their boxes overlap
with an IoU of at least 0.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hkd_det.console import iterate_with_progress
from hkd_det.datasets.check_report import IGNORED_COLOR, PERSON_COLOR
from hkd_det.datasets.image_page import (
    DEFAULT_MAX_IMAGES,
    PREVIEW_DIR,
    Color,
    LabeledBoxes,
    PageImage,
    Severity,
    make_preview_paths,
    write_image_page,
    write_previews,
)
from hkd_det.files import atomic_write_dir
from hkd_det.image import read_image_header
from hkd_det.metrics.citypersons import IOU_THRESHOLD, REASONABLE, CityPersonsSetup, ImageMatches, match_image
from hkd_det.metrics.matching import FALSE_POSITIVE, TRUE_POSITIVE
from hkd_det.structures import Boxes, Detections, Sample, box_iou

TEMPLATE = Path(__file__).with_name("differences.html.j2")
# RGB of each type of boxes, in the order of the template. Blue and orange of Okabe and Ito (2008).
COLORS: dict[str, Color] = {
    "person": PERSON_COLOR,
    "ignored": IGNORED_COLOR,
    "first-true": (86, 180, 233),
    "first-false": (86, 180, 233),
    "second-true": (230, 159, 0),
    "second-false": (230, 159, 0),
}


@dataclass(frozen=True, eq=False)
class ComparedModel:
    """Detections of one model.

    Attributes:
        name: Name on the pages.
        threshold: Lowest score of a detection that counts, 0 to 1.
        detections: Detections in each image.
    """

    name: str
    threshold: float
    detections: Sequence[Detections]


@dataclass(frozen=True, eq=False)
class ModelMatches:
    """Detections of one model in one image, matched to the ground truth.

    Attributes:
        detections: Detections from the threshold on.
        matches: Their match status.
    """

    detections: Detections
    matches: ImageMatches

    def select(self, status: int) -> Detections:
        """Return the detections of a match status.

        Args:
            status: `TRUE_POSITIVE`, `FALSE_POSITIVE` or `IGNORED`.
        """
        rows = self.matches.eval_indices[self.matches.match_status == status]
        return Detections(self.detections.boxes_xyxy[rows], self.detections.scores[rows])

    def list_detected(self) -> NDArray[np.intp]:
        """Return the rows of the persons that are detected, in the ground truth of the image."""
        return self.matches.matched_gt[self.matches.match_status == TRUE_POSITIVE]


@dataclass(eq=False)
class ImageDifference:
    """What two models detect in one image.

    Attributes:
        sample: Image and ground truth.
        first: Matches of the first model.
        second: Matches of the second model.
        notes: Severity, kind and text of each difference and of each common error.
    """

    sample: Sample
    first: ModelMatches
    second: ModelMatches
    notes: list[tuple[Severity, str, str]] = field(default_factory=list)

    @property
    def num_differences(self) -> int:
        """Number of persons and false positives of only one model."""
        return sum(kind.startswith("only") for _, kind, _ in self.notes)


def compare_image(
    sample: Sample, first: Detections, second: Detections, setup: CityPersonsSetup = REASONABLE
) -> ImageDifference:
    """Compare the detections of two models in one image.

    Args:
        sample: Image and ground truth.
        first: Detections of the first model that count.
        second: Detections of the second model that count.
        setup: Setup that selects the evaluated boxes.

    Returns:
        The matches and differences.
    """
    sides = [ModelMatches(found, match_image(sample.ground_truth, found, setup)) for found in (first, second)]
    difference = ImageDifference(sample, sides[0], sides[1])
    detected = [set(side.list_detected().tolist()) for side in sides]
    persons = np.flatnonzero(~sides[0].matches.gt_ignore).tolist()
    heights = sample.ground_truth.boxes_xyxy[:, 3] - sample.ground_truth.boxes_xyxy[:, 1]
    for person in persons:
        is_first, is_second = (person in rows for rows in detected)
        text = f"person of {heights[person]:.0f} px"
        if is_first and not is_second:
            difference.notes.append(("audit", "only_first_detects", text))
        elif is_second and not is_first:
            difference.notes.append(("warning", "only_second_detects", text))
        elif not is_first:
            difference.notes.append(("note", "both_miss", text))
    false_first, false_second = (side.select(FALSE_POSITIVE) for side in sides)
    pairs = _pair_boxes(false_first.boxes_xyxy, false_second.boxes_xyxy)
    difference.notes += [("warning", "only_first_false", _describe(false_first, row)) for row in pairs.first_only]
    difference.notes += [("audit", "only_second_false", _describe(false_second, row)) for row in pairs.second_only]
    difference.notes += [("note", "both_false", _describe(false_first, row)) for row in pairs.common]
    return difference


@dataclass(frozen=True)
class _BoxPairs:
    """Rows of the boxes of two lists that have a partner, and of those that have none."""

    common: list[int]
    first_only: list[int]
    second_only: list[int]


def _pair_boxes(first_xyxy: Boxes, second_xyxy: Boxes) -> _BoxPairs:
    """Pair boxes one to one by descending IoU, from `IOU_THRESHOLD` on."""
    overlaps = box_iou(first_xyxy, second_xyxy)
    first_left, second_left = set(range(len(first_xyxy))), set(range(len(second_xyxy)))
    common = []
    for index in np.argsort(-overlaps, axis=None, kind="stable").tolist():
        row, column = divmod(index, len(second_xyxy))
        if overlaps[row, column] < IOU_THRESHOLD:
            break
        if row in first_left and column in second_left:
            first_left.remove(row)
            second_left.remove(column)
            common.append(row)
    return _BoxPairs(sorted(common), sorted(first_left), sorted(second_left))


def _describe(detections: Detections, row: int) -> str:
    box = detections.boxes_xyxy[row]
    return f"score {detections.scores[row]:.2f}, {box[3] - box[1]:.0f} px tall"


def write_difference_pages(
    output_dir: Path,
    data: str,
    samples: Sequence[Sample],
    models: Sequence[ComparedModel],
    max_images: int = DEFAULT_MAX_IMAGES,
) -> list[Path]:
    """Write one page for each model after the first, and the thumbnails.

    Args:
        output_dir: Directory of the pages: `index.html` compares the second model, `3.html` the third with the first.
        data: Name of the dataset.
        samples: Annotated images.
        models: The first model and at least one other, with the detections in the same images.
        max_images: Maximum number of images of a page; those with most differences are kept.

    Returns:
        The pages.
    """
    previews = make_preview_paths("images", len(samples))
    output_dir.mkdir(parents=True, exist_ok=True)
    names = ["index.html", *(f"{number}.html" for number in range(3, len(models) + 1))]
    shown = [_select_differences(samples, models[0], other, max_images) for other in models[1:]]
    used = sorted({index for pages in shown for index, _ in pages})
    with atomic_write_dir(output_dir / PREVIEW_DIR) as preview_dir:
        (preview_dir / "images").mkdir()
        write_previews([(samples[index].path, preview_dir / previews[index]) for index in used])
    paths = []
    for name, pages, other in zip(names, shown, models[1:], strict=True):
        context = {
            "data": data,
            "num_images": len(pages),
            "num_all": len(samples),
            "num_persons": sum(int((~one.first.matches.gt_ignore).sum()) for _, one in pages),
            "models": (models[0], other),
            "links": [(link, model.name) for link, model in zip(names, models[1:], strict=True)],
            "setup": REASONABLE.name,
            "iou": IOU_THRESHOLD,
        }
        images = (_make_page_image(difference, previews[index]) for index, difference in pages)
        write_image_page(output_dir / name, TEMPLATE, images, output_dir / PREVIEW_DIR, COLORS, context)
        paths.append(output_dir / name)
    return paths


def _select_differences(
    samples: Sequence[Sample], first: ComparedModel, second: ComparedModel, max_images: int
) -> list[tuple[int, ImageDifference]]:
    """Return the index and the difference of the images, those with most differences first."""
    rows = zip(samples, first.detections, second.detections, strict=True)
    progress = iterate_with_progress(rows, len(samples), f"compare {second.name}", "image", delay_s=2)
    differences = [
        compare_image(sample, one.filter(first.threshold), other.filter(second.threshold))
        for sample, one, other in progress
    ]
    return sorted(enumerate(differences), key=lambda pair: -pair[1].num_differences)[:max_images]


def _make_page_image(difference: ImageDifference, preview: Path) -> PageImage:
    """Return an image with its boxes in the order of `COLORS`."""
    sample, is_ignored = difference.sample, difference.first.matches.gt_ignore
    boxes = [LabeledBoxes(sample.ground_truth.boxes_xyxy[rows]) for rows in (~is_ignored, is_ignored)]
    for side in (difference.first, difference.second):
        for status in (TRUE_POSITIVE, FALSE_POSITIVE):
            found = side.select(status)
            boxes.append(LabeledBoxes(found.boxes_xyxy, [f"score {score:.2f}" for score in found.scores.tolist()]))
    size_hw = read_image_header(sample.path).size_hw
    return PageImage("images", sample.path, preview, size_hw, boxes, difference.notes)
