"""Bootstrap over images: confidence intervals of MR^-2, and paired comparison of detectors on the same images.

A resample draws as many images as the dataset has, with replacement. Its miss rate equals that of the protocol's
evaluation of a dataset with each image as often as it was drawn. Matching does not depend on other images, so a
resample only changes the weight of each image. For a comparison, both detectors are evaluated on the same resamples:
what makes an image difficult for both cancels out (Efron and Tibshirani 1993, chapters 8 and 13).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hkd_det.metrics.matching import CountedDetections, MissRateResult
from hkd_det.metrics.tables import Floats

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
MAX_WEIGHTS_PER_CHUNK = 1 << 22  # limits memory to about 100 MiB
# With few images the interval of a miss rate is too narrow, because they do not contain the difficult cases
# (tests/hkd_det/metrics/test_bootstrap.py). For differences between detectors the limit is a convention.
MIN_IMAGES = MIN_PERSONS = 50
TOO_FEW = f"no conclusion: fewer than {MIN_IMAGES} images or {MIN_PERSONS} persons"

Conclusion = Literal["better", "worse", "no difference shown", "neither detects a person", "too few images or persons"]


@dataclass(frozen=True)
class MissRateInterval:
    """Confidence interval of a miss rate.

    Attributes:
        value: Miss rate of all images, as a fraction.
        ci_low: Lower end of the 95 % interval.
        ci_high: Upper end.
    """

    value: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class MissRateDifference:
    """Paired difference of two miss rates on the same images.

    Attributes:
        value: Difference as a fraction: miss rate of the detector minus that of the reference. Negative is better.
        ci_low: Lower end of the 95 % interval.
        ci_high: Upper end.
        p_value: Two-sided bootstrap p-value of no difference.
        conclusion: "better" or "worse" if the interval excludes 0, otherwise "no difference shown". "neither detects a
            person" if there is nothing to compare, "too few images or persons" if the interval is not reliable.
    """

    value: float
    ci_low: float
    ci_high: float
    p_value: float
    conclusion: Conclusion

    def summary(self) -> str:
        """Return the difference in percentage points, its interval and the conclusion, as one clause."""
        interval = f"{100 * self.ci_low:+.2f} to {100 * self.ci_high:+.2f}"
        conclusion = TOO_FEW if self.conclusion == "too few images or persons" else self.conclusion
        return f"{100 * self.value:+.2f} points (95 % interval over images: {interval}): {conclusion}"


def compute_intervals(
    results: Mapping[str, MissRateResult], num_resamples: int = NUM_RESAMPLES
) -> dict[str, MissRateInterval]:
    """Compute the interval of each setup with ground truth.

    Args:
        results: Setup name -> miss rate.
        num_resamples: Number of resamples of the images.

    Returns:
        Setup name -> interval.
    """
    intervals = {name: compute_interval(result, num_resamples) for name, result in results.items()}
    return {name: interval for name, interval in intervals.items() if interval is not None}


def compute_differences(
    results: Mapping[str, MissRateResult],
    reference_results: Mapping[str, MissRateResult],
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, MissRateDifference]:
    """Compare two detectors in each setup with ground truth.

    Args:
        results: Setup name -> miss rate of the detector.
        reference_results: Setup name -> miss rate of the reference, in the same setups.
        num_resamples: Number of resamples of the images.

    Returns:
        Setup name -> difference, for the setups with ground truth.
    """
    differences = {
        name: compare_miss_rates(result, reference_results[name], num_resamples) for name, result in results.items()
    }
    return {name: difference for name, difference in differences.items() if difference is not None}


def compute_interval(
    result: MissRateResult, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> MissRateInterval | None:
    """Compute the 95 % percentile interval of a miss rate.

    Args:
        result: Miss rate of one setup.
        num_resamples: Number of resamples of the images.
        seed: Seed of the resamples.

    Returns:
        The interval, or None without ground truth in the data or in all resamples.
    """
    if not result.num_gt:
        return None
    values = _drop_nan(resample_miss_rates([result], num_resamples, seed)[0])
    return MissRateInterval(result.value, *compute_ends(values)) if len(values) else None


def compare_miss_rates(
    result: MissRateResult, reference: MissRateResult, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> MissRateDifference | None:
    """Compare two detectors on the same images and the same setup.

    Args:
        result: Miss rate of the detector.
        reference: Miss rate of the reference.
        num_resamples: Number of resamples of the images.
        seed: Seed of the resamples.

    Returns:
        The difference, or None without ground truth in the data or in all resamples.

    Raises:
        ValueError: The results are not those of the same ground truth.
    """
    if not np.array_equal(result.counted.gt_per_image, reference.counted.gt_per_image):
        raise ValueError("expected results on the same images with the same ground truth")
    if not result.num_gt:
        return None
    values, reference_values = resample_miss_rates([result, reference], num_resamples, seed)
    differences = _drop_nan(values - reference_values)
    if not len(differences):
        return None
    low, high = compute_ends(differences)
    # One more than the resamples on the other side of 0, because the data themselves are one sample (Davison and
    # Hinkley 1997, section 4.2.3).
    num_extreme = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    p_value = min(1.0, 2 * (num_extreme + 1) / (len(differences) + 1))
    conclusion: Conclusion = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
    if not (result.counted.is_true_positive.any() or reference.counted.is_true_positive.any()):
        conclusion = "neither detects a person"
    elif not has_reliable_interval(result):
        conclusion = "too few images or persons"
    return MissRateDifference(result.value - reference.value, low, high, p_value, conclusion)


def compute_recall_difference_interval(
    result: MissRateResult,
    reference: MissRateResult,
    min_score: float,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Compute the 95 % interval of the difference in recall at a score threshold, on the same images.

    Args:
        result: Miss rate of the detector, with scores.
        reference: Miss rate of the reference, with scores.
        min_score: Lowest score of a detection.
        num_resamples: Number of resamples of the images.
        seed: Seed of the resamples.

    Returns:
        Ends of the interval, as fractions; NaN without ground truth.
    """
    weights = _draw_weights(result.num_images, num_resamples, seed)
    num_gt = weights @ result.counted.gt_per_image
    gained = _count_true_positives(result, min_score) - _count_true_positives(reference, min_score)
    differences = (weights @ gained)[num_gt > 0] / num_gt[num_gt > 0]
    return compute_ends(differences) if len(differences) else (np.nan, np.nan)


