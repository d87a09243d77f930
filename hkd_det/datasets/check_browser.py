"""The page `images.html` of `hkd-train --check`, on which all images can be browsed with their boxes and problems."""

import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.audit import SplitAudit
from hkd_det.datasets.base import DatasetError
from hkd_det.datasets.check_report import IGNORED_COLOR, PERSON_COLOR, VISIBLE_COLOR
from hkd_det.datasets.check_summary import escape_nonprintable
from hkd_det.datasets.duplicates import DuplicateSearch
from hkd_det.datasets.image_page import (
    PREVIEW_DIR,
    PRIORITIES,
    LabeledBoxes,
    PageImage,
    Severity,
    make_preview_paths,
    write_image_page,
)
from hkd_det.files import atomic_write_dir
from hkd_det.structures import GroundTruth, Sample

TEMPLATE = Path(__file__).with_name("check_browser.html.j2")
PAGE_NAME = "images.html"
COLORS = {  # RGB of each type of boxes, in the order of the template
    "person": PERSON_COLOR,
    "visible": VISIBLE_COLOR,
    "ignored": IGNORED_COLOR,
    "unused": (70, 170, 255),
    "proposal": (255, 255, 255),
}
MAX_TEXTS = 20  # problems of one kind that are listed with an image


@dataclass(eq=False)
class BrowsedImage:
    """An image of the page.

    Attributes:
        split: Name of the split.
        path: Image file.
        preview: Path of the thumbnail in the directory of thumbnails.
        ground_truth: Persons and ignore regions.
        size_hw: Height and width in pixels; None if the image cannot be read.
        problems: Severity, kind and text of each problem.
        unused: Class and box (xyxy) of the boxes that are not used.
        proposals: Boxes (xyxy) that the models of the audit propose.
    """

    split: str
    path: Path
    preview: Path
    ground_truth: GroundTruth = field(default_factory=GroundTruth.empty)
    size_hw: tuple[int, int] | None = None
    problems: list[tuple[Severity, str, str]] = field(default_factory=list)
    unused: list[tuple[str, tuple[float, ...]]] = field(default_factory=list)
    proposals: list[tuple[float, ...]] = field(default_factory=list)

    def add(self, severity: Severity, kind: str, text: str) -> None:
        """Add a problem.

        Args:
            severity: Severity of the problem.
            kind: Kind of the problem.
            text: Description.
        """
        if sum(kind == other for _, other, _ in self.problems) < MAX_TEXTS:
            self.problems.append((severity, kind, escape_nonprintable(text)))


def list_browsed_images(
    split: str,
    samples: Sequence[Sample],
    sizes_hw: Sequence[tuple[int, int] | None],
    problems: Iterable[DatasetError],
    unused: Iterable[DatasetError],
) -> list[BrowsedImage]:
    """Combine the images of a split with their problems. Images that the reader omits are included.

    Args:
        split: Name of the split.
        samples: Samples of the split.
        sizes_hw: Height and width of each image; None if it cannot be decoded.
        problems: Problems of the split.
        unused: Problems of the kind `unused_class`.
    """
    paths = make_preview_paths(split, len(samples))
    images = {
        sample.path: BrowsedImage(split, sample.path, path, sample.ground_truth, size)
        for sample, path, size in zip(samples, paths, sizes_hw, strict=True)
    }
    by_stem: dict[str, list[BrowsedImage]] = defaultdict(list)
    for image in images.values():
        by_stem[image.path.stem].append(image)
    for problem in problems:
        for image in _find_images(problem, images, by_stem, split):
            image.add("error" if problem.is_error else "warning", problem.kind, str(problem))
    for problem in unused:
        for path, box in problem.boxes:
            if path in images and len(box) == 4 and np.isfinite(box).all():
                images[path].unused.append((problem.class_name, box))
    return list(images.values())


def _find_images(
    problem: DatasetError, images: dict[Path, BrowsedImage], by_stem: Mapping[str, list[BrowsedImage]], split: str
) -> list[BrowsedImage]:
    """Return the images of a problem: those that it names, or those with the name of its annotation file."""
    for path in problem.images:
        images.setdefault(path, BrowsedImage(split, path, Path()))
    if problem.images:
        return [images[path] for path in problem.images]
    file = Path(problem.file)
    if file in images:
        return [images[file]]
    candidates = by_stem.get(file.stem, []) if file.suffix else []

    def count_common_parts(image: BrowsedImage) -> int:  # labels/a/1.txt belongs to images/a/1.jpg
        return sum(a == b for a, b in zip(image.path.parts[-2::-1], file.parts[-2::-1], strict=False))

    most = max(map(count_common_parts, candidates), default=0)
    return [image for image in candidates if count_common_parts(image) == most]


