"""Report of `hkd-train --check`: contact sheet, histograms, and one self-contained HTML page."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import cv2
import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hkd_det.datasets.check_summary import (
    HistogramBin,
    SplitSummary,
    escape_nonprintable,
    list_histograms,
    make_summary_rows,
)
from hkd_det.files import atomic_write, write_text
from hkd_det.image import read_image
from hkd_det.structures import GroundTruth, Sample

ImageRGB = NDArray[np.uint8]

TEMPLATE = Path(__file__).with_name("check_report.html.j2")
MAX_SHOWN, MAX_LISTED = 50, 2000  # errors that are visible at once, and errors on the page
SOURCE_NAME = "source.txt"  # in the directory of the report: path or name of the dataset
GENERIC_NAMES = ("data.yaml", "dataset.yaml", "_annotations.coco.json", "result.json")
SPLIT_DIRECTORIES = ("train", "valid", "val", "test")
SHEET_WIDTH_PX, CAPTION_HEIGHT_PX, GAP_PX = 1600, 30, 6
ROW_ASPECT = 4.0  # width / height of a full row
MIN_ASPECT, MAX_ASPECT = 0.25, 4.0  # of a tile; other images are centered in their tile
PERSON_COLOR, VISIBLE_COLOR, IGNORED_COLOR = (0, 220, 120), (255, 176, 0), (225, 110, 255)  # RGB
BACKGROUND_COLOR, TEXT_COLOR = (24, 26, 30), (235, 235, 235)


def make_contact_sheet(readable_samples: Sequence[tuple[Sample, tuple[int, int]]], num_images: int = 12) -> ImageRGB:
    """Draw images, evenly spaced in the split, with their annotations, file names and a legend.

    Args:
        readable_samples: Samples with height and width of their images in pixels; at least one. Samples with boxes are
            preferred.
        num_images: Maximum number of images.

    Returns:
        sheet (uint8 array[H, W, 3]): RGB.
    """
    candidates = [pair for pair in readable_samples if len(pair[0].ground_truth)] or list(readable_samples)
    indices = np.unique(np.linspace(0, len(candidates) - 1, min(num_images, len(candidates))).round().astype(int))
    rows = [_render_row(row) for row in _layout_rows([candidates[index] for index in indices])]
    width = max(340, *(row.shape[1] for row in rows))
    strips = [_render_legend(width), *rows]
    return np.concatenate(
        [np.concatenate([strip, _make_background(len(strip), width - strip.shape[1])], axis=1) for strip in strips]
    )


def plot_histograms(summary: SplitSummary) -> Figure:
    """Plot the histograms of box height and visible ratio; the split must contain ground-truth boxes."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for position, (title, bins) in enumerate(list_histograms(summary), 1):
        axes = figure.add_subplot(1, 2, position)
        bars = axes.barh([bin_.label for bin_ in bins], [bin_.count for bin_ in bins], color="#0072B2")
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.set_title(title, loc="left", fontsize=11)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def save_split_images(
    summary: SplitSummary, readable_samples: Sequence[tuple[Sample, tuple[int, int]]], output_dir: Path
) -> bytes:
    """Write histograms and contact sheet as PNG.

    Args:
        summary: Statistics of the split.
        readable_samples: Samples with height and width of their images in pixels.
        output_dir: Directory of the report.

    Returns:
        The contact sheet as JPEG; empty without readable images.
    """
    histograms_path = output_dir / f"{summary.split}_histograms.png"
    sheet_path = output_dir / f"{summary.split}_images.png"
    for path in (histograms_path, sheet_path):
        path.unlink(missing_ok=True)
    if summary.num_gt:
        with atomic_write(histograms_path) as temp_path:
            plot_histograms(summary).savefig(temp_path, dpi=110)
    if not readable_samples:
        return b""
    sheet = make_contact_sheet(readable_samples)
    with atomic_write(sheet_path) as temp_path:
        temp_path.write_bytes(encode_sheet(sheet, ".png"))
    return encode_sheet(sheet, ".jpg")


def encode_sheet(image_rgb: ImageRGB, suffix: str) -> bytes:
    """Encode an image.

    Args:
        image_rgb (array[H, W, 3], uint8): RGB.
        suffix: Suffix of the format, such as ".jpg".

    Returns:
        Content of the file.
    """
    return cv2.imencode(suffix, cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))[1].tobytes()


