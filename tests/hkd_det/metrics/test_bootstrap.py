"""Bootstrap of MR^-2: against the evaluation of duplicated images, and coverage on data with a known answer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hkd_det.metrics import caltech, citypersons
from hkd_det.metrics.bootstrap import (
    MIN_IMAGES,
    MIN_PERSONS,
    compare_miss_rates,
    compute_differences,
    compute_interval,
    compute_intervals,
    compute_weighted_miss_rates,
    has_reliable_interval,
    resample_miss_rates,
)
from hkd_det.metrics.citypersons import SETUPS, evaluate_detections
from hkd_det.metrics.matching import MissRateResult
from hkd_det.metrics.tables import DetectionTable, GroundTruthTable
from hkd_det.structures import Detections, GroundTruth, Sample

SIDES_PX = np.array([33, 80])
Dataset = tuple[list[Sample], list[Detections]]


def make_random_dataset(rng: np.random.Generator, num_images: int, first_is_fp: bool = False) -> Dataset:
    """Images with up to three persons, ignore regions, jittered detections and false positives; no equal scores."""
    samples, detections = [], []
    for index in range(num_images):
        count, num_fp = int(rng.integers(0, 4)), int(rng.integers(0, 5))
        corners = rng.uniform(0, 300, (count, 2))
        boxes = np.concatenate([corners, corners + SIDES_PX], 1).astype(np.float32)
        ground_truth = GroundTruth(boxes, rng.random(count) < 0.2, boxes, ("person",) * count)
        samples.append(Sample(index, Path(), ground_truth))
        is_detected = rng.random(count) < 0.7
        jittered = boxes[is_detected] + rng.normal(0, 6, (int(is_detected.sum()), 4))
        corners = rng.uniform(0, 300, (num_fp, 2))
        false_boxes = np.concatenate([corners, corners + SIDES_PX], 1)
        scores = np.concatenate([rng.random(len(jittered)) ** 0.5, rng.random(num_fp)])
        detections.append(Detections(np.concatenate([jittered, false_boxes]), scores))
    if first_is_fp:
        detections[0] = Detections(np.array([[900, 0, 933, 80]]), np.ones(1))
    return samples, detections


def evaluate_tables(dataset: Dataset, rows: list[int], protocol: str) -> MissRateResult:
    """Evaluate the images of `rows`, which may contain an image several times."""
    samples, detections = dataset
    gt_table = GroundTruthTable.from_samples([samples[row].ground_truth for row in rows])
    table = DetectionTable.from_detections([detections[row] for row in rows])
    if protocol == "caltech":
        return caltech.evaluate(gt_table, table, caltech.AnnotationVersion.CORRECTED, [caltech.SETUPS["All"]])["All"]
    return citypersons.evaluate(gt_table, table, [SETUPS["All"]], protocol == "citypersons zero")["All"]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["citypersons", "citypersons zero", "caltech"])
@pytest.mark.parametrize(("num_images", "first_is_fp"), [(1, False), (7, True), (60, True), (60, False), (130, True)])
def test_weighted_miss_rate_equals_duplicated_images(protocol: str, num_images: int, first_is_fp: bool) -> None:
    """Fewer than 100 images with a false positive first: the curve begins beyond the first FPPI point."""
    rng = np.random.default_rng(num_images)
    dataset = make_random_dataset(rng, num_images, first_is_fp)
    result = evaluate_tables(dataset, list(range(num_images)), protocol)
    weights = rng.multinomial(num_images, np.full(num_images, 1 / num_images), 25).astype(np.int32)
    values = compute_weighted_miss_rates(result.counted, weights)
    for row_weights, value in zip(weights, values.tolist(), strict=True):
        expected = evaluate_tables(dataset, np.repeat(np.arange(num_images), row_weights).tolist(), protocol)
        assert value == pytest.approx(expected.value, abs=1e-12) if expected.num_gt else np.isnan(value)
    ones = np.ones((1, num_images), np.int32)
    if result.num_gt:
        assert compute_weighted_miss_rates(result.counted, ones)[0] == pytest.approx(result.value, abs=1e-12)


def test_many_false_positives_use_the_complete_list() -> None:
    """One image has nearly all false positives; a resample without it needs detections from the end of the list."""
    rng = np.random.default_rng(3)
    samples, detections = make_random_dataset(rng, 40)
    corners = rng.uniform(0, 900, (900, 2))
    boxes = np.concatenate([corners, corners + SIDES_PX], 1)
    detections[5] = Detections(boxes, 1 + rng.random(900))
    result = evaluate_tables((samples, detections), list(range(40)), "citypersons zero")
    weights = np.ones((2, 40), np.int32)
    weights[1, [5, 6]] = 0, 2
    rows = [row for row in range(40) if row != 5] + [6]
    expected = evaluate_tables((samples, detections), sorted(rows), "citypersons zero").value
    assert expected < 0.9 and result.value > 0.9
    assert compute_weighted_miss_rates(result.counted, weights) == pytest.approx([result.value, expected], abs=1e-12)


def test_all_detectors_get_the_same_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the resamples are computed in several chunks."""
    dataset = make_random_dataset(np.random.default_rng(0), 30)
    result = evaluate_tables(dataset, list(range(30)), "citypersons")
    first, second = resample_miss_rates([result, result], 50, seed=1)
    assert len(first) == 50 and len(set(first.tolist())) > 20
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(resample_miss_rates([result], 50, seed=2)[0], first)
    monkeypatch.setattr("hkd_det.metrics.bootstrap.MAX_WEIGHTS_PER_CHUNK", 100)
    first, second = resample_miss_rates([result, result], 50, seed=1)
    assert len(set(first.tolist())) > 20
    np.testing.assert_array_equal(first, second)


