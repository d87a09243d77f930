"""Optimization profile of a dynamic graph: minimum, optimum and maximum input shape of its engine."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hkd_det.errors import DataError, UsageError
from hkd_det.letterbox import STRIDE

DEFAULT_BATCHES = (1, 4, 8)  # minimum, optimum, maximum: suits a few cameras

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Shapes of the input `images`.

    Attributes:
        min: Smallest shape.
        opt: Shape for which the engine is optimized.
        max: Largest shape.
    """

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class ProfileShape:
    """One of the three shapes of --trt-profile.

    Attributes:
        batch: Number of images.
        size_hw: Height and width in pixels, or None if the graph has a fixed size.
    """

    batch: int
    size_hw: tuple[int, int] | None


def parse_profile(text: str) -> tuple[ProfileShape, ProfileShape, ProfileShape]:
    """Parse the value of --trt-profile.

    Args:
        text: Minimum, optimum and maximum, as "1,4,8" (batch) or "1x320x256,4x640x512,8x640x512"
            (batch x width x height).

    Returns:
        The three shapes, in ascending order.

    Raises:
        UsageError: If the text has another form or the shapes do not ascend.
    """
    parsed = [_parse_profile_shape(part) for part in text.split(",")]
    if len(parsed) != 3 or None in parsed:
        raise UsageError(
            f"--trt-profile {text}: expected MIN,OPT,MAX as 1,4,8 (batch) "
            "or 1x320x256,4x640x512,8x640x512 (batch x width x height)."
        )
    smallest, optimum, largest = (shape for shape in parsed if shape)
    values = [(shape.batch, *(shape.size_hw or ())) for shape in (smallest, optimum, largest)]
    if len({len(value) for value in values}) > 1 or any(
        low > high for lower, upper in itertools.pairwise(values) for low, high in zip(lower, upper, strict=True)
    ):
        raise UsageError(f"--trt-profile {text}: expected three shapes of the same form in ascending order.")
    return smallest, optimum, largest


def _parse_profile_shape(text: str) -> ProfileShape | None:
    match = re.fullmatch(r"([1-9][0-9]*)(?:x([1-9][0-9]*)x([1-9][0-9]*))?", text.strip())
    if not match:
        return None
    return ProfileShape(int(match[1]), (int(match[3]), int(match[2])) if match[2] else None)


def resolve_profile(
    shape: Sequence[int],
    requested: tuple[ProfileShape, ProfileShape, ProfileShape] | None,
    metadata: Mapping[str, str],
    path: Path,
) -> Profile | None:
    """Determine the optimization profile of a graph.

    The default profile has the batches 1, 4 and 8. Its largest size is that of the metadata, which is also the optimum.
    Its smallest size is a quarter of it.

    Args:
        shape: Shape of the input `images`, NHWC or NCHW. Free dimensions are -1.
        requested: Shapes of --trt-profile, or None for the default.
        metadata: Metadata of the ONNX file.
        path: The ONNX file, for messages.

    Returns:
        The profile, or None if the graph has no free dimension.

    Raises:
        UsageError: If `requested` contradicts a fixed dimension.
        DataError: If the largest size is needed and missing in the metadata.
    """
    if -1 not in shape:
        if requested:
            raise UsageError(f"--trt-profile: {path} has the fixed shape {list(shape)}. Export it with --dynamic.")
        return None
    profile_shapes = requested or _make_default_shapes(shape, metadata, path)
    return Profile(*(_fill_free_dims(shape, profile_shape, path) for profile_shape in profile_shapes))


def _get_hw_axes(shape: Sequence[int]) -> tuple[int, int]:
    return (1, 2) if shape[-1] == 3 else (2, 3)  # NHWC, else NCHW


def _select_hw(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _get_hw_axes(shape))


def _make_default_shapes(
    shape: Sequence[int], metadata: Mapping[str, str], path: Path
) -> tuple[ProfileShape, ProfileShape, ProfileShape]:
    min_batch, opt_batch, max_batch = DEFAULT_BATCHES if shape[0] == -1 else (shape[0],) * 3
    max_hw = min_hw = None
    if -1 in _select_hw(shape):
        max_hw = _read_max_imgsz_hw(metadata, path)
        min_hw = (_compute_quarter_side(max_hw[0]), _compute_quarter_side(max_hw[1]))
    return ProfileShape(min_batch, min_hw), ProfileShape(opt_batch, max_hw), ProfileShape(max_batch, max_hw)


def _read_max_imgsz_hw(metadata: Mapping[str, str], path: Path) -> tuple[int, int]:
    text = metadata.get("hkd.max_imgsz", metadata.get("imgsz", ""))
    match = re.fullmatch(r"\[([0-9]+), ?([0-9]+)\]", text)
    if not match:
        raise DataError(f"{path}: the metadata contains no largest input size. Set --trt-profile.")
    return int(match[1]), int(match[2])


def _compute_quarter_side(side: int) -> int:
    """Return a quarter of a side as a multiple of the stride."""
    return min(side, max(STRIDE, side // 4 // STRIDE * STRIDE))


def _fill_free_dims(shape: Sequence[int], profile_shape: ProfileShape, path: Path) -> Shape:
    """Replace the free dimensions of `shape`. Raise UsageError if a fixed dimension has another value."""
    axis_h, axis_w = _get_hw_axes(shape)
    size_hw = profile_shape.size_hw
    if size_hw is None:
        if -1 in _select_hw(shape):
            raise UsageError(f"--trt-profile: {path} has a free size. Set batch x width x height, as 1x640x512.")
        size_hw = (shape[axis_h], shape[axis_w])
    filled = list(shape)
    filled[0], filled[axis_h], filled[axis_w] = profile_shape.batch, *size_hw
    if any(dim not in (-1, value) for dim, value in zip(shape, filled, strict=True)):
        raise UsageError(
            f"--trt-profile: {path} takes {list(shape)}, where -1 is free, got {filled}. Export it with --dynamic."
        )
    return tuple(filled)
