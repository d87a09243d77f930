"""What a split holds, in numbers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.sample import Sample

# Where the protocols' setups end: far, medium, Reasonable, Reasonable_small, near, large.
HEIGHTS_PX = (0, 20, 30, 50, 75, 100, 150, 250, 500, np.inf)
VISIBILITIES = (0, 0.2, 0.4, 0.65, 0.9, 1, np.inf)


@dataclass(frozen=True)
class Bar:
    """One bin of a histogram."""

    label: str
    count: int


@dataclass(frozen=True)
class Spread:
    """Of one side of the pictures, in pixels."""

    least: int
    median: float
    most: int


@dataclass(frozen=True)
class Summary:
    """A split. people: to be found; regions: ignored; empty: pictures without people to be found; unreadable: pictures.

    labels: how often each stands, as the data set calls them. sizes: (width x height, pictures), the most frequent
    first; width, height: of the pictures, None where none can be read. heights, visibilities: of the people to be
    found.
    """

    split: str
    pictures: int
    empty: int
    unreadable: int
    people: int
    regions: int
    labels: tuple[tuple[str, int], ...]
    sizes: tuple[tuple[str, int], ...]
    width: Spread | None
    height: Spread | None
    heights: tuple[Bar, ...]
    visibilities: tuple[Bar, ...]


def summarise(split: str, samples: Sequence[Sample], sizes_hw: Sequence[tuple[int, int] | None]) -> Summary:
    """sizes_hw: (height, width) of each sample's picture, None where it can't be read."""
    wanted = [~sample.truth.ignore for sample in samples]
    heights = _joined([sample.truth.heights_px[keep] for sample, keep in zip(samples, wanted, strict=True)])
    visible = _joined([sample.truth.visibility[keep] for sample, keep in zip(samples, wanted, strict=True)])
    read = [size for size in sizes_hw if size]
    return Summary(
        split,
        pictures=len(samples),
        empty=sum(not keep.any() for keep in wanted),
        unreadable=len(samples) - len(read),
        people=len(heights),
        regions=sum(int(sample.truth.ignore.sum()) for sample in samples),
        labels=tuple(Counter(label for sample in samples for label in sample.truth.labels).most_common()),
        sizes=tuple(Counter(f"{width} x {height}" for height, width in read).most_common()),
        width=_spread([size[1] for size in read]),
        height=_spread([size[0] for size in read]),
        heights=_bars(heights, HEIGHTS_PX, " px", f"from {HEIGHTS_PX[-2]:g} px"),
        visibilities=_bars(visible, VISIBILITIES, "", "all of it"),
    )


def _spread(sides_px: Sequence[int]) -> Spread | None:
    return Spread(min(sides_px), float(np.median(sides_px)), max(sides_px)) if sides_px else None


def _bars(values: NDArray[np.float64], edges: Sequence[float], unit: str, last: str) -> tuple[Bar, ...]:
    """Bins closed below and open above; the last has no upper end."""
    counts = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges) - 1)
    names = [f"{low:g} to {high:g}{unit}" for low, high in pairwise(edges[:-1])]
    return tuple(Bar(name, count) for name, count in zip([*names, last], counts.tolist(), strict=True))


def _joined(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate(parts) if parts else np.zeros(0)
