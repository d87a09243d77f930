"""What a split holds, in numbers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.sample import Sample

# Where the protocols' setups end: far, medium, Reasonable, Reasonable_small, near, large.
HEIGHT_EDGES_PX = (0, 20, 30, 50, 75, 100, 150, 250, 500, np.inf)
VISIBLE_RATIO_EDGES = (0, 0.2, 0.4, 0.65, 0.9, 1, np.inf)


@dataclass(frozen=True)
class HistogramBin:
    """One bin of a histogram."""

    label: str
    count: int


@dataclass(frozen=True)
class Range:
    """Of one side of the pictures, in pixels."""

    min_px: int
    median_px: float
    max_px: int


@dataclass(frozen=True)
class SplitSummary:
    """A split. people: to be found; regions: ignored; empty: pictures without people to be found; unreadable: pictures.

    labels: how often each stands, as the data set calls them. sizes: (width x height, pictures), the most frequent
    first; width, height: of the pictures, None where none can be read. heights, visibilities: of the people to be
    found.
    """

    split: str
    num_images: int
    num_empty: int
    num_unreadable: int
    num_gt: int
    num_ignore_regions: int
    label_counts: tuple[tuple[str, int], ...]
    size_counts: tuple[tuple[str, int], ...]
    width_range: Range | None
    height_range: Range | None
    height_bins: tuple[HistogramBin, ...]
    visible_ratio_bins: tuple[HistogramBin, ...]


def summarize(split: str, samples: Sequence[Sample], sizes_hw: Sequence[tuple[int, int] | None]) -> SplitSummary:
    """sizes_hw: (height, width) of each sample's picture, None where it can't be read."""
    wanted = [~sample.ground_truth.ignore for sample in samples]
    heights = _concatenate_values(
        [sample.ground_truth.heights_px[keep] for sample, keep in zip(samples, wanted, strict=True)]
    )
    visible = _concatenate_values(
        [sample.ground_truth.visible_ratio[keep] for sample, keep in zip(samples, wanted, strict=True)]
    )
    read = [size for size in sizes_hw if size]
    return SplitSummary(
        split,
        num_images=len(samples),
        num_empty=sum(not keep.any() for keep in wanted),
        num_unreadable=len(samples) - len(read),
        num_gt=len(heights),
        num_ignore_regions=sum(int(sample.ground_truth.ignore.sum()) for sample in samples),
        label_counts=tuple(Counter(label for sample in samples for label in sample.ground_truth.labels).most_common()),
        size_counts=tuple(Counter(f"{width} x {height}" for height, width in read).most_common()),
        width_range=_compute_range([size[1] for size in read]),
        height_range=_compute_range([size[0] for size in read]),
        height_bins=_make_histogram(heights, HEIGHT_EDGES_PX, " px", f"from {HEIGHT_EDGES_PX[-2]:g} px"),
        visible_ratio_bins=_make_histogram(visible, VISIBLE_RATIO_EDGES, "", "all of it"),
    )


def _compute_range(sides_px: Sequence[int]) -> Range | None:
    return Range(min(sides_px), float(np.median(sides_px)), max(sides_px)) if sides_px else None


def _make_histogram(
    values: NDArray[np.float64], edges: Sequence[float], unit: str, last_label: str
) -> tuple[HistogramBin, ...]:
    """Bins closed below and open above; the last has no upper end."""
    counts = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges) - 1)
    names = [f"{low:g} to {high:g}{unit}" for low, high in pairwise(edges[:-1])]
    return tuple(HistogramBin(name, count) for name, count in zip([*names, last_label], counts.tolist(), strict=True))


def _concatenate_values(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate(parts) if parts else np.zeros(0)
