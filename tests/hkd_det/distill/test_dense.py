"""Dense distillation: losses compared with closed forms, mirrored teachers, and training without labels."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from hkd_det.distill.base import DistillationBatch
from hkd_det.distill.dense import (
    DenseConfig,
    DenseDistillation,
    average_branches,
    forward_doubled,
    forward_mirrored,
    merge_double_resolution,
)
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.errors import UsageError
from hkd_det.models.base import BranchOutputs, DenseOutputs, Targets
from hkd_det.models.batch_norm import update_bn_stats
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.head import make_anchors
from hkd_det.models.yolox import YOLOX, YOLOXSpec

SPEC = YOLOXSpec(depth=0.33, width=0.125)
IMAGES = torch.randint(0, 256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0)).float()
NO_TARGETS = Targets(torch.zeros(2, 0, 4), *torch.zeros(2, 2, 0, dtype=torch.bool))


def make_yolox(seed: int, spec: YOLOXSpec = SPEC) -> YOLOX:
    torch.manual_seed(seed)
    detector = YOLOX(spec)
    for conv in (*detector.head.cls_preds, *detector.head.obj_preds, *detector.head.reg_preds):
        nn.init.normal_(conv.weight, std=0.3)
        nn.init.normal_(conv.bias, std=0.5)
    update_bn_stats(detector, [IMAGES])  # otherwise the features of random weights nearly vanish
    return detector.eval()


def distill(student: YOLOX, teacher: YOLOX, config: DenseConfig) -> dict[str, Tensor]:
    distiller = Distiller(student, teacher, build_methods({"dense": config}, student, teacher))
    det_losses, losses = distiller(IMAGES, NO_TARGETS, 1.0)
    distiller.close()
    assert det_losses == {}
    return {name: loss.detach() for name, loss in losses.items()}


def test_equal_networks_have_no_loss() -> None:
    losses = distill(make_yolox(0), make_yolox(0), DenseConfig())
    assert losses.keys() == {"dense_cls", "dense_box", "dense_features"}
    for loss in losses.values():
        assert abs(loss.item()) < 1e-2  # GIoU of equal boxes is not exactly 1 in float32


def test_losses_equal_their_definitions() -> None:
    student, teacher = make_yolox(0), make_yolox(1)
    losses = distill(student, teacher, DenseConfig(cls=2.0, box=3.0, features=0.5))
    with torch.no_grad():
        s, t = student(IMAGES).one2many, teacher(IMAGES).one2many
        q = t.logits.sigmoid()
        divergence = F.kl_div(F.logsigmoid(s.logits), F.logsigmoid(t.logits), log_target=True, reduction="none")
        divergence += F.kl_div(F.logsigmoid(-s.logits), F.logsigmoid(-t.logits), log_target=True, reduction="none")
        giou = generalized_box_iou_loss(s.boxes_xyxy, t.boxes_xyxy)
        features = sum(
            ((a - b).square().mean((0, 2, 3)) / (b.var((0, 2, 3)) + 1e-3)).mean()
            for a, b in zip(student.forward_features(IMAGES), teacher.forward_features(IMAGES), strict=True)
        )
    total = q.sum().clamp(min=1)
    assert float(losses["dense_cls"]) == pytest.approx(2 * float(divergence.sum() / total), rel=1e-3)
    assert float(losses["dense_box"]) == pytest.approx(3 * float((giou * q)[q > 0.02].sum() / total), rel=1e-3)
    assert float(losses["dense_features"]) == pytest.approx(0.5 * float(features), rel=1e-3)


def test_mirrored_outputs_of_a_mirrored_image_are_the_original_ones() -> None:
    teacher = make_yolox(1)
    with torch.no_grad():
        direct = teacher(IMAGES).one2many
        (mirrored,) = forward_mirrored(teacher, IMAGES.flip(3))
    # The network sees IMAGES in both cases; only the mapping of points and boxes is applied to the second result.
    width = IMAGES.shape[3]
    x1, y1, x2, y2 = mirrored.boxes_xyxy.unbind(-1)
    best = direct.logits.argmax(1)
    center = (direct.boxes_xyxy[:, :, 0] + direct.boxes_xyxy[:, :, 2]).gather(1, best[:, None]) / 2
    found = mirrored.logits.argmax(1)
    assert torch.equal(mirrored.logits.amax(1), direct.logits.amax(1))
    torch.testing.assert_close((x1 + x2).gather(1, found[:, None]) / 2, width - center)
    torch.testing.assert_close(
        torch.sort(y2 - y1, 1).values, torch.sort((direct.boxes_xyxy[..., 3] - direct.boxes_xyxy[..., 1]), 1).values
    )


def test_average_of_mirrored_outputs_does_not_depend_on_the_side() -> None:
    teacher = make_yolox(1)
    with torch.no_grad():
        (back,) = forward_mirrored(teacher, IMAGES)
        average = average_branches(teacher(IMAGES).one2many, back)
        (back_flipped,) = forward_mirrored(teacher, IMAGES.flip(3))
        average_flipped = average_branches(teacher(IMAGES.flip(3)).one2many, back_flipped)
    torch.testing.assert_close(
        average.logits.sort(1).values, average_flipped.logits.sort(1).values, atol=1e-4, rtol=1e-4
    )


def test_flip_teacher_changes_the_targets() -> None:
    plain = distill(make_yolox(0), make_yolox(0), DenseConfig())
    mirrored = distill(make_yolox(0), make_yolox(0), DenseConfig(flip_teacher=True))
    assert float(mirrored["dense_cls"]) > float(plain["dense_cls"]) + 1e-4


def test_other_channels_need_an_adapter() -> None:
    narrow = replace(SPEC, width=0.0625)
    with pytest.raises(UsageError, match=r"adapter: none requires equal channels.*adapter=plain"):
        DenseDistillation(DenseConfig(), make_yolox(0, narrow), make_yolox(1))
    losses = distill(make_yolox(0, narrow), make_yolox(1), DenseConfig(adapter="plain"))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_different_anchor_points_are_reported() -> None:
    student = build_from_spec(
        HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, (8, 16), 16, 1)
    )
    teacher = make_yolox(1)
    method = DenseDistillation(DenseConfig(features=0.0), student, teacher)
    with torch.no_grad():
        batch = DistillationBatch(
            IMAGES, NO_TARGETS, student, teacher, student(IMAGES), teacher(IMAGES), {}, {}, lambda x: x
        )
    with pytest.raises(UsageError, match="different anchor points"):
        method(batch)


def test_labels_count_if_their_weight_is_above_0() -> None:
    student, teacher = make_yolox(0), make_yolox(1)
    targets = Targets(
        torch.tensor([[[10.0, 5, 34, 60]]] * 2), torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.bool)
    )
    distiller = Distiller(
        student, teacher, build_methods({"dense": DenseConfig(det_loss_weight=0.5)}, student, teacher)
    )
    det_losses, _ = distiller(IMAGES, targets, 1.0)
    full = student.loss(student(IMAGES), targets)
    distiller.close()
    for name, loss in full.items():
        assert det_losses[name].item() == pytest.approx(0.5 * loss.item(), rel=1e-4)


def test_double_resolution_has_the_anchor_points_of_the_student() -> None:
    """A teacher whose score is a function of the position gives the same scores at both resolutions."""

    class PositionTeacher(nn.Module):
        def forward(self, images: Tensor) -> DenseOutputs:
            points, strides = make_anchors((images.shape[-2], images.shape[-1]), (8, 16, 32))
            relative = points / torch.tensor([images.shape[-1], images.shape[-2]])
            boxes = torch.cat([points - strides[:, None], points + strides[:, None]], 1)
            branch = BranchOutputs(relative.sum(1)[None], boxes[None])
            return DenseOutputs(branch, None, points, strides, (images.shape[-2], images.shape[-1]))

    teacher = PositionTeacher()
    original = teacher(IMAGES).one2many
    (doubled,) = forward_doubled(teacher, IMAGES)
    count = doubled.logits.shape[1]
    assert count == 8 * 12 + 4 * 6  # levels 8 and 16 of a 64x96 image
    torch.testing.assert_close(doubled.logits, original.logits[:, :count])
    torch.testing.assert_close(doubled.boxes_xyxy, original.boxes_xyxy[:, :count])
    better = replace(doubled, logits=doubled.logits + torch.tensor([1.0, -1.0]).repeat(count // 2))
    merged = merge_double_resolution(original, replace(better, boxes_xyxy=better.boxes_xyxy + 1))
    torch.testing.assert_close(merged.logits[:, :count:2], original.logits[:, :count:2] + 1)
    torch.testing.assert_close(merged.logits[:, 1:count:2], original.logits[:, 1:count:2])
    torch.testing.assert_close(merged.boxes_xyxy[:, :count:2], original.boxes_xyxy[:, :count:2] + 1)
    assert torch.equal(merged.logits[:, count:], original.logits[:, count:])
