"""Taps, adapters and the three levels of hierarchical distillation."""

import gc
import weakref
from typing import Any

import pytest
import torch

from hkd_det.distill import parse_methods
from hkd_det.distill.adapters import Adapter
from hkd_det.distill.base import DistillationBatch
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.distill.hkd import DenseHKD, HKDConfig
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, BranchOutputs, DenseOutputs, DetectionBatch, FeatureInfo, Targets
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.feature_layers import pair_by_stride
from hkd_det.models.head import make_anchors
from hkd_det.ops.boxes import points_in_boxes
from hkd_det.ops.hooks import FeatureHooks
from hkd_det.ops.losses import clamp_min_one, fg_balanced_mean, pkd_loss
from hkd_det.ops.roi_pool import roi_feature_loss

STUDENT = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
TEACHER = HKDDetectorSpec("resnet10t", {"channels": (8, 16, 16, 32), "stem_width": 8}, channels=24, head_depth=1)


def make_distiller(student: BaseDetector, teacher: Any, methods: dict[str, Any]) -> Distiller:
    return Distiller(student, teacher, build_methods(parse_methods(methods), student, teacher))


def truth(*boxes: list[float]) -> Targets:
    tensor = torch.tensor([boxes], dtype=torch.float32).view(1, -1, 4)
    return Targets(tensor, torch.ones(1, len(boxes), dtype=torch.bool), torch.zeros(1, len(boxes), dtype=torch.bool))


ONE_PERSON = truth([10.0, 10.0, 40.0, 60.0])
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


