"""A contact sheet of pictures with their boxes, and the histograms, as pictures."""

from collections.abc import Sequence

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hkd_det.datasets.check.summary import Summary
from hkd_det.datasets.check.words import histograms
from hkd_det.datasets.sample import Sample, Truth, read_picture

WIDTH_PX, LINE_PX, GAP_PX = 1600, 30, 6
ROW_ASPECT = 4.0  # a row is full when its pictures, side by side, are four times as wide as high
NARROWEST, WIDEST = 0.25, 4.0  # aspect; what is beyond stands in the midst of its tile
PERSON, VISIBLE, IGNORED = (0, 220, 120), (255, 176, 0), (225, 110, 255)  # RGB
PAPER, INK = (24, 26, 30), (235, 235, 235)
Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]


def contact_sheet(readable: Sequence[tuple[Sample, tuple[int, int]]], count: int = 12) -> Picture:
    """`count` pictures spread over those with boxes, in rows, each above its name; uint8 RGB, a legend on top.

    readable: samples with their pictures' (height, width), at least one.
    """
    shown = [one for one in readable if len(one[0].truth)] or list(readable)
    places = np.unique(np.linspace(0, len(shown) - 1, min(count, len(shown))).round().astype(int))
    rows = [_row(row) for row in _rows([shown[place] for place in places])]
    width = max(340, *(row.shape[1] for row in rows))
    sheet = [_legend(width), *rows]
    return np.concatenate([np.concatenate([one, _paper(len(one), width - one.shape[1])], axis=1) for one in sheet])


def _rows(chosen: Sequence[tuple[Sample, tuple[int, int]]]) -> list[list[tuple[Sample, float]]]:
    """Samples and the aspects of their tiles; every row but the last is full."""
    rows: list[list[tuple[Sample, float]]] = [[]]
    for sample, (height, width) in chosen:
        if sum(aspect for _, aspect in rows[-1]) >= ROW_ASPECT:
            rows.append([])
        rows[-1].append((sample, min(max(width / height, NARROWEST), WIDEST)))
    return rows


def _row(row: Sequence[tuple[Sample, float]]) -> Picture:
    high = round(WIDTH_PX / max(ROW_ASPECT, sum(aspect for _, aspect in row)))
    tiles = []
    for sample, aspect in row:
        tile = _tile(sample, high, round(high * aspect) - GAP_PX)
        tiles += [np.concatenate([tile, _caption(sample, tile.shape[1])]), _paper(high + LINE_PX, GAP_PX)]
    return np.concatenate(tiles, axis=1)


def _tile(sample: Sample, height: int, width: int) -> Picture:
    picture = read_picture(sample.path)
    scale = min(height / picture.shape[0], width / picture.shape[1])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    small = np.ascontiguousarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    _draw(small, sample.truth, scale)
    tile = _paper(height, width)
    top, left = (height - small.shape[0]) // 2, (width - small.shape[1]) // 2
    tile[top : top + small.shape[0], left : left + small.shape[1]] = small
    return tile


def _draw(picture: Picture, truth: Truth, scale: float) -> None:
    """Visible parts filled, ignore regions crossed out: told apart without their colours too."""
    for row in np.flatnonzero(truth.ignore):
        _ignored(picture, _corners(truth.boxes_xyxy[row] * scale))
    people = np.flatnonzero(~truth.ignore)
    for row in people[truth.visibility[people] < 1]:
        _visible(picture, _corners(truth.visible_xyxy[row] * scale))
    for row in people:
        start, end = _corners(truth.boxes_xyxy[row] * scale)
        cv2.rectangle(picture, start, end, PERSON, 2 if end[1] - start[1] > 40 else 1)


def _visible(picture: Picture, corners: tuple[tuple[int, int], tuple[int, int]]) -> None:
    (left, top), (right, bottom) = corners
    part = picture[max(0, top) : max(0, bottom), max(0, left) : max(0, right)]
    part[:] = (part * 0.72 + np.array(VISIBLE) * 0.28).astype(np.uint8)
    cv2.rectangle(picture, *corners, VISIBLE, 1)


def _ignored(picture: Picture, corners: tuple[tuple[int, int], tuple[int, int]]) -> None:
    (left, top), (right, bottom) = corners
    cv2.rectangle(picture, *corners, IGNORED, 1)
    cv2.line(picture, (left, top), (right, bottom), IGNORED, 1, cv2.LINE_AA)
    cv2.line(picture, (left, bottom), (right, top), IGNORED, 1, cv2.LINE_AA)


def _corners(box_xyxy: NDArray[np.float32]) -> tuple[tuple[int, int], tuple[int, int]]:
    left, top, right, bottom = np.clip(box_xyxy, -1e4, 1e4).round().astype(int).tolist()
    return (left, top), (right, bottom)


def _paper(height: int, width: int) -> Picture:
    return np.full((height, width, 3), PAPER, np.uint8)


def _caption(sample: Sample, width: int) -> Picture:
    """The file's name, as much as fits, in the letters that OpenCV has."""
    strip = _paper(LINE_PX, width)
    name = sample.path.name.encode("ascii", "replace").decode("ascii")
    while len(name) > 1 and cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)[0][0] > width - 8:
        name = name[:-1]
    _write(strip, name, 4)
    return strip


def _legend(width: int) -> Picture:
    strip = _paper(LINE_PX + 4, width)
    _ignored(strip, ((222, 9), (234, 24)))
    _visible(strip, ((110, 15), (122, 24)))
    for left in (8, 110):
        cv2.rectangle(strip, (left, 9), (left + 12, 24), PERSON, 2 if left == 8 else 1)
    for name, left in (("to be found", 27), ("visible part", 129), ("ignored", 241)):
        _write(strip, name, left)
    return strip


def _write(strip: Picture, words: str, left: int) -> None:
    cv2.putText(strip, words, (left, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.45, INK, 1, cv2.LINE_AA)


def figure_of(summary: Summary) -> Figure:
    """Heights and visibilities of the people to be found, side by side; there must be any."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, bars) in enumerate(histograms(summary), 1):
        axes = figure.add_subplot(1, 2, place)
        drawn = axes.barh([bar.label for bar in bars], [bar.count for bar in bars], color="#0072B2")
        axes.bar_label(drawn, fmt="{:,.0f}", padding=3)
        axes.set_title(title, loc="left", fontsize=11)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure
