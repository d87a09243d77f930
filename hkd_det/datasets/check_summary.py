"""What a split holds, in numbers.

What the terminal and the page say of a split.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hkd_det.structures import Sample

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


MAX_NAMED = 8  # labels, sizes


BAR_WIDTH = 40


MAX_LINE_LENGTH = 600  # letters of a fault


def make_summary_rows(summary: SplitSummary) -> list[tuple[str, str]]:
    """Names and values."""
    unreadable = f", {summary.num_unreadable:,} that can't be read" if summary.num_unreadable else ""
    sides = [("width", summary.width_range), ("height", summary.height_range)] if len(summary.size_counts) > 1 else []
    return [
        ("pictures", f"{summary.num_images:,}; {summary.num_empty:,} without people to be found{unreadable}"),
        ("people to be found", f"{summary.num_gt:,}"),
        ("ignore regions", f"{summary.num_ignore_regions:,}"),
        ("labels", _format_most_common(summary.label_counts)),
        ("picture sizes", _format_most_common(summary.size_counts)),
        *((f"picture {side}", _format_size_range(spread)) for side, spread in sides if spread),
    ]


def format_summary(summary: SplitSummary) -> str:
    """For the terminal: the facts, and the histograms as bars."""
    lines = [summary.split, *(f"  {name:<20}{value}" for name, value in make_summary_rows(summary))]
    for title, bars in list_histograms(summary):
        lines += [f"  {title}", *_format_bars(bars)]
    return "\n".join(lines)


def list_histograms(summary: SplitSummary) -> list[tuple[str, tuple[HistogramBin, ...]]]:
    """Titles and bars; none where there is nobody."""
    if not summary.num_gt:
        return []
    return [
        ("height of the people to be found", summary.height_bins),
        ("visible share of the people to be found", summary.visible_ratio_bins),
    ]


def escape_nonprintable(line: str) -> str:
    """One line that any terminal and file takes: annotations hold what they like, such as half a surrogate pair."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line[:MAX_LINE_LENGTH])
    return shown + ("..." if len(line) > MAX_LINE_LENGTH else "")


def _format_most_common(counts: Sequence[tuple[str, int]]) -> str:
    named = ", ".join(f"{escape_nonprintable(name)}: {count:,}" for name, count in counts[:MAX_NAMED])
    return (named or "none") + (f", and {len(counts) - MAX_NAMED:,} others" if len(counts) > MAX_NAMED else "")


def _format_size_range(value_range: Range) -> str:
    return f"{value_range.min_px} to {value_range.max_px} px, median {value_range.median_px:g}"


def _format_bars(bins: Sequence[HistogramBin]) -> list[str]:
    most = max(1, *(bar.count for bar in bins))
    return [f"    {bar.label:<16}{bar.count:>10,} {'#' * -(-BAR_WIDTH * bar.count // most)}".rstrip() for bar in bins]