def make_exchangeable_results(rng: np.random.Generator, num_images: int) -> list[MissRateResult]:
    """Two detectors of equal accuracy on the same images, some of which are difficult for both.

    Every person is far from the others. A detector returns the exact box or nothing, and boxes beside all persons.
    """
    samples, detections = [], ([], [])  # type: tuple[list[Sample], tuple[list[Detections], list[Detections]]]
    difficulty = rng.normal(0, 1, num_images)
    for index, count in enumerate(rng.poisson(2, num_images).tolist()):
        left = 100.0 * np.arange(count)
        boxes = np.stack([left, 0 * left, left + 40, 0 * left + 90], 1).astype(np.float32)
        samples.append(Sample(index, Path(), GroundTruth(boxes, np.zeros(count, bool), boxes, ("person",) * count)))
        for images in detections:
            left_fp = 100.0 * np.arange(rng.poisson(2))
            false_boxes = np.stack([left_fp, 0 * left_fp + 500, left_fp + 40, 0 * left_fp + 590], 1)
            is_detected = rng.random(count) < 0.9
            scores = rng.normal(4, 0.7, count) - 2 * difficulty[index]
            all_scores = np.concatenate([scores[is_detected], rng.normal(0, 1, len(left_fp))])
            images.append(Detections(np.concatenate([boxes[is_detected], false_boxes]), all_scores))
    return [evaluate_detections(samples, images, [SETUPS["All"]])["All"] for images in detections]


@pytest.mark.slow
def test_interval_of_the_difference_covers_zero_as_often_as_stated() -> None:
    """Two detectors that follow the same distribution: the true difference is 0.

    With 100 independent datasets, the standard deviation of the coverage is 2.2 points.
    """
    rng = np.random.default_rng(0)
    num_covered, num_different, ratios = 0, 0, []
    for seed in range(100):
        first, second = make_exchangeable_results(rng, 100)
        difference = compare_miss_rates(second, first, num_resamples=200, seed=seed)
        interval = compute_interval(first, num_resamples=200, seed=seed)
        assert difference is not None and interval is not None
        num_covered += difference.ci_low <= 0 <= difference.ci_high
        num_different += difference.conclusion != "no difference shown"
        ratios.append((difference.ci_high - difference.ci_low) / (interval.ci_high - interval.ci_low))
    assert 86 <= num_covered <= 99 and num_covered + num_different == 100
    # For two independent samples of images the ratio is 1.41. Here, the same images are difficult for both.
    assert 0.5 < np.mean(ratios) < 1.2


def compute_coverage(num_images: int, true_value: float, num_datasets: int = 100) -> float:
    """Return how often the 95 % interval of a random dataset contains the miss rate of unlimited images."""
    rng = np.random.default_rng(num_images)
    num_covered = 0
    for seed in range(num_datasets):
        interval = compute_interval(make_exchangeable_results(rng, num_images)[0], num_resamples=200, seed=seed)
        num_covered += interval is not None and interval.ci_low <= true_value <= interval.ci_high
    return num_covered / num_datasets


@pytest.mark.slow
def test_interval_needs_the_minimum_of_images() -> None:
    """The reason of `MIN_IMAGES`: the interval of few images too seldom contains the true miss rate."""
    large = [result.value for result in make_exchangeable_results(np.random.default_rng(5), 5000)]
    true_value = float(np.mean(large))
    assert compute_coverage(5, true_value) < 0.75 and compute_coverage(20, true_value) < 0.92
    assert compute_coverage(MIN_IMAGES, true_value) > 0.85


