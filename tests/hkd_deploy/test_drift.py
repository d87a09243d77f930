"""Distributions and PSI: against scipy, the chi-square distribution, and simulated cameras."""

import json

import numpy as np
import pytest
from scipy.special import rel_entr
from scipy.stats import chi2

from hkd_deploy.drift import (
    FALSE_ALARM_RATE,
    GRIDS,
    MIN_COUNT,
    QUANTITIES,
    RELEVANT_PSI,
    Distribution,
    DriftReference,
    build_distribution,
    build_reference,
    compute_psi,
    count_values,
    merge_bins,
)
from hkd_det.structures import Detections


def make_detections(rng: np.random.Generator, score_shift: float = 0.0, mean_persons: float = 3.0) -> Detections:
    """Return persons of one image. Scores of one image depend on each other, as those of an image with bad light."""
    count = rng.poisson(mean_persons)
    scores = np.clip(rng.normal(0.6 + score_shift, 0.1) + rng.normal(0, 0.15, count), 0.06, 0.99)
    heights = np.exp(rng.normal(-1.5, 0.4, count)) * 480
    boxes = np.stack([np.full(count, 10), np.full(count, 5), np.full(count, 50), 5 + heights], 1)
    return Detections(boxes, scores)


def count_images(rng: np.random.Generator, number: int, **options: float) -> list[dict[str, np.ndarray]]:
    return [count_values(make_detections(rng, **options), 480, 0.3) for _ in range(number)]


@pytest.fixture(scope="module")
def reference() -> DriftReference:
    result = build_reference(count_images(np.random.default_rng(0), 300), 0.3)
    assert result is not None
    return result


def test_psi_equals_symmetric_entropy_of_scipy() -> None:
    p, q = np.array([20.0, 50, 30, 0]), np.array([10.0, 40, 100, 50])
    smooth_p, smooth_q = (p + 0.5) / (p + 0.5).sum(), (q + 0.5) / (q + 0.5).sum()
    expected = rel_entr(smooth_p, smooth_q).sum() + rel_entr(smooth_q, smooth_p).sum()
    assert float(compute_psi(p, q)) == pytest.approx(expected, rel=1e-12)
    assert float(compute_psi(p, p * 1.0)) == 0


def test_psi_of_two_bins_equals_closed_form() -> None:
    """Ratios 0.5 and 0.8: (0.8 - 0.5) * ln(0.8 / 0.5) + (0.2 - 0.5) * ln(0.2 / 0.5) = 0.3 * ln 4."""
    assert float(compute_psi([799_999.5, 199_999.5], [499_999.5, 499_999.5])) == pytest.approx(0.3 * np.log(4))


def test_count_values_counts_by_hand() -> None:
    boxes = np.array([[0, 0, 10, 120], [0, 0, 10, 60], [0, 0, 10, 240], [0, 0, 9, 9]])
    counts = count_values(Detections(boxes, np.array([0.9, 0.31, 0.2, 0.01])), 480, 0.3)
    assert np.flatnonzero(counts["persons"]).tolist() == [2]
    scores = [float(GRIDS["score"][index]) for index in np.flatnonzero(counts["score"])]
    assert scores == [0.2, 0.31, 0.9]  # 0.01 is below the floor
    for height, index in zip((0.125, 0.25), np.flatnonzero(counts["height"]), strict=True):
        assert GRIDS["height"][index] <= height < GRIDS["height"][index + 1]


def test_bins_have_about_a_tenth_of_the_values(reference: DriftReference) -> None:
    for name in QUANTITIES:
        counts = np.array(reference.distributions[name].counts)
        assert counts.min() >= counts.sum() / 10
        assert 4 <= len(counts) <= 10


