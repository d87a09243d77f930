"""Statistics of a split, and their text form for the terminal and the report of `hkd-train --check`."""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.console import format_table
from hkd_det.datasets.base import DatasetError
from hkd_det.errors import DataError
from hkd_det.structures import Sample

# Limits of the setups of the protocols: far, medium, Reasonable, Reasonable_small, near, large.
HEIGHT_EDGES_PX = (0, 20, 30, 50, 75, 100, 150, 250, 500, np.inf)
VISIBLE_RATIO_EDGES = (0, 0.2, 0.4, 0.65, 0.9, 1, np.inf)
MAX_NAMED = 8  # labels and image sizes in a row
BAR_WIDTH = 40  # characters of the longest bar
MAX_LINE_LENGTH = 600  # characters of an error


@dataclass(frozen=True)
class HistogramBin:
    """One bin of a histogram.

    Attributes:
        label: Limits of the bin.
        count: Number of values.
    """

    label: str
    count: int


@dataclass(frozen=True)
class Range:
    """Range of one side of the images.

    Attributes:
        min_px, median_px, max_px: Statistics in pixels.
    """

    min_px: int
    median_px: float
    max_px: int


@dataclass(frozen=True)
class SplitSummary:
    """Statistics of one split.

    Attributes:
        split: Name of the split.
        num_images: Number of samples.
        num_empty: Number of images without ground-truth boxes.
        num_unreadable: Number of images that cannot be decoded.
        num_gt: Number of ground-truth boxes that are not ignored.
        num_ignore_regions: Number of ignore regions.
        label_counts: Label and number of boxes, most frequent first.
        size_counts: "width x height" and number of images, most frequent first.
        width_range: Range of the image width; None without readable images.
        height_range: Range of the image height; None without readable images.
        height_bins: Histogram of the box height.
        visible_ratio_bins: Histogram of the visible ratio of the boxes.
        num_exif_rotated: Number of images whose EXIF orientation rotates or flips the stored pixels.
        unused_classes: Name and number of boxes of the other classes of the dataset, most frequent first.
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
    num_exif_rotated: int = 0
    unused_classes: tuple[tuple[str, int], ...] = ()


@dataclass
class ProblemLog:
    """Problems of one split without repetitions, and the boxes of its unused classes.

    Attributes:
        split: Name of the split.
        problems: Problems by message.
        unused: Warnings of the kind `unused_class`.
    """

    split: str
    problems: dict[str, DatasetError] = field(default_factory=dict)
    unused: list[DatasetError] = field(default_factory=list)

    @property
    def unused_classes(self) -> Counter[str]:
        """Number of boxes by class."""
        counts: Counter[str] = Counter()
        for error in self.unused:
            counts[error.class_name] += error.count
        return counts

    def add(self, error: DataError, kind: str = "annotation") -> None:
        """Add a problem.

        Args:
            error: The problem.
            kind: Kind of a problem that does not state its own.
        """
        if not isinstance(error, DatasetError):
            error = DatasetError(str(error), kind, images=error.images)
        error.file = error.file or str(error).partition(": ")[0].partition(", line ")[0]
        if error.class_name:
            self.unused.append(error)
        else:
            self.problems.setdefault(str(error), error)

    def list_lines(self, is_error: bool) -> list[str]:
        """Return one line per problem.

        Args:
            is_error: True for errors, False for warnings.
        """
        return [
            escape_nonprintable(f"{self.split}: {message}")
            for message, problem in self.problems.items()
            if problem.is_error == is_error
        ]

    def list_records(self) -> list[dict[str, Any]]:
        """Return one record of --json for each kind and file."""
        records: dict[tuple[str, str, bool], dict[str, Any]] = {}
        for message, problem in self.problems.items():
            severity = "error" if problem.is_error else "warning"
            new = {"kind": problem.kind, "file": problem.file, "count": 0, "severity": severity, "message": message}
            record = records.setdefault((problem.kind, problem.file, problem.is_error), new)
            record["count"] += problem.count
        return list(records.values())


def summarize(
    split: str,
    samples: Sequence[Sample],
    sizes_hw: Sequence[tuple[int, int] | None],
    num_exif_rotated: int = 0,
    unused_classes: Mapping[str, int] = MappingProxyType({}),
) -> SplitSummary:
    """Compute the statistics of a split.

    Args:
        split: Name of the split.
        samples: Samples of the split.
        sizes_hw: Height and width of each image in pixels; None if it cannot be decoded.
        num_exif_rotated: Number of images whose EXIF orientation rotates or flips the stored pixels.
        unused_classes: Name and number of boxes of the classes that are neither persons nor ignored.

    Returns:
        The statistics.
    """
    masks = [~sample.ground_truth.ignore for sample in samples]
    pairs = list(zip([sample.ground_truth for sample in samples], masks, strict=True))
    heights = _concatenate_values([ground_truth.heights_px[mask] for ground_truth, mask in pairs])
    visible_ratios = _concatenate_values([ground_truth.visible_ratio[mask] for ground_truth, mask in pairs])
    known_sizes = [size for size in sizes_hw if size]
    return SplitSummary(
        split,
        num_images=len(samples),
        num_empty=sum(not mask.any() for mask in masks),
        num_unreadable=len(samples) - len(known_sizes),
        num_gt=len(heights),
        num_ignore_regions=sum(int(sample.ground_truth.ignore.sum()) for sample in samples),
        label_counts=tuple(Counter(label for sample in samples for label in sample.ground_truth.labels).most_common()),
        size_counts=tuple(Counter(f"{width} x {height}" for height, width in known_sizes).most_common()),
        width_range=_compute_range([size[1] for size in known_sizes]),
        height_range=_compute_range([size[0] for size in known_sizes]),
        height_bins=_make_histogram(heights, HEIGHT_EDGES_PX, " px", f"from {HEIGHT_EDGES_PX[-2]:g} px"),
        visible_ratio_bins=_make_histogram(visible_ratios, VISIBLE_RATIO_EDGES, "", "fully visible"),
        num_exif_rotated=num_exif_rotated,
        unused_classes=tuple(Counter(unused_classes).most_common()),
    )


def _compute_range(sides_px: Sequence[int]) -> Range | None:
    return Range(min(sides_px), float(np.median(sides_px)), max(sides_px)) if sides_px else None


def _make_histogram(
    values: NDArray[np.float64], edges: Sequence[float], unit: str, last_label: str
) -> tuple[HistogramBin, ...]:
    """Count values in bins that are closed below and open above; the last bin has no upper limit."""
    counts = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges) - 1)
    names = [f"{low:g} to {high:g}{unit}" for low, high in pairwise(edges[:-1])]
    return tuple(HistogramBin(name, count) for name, count in zip([*names, last_label], counts.tolist(), strict=True))


def _concatenate_values(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate(parts) if parts else np.zeros(0)


def make_summary_rows(summary: SplitSummary) -> list[tuple[str, str]]:
    """Return name and value of each row of the summary.

    Args:
        summary: Statistics of a split.
    """
    unreadable = f"; {summary.num_unreadable:,} unreadable" if summary.num_unreadable else ""
    sides = [("width", summary.width_range), ("height", summary.height_range)] if len(summary.size_counts) > 1 else []
    rotated = f"{summary.num_exif_rotated:,} images; boxes must refer to the upright image"
    return [
        ("images", f"{summary.num_images:,}; {summary.num_empty:,} without ground-truth boxes{unreadable}"),
        ("ground-truth boxes", f"{summary.num_gt:,}"),
        ("ignore regions", f"{summary.num_ignore_regions:,}"),
        ("labels", _format_most_common(summary.label_counts)),
        *([("unused classes", _format_most_common(summary.unused_classes))] if summary.unused_classes else []),
        ("image sizes", _format_most_common(summary.size_counts)),
        *((f"image {side}", _format_size_range(size_range)) for side, size_range in sides if size_range),
        *([("rotated by EXIF", rotated)] if summary.num_exif_rotated else []),
    ]


def format_summary(summary: SplitSummary) -> str:
    """Format the summary rows and the histograms for the terminal.

    Args:
        summary: Statistics of a split.

    Returns:
        Several lines.
    """
    tables = [(summary.split, format_table(make_summary_rows(summary), left_columns=2))]
    tables += [(title, _format_bars(bins)) for title, bins in list_histograms(summary)]
    return "\n".join(f"{title}\n{textwrap.indent(table, '  ')}" for title, table in tables)


def list_histograms(summary: SplitSummary) -> list[tuple[str, tuple[HistogramBin, ...]]]:
    """Return title and bins of each histogram; empty without ground-truth boxes.

    Args:
        summary: Statistics of a split.
    """
    if not summary.num_gt:
        return []
    return [
        ("box height", summary.height_bins),
        ("visible ratio of the boxes", summary.visible_ratio_bins),
    ]


def escape_nonprintable(line: str) -> str:
    """Escape characters that a terminal or a file cannot represent, such as lone surrogates, and shorten the line.

    Args:
        line: Text, for example a file name.

    Returns:
        Printable text.
    """
    escaped = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line[:MAX_LINE_LENGTH])
    return escaped + ("..." if len(line) > MAX_LINE_LENGTH else "")


def _format_most_common(counts: Sequence[tuple[str, int]]) -> str:
    named = ", ".join(f"{escape_nonprintable(name)}: {count:,}" for name, count in counts[:MAX_NAMED])
    return (named or "none") + (f", and {len(counts) - MAX_NAMED:,} others" if len(counts) > MAX_NAMED else "")


def _format_size_range(value_range: Range) -> str:
    return f"{value_range.min_px} to {value_range.max_px} px, median {value_range.median_px:g}"


def _format_bars(bins: Sequence[HistogramBin]) -> str:
    max_count = max(1, *(bin_.count for bin_ in bins))
    rows = [(bin_.label, f"{bin_.count:,}", "#" * -(-BAR_WIDTH * bin_.count // max_count)) for bin_ in bins]
    return format_table(rows, align=("left", "right", "left"))
