"""Accuracy of measured models: miss rates on one or several ground truths, with intervals and paired differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hkd_bench.result import AccuracyResult, StoredCurve
from hkd_det.errors import DataError
from hkd_det.metrics.bootstrap import NUM_RESAMPLES, compute_differences, compute_intervals
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.matching import MissRateResult
from hkd_det.structures import Detections, Sample


def align_samples(samples: Sequence[Sample], other_samples: Sequence[Sample], other_name: str) -> list[Sample]:
    """Order the samples of a second ground truth as the images of the first.

    Args:
        samples: Images with the first ground truth.
        other_samples: The same images, and possibly more, with the second ground truth.
        other_name: Name of the second dataset, for error messages.

    Returns:
        One sample of `other_samples` per sample of `samples`.

    Raises:
        DataError: The second ground truth lacks an image.
    """
    by_path: dict[Path, Sample] = {sample.path.resolve(): sample for sample in other_samples}
    missing = [sample.path for sample in samples if sample.path.resolve() not in by_path]
    if missing:
        raise DataError(
            f"--data {other_name}: lacks {len(missing)} of {len(samples)} images of the first dataset, such as "
            f"{missing[0]}. Name datasets with the same image files."
        )
    return [by_path[sample.path.resolve()] for sample in samples]


def measure_accuracy(
    ground_truths: Mapping[str, Sequence[Sample]],
    detections: Sequence[Sequence[Detections]],
    num_resamples: int = NUM_RESAMPLES,
) -> list[tuple[AccuracyResult, ...]]:
    """Compute the miss rates of all models on each ground truth.

    Args:
        ground_truths: Annotated images by name of the dataset, at least one. All contain the same images in the same
            order.
        detections: Detections of each model in each image.
        num_resamples: Number of resamples of the images for intervals and differences.

    Returns:
        The accuracy of each model on each ground truth.
    """
    by_ground_truth = []
    for name, samples in ground_truths.items():
        miss_rates = [evaluate_detections(samples, model_detections) for model_detections in detections]
        by_ground_truth.append(
            [
                _make_accuracy_result(name, model_rates, miss_rates[0] if index else None, num_resamples)
                for index, model_rates in enumerate(miss_rates)
            ]
        )
    return list(zip(*by_ground_truth, strict=True))


def _make_accuracy_result(
    name: str,
    miss_rates: dict[str, MissRateResult],
    reference: dict[str, MissRateResult] | None,
    num_resamples: int,
) -> AccuracyResult:
    return AccuracyResult(
        data=name,
        miss_rates={setup: result.value if result.num_gt else None for setup, result in miss_rates.items()},
        intervals=compute_intervals(miss_rates, num_resamples),
        differences=compute_differences(miss_rates, reference, num_resamples) if reference else {},
        num_gt={setup: result.num_gt for setup, result in miss_rates.items()},
        curve=StoredCurve.from_miss_rate(miss_rates[REASONABLE.name]),
        curve_all=StoredCurve.from_miss_rate(miss_rates["All"]),
    )
