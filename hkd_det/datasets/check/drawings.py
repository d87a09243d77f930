"""A contact sheet of pictures with their boxes, and the histograms, as pictures."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hkd_det.datasets.check.summary import Bar, Summary
from hkd_det.datasets.sample import Sample, read_picture
from hkd_det.files import replacing

TILE_HW = (300, 400)
COLUMNS = 4
PERSON, VISIBLE, IGNORED = (0, 200, 90), (255, 200, 0), (150, 150, 160)  # RGB
LEGEND = (("to be found", PERSON), ("its visible part", VISIBLE), ("ignored", IGNORED))
GREY = 24


def contact_sheet(samples: Sequence[Sample], count: int = 12) -> NDArray[np.uint8]:
    """`count` readable pictures spread over those with boxes, each fitted into a tile; uint8 RGB, a legend below."""
    shown = [sample for sample in samples if len(sample.truth)] or list(samples)
    places = np.unique(np.linspace(0, len(shown) - 1, min(count, len(shown))).round().astype(int))
    tiles = [_tile(shown[place]) for place in places]
    columns = min(COLUMNS, len(tiles))
    rows = [_row(tiles[start : start + columns], columns) for start in range(0, len(tiles), columns)]
    return np.concatenate([*rows, _legend(columns * TILE_HW[1])])


def _row(tiles: Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Pictures side by side, as high as the highest."""
    row = np.full((max(len(tile) for tile in tiles), columns * TILE_HW[1], 3), GREY, np.uint8)
    for number, tile in enumerate(tiles):
        left = number * TILE_HW[1]
        row[: tile.shape[0], left : left + tile.shape[1]] = tile
    return row


def _tile(sample: Sample) -> NDArray[np.uint8]:
    picture = read_picture(sample.path)
    scale = min(TILE_HW[0] / picture.shape[0], TILE_HW[1] / picture.shape[1])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    small = np.ascontiguousarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    truth = sample.truth
    for row in range(len(truth)):
        if truth.ignore[row]:
            _box(small, truth.boxes_xyxy[row] * scale, IGNORED)
            continue
        if truth.visibility[row] < 1:
            _box(small, truth.visible_xyxy[row] * scale, VISIBLE)
        _box(small, truth.boxes_xyxy[row] * scale, PERSON)
    return small


def _box(picture: NDArray[np.uint8], box_xyxy: NDArray[np.float32], colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = np.clip(box_xyxy, -1e4, 1e4).round().astype(int).tolist()
    cv2.rectangle(picture, (left, top), (right, bottom), colour, 2 if bottom - top > 40 else 1)


def _legend(width: int) -> NDArray[np.uint8]:
    strip = np.full((32, width, 3), GREY, np.uint8)
    for number, (name, colour) in enumerate(LEGEND):
        left = 12 + number * 130
        cv2.rectangle(strip, (left, 10), (left + 12, 22), colour, 2)
        cv2.putText(strip, name, (left + 20, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (230, 230, 230), 1, cv2.LINE_AA)
    return strip


def histograms(summary: Summary) -> Figure:
    """Heights and visibilities of the people to be found, side by side."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, bars) in enumerate((("height", summary.heights), ("visible share", summary.visibilities)), 1):
        axes = figure.add_subplot(1, 2, place)
        _draw(figure, place, bars)
        axes.set_title(title)
    return figure


def _draw(figure: Figure, place: int, bars: Sequence[Bar]) -> None:
    axes = figure.axes[place - 1]
    drawn = axes.barh([bar.label for bar in bars], [bar.count for bar in bars], color="#0072B2")
    axes.bar_label(drawn, padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def write_picture(path: Path, picture_rgb: NDArray[np.uint8]) -> None:
    """In one step, in the format of the path's suffix."""
    packed = cv2.imencode(path.suffix, cv2.cvtColor(picture_rgb, cv2.COLOR_RGB2BGR))[1]
    with replacing(path) as aside:
        aside.write_bytes(packed.tobytes())


def write_figure(path: Path, figure: Figure) -> None:
    """In one step."""
    with replacing(path) as aside:
        figure.savefig(aside, dpi=110)
