"""Noisy teacher: statistics of the noise, the L2 loss and its gradient, and noisy targets of other methods."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hkd_det.distill import check_methods, parse_methods
from hkd_det.distill.batch import DistillationBatch
from hkd_det.distill.dense import SoftLabelConfig
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.distill.hkd import HKDConfig
from hkd_det.distill.noisy_teacher import NoisyTeacher, NoisyTeacherConfig, fg_balanced_l2
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, DetectionBatch, Targets
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.ops.losses import clamp_min_one

ANCHORS = (16, 32, 64, 128, 256)
TWO_STAGE = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=ANCHORS)
DENSE = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
COARSE = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, strides=(16, 32), channels=16)
IMAGES = torch.randint(0, 255, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
TARGETS = Targets(
    torch.tensor([[[10.0, 10.0, 40.0, 60.0]], [[30.0, 5.0, 50.0, 55.0]]]),
    torch.ones(2, 1, dtype=torch.bool),
    torch.zeros(2, 1, dtype=torch.bool),
)
Make = Callable[[], BaseDetector]
MAKE: dict[str, Make] = {"dense": lambda: HKDDetector(DENSE), "two-stage": lambda: FasterRCNN(TWO_STAGE)}


def make_distiller(student: BaseDetector, teacher: Any, methods: dict[str, Any]) -> Distiller:
    return Distiller(student, teacher, build_methods(parse_methods(methods), student, teacher))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def perturb(noise: NoisyTeacherConfig, logits: Tensor) -> Tensor:
    return NoisyTeacher(replace(noise, mode="targets"), None, None).perturb_logits(logits)


def compute_losses(student: BaseDetector, teacher: BaseDetector, methods: dict[str, Any]) -> dict[str, Tensor]:
    """Compute the losses of one batch, with the same adapters for all methods."""
    torch.manual_seed(1)
    distiller = make_distiller(student, teacher, methods)
    return distiller(IMAGES, TARGETS, 1.0)[1]


def test_noise_has_published_mean_and_variance() -> None:
    """Mean z and variance alpha sigma^2 z^2, within four standard errors."""
    z = torch.tensor([-6.0, 0.0, 2.0])
    alpha, sigma, count = 0.4, 0.5, 40_000
    samples = perturb(NoisyTeacherConfig(alpha=alpha, sigma=sigma), z.expand(count, 3))
    variance = alpha * sigma**2 * z**2
    assert ((samples.mean(0) - z).abs() <= 4 * (variance / count).sqrt()).all()
    # A mixture of N(0, sigma^2 z^2) with probability alpha has the fourth moment 3 alpha sigma^4 z^4.
    error = ((3 * alpha * sigma**4 * z**4 - variance**2) / count).sqrt()
    assert ((samples.var(0) - variance).abs() <= 4 * error).all()


@pytest.mark.parametrize("granularity", ["logit", "sample"])
def test_each_sample_is_perturbed_independently(granularity: str) -> None:
    z = torch.full((20_000, 5), 3.0)
    factor = perturb(NoisyTeacherConfig(alpha=0.3, sigma=0.5, granularity=granularity), z) / z  # type: ignore[arg-type]
    is_perturbed = factor != 1
    assert (is_perturbed.all(1) | ~is_perturbed.any(1)).all()  # all logits of a sample or none
    assert abs(is_perturbed[:, 0].float().mean().item() - 0.3) < 4 * (0.3 * 0.7 / 20_000) ** 0.5
    is_uniform = (factor == factor[:, :1]).all(1)[is_perturbed.any(1)]
    assert is_uniform.all() if granularity == "sample" else not is_uniform.any()


def test_l2_gradient_matches_finite_differences() -> None:
    rng = torch.Generator().manual_seed(1)
    student, teacher, noisy = torch.randn(3, 2, 7, generator=rng, dtype=torch.float64)
    student.requires_grad_()

    def loss(logits: Tensor) -> Tensor:
        return fg_balanced_l2(logits, noisy, teacher.sigmoid(), 0.3, clamp_min_one)

    assert torch.autograd.gradcheck(loss, (student,))


def test_l2_loss_matches_hand_calculation() -> None:
    """Scores 0.75 and 0.25: foreground (0.75 * 2 + 0.25 * 8) / 1, background (0.25 * 2 + 0.75 * 8) / 1."""
    loss = fg_balanced_l2(
        torch.tensor([0.0, 0.0]), torch.tensor([2.0, -4.0]), torch.tensor([0.75, 0.25]), 0.4, clamp_min_one
    )
    assert loss.item() == pytest.approx(0.4 * 3.5 + 0.6 * 6.5)


def test_background_weighs_no_more_than_one_person() -> None:
    student, teacher = torch.zeros(1, 1001, requires_grad=True), torch.full((1, 1001), -12.0)
    with torch.no_grad():
        teacher[0, 0] = 12.0
    fg_balanced_l2(student, teacher, teacher.sigmoid(), 0.5, clamp_min_one).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad[0, 0].abs(), student.grad[0, 1:].abs().sum(), rtol=0.05, atol=0)


def test_noise_keeps_expected_l2_gradient() -> None:
    count = 20_000
    z, s = torch.tensor([-5.0, -2.0, 1.5, 4.0]), torch.tensor([0.5, -3.0, 1.0, 1.0])
    noisy = perturb(NoisyTeacherConfig(alpha=1.0, sigma=0.8), z.expand(count, 4))
    score = z.sigmoid()

    def gradient(targets: Tensor) -> Tensor:
        student = s.expand(len(targets), 4).clone().requires_grad_()
        error = fg_balanced_l2(student, targets, score.expand_as(targets), 0.5, clamp_min_one)
        return len(targets) * torch.autograd.grad(error, student)[0]

    samples, clean = gradient(noisy), gradient(z[None])[0]
    # The weights do not depend on the noise, so the expected gradient is that of the clean logits.
    assert ((samples.mean(0) - clean).abs() < 4 * samples.std(0) / count**0.5).all()
    assert samples.std(0).min() > 0.05
    # Jensen: the sigmoid is concave above 0 and convex below.
    softened = noisy.sigmoid().mean(0)
    assert ((softened - 0.5).abs() < (score - 0.5).abs() - 0.01).all()
    assert ((softened - 0.5) * (score - 0.5) > 0).all()


@pytest.mark.parametrize("teacher", MAKE)
@pytest.mark.parametrize("student", MAKE)
def test_l2_mode_trains_every_pair_of_families(student: str, teacher: str) -> None:
    student_model, teacher_model = MAKE[student]().train(), MAKE[teacher]()
    distiller = make_distiller(student_model, teacher_model, {"noisy_teacher": NoisyTeacherConfig(weight=1.0)})
    losses = distiller(IMAGES, TARGETS, 1.0)[1]
    assert losses.keys() == {"noisy_teacher"} and losses["noisy_teacher"] > 0
    losses["noisy_teacher"].backward()
    assert not list(distiller.methods.parameters())
    assert all(p.grad is None for p in teacher_model.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student_model.parameters())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in student_model.parameters())


@pytest.mark.parametrize("family", MAKE)
def test_equal_student_and_teacher_differ_by_noise_only(family: str) -> None:
    detector = MAKE[family]().eval()
    with torch.no_grad():
        output = detector(IMAGES)
        batch = DistillationBatch(IMAGES, TARGETS, detector, detector, output, output, {}, {}, clamp_min_one)
        clean, noisy = (
            NoisyTeacher(NoisyTeacherConfig(alpha=1.0, sigma=sigma), detector, detector)(batch)["noisy_teacher"]
            for sigma in (0.0, 1.0)
        )
    assert clean == 0 and noisy > 0


def test_two_stage_teacher_rates_best_student_boxes() -> None:
    """The reference runs the second stage of the teacher on one of the student's 64 best boxes at a time."""
    student, teacher = HKDDetector(DENSE).eval(), FasterRCNN(TWO_STAGE).eval()
    with torch.no_grad():
        student_outputs, teacher_outputs = student(IMAGES), teacher(IMAGES)
        batch = DistillationBatch(
            IMAGES, TARGETS, student, teacher, student_outputs, teacher_outputs, {}, {}, clamp_min_one
        )
        loss = NoisyTeacher(NoisyTeacherConfig(weight=1.0, sigma=0.0), student, teacher)(batch)["noisy_teacher"]
        s, z = [], []
        for b in range(2):
            for point in student_outputs.one2many.logits[b].argsort(descending=True)[:64]:
                rois = [torch.zeros(0, 4), torch.zeros(0, 4)]
                rois[b] = student_outputs.one2many.boxes_xyxy[b, point][None]
                s.append(student_outputs.one2many.logits[b, point])
                z.append(teacher.forward_rois(teacher_outputs, rois).logits[0])
        expected = fg_balanced_l2(torch.stack(s), torch.stack(z), torch.stack(z).sigmoid(), 0.5, clamp_min_one)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)