def compute_recall_interval(
    result: MissRateResult, min_score: float, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Compute the 95 % interval of the recall at a score threshold.

    Args:
        result: Miss rate of a detector, with scores.
        min_score: Lowest score of a detection.
        num_resamples: Number of resamples of the images.
        seed: Seed of the resamples.

    Returns:
        Ends of the interval, 0 to 1, or None without ground truth.
    """
    weights = _draw_weights(result.num_images, num_resamples, seed)
    num_gt = weights @ result.counted.gt_per_image
    recalls = (weights @ _count_true_positives(result, min_score))[num_gt > 0] / num_gt[num_gt > 0]
    return compute_ends(recalls) if len(recalls) else None


def _draw_weights(num_images: int, num_resamples: int, seed: int) -> NDArray[np.int_]:
    """Return the number of copies of each image in each resample, int array[num_resamples, num_images]."""
    return np.random.default_rng(seed).multinomial(num_images, np.full(num_images, 1 / num_images), num_resamples)


def _count_true_positives(result: MissRateResult, min_score: float) -> NDArray[np.intp]:
    """Return the number of true positives with a minimum score in each image."""
    is_counted = result.counted.is_true_positive & (result.scores >= min_score)
    return np.bincount(result.counted.image_index[is_counted], minlength=result.num_images)


def has_reliable_interval(result: MissRateResult) -> bool:
    """Return whether the data suffice for a 95 % interval: at least `MIN_IMAGES` images and `MIN_PERSONS` persons.

    Args:
        result: Miss rate of one setup.
    """
    return result.num_images >= MIN_IMAGES and result.num_gt >= MIN_PERSONS


def resample_miss_rates(results: Sequence[MissRateResult], num_resamples: int, seed: int) -> Floats:
    """Compute the miss rates of resamples of the images; every result gets the same resamples.

    Args:
        results: Miss rates of detectors on the same images.
        num_resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        array[len(results), num_resamples]: Miss rates as fractions; NaN for a resample without ground truth.
    """
    rng = np.random.default_rng(seed)
    num_images = results[0].num_images
    num_rows = max(1, MAX_WEIGHTS_PER_CHUNK // max(num_images, 1))
    chunks = []
    for start in range(0, num_resamples, num_rows):
        size = min(num_rows, num_resamples - start)
        weights = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size).astype(np.int32)
        chunks.append([compute_weighted_miss_rates(result.counted, weights) for result in results])
    return np.concatenate(chunks, axis=1)


def compute_weighted_miss_rates(counted: CountedDetections, weights: NDArray[np.int32]) -> Floats:
    """Compute the miss rate of a dataset that contains image i `weights[r, i]` times, for each row r.

    Args:
        counted: Counted detections of one setup.
        weights (int32 array[R, num_images]): Number of copies of each image; every row has the same sum of at least 1.

    Returns:
        array[R]: Miss rates as fractions; NaN without ground truth.
    """
    num_images = int(weights[0].sum())
    num_gt = weights @ counted.gt_per_image  # [R]
    # Largest number of false positives at each FPPI point, with the division of the protocol.
    fppi = np.arange(num_images * int(np.ceil(max(counted.fppi_points))) + 1) / num_images
    max_fp = np.searchsorted(fppi, counted.fppi_points, side="right") - 1  # [P]
    num_tp = np.empty((len(weights), len(max_fp)))
    for rows, tp, fp in _accumulate(counted, weights, int(max_fp[-1])):
        for row, row_tp, row_fp in zip(rows, tp, fp, strict=True):
            last = np.searchsorted(row_fp, max_fp, side="right") - 1
            num_tp[row] = np.where(last >= 0, row_tp[last], 0) if len(row_fp) else 0
    recall = num_tp / np.maximum(num_gt, 1)[:, None]
    if not counted.zero_recall_before_curve:
        _use_last_recall(recall, counted, weights, num_gt, max_fp)
    with np.errstate(divide="ignore"):  # log of 0: the miss rate is 0
        values = np.exp(np.log(np.maximum(1 - recall, 0)).mean(axis=1))
    return np.where(num_gt > 0, values, np.nan)


def _accumulate(
    counted: CountedDetections, weights: NDArray[np.int32], max_fp: int
) -> Iterator[tuple[range, NDArray[np.int32], NDArray[np.int32]]]:
    """Yield rows of `weights` with their numbers of true and false positives [rows, D] over descending scores.

    D is the number of detections that contains more than `max_fp` false positives in every row, or all detections.
    """
    num_detections = len(counted.image_index)
    num_fp = np.cumsum(~counted.is_true_positive)
    length = int(np.searchsorted(num_fp, 2 * max_fp + 100))  # about twice the false positives that are needed
    step = max(1, MAX_WEIGHTS_PER_CHUNK // max(min(length, num_detections), 1))
    for start in range(0, len(weights), step):
        rows = range(start, min(start + step, len(weights)))
        used = min(length, num_detections)
        while True:
            drawn = weights[rows.start : rows.stop, counted.image_index[:used]]
            fp = np.cumsum(drawn * ~counted.is_true_positive[:used], axis=1, dtype=np.int32)
            if used == num_detections or (fp[:, -1] > max_fp).all():
                break
            used = min(2 * used + 1, num_detections)
        yield rows, np.cumsum(drawn * counted.is_true_positive[:used], axis=1, dtype=np.int32), fp


def _use_last_recall(
    recall: Floats,
    counted: CountedDetections,
    weights: NDArray[np.int32],
    num_gt: NDArray[np.int_],
    max_fp: NDArray[np.intp],
) -> None:
    """Insert the last recall of the curve where the curve begins beyond an FPPI point, as the CityPersons program does.

    This happens only with fewer than 100 images: if the first detection is a false positive, the curve begins at
    1 / num_images.
    """
    if max_fp[0] > 0 or not len(counted.image_index):
        return
    is_drawn = weights[:, counted.image_index] > 0  # [R, D]
    first = is_drawn.argmax(axis=1)
    begins_with_fp = is_drawn.any(axis=1) & ~counted.is_true_positive[first]
    tp_per_image = np.bincount(counted.image_index[counted.is_true_positive], minlength=weights.shape[1])
    last_recall = (weights @ tp_per_image) / np.maximum(num_gt, 1)
    recall[begins_with_fp] = np.where(max_fp == 0, last_recall[begins_with_fp, None], recall[begins_with_fp])


def _drop_nan(values: Floats) -> Floats:
    """Drop the resamples without ground truth."""
    return values[~np.isnan(values)]


def compute_ends(values: Floats) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval.

    Args:
        values (float64 array[R]): Value of each resample, at least one.
    """
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
