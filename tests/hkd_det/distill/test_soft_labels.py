"""A dense student under a teacher's detections: hand-made cases, finite differences, and descent to the teacher."""

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from hkd_det.distill import parse_methods
from hkd_det.distill.base import DistillationBatch
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.distill.hkd import HKDConfig
from hkd_det.distill.noisy_teacher import NoisyTeacher, NoisyTeacherConfig
from hkd_det.distill.soft_labels import SoftLabelConfig
from hkd_det.models import criterion as soft_points
from hkd_det.models.assigner import AssignResult
from hkd_det.models.base import BaseDetector, BranchOutputs, DenseOutputs, DetectionBatch, Targets
from hkd_det.models.criterion import MIN_TEACHER_SCORE, roi_soft_label_losses
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
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


def unknown(count: int = 1) -> Targets:
    """Truth of pictures without labels: one ignore region each."""
    everywhere = torch.tensor([[[0.0, 0.0, HW[1], HW[0]]]]).expand(count, -1, -1)
    return Targets(everywhere, torch.zeros(count, 1, dtype=torch.bool), torch.ones(count, 1, dtype=torch.bool))


def person(*box: float) -> Targets:
    return Targets(torch.tensor([[box]]), torch.tensor([[True]]), torch.tensor([[False]]))


def found(*scored: tuple[list[float], float], count: int = 1) -> DetectionBatch:
    boxes = torch.tensor([box for box, _ in scored]).view(-1, 4)
    return DetectionBatch((boxes,) * count, (torch.tensor([score for _, score in scored]),) * count)


def student(logits: Tensor, boxes: Tensor, sides: Tensor | None = None) -> DenseOutputs:
    points, strides = make_anchors(HW, (8, 16, 32))
    return DenseOutputs(BranchOutputs(logits, boxes, sides), None, points, strides, HW)


def everywhere(box: list[float], score: float) -> DenseOutputs:
    """A student that says the same box and score at each of its 126 points."""
    logit = math.log(score / (1 - score))
    return student(torch.full((1, 126), logit), torch.tensor(box).expand(1, 126, 4))


def divergence(p: float, t: float) -> float:
    return sum(a * math.log(a / b) for a, b in ((t, p), (1 - t, 1 - p)) if a > 0)


def test_dense_targets_are_teacher_score_at_ten_points() -> None:
    """All points lie inside the box at its exact place: ten of them answer, each by quality 1 times 0.6."""
    whole = [-1.0, -1.0, 97.0, 65.0]
    score, box = soft_points.dense_soft_label_losses(
        everywhere(whole, 0.3), found((whole, 0.6)), unknown(), clamp_min_one
    )
    there, elsewhere = 0.3 * divergence(0.3, 0.6), 0.3 * divergence(0.3, 1e-4)
    assert score.item() == pytest.approx((10 * there + 116 * elsewhere) / (10 * 0.6), rel=1e-3)
    assert box.item() == pytest.approx(0, abs=1e-6)


def test_background_weight_scales_background_loss() -> None:
    whole = [-1.0, -1.0, 97.0, 65.0]
    full, half, none = (
        soft_points.dense_soft_label_losses(
            everywhere(whole, 0.3), found((whole, 0.6)), unknown(), clamp_min_one, silence
        )[0].item()
        for silence in (1.0, 0.5, 0.0)
    )
    assert none == pytest.approx(10 * 0.3 * divergence(0.3, 0.6) / 6, rel=1e-3)
    assert half == pytest.approx((full + none) / 2)


def test_missed_person_is_not_background() -> None:
    """Points in the person's box are left alone, though the teacher sees nobody; those outside are not."""
    prediction = everywhere(BOX, 0.3)
    logits = prediction.one2many.logits.clone().requires_grad_()
    output = replace(prediction, one2many=replace(prediction.one2many, logits=logits))
    soft_points.dense_soft_label_losses(output, found(), person(*BOX), clamp_min_one)[0].backward()
    x, y = prediction.anchor_points.unbind(-1)
    inside = (x > BOX[0]) & (x < BOX[2]) & (y > BOX[1]) & (y < BOX[3])
    assert inside.sum() > 10 and not logits.grad[0, inside].any() and (logits.grad[0, ~inside] > 0).all()


