"""Differences between the outputs of two models, computed by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray

from hkd_deploy.export.parity import (
    ReferenceOutputs,
    compare_outputs,
    compute_matched_difference,
    compute_max_difference,
)

Outputs = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]


def make_outputs(*detections: tuple[float, float]) -> Outputs:
    """Make outputs of four rows: one 10 px box per (x1 = y1, score) pair, and unused rows."""
    boxes, scores = np.zeros((4, 4), np.float32), np.zeros(4, np.float32)
    for row, (corner, score) in enumerate(detections):
        boxes[row], scores[row] = (corner, corner, corner + 10, corner + 10), score
    return boxes[None], scores[None], np.array([len(detections)])


def test_compute_max_difference_compares_every_detection() -> None:
    assert compute_max_difference(make_outputs((5, 0.9), (50, 0.01)), make_outputs((5, 0.9), (50.25, 0.01))) == (
        0.25,
        0,
    )
    box_px, score = compute_max_difference(make_outputs((5, 0.9), (50, 0.01)), make_outputs((5, 0.9)))
    assert box_px == np.inf and score == pytest.approx(0.01)


def test_compute_matched_difference_compares_in_both_directions() -> None:
    expected = make_outputs((5, 0.9), (50, 0.1))
    assert compute_matched_difference(expected, make_outputs((7, 0.8), (90, 0.1))) == (2, pytest.approx(0.1))
    # The counterpart has a score below the threshold.
    assert compute_matched_difference(make_outputs((5, 0.9), (50, 0.35)), make_outputs((5, 0.9), (50, 0.2))) == (
        0,
        pytest.approx(0.15),
    )
    # One additional and one missing detection.
    for first, second in (
        (make_outputs((5, 0.9)), make_outputs((5, 0.9), (45, 0.5))),
        (make_outputs((5, 0.9), (45, 0.5)), make_outputs((5, 0.9))),
    ):
        assert compute_matched_difference(first, second) == (40, pytest.approx(0.4))
    assert compute_matched_difference(expected, make_outputs()) == (np.inf, pytest.approx(0.9))
    assert compute_matched_difference(make_outputs(), make_outputs()) == (0, 0)


def test_compare_outputs_returns_worst_image() -> None:
    reference_outputs = ReferenceOutputs(
        [np.full((1, 2, 2, 3), number) for number in range(3)], [make_outputs((5, 0.9))] * 3
    )

    def run(batch: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        assert batch.shape == (4, 2, 2, 3)
        outputs = [
            make_outputs((5 + (0.3 if row == 3 and number == 1 else 0), 0.9))
            for row, number in enumerate(batch[:, 0, 0, 0])
        ]
        return [np.concatenate(values) for values in zip(*outputs, strict=True)]

    parity = compare_outputs(reference_outputs, run, 4, True, "")
    assert (parity.num_images, parity.worst_index, parity.score_error) == (3, 1, 0) and parity.within_tolerance
    assert parity.box_error_px == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize("is_exact", [True, False])
def test_compare_outputs_counts_compared_detections(is_exact: bool) -> None:
    weak, none, strong = make_outputs((5, 0.1)), make_outputs(), make_outputs((5, 0.9))
    for expected, actual, num_compared in (
        (none, none, 0),
        (weak, weak, 2 if is_exact else 0),
        (strong, none, 1),
        (strong, strong, 2),
    ):
        reference_outputs = ReferenceOutputs([np.zeros((1, 2, 2, 3))], [expected])
        parity = compare_outputs(reference_outputs, lambda _, outputs=actual: outputs, 1, is_exact, "")
        assert parity.num_compared == num_compared


def test_compare_outputs_with_nan_is_not_within_tolerance() -> None:
    reference_outputs = ReferenceOutputs([np.zeros((1, 2, 2, 3))], [make_outputs((5, 0.9))])
    boxes, scores, count = make_outputs((5, 0.9))
    assert not compare_outputs(
        reference_outputs, lambda _: (boxes * np.nan, scores, count), 1, True, ""
    ).within_tolerance
    assert not compare_outputs(
        reference_outputs, lambda _: (boxes, scores * np.nan, count), 1, True, ""
    ).within_tolerance
