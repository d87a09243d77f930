"""Boxes from first to last pixel, as PASCAL's formats have them."""

from hkd_det.errors import DataError


def xyxy_from_inclusive(
    pixels: tuple[float, float, float, float], first_pixel: int, size_hw: tuple[int, int] | None, where: str
) -> list[float]:
    """Left, top, right and bottom pixel, the last two included, as xyxy from 0.

    size_hw: the picture's; None if the file does not say. Raises DataError, which begins with `where`, for a box that
    ends before it begins or is wholly outside its picture.
    """
    left, top, right, bottom = pixels
    if right < left or bottom < top:
        raise DataError(f"{where}: the box {list(pixels)} has a negative width or height")
    x1, y1, x2, y2 = left - first_pixel, top - first_pixel, right - first_pixel + 1, bottom - first_pixel + 1
    if size_hw and (x1 >= size_hw[1] or y1 >= size_hw[0] or x2 <= 0 or y2 <= 0):
        raise DataError(f"{where}: the box {list(pixels)} is outside its picture of {size_hw[1]} x {size_hw[0]} pixels")
    return [x1, y1, x2, y2]
