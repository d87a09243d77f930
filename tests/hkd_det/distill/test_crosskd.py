"""CrossKD: losses against closed forms, equal networks, gradients, a second implementation of the head, refusals."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hkd_det.distill import check_teacher
from hkd_det.distill.crosskd import CrossKD, CrossKDConfig, align_statistics, compare_cross_head
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, BranchOutputs, Targets
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.yolox import YOLOX, YOLOXSpec
from hkd_det.models.yolox_weights import update_bn_stats
from hkd_det.ops.losses import clamp_min_one

# At 64x96, a map of stride 32 has so few cells that the estimated statistics of normalizations are far off.
IMAGES = torch.randint(0, 256, (2, 3, 128, 192), generator=torch.Generator().manual_seed(0)).float()
NO_TARGETS = Targets(torch.zeros(2, 0, 4), *torch.zeros(2, 2, 0, dtype=torch.bool))
TINY_BACKBONE = {"channels": (8, 8, 16, 16), "stem_width": 8}


def make_native(channels: int = 16, depth: int = 2, strides: tuple[int, ...] = (8, 16, 32)) -> HKDDetector:
    return HKDDetector(HKDDetectorSpec("resnet10t", TINY_BACKBONE, strides, channels, depth))


def make_faster_rcnn() -> FasterRCNN:
    anchors = (16, 32, 64, 128, 256)
    return FasterRCNN(FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=anchors))


def randomize(detector: BaseDetector, seed: int) -> BaseDetector:
    """Give all points different scores, and boxes of a few strides; initial weights give almost constant maps."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in detector.named_modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.weight.data.normal_(0, 0.05 if "reg_preds" in name else 0.3, generator=generator)
            module.bias.data.normal_(0, 0.5, generator=generator)
    update_bn_stats(detector, [IMAGES])
    return detector.eval()


def make_detector(family: str, is_teacher: bool) -> BaseDetector:
    """Return a narrow student or a wide teacher."""
    torch.manual_seed(0)
    if family == "native":
        detector: BaseDetector = make_native(24, depth=3) if is_teacher else make_native()
    else:
        detector = YOLOX(YOLOXSpec(width=0.25 if is_teacher else 0.125, depthwise=family == "yolox-depthwise"))
    return randomize(detector, int(is_teacher))


FAMILIES = ("native", "yolox-depthwise", "yolox-dense")


def distill(student: BaseDetector, teacher: BaseDetector, config: CrossKDConfig) -> tuple[CrossKD, dict[str, Tensor]]:
    methods: list[Any] = build_methods({"crosskd": config}, student, teacher)
    distiller = Distiller(student, teacher, methods)
    if student is not teacher and config.adapter == "plain":
        for adapter in methods[0].adapters:
            if adapter.projection.weight.shape[0] == adapter.projection.weight.shape[1]:
                nn.init.dirac_(adapter.projection.weight)
                nn.init.zeros_(adapter.projection.bias)
    _, losses = distiller(IMAGES, NO_TARGETS, 1.0)
    distiller.close()
    return methods[0], losses


def test_distribution_losses_match_hand_calculation() -> None:
    """Two points with teacher scores 0.5 and 0.75 and distributions over two bins."""
    teacher = BranchOutputs(
        torch.tensor([[0.0, math.log(3)]]),
        torch.zeros(1, 2, 4),
        torch.tensor([[[[0.0, 0.0]] * 4, [[math.log(3), 0.0]] + [[0.0, 0.0]] * 3]]),
    )
    cross = BranchOutputs(
        torch.tensor([[math.log(3), math.log(3)]]),
        torch.zeros(1, 2, 4),
        torch.tensor([[[[0.0, math.log(3)]] * 4, [[0.0, 0.0]] * 4]]),
    )
    cls_loss, box_loss = compare_cross_head(cross, teacher, clamp_min_one)
    # Point 1: s = 0.75 against t = 0.5. Point 2: equal scores.
    score_kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(cls_loss) == pytest.approx(0.25 * score_kl / 1.25, rel=1e-5)
    # Point 1: (1/2, 1/2) against (1/4, 3/4) at all sides. Point 2: (3/4, 1/4) against (1/2, 1/2) at one of four sides.
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 4
    assert float(box_loss) == pytest.approx((0.5 * first + 0.75 * second) / 1.25, rel=1e-5)


