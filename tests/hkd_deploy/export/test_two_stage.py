"""Faster R-CNN with shapes that depend on no value says what torchvision's parts say."""

import pytest
import torch
from torchvision.ops import roi_align

from hkd_deploy.export.parity import compute_box_difference
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.faster_rcnn_trace import _roi_align_level

TINY = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256))


def lively() -> FasterRCNN:
    torch.manual_seed(0)
    detector = FasterRCNN(TINY)
    for part in (detector.rpn.head, detector.roi_heads.box_predictor):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return detector.eval()


@pytest.mark.parametrize("size_hw", [(64, 96), (256, 320)])
@torch.no_grad()
def test_the_same_people(size_hw: tuple[int, int]) -> None:
    """Few proposals, so that some are none, and more than are looked at."""
    detector = lively()
    pictures = torch.randint(0, 255, (2, 3, *size_hw), generator=torch.Generator().manual_seed(1)).float()
    wanted_boxes, wanted_scores = detector.predict(pictures)
    boxes, scores = detector.predict_traceable(pictures)
    torch.testing.assert_close(scores, wanted_scores, atol=1e-5, rtol=0)
    for picture in range(2):
        real = int((wanted_scores[picture] > 0).sum())
        wanted = wanted_boxes[picture, :real].numpy(), wanted_scores[picture, :real].numpy()
        assert real > 200 and compute_box_difference(*wanted, boxes[picture].numpy(), scores[picture].numpy()) < 1e-3


def test_regions_are_read_as_roi_align_reads_them() -> None:
    chance = torch.Generator().manual_seed(0)
    features = torch.rand(2, 5, 16, 24, generator=chance)
    corners = torch.rand(2, 40, 2, 2, generator=chance).sort(2).values * torch.tensor([24.0, 16.0])
    boxes = corners.flatten(2)
    boxes[:, :3] = torch.tensor([[23.9, 15.9, 24, 16], [0, 0, 24, 16], [3, 4, 3, 4]])  # at the border, all, none
    chosen = torch.arange(40).expand(2, -1) % 5 != 4
    wanted = roi_align(features, list(boxes), 7, 1.0, 2) * chosen.reshape(-1, 1, 1, 1)
    found = _roi_align_level(features, boxes, chosen).unflatten(2, (-1, 7)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
