"""Faster R-CNN compared with torchvision: detections and losses; and ignore regions."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import box_iou

from hkd_det.models.base import Targets
from hkd_det.models.checkpoint import build_from_spec, spec_from_dict, spec_to_dict
from hkd_det.models.detector import Backbone
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.faster_rcnn_ops import IGNORE_LABEL, mark_ignored_anchors
from hkd_det.ops.boxes import pairwise_intersection

TINY = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256))
IMAGES = torch.randint(0, 255, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def make_targets(persons: list[list[float]], ignored: list[list[float]] = []) -> Targets:  # noqa: B006 - not modified
    """Return the same persons and ignore regions for both images."""
    boxes = torch.tensor([[*persons, *ignored]] * 2, dtype=torch.float32).view(2, -1, 4)
    ignore = (torch.arange(boxes.shape[1]) >= len(persons)).expand(2, -1)
    return Targets(boxes, ~ignore, ignore)


TWO = make_targets([[10.0, 5.0, 30.0, 60.0], [50.0, 10.0, 70.0, 50.0]])


def sample_everything(model: Any) -> None:
    """Sample all anchors and proposals, so that the losses are not random."""
    model.rpn.fg_bg_sampler.batch_size_per_image = model.roi_heads.fg_bg_sampler.batch_size_per_image = 10**6


@pytest.fixture
def tiny() -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(TINY)


@pytest.fixture(scope="module")
def model_pair() -> tuple[FasterRCNN, TorchvisionFasterRCNN]:
    """Return our model and torchvision's model with the same weights."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5
    )
    reference = TorchvisionFasterRCNN(
        backbone, num_classes=2, min_size=64, max_size=96, box_score_thresh=0.0, box_detections_per_img=50,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    for parameter in reference.roi_heads.box_predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = FasterRCNN(FasterRCNNSpec("resnet18"))
    ours.load_state_dict(reference.state_dict())  # the same names and shapes, all of them
    return ours, reference


@pytest.mark.slow
def test_predict_equals_torchvision(model_pair: tuple[FasterRCNN, TorchvisionFasterRCNN]) -> None:
    ours, reference = (model.eval() for model in model_pair)
    with torch.no_grad():
        expected = reference(list(IMAGES.float() / 255))
        boxes, scores = ours.predict(IMAGES, max_det=50)
    for b, detections in enumerate(expected):
        count = len(detections["scores"])
        assert count > 5
        torch.testing.assert_close(scores[b, :count], detections["scores"], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(boxes[b, :count], detections["boxes"], atol=2e-2, rtol=1e-3)
        assert not scores[b, count:].any() and not boxes[b, count:].any()


@pytest.mark.slow
def test_losses_equal_torchvision(model_pair: tuple[FasterRCNN, TorchvisionFasterRCNN]) -> None:
    ours, reference = (model.train() for model in model_pair)
    targets = [{"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64)} for boxes in TWO.boxes_xyxy]
    sample_everything(ours)
    sample_everything(reference)
    expected = reference(list(IMAGES.float() / 255), targets)
    losses = ours.loss(ours(IMAGES), TWO)
    for name, reference_name in {
        "rpn_cls": "loss_objectness", "rpn_box": "loss_rpn_box_reg",
        "cls": "loss_classifier", "box": "loss_box_reg",
    }.items():  # fmt: skip
        assert losses[name] > 0
        torch.testing.assert_close(losses[name], expected[reference_name], atol=1e-4, rtol=1e-3)


def test_losses_have_gradients_for_all_weights(tiny: FasterRCNN) -> None:
    losses = tiny.train().loss(tiny(IMAGES), TWO)
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert all(p.grad.abs().sum() > 0 for p in (tiny.rpn.head.bbox_pred.weight, tiny.roi_heads.box_head.fc7.weight))


@pytest.mark.parametrize(
    "empty", [make_targets([]), make_targets([], [[0.0, 0.0, 96.0, 64.0]]), make_targets([[5.0, 5.0, 5.0, 40.0]])],
    ids=["empty", "all ignored", "no area"],
)  # fmt: skip
def test_losses_of_images_without_persons_are_finite(tiny: FasterRCNN, empty: Targets) -> None:
    losses = tiny.train().loss(tiny(IMAGES), empty)
    torch.stack(list(losses.values())).sum().backward()
    assert losses["box"] == 0 and losses["rpn_box"] == 0
    assert all(torch.isfinite(p.grad).all() for p in tiny.parameters() if p.grad is not None)


def test_ignore_region_has_no_influence_on_the_first_stage(tiny: FasterRCNN) -> None:
    region = [40.0, 0.0, 96.0, 64.0]
    targets_with_region = make_targets([[10.0, 5.0, 30.0, 60.0]], [region])
    sample_everything(tiny)
    output = tiny.train()(IMAGES)
    objectness = output.objectness.detach().requires_grad_()
    tiny.loss(replace(output, objectness=objectness), targets_with_region)["rpn_cls"].backward()
    clipped = output.anchors_xyxy.clamp(min=torch.zeros(4), max=torch.tensor([96.0, 64.0, 96.0, 64.0]))
    area = (clipped[:, 2:] - clipped[:, :2]).prod(-1)
    inside = pairwise_intersection(clipped, torch.tensor([region]))[:, 0] >= 0.5 * area
    is_background = box_iou(output.anchors_xyxy, torch.tensor([[10.0, 5.0, 30.0, 60.0]]))[:, 0] == 0
    assert (inside & is_background).sum() > 50 and not objectness.grad[:, inside & is_background].any()
    assert objectness.grad[:, ~inside & is_background].all()
    objectness.grad = None
    tiny.loss(replace(output, objectness=objectness), make_targets([[10.0, 5.0, 30.0, 60.0]]))["rpn_cls"].backward()
    assert objectness.grad[:, inside & is_background].all()  # sampled without the region


def test_ignore_region_has_no_influence_on_the_second_stage(tiny: FasterRCNN) -> None:
    output = tiny.train()(IMAGES)
    person, region = [10.0, 5.0, 30.0, 60.0], [40.0, 0.0, 96.0, 64.0]
    outside = torch.tensor([[0.0, 0.0, 35.0, 64.0], [12.0, 6.0, 30.0, 58.0]])
    inside_region = torch.tensor([[45.0, 5.0, 60.0, 50.0], [70.0, 20.0, 90.0, 64.0]])
    targets_with_region = make_targets([person], [region])
    expected = tiny.loss(replace(output, proposals=(outside, outside)), targets_with_region)
    all_boxes = torch.cat([outside, inside_region])
    torch.testing.assert_close(
        tiny.loss(replace(output, proposals=(all_boxes, all_boxes)), targets_with_region)["cls"], expected["cls"]
    )
    assert (
        tiny.loss(replace(output, proposals=(all_boxes, all_boxes)), make_targets([person]))["cls"] != expected["cls"]
    )


corner = st.integers(0, 40)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(corner, corner, corner, corner), min_size=1, max_size=6), st.integers(0, 2))
def test_mark_ignored_anchors_equals_pixel_counts(corners: list[tuple[int, int, int, int]], label: int) -> None:
    boxes = [(min(a, c), min(b, d), max(a, c) + 1, max(b, d) + 1) for a, b, c, d in corners]
    region = (10, 10, 31, 35)
    labels = torch.full((len(boxes),), label)
    actual = mark_ignored_anchors(labels, torch.tensor(boxes).float(), torch.tensor([region]).float())
    for (x1, y1, x2, y2), actual_label in zip(boxes, actual.tolist(), strict=True):
        inside = sum(10 <= x < 31 and 10 <= y < 35 for x in range(x1, x2) for y in range(y1, y2))
        is_mostly_inside = 2 * inside >= (x2 - x1) * (y2 - y1)
        assert actual_label == (IGNORE_LABEL if is_mostly_inside and label == 0 else label)


def test_split_ignored_drops_padding() -> None:
    batch = Targets(torch.tensor([[[0.0, 0, 9, 9], [0, 0, 5, 5]]]), torch.tensor([[True, False]]),
                       torch.tensor([[False, False]]))  # fmt: skip
    (gt_boxes,), (ignored,) = batch.split_ignored()
    assert gt_boxes.tolist() == [[0, 0, 9, 9]] and ignored.shape == (0, 4)


def test_forward_rois_does_not_depend_on_other_rois(tiny: FasterRCNN) -> None:
    """The outputs of an RoI depend neither on other RoIs nor on the position of its image in the batch."""
    tiny.eval()
    with torch.no_grad():
        output = tiny(IMAGES)
        a, b = torch.tensor([[3.0, 4.0, 40.0, 60.0]]), torch.tensor([[20.0, 2.0, 90.0, 50.0], [0.0, 0.0, 9.0, 9.0]])
        both, first, second = (tiny.forward_rois(output, boxes) for boxes in ([a, b], [a, a[:0]], [b[:0], b]))
        none = tiny.forward_rois(output, [a[:0], a[:0]])
    assert both.roi_features.shape == (3, 8, 7, 7) and both.box_features.shape == (3, 16) and both.logits.shape == (3,)
    assert none.roi_features.shape == (0, 8, 7, 7) and none.boxes_xyxy.shape == (0, 4)
    for name in ("roi_features", "box_features", "logits", "boxes_xyxy"):
        torch.testing.assert_close(getattr(both, name), torch.cat([getattr(first, name), getattr(second, name)]))


def test_feature_info_names_the_pooled_features(tiny: FasterRCNN) -> None:
    from hkd_det.models.feature_layers import FeatureHooks

    recorder = FeatureHooks(tiny, [layer.name for layer in tiny.feature_info()])
    output = tiny(IMAGES)
    for info, recorded, expected in zip(tiny.feature_info(), recorder.pop(), output.features, strict=True):
        assert torch.equal(recorded, expected)
        assert recorded.shape == (2, info.channels, 64 // info.stride, 96 // info.stride)


def test_prunable_layers_are_in_the_backbone(tiny: FasterRCNN) -> None:
    modules = dict(tiny.named_modules())
    layers = tiny.prunable_layers()
    assert len(layers) == 8
    assert all(modules[layer.consumers[0]].in_channels == modules[layer.conv].out_channels for layer in layers)


@pytest.mark.slow
def test_spec_dict_round_trip(tiny: FasterRCNN) -> None:
    rebuilt = build_from_spec(spec_from_dict(spec_to_dict(TINY)))
    assert rebuilt.spec == TINY
    rebuilt.load_state_dict(tiny.state_dict())


def test_backbone_has_scaled_stages(tiny: FasterRCNN) -> None:
    assert isinstance(tiny.backbone, Backbone) and tiny.backbone.body.conv1.out_channels == 64
    assert tiny.spec.stage_channels == (8, 16, 32, 64)


def test_autocast_keeps_boxes_in_float32(tiny: FasterRCNN) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = tiny.eval()(IMAGES)
        boxes, scores = tiny.predict(IMAGES)
    assert output.anchors_xyxy.dtype == output.box_deltas.dtype == boxes.dtype == scores.dtype == torch.float32