def test_two_stage_student_ignores_duplicates() -> None:
    """A suppressed duplicate of a dense teacher has a score near 0 but contains the same person."""
    student, teacher = FasterRCNN(TWO_STAGE).eval(), HKDDetector(DENSE).eval()
    best, duplicate = [10.0, 10.0, 40.0, 60.0], [11.0, 10.0, 41.0, 60.0]
    with torch.no_grad():
        student_outputs, teacher_outputs = student(IMAGES), teacher(IMAGES)
        losses = []
        for boxes, scores in (([best], [0.9]), ([best, duplicate], [0.9, 1e-9])):
            batch = DistillationBatch(
                IMAGES, TARGETS, student, teacher, student_outputs, teacher_outputs, {}, {}, clamp_min_one
            )
            batch.__dict__["teacher_detections"] = DetectionBatch(
                (torch.tensor(boxes),) * 2, (torch.tensor(scores),) * 2
            )
            losses.append(NoisyTeacher(NoisyTeacherConfig(sigma=0.0), student, teacher)(batch)["noisy_teacher"])
    torch.testing.assert_close(losses[1], losses[0])


def test_targets_mode_changes_hkd_targets_only() -> None:
    """Noise on logits changes the score loss only. Noise on features changes the pyramid loss only."""
    student, teacher = HKDDetector(DENSE).eval(), HKDDetector(DENSE)
    clean, noisy_logits, noisy_features = (
        compute_losses(student, teacher, {"hkd": HKDConfig(region=0.0), "noisy_teacher": noise})
        for noise in (
            None,
            NoisyTeacherConfig("targets", alpha=1.0),
            NoisyTeacherConfig("targets", alpha=1.0, sigma=0.0, feature_sigma=0.5),
        )
    )
    assert clean.keys() == noisy_logits.keys() == noisy_features.keys()
    assert noisy_logits["hkd_cls"] != clean["hkd_cls"] and noisy_logits["hkd_pyramid"] == clean["hkd_pyramid"]
    assert noisy_features["hkd_cls"] == clean["hkd_cls"] and noisy_features["hkd_pyramid"] != clean["hkd_pyramid"]