@pytest.mark.parametrize(("num_images", "is_concluded"), [(MIN_IMAGES - 1, False), (MIN_IMAGES, True)])
def test_few_images_give_no_conclusion(num_images: int, is_concluded: bool) -> None:
    """A detector that detects no person is worse than another; fewer images do not suffice to conclude it."""
    first, _ = make_exchangeable_results(np.random.default_rng(2), num_images)
    no_image = first.counted.image_index[:0]
    nothing = replace(first.counted, image_index=no_image, is_true_positive=first.counted.is_true_positive[:0])
    difference = compare_miss_rates(replace(first, counted=nothing, value=1.0), first)
    assert difference is not None and difference.value > 0 and first.num_gt > MIN_PERSONS
    assert difference.conclusion == ("worse" if is_concluded else "too few images or persons")
    expected = "worse" if is_concluded else "no conclusion: fewer than 50 images or 50 persons"
    assert difference.summary().endswith(f"): {expected}")
    few_persons = replace(first, num_gt=MIN_PERSONS - 1)
    assert not has_reliable_interval(few_persons)


def test_clear_difference_is_shown_with_its_sign() -> None:
    """The second detector misses the persons of every third image."""
    first, _ = make_exchangeable_results(np.random.default_rng(0), 100)
    counted = first.counted
    is_kept = ~counted.is_true_positive | (counted.image_index % 3 > 0)
    fewer = replace(
        counted, image_index=counted.image_index[is_kept], is_true_positive=counted.is_true_positive[is_kept]
    )
    second = replace(first, counted=fewer, value=float(compute_weighted_miss_rates(fewer, np.ones((1, 100), int))[0]))
    difference = compare_miss_rates(second, first)
    assert difference is not None
    assert difference.conclusion == "worse" and 0 < difference.ci_low < difference.value < difference.ci_high
    assert difference.value == second.value - first.value and difference.p_value < 0.01
    reverse = compare_miss_rates(first, second)
    assert reverse is not None and reverse.conclusion == "better"
    assert (reverse.ci_low, reverse.ci_high) == pytest.approx((-difference.ci_high, -difference.ci_low))


def test_equal_detections_have_no_difference() -> None:
    samples, detections = make_random_dataset(np.random.default_rng(0), 60)
    result = evaluate_detections(samples, detections, [SETUPS["All"]])["All"]
    difference = compare_miss_rates(result, result)
    assert difference is not None
    assert (difference.value, difference.ci_low, difference.ci_high, difference.p_value) == (0, 0, 0, 1)
    assert difference.conclusion == "no difference shown"


def test_setups_without_ground_truth_have_no_interval() -> None:
    samples, detections = make_random_dataset(np.random.default_rng(0), 20)
    results = evaluate_detections(samples, detections, [SETUPS["All"], SETUPS["heavy"]])
    assert results["heavy"].num_gt == 0
    assert set(compute_intervals(results)) == set(compute_differences(results, results)) == {"All"}
    no_images = evaluate_detections([], [], [SETUPS["All"]])
    assert compute_intervals(no_images) == {}


def test_no_detections_have_miss_rate_one() -> None:
    samples, _ = make_random_dataset(np.random.default_rng(0), 20)
    nothing = evaluate_detections(samples, [Detections.empty()] * 20, [SETUPS["All"]])["All"]
    interval = compute_interval(nothing)
    assert interval is not None and (interval.value, interval.ci_low, interval.ci_high) == (1, 1, 1)


def test_detectors_that_detect_no_person_are_not_compared() -> None:
    samples, detections = make_random_dataset(np.random.default_rng(3), 60)
    none = evaluate_detections(samples, [Detections(np.zeros((0, 4)), np.zeros(0))] * 60, [SETUPS["All"]])["All"]
    some = evaluate_detections(samples, detections, [SETUPS["All"]])["All"]
    conclusions = []
    for pair in ((none, none), (none, some)):
        difference = compare_miss_rates(*pair)
        assert difference is not None
        conclusions.append(difference.conclusion)
    assert conclusions == ["neither detects a person", "worse"]


def test_other_ground_truth_is_rejected() -> None:
    samples, detections = make_random_dataset(np.random.default_rng(0), 20)
    first = evaluate_detections(samples, detections, [SETUPS["All"]])["All"]
    second = evaluate_detections(samples[:19], detections[:19], [SETUPS["All"]])["All"]
    with pytest.raises(ValueError, match="same images"):
        compare_miss_rates(first, second)
