"""Which channels go: people's vectors, their neighbours, what all agree on."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from hkd_det.distill.cdd.config import CDDConfig
from hkd_det.distill.cdd.importance import (
    EMA_DECAY,
    ChannelImportance,
    FeatureQueue,
    PooledFeatures,
    channel_responses,
    sample_regions,
    unimportant_channels,
)
from hkd_det.models.base import Targets
from hkd_det.ops.roi_pool import BoxAveragePool


def mask(*names: int, of: int = 6) -> Tensor:
    return torch.tensor([channel in names for channel in range(of)])


def test_a_gallery_is_first_in_first_out() -> None:
    gallery = FeatureQueue(5, 3)
    vectors = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for part in vectors.split(3):
        gallery.add(part)
    expected = vectors[-5:] / vectors[-5:].norm(dim=1, keepdim=True)
    torch.testing.assert_close(gallery.vectors.float(), expected, atol=1e-3, rtol=0)
    twin = FeatureQueue(5, 3)
    twin.load_state_dict(gallery.state_dict())
    assert torch.equal(twin.vectors, gallery.vectors)


@pytest.mark.parametrize(("size", "count"), [(20, 1), (20, 2), (20, 50), (128, 2), (200, 2), (200, 90)])
def test_neighbours_are_those_of_a_search_by_hand(size: int, count: int) -> None:
    chance = np.random.default_rng(count)
    known, asked = chance.normal(size=(size, 7)), chance.normal(size=(4, 7))
    known = (known / np.linalg.norm(known, axis=1, keepdims=True)).astype(np.float16).astype(float)  # as it is kept
    gallery = FeatureQueue(size, 7)
    gallery.add(torch.from_numpy(known))
    found = gallery.find_nearest(torch.from_numpy(asked).float(), count).numpy()
    assert found.shape == (4, min(count, size), 7)
    for query, rows in zip(asked, found, strict=True):
        cosines = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in known]
        best = known[np.argsort(cosines)[::-1][:count]]
        np.testing.assert_allclose(rows, best / np.linalg.norm(best, axis=1, keepdims=True), atol=1e-3)


def test_what_every_comparison_marks_is_unneeded() -> None:
    students = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 1.0, 1.0]])
    neighbours = torch.tensor([[[0.1, 0.4, 1.0, 1.0]], [[0.5, 0.1, 0.2, -2.0]]])
    response = channel_responses(students, neighbours)  # [.1 .8 3 4] marks 0, 1; [.5 .1 .2 2] marks 1, 2
    torch.testing.assert_close(response[:, 0], torch.tensor([[0.1, 0.8, 3.0, 4.0], [0.5, 0.1, 0.2, 2.0]]))
    nobody = mask(of=4)
    assert unimportant_channels(response, nobody, 0.5).tolist() == [False, True, False, False]
    assert unimportant_channels(response[:1], nobody, 0.5).tolist() == [True, True, False, False]
    assert not unimportant_channels(response[:0], nobody, 0.5).any()
    # With 1 gone, one is left of the lowest half: 0 of the first, 2 of the second.
    assert not unimportant_channels(response, mask(1, of=4), 0.5).any()
    assert unimportant_channels(response[1:], mask(1, of=4), 0.5).tolist() == [False, False, True, False]


def test_agreement_takes_no_more_than_its_share_of_a_layer() -> None:
    """However often people agree: what is beyond it, the course asks for."""
    response = torch.arange(8.0).expand(5, 2, 8)  # all say the same
    assert unimportant_channels(response, mask(0, 1, of=8), 0.5).tolist() == [False, False, True, True] + 4 * [False]
    for gone in (mask(*range(4), of=8), mask(*range(6), of=8)):
        assert not unimportant_channels(response, gone, 0.5).any()


def test_evidence_runs_over_batches_and_sees_through_an_adapter() -> None:
    settings = CDDConfig(num_neighbors=1, candidate_ratio=0.34)
    adapter = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, -0.75]])  # the teacher has two channels, the student three
    evidence = ChannelImportance(settings, 3, 2)
    teacher, student = torch.tensor([[0.6, 0.8], [1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.4]])
    # A s = (1.4, 1.7): nearest is (0.6, 0.8), pulled back (0.6, 1.6, 0.6 - 0.6); the responses are (0.6, 1.6, 0).
    assert evidence.update(PooledFeatures(teacher, student), adapter, mask(of=3)).tolist() == [False, False, True]
    torch.testing.assert_close(evidence.response, torch.tensor([0.6, 1.6, 0.0]), atol=1e-3, rtol=0)
    evidence.update(PooledFeatures(teacher, 2 * student), adapter, mask(of=3))
    second = EMA_DECAY * torch.tensor([0.6, 1.6, 0.0]) + (1 - EMA_DECAY) * torch.tensor([1.2, 3.2, 0.0])
    torch.testing.assert_close(evidence.response, second, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        evidence.compute_relative_response(mask(2, of=3))[:2], second[:2] / second[:2].mean(), atol=1e-3, rtol=0
    )
    assert not evidence.update(PooledFeatures(teacher, student[:0]), adapter, mask(of=3)).any()


def test_a_pooled_vector_is_the_mean_over_the_box() -> None:
    """Of a map that rises evenly that is its value in the middle of the box, whatever the box."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    ramp = torch.stack([x, y, 2 * x - y])[None].expand(2, -1, -1, -1)
    rois = torch.tensor([[0.0, 8.0, 8.0, 40.0, 50.0], [1.0, 20.0, 10.0, 31.0, 53.0]])
    middle = ((rois[:, 1:3] + rois[:, 3:5]) / 2 / 4 - 0.5).unbind(1)
    expected = torch.stack([middle[0], middle[1], 2 * middle[0] - middle[1]], 1)
    torch.testing.assert_close(BoxAveragePool(rois, (64, 96))([ramp]), expected)