@pytest.mark.slow
def test_noise_of_independent_values_is_that_of_chi_square() -> None:
    rng = np.random.default_rng(1)
    images = np.zeros((400, len(GRIDS["score"])), np.int64)
    images[np.arange(400), rng.integers(0, 10, 400)] = 1
    one = build_distribution("score", images, 1000)
    expected = chi2.ppf(1 - FALSE_ALARM_RATE, len(one.counts) - 1)
    assert one.noise == pytest.approx(expected, rel=0.1)
    repeated = build_distribution("score", images * 4, 1000)  # four equal scores per image are one independent value
    assert repeated.noise == pytest.approx(4 * expected, rel=0.12)


@pytest.mark.slow
@pytest.mark.parametrize("num_images", [60, 300])
def test_images_of_the_reference_raise_alarms_at_the_documented_rate(num_images: int) -> None:
    """Fresh windows and fresh references: at most the documented rate, with a 99.9 % limit of the binomial."""
    rng, num_alarms, num_windows = np.random.default_rng(2), 0, 0
    pool = {name: np.stack([counts[name] for counts in count_images(rng, 6000)]) for name in QUANTITIES}
    for _ in range(3):
        images = count_images(rng, 200)
        result = build_reference(images, 0.3)
        assert result is not None
        for _ in range(1000):
            rows = rng.integers(0, 6000, num_images)
            for name, one in result.distributions.items():
                counts = merge_bins(name, one.edges, pool[name][rows].sum(0))
                if counts.sum() < MIN_COUNT:
                    continue
                num_windows += 1
                num_alarms += float(compute_psi(counts, one.counts)) > one.compute_threshold(int(counts.sum()))
    assert num_windows >= 6000
    assert num_alarms / num_windows <= 3 * FALSE_ALARM_RATE


@pytest.mark.slow
@pytest.mark.parametrize(("options", "name"), [({"score_shift": -0.15}, "score"), ({"mean_persons": 0.8}, "persons")])
def test_shift_is_above_the_threshold(reference: DriftReference, options: dict[str, float], name: str) -> None:
    rng = np.random.default_rng(3)
    one, detected = reference.distributions[name], 0
    for _ in range(20):
        images = np.stack([counts[name] for counts in count_images(rng, 300, **options)])
        counts = merge_bins(name, one.edges, images.sum(0))
        detected += float(compute_psi(counts, one.counts)) > one.compute_threshold(int(counts.sum()))
    assert detected == 20


def test_one_value_has_a_second_bin() -> None:
    empty = np.zeros((60, len(GRIDS["persons"])), np.int64)
    empty[:, 0] = 1
    one = build_distribution("persons", empty, 100)
    assert one.edges == (1.0,) and one.counts == (60, 0)
    assert float(compute_psi([200, 200], one.counts)) > one.compute_threshold(400)


def test_reference_needs_images_and_persons() -> None:
    rng = np.random.default_rng(4)
    assert build_reference(count_images(rng, 49), 0.3) is None
    assert build_reference(count_images(rng, 60, mean_persons=0.5), 0.3) is None


def test_json_is_read_as_written(reference: DriftReference) -> None:
    read = DriftReference.from_json(reference.to_json())
    assert read.num_images == 300 and read.conf == 0.3
    for name in QUANTITIES:
        one, other = read.distributions[name], reference.distributions[name]
        assert (one.edges, one.counts) == (other.edges, other.counts)
        assert one.noise == pytest.approx(other.noise, abs=0.006)
        assert one.min_threshold == RELEVANT_PSI
    assert len(reference.to_json()) < 2000


@pytest.mark.parametrize("change", [{"score": 1}, {"min_score": 0.2}, {"persons": {"edges": [2, 1], "counts": [1]}}])
def test_wrong_json_is_a_value_error(reference: DriftReference, change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        DriftReference.from_json(json.dumps(json.loads(reference.to_json()) | change))
    with pytest.raises(ValueError):
        DriftReference.from_json("[]")


def test_threshold_falls_with_the_number_of_values() -> None:
    one = Distribution((0.5,), (100, 100), 20.0)
    assert one.compute_threshold(100) == pytest.approx(20 * (1 / 100 + 1 / 200))
    assert one.compute_threshold(10_000) == RELEVANT_PSI
