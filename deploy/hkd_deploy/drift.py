"""Distributions of detections and the population stability index (PSI) between them.

`hkd-export` stores the distributions on the validation images as a reference; `hkd-demo --monitor` compares a camera
with it. PSI = sum (p - q) ln(p / q) over bins, the symmetric Kullback-Leibler divergence. Between two samples of one
distribution with B bins, PSI / (1/n + 1/m) is approximately chi-square with B - 1 degrees of freedom (Potgieter et al.
2023, arXiv 2307.11878), so a fixed limit such as 0.25 raises false alarms on small samples. Detections of one image
depend on each other. The factor `noise` therefore comes from a bootstrap of images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.structures import Detections

MIN_SCORE = 0.05  # detections below are not part of the distributions
RELEVANT_PSI = 0.25  # the usual limit of a major shift, and the lowest threshold
NUM_BINS = 10
MIN_REFERENCE_IMAGES, MIN_COUNT = 50, 100  # images of a reference; values of a distribution that is compared
FALSE_ALARM_RATE = 0.001  # per quantity and window of independent images
NUM_SIMULATIONS, SIMULATED_IMAGES, MAX_SIMULATED_UNITS = 10_000, 100, 500
CHUNKS_PER_WINDOW = 60  # of a camera
SMOOTHING = 0.5  # added to each bin, so that empty bins have a finite PSI
SEED = 0

# Left edges of the fine bins in which values are counted. The bins of a reference are unions of them.
GRIDS: dict[str, NDArray[np.float64]] = {
    "score": np.round(np.arange(MIN_SCORE, 1, 0.01), 6),
    "height": np.round(np.concatenate([[0], np.geomspace(0.01, 2, 80)]), 6),
    "persons": np.arange(0.0, 101),
}
QUANTITIES = tuple(GRIDS)


@dataclass(frozen=True)
class Distribution:
    """Histogram of one quantity.

    Attributes:
        edges: Lower limits of all bins but the first, ascending. The first and the last bin are open.
        counts: Number of values per bin, one more than `edges`.
        noise: Quantile of PSI / (1/n + 1/m) between two samples of this distribution, at `FALSE_ALARM_RATE`.
        min_threshold: Lowest threshold.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    noise: float
    min_threshold: float = RELEVANT_PSI

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.edges) + 1 or list(self.edges) != sorted(set(self.edges)):
            raise ValueError("expected ascending edges and one count more")
        if sum(self.counts) < 1 or min(self.counts) < 0 or not self.noise > 0:
            raise ValueError("expected counts from 0 and noise above 0")

    def compute_threshold(self, num_values: int) -> float:
        """Return the PSI above which a sample differs.

        Args:
            num_values: Size of the sample, at least 1.
        """
        return max(self.min_threshold, self.noise * (1 / num_values + 1 / sum(self.counts)))


@dataclass(frozen=True)
class DriftReference:
    """Distributions with which a camera is compared.

    Attributes:
        num_images: Number of images.
        conf: Minimum score of the persons that are counted, 0 to 1.
        distributions: By quantity: `score` of detections from `MIN_SCORE`, `height` of the boxes of persons relative to
            the image height, `persons` per image.
    """

    num_images: int
    conf: float
    distributions: dict[str, Distribution]

    def to_json(self) -> str:
        """Return the metadata value `hkd.reference`."""
        quantities = {
            name: {
                "edges": list(one.edges),
                "counts": list(one.counts),
                "noise": round(one.noise, 2),
                **({} if one.min_threshold == RELEVANT_PSI else {"min_threshold": round(one.min_threshold, 4)}),
            }
            for name, one in self.distributions.items()
        }
        values = {"num_images": self.num_images, "conf": self.conf, "min_score": MIN_SCORE, **quantities}
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> "DriftReference":
        """Parse the metadata value `hkd.reference`.

        Args:
            text: The value.

        Returns:
            The reference.

        Raises:
            ValueError: The value is invalid.
        """
        try:
            values = json.loads(text)
            distributions = {
                name: Distribution(
                    tuple(map(float, values[name]["edges"])),
                    tuple(map(int, values[name]["counts"])),
                    float(values[name]["noise"]),
                    float(values[name].get("min_threshold", RELEVANT_PSI)),
                )
                for name in QUANTITIES
                if name in values
            }
            if values["min_score"] != MIN_SCORE or not distributions:
                raise ValueError(f"expected min_score {MIN_SCORE} and distributions")
            return cls(int(values["num_images"]), float(values["conf"]), distributions)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a JSON object with the distributions: {error}") from None