def test_pooling_is_roi_align_of_one_cell() -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 5, 16, 24, requires_grad=True)
    rois = torch.tensor([[2.0, 8, 8, 40, 50], [0, 20, 10, 31, 53], [2, 5.5, 3.3, 17.1, 61], [0, 0, 0, 96, 64]])
    mine, theirs = (
        BoxAveragePool(rois, (64, 96))([features]),
        roi_align(features, rois, 1, 0.25, 4, aligned=True).flatten(1),
    )
    torch.testing.assert_close(mine, theirs)
    slopes = [torch.autograd.grad(vectors.square().sum(), features)[0] for vectors in (mine, theirs)]
    torch.testing.assert_close(*slopes)


def test_of_several_levels_the_one_of_the_box_height_is_read() -> None:
    maps = [torch.full((1, 2, 128 // stride, 128 // stride), float(stride)) for stride in (8, 16)]
    rois = torch.tensor([[0.0, 2.0, 2.0, 20.0, 60.0], [0.0, 2.0, 2.0, 30.0, 120.0]])  # 58 px: stride 8; 118 px: 16
    assert BoxAveragePool(rois, (128, 128))(maps)[:, 0].tolist() == [8.0, 16.0]
    assert BoxAveragePool(rois[:1], (128, 128))(maps)[:, 0].tolist() == [8.0]  # one level has nobody to read


def test_reading_from_levels_teaches_the_levels_read() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 128 // stride, 128 // stride, requires_grad=True) for stride in (8, 16)]
    rois = torch.tensor([[1.0, 2, 2, 20, 60], [0, 2, 2, 30, 120], [1, 40, 3, 60, 62]])
    mine = BoxAveragePool(rois, (128, 128))(maps)
    fine, coarse = (
        roi_align(level, rois, 1, 1 / stride, 4, aligned=True) for level, stride in zip(maps, (8, 16), strict=True)
    )
    theirs = torch.stack([fine[0], coarse[1], fine[2]]).flatten(1)
    torch.testing.assert_close(mine, theirs)
    slopes = [torch.autograd.grad(vectors.square().sum(), maps) for vectors in (mine, theirs)]
    for ours, other in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, other)


def test_distractors_are_of_peoples_size_and_apart_from_them() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[[10.0, 10.0, 40.0, 60.0], [50.0, 5.0, 60.0, 30.0]], [[0.0, 0.0, 96.0, 64.0], [0.0] * 4]])
    real, ignore = torch.tensor([[[True, True], [False, False]], [[False, False], [True, False]]])
    truth = Targets(boxes, real, ignore)
    drawn = [sample_regions(truth, (64, 96)) for _ in range(20)]
    for regions in drawn:
        assert regions.num_gt == 2 and torch.equal(regions.rois[:2, 1:], boxes[0])
        for _, x1, y1, x2, y2 in regions.rois[2:].tolist():
            assert (
                (round(x2 - x1), round(y2 - y1)) in {(30, 50), (10, 25)} and x1 >= 0 and x2 <= 96.001 and y2 <= 64.001
            )
            shared = max(0, min(x2, 40) - max(x1, 10)) * max(0, min(y2, 60) - max(y1, 10))
            assert shared <= 0.31 * ((x2 - x1) * (y2 - y1) + 1500 - shared)
    assert any(len(regions.rois) > 2 for regions in drawn)
    nobody = sample_regions(Targets(boxes, torch.zeros(2, 2).bool(), torch.zeros(2, 2).bool()), (64, 96))
    assert nobody.rois.shape == (0, 5) and BoxAveragePool(nobody.rois, (64, 64))([torch.ones(2, 3, 8, 8)]).shape == (
        0,
        3,
    )
