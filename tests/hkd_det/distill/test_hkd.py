"""HKD for dense detectors: feature hooks, adapters, losses of the three levels, training."""

import gc
import weakref
from typing import Any

import pytest
import torch

from hkd_det.distill import parse_methods
from hkd_det.distill.base import RunContext
from hkd_det.distill.batch import Adapter, DistillationBatch
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.distill.hkd import DenseHKD, HKDConfig, LevelStart, make_foreground_weights
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, BranchOutputs, DenseOutputs, DetectionBatch, FeatureInfo, Targets
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.feature_layers import FeatureHooks, pair_by_stride
from hkd_det.models.head import make_anchors
from hkd_det.ops.boxes import points_in_boxes
from hkd_det.ops.losses import clamp_min_one, fg_balanced_mean, pkd_loss
from hkd_det.ops.roi_pool import roi_feature_loss

STUDENT = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
TEACHER = HKDDetectorSpec("resnet10t", {"channels": (8, 16, 16, 32), "stem_width": 8}, channels=24, head_depth=1)


def make_distiller(student: BaseDetector, teacher: Any, methods: dict[str, Any]) -> Distiller:
    return Distiller(student, teacher, build_methods(parse_methods(methods), student, teacher))


def make_targets(*boxes: list[float]) -> Targets:
    tensor = torch.tensor([boxes], dtype=torch.float32).view(1, -1, 4)
    return Targets(tensor, torch.ones(1, len(boxes), dtype=torch.bool), torch.zeros(1, len(boxes), dtype=torch.bool))


