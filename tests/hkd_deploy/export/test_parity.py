"""Differences between two forms' answers, by hand-made answers."""

import numpy as np
import pytest
from numpy.typing import NDArray

from hkd_deploy.export.parity import ReferenceOutputs, compare_outputs, matched_difference, max_abs_difference

Answer = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]


def answer(*found: tuple[float, float]) -> Answer:
    """Four rows: people of 10 px, each by the place of its left upper corner and its score, and what is left over."""
    boxes, scores = np.zeros((4, 4), np.float32), np.zeros(4, np.float32)
    for row, (place, score) in enumerate(found):
        boxes[row], scores[row] = (place, place, place + 10, place + 10), score
    return boxes[None], scores[None], np.array([len(found)])


def test_every_detection_of_an_exact_form_counts() -> None:
    assert max_abs_difference(answer((5, 0.9), (50, 0.01)), answer((5, 0.9), (50.25, 0.01))) == (0.25, 0)
    box_px, score = max_abs_difference(answer((5, 0.9), (50, 0.01)), answer((5, 0.9)))
    assert box_px == np.inf and score == pytest.approx(0.01)


def test_of_smaller_numbers_the_sure_detections_count_in_both_directions() -> None:
    wanted = answer((5, 0.9), (50, 0.1))
    assert matched_difference(wanted, answer((7, 0.8), (90, 0.1))) == (2, pytest.approx(0.1))
    # One that the other sees as well, but is not sure of.
    assert matched_difference(answer((5, 0.9), (50, 0.35)), answer((5, 0.9), (50, 0.2))) == (0, pytest.approx(0.15))
    # One too many, one too few.
    for one, other in (
        (answer((5, 0.9)), answer((5, 0.9), (45, 0.5))),
        (answer((5, 0.9), (45, 0.5)), answer((5, 0.9))),
    ):
        assert matched_difference(one, other) == (40, pytest.approx(0.4))
    assert matched_difference(wanted, answer()) == (np.inf, pytest.approx(0.9))
    assert matched_difference(answer(), answer()) == (0, 0)


def test_the_worst_picture_is_known_and_every_row_of_a_batch_counts() -> None:
    seen = ReferenceOutputs([np.full((1, 2, 2, 3), number) for number in range(3)], [answer((5, 0.9))] * 3)

    def run(batch: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        assert batch.shape == (4, 2, 2, 3)
        answers = [
            answer((5 + (0.3 if row == 3 and number == 1 else 0), 0.9)) for row, number in enumerate(batch[:, 0, 0, 0])
        ]
        return [np.concatenate(values) for values in zip(*answers, strict=True)]

    parity = compare_outputs(seen, run, 4, True, "")
    assert (parity.num_images, parity.worst_index, parity.score_error) == (3, 1, 0) and parity.within_tolerance
    assert parity.box_error_px == pytest.approx(0.3, abs=1e-6)


def test_an_answer_that_is_no_number_does_not_hold() -> None:
    seen = ReferenceOutputs([np.zeros((1, 2, 2, 3))], [answer((5, 0.9))])
    boxes, scores, count = answer((5, 0.9))
    assert not compare_outputs(seen, lambda _: (boxes * np.nan, scores, count), 1, True, "").within_tolerance
    assert not compare_outputs(seen, lambda _: (boxes, scores * np.nan, count), 1, True, "").within_tolerance
