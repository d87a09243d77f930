"""A `Sample`: one picture on disk and the people known to be in it."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math
from hkd_det.datasets.jpeg import is_truncated_jpeg
from hkd_det.datasets.png import is_truncated_png
from hkd_det.errors import DataError

REDUCED_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


@dataclass(frozen=True, eq=False)
class GroundTruth:
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
    def empty(cls) -> "GroundTruth":
        """Nobody."""
        nothing = np.zeros((0, 4), np.float32)
        return cls(nothing, np.zeros(0, bool), nothing, ())

    @property
    def heights_px(self) -> NDArray[np.float64]:
        """[N] heights of the whole boxes in pixels."""
        boxes = self.boxes_xyxy.astype(np.float64)
        return boxes[:, 3] - boxes[:, 1]

    @property
    def visible_ratio(self) -> NDArray[np.float64]:
        """[N] visible area over whole area, 0..1 where the visible box lies inside the box; 0 for an empty box.

        In double precision: whether a ratio is just below 0.65 decides who counts.
        """
        seen, whole = (
            box_math.box_area(self.visible_xyxy.astype(np.float64)),
            box_math.box_area(self.boxes_xyxy.astype(np.float64)),
        )
        return np.divide(seen, whole, out=np.zeros_like(whole), where=whole > 0)


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated picture. `size_hw` (height, width) is None where only opening the file would tell."""

    image_id: int | str
    path: Path
    ground_truth: GroundTruth = field(default_factory=GroundTruth.empty)
    size_hw: tuple[int, int] | None = None


def read_image(path: Path, apply_exif: bool = False) -> NDArray[np.uint8]:
    """A picture file as (H, W, 3) uint8 RGB, as stored: boxes refer to the stored pixels.

    upright: turn it as its EXIF orientation says; for a photograph to look at, that has no boxes yet.
    Raises DataError, naming the file, if it is missing, truncated or not a picture.
    """
    return decode_image(read_image_bytes(path), path, apply_exif=apply_exif)


def read_image_bytes(path: Path) -> bytes:
    """A picture file's bytes. Raises DataError, naming the file, if it is missing, or a JPEG or PNG without its end."""
    try:
        packed = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture; check the data set's folder") from None
    if is_truncated_jpeg(packed) or is_truncated_png(packed):
        raise DataError(_format_unreadable(path))
    return packed


def decode_image(encoded: bytes, path: Path, apply_exif: bool = False, reduction: int = 1) -> NDArray[np.uint8]:
    """A picture file's bytes as `read_picture` gives them; `path` is what an error names.

    shrink: 1, 2, 4 or 8: every side divided by it and rounded up, so that pixel i covers the whole's pixels
    i * shrink to (i + 1) * shrink. A JPEG is decoded so at a fraction of the cost; use it for JPEG only, since
    OpenCV rounds other pictures' sides down.
    """
    flags = REDUCED_FLAGS[reduction] | (0 if apply_exif else cv2.IMREAD_IGNORE_ORIENTATION)
    picture = None
    # OpenCV answers a broken file with None, and an empty one or a broken size in its header with an exception.
    with suppress(cv2.error):
        picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    if picture is None:
        raise DataError(_format_unreadable(path))
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)  # not IMREAD_COLOR_RGB: OpenCV 4.10 has none


def _format_unreadable(path: Path) -> str:
    return f"{path}: not a readable picture (truncated, or no picture at all); replace or remove it"
