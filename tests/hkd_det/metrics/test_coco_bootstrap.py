"""Intervals of AP and recall: a resample equals the evaluation of a dataset with these copies of images."""

import numpy as np
import pytest

from hkd_det.metrics.bootstrap import compute_recall_interval
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.coco import evaluate_average_precision, make_ground_truth, match_boxes
from hkd_det.metrics.coco_bootstrap import compute_ap_intervals, resample_average_precision
from hkd_det.metrics.tables import DetectionTable
from hkd_det.structures import Detections, GroundTruth, Sample


def make_dataset(num_images: int, seed: int) -> tuple[list[Sample], list[Detections]]:
    """Return images with persons, ignore regions and detections; scores repeat in other images, and some are empty."""
    rng, samples, detections = np.random.default_rng(seed), [], []
    for number in range(num_images):
        count = int(rng.integers(0, 5))
        corners = rng.uniform(0, 800, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(60, 200, (count, 2))], axis=1).astype(np.float32)
        ignore = rng.random(count) < 0.2
        samples.append(Sample(number, f"{number}.jpg", GroundTruth(boxes, ignore, boxes, ("person",) * count)))  # type: ignore[arg-type]
        found = boxes[rng.random(count) < 0.8] + rng.normal(0, 8, (1, 4)).astype(np.float32)
        wrong = rng.uniform(0, 800, (int(rng.integers(0, 4)), 2))
        found = np.concatenate([found, np.concatenate([wrong, wrong + 100], axis=1)]).astype(np.float32)
        scores = rng.choice([0.2, 0.5, 0.9, *rng.random(9)], len(found), replace=False)
        detections.append(Detections(found, scores.astype(np.float32)))
    return samples, detections


@pytest.mark.parametrize("seed", range(4))
def test_resample_equals_pycocotools_on_copies_of_images(seed: int) -> None:
    samples, detections = make_dataset(12, seed)
    coco_eval = match_boxes(make_ground_truth(samples), DetectionTable.from_detections(detections))
    values = resample_average_precision(coco_eval, 6, seed=seed)
    rng = np.random.default_rng(seed)
    for resample in range(6):
        copies = np.repeat(np.arange(12), rng.multinomial(12, np.full(12, 1 / 12)))
        metrics = evaluate_average_precision([samples[index] for index in copies], [detections[i] for i in copies])
        assert values[:, resample].mean() == pytest.approx(metrics["AP"], abs=1e-12)
        assert values[0, resample] == pytest.approx(metrics["AP50"], abs=1e-12)
        assert values[5, resample] == pytest.approx(metrics["AP75"], abs=1e-12)


def test_interval_contains_the_value_and_ends_are_percentiles() -> None:
    samples, detections = make_dataset(60, 5)
    coco_eval = match_boxes(make_ground_truth(samples), DetectionTable.from_detections(detections))
    intervals = compute_ap_intervals(coco_eval, 300)
    metrics = evaluate_average_precision(samples, detections)
    for name in ("AP", "AP50"):
        low, high = intervals[name]
        assert low < metrics[name] < high and high - low < 0.5
    values = resample_average_precision(coco_eval, 300, 0)[0]
    assert intervals["AP50"] == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))


def test_images_without_persons_have_no_interval() -> None:
    samples, detections = make_dataset(8, 0)
    empty = [Sample(one.image_id, one.path) for one in samples]
    coco_eval = match_boxes(make_ground_truth(empty), DetectionTable.from_detections(detections))
    assert compute_ap_intervals(coco_eval, 10) == {}
    reasonable = evaluate_detections(empty, detections)[REASONABLE.name]
    assert compute_recall_interval(reasonable, 0.5) is None


def test_recall_interval_is_that_of_a_binomial() -> None:
    """One person per image, 70 of 100 detected: the interval of a mean of independent 0 and 1."""
    box = np.array([[0, 0, 40, 100]], np.float32)
    ground_truth = GroundTruth(box, np.zeros(1, bool), box, ("person",))
    samples = [Sample(index, f"{index}.jpg", ground_truth) for index in range(100)]  # type: ignore[arg-type]
    scores = [0.9] * 70 + [0.3] * 30
    detections = [Detections(box, np.array([score], np.float32)) for score in scores]
    result = evaluate_detections(samples, detections)[REASONABLE.name]
    low, high = compute_recall_interval(result, 0.5, num_resamples=4000) or (0, 0)
    deviation = 1.96 * (0.7 * 0.3 / 100) ** 0.5
    assert low == pytest.approx(0.7 - deviation, abs=0.015) and high == pytest.approx(0.7 + deviation, abs=0.015)
    assert compute_recall_interval(result, 0.2) == (1, 1)
