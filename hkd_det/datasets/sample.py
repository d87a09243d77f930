"""A `Sample`: one picture on disk and the people known to be in it."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math
from hkd_det.errors import DataError


@dataclass(frozen=True, eq=False)
class Truth:
    """People annotated in one picture, and the regions in which nothing may be judged.

    boxes_xyxy: [N, 4] float32, pixels: the whole person, hidden parts included.
    ignore: [N] bool: a region that is neither a person to find nor background (a rider, a group, a poster).
    visible_xyxy: [N, 4] float32, pixels: the part that can be seen; equal to the box where the data set does not say.
    labels: N names as the data set means them ("pedestrian", "rider", "group", ...).
    """

    boxes_xyxy: NDArray[np.float32]
    ignore: NDArray[np.bool_]
    visible_xyxy: NDArray[np.float32]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.labels)
        if not (self.boxes_xyxy.shape == self.visible_xyxy.shape == (count, 4) and self.ignore.shape == (count,)):
            raise ValueError(
                f"boxes {self.boxes_xyxy.shape}, visible {self.visible_xyxy.shape}, "
                f"ignore {self.ignore.shape} and {count} labels do not belong together"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def empty(cls) -> "Truth":
        """Nobody."""
        nothing = np.zeros((0, 4), np.float32)
        return cls(nothing, np.zeros(0, bool), nothing, ())

    @property
    def heights_px(self) -> NDArray[np.float64]:
        """[N] heights of the whole boxes in pixels."""
        boxes = self.boxes_xyxy.astype(np.float64)
        return boxes[:, 3] - boxes[:, 1]

    @property
    def visibility(self) -> NDArray[np.float64]:
        """[N] visible area over whole area, 0..1 where the visible box lies inside the box; 0 for an empty box.

        In double precision: whether a ratio is just below 0.65 decides who counts.
        """
        seen, whole = (
            box_math.area(self.visible_xyxy.astype(np.float64)),
            box_math.area(self.boxes_xyxy.astype(np.float64)),
        )
        return np.divide(seen, whole, out=np.zeros_like(whole), where=whole > 0)


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated picture. `size_hw` (height, width) is None where only opening the file would tell."""

    image_id: int | str
    path: Path
    truth: Truth = field(default_factory=Truth.empty)
    size_hw: tuple[int, int] | None = None


def read_picture(path: Path, upright: bool = False) -> NDArray[np.uint8]:
    """A picture file as (H, W, 3) uint8 RGB, as stored: boxes refer to the stored pixels.

    upright: turn it as its EXIF orientation says; for a photograph to look at, that has no boxes yet.
    Raises DataError, naming the file, if it is missing, truncated or not a picture.
    """
    try:
        packed = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture; check the data set's folder") from None
    picture = None
    if packed.size and not _is_truncated_jpeg(packed):
        as_stored = 0 if upright else cv2.IMREAD_IGNORE_ORIENTATION
        # OpenCV answers a broken file with None, and a broken size in its header with an exception.
        with suppress(cv2.error):
            picture = cv2.imdecode(packed, cv2.IMREAD_COLOR | as_stored)
    if picture is None:
        raise DataError(f"{path}: not a readable picture (truncated, or no picture at all); replace or remove it")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)  # not IMREAD_COLOR_RGB: OpenCV 4.10 has none


def _is_truncated_jpeg(packed: NDArray[np.uint8]) -> bool:
    """OpenCV fills the missing part of a cut JPEG with grey and says nothing: look for the end mark ourselves.

    Behind the start of the picture proper: a thumbnail in the header has an end mark too, and cameras append
    films and second pictures.
    """
    raw = packed.tobytes()
    if raw[:2] != b"\xff\xd8":
        return False
    at = 2
    while raw[at : at + 1] == b"\xff" and raw[at + 1 : at + 2] != b"\xda":  # header segments, up to the first scan
        at += 1 if raw[at + 1 : at + 2] == b"\xff" else 2 + int.from_bytes(raw[at + 2 : at + 4], "big")
    return b"\xff\xd9" not in raw[at:]