def test_box_loss_is_giou_weighted_by_target() -> None:
    """The student's box is the upper half of the teacher's: quality 0.5 at its ten best points, GIoU 0.5."""
    whole, half = [-1.0, -1.0, 97.0, 65.0], [-1.0, -1.0, 97.0, 32.0]
    _, box = soft_points.dense_soft_label_losses(everywhere(half, 0.3), found((whole, 0.8)), unknown(), clamp_min_one)
    weight = 10 * 0.5 * 0.8
    assert box.item() == pytest.approx(weight * 0.5 / max(weight, 1.0), rel=1e-4)


def test_box_below_min_score_is_ignored() -> None:
    prediction = everywhere(BOX, 0.3)
    none = soft_points.dense_soft_label_losses(prediction, found(), unknown(), clamp_min_one)
    weak = soft_points.dense_soft_label_losses(
        prediction, found((BOX, MIN_TEACHER_SCORE - 1e-3)), unknown(), clamp_min_one
    )
    assert none[0] == weak[0] and none[1] == weak[1] == 0


def test_soft_label_gradients_match_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are constants of the step: frozen, the box term's gradient is its slope, the score term's is known."""
    rng = torch.Generator().manual_seed(1)
    logits = (torch.randn(1, 126, generator=rng, dtype=torch.double) - 1).requires_grad_()
    sides = torch.randn(1, 126, 4, 8, generator=rng, dtype=torch.double).requires_grad_()
    points, strides = make_anchors(HW, (8, 16, 32))
    told = found((BOX, 0.7), ([60.0, 10.0, 80.0, 60.0], 0.4))

    def terms(values: Tensor) -> tuple[Tensor, Tensor]:
        boxes = dist2bbox(values, points, strides)
        return soft_points.dense_soft_label_losses(student(logits, boxes, values), told, unknown(), clamp_min_one)

    kept: list[AssignResult] = []
    work_out = soft_points.assign_soft_targets
    monkeypatch.setattr(soft_points, "assign_soft_targets", lambda *given: kept.append(work_out(*given)) or kept[0])
    score, box = terms(sides)
    (of_score,) = torch.autograd.grad(score, logits, retain_graph=True)
    s, t = logits.detach().sigmoid(), kept[0].target_scores.double().clamp(1e-4)
    norm = kept[0].target_scores.sum().clamp(min=1)
    torch.testing.assert_close(of_score, (s - t).abs() * (s - t) / norm, atol=1e-7, rtol=1e-4)
    (of_box,) = torch.autograd.grad(box, sides)
    assert of_box.abs().sum() > 0.01
    for seed in range(3):
        way = torch.randn(sides.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        with torch.no_grad():
            slope = (terms(sides + 1e-5 * way)[1] - terms(sides - 1e-5 * way)[1]) / 2e-5
        torch.testing.assert_close(slope, (of_box * way).sum(), atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ours", "yolo", "faster-rcnn"])
def test_training_on_soft_labels_reaches_teacher_boxes(family: str) -> None:
    torch.manual_seed(0)
    detector = detector_of(family)
    taught = found((BOX, 0.9), ([60.0, 10.0, 84.0, 62.0], 0.5), count=2)
    distiller = make_distiller(detector, Told(taught), {"soft_labels": SoftLabelConfig()})
    optimizer = torch.optim.Adam(detector.parameters(), lr=5e-3)
    detector.train()
    for _ in range(60):
        terms = distiller(IMAGES, unknown(2), 1.0)[1]
        assert terms.keys() == {"soft_cls", "soft_box"}
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        output = detector(IMAGES)
        if isinstance(detector, FasterRCNN):
            output = replace(
                output, proposals=tuple(box + torch.tensor([2.0, 1.0, -1.0, 2.0]) for box in taught.boxes_xyxy)
            )
        answers = detector.postprocess(output)
    for boxes, scores in zip(answers.boxes_xyxy, answers.scores, strict=True):
        overlap = box_iou(taught.boxes_xyxy[0], boxes[:2])
        assert overlap.max(1).values.min() > 0.8, (boxes[:3], scores[:3])
        assert scores[overlap.argmax(1)].tolist() == pytest.approx([0.9, 0.5], abs=0.15)
        assert (scores[2:] < 0.3).all()


def test_roi_losses_match_their_formulas() -> None:
    torch.manual_seed(0)
    pupil = FasterRCNN(TWO_STAGE).eval()
    told = found((BOX, 0.9), ([60.0, 2.0, 80.0, 50.0], 0.2))
    with torch.no_grad():
        output = replace(pupil(IMAGES[:1]), proposals=(torch.tensor([[0.0, 0.0, 4.0, 4.0]]),))  # near nobody
        score, box = roi_soft_label_losses(pupil, output, told, clamp_min_one)
        answer = pupil.forward_rois(output, told.boxes_xyxy)
    wanted, weights = (torch.distributions.Bernoulli(probs=told.scores[0]), told.scores[0])
    divergence = torch.distributions.kl_divergence(wanted, torch.distributions.Bernoulli(logits=answer.logits))
    torch.testing.assert_close(score, divergence.mean(), rtol=1e-4, atol=1e-6)
    apart = 1 - generalized_box_iou(answer.boxes_xyxy, told.boxes_xyxy[0]).diagonal()
    torch.testing.assert_close(box, (weights * apart).sum() / weights.sum(), rtol=1e-4, atol=1e-6)


def record_outputs(model: BaseDetector) -> list[DenseOutputs]:
    """Return a list that receives the outputs of each forward pass."""
    outputs: list[DenseOutputs] = []
    model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs


class Told(torch.nn.Module):
    """A teacher that always finds the same."""

    capabilities = frozenset({"detections"})

    def __init__(self, answer: DetectionBatch) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, _pictures: Tensor) -> DetectionBatch:
        return self.answer

    def postprocess(self, output: DetectionBatch, max_det: int = 100) -> DetectionBatch:
        assert max_det >= 2
        return output

    def feature_info(self) -> list[object]:
        return []


def detector_of(family: str) -> BaseDetector:
    match family:
        case "ours":
            return HKDDetector(TINY)
        case "yolo":
            return UltralyticsDetector(thin("yolo11n"))
        case _:
            return FasterRCNN(TWO_STAGE)


def thin(name: str) -> UltralyticsSpec:
    layout = deepcopy(make_ultralytics_spec(name).model_yaml)
    layout["scales"][layout["scale"]][1] = 0.0625
    return UltralyticsSpec(name, {**layout, "nc": 1})


@pytest.mark.parametrize("teacher", ["ours", "yolo", "faster-rcnn"])
@pytest.mark.parametrize("pupil", ["ours", "yolo", "faster-rcnn"])
def test_soft_labels_train_every_pair_of_families(teacher: str, pupil: str) -> None:
    torch.manual_seed(0)
    mine = detector_of(pupil).train()
    distiller = make_distiller(mine, detector_of(teacher), {"soft_labels": SoftLabelConfig()})
    terms = distiller(IMAGES, unknown(2), 1.0)[1]
    torch.stack(list(terms.values())).sum().backward()
    assert terms.keys() == {"soft_cls", "soft_box"} and all(torch.isfinite(term) for term in terms.values())
    assert any(p.grad is not None and p.grad.any() for p in mine.parameters())


def test_hkd_uses_soft_labels_without_common_anchor_points() -> None:
    """A two-stage teacher, and one of ours with other strides, over our student."""
    torch.manual_seed(0)
    coarse = HKDDetector(replace(TINY, strides=(16, 32)))
    for teacher in (FasterRCNN(TWO_STAGE), coarse):
        mine = HKDDetector(TINY).train()
        distiller = make_distiller(mine, teacher, {"hkd": HKDConfig()})
        outputs = record_outputs(mine)
        terms = distiller(IMAGES, unknown(2), 1.0)[1]
        (output,) = outputs
        with torch.no_grad():
            told = teacher.eval().postprocess(teacher(IMAGES))
        score, box = soft_points.dense_soft_label_losses(output, told, unknown(2), clamp_min_one)
        torch.testing.assert_close(terms["hkd_cls"], score)
        torch.testing.assert_close(terms["hkd_box"], 0.5 * box)
        assert score > 0


def test_one2one_branch_with_boxes_receives_hkd_box_loss() -> None:
    """YOLO26's is what is deployed, and nothing that `many` learns about boxes reaches it."""
    torch.manual_seed(0)
    mine, teacher = UltralyticsDetector(thin("yolo26n")).train(), HKDDetector(TINY)
    distiller = make_distiller(mine, teacher, {"hkd": HKDConfig(box=1.0)})
    outputs = record_outputs(mine)
    told = distiller(IMAGES, unknown(2), 1.0)[1]["hkd_box"]
    (output,) = outputs
    with torch.no_grad():
        other = teacher(IMAGES)
    assert output.one2one is not None and output.one2one.has_box_loss and other.one2one is not None
    wanted = 0.0
    for a, b in ((output.one2many, other.one2many), (output.one2one, other.one2one)):
        distance = 1 - torch.stack(
            [generalized_box_iou(a.boxes_xyxy[i], b.boxes_xyxy[i]).diagonal() for i in range(len(IMAGES))]
        )
        confidence = b.logits.sigmoid()
        wanted += (confidence * distance).sum() / confidence.sum().clamp(min=1)
    torch.testing.assert_close(told, wanted)
    (gradient,) = torch.autograd.grad(told, output.one2one.boxes_xyxy)
    assert gradient.any()


