"""A page on which the images of a dataset can be browsed with their boxes: thumbnails, filters, orders and zoom.

`image_page.html.j2` is the template that the pages extend. It contains the boxes as JSON; the images are files.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import cv2
import jinja2
import numpy as np
from numpy.typing import NDArray

from hkd_det.console import Progress, log_stage
from hkd_det.datasets.check_summary import escape_nonprintable
from hkd_det.files import write_text
from hkd_det.image import read_image

NUM_THREADS = 4  # OpenCV releases the GIL while it decodes
PREVIEW_DIR = "thumbnails"
PREVIEW_WH, PREVIEW_QUALITY = (320, 240), 75  # approximate size; about 10 kB per image
DEFAULT_MAX_IMAGES = 10_000  # 100 MB of thumbnails, and a page of a few MB

Severity = Literal["error", "warning", "audit", "note"]
PRIORITIES: dict[Severity, int] = {"error": 0, "audit": 0, "warning": 1, "note": 1}
Color = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class LabeledBoxes:
    """Boxes of one type in one image.

    Attributes:
        boxes_xyxy (array[N, 4]): xyxy, pixels of the image.
        labels: Text of each box; empty if the boxes have no text.
    """

    boxes_xyxy: NDArray[np.floating]
    labels: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class PageImage:
    """An image of the page.

    Attributes:
        split: Name of the split.
        path: Image file.
        preview: Path of the thumbnail in the directory of thumbnails.
        size_hw: Height and width in pixels; None if the image cannot be read.
        boxes: Boxes of each type of the page, in its order.
        problems: Severity, kind and text of each problem, or of each other note on the image.
    """

    split: str
    path: Path
    preview: Path
    size_hw: tuple[int, int] | None
    boxes: Sequence[LabeledBoxes]
    problems: Sequence[tuple[Severity, str, str]]


def make_preview_paths(split: str, num_images: int) -> list[Path]:
    """Return the paths of the thumbnails of a split. They do not depend on the names of the images.

    Args:
        split: Name of the split.
        num_images: Number of images.
    """
    return [Path(split) / f"{number:06}.jpg" for number in range(num_images)]


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


def write_image_page(
    path: Path,
    template: Path,
    images: Iterable[PageImage],
    preview_dir: Path,
    colors: Mapping[str, Color],
    context: Mapping[str, Any],
) -> None:
    """Write a page; the file is replaced atomically.

    Args:
        path: Output file.
        template: Template that extends `image_page.html.j2`.
        images: Images of the page.
        preview_dir: Directory of the thumbnails, next to the page.
        colors: RGB color of each type of boxes.
        context: Further variables of the template; `data` is the name of the dataset.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    content = json.dumps(_make_content(images, path.parent, preview_dir), separators=(",", ":"))
    # Inside a script element, only "<" can end it or start a comment. The rest is ASCII.
    embedded = content.replace("<", "\\u003c")
    write_text(path, environment.get_template(template.name).render(content=embedded, colors=colors, **context))


def _make_content(images: Iterable[PageImage], page_dir: Path, preview_dir: Path) -> dict[str, Any]:
    """Return the data of the page. Names that repeat are indices of lists."""
    splits, labels, folders, kinds = _Index(), _Index(), _Index(), _Index()
    severities: dict[str, Severity] = {}
    counts: Counter[str] = Counter()
    entries = []
    for image in images:
        severities.update({kind: severity for severity, kind, _ in image.problems})
        counts.update({kind for _, kind, _ in image.problems})
        entries.append(_make_entry(image, splits, labels, folders, kinds, preview_dir))
    return {
        "images": entries,
        "splits": list(splits),
        "labels": list(map(escape_nonprintable, labels)),
        "folders": [[escape_nonprintable(folder), _make_url(Path(folder), page_dir)] for folder in folders],
        "kinds": [[kind, severities[kind], counts[kind]] for kind in kinds],
        "previews": quote(preview_dir.name),
    }


def _make_entry(
    image: PageImage, splits: "_Index", labels: "_Index", folders: "_Index", kinds: "_Index", preview_dir: Path
) -> list[Any]:
    """Return split, folder, name, URL of the name, preview, width, height, boxes by type, and problems of an image."""
    return [
        splits.find(image.split),
        folders.find(str(image.path.parent)),
        escape_nonprintable(image.path.name),
        quote(os.fsencode(image.path.name)),
        image.preview.stem if (preview_dir / image.preview).is_file() else "",
        *(image.size_hw[::-1] if image.size_hw else (0, 0)),
        *(_make_boxes(boxes, labels) for boxes in image.boxes),
        [[kinds.find(kind), text] for _, kind, text in sorted(image.problems, key=lambda one: PRIORITIES[one[0]])],
    ]


def _make_boxes(boxes: LabeledBoxes, labels: "_Index") -> list[list[int]]:
    """Return boxes in whole pixels: x, y, width, height and, with labels, the index of the label."""
    corners = np.clip(boxes.boxes_xyxy.reshape(-1, 4), -1e6, 1e6).round().astype(int)
    rows: list[list[int]] = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    if not boxes.labels:
        return rows
    return [[*row, labels.find(label)] for row, label in zip(rows, boxes.labels, strict=True)]


class _Index(dict[str, int]):
    """Strings in the order of their first use, with their positions."""

    def find(self, text: str) -> int:
        return self.setdefault(text, len(self))


def _make_url(folder: Path, page_dir: Path) -> str:
    """Return the URL of a folder, relative to the page: it stays valid if both are moved together."""
    try:
        relative = os.path.relpath(folder, page_dir)
    except ValueError:  # another drive of Windows
        return folder.resolve().as_uri()
    return quote(os.fsencode(relative.replace(os.sep, "/")))