def test_box_loss_without_distributions_is_giou() -> None:
    """Boxes of 2x2 next to each other: IoU 0 and no empty area, so GIoU 0; half overlap: IoU 1/3 and GIoU 1/3."""
    logits = torch.tensor([[0.0, math.log(3)]])
    teacher = BranchOutputs(logits, torch.tensor([[[0.0, 0, 2, 2], [0, 0, 2, 2]]]))
    cross = BranchOutputs(logits, torch.tensor([[[2.0, 0, 4, 2], [1, 0, 3, 2]]]))
    cls_loss, box_loss = compare_cross_head(cross, teacher, clamp_min_one)
    assert float(cls_loss) == 0
    assert float(box_loss) == pytest.approx((0.5 * 1 + 0.75 * (1 - 1 / 3)) / 1.25, rel=1e-5)


def test_alignment_matches_the_published_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 5, 4, 6, generator=generator) * 3 + 1
    aligned = align_statistics(student, teacher)
    for channel in range(5):
        s, t = student[:, channel], teacher[:, channel]
        torch.testing.assert_close(aligned[:, channel], (s - s.mean()) / (s.std() + 1e-6) * t.std() + t.mean())


def test_alignment_of_a_constant_channel_has_finite_gradients() -> None:
    student = torch.full((1, 2, 1, 1), 3.0, requires_grad=True)
    align_statistics(student, torch.ones(1, 2, 1, 1)).sum().backward()
    assert student.grad is not None and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_networks_with_identity_adapters_have_no_loss(family: str, align: bool) -> None:
    student = make_detector(family, is_teacher=False)
    teacher = deepcopy(student)
    _, losses = distill(student, teacher, CrossKDConfig(align=align))
    assert losses.keys() == {"crosskd_cls", "crosskd_box"}
    assert abs(losses["crosskd_cls"].item()) < 1e-6
    assert abs(losses["crosskd_box"].item()) < 1e-4  # GIoU of equal boxes is not exactly 1 in float32
    norms: Any = [student.get_submodule(level.box[0].name) for level in student.tower_layers()]
    for norm in norms:
        norm.bias.data += torch.linspace(-1, 1, len(norm.bias))
        norm.weight.data *= torch.linspace(0.5, 2, len(norm.weight))
    _, losses = distill(student, teacher, CrossKDConfig(align=align))
    # The alignment removes a change of scale and offset.
    assert losses["crosskd_box"].item() < 1e-4 if align else losses["crosskd_box"].item() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_student_features_only(family: str) -> None:
    """Predictors and later convolutions of the student have no gradient: they learn from labels only."""
    student, teacher = make_detector(family, is_teacher=False), make_detector(family, is_teacher=True)
    method, losses = distill(student.train(), teacher, CrossKDConfig())
    (losses["crosskd_cls"] + losses["crosskd_box"]).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())
    with_gradient = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for level in student.tower_layers():
        for tower in (level.cls, level.box):
            assert f"{tower[0].name}.weight" in with_gradient and f"{tower[1].name}.weight" not in with_gradient
    assert any(name.startswith("backbone.") for name in with_gradient)
    assert not any("pred" in name or "one2" in name or "box_logits" in name for name in with_gradient)


