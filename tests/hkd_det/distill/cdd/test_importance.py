"""Channel importance: feature queue, nearest neighbors, responses and sampled regions."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hkd_det.distill.cdd.importance import (
    EMA_DECAY,
    ChannelImportance,
    FeatureQueue,
    PooledFeatures,
    compute_channel_responses,
    find_unimportant_channels,
    sample_regions,
)
from hkd_det.models.base import Targets
from hkd_det.ops.roi_pool import BoxAveragePool


def make_mask(*masked: int, num_channels: int) -> Tensor:
    return torch.tensor([channel in masked for channel in range(num_channels)])


def test_feature_queue_is_first_in_first_out() -> None:
    queue = FeatureQueue(5, 3)
    vectors = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for batch in vectors.split(3):
        queue.add(batch)
    expected = vectors[-5:] / vectors[-5:].norm(dim=1, keepdim=True)
    torch.testing.assert_close(queue.vectors.float(), expected, atol=1e-3, rtol=0)
    restored = FeatureQueue(5, 3)
    restored.load_state_dict(queue.state_dict())
    assert torch.equal(restored.vectors, queue.vectors)


@pytest.mark.parametrize(("size", "k"), [(20, 1), (20, 2), (20, 50), (128, 2), (200, 2), (200, 90)])
def test_find_nearest_matches_exhaustive_search(size: int, k: int) -> None:
    rng = np.random.default_rng(k)
    vectors, queries = rng.normal(size=(size, 7)), rng.normal(size=(4, 7))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(float)
    queue = FeatureQueue(size, 7)
    queue.add(torch.from_numpy(vectors))
    neighbors = queue.find_nearest(torch.from_numpy(queries).float(), k).numpy()
    assert neighbors.shape == (4, min(k, size), 7)
    for query, rows in zip(queries, neighbors, strict=True):
        cosines = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in vectors]
        best = vectors[np.argsort(cosines)[::-1][:k]]
        np.testing.assert_allclose(rows, best / np.linalg.norm(best, axis=1, keepdims=True), atol=1e-3)


def test_channel_low_in_every_comparison_is_unimportant() -> None:
    student_vectors = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 1.0, 1.0]])  # lengths sqrt(30) and 2
    neighbors = torch.tensor([[[0.1, 0.4, 1.0, 1.0]], [[0.5, 0.1, 0.2, -2.0]]])
    responses = compute_channel_responses(student_vectors, neighbors)  # [.1 .8 3 4] marks 0, 1; [.5 .1 .2 2] marks 1, 2
    responses = responses * torch.tensor([30.0**0.5, 2.0])[:, None, None]
    torch.testing.assert_close(responses[:, 0], torch.tensor([[0.1, 0.8, 3.0, 4.0], [0.5, 0.1, 0.2, 2.0]]))
    unmasked = make_mask(num_channels=4)
    assert find_unimportant_channels(responses, unmasked, 0.5).tolist() == [False, True, False, False]
    assert find_unimportant_channels(responses[:1], unmasked, 0.5).tolist() == [True, True, False, False]
    assert not find_unimportant_channels(responses[:0], unmasked, 0.5).any()
    # With channel 1 masked, one channel of the lowest half remains: 0 in the first comparison, 2 in the second.
    assert not find_unimportant_channels(responses, make_mask(1, num_channels=4), 0.5).any()
    assert find_unimportant_channels(responses[1:], make_mask(1, num_channels=4), 0.5).tolist() == [
        False,
        False,
        True,
        False,
    ]


def test_unimportant_channels_stay_within_candidate_ratio() -> None:
    responses = torch.arange(8.0).expand(5, 2, 8)  # equal in all comparisons
    assert find_unimportant_channels(responses, make_mask(0, 1, num_channels=8), 0.5).tolist() == [
        False,
        False,
        True,
        True,
    ] + 4 * [False]
    for masked in (make_mask(*range(4), num_channels=8), make_mask(*range(6), num_channels=8)):
        assert not find_unimportant_channels(responses, masked, 0.5).any()


def test_importance_averages_batches_and_applies_the_adapter() -> None:
    adapter = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, -0.75]])  # the teacher has two channels, the student three
    importance = ChannelImportance(3, 2, queue_size=24000, num_neighbors=1, candidate_ratio=0.34)
    teacher, student = torch.tensor([[1.5, 2.0], [1.0, 0.0]]), torch.tensor([[2.0, 1.0, 2.0]])
    unmasked = make_mask(num_channels=3)
    # The query (1.5, 2) finds its own unit vector (0.6, 0.8), projected back to (0.6, 1.6, 0.6 - 0.6). ||s|| = 3.
    assert importance.update(PooledFeatures(teacher, student), adapter, unmasked).tolist() == [False, False, True]
    first = torch.tensor([0.4, 1.6 / 3, 0.0])
    torch.testing.assert_close(importance.response, first, atol=1e-3, rtol=0)
    longer = 7 * torch.tensor([[1.0, 2.0, 2.0]])  # the length has no effect
    importance.update(PooledFeatures(teacher, longer), adapter, unmasked)
    second = EMA_DECAY * first + (1 - EMA_DECAY) * torch.tensor([0.2, 3.2 / 3, 0.0])
    torch.testing.assert_close(importance.response, second, atol=1e-3, rtol=0)
    relative = importance.compute_relative_response(make_mask(2, num_channels=3))[:2]
    torch.testing.assert_close(relative, second[:2] / second[:2].mean(), atol=1e-3, rtol=0)
    assert not importance.update(PooledFeatures(teacher, student[:0]), adapter, unmasked).any()


def test_query_is_the_teacher_vector_of_the_person() -> None:
    """A student vector in another direction changes the response, but not the retrieved neighbors."""
    importance = ChannelImportance(2, 2, queue_size=8, num_neighbors=2, candidate_ratio=0.5)
    importance.queue.add(torch.tensor([[0.0, 1.0], [0.8, 0.6]]))
    # Of (0, 1), (0.8, 0.6) and itself, the query (1, 0) is nearest to itself, then to (0.8, 0.6).
    # A query with the student's vector (0, 5) would find (0, 1) first.
    person = PooledFeatures(torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
    importance.update(person, None, make_mask(num_channels=2))
    torch.testing.assert_close(importance.response, torch.tensor([0.0, 0.3]), atol=1e-3, rtol=0)


def test_persons_of_all_processes_come_first() -> None:
    a = PooledFeatures(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[-1.0], [-2.0]]))  # two persons
    b = PooledFeatures(torch.tensor([[4.0], [5.0]]), torch.tensor([[-4.0]]))
    empty = PooledFeatures(torch.zeros(0, 1), torch.zeros(0, 1))
    features = PooledFeatures.concatenate([a, empty, b])
    assert features.teacher[:, 0].tolist() == [1, 2, 4, 3, 5] and features.student[:, 0].tolist() == [-1, -2, -4]


def test_background_boxes_have_person_size_and_low_overlap() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[[10.0, 10.0, 40.0, 60.0], [50.0, 5.0, 60.0, 30.0]], [[0.0, 0.0, 96.0, 64.0], [0.0] * 4]])
    valid, ignore = torch.tensor([[[True, True], [False, False]], [[False, False], [True, False]]])
    targets = Targets(boxes, valid, ignore)
    samples = [sample_regions(targets, (64, 96)) for _ in range(20)]
    for regions in samples:
        assert regions.num_gt == 2 and torch.equal(regions.rois[:2, 1:], boxes[0])
        for _, x1, y1, x2, y2 in regions.rois[2:].tolist():
            assert (
                (round(x2 - x1), round(y2 - y1)) in {(30, 50), (10, 25)} and x1 >= 0 and x2 <= 96.001 and y2 <= 64.001
            )
            overlap = max(0, min(x2, 40) - max(x1, 10)) * max(0, min(y2, 60) - max(y1, 10))
            assert overlap <= 0.31 * ((x2 - x1) * (y2 - y1) + 1500 - overlap)
    assert any(len(regions.rois) > 2 for regions in samples)
    empty = sample_regions(Targets(boxes, torch.zeros(2, 2).bool(), torch.zeros(2, 2).bool()), (64, 96))
    assert empty.rois.shape == (0, 5)
    assert BoxAveragePool(empty.rois, (64, 64))([torch.ones(2, 3, 8, 8)]).shape == (0, 3)
