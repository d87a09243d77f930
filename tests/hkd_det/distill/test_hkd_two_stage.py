"""HKD between two Faster R-CNN models, and two-stage students with other teachers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hkd_det.distill import check_methods, parse_methods
from hkd_det.distill.batch import DistillationBatch, sample_rois
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.distill.hkd import DenseHKD, HKDConfig, TwoStageConfig, TwoStageHKD, mse_per_item
from hkd_det.distill.noisy_teacher import NoisyTeacher, NoisyTeacherConfig
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, DetectionBatch, ProposalOutputs, Targets
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.faster_rcnn_ops import roi_soft_label_losses
from hkd_det.models.feature_layers import pair_by_stride
from hkd_det.ops.losses import clamp_min_one

ANCHORS = (16, 32, 64, 128, 256)
STUDENT = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=ANCHORS)
TEACHER = FasterRCNNSpec("resnet18", width_mult=0.25, channels=12, head_width=24, anchor_sizes=ANCHORS)
DENSE = HKDDetectorSpec("resnet10t", {"channels": (8, 16, 16, 32), "stem_width": 8}, channels=24, head_depth=1)
IMAGES = torch.randint(0, 255, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
TARGETS = Targets(
    torch.tensor([[[10.0, 10.0, 40.0, 60.0]], [[30.0, 5.0, 50.0, 55.0]]]),
    torch.ones(2, 1, dtype=torch.bool),
    torch.zeros(2, 1, dtype=torch.bool),
)
NO_TARGETS = Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.bool))


def make_distiller(student: BaseDetector, teacher: Any, methods: dict[str, Any]) -> Distiller:
    return Distiller(student, teacher, build_methods(parse_methods(methods), student, teacher))


@pytest.fixture
def pair() -> tuple[FasterRCNN, FasterRCNN]:
    torch.manual_seed(0)
    return FasterRCNN(STUDENT).train(), FasterRCNN(TEACHER).eval()


def make_batch(student: FasterRCNN, teacher: FasterRCNN, targets: Targets = TARGETS) -> DistillationBatch:
    student_outputs = student(IMAGES)
    with torch.no_grad():
        teacher_outputs = teacher(IMAGES)
    return DistillationBatch(
        IMAGES,
        targets,
        student,
        teacher,
        student_outputs,
        teacher_outputs,
        get_features(student, student_outputs),
        get_features(teacher, teacher_outputs),
        clamp_min_one,
    )


def get_features(model: FasterRCNN, outputs: ProposalOutputs) -> dict[str, Tensor]:
    return {layer.name: feature for layer, feature in zip(model.feature_info(), outputs.features, strict=True)}


def make_two_stage_hkd(student: FasterRCNN, teacher: FasterRCNN, config: TwoStageConfig) -> TwoStageHKD:
    return TwoStageHKD(student, teacher, pair_by_stride(student.feature_info(), teacher.feature_info()), config)


def set_identity(method: TwoStageHKD) -> None:
    for layer in [*(adapter.projection for adapter in method.pyramid_adapters), method.region_adapter]:
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.eye_(method.logit_adapter.weight)
    nn.init.zeros_(method.logit_adapter.bias)


def test_every_level_has_loss_and_gradient(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    student, teacher = pair
    distiller = make_distiller(student, teacher, {"hkd": HKDConfig()})
    losses = distiller(IMAGES, TARGETS, 1.0)[1]
    trained_parts = {
        "hkd_pyramid": student.backbone,
        "hkd_region": student.backbone,
        "hkd_logit": student.roi_heads.box_head,
    }
    assert losses.keys() == trained_parts.keys()
    for name, part in trained_parts.items():
        gradients = torch.autograd.grad(losses[name], list(part.parameters()), retain_graph=True, allow_unused=True)
        assert all(g is not None and torch.isfinite(g).all() for g in gradients), name
        assert any(g.abs().sum() > 0 for g in gradients), name
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.methods.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_equal_student_and_teacher_have_zero_loss(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    _, teacher = pair
    method = make_two_stage_hkd(teacher, teacher, TwoStageConfig())
    set_identity(method)
    batch = make_batch(teacher, teacher)
    for loss in method(batch).values():
        torch.testing.assert_close(loss, torch.zeros(()), atol=1e-6, rtol=0)


def test_losses_are_mean_squared_errors(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    """The reference applies the adapters as matrices, to one region at a time."""
    student, teacher = pair[0].eval(), pair[1]
    method = make_two_stage_hkd(student, teacher, TwoStageConfig(pyramid=2.0, region=3.0, logit=5.0, num_proposals=4))
    batch = make_batch(student, teacher)
    losses = method(batch)
    levels, regions, logits = [], [], []
    for adapter, s, t in zip(
        method.pyramid_adapters, batch.student_features.values(), batch.teacher_features.values(), strict=True
    ):
        weight, bias = adapter.projection.weight[:, :, 0, 0], adapter.projection.bias
        adapted = torch.einsum("oi,bihw->bohw", weight, s) + bias[:, None, None]
        levels.append((adapted - t).pow(2).sum() / t.numel())
    for b in range(2):
        for box in [*TARGETS.boxes_xyxy[b], *batch.teacher_outputs.proposals[b][:4]]:
            rois = [torch.zeros(0, 4), torch.zeros(0, 4)]
            rois[b] = box[None]
            s = student.forward_rois(batch.student_outputs, rois)
            t = teacher.forward_rois(batch.teacher_outputs, rois)
            weight, bias = method.region_adapter.weight[:, :, 0, 0], method.region_adapter.bias
            pooled = torch.einsum("oi,rihw->rohw", weight, s.roi_features) + bias[:, None, None]
            regions.append((pooled - t.roi_features).pow(2).mean())
            logits.append(
                (s.box_features @ method.logit_adapter.weight.T + method.logit_adapter.bias - t.box_features)
                .pow(2)
                .mean()
            )
    assert len(regions) == 10
    torch.testing.assert_close(losses["hkd_pyramid"], 2 * torch.stack(levels).mean())
    torch.testing.assert_close(losses["hkd_region"], 3 * torch.stack(regions).mean())
    torch.testing.assert_close(losses["hkd_logit"], 5 * torch.stack(logits).mean())


def test_mse_per_item_matches_hand_calculation() -> None:
    errors = mse_per_item(torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[1.0, 4.0]], [[3.0, -1.0]]]))
    assert errors.tolist() == [2.0, 5.0]  # (0 + 4) / 2, (9 + 1) / 2


def test_rois_are_ground_truth_and_best_proposals(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    batch = make_batch(*pair)
    assert isinstance(batch.teacher_outputs, ProposalOutputs)
    for b, regions in enumerate(sample_rois(batch, 3)):
        assert torch.equal(regions, torch.cat([TARGETS.boxes_xyxy[b], batch.teacher_outputs.proposals[b][:3]]))
    ignored = replace(TARGETS, valid=torch.zeros(2, 1, dtype=torch.bool), ignore=torch.ones(2, 1, dtype=torch.bool))
    batch = replace(batch, targets=ignored)
    assert all(len(regions) == 3 for regions in sample_rois(batch, 3))


def test_losses_without_rois_are_finite(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    method = make_two_stage_hkd(*pair, TwoStageConfig(num_proposals=0))
    losses = method(make_batch(*pair, targets=NO_TARGETS))
    torch.stack(list(losses.values())).sum().backward()
    assert losses["hkd_region"] == losses["hkd_logit"] == 0 and losses["hkd_pyramid"] > 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in pair[0].parameters())


@pytest.mark.slow
def test_training_on_hkd_alone_reduces_loss(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    student, teacher = pair
    distiller = make_distiller(student, teacher, {"hkd": HKDConfig()})
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.methods.parameters()], lr=3e-3)
    history: dict[str, list[float]] = {}
    for _ in range(25):
        losses = distiller(IMAGES, TARGETS, 1.0)[1]
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        for name, loss in losses.items():
            history.setdefault(name, []).append(loss.item())
    assert all(values[-1] < 0.7 * values[0] for values in history.values()), history


def test_noise_perturbs_box_features_per_roi(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    batch = make_batch(*pair)
    assert isinstance(batch.teacher_outputs, ProposalOutputs)
    clean = pair[1].forward_rois(batch.teacher_outputs, sample_rois(batch, 60))
    noisy = NoisyTeacher(
        NoisyTeacherConfig("targets", alpha=0.5, sigma=0.3, granularity="sample"), *pair
    ).perturb_teacher(clean)
    factor = (noisy.box_features / clean.box_features).nanmean(1)
    assert torch.equal(noisy.roi_features, clean.roi_features) and 0.2 < (factor == 1).float().mean() < 0.8
    torch.testing.assert_close(noisy.box_features, factor[:, None] * clean.box_features)
    method = make_two_stage_hkd(*pair, TwoStageConfig())
    losses = [method(batch)]
    noise = NoisyTeacher(NoisyTeacherConfig("targets", alpha=1.0, sigma=3.0), *pair)
    losses.append(method(replace(batch, perturb=noise.perturb_teacher)))
    assert losses[0]["hkd_pyramid"] == losses[1]["hkd_pyramid"] and losses[0]["hkd_logit"] < losses[1]["hkd_logit"]


def test_dense_student_receives_noise_of_two_stage_teacher(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    """The noise changes the scores of the teacher's detections, which replace the logits, but no features or boxes."""
    student = HKDDetector(DENSE).eval()
    results = []
    for noise in (None, NoisyTeacherConfig("targets", alpha=1.0, sigma=1.0), NoisyTeacherConfig("targets", alpha=0.0)):
        distiller = make_distiller(student, pair[1], {"hkd": HKDConfig(), "noisy_teacher": noise})
        set_constant_adapters(distiller)
        results.append(distiller(IMAGES, TARGETS, 1.0)[1])
    clean, noisy, unperturbed = results
    assert clean["hkd_cls"] > 0 and (noisy["hkd_cls"] - clean["hkd_cls"]).abs() > 0.01 * clean["hkd_cls"]
    torch.testing.assert_close(noisy["hkd_pyramid"], clean["hkd_pyramid"])
    for name in clean:
        torch.testing.assert_close(unperturbed[name], clean[name])