def test_one2one_branch_learns_from_teacher_detections() -> None:
    """YOLO11 over ours: its points one by one for `many`, what is left after suppression for `one`."""
    torch.manual_seed(0)
    mine, teacher = HKDDetector(TINY).train(), UltralyticsDetector(thin("yolo11n"))
    distiller = make_distiller(mine, teacher, {"hkd": HKDConfig()})
    outputs = record_outputs(mine)
    terms = distiller(IMAGES, unknown(2), 1.0)[1]
    (output,) = outputs
    with torch.no_grad():
        other = teacher.eval()(IMAGES)
        told = teacher.postprocess(other)
    assert output.one2one is not None and other.one2one is None
    pointwise = quality_focal_kd_loss(output.one2many.logits, other.one2many.logits).sum()
    by_points = pointwise / other.one2many.logits.sigmoid().sum().clamp(min=1)
    by_detections, boxes = soft_points.dense_soft_label_losses(output, told, unknown(2), clamp_min_one)
    many_alone, boxes_alone = soft_points.dense_soft_label_losses(
        replace(output, one2one=None), told, unknown(2), clamp_min_one
    )
    torch.testing.assert_close(terms["hkd_cls"], by_points + by_detections - many_alone)
    torch.testing.assert_close(boxes, boxes_alone)  # ours has no boxes of its own in that branch
    (gradient,) = torch.autograd.grad(terms["hkd_cls"], output.one2one.logits)
    assert gradient.any()


