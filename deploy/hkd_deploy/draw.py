"""Drawing: boxes on a picture for the demo and the reports, and the demo's panel of figures."""

from collections.abc import Sequence
from enum import Enum

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.detections import Detections

Colour = tuple[int, int, int]  # RGB

FONT = cv2.FONT_HERSHEY_SIMPLEX
INK: Colour = (16, 16, 16)
PAPER: Colour = (245, 245, 245)
CAUTION: Colour = (255, 196, 0)


class Verdict(Enum):
    """What became of a box when it was compared with the truth; the value is its colour.

    Told apart by the colour-blind too: blue-green, red, yellow and grey differ in lightness, and a miss is dashed.
    """

    HIT = (38, 208, 148)
    MISS = (255, 72, 72)
    FALSE_POSITIVE = (255, 214, 10)
    IGNORED = (176, 176, 176)


def draw_detections(
    picture_rgb: NDArray[np.uint8],
    detections: Detections,
    verdicts: Sequence[Verdict] | None = None,
    captions: bool = True,
) -> NDArray[np.uint8]:
    """A copy of the picture, uint8 RGB (H, W, 3), with its detections; captions are their scores.

    verdicts: one a detection, for its colour; without them all are drawn as hits.
    """
    canvas = picture_rgb.copy()
    verdicts = verdicts if verdicts is not None else [Verdict.HIT] * len(detections)
    # The best is drawn last: where people overlap it must not be covered.
    for box, score, verdict in reversed(list(zip(detections.boxes_xyxy, detections.scores, verdicts, strict=True))):
        draw_box(canvas, box, verdict, f"{score:.2f}" if captions else "")
    return canvas


def draw_box(
    canvas_rgb: NDArray[np.uint8], box_xyxy: Sequence[float] | NDArray[np.floating], verdict: Verdict, caption: str = ""
) -> None:
    """Draw one box in place, dashed for a miss, with a caption above if the box is wide enough to carry it."""
    x1, y1, x2, y2 = (round(float(value)) for value in box_xyxy)
    thickness = _thickness_px(canvas_rgb)
    lines = _dashes(x1, y1, x2, y2, 5 * thickness) if verdict is Verdict.MISS else _edges(x1, y1, x2, y2)
    for colour, width in ((INK, thickness + 2), (verdict.value, thickness)):  # a dark rim shows on snow
        for start, end in lines:
            cv2.line(canvas_rgb, start, end, colour, width, cv2.LINE_8)  # upright lines are crisp without smoothing
    if caption:
        _draw_caption(canvas_rgb, (x1, y1, x2, y2), caption, verdict.value)


def draw_panel(canvas_rgb: NDArray[np.uint8], lines: Sequence[str], caution: str = "") -> None:
    """Draw lines of figures in place, top left on a dark, half transparent ground; `caution` last, in yellow."""
    scale, line_px, pad = _text_scale(canvas_rgb), _line_px(canvas_rgb), _line_px(canvas_rgb) // 2
    texts = [(line, PAPER) for line in lines] + ([(caution, CAUTION)] if caution else [])
    width = max(cv2.getTextSize(text, FONT, scale, 1)[0][0] for text, _ in texts) + 2 * pad
    ground = canvas_rgb[: line_px * len(texts) + 3 * pad // 2, :width]
    ground[:] = (0.35 * ground + 0.65 * np.array(INK)).astype(np.uint8)
    for row, (text, colour) in enumerate(texts):
        baseline = pad + line_px * (row + 1) - line_px // 4
        cv2.putText(canvas_rgb, text, (pad, baseline), FONT, scale, colour, 1, cv2.LINE_AA)


def _short_px(canvas: NDArray[np.uint8]) -> int:
    height, width = canvas.shape[:2]
    return int(min(height, width))


def _thickness_px(canvas: NDArray[np.uint8]) -> int:
    return max(1, round(_short_px(canvas) / 300))


def _text_scale(canvas: NDArray[np.uint8]) -> float:
    """Hershey's capitals are 21 px high at scale 1; below 10 px nobody can read them."""
    return max(0.45, _short_px(canvas) / 1000)


def _line_px(canvas: NDArray[np.uint8]) -> int:
    return round(38 * _text_scale(canvas))


Line = tuple[tuple[int, int], tuple[int, int]]


def _edges(x1: int, y1: int, x2: int, y2: int) -> list[Line]:
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    return list(zip(corners, [*corners[1:], corners[0]], strict=True))


def _dashes(x1: int, y1: int, x2: int, y2: int, dash_px: int) -> list[Line]:
    """The four edges cut into dashes with gaps of the same length."""
    dashes = []
    for start, end in _edges(x1, y1, x2, y2):
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        for begin in range(0, length, 2 * dash_px):
            stop = min(begin + dash_px, length)
            dashes.append((_between(start, end, begin / length), _between(start, end, stop / length)))
    return dashes


def _between(start: tuple[int, int], end: tuple[int, int], part: float) -> tuple[int, int]:
    return round(start[0] + part * (end[0] - start[0])), round(start[1] + part * (end[1] - start[1]))


def _draw_caption(canvas: NDArray[np.uint8], box: tuple[int, int, int, int], caption: str, colour: Colour) -> None:
    x1, y1, x2, _ = box
    scale = 0.8 * _text_scale(canvas)
    (width, height), _ = cv2.getTextSize(caption, FONT, scale, 1)
    if x2 - x1 < 0.6 * width:  # a crowd of distant people would vanish behind its own scores
        return
    left = min(max(0, x1 - 1), max(0, canvas.shape[1] - width - 6))
    bottom = y1 if y1 >= height + 6 else y1 + height + 6  # inside the box where there is no room above
    cv2.rectangle(canvas, (left, bottom - height - 6), (left + width + 5, bottom), colour, cv2.FILLED)
    cv2.putText(canvas, caption, (left + 3, bottom - 3), FONT, scale, INK, 1, cv2.LINE_AA)