@pytest.mark.parametrize(("mine", "other"), [(8, 8), (8, 16), (32, 16)])
def test_adapter_matches_channels_and_stride(mine: int, other: int) -> None:
    adapter = Adapter(FeatureInfo("s", mine, 5), FeatureInfo("t", other, 7))
    assert adapter(torch.zeros(2, 5, 64 // mine, 96 // mine)).shape == (2, 7, 64 // other, 96 // other)


def test_adapter_with_indivisible_strides_raises_usage_error() -> None:
    with pytest.raises(UsageError):
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
    terms = distiller(IMAGE, ONE_PERSON, 1.0)[1]
    assert set(terms) == {"hkd_pyramid", "hkd_region", "hkd_cls", "hkd_box"}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, list(student.parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_teacher_is_not_trained(pair: tuple[HKDDetector, HKDDetector]) -> None:
    student, teacher = pair
    distiller = make_distiller(student, teacher, {"hkd": HKDConfig()})
    ours = {id(parameter) for parameter in distiller.parameters()}
    assert not ours & {id(parameter) for parameter in teacher.parameters()}
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distiller(IMAGE, ONE_PERSON, 1.0)[1]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_teacher_runs_once_per_batch(pair: tuple[HKDDetector, HKDDetector]) -> None:
    student, teacher = pair
    distiller = make_distiller(student.eval(), teacher, {"hkd": HKDConfig()})
    after = distiller(IMAGE, ONE_PERSON, 1.0)[1]
    assert distiller(IMAGE, ONE_PERSON, 1.0)[1] == after
    other = 255 - IMAGE  # the next batch is heard anew
    assert distiller(other, ONE_PERSON, 1.0)[1]["hkd_cls"] != after["hkd_cls"]


def test_distill_weight_scales_every_loss(pair: tuple[HKDDetector, HKDDetector]) -> None:
    student, teacher = pair
    distiller = make_distiller(student.eval(), teacher, {"hkd": HKDConfig()})
    full = distiller(IMAGE, ONE_PERSON, 1.0)[1]
    half = distiller(IMAGE, ONE_PERSON, 0.5)[1]
    for name in full:
        torch.testing.assert_close(half[name] * 2, full[name])


def test_equal_student_and_teacher_have_zero_loss() -> None:
    torch.manual_seed(0)
    twin = HKDDetector(TEACHER).eval()
    taps = twin.feature_info()
    method = DenseHKD(list(zip(taps, taps, strict=True)), HKDConfig(region_min_score=0.0))
    for adapter in method.adapters:
        torch.nn.init.dirac_(adapter.projection.weight)
        torch.nn.init.zeros_(adapter.projection.bias)
    with torch.no_grad():
        outputs, prediction = twin.forward_features(IMAGE), twin(IMAGE)
        maps = {tap.name: feature for tap, feature in zip(taps, outputs, strict=True)}
        lesson = DistillationBatch(IMAGE, ONE_PERSON, twin, twin, prediction, prediction, maps, maps, clamp_min_one)
        terms = method(lesson)
    for term in terms.values():
        torch.testing.assert_close(term, torch.zeros(()), atol=1e-4, rtol=0)


def test_logit_losses_match_their_formulas(pair: tuple[HKDDetector, HKDDetector]) -> None:
    """Worked out point by point: both branches' scores, and the sides weighted by the teacher's score."""
    student, teacher = pair[0].eval(), pair[1].eval()
    with torch.no_grad():
        torch.nn.init.normal_(teacher.head.one2many.weight, std=20.0)  # some points of any confidence
        torch.nn.init.zeros_(teacher.head.one2many.bias)
        distiller = make_distiller(student, teacher, {"hkd": HKDConfig(cls=3.0, box=5.0)})
        mine, other = student(IMAGE), teacher(IMAGE)
        terms = distiller(IMAGE, ONE_PERSON, 1.0)[1]
    scores, boxes, confidence = 0.0, 0.0, other.one2many.logits[0].sigmoid()
    for a, b in ((mine.one2many, other.one2many), (mine.one2one, other.one2one)):
        s, t = (branch.logits[0].double().sigmoid() for branch in (a, b))
        divergence = t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()
        scores += ((t - s).abs() * divergence).sum() / t.sum().clamp(min=1)
    for point, weight in enumerate(confidence):
        for side in range(4):
            q, p = ((of_one.one2many.box_logits[0, point, side] / 2).softmax(-1) for of_one in (mine, other))
            boxes += weight * (p * (p / q).log()).sum() * 4 / 4  # temperature 2 squared, mean of four sides
    assert confidence.max() > 0.5 > confidence.min()
    torch.testing.assert_close(terms["hkd_cls"].double(), 3 * scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(terms["hkd_box"], 5 * boxes / confidence.sum().clamp(min=1), atol=1e-5, rtol=1e-3)


def test_pyramid_and_region_losses_read_persons() -> None:
    """Two pictures, one of the people in them padding; the teacher finds three and none, two of them well enough."""
    rng = torch.Generator().manual_seed(3)
    boxes = torch.tensor([[[10.0, 8, 40, 60], [0, 0, 0, 0]], [[-5, 4, 20, 50], [30, 12, 52, 64]]])
    real = torch.tensor([[True, False], [True, True]])
    people = Targets(boxes, real, torch.zeros_like(real))
    seen = torch.tensor([[12.0, 9, 45, 63], [20, 0, 30, 20], [50, 40, 60, 64]])
    found = DetectionBatch((seen, torch.zeros(0, 4)), (torch.tensor([0.9, 0.5, 0.3]), torch.zeros(0)))
    tap = FeatureInfo("t", 8, 6)
    method = DenseHKD([(tap, tap)], HKDConfig(pyramid=1.0, region_min_score=0.4, max_regions=2))
    mine, other = torch.randn(2, 2, 6, 8, 8, generator=rng)
    silent = DenseOutputs(
        BranchOutputs(torch.zeros(2, 64), torch.zeros(2, 64, 4)), None, *make_anchors((64, 64), (8,)), (64, 64)
    )

    class Teacher:
        def postprocess(self, _output: object) -> DetectionBatch:
            return found

    detector = HKDDetector(STUDENT)
    lesson = DistillationBatch(
        mine, people, detector, Teacher(), silent, silent, {"t": mine}, {"t": other}, clamp_min_one
    )
    terms = method(lesson)
    adapted = method.adapters[0](mine)
    read = torch.stack([boxes[0, 0], seen[0], seen[1], boxes[1, 0], boxes[1, 1]])
    regions = roi_feature_loss([adapted], [other], (8,), read, torch.tensor([0, 0, 0, 1, 1]))
    torch.testing.assert_close(terms["hkd_region"], regions.mean())
    inside = points_in_boxes(silent.anchor_points, boxes) & real[..., None]
    balanced = fg_balanced_mean(pkd_loss(adapted, other), inside.any(1).view(2, 8, 8), 0.5)
    torch.testing.assert_close(terms["hkd_pyramid"], balanced.mean())


def test_features_do_not_outlive_the_step(pair: tuple[HKDDetector, HKDDetector]) -> None:
    """Whoever still held a map, its output would not be gone when the step's own names are."""
    student, teacher = pair
    distiller = make_distiller(student, teacher, {"hkd": {}, "noisy_teacher": {}})
    alive: list[weakref.ref[torch.Tensor]] = []
    names = [(student, tap.name) for tap in student.feature_info()] + [
        (teacher, tap.name) for tap in teacher.feature_info()
    ]
    for network, name in names:
        network.get_submodule(name).register_forward_hook(lambda _m, _i, out: alive.append(weakref.ref(out)))

    def step(strength: float) -> None:
        det_losses, distill_losses = distiller(IMAGE, ONE_PERSON, strength)
        torch.stack(list((det_losses | distill_losses).values())).sum().backward()

    gc.disable()  # what only the collector frees is held for too long
    try:
        for strength, maps in ((1.0, 6), (0.0, 3)):
            step(strength)
            assert len(alive) == maps and all(ref() is None for ref in alive)
            alive.clear()
    finally:
        gc.enable()


def test_image_without_persons_gives_finite_losses(pair: tuple[HKDDetector, HKDDetector]) -> None:
    student, teacher = pair
    distiller = make_distiller(student, teacher, {"hkd": HKDConfig(region_min_score=1.1)})
    terms = distiller(IMAGE, truth(), 1.0)[1]
    torch.stack(list(terms.values())).sum().backward()
    assert terms["hkd_region"] == 0
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in student.parameters())


def test_training_on_hkd_alone_reduces_loss(pair: tuple[HKDDetector, HKDDetector]) -> None:
    student, teacher = pair
    distiller = make_distiller(student, teacher, {"hkd": HKDConfig()})
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.methods.parameters()], lr=3e-3)
    history = []
    for _ in range(25):
        terms = distiller(IMAGE, ONE_PERSON, 1.0)[1]
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]