def count_values(detections: Detections, image_height: int, conf: float) -> dict[str, NDArray[np.int64]]:
    """Count the values of one image in the fine bins of `GRIDS`.

    Args:
        detections: All detections of the image, pixels.
        image_height: Image height, pixels.
        conf: Minimum score of a person, 0 to 1.

    Returns:
        Counts by quantity, int64[bins].
    """
    boxes_xyxy = detections.boxes_xyxy[detections.scores >= conf]
    values: dict[str, NDArray[Any]] = {
        "score": detections.scores[detections.scores >= MIN_SCORE],
        "height": (boxes_xyxy[:, 3] - boxes_xyxy[:, 1]) / image_height,
        "persons": np.array([len(boxes_xyxy)]),
    }
    return {name: _count_in_grid(values[name], grid) for name, grid in GRIDS.items()}


def _count_in_grid(values: NDArray[Any], grid: NDArray[np.float64]) -> NDArray[np.int64]:
    indices = np.searchsorted(grid, values.astype(np.float64) + 1e-7, side="right") - 1  # float32 scores
    return np.bincount(np.clip(indices, 0, None), minlength=len(grid)).astype(np.int64)


def merge_bins(name: str, edges: Sequence[float], fine_counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum fine bins to the bins of a distribution.

    Args:
        name: Quantity.
        edges: Lower limits of all bins but the first.
        fine_counts (int64[..., F]): Counts in the fine bins.

    Returns:
        int64[..., B]: Counts in the bins.
    """
    starts = [0, *np.searchsorted(GRIDS[name], np.array(edges) - 1e-9).tolist()]
    return np.add.reduceat(fine_counts, starts, axis=-1)


def compute_psi(counts: NDArray[Any] | Sequence[float], reference: NDArray[Any] | Sequence[float]) -> NDArray[Any]:
    """Compute the population stability index between histograms.

    Args:
        counts (array[..., B]): Counts of the sample. 0.5 is added to each bin.
        reference (array[..., B]): Counts of the reference. 0.5 is added to each bin.

    Returns:
        array[...]: PSI, 0 or more.
    """
    sample, other = np.asarray(counts) + SMOOTHING, np.asarray(reference) + SMOOTHING
    p, q = sample / sample.sum(-1, keepdims=True), other / other.sum(-1, keepdims=True)
    return np.asarray(((p - q) * np.log(p / q)).sum(-1))


def build_distribution(
    name: str, unit_counts: NDArray[np.int64], num_units: int, min_threshold: float = RELEVANT_PSI
) -> Distribution:
    """Select bins with about equal counts, and measure the noise of the PSI by a bootstrap.

    Args:
        name: Quantity.
        unit_counts (int64[U, F]): Counts in the fine bins of independent units: images, or minutes of a camera.
        num_units: Number of units in a simulated sample.
        min_threshold: Lowest threshold.

    Returns:
        The distribution.

    Raises:
        ValueError: There are no values.
    """
    edges = _select_edges(GRIDS[name], unit_counts.sum(0))
    counts = merge_bins(name, edges, unit_counts)  # [U, B]
    return Distribution(edges, tuple(counts.sum(0).tolist()), _simulate_noise(counts, num_units), min_threshold)


def build_reference(images: Sequence[Mapping[str, NDArray[np.int64]]], conf: float) -> DriftReference | None:
    """Build a reference from the counts of images.

    Args:
        images: Result of `count_values` per image.
        conf: Minimum score of a person in `images`.

    Returns:
        The reference. None for fewer than `MIN_REFERENCE_IMAGES` images or `MIN_COUNT` persons.
    """
    if len(images) < MIN_REFERENCE_IMAGES:
        return None
    stacked = {name: np.stack([counts[name] for counts in images]) for name in QUANTITIES}
    if min(stacked[name].sum() for name in ("score", "height")) < MIN_COUNT:
        return None
    distributions = {name: build_distribution(name, counts, SIMULATED_IMAGES) for name, counts in stacked.items()}
    return DriftReference(len(images), conf, distributions)


def build_baseline(chunk_counts: Sequence[Mapping[str, NDArray[np.int64]]], conf: float) -> DriftReference:
    """Build the reference of a camera.

    The threshold of a quantity is at least the largest PSI of a window of the baseline against the other windows.
    If windows are exchangeable, a later one is above it with a probability of at most 1 / (number of windows + 1).

    Args:
        chunk_counts: Counts in fine bins of consecutive sixtieths of a window.
        conf: Minimum score of a person in them.

    Returns:
        The reference. Quantities with fewer than `MIN_COUNT` values are left out.
    """
    distributions = {}
    num_windows = len(chunk_counts) // CHUNKS_PER_WINDOW
    for name in QUANTITIES:
        counts = np.stack([chunk[name] for chunk in chunk_counts])  # [chunks, fine bins]
        if counts.sum() < MIN_COUNT:
            continue
        distribution = build_distribution(name, counts, CHUNKS_PER_WINDOW)
        merged = merge_bins(name, distribution.edges, counts[: num_windows * CHUNKS_PER_WINDOW])
        windows = merged.reshape(num_windows, CHUNKS_PER_WINDOW, -1).sum(1)
        windows = windows[windows.sum(-1) >= MIN_COUNT]
        largest = float(compute_psi(windows, windows.sum(0) - windows).max()) if len(windows) > 1 else 0.0
        distributions[name] = replace(distribution, min_threshold=max(RELEVANT_PSI, largest))
    return DriftReference(len(chunk_counts), conf, distributions)


def _select_edges(grid: NDArray[np.float64], fine_counts: NDArray[np.int64]) -> tuple[float, ...]:
    """Join fine bins until each bin has at least a tenth of the values. There are at least two bins."""
    total, in_bin, edges = int(fine_counts.sum()), 0, list[float]()
    for edge, count in zip(grid.tolist(), fine_counts.tolist(), strict=True):
        if count and in_bin >= total / NUM_BINS:
            edges.append(edge)
            in_bin = 0
        in_bin += count
    if edges and in_bin < total / NUM_BINS:
        edges.pop()
    if not edges:  # one value: a second bin makes other values visible
        last = int(np.flatnonzero(fine_counts)[-1]) if total else 0
        edges = [float(grid[min(last + 1, len(grid) - 1)])]
    return tuple(edges)


def _simulate_noise(unit_counts: NDArray[np.int64], num_units: int) -> float:
    """Return the quantile of PSI / (1/n + 1/m) between samples of units, and references of as many units as there are.

    Args:
        unit_counts (int64[U, B]): Counts per unit.
        num_units: Units in a sample.
    """
    rng, ratios = np.random.default_rng(SEED), []
    total = min(len(unit_counts), MAX_SIMULATED_UNITS)  # enough to measure how values of one unit depend on each other
    unit_counts = unit_counts[np.linspace(0, len(unit_counts) - 1, total).round().astype(int)]
    step = max(1, 200_000 // total)
    for start in range(0, NUM_SIMULATIONS, step):
        size = min(step, NUM_SIMULATIONS - start)
        sample, reference = (
            rng.multinomial(number, np.full(total, 1 / total), size) @ unit_counts for number in (num_units, total)
        )
        scale = 1 / np.maximum(sample.sum(-1), 1) + 1 / np.maximum(reference.sum(-1), 1)
        ratios.append(compute_psi(sample, reference) / scale)
    return float(max(np.quantile(np.concatenate(ratios), 1 - FALSE_ALARM_RATE), 1e-3))