def set_constant_adapters(distiller: Distiller) -> None:
    """Set all adapter weights to one constant."""
    for parameter in distiller.methods.parameters():
        nn.init.constant_(parameter, 0.01)


def test_dense_teacher_trains_two_stage_student(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    student, teacher = pair[0], HKDDetector(DENSE)
    distiller = make_distiller(student, teacher, {"hkd": HKDConfig()})
    assert isinstance(distiller.methods[0].levels, DenseHKD)
    losses = distiller(IMAGES, TARGETS, 1.0)[1]
    assert losses.keys() == {"hkd_pyramid", "hkd_region", "hkd_cls", "hkd_box"}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), name
        assert all(g is None or torch.isfinite(g).all() for g in gradients), name


def make_detections(boxes: list[list[float]], scores: list[float]) -> DetectionBatch:
    """Return the same detections for both images."""
    return DetectionBatch((torch.tensor(boxes).view(-1, 4),) * 2, (torch.tensor(scores),) * 2)


def test_roi_losses_are_zero_for_matching_student(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    """The teacher detections are the boxes and scores that the student predicts."""
    student = pair[0].eval()
    with torch.no_grad():
        output = replace(student(IMAGES), proposals=(torch.zeros(0, 4),) * 2)
        nn.init.zeros_(student.roi_heads.box_predictor.bbox_pred.weight)  # decoded boxes equal the RoIs
        nn.init.zeros_(student.roi_heads.box_predictor.bbox_pred.bias)
        boxes = torch.tensor([[5.0, 5.0, 30.0, 60.0], [20.0, 3.0, 50.0, 40.0]])
        scores = student.forward_rois(output, [boxes, boxes]).logits.sigmoid()
        detections = DetectionBatch((boxes, boxes), (scores[:2], scores[2:]))
        score, box = roi_soft_label_losses(student, output, detections, clamp_min_one)
    assert score.abs() < 1e-6 and box.abs() < 1e-5


def test_roi_losses_match_hand_calculation(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    """Scores: Bernoulli KL divergence at the teacher box. Boxes: 1 - GIoU there and at the one proposal near it."""
    student = pair[0].eval()
    with torch.no_grad():
        nn.init.zeros_(student.roi_heads.box_predictor.bbox_pred.weight)
        nn.init.zeros_(student.roi_heads.box_predictor.bbox_pred.bias)
        near, far = [10.0, 10.0, 30.0, 40.0], [40.0, 40.0, 60.0, 60.0]
        output = replace(student(IMAGES), proposals=(torch.tensor([near, far]),) * 2)
        box = [10.0, 10.0, 30.0, 50.0]
        detections = make_detections([box], [0.8])
        score_loss, box_loss = roi_soft_label_losses(student, output, detections, clamp_min_one)
        s = student.forward_rois(output, list(detections.boxes_xyxy)).logits.sigmoid()
    t = torch.tensor(0.8)
    divergence = t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()
    torch.testing.assert_close(score_loss, divergence.mean(), atol=1e-5, rtol=1e-4)
    # The loss is 0 at the teacher box and 1 - 30/40 at the near proposal. The far one is not used. Each weight is 0.8.
    weight = max(4 * 0.8, 1.0)
    torch.testing.assert_close(box_loss, torch.tensor(2 * 0.8 * 0.25 / weight))


def test_duplicate_with_low_score_is_ignored(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    """An end-to-end teacher scores a duplicate of its best box near 0; both boxes contain the same person."""
    student = pair[0].eval()
    best, duplicate, separate = [10.0, 10.0, 30.0, 50.0], [11.0, 10.0, 31.0, 50.0], [40.0, 5.0, 60.0, 45.0]
    with torch.no_grad():
        output = student(IMAGES)
        expected = roi_soft_label_losses(student, output, make_detections([best, separate], [0.9, 0.1]), clamp_min_one)
        actual = roi_soft_label_losses(
            student, output, make_detections([duplicate, best, separate], [1e-9, 0.9, 0.1]), clamp_min_one
        )
    torch.testing.assert_close(actual, expected)


def test_empty_teacher_detections_give_zero_losses(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    student = pair[0]
    losses = roi_soft_label_losses(student, student(IMAGES), make_detections([], []), clamp_min_one)
    torch.stack(losses).sum().backward()
    assert all(loss == 0 for loss in losses)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in student.parameters())


def test_teacher_score_of_one_gives_finite_loss(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    student = pair[0]
    score, _ = roi_soft_label_losses(
        student, student(IMAGES), make_detections([[5.0, 5.0, 30.0, 60.0]], [1.0]), clamp_min_one
    )
    assert torch.isfinite(score) and score > 0


def test_setting_without_effect_raises_usage_error(pair: tuple[FasterRCNN, FasterRCNN]) -> None:
    with pytest.raises(UsageError, match=r"hkd\.pyramid: no effect"):
        make_distiller(*pair, {"hkd": HKDConfig(pyramid=5.0)})
    with pytest.raises(UsageError, match=r"hkd\.two_stage: no effect"):
        make_distiller(pair[0], HKDDetector(DENSE), {"hkd": HKDConfig(two_stage=TwoStageConfig(logit=5.0))})
    make_distiller(*pair, {"hkd": HKDConfig(two_stage=TwoStageConfig(logit=5.0), det_loss_weight=0.5, adapter="norm")})


def test_invalid_hkd_config_raises_usage_error() -> None:
    from hkd_det.distill.mokd import MoKDConfig

    with pytest.raises(UsageError, match="det_loss_weight"):
        check_methods({"hkd": HKDConfig(det_loss_weight=0.0), "mokd": MoKDConfig()})
    with pytest.raises(UsageError, match="0 to 1"):
        HKDConfig(det_loss_weight=2.0)
    for wrong in ({"fg_ratio": 1.5}, {"region_min_score": -0.1}, {"region": -1.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            HKDConfig(**wrong)
    with pytest.raises(UsageError, match="num_proposals"):
        TwoStageConfig(num_proposals=-1)
