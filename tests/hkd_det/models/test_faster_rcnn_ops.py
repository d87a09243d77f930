"""Faster R-CNN with static shapes for export: agreement with torchvision."""

import pytest
import torch
from torchvision.ops import roi_align

from hkd_deploy.export.parity import compute_box_difference
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.faster_rcnn_ops import _roi_align_level

TINY = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256))


def make_detector() -> FasterRCNN:
    torch.manual_seed(0)
    detector = FasterRCNN(TINY)
    for part in (detector.rpn.head, detector.roi_heads.box_predictor):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return detector.eval()


@pytest.mark.parametrize("size_hw", [(64, 96), (256, 320)])
@torch.no_grad()
def test_predict_traceable_agrees_with_predict(size_hw: tuple[int, int]) -> None:
    """The small input has fewer proposals than the limit, the large one has more."""
    detector = make_detector()
    images = torch.randint(0, 255, (2, 3, *size_hw), generator=torch.Generator().manual_seed(1)).float()
    expected_boxes, expected_scores = detector.predict(images)
    boxes, scores = detector.predict_traceable(images)
    torch.testing.assert_close(scores, expected_scores, atol=1e-5, rtol=0)
    for index in range(2):
        num_valid = int((expected_scores[index] > 0).sum())
        expected = expected_boxes[index, :num_valid].numpy(), expected_scores[index, :num_valid].numpy()
        assert num_valid > 200 and compute_box_difference(*expected, boxes[index].numpy(), scores[index].numpy()) < 1e-3


def test_roi_align_level_agrees_with_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(2, 5, 16, 24, generator=generator)
    corners = torch.rand(2, 40, 2, 2, generator=generator).sort(2).values * torch.tensor([24.0, 16.0])
    boxes = corners.flatten(2)
    boxes[:, :3] = torch.tensor([[23.9, 15.9, 24, 16], [0, 0, 24, 16], [3, 4, 3, 4]])  # border, whole image, empty
    mask = torch.arange(40).expand(2, -1) % 5 != 4
    expected = roi_align(features, list(boxes), 7, 1.0, 2) * mask.reshape(-1, 1, 1, 1)
    actual = _roi_align_level(features, boxes, mask).unflatten(2, (-1, 7)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