ONE_PERSON = make_targets([10.0, 10.0, 40.0, 60.0])
IMAGE = torch.randint(0, 255, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def pair() -> tuple[HKDDetector, HKDDetector]:
    torch.manual_seed(0)
    return HKDDetector(STUDENT).train(), HKDDetector(TEACHER)


def test_feature_hooks_pop_returns_and_clears_outputs(pair: tuple[HKDDetector, HKDDetector]) -> None:
    student, _ = pair
    recorder = FeatureHooks(student, [layer.name for layer in student.feature_info()])
    maps = student.forward_features(IMAGE)
    assert all(torch.equal(a, b) for a, b in zip(recorder.pop(), maps, strict=True))
    with pytest.raises(KeyError):
        recorder.pop()
    recorder.close()
    student.forward_features(IMAGE)
    with pytest.raises(KeyError):
        recorder.pop()


def test_unknown_feature_layer_raises_usage_error(pair: tuple[HKDDetector, HKDDetector]) -> None:
    with pytest.raises(UsageError, match=r"neck\.nothing"):
        FeatureHooks(pair[0], ["neck.nothing"])


@pytest.mark.parametrize(("student_stride", "teacher_stride"), [(8, 8), (8, 16), (32, 16)])
def test_adapter_matches_channels_and_stride(student_stride: int, teacher_stride: int) -> None:
    adapter = Adapter(FeatureInfo("s", student_stride, 5), FeatureInfo("t", teacher_stride, 7))
    outputs = adapter(torch.zeros(2, 5, 64 // student_stride, 96 // student_stride))
    assert outputs.shape == (2, 7, 64 // teacher_stride, 96 // teacher_stride)


def test_adapter_with_indivisible_strides_raises_usage_error() -> None:
    message = r"^feature layers s \(student\) and t \(teacher\): .*, got 12 and 8\. Choose other layers\.$"
    with pytest.raises(UsageError, match=message):
        Adapter(FeatureInfo("s", 12, 5), FeatureInfo("t", 8, 7))


def test_pair_by_stride_selects_nearest_stride() -> None:
    student = [FeatureInfo("s8", 8, 1), FeatureInfo("s16", 16, 1)]
    teacher = [FeatureInfo("t4", 4, 1), FeatureInfo("t16", 16, 1), FeatureInfo("t32", 32, 1)]
    assert [(a.name, b.name) for a, b in pair_by_stride(student, teacher)] == [
        ("s8", "t4"), ("s16", "t16"), ("s16", "t32"),
    ]  # fmt: skip


def test_every_level_has_loss_and_gradient(pair: tuple[HKDDetector, HKDDetector]) -> None:
    student, teacher = pair
    distiller = make_distiller(student, teacher, {"hkd": HKDConfig()})
    losses = distiller(IMAGE, ONE_PERSON, 1.0)[1]
    assert set(losses) == {"hkd_pyramid", "hkd_region", "hkd_cls", "hkd_box"}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_teacher_is_not_trained(pair: tuple[HKDDetector, HKDDetector]) -> None:
    student, teacher = pair
    distiller = make_distiller(student, teacher, {"hkd": HKDConfig()})
    trained = {id(parameter) for parameter in distiller.parameters()}
    assert not trained & {id(parameter) for parameter in teacher.parameters()}
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distiller(IMAGE, ONE_PERSON, 1.0)[1]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_teacher_runs_once_per_batch(pair: tuple[HKDDetector, HKDDetector]) -> None:
    student, teacher = pair
    distiller = make_distiller(student.eval(), teacher, {"hkd": HKDConfig()})
    losses = distiller(IMAGE, ONE_PERSON, 1.0)[1]
    assert distiller(IMAGE, ONE_PERSON, 1.0)[1] == losses
    next_image = 255 - IMAGE  # the teacher runs again for the next batch
    assert distiller(next_image, ONE_PERSON, 1.0)[1]["hkd_cls"] != losses["hkd_cls"]


def test_distill_weight_scales_every_loss(pair: tuple[HKDDetector, HKDDetector]) -> None:
    student, teacher = pair
    distiller = make_distiller(student.eval(), teacher, {"hkd": HKDConfig()})
    full = distiller(IMAGE, ONE_PERSON, 1.0)[1]
    half = distiller(IMAGE, ONE_PERSON, 0.5)[1]
    for name in full:
        torch.testing.assert_close(half[name] * 2, full[name])


def test_equal_student_and_teacher_have_zero_loss() -> None:
    torch.manual_seed(0)
    detector = HKDDetector(TEACHER).eval()
    layers = detector.feature_info()
    method = DenseHKD(list(zip(layers, layers, strict=True)), HKDConfig(region_min_score=0.0))
    for adapter in method.adapters:
        torch.nn.init.dirac_(adapter.projection.weight)
        torch.nn.init.zeros_(adapter.projection.bias)
    with torch.no_grad():
        outputs, levels = detector(IMAGE), detector.forward_features(IMAGE)
        features = {layer.name: level for layer, level in zip(layers, levels, strict=True)}
        batch = DistillationBatch(
            IMAGE, ONE_PERSON, detector, detector, outputs, outputs, features, features, clamp_min_one
        )
        losses = method(batch)
    for loss in losses.values():
        torch.testing.assert_close(loss, torch.zeros(()), atol=1e-4, rtol=0)


def test_logit_losses_match_their_formulas(pair: tuple[HKDDetector, HKDDetector]) -> None:
    """The reference sums over points: scores of both branches, and box sides weighted by the teacher score."""
    student, teacher = pair[0].eval(), pair[1].eval()
    with torch.no_grad():
        torch.nn.init.normal_(teacher.head.one2many.weight, std=20.0)  # scores between 0 and 1
        torch.nn.init.zeros_(teacher.head.one2many.bias)
        distiller = make_distiller(student, teacher, {"hkd": HKDConfig(cls=3.0, box=5.0)})
        student_outputs, teacher_outputs = student(IMAGE), teacher(IMAGE)
        losses = distiller(IMAGE, ONE_PERSON, 1.0)[1]
    scores, boxes, confidence = 0.0, 0.0, teacher_outputs.one2many.logits[0].sigmoid()
    for a, b in (
        (student_outputs.one2many, teacher_outputs.one2many),
        (student_outputs.one2one, teacher_outputs.one2one),
    ):
        s, t = (branch.logits[0].double().sigmoid() for branch in (a, b))
        divergence = t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()
        scores += ((t - s).abs() * divergence).sum() / t.sum().clamp(min=1)
    for point, weight in enumerate(confidence):
        for side in range(4):
            q, p = (
                (outputs.one2many.box_logits[0, point, side] / 2).softmax(-1)
                for outputs in (student_outputs, teacher_outputs)
            )
            boxes += weight * (p * (p / q).log()).sum() * 4 / 4  # temperature 2 squared, mean of four sides
    assert confidence.max() > 0.5 > confidence.min()
    torch.testing.assert_close(losses["hkd_cls"].double(), 3 * scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(losses["hkd_box"], 5 * boxes / confidence.sum().clamp(min=1), atol=1e-5, rtol=1e-3)


def test_pyramid_and_region_losses_read_persons() -> None:
    """Image 1 has one person and padding, image 2 two persons. Two of the teacher boxes reach the minimum score."""
    rng = torch.Generator().manual_seed(3)
    boxes = torch.tensor([[[10.0, 8, 40, 60], [0, 0, 0, 0]], [[-5, 4, 20, 50], [30, 12, 52, 64]]])
    valid = torch.tensor([[True, False], [True, True]])
    targets = Targets(boxes, valid, torch.zeros_like(valid))
    teacher_boxes = torch.tensor([[12.0, 9, 45, 63], [20, 0, 30, 20], [50, 40, 60, 64]])
    detections = DetectionBatch((teacher_boxes, torch.zeros(0, 4)), (torch.tensor([0.9, 0.5, 0.3]), torch.zeros(0)))
    layer = FeatureInfo("t", 8, 6)
    method = DenseHKD([(layer, layer)], HKDConfig(pyramid=1.0, region_min_score=0.4, max_regions=2))
    student_features, teacher_features = torch.randn(2, 2, 6, 8, 8, generator=rng)
    outputs = DenseOutputs(
        BranchOutputs(torch.zeros(2, 64), torch.zeros(2, 64, 4)), None, *make_anchors((64, 64), (8,)), (64, 64)
    )

    class Teacher:
        def postprocess(self, _output: object) -> DetectionBatch:
            return detections

    detector = HKDDetector(STUDENT)
    features = ({"t": student_features}, {"t": teacher_features})
    batch = DistillationBatch(
        student_features, targets, detector, Teacher(), outputs, outputs, *features, clamp_min_one
    )
    losses = method(batch)
    adapted = method.adapters[0](student_features)
    regions = torch.stack([boxes[0, 0], teacher_boxes[0], teacher_boxes[1], boxes[1, 0], boxes[1, 1]])
    region_loss = roi_feature_loss([adapted], [teacher_features], (8,), regions, torch.tensor([0, 0, 0, 1, 1]))
    torch.testing.assert_close(losses["hkd_region"], region_loss.mean())
    inside = points_in_boxes(outputs.anchor_points, boxes) & valid[..., None]
    balanced = fg_balanced_mean(pkd_loss(adapted, teacher_features), inside.any(1).view(2, 8, 8), 0.5)
    torch.testing.assert_close(losses["hkd_pyramid"], balanced.mean())


def test_every_person_has_the_same_total_weight() -> None:
    """Boxes of 4 x 8 and 2 x 2 cells apart from each other, and a third one of 2 x 2 cells inside the first."""
    boxes = torch.tensor([[[0.0, 0, 32, 64], [40, 0, 56, 16], [0, 0, 16, 16]]])
    valid = torch.ones(1, 3, dtype=torch.bool)
    targets = Targets(boxes, valid, torch.zeros_like(valid))
    expected = torch.zeros(1, 8, 8)
    expected[0, :, :4] = 1 / 32
    expected[0, :2, 5:7] = expected[0, :2, :2] = 1 / 4
    torch.testing.assert_close(make_foreground_weights((8, 8), 8, targets, "person"), expected)
    torch.testing.assert_close(make_foreground_weights((8, 8), 8, targets, "cell"), (expected > 0).float())


def test_levels_start_at_their_step(pair: tuple[HKDDetector, HKDDetector]) -> None:
    """20 steps, half of them with distillation: the features start at step 5, and the box loss at step 8."""
    student, teacher = pair
    config = HKDConfig(start=LevelStart(pyramid=0.5, region=0.5, box=0.8))
    distiller = make_distiller(student, teacher, {"hkd": config})
    distiller.methods[0].setup(RunContext(total_steps=20, distill_ratio=0.5))
    active = {}
    for step in (0, 4, 5, 7, 8):
        distiller.before_step(step)
        losses = distiller(IMAGE, ONE_PERSON, 1.0)[1]
        active[step] = [name for name in ("pyramid", "region", "cls", "box") if losses[f"hkd_{name}"] > 0]
    assert active[0] == active[4] == ["cls"]
    assert active[5] == active[7] == ["pyramid", "region", "cls"]
    assert active[8] == ["pyramid", "region", "cls", "box"]


def test_features_do_not_outlive_the_step(pair: tuple[HKDDetector, HKDDetector]) -> None:
    """After the step, no object keeps a reference to a recorded feature map."""
    student, teacher = pair
    distiller = make_distiller(student, teacher, {"hkd": {}, "noisy_teacher": {}})
    recorded: list[weakref.ref[torch.Tensor]] = []
    names = [(student, layer.name) for layer in student.feature_info()] + [
        (teacher, layer.name) for layer in teacher.feature_info()
    ]
    for network, name in names:
        network.get_submodule(name).register_forward_hook(lambda _m, _i, out: recorded.append(weakref.ref(out)))

    def step(distill_weight: float) -> None:
        det_losses, distill_losses = distiller(IMAGE, ONE_PERSON, distill_weight)
        torch.stack(list((det_losses | distill_losses).values())).sum().backward()

    gc.disable()  # references must be released without the garbage collector
    try:
        for distill_weight, num_maps in ((1.0, 6), (0.0, 3)):
            step(distill_weight)
            assert len(recorded) == num_maps and all(ref() is None for ref in recorded)
            recorded.clear()
    finally:
        gc.enable()


def test_image_without_persons_gives_finite_losses(pair: tuple[HKDDetector, HKDDetector]) -> None:
    student, teacher = pair
    distiller = make_distiller(student, teacher, {"hkd": HKDConfig(max_regions=0)})
    losses = distiller(IMAGE, make_targets(), 1.0)[1]
    torch.stack(list(losses.values())).sum().backward()
    assert losses["hkd_region"] == 0
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in student.parameters())


@pytest.mark.slow
def test_training_on_hkd_alone_reduces_loss(pair: tuple[HKDDetector, HKDDetector]) -> None:
    student, teacher = pair
    distiller = make_distiller(student, teacher, {"hkd": HKDConfig()})
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.methods.parameters()], lr=3e-3)
    history = []
    for _ in range(25):
        losses = distiller(IMAGE, ONE_PERSON, 1.0)[1]
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]