def test_targets_mode_perturbs_logits_of_detections() -> None:
    torch.manual_seed(0)
    told = found((BOX, 0.8), (BOX, 0.3), count=400)
    noisy = NoisyTeacher(
        NoisyTeacherConfig("targets", alpha=0.5, sigma=0.2, granularity="sample"), None, None
    ).perturb_teacher(told)
    assert isinstance(noisy, DetectionBatch) and noisy.boxes_xyxy is told.boxes_xyxy
    factors = torch.stack(noisy.scores).logit() / torch.stack(told.scores).logit()
    torch.testing.assert_close(factors[:, 0], factors[:, 1])  # one for a whole picture
    still = (factors[:, 0] - 1).abs() < 1e-5
    assert 0.4 < still.float().mean() < 0.6
    moved = factors[~still, 0]
    assert moved.mean().item() == pytest.approx(1, abs=0.05) and moved.std().item() == pytest.approx(0.2, abs=0.04)
    certain = NoisyTeacher(NoisyTeacherConfig("targets", alpha=1.0), None, None).perturb_teacher(
        found((BOX, 1.0), (BOX, 0.0))
    )
    assert all(0 <= score <= 1 for score in certain.scores[0])


def test_teacher_detections_are_computed_once() -> None:
    class Counting(Told):
        asked = 0

        def postprocess(self, output: DetectionBatch, max_det: int = 100) -> DetectionBatch:
            self.asked += 1
            return super().postprocess(output, max_det)

    teacher = Counting(found((BOX, 0.5)))
    mine = HKDDetector(TINY)
    batch = DistillationBatch(IMAGES, unknown(2), mine, teacher, mine(IMAGES), teacher.answer, {}, {}, clamp_min_one)
    assert batch.teacher_detections is batch.teacher_detections and teacher.asked == 1