@dataclass(frozen=True)
class SplitReport:
    """One split in the report.

    Attributes:
        summary: Statistics of the split.
        contact_sheet_jpg: Contact sheet as the content of a JPEG file; empty without readable images.
    """

    summary: SplitSummary
    contact_sheet_jpg: bytes

    @property
    def summary_rows(self) -> list[tuple[str, str]]:
        """Name and value of each row of the summary."""
        return make_summary_rows(self.summary)

    @property
    def histograms(self) -> list[tuple[str, list[tuple[HistogramBin, float]]]]:
        """Title of each histogram, and its bins with their lengths in percent of the longest."""
        return [
            (title, [(bin_, 100 * bin_.count / max(1, *(other.count for other in bins))) for bin_ in bins])
            for title, bins in list_histograms(self.summary)
        ]

    @property
    def contact_sheet_uri(self) -> str:
        """Data URI of the contact sheet."""
        return "data:image/jpeg;base64," + base64.b64encode(self.contact_sheet_jpg).decode("ascii")


@dataclass(frozen=True)
class DuplicateReport:
    """Near-duplicates within a split or between two splits in the report.

    Attributes:
        title: Names of the splits.
        summary: Number of images.
        sheet_jpg: Pairs of images as the content of a JPEG file; empty without pairs.
    """

    title: str
    summary: str
    sheet_jpg: bytes

    @property
    def sheet_uri(self) -> str:
        """Data URI of the sheet."""
        return "data:image/jpeg;base64," + base64.b64encode(self.sheet_jpg).decode("ascii")


def choose_report_dir(parent: Path, data: str, prefix: str = "") -> Path:
    """Return the directory of the report of a dataset, which no other dataset has.

    The name is that of the file or directory. Files with the same name in each dataset have that of their directory.

    Args:
        parent: Directory of all reports.
        data: Dataset, as for `check_dataset`.
        prefix: Start of the name of the directory.

    Returns:
        `parent`/NAME. If another dataset has this directory, `parent`/NAME-2 and so on.
    """
    path, source = _find_named_path(data), describe_source(data)
    name = path.name if path.is_dir() else path.stem
    if name in SPLIT_DIRECTORIES and path.parent.name:
        name = f"{path.parent.name}-{name}"
    for number in count(1):
        candidate = parent / f"{prefix}{name}{f'-{number}' if number > 1 else ''}"
        marker = candidate / SOURCE_NAME
        if not marker.exists() or marker.read_text(encoding="utf-8", errors="replace").rstrip("\n") == source:
            return candidate
    raise AssertionError  # the loop is endless


def describe_source(data: str) -> str:
    """Return the absolute path of a dataset, or its name in datasets.yaml.

    Args:
        data: Dataset, as for `check_dataset`.
    """
    return escape_nonprintable(str(_find_named_path(data)))