def test_l2_mode_leaves_hkd_losses_unchanged() -> None:
    student, teacher = HKDDetector(DENSE).eval(), HKDDetector(DENSE)
    hkd_losses, losses = (
        compute_losses(student, teacher, methods) for methods in ({"hkd": {}}, {"hkd": {}, "noisy_teacher": {}})
    )
    assert losses.keys() == hkd_losses.keys() | {"noisy_teacher"}
    assert all(losses[name] == hkd_losses[name] for name in hkd_losses)


def test_invalid_noise_config_raises_usage_error() -> None:
    with pytest.raises(UsageError, match="another method"):
        check_methods({"noisy_teacher": NoisyTeacherConfig("targets")})
    with pytest.raises(UsageError, match=r"noisy_teacher\.mode=targets"):
        NoisyTeacherConfig(feature_sigma=0.1)
    with pytest.raises(UsageError, match="alpha"):
        NoisyTeacherConfig(alpha=1.5)
    with pytest.raises(UsageError, match="fg_ratio"):
        NoisyTeacherConfig(fg_ratio=-0.1)
    with pytest.raises(UsageError, match="no method compares features"):
        check_methods(
            {"noisy_teacher": NoisyTeacherConfig("targets", feature_sigma=0.1), "soft_labels": SoftLabelConfig()}
        )
    for unused in ({"weight": 0.5}, {"fg_ratio": 0.2}):
        with pytest.raises(UsageError, match="has no loss"):
            NoisyTeacherConfig("targets", **unused)
    student, teacher = HKDDetector(DENSE), HKDDetector(COARSE)
    with pytest.raises(UsageError, match="equal strides"):
        make_distiller(student, teacher, {"noisy_teacher": {}})
    make_distiller(student, teacher, {"noisy_teacher": NoisyTeacherConfig("targets"), "soft_labels": SoftLabelConfig()})
