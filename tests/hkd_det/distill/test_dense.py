"""Dense distillation: losses compared with closed forms, mirrored teachers, and training without labels."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from hkd_det.distill.base import DistillationBatch
from hkd_det.distill.dense import DenseConfig, DenseDistillation, forward_views, merge_double_resolution
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.errors import UsageError
from hkd_det.models.base import BranchOutputs, DenseOutputs, Targets
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.head import make_anchors
from hkd_det.models.yolox import YOLOX, YOLOXSpec
from hkd_det.models.yolox_weights import update_bn_stats

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


def test_difference_weight_multiplies_the_losses_of_each_point() -> None:
    student, teacher = make_yolox(0), make_yolox(1)
    losses = distill(student, teacher, DenseConfig(box=4.0, features=0.0, difference_weight=True))
    with torch.no_grad():
        s, t = student(IMAGES).one2many, teacher(IMAGES).one2many
        a, b = s.logits.double(), t.logits.double()
        p, q = a.sigmoid(), b.sigmoid()
        divergence = q * (F.logsigmoid(b) - F.logsigmoid(a)) + (1 - q) * (F.logsigmoid(-b) - F.logsigmoid(-a))
        giou = generalized_box_iou_loss(s.boxes_xyxy, t.boxes_xyxy)
    total, weight = q.sum().clamp(min=1), (p - q).abs()
    assert float(losses["dense_cls"]) == pytest.approx(float((divergence * weight).sum() / total), rel=1e-3)
    assert float(losses["dense_box"]) == pytest.approx(4 * float((giou * weight)[q > 0.02].sum() / total), rel=1e-3)


class PositionTeacher(nn.Module):
    """A teacher whose scores depend on the relative position and on the left half of the image."""

    def forward(self, images: Tensor) -> DenseOutputs:
        height, width = images.shape[-2:]
        points, strides = make_anchors((height, width), (8, 16, 32))
        x, y = points[:, 0] / width, points[:, 1] / height
        left = images[..., : width // 2].mean() / 255
        boxes = torch.cat([points - strides[:, None], points + 2 * strides[:, None]], 1)
        return DenseOutputs(
            BranchOutputs((x + 2 * y + left)[None], boxes[None]), None, points, strides, (height, width)
        )


def test_mirror_image_is_averaged_at_the_mirrored_anchor_points() -> None:
    teacher, images = PositionTeacher(), torch.zeros(1, 3, 64, 96)
    outputs = teacher(images)
    (average,) = forward_views(teacher, images, outputs, flip=True, double_resolution=False)
    x, y = outputs.anchor_points[:, 0] / 96, outputs.anchor_points[:, 1] / 64
    first, second = (x + 2 * y).sigmoid(), (1 - x + 2 * y).sigmoid()
    torch.testing.assert_close(average.logits[0].sigmoid(), (first + second) / 2)
    # A box reaches 1 stride to the left and 2 to the right; the one of the mirror image, the other way round.
    weight = first / (first + second)
    left = weight * 1 + (1 - weight) * 2
    expected_x1 = outputs.anchor_points[:, 0] - left * outputs.strides
    torch.testing.assert_close(average.boxes_xyxy[0, :, 0], expected_x1)


def test_average_does_not_depend_on_the_side() -> None:
    teacher = make_yolox(1)
    with torch.no_grad():
        first, second = (
            forward_views(teacher, images, teacher(images), flip=True, double_resolution=False)[0].logits
            for images in (IMAGES, IMAGES.flip(3))
        )
    torch.testing.assert_close(first.sort(1).values, second.sort(1).values, atol=1e-4, rtol=1e-4)


def test_flip_teacher_changes_the_targets() -> None:
    plain = distill(make_yolox(0), make_yolox(0), DenseConfig())
    mirrored = distill(make_yolox(0), make_yolox(0), DenseConfig(flip_teacher=True))
    assert float(mirrored["dense_cls"]) > float(plain["dense_cls"]) + 1e-4


@pytest.mark.slow
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
    teacher = PositionTeacher()
    outputs = teacher(IMAGES)
    (merged,) = forward_views(teacher, IMAGES, outputs, flip=False, double_resolution=True)
    torch.testing.assert_close(merged.logits, outputs.one2many.logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(merged.boxes_xyxy, outputs.one2many.boxes_xyxy)


def test_more_confident_resolution_counts() -> None:
    original = PositionTeacher()(IMAGES).one2many
    count = 8 * 12 + 4 * 6  # levels 8 and 16 of a 64x96 image
    logits = original.logits[:, :count] + torch.tensor([1.0, -1.0]).repeat(count // 2)
    merged = merge_double_resolution(original, logits, original.boxes_xyxy[:, :count] + 1)
    torch.testing.assert_close(merged.logits[:, :count:2], original.logits[:, :count:2] + 1)
    torch.testing.assert_close(merged.logits[:, 1:count:2], original.logits[:, 1:count:2])
    torch.testing.assert_close(merged.boxes_xyxy[:, :count:2], original.boxes_xyxy[:, :count:2] + 1)
    torch.testing.assert_close(merged.boxes_xyxy[:, 1:count:2], original.boxes_xyxy[:, 1:count:2])
    assert torch.equal(merged.logits[:, count:], original.logits[:, count:])