def write_dataset_report(
    path: Path,
    data: str,
    reports: Sequence[SplitReport],
    duplicates: Sequence[DuplicateReport],
    errors: Sequence[str],
    warnings: Sequence[str] = (),
    image_page: str = "",
) -> None:
    """Write the HTML page; the file is replaced atomically.

    Args:
        path: Output file.
        data: Name of the dataset.
        reports: Content of each split.
        duplicates: Near-duplicates within and between splits.
        errors: One line per error.
        warnings: One line per problem that is not an error.
        image_page: File name of the page with all images; empty without such a page.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    shown, more = errors[:MAX_SHOWN], errors[MAX_SHOWN:MAX_LISTED]
    num_omitted = len(errors) - len(shown) - len(more)
    write_text(
        path,
        template.render(
            data=data,
            reports=reports,
            duplicates=duplicates,
            num_errors=len(errors),
            shown=shown,
            more=more,
            num_omitted=num_omitted,
            warnings=warnings[:MAX_LISTED],
            num_warnings=len(warnings),
            image_page=image_page,
        ),
    )


def _layout_rows(readable_samples: Sequence[tuple[Sample, tuple[int, int]]]) -> list[list[tuple[Sample, float]]]:
    """Arrange samples in rows with the aspect ratio of their tiles; every row except the last is full."""
    rows: list[list[tuple[Sample, float]]] = [[]]
    for sample, (height, width) in readable_samples:
        if sum(aspect for _, aspect in rows[-1]) >= ROW_ASPECT:
            rows.append([])
        rows[-1].append((sample, min(max(width / height, MIN_ASPECT), MAX_ASPECT)))
    return rows


def _render_row(row: Sequence[tuple[Sample, float]]) -> ImageRGB:
    height = round(SHEET_WIDTH_PX / max(ROW_ASPECT, sum(aspect for _, aspect in row)))
    tiles = []
    for sample, aspect in row:
        tile = _render_tile(sample, height, round(height * aspect) - GAP_PX)
        tiles += [
            np.concatenate([tile, _render_caption(sample, tile.shape[1])]),
            _make_background(height + CAPTION_HEIGHT_PX, GAP_PX),
        ]
    return np.concatenate(tiles, axis=1)


def _render_tile(sample: Sample, height: int, width: int) -> ImageRGB:
    image = read_image(sample.path)
    scale = min(height / image.shape[0], width / image.shape[1])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    resized = np.ascontiguousarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    _draw_annotations(resized, sample.ground_truth, scale)
    tile = _make_background(height, width)
    top, left = (height - resized.shape[0]) // 2, (width - resized.shape[1]) // 2
    tile[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
    return tile


def _draw_annotations(image: ImageRGB, ground_truth: GroundTruth, scale: float) -> None:
    """Draw boxes, filled visible parts and crossed-out ignore regions, which differ without color too."""
    for row in np.flatnonzero(ground_truth.ignore):
        _draw_ignore_region(image, _round_corners(ground_truth.boxes_xyxy[row] * scale))
    persons = np.flatnonzero(~ground_truth.ignore)
    for row in persons[ground_truth.visible_ratio[persons] < 1]:
        _draw_visible_part(image, _round_corners(ground_truth.visible_xyxy[row] * scale))
    for row in persons:
        start, end = _round_corners(ground_truth.boxes_xyxy[row] * scale)
        cv2.rectangle(image, start, end, PERSON_COLOR, 2 if end[1] - start[1] > 40 else 1)


def _draw_visible_part(image: ImageRGB, corners: tuple[tuple[int, int], tuple[int, int]]) -> None:
    (left, top), (right, bottom) = corners
    part = image[max(0, top) : max(0, bottom), max(0, left) : max(0, right)]
    part[:] = (part * 0.72 + np.array(VISIBLE_COLOR) * 0.28).astype(np.uint8)
    cv2.rectangle(image, *corners, VISIBLE_COLOR, 1)


def _draw_ignore_region(image: ImageRGB, corners: tuple[tuple[int, int], tuple[int, int]]) -> None:
    (left, top), (right, bottom) = corners
    cv2.rectangle(image, *corners, IGNORED_COLOR, 1)
    cv2.line(image, (left, top), (right, bottom), IGNORED_COLOR, 1, cv2.LINE_AA)
    cv2.line(image, (left, bottom), (right, top), IGNORED_COLOR, 1, cv2.LINE_AA)


def _round_corners(box_xyxy: NDArray[np.float32]) -> tuple[tuple[int, int], tuple[int, int]]:
    left, top, right, bottom = np.clip(box_xyxy, -1e4, 1e4).round().astype(int).tolist()
    return (left, top), (right, bottom)


def _make_background(height: int, width: int) -> ImageRGB:
    return np.full((height, width, 3), BACKGROUND_COLOR, np.uint8)


def _render_caption(sample: Sample, width: int) -> ImageRGB:
    """Draw the file name in ASCII, shortened to the width."""
    strip = _make_background(CAPTION_HEIGHT_PX, width)
    name = sample.path.name.encode("ascii", "replace").decode("ascii")
    while len(name) > 1 and cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)[0][0] > width - 8:
        name = name[:-1]
    _put_text(strip, name, 4)
    return strip


def _render_legend(width: int) -> ImageRGB:
    strip = _make_background(CAPTION_HEIGHT_PX + 4, width)
    _draw_ignore_region(strip, ((222, 9), (234, 24)))
    _draw_visible_part(strip, ((110, 15), (122, 24)))
    for left in (8, 110):
        cv2.rectangle(strip, (left, 9), (left + 12, 24), PERSON_COLOR, 2 if left == 8 else 1)
    for name, left in (("person", 27), ("visible part", 129), ("ignored", 241)):
        _put_text(strip, name, left)
    return strip


def _put_text(strip: ImageRGB, text: str, left: int) -> None:
    cv2.putText(strip, text, (left, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.45, TEXT_COLOR, 1, cv2.LINE_AA)


def _find_named_path(data: str) -> Path:
    path = Path(data)
    if not path.exists():
        return path
    return path.resolve().parent if path.name in GENERIC_NAMES else path.resolve()
