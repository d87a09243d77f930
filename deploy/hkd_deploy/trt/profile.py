"""The optimisation profile of a dynamic graph: the smallest and largest input its engine runs, and the usual one."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hkd_det.errors import DataError, UsageError
from hkd_det.letterbox import STRIDE

DEFAULT_BATCHES = (1, 4, 8)  # a few cameras; smallest, usual, largest

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Shapes of `images`: the smallest, the one it is tuned for, the largest."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class ProfileShape:
    """One of the three of --profile: pictures at once and, where the size is free, their (height, width)."""

    batch: int
    size_hw: tuple[int, int] | None


def parse_profile(text: str) -> tuple[ProfileShape, ProfileShape, ProfileShape]:
    """`"1,4,8"` (batch) or `"1x320x256,4x640x512,8x640x512"` (batch x width x height): smallest, usual, largest."""
    steps = [_parse_profile_shape(part) for part in text.split(",")]
    if len(steps) != 3 or None in steps:
        raise UsageError(
            f"--trt-profile {text}: expected smallest,usual,largest as 1,4,8 (batch) "
            "or 1x320x256,4x640x512,8x640x512 (batch x width x height)"
        )
    smallest, usual, largest = (step for step in steps if step)
    rising = [(step.batch, *(step.size_hw or ())) for step in (smallest, usual, largest)]
    if len({len(values) for values in rising}) > 1 or any(
        low > high for one, other in itertools.pairwise(rising) for low, high in zip(one, other, strict=True)
    ):
        raise UsageError(f"--trt-profile {text}: must rise from smallest over usual to largest, in the same form")
    return smallest, usual, largest


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
    """The profile for an input of `shape`, -1 where free; None if nothing is free.

    Without a wish: batches 1, 4, 8; sizes from a quarter of the largest, which the metadata names, tuned for
    the largest. Raises UsageError for a wish the graph cannot grant, DataError if the largest size is not named.
    """
    if -1 not in shape:
        if requested:
            raise UsageError(f"--trt-profile: {path} takes {list(shape)} and nothing else; export it with --dynamic")
        return None
    steps = requested or _make_default_shapes(shape, metadata, path)
    return Profile(*(_fill_free_dims(shape, step, path) for step in steps))


def _get_hw_axes(shape: Sequence[int]) -> tuple[int, int]:
    return (1, 2) if shape[-1] == 3 else (2, 3)  # (B, H, W, 3), else (B, 3, H, W)


def _select_hw(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _get_hw_axes(shape))


def _make_default_shapes(
    shape: Sequence[int], metadata: Mapping[str, str], path: Path
) -> tuple[ProfileShape, ProfileShape, ProfileShape]:
    smallest, usual, largest = DEFAULT_BATCHES if shape[0] == -1 else (shape[0],) * 3
    largest_hw = smallest_hw = None
    if -1 in _select_hw(shape):
        largest_hw = _read_max_hw(metadata, path)
        smallest_hw = (_compute_quarter_side(largest_hw[0]), _compute_quarter_side(largest_hw[1]))
    return ProfileShape(smallest, smallest_hw), ProfileShape(usual, largest_hw), ProfileShape(largest, largest_hw)


def _read_max_hw(metadata: Mapping[str, str], path: Path) -> tuple[int, int]:
    named = metadata.get("hkd.max_imgsz", metadata.get("imgsz", ""))
    match = re.fullmatch(r"\[([0-9]+), ?([0-9]+)\]", named)
    if not match:
        raise DataError(f"{path}: its metadata names no largest size; give --trt-profile")
    return int(match[1]), int(match[2])


def _compute_quarter_side(side: int) -> int:
    """Of a side, as a multiple of the stride."""
    return min(side, max(STRIDE, side // 4 // STRIDE * STRIDE))


def _fill_free_dims(shape: Sequence[int], profile_shape: ProfileShape, path: Path) -> Shape:
    """`shape` with its free places taken from the step; what is not free must be what the step says."""
    axis_h, axis_w = _get_hw_axes(shape)
    size_hw = profile_shape.size_hw
    if size_hw is None:
        if -1 in _select_hw(shape):
            raise UsageError(f"--trt-profile: {path} leaves the size free; say batch x width x height, as 1x640x512")
        size_hw = (shape[axis_h], shape[axis_w])
    filled = list(shape)
    filled[0], filled[axis_h], filled[axis_w] = profile_shape.batch, *size_hw
    if any(free not in (-1, value) for free, value in zip(shape, filled, strict=True)):
        raise UsageError(
            f"--trt-profile: {path} takes {list(shape)}, where -1 is free, not {filled}; export it with --dynamic"
        )
    return tuple(filled)
