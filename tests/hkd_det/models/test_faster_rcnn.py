"""Faster R-CNN: the same answers and losses as torchvision's own, with ignore regions left alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import box_iou

from hkd_det.models.backbone import Backbone
from hkd_det.models.base import Targets
from hkd_det.models.checkpoint import build_from_spec, spec_from_dict, spec_to_dict
from hkd_det.models.faster_rcnn import (
    FasterRCNN,
    FasterRCNNSpec,
)
from hkd_det.models.faster_rcnn_loss import IGNORE_LABEL, mark_ignored_anchors
from hkd_det.ops.boxes import pairwise_intersection

TINY = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256))
PICTURES = torch.randint(0, 255, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def truth(people: list[list[float]], ignored: list[list[float]] = []) -> Targets:  # noqa: B006 - never changed
    """The same people and ignore regions in both pictures."""
    boxes = torch.tensor([[*people, *ignored]] * 2, dtype=torch.float32).view(2, -1, 4)
    ignore = (torch.arange(boxes.shape[1]) >= len(people)).expand(2, -1)
    return Targets(boxes, ~ignore, ignore)


TWO = truth([[10.0, 5.0, 30.0, 60.0], [50.0, 10.0, 70.0, 50.0]])


def sample_everything(model: Any) -> None:
    """Leave nothing to chance: no anchor and no proposal that could be sampled is left out."""
    model.rpn.fg_bg_sampler.batch_size_per_image = model.roi_heads.fg_bg_sampler.batch_size_per_image = 10**6


@pytest.fixture
def tiny() -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(TINY)


@pytest.fixture(scope="module")
def twins() -> tuple[FasterRCNN, TorchvisionFasterRCNN]:
    """Ours, and torchvision's with the very same weights, neither told what it sees."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5
    )
    theirs = TorchvisionFasterRCNN(
        backbone, num_classes=2, min_size=64, max_size=96, box_score_thresh=0.0, box_detections_per_img=50,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    for parameter in theirs.roi_heads.box_predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = FasterRCNN(FasterRCNNSpec("resnet18"))
    ours.load_state_dict(theirs.state_dict())  # the same names and shapes, all of them
    return ours, theirs


def test_it_finds_what_torchvisions_own_finds(twins: tuple[FasterRCNN, TorchvisionFasterRCNN]) -> None:
    ours, theirs = (model.eval() for model in twins)
    with torch.no_grad():
        wanted = theirs(list(PICTURES.float() / 255))
        boxes, scores = ours.predict(PICTURES, max_det=50)
    for b, one in enumerate(wanted):
        count = len(one["scores"])
        assert count > 5
        torch.testing.assert_close(scores[b, :count], one["scores"], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(boxes[b, :count], one["boxes"], atol=2e-2, rtol=1e-3)
        assert not scores[b, count:].any() and not boxes[b, count:].any()


def test_its_losses_are_torchvisions_own(twins: tuple[FasterRCNN, TorchvisionFasterRCNN]) -> None:
    ours, theirs = (model.train() for model in twins)
    targets = [{"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64)} for boxes in TWO.boxes_xyxy]
    sample_everything(ours)
    sample_everything(theirs)
    wanted = theirs(list(PICTURES.float() / 255), targets)
    terms = ours.loss(ours(PICTURES), TWO)
    for mine, other in {
        "rpn_cls": "loss_objectness", "rpn_box": "loss_rpn_box_reg",
        "cls": "loss_classifier", "box": "loss_box_reg",
    }.items():  # fmt: skip
        assert terms[mine] > 0
        torch.testing.assert_close(terms[mine], wanted[other], atol=1e-4, rtol=1e-3)


def test_every_term_has_a_gradient_and_all_weights_learn(tiny: FasterRCNN) -> None:
    terms = tiny.train().loss(tiny(PICTURES), TWO)
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert all(p.grad.abs().sum() > 0 for p in (tiny.rpn.head.bbox_pred.weight, tiny.roi_heads.box_head.fc7.weight))


@pytest.mark.parametrize(
    "nobody", [truth([]), truth([], [[0.0, 0.0, 96.0, 64.0]]), truth([[5.0, 5.0, 5.0, 40.0]])],
    ids=["empty", "all ignored", "no area"],
)  # fmt: skip
def test_pictures_with_nobody_in_them_have_finite_losses(tiny: FasterRCNN, nobody: Targets) -> None:
    terms = tiny.train().loss(tiny(PICTURES), nobody)
    torch.stack(list(terms.values())).sum().backward()
    assert terms["box"] == 0 and terms["rpn_box"] == 0
    assert all(torch.isfinite(p.grad).all() for p in tiny.parameters() if p.grad is not None)


def test_what_is_said_inside_an_ignore_region_has_no_influence_on_the_first_stage(tiny: FasterRCNN) -> None:
    region = [40.0, 0.0, 96.0, 64.0]
    watched = truth([[10.0, 5.0, 30.0, 60.0]], [region])
    sample_everything(tiny)
    output = tiny.train()(PICTURES)
    objectness = output.objectness.detach().requires_grad_()
    tiny.loss(replace(output, objectness=objectness), watched)["rpn_cls"].backward()
    seen = output.anchors_xyxy.clamp(min=torch.zeros(4), max=torch.tensor([96.0, 64.0, 96.0, 64.0]))
    area = (seen[:, 2:] - seen[:, :2]).prod(-1)  # of the part inside the picture
    inside = pairwise_intersection(seen, torch.tensor([region]))[:, 0] >= 0.5 * area
    apart = box_iou(output.anchors_xyxy, torch.tensor([[10.0, 5.0, 30.0, 60.0]]))[:, 0] == 0
    assert (inside & apart).sum() > 50 and not objectness.grad[:, inside & apart].any()
    assert objectness.grad[:, ~inside & apart].all()
    objectness.grad = None
    tiny.loss(replace(output, objectness=objectness), truth([[10.0, 5.0, 30.0, 60.0]]))["rpn_cls"].backward()
    assert objectness.grad[:, inside & apart].all()  # without the region they count


def test_proposals_inside_an_ignore_region_have_no_influence_on_the_second_stage(tiny: FasterRCNN) -> None:
    output = tiny.train()(PICTURES)
    person, region = [10.0, 5.0, 30.0, 60.0], [40.0, 0.0, 96.0, 64.0]
    calm = torch.tensor([[0.0, 0.0, 35.0, 64.0], [12.0, 6.0, 30.0, 58.0]])
    restless = torch.tensor([[45.0, 5.0, 60.0, 50.0], [70.0, 20.0, 90.0, 64.0]])
    watched = truth([person], [region])
    alone = tiny.loss(replace(output, proposals=(calm, calm)), watched)
    more = torch.cat([calm, restless])
    torch.testing.assert_close(tiny.loss(replace(output, proposals=(more, more)), watched)["cls"], alone["cls"])
    assert tiny.loss(replace(output, proposals=(more, more)), truth([person]))["cls"] != alone["cls"]


corner = st.integers(0, 40)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(corner, corner, corner, corner), min_size=1, max_size=6), st.integers(0, 2))
def test_only_background_mostly_inside_is_discarded(corners: list[tuple[int, int, int, int]], label: int) -> None:
    """Against counting pixels."""
    boxes = [(min(a, c), min(b, d), max(a, c) + 1, max(b, d) + 1) for a, b, c, d in corners]
    region = (10, 10, 31, 35)
    labels = torch.full((len(boxes),), label)
    told = mark_ignored_anchors(labels, torch.tensor(boxes).float(), torch.tensor([region]).float())
    for (x1, y1, x2, y2), one in zip(boxes, told.tolist(), strict=True):
        inside = sum(10 <= x < 31 and 10 <= y < 35 for x in range(x1, x2) for y in range(y1, y2))
        mostly = 2 * inside >= (x2 - x1) * (y2 - y1)
        assert one == (IGNORE_LABEL if mostly and label == 0 else label)


def test_padding_is_neither_person_nor_ignored() -> None:
    batch = Targets(torch.tensor([[[0.0, 0, 9, 9], [0, 0, 5, 5]]]), torch.tensor([[True, False]]),
                       torch.tensor([[False, False]]))  # fmt: skip
    (people,), (ignored,) = batch.split_ignored()
    assert people.tolist() == [[0, 0, 9, 9]] and ignored.shape == (0, 4)


def test_regions_are_judged_one_by_one(tiny: FasterRCNN) -> None:
    """What is said of a region does not hang on its company, and not on its picture's place in the batch."""
    tiny.eval()
    with torch.no_grad():
        output = tiny(PICTURES)
        a, b = torch.tensor([[3.0, 4.0, 40.0, 60.0]]), torch.tensor([[20.0, 2.0, 90.0, 50.0], [0.0, 0.0, 9.0, 9.0]])
        both, first, second = (tiny.forward_rois(output, boxes) for boxes in ([a, b], [a, a[:0]], [b[:0], b]))
        none = tiny.forward_rois(output, [a[:0], a[:0]])
    assert both.roi_features.shape == (3, 8, 7, 7) and both.box_features.shape == (3, 16) and both.logits.shape == (3,)
    assert none.roi_features.shape == (0, 8, 7, 7) and none.boxes_xyxy.shape == (0, 4)
    for name in ("roi_features", "box_features", "logits", "boxes_xyxy"):
        torch.testing.assert_close(getattr(both, name), torch.cat([getattr(first, name), getattr(second, name)]))


def test_taps_are_the_maps_regions_are_read_from(tiny: FasterRCNN) -> None:
    from hkd_det.ops.hooks import FeatureHooks

    recorder = FeatureHooks(tiny, [layer.name for layer in tiny.feature_info()])
    output = tiny(PICTURES)
    for tap, mine, other in zip(tiny.feature_info(), recorder.pop(), output.features, strict=True):
        assert torch.equal(mine, other) and mine.shape == (2, tap.channels, 64 // tap.stride, 96 // tap.stride)


def test_inner_layers_are_the_backbones(tiny: FasterRCNN) -> None:
    names = dict(tiny.named_modules())
    inner = tiny.prunable_layers()
    assert len(inner) == 8 and all(names[one.consumers[0]].in_channels == names[one.conv].out_channels for one in inner)


def test_a_spec_survives_its_plain_form(tiny: FasterRCNN) -> None:
    again = build_from_spec(spec_from_dict(spec_to_dict(TINY)))
    assert again.spec == TINY
    again.load_state_dict(tiny.state_dict())


def test_its_backbone_takes_pretrained_weights(tiny: FasterRCNN) -> None:
    assert isinstance(tiny.backbone, Backbone) and tiny.backbone.body.conv1.out_channels == 64
    assert tiny.spec.stage_channels == (8, 16, 32, 64)


def test_in_bfloat16_boxes_keep_their_precision(tiny: FasterRCNN) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = tiny.eval()(PICTURES)
        boxes, scores = tiny.predict(PICTURES)
    assert output.anchors_xyxy.dtype == output.box_deltas.dtype == boxes.dtype == scores.dtype == torch.float32
