"""Soft labels: loss values, gradients, training, and the soft labels inside HKD."""

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from hkd_det.distill import parse_methods
from hkd_det.distill.batch import DistillationBatch
from hkd_det.distill.dense import SoftLabelConfig
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.distill.hkd import HKDConfig
from hkd_det.distill.noisy_teacher import NoisyTeacher, NoisyTeacherConfig
from hkd_det.models import criterion
from hkd_det.models.base import BaseDetector, BranchOutputs, DenseOutputs, DetectionBatch, Targets
from hkd_det.models.criterion import MIN_TEACHER_SCORE, AssignResult
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.faster_rcnn_ops import roi_soft_label_losses
from hkd_det.models.head import dist2bbox, make_anchors
from hkd_det.models.ultralytics import UltralyticsDetector, UltralyticsSpec, make_ultralytics_spec
from hkd_det.ops.losses import clamp_min_one, quality_focal_kd_loss

HW = (64, 96)
TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
TWO_STAGE = FasterRCNNSpec(
    "resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256)
)  # fmt: skip
BOX = [20.0, 4.0, 44.0, 60.0]
IMAGES = torch.randint(0, 255, (2, 3, *HW), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def make_distiller(student: BaseDetector, teacher: Any, methods: dict[str, Any]) -> Distiller:
    return Distiller(student, teacher, build_methods(parse_methods(methods), student, teacher))


def make_unlabeled_targets(count: int = 1) -> Targets:
    """Return the targets of unlabeled images: one ignore region that covers the image."""
    region = torch.tensor([[[0.0, 0.0, HW[1], HW[0]]]]).expand(count, -1, -1)
    return Targets(region, torch.zeros(count, 1, dtype=torch.bool), torch.ones(count, 1, dtype=torch.bool))


def make_person(*box: float) -> Targets:
    return Targets(torch.tensor([[box]]), torch.tensor([[True]]), torch.tensor([[False]]))


def make_detections(*items: tuple[list[float], float], count: int = 1) -> DetectionBatch:
    """Return the same (box, score) pairs for `count` images."""
    boxes = torch.tensor([box for box, _ in items]).view(-1, 4)
    return DetectionBatch((boxes,) * count, (torch.tensor([score for _, score in items]),) * count)


def make_outputs(logits: Tensor, boxes: Tensor, box_logits: Tensor | None = None) -> DenseOutputs:
    points, strides = make_anchors(HW, (8, 16, 32))
    return DenseOutputs(BranchOutputs(logits, boxes, box_logits), None, points, strides, HW)


def make_constant_outputs(box: list[float], score: float) -> DenseOutputs:
    """Return outputs with the same box and score at each of the 126 anchor points."""
    logit = math.log(score / (1 - score))
    return make_outputs(torch.full((1, 126), logit), torch.tensor(box).expand(1, 126, 4))


def compute_bernoulli_kl(p: float, t: float) -> float:
    return sum(a * math.log(a / b) for a, b in ((t, p), (1 - t, 1 - p)) if a > 0)


def test_dense_targets_are_teacher_score_at_ten_points() -> None:
    """All predicted boxes equal the teacher box, so ten points (top-k) have the target 1 * 0.6."""
    whole = [-1.0, -1.0, 97.0, 65.0]
    score, box = criterion.dense_soft_label_losses(
        make_constant_outputs(whole, 0.3), make_detections((whole, 0.6)), make_unlabeled_targets(), clamp_min_one
    )
    assigned, background = 0.3 * compute_bernoulli_kl(0.3, 0.6), 0.3 * compute_bernoulli_kl(0.3, 1e-4)
    assert score.item() == pytest.approx((10 * assigned + 116 * background) / (10 * 0.6), rel=1e-3)
    assert box.item() == pytest.approx(0, abs=1e-6)


def test_background_weight_scales_background_loss() -> None:
    whole = [-1.0, -1.0, 97.0, 65.0]
    full, half, none = (
        criterion.dense_soft_label_losses(
            make_constant_outputs(whole, 0.3),
            make_detections((whole, 0.6)),
            make_unlabeled_targets(),
            clamp_min_one,
            background_weight,
        )[0].item()
        for background_weight in (1.0, 0.5, 0.0)
    )
    assert none == pytest.approx(10 * 0.3 * compute_bernoulli_kl(0.3, 0.6) / 6, rel=1e-3)
    assert half == pytest.approx((full + none) / 2)


def test_missed_person_is_not_background() -> None:
    """Points inside a ground-truth box that the teacher misses have no loss; all other points are background."""
    prediction = make_constant_outputs(BOX, 0.3)
    logits = prediction.one2many.logits.clone().requires_grad_()
    output = replace(prediction, one2many=replace(prediction.one2many, logits=logits))
    criterion.dense_soft_label_losses(output, make_detections(), make_person(*BOX), clamp_min_one)[0].backward()
    x, y = prediction.anchor_points.unbind(-1)
    inside = (x > BOX[0]) & (x < BOX[2]) & (y > BOX[1]) & (y < BOX[3])
    assert inside.sum() > 10 and not logits.grad[0, inside].any() and (logits.grad[0, ~inside] > 0).all()


def test_box_loss_is_giou_weighted_by_target() -> None:
    """The student box is the upper half of the teacher box: IoU and GIoU are 0.5 at the ten assigned points."""
    whole, half = [-1.0, -1.0, 97.0, 65.0], [-1.0, -1.0, 97.0, 32.0]
    _, box = criterion.dense_soft_label_losses(
        make_constant_outputs(half, 0.3), make_detections((whole, 0.8)), make_unlabeled_targets(), clamp_min_one
    )
    weight = 10 * 0.5 * 0.8
    assert box.item() == pytest.approx(weight * 0.5 / max(weight, 1.0), rel=1e-4)


def test_box_below_min_score_is_ignored() -> None:
    prediction = make_constant_outputs(BOX, 0.3)
    none = criterion.dense_soft_label_losses(prediction, make_detections(), make_unlabeled_targets(), clamp_min_one)
    weak = criterion.dense_soft_label_losses(
        prediction, make_detections((BOX, MIN_TEACHER_SCORE - 1e-3)), make_unlabeled_targets(), clamp_min_one
    )
    assert none[0] == weak[0] and none[1] == weak[1] == 0


def test_soft_label_gradients_match_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The assignment is kept constant. The box gradient equals finite differences, the score gradient its formula."""
    rng = torch.Generator().manual_seed(1)
    logits = (torch.randn(1, 126, generator=rng, dtype=torch.double) - 1).requires_grad_()
    box_logits = torch.randn(1, 126, 4, 8, generator=rng, dtype=torch.double).requires_grad_()
    points, strides = make_anchors(HW, (8, 16, 32))
    detections = make_detections((BOX, 0.7), ([60.0, 10.0, 80.0, 60.0], 0.4))

    def compute_losses(values: Tensor) -> tuple[Tensor, Tensor]:
        boxes = dist2bbox(values, points, strides)
        return criterion.dense_soft_label_losses(
            make_outputs(logits, boxes, values), detections, make_unlabeled_targets(), clamp_min_one
        )

    assignments: list[AssignResult] = []
    assign = criterion.assign_soft_targets

    def assign_once(*args: Any) -> AssignResult:
        assignments.append(assign(*args))
        return assignments[0]

    monkeypatch.setattr(criterion, "assign_soft_targets", assign_once)
    score, box = compute_losses(box_logits)
    (score_grad,) = torch.autograd.grad(score, logits, retain_graph=True)
    s, t = logits.detach().sigmoid(), assignments[0].target_scores.double().clamp(1e-4)
    avg_factor = assignments[0].target_scores.sum().clamp(min=1)
    torch.testing.assert_close(score_grad, (s - t).abs() * (s - t) / avg_factor, atol=1e-7, rtol=1e-4)
    (box_grad,) = torch.autograd.grad(box, box_logits)
    assert box_grad.abs().sum() > 0.01
    for seed in range(3):
        direction = torch.randn(box_logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        with torch.no_grad():
            slope = compute_losses(box_logits + 1e-5 * direction)[1] - compute_losses(box_logits - 1e-5 * direction)[1]
        torch.testing.assert_close(slope / 2e-5, (box_grad * direction).sum(), atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ours", "yolo", "faster-rcnn"])
def test_training_on_soft_labels_reaches_teacher_boxes(family: str) -> None:
    torch.manual_seed(0)
    detector = make_detector(family)
    detections = make_detections((BOX, 0.9), ([60.0, 10.0, 84.0, 62.0], 0.5), count=2)
    distiller = make_distiller(detector, ConstantTeacher(detections), {"soft_labels": SoftLabelConfig()})
    optimizer = torch.optim.Adam(detector.parameters(), lr=5e-3)
    detector.train()
    for _ in range(60):
        losses = distiller(IMAGES, make_unlabeled_targets(2), 1.0)[1]
        assert losses.keys() == {"soft_cls", "soft_box"}
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        output = detector(IMAGES)
        if isinstance(detector, FasterRCNN):
            output = replace(
                output, proposals=tuple(box + torch.tensor([2.0, 1.0, -1.0, 2.0]) for box in detections.boxes_xyxy)
            )
        predictions = detector.postprocess(output)
    for boxes, scores in zip(predictions.boxes_xyxy, predictions.scores, strict=True):
        overlap = box_iou(detections.boxes_xyxy[0], boxes[:2])
        assert overlap.max(1).values.min() > 0.8, (boxes[:3], scores[:3])
        assert scores[overlap.argmax(1)].tolist() == pytest.approx([0.9, 0.5], abs=0.15)
        assert (scores[2:] < 0.3).all()


def test_roi_losses_match_their_formulas() -> None:
    torch.manual_seed(0)
    student = FasterRCNN(TWO_STAGE).eval()
    detections = make_detections((BOX, 0.9), ([60.0, 2.0, 80.0, 50.0], 0.2))
    with torch.no_grad():
        output = replace(student(IMAGES[:1]), proposals=(torch.tensor([[0.0, 0.0, 4.0, 4.0]]),))  # far from both boxes
        score, box = roi_soft_label_losses(student, output, detections, clamp_min_one)
        roi_outputs = student.forward_rois(output, detections.boxes_xyxy)
    target, weights = torch.distributions.Bernoulli(probs=detections.scores[0]), detections.scores[0]
    divergence = torch.distributions.kl_divergence(target, torch.distributions.Bernoulli(logits=roi_outputs.logits))
    torch.testing.assert_close(score, divergence.mean(), rtol=1e-4, atol=1e-6)
    giou_loss = 1 - generalized_box_iou(roi_outputs.boxes_xyxy, detections.boxes_xyxy[0]).diagonal()
    torch.testing.assert_close(box, (weights * giou_loss).sum() / weights.sum(), rtol=1e-4, atol=1e-6)


def record_outputs(model: BaseDetector) -> list[DenseOutputs]:
    """Return a list that receives the outputs of each forward pass."""
    outputs: list[DenseOutputs] = []
    model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs


class ConstantTeacher(torch.nn.Module):
    """A teacher that always returns the same detections."""

    capabilities = frozenset({"detections"})

    def __init__(self, detections: DetectionBatch) -> None:
        super().__init__()
        self.detections = detections

    def forward(self, _images: Tensor) -> DetectionBatch:
        return self.detections

    def postprocess(self, output: DetectionBatch, max_det: int = 100) -> DetectionBatch:
        assert max_det >= 2
        return output

    def feature_info(self) -> list[object]:
        return []


def make_detector(family: str) -> BaseDetector:
    match family:
        case "ours":
            return HKDDetector(TINY)
        case "yolo":
            return UltralyticsDetector(make_thin_spec("yolo11n"))
        case _:
            return FasterRCNN(TWO_STAGE)


def make_thin_spec(name: str) -> UltralyticsSpec:
    model_yaml = deepcopy(make_ultralytics_spec(name).model_yaml)
    model_yaml["scales"][model_yaml["scale"]][1] = 0.0625
    return UltralyticsSpec(name, {**model_yaml, "nc": 1})


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["ours", "yolo", "faster-rcnn"])
@pytest.mark.parametrize("student", ["ours", "yolo", "faster-rcnn"])
def test_soft_labels_train_every_pair_of_families(teacher: str, student: str) -> None:
    torch.manual_seed(0)
    student_model = make_detector(student).train()
    distiller = make_distiller(student_model, make_detector(teacher), {"soft_labels": SoftLabelConfig()})
    losses = distiller(IMAGES, make_unlabeled_targets(2), 1.0)[1]
    torch.stack(list(losses.values())).sum().backward()
    assert losses.keys() == {"soft_cls", "soft_box"} and all(torch.isfinite(loss) for loss in losses.values())
    assert any(p.grad is not None and p.grad.any() for p in student_model.parameters())


def test_hkd_uses_soft_labels_without_common_anchor_points() -> None:
    """For a two-stage teacher, and for an HKDDetector with other strides."""
    torch.manual_seed(0)
    coarse = HKDDetector(replace(TINY, strides=(16, 32)))
    for teacher in (FasterRCNN(TWO_STAGE), coarse):
        student = HKDDetector(TINY).train()
        distiller = make_distiller(student, teacher, {"hkd": HKDConfig()})
        outputs = record_outputs(student)
        losses = distiller(IMAGES, make_unlabeled_targets(2), 1.0)[1]
        (output,) = outputs
        with torch.no_grad():
            detections = teacher.eval().postprocess(teacher(IMAGES))
        score, box = criterion.dense_soft_label_losses(output, detections, make_unlabeled_targets(2), clamp_min_one)
        torch.testing.assert_close(losses["hkd_cls"], score)
        torch.testing.assert_close(losses["hkd_box"], 0.5 * box)
        assert score > 0


def test_one2one_branch_with_boxes_receives_hkd_box_loss() -> None:
    """The one-to-one branch of YOLO26 has boxes of its own, which the box loss of `one2many` does not train."""
    torch.manual_seed(0)
    student, teacher = UltralyticsDetector(make_thin_spec("yolo26n")).train(), HKDDetector(TINY)
    distiller = make_distiller(student, teacher, {"hkd": HKDConfig(box=1.0)})
    outputs = record_outputs(student)
    loss = distiller(IMAGES, make_unlabeled_targets(2), 1.0)[1]["hkd_box"]
    (output,) = outputs
    with torch.no_grad():
        teacher_outputs = teacher(IMAGES)
    assert output.one2one is not None and output.one2one.has_box_loss and teacher_outputs.one2one is not None
    expected = 0.0
    for a, b in ((output.one2many, teacher_outputs.one2many), (output.one2one, teacher_outputs.one2one)):
        distance = 1 - torch.stack(
            [generalized_box_iou(a.boxes_xyxy[i], b.boxes_xyxy[i]).diagonal() for i in range(len(IMAGES))]
        )
        confidence = b.logits.sigmoid()
        expected += (confidence * distance).sum() / confidence.sum().clamp(min=1)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, output.one2one.boxes_xyxy)
    assert gradient.any()


def test_one2one_branch_learns_from_teacher_detections() -> None:
    """The one-to-many branch imitates the logits of YOLO11, the one-to-one branch its detections after suppression."""
    torch.manual_seed(0)
    student, teacher = HKDDetector(TINY).train(), UltralyticsDetector(make_thin_spec("yolo11n"))
    distiller = make_distiller(student, teacher, {"hkd": HKDConfig()})
    outputs = record_outputs(student)
    losses = distiller(IMAGES, make_unlabeled_targets(2), 1.0)[1]
    (output,) = outputs
    with torch.no_grad():
        teacher_outputs = teacher.eval()(IMAGES)
        detections = teacher.postprocess(teacher_outputs)
    assert output.one2one is not None and teacher_outputs.one2one is None
    pointwise = quality_focal_kd_loss(output.one2many.logits, teacher_outputs.one2many.logits).sum()
    by_points = pointwise / teacher_outputs.one2many.logits.sigmoid().sum().clamp(min=1)
    by_detections, boxes = criterion.dense_soft_label_losses(
        output, detections, make_unlabeled_targets(2), clamp_min_one
    )
    many_only, boxes_only = criterion.dense_soft_label_losses(
        replace(output, one2one=None), detections, make_unlabeled_targets(2), clamp_min_one
    )
    torch.testing.assert_close(losses["hkd_cls"], by_points + by_detections - many_only)
    torch.testing.assert_close(boxes, boxes_only)  # the one-to-one branch has no boxes of its own
    (gradient,) = torch.autograd.grad(losses["hkd_cls"], output.one2one.logits)
    assert gradient.any()


def test_targets_mode_perturbs_logits_of_detections() -> None:
    torch.manual_seed(0)
    detections = make_detections((BOX, 0.8), (BOX, 0.3), count=400)
    noisy = NoisyTeacher(
        NoisyTeacherConfig("targets", alpha=0.5, sigma=0.2, granularity="sample"), None, None
    ).perturb_teacher(detections)
    assert isinstance(noisy, DetectionBatch) and noisy.boxes_xyxy is detections.boxes_xyxy
    factors = torch.stack(noisy.scores).logit() / torch.stack(detections.scores).logit()
    torch.testing.assert_close(factors[:, 0], factors[:, 1])  # one factor per image
    is_unchanged = (factors[:, 0] - 1).abs() < 1e-5
    assert 0.4 < is_unchanged.float().mean() < 0.6
    changed = factors[~is_unchanged, 0]
    assert changed.mean().item() == pytest.approx(1, abs=0.05) and changed.std().item() == pytest.approx(0.2, abs=0.04)
    certain = NoisyTeacher(NoisyTeacherConfig("targets", alpha=1.0), None, None).perturb_teacher(
        make_detections((BOX, 1.0), (BOX, 0.0))
    )
    assert all(0 <= score <= 1 for score in certain.scores[0])


def test_teacher_detections_are_computed_once() -> None:
    class CountingTeacher(ConstantTeacher):
        num_calls = 0

        def postprocess(self, output: DetectionBatch, max_det: int = 100) -> DetectionBatch:
            self.num_calls += 1
            return super().postprocess(output, max_det)

    teacher = CountingTeacher(make_detections((BOX, 0.5)))
    student = HKDDetector(TINY)
    batch = DistillationBatch(
        IMAGES, make_unlabeled_targets(2), student, teacher, student(IMAGES), teacher.detections, {}, {}, clamp_min_one
    )
    assert batch.teacher_detections is batch.teacher_detections and teacher.num_calls == 1