def test_losses_equal_a_second_implementation_of_the_head() -> None:
    """Two convolutions of the student, the third one of the teacher, and its predictors, written out."""
    torch.manual_seed(0)
    student, teacher = randomize(make_native(depth=2), 1), randomize(make_native(24, depth=3), 2)
    config = CrossKDConfig(cls=2.0, box=3.0, num_convs=2, align=False)
    method, losses = distill(student, teacher, config)
    s_head: Any = student.head
    t_head: Any = teacher.head
    adapters = iter(method.adapters)
    logits, box_logits = [], []
    with torch.no_grad():
        for level, neck in enumerate(student.forward_features(IMAGES)):  # type: ignore[operator]
            outputs = []
            for tower in ("cls_tower", "reg_tower"):
                s, t, features = getattr(s_head, tower), getattr(t_head, tower), neck
                features = s.norms[level][0](s.convs[0](features)).relu()
                features = next(adapters)(s.norms[level][1](s.convs[1](features))).relu()
                outputs.append(t.norms[level][2](t.convs[2](features)).relu())
            logits.append(t_head.one2many(outputs[0]).flatten(1))
            box_logits.append(t_head.box_logits(outputs[1]).flatten(2).transpose(1, 2).unflatten(2, (4, 16)))
        z, bins = torch.cat(logits, 1), torch.cat(box_logits, 1)
        target = teacher(IMAGES).one2many
        t_score, s_score = target.logits.double().sigmoid(), z.double().sigmoid()
        kl = t_score * (t_score / s_score).log() + (1 - t_score) * ((1 - t_score) / (1 - s_score)).log()
        p, q = target.box_logits.double().softmax(-1), bins.double().softmax(-1)
        box = (p * (p / q).log()).sum(-1).mean(-1)
    total = t_score.sum().clamp(min=1)
    cls_loss, box_loss = losses["crosskd_cls"].item(), losses["crosskd_box"].item()
    assert cls_loss == pytest.approx(2 * float(((t_score - s_score).abs() * kl).sum() / total), rel=1e-4)
    assert box_loss == pytest.approx(3 * float((t_score * box).sum() / total), rel=1e-4)


def test_student_and_teacher_of_two_families_train() -> None:
    student = make_detector("native", is_teacher=False)
    teacher = make_detector("yolox-depthwise", is_teacher=True)
    _, losses = distill(student.train(), teacher, CrossKDConfig())
    (losses["crosskd_cls"] + losses["crosskd_box"]).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_teacher_without_towers_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--distill crosskd: requires towers of the teacher.*native.*soft_labels\.$"):
        build_methods({"crosskd": CrossKDConfig()}, make_native(), make_faster_rcnn())
    with pytest.raises(UsageError, match=r"^--distill crosskd: requires features, logits, towers"):
        check_teacher({"crosskd": CrossKDConfig()}, frozenset({"detections"}), "teacher.onnx")


@pytest.mark.parametrize(
    ("student", "teacher", "config", "message"),
    [
        (make_faster_rcnn, make_native, {}, "requires a student with head towers, and FasterRCNN has none"),
        (make_native, lambda: make_native(depth=1), {}, "at least 2 convolutions per head tower, got 1"),
        (lambda: make_native(strides=(16, 32)), make_native, {}, r"strides \[16, 32\] and the teacher \[8, 16, 32\]"),
        (make_native, make_native, {"num_convs": 2}, r"num_convs: expected 1 to 1 .* got 2\.$"),
        (lambda: make_native(depth=1), lambda: make_native(depth=4), {"num_convs": 2}, r"expected 1 to 1 .* got 2\.$"),
    ],
)
def test_unsuitable_pairs_are_refused(student: Any, teacher: Any, config: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build_methods({"crosskd": CrossKDConfig(**config)}, student(), teacher())
    assert "\n" not in str(caught.value)


def test_invalid_settings_are_refused() -> None:
    for name, value in (("cls", -1), ("box", -1), ("giou", -1), ("num_convs", 0)):
        with pytest.raises(UsageError, match=rf"distill\.crosskd\.{name}"):
            CrossKDConfig(**{name: value})
