"""The page `images.html` of `hkd-train --check`, on which all images can be browsed with their boxes and problems."""

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import cv2
import jinja2
import numpy as np
from numpy.typing import NDArray

from hkd_det.console import Progress, log_stage
from hkd_det.datasets.audit import SplitAudit
from hkd_det.datasets.base import DatasetError
from hkd_det.datasets.check_report import IGNORED_COLOR, PERSON_COLOR, VISIBLE_COLOR
from hkd_det.datasets.check_summary import escape_nonprintable
from hkd_det.datasets.duplicates import DuplicateSearch
from hkd_det.files import atomic_write_dir, write_text
from hkd_det.image import read_image
from hkd_det.structures import GroundTruth, Sample

TEMPLATE = Path(__file__).with_name("check_browser.html.j2")
NUM_THREADS = 4  # OpenCV releases the GIL while it decodes
PAGE_NAME, PREVIEW_DIR = "images.html", "thumbnails"
PREVIEW_WH, PREVIEW_QUALITY = (320, 240), 75  # approximate size; about 10 kB per image
DEFAULT_MAX_IMAGES = 10_000  # 100 MB of thumbnails, and a page of a few MB
UNUSED_COLOR, PROPOSAL_COLOR = (70, 170, 255), (255, 255, 255)  # RGB
MAX_TEXTS = 20  # problems of one kind that are listed with an image

Severity = Literal["error", "warning", "audit", "note"]
PRIORITIES: dict[Severity, int] = {"error": 0, "audit": 0, "warning": 1, "note": 1}


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


def make_preview_paths(split: str, num_images: int) -> list[Path]:
    """Return the paths of the thumbnails of a split. They do not depend on the names of the images.

    Args:
        split: Name of the split.
        num_images: Number of images.
    """
    return [Path(split) / f"{number:06}.jpg" for number in range(num_images)]


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


def write_previews(files: Sequence[tuple[Path, Path]]) -> None:
    """Decode images to write their thumbnails.

    Args:
        files: Image file and thumbnail of each image.
    """
    if files:
        log_stage(f"write {len(files):,} thumbnails")
    with ThreadPoolExecutor(NUM_THREADS) as pool, Progress(len(files), "thumbnails", "image", delay_s=2) as progress:
        for _ in pool.map(lambda pair: write_preview(read_image(pair[0]), pair[1]), files):
            progress.update()


def write_preview(image: NDArray[np.uint8], path: Path) -> None:
    """Write the thumbnail of an image.

    Args:
        image (array[H, W, 3]): RGB, uint8.
        path: JPEG file to write.
    """
    # OpenCV averages whole blocks of pixels four times as fast as fractions of pixels.
    factor = max(1, round(max(image.shape[1] / PREVIEW_WH[0], image.shape[0] / PREVIEW_WH[1])))
    height, width = (max(1, side // factor) for side in image.shape[:2])
    blocks = image[: height * factor, : width * factor]
    small = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, PREVIEW_QUALITY]
    path.write_bytes(cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)[1].tobytes())


def write_image_page(path: Path, data: str, images: Sequence[BrowsedImage], num_all: int, preview_dir: Path) -> None:
    """Write the page. It contains the boxes; the images are files.

    Args:
        path: Output file.
        data: Name of the dataset.
        images: Images of the page.
        num_all: Number of images of the dataset.
        preview_dir: Directory of the thumbnails.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    content = json.dumps(_make_page_content(images, path.parent, preview_dir), separators=(",", ":"))
    # Inside a script element, only "<" can end it or start a comment. The rest is ASCII.
    embedded = content.replace("<", "\\u003c")
    colors = {
        "person": PERSON_COLOR,
        "visible": VISIBLE_COLOR,
        "ignored": IGNORED_COLOR,
        "unused": UNUSED_COLOR,
        "proposal": PROPOSAL_COLOR,
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    write_text(
        path, template.render(data=data, content=embedded, colors=colors, num_images=len(images), num_all=num_all)
    )


def _make_page_content(images: Sequence[BrowsedImage], page_dir: Path, preview_dir: Path) -> dict[str, Any]:
    """Return the data of the page. Names that repeat are indices of lists."""
    splits, labels, folders, kinds = _Index(), _Index(), _Index(), _Index()
    counts = Counter(kind for image in images for kind in {kind for _, kind, _ in image.problems})
    severities = {kind: severity for image in images for severity, kind, _ in image.problems}
    return {
        "images": [_make_entry(image, splits, labels, folders, kinds, preview_dir) for image in images],
        "splits": list(splits),
        "labels": list(map(escape_nonprintable, labels)),
        "folders": [[escape_nonprintable(folder), _make_url(Path(folder), page_dir)] for folder in folders],
        "kinds": [[kind, severities[kind], counts[kind]] for kind in kinds],
        "previews": quote(preview_dir.name),
    }


def _make_entry(
    image: BrowsedImage, splits: "_Index", labels: "_Index", folders: "_Index", kinds: "_Index", preview_dir: Path
) -> list[Any]:
    """Return split, folder, name, URL of the name, preview, width, height, boxes by type, and problems of an image."""
    ground_truth = image.ground_truth
    persons = np.flatnonzero(~ground_truth.ignore)
    hidden = persons[ground_truth.visible_ratio[persons] < 1]

    def make_boxes(boxes: NDArray[np.float32], rows: NDArray[np.intp]) -> list[list[int]]:
        names = [labels.find(ground_truth.labels[row]) for row in rows.tolist()]
        return [[*box, name] for box, name in zip(_round_xywh(boxes[rows]), names, strict=True)]

    return [
        splits.find(image.split),
        folders.find(str(image.path.parent)),
        escape_nonprintable(image.path.name),
        quote(os.fsencode(image.path.name)),
        image.preview.stem if (preview_dir / image.preview).is_file() else "",
        *(image.size_hw[::-1] if image.size_hw else (0, 0)),
        make_boxes(ground_truth.boxes_xyxy, persons),
        make_boxes(ground_truth.visible_xyxy, hidden),
        make_boxes(ground_truth.boxes_xyxy, np.flatnonzero(ground_truth.ignore)),
        [[*_round_xywh(np.array([box]))[0], labels.find(name)] for name, box in image.unused],
        _round_xywh(np.array(image.proposals)),
        [[kinds.find(kind), text] for _, kind, text in sorted(image.problems, key=lambda one: PRIORITIES[one[0]])],
    ]


class _Index(dict[str, int]):
    """Strings in the order of their first use, with their positions."""

    def find(self, text: str) -> int:
        return self.setdefault(text, len(self))


def _round_xywh(boxes_xyxy: NDArray[np.floating]) -> list[list[int]]:
    """Return boxes in whole pixels."""
    corners = np.clip(boxes_xyxy.reshape(-1, 4), -1e6, 1e6).round().astype(int)
    rows: list[list[int]] = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    return rows


def _make_url(folder: Path, page_dir: Path) -> str:
    """Return the URL of a folder, relative to the page: it stays valid if both are moved together."""
    try:
        relative = os.path.relpath(folder, page_dir)
    except ValueError:  # another drive of Windows
        return folder.resolve().as_uri()
    return quote(os.fsencode(relative.replace(os.sep, "/")))
