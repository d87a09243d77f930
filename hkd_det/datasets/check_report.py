"""A contact sheet of pictures with their boxes, and the histograms, as pictures.

The page: all that the check found, in one file that needs no other.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hkd_det.datasets.check_summary import HistogramBin, SplitSummary, list_histograms, make_summary_rows
from hkd_det.files import write_text
from hkd_det.image import read_image
from hkd_det.structures import GroundTruth, Sample

SHEET_WIDTH_PX, CAPTION_HEIGHT_PX, GAP_PX = 1600, 30, 6


ROW_ASPECT = 4.0  # a row is full when its pictures, side by side, are four times as wide as high


MIN_ASPECT, MAX_ASPECT = 0.25, 4.0  # aspect; what is beyond stands in the midst of its tile


PERSON_COLOR, VISIBLE_COLOR, IGNORED_COLOR = (0, 220, 120), (255, 176, 0), (225, 110, 255)  # RGB


BACKGROUND_COLOR, TEXT_COLOR = (24, 26, 30), (235, 235, 235)


ImageRGB = NDArray[np.uint8]


Color = tuple[int, int, int]


def make_contact_sheet(readable_samples: Sequence[tuple[Sample, tuple[int, int]]], num_images: int = 12) -> ImageRGB:
    """`count` pictures spread over those with boxes, in rows, each above its name; uint8 RGB, a legend on top.

    readable: samples with their pictures' (height, width), at least one.
    """
    shown = [one for one in readable_samples if len(one[0].ground_truth)] or list(readable_samples)
    places = np.unique(np.linspace(0, len(shown) - 1, min(num_images, len(shown))).round().astype(int))
    rows = [_render_row(row) for row in _layout_rows([shown[place] for place in places])]
    width = max(340, *(row.shape[1] for row in rows))
    sheet = [_render_legend(width), *rows]
    return np.concatenate(
        [np.concatenate([one, _make_background(len(one), width - one.shape[1])], axis=1) for one in sheet]
    )


def _layout_rows(readable_samples: Sequence[tuple[Sample, tuple[int, int]]]) -> list[list[tuple[Sample, float]]]:
    """Samples and the aspects of their tiles; every row but the last is full."""
    rows: list[list[tuple[Sample, float]]] = [[]]
    for sample, (height, width) in readable_samples:
        if sum(aspect for _, aspect in rows[-1]) >= ROW_ASPECT:
            rows.append([])
        rows[-1].append((sample, min(max(width / height, MIN_ASPECT), MAX_ASPECT)))
    return rows


def _render_row(row: Sequence[tuple[Sample, float]]) -> ImageRGB:
    high = round(SHEET_WIDTH_PX / max(ROW_ASPECT, sum(aspect for _, aspect in row)))
    tiles = []
    for sample, aspect in row:
        tile = _render_tile(sample, high, round(high * aspect) - GAP_PX)
        tiles += [
            np.concatenate([tile, _render_caption(sample, tile.shape[1])]),
            _make_background(high + CAPTION_HEIGHT_PX, GAP_PX),
        ]
    return np.concatenate(tiles, axis=1)


def _render_tile(sample: Sample, height: int, width: int) -> ImageRGB:
    picture = read_image(sample.path)
    scale = min(height / picture.shape[0], width / picture.shape[1])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    small = np.ascontiguousarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    _draw_annotations(small, sample.ground_truth, scale)
    tile = _make_background(height, width)
    top, left = (height - small.shape[0]) // 2, (width - small.shape[1]) // 2
    tile[top : top + small.shape[0], left : left + small.shape[1]] = small
    return tile


def _draw_annotations(image: ImageRGB, ground_truth: GroundTruth, scale: float) -> None:
    """Visible parts filled, ignore regions crossed out: told apart without their colours too."""
    for row in np.flatnonzero(ground_truth.ignore):
        _draw_ignore_region(image, _round_corners(ground_truth.boxes_xyxy[row] * scale))
    people = np.flatnonzero(~ground_truth.ignore)
    for row in people[ground_truth.visible_ratio[people] < 1]:
        _draw_visible_part(image, _round_corners(ground_truth.visible_xyxy[row] * scale))
    for row in people:
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
    """The file's name, as much as fits, in the letters that OpenCV has."""
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
    for name, left in (("to be found", 27), ("visible part", 129), ("ignored", 241)):
        _put_text(strip, name, left)
    return strip


def _put_text(strip: ImageRGB, text: str, left: int) -> None:
    cv2.putText(strip, text, (left, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.45, TEXT_COLOR, 1, cv2.LINE_AA)


def plot_histograms(summary: SplitSummary) -> Figure:
    """Heights and visibilities of the people to be found, side by side; there must be any."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, bars) in enumerate(list_histograms(summary), 1):
        axes = figure.add_subplot(1, 2, place)
        drawn = axes.barh([bar.label for bar in bars], [bar.count for bar in bars], color="#0072B2")
        axes.bar_label(drawn, fmt="{:,.0f}", padding=3)
        axes.set_title(title, loc="left", fontsize=11)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


TEMPLATE = Path(__file__).with_name("page.html.j2")


MAX_SHOWN, MAX_LISTED = 50, 2000  # faults: in sight, and on the page at all


@dataclass(frozen=True)
class SplitReport:
    """A split. sheet_jpg: the contact sheet as a JPEG file's bytes, empty if no picture can be read."""

    summary: SplitSummary
    contact_sheet_jpg: bytes

    @property
    def summary_rows(self) -> list[tuple[str, str]]:
        return make_summary_rows(self.summary)

    @property
    def histograms(self) -> list[tuple[str, list[tuple[HistogramBin, float]]]]:
        """Titles, and bars with their lengths in percent of the longest."""
        return [
            (title, [(bar, 100 * bar.count / max(1, *(one.count for one in bars))) for bar in bars])
            for title, bars in list_histograms(self.summary)
        ]

    @property
    def contact_sheet_uri(self) -> str:
        """A data URI."""
        return "data:image/jpeg;base64," + base64.b64encode(self.contact_sheet_jpg).decode("ascii")


def write_dataset_report(path: Path, data: str, reports: Sequence[SplitReport], errors: Sequence[str]) -> None:
    """In one step."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    shown, more = errors[:MAX_SHOWN], errors[MAX_SHOWN:MAX_LISTED]
    left = len(errors) - len(shown) - len(more)
    write_text(path, template.render(data=data, parts=reports, count=len(errors), shown=shown, more=more, left=left))