def add_duplicates(images: Sequence[BrowsedImage], searches: Sequence[DuplicateSearch]) -> None:
    """Add the near-duplicates to the problems of the images: within a split as a note, of other splits as a warning.

    Args:
        images: Images of all splits.
        searches: The searches.
    """
    by_path = {(image.split, image.path): image for image in images}
    for search in searches:
        is_within = search.first is search.second
        for pair in search.pairs:
            first, second = search.first.paths[pair.first], search.second.paths[pair.second]
            ends = [(first, second), (second, first)] if is_within else [(first, second)]
            for path, other in ends:
                if image := by_path.get((search.first.name, path)):
                    text = f"{other}: similarity {pair.similarity:.2f}, {pair.orientation}"
                    kind = f"near_duplicates_{'within' if is_within else 'in'}_{search.second.name}"
                    image.add("note" if is_within else "warning", kind, text)


def add_findings(images: Sequence[BrowsedImage], audits: Sequence[SplitAudit]) -> None:
    """Add the findings of the audit to the problems of the images.

    Args:
        images: Images of all splits.
        audits: Result of each split.
    """
    by_path = {(image.split, image.path): image for image in images}
    for audit in audits:
        for finding in audit.findings:
            if image := by_path.get((audit.split, finding.path)):
                turn = f", rotate by {finding.rotation} degrees" if finding.rotation else ""
                image.add("audit", f"audit_{finding.kind}", f"score {finding.score:.2f}{turn}")
                image.proposals += [finding.proposal_xyxy] if finding.proposal_xyxy else []


def select_images(images: Sequence[BrowsedImage], max_images: int) -> list[BrowsedImage]:
    """Select images: those with errors or findings first, then those with other problems, then others.

    Args:
        images: Images of all splits.
        max_images: Maximum number of images.

    Returns:
        The images in their order. Of the first group that does not fit, evenly spaced images.
    """
    ranks = [min((PRIORITIES[severity] for severity, _, _ in image.problems), default=2) for image in images]
    selected: list[int] = []
    for rank in range(3):
        group = [index for index, other in enumerate(ranks) if other == rank]
        count = min(len(group), max_images - len(selected))
        selected += [group[index * len(group) // count] for index in range(count)]
    return [images[index] for index in sorted(selected)]


@contextmanager
def open_preview_dir(output_dir: Path, splits: Sequence[str], max_images: int) -> Iterator[Path | None]:
    """Replace the directory of thumbnails; without images, remove it and the page.

    Args:
        output_dir: Directory of the report. It does not exist after a failure, unless it contains files.
        splits: Names of the splits.
        max_images: Maximum number of images of the page.

    Yields:
        The new directory, with one directory for each split; None without images.
    """
    if max_images:
        with atomic_write_dir(output_dir / PREVIEW_DIR) as preview_dir:
            for split in splits:
                (preview_dir / split).mkdir()
            yield preview_dir
    else:
        (output_dir / PAGE_NAME).unlink(missing_ok=True)
        if (output_dir / PREVIEW_DIR).exists():
            shutil.rmtree(output_dir / PREVIEW_DIR)
        yield None


def write_browser_page(path: Path, data: str, images: Sequence[BrowsedImage], num_all: int, preview_dir: Path) -> None:
    """Write the page. It contains the boxes; the images are files.

    Args:
        path: Output file.
        data: Name of the dataset.
        images: Images of the page.
        num_all: Number of images of the dataset.
        preview_dir: Directory of the thumbnails.
    """
    context = {"data": data, "num_images": len(images), "num_all": num_all}
    write_image_page(path, TEMPLATE, map(_make_page_image, images), preview_dir, COLORS, context)


def _make_page_image(image: BrowsedImage) -> PageImage:
    """Return an image with its boxes in the order of `COLORS`."""
    ground_truth = image.ground_truth
    persons = np.flatnonzero(~ground_truth.ignore)
    hidden = persons[ground_truth.visible_ratio[persons] < 1]

    def select(boxes_xyxy: NDArray[np.float32], rows: NDArray[np.intp]) -> LabeledBoxes:
        return LabeledBoxes(boxes_xyxy[rows], [ground_truth.labels[row] for row in rows.tolist()])

    boxes = (
        select(ground_truth.boxes_xyxy, persons),
        select(ground_truth.visible_xyxy, hidden),
        select(ground_truth.boxes_xyxy, np.flatnonzero(ground_truth.ignore)),
        LabeledBoxes(np.array([box for _, box in image.unused]), [name for name, _ in image.unused]),
        LabeledBoxes(np.array(image.proposals)),
    )
    return PageImage(image.split, image.path, image.preview, image.size_hw, boxes, image.problems)
