"""Channel pruning: lasso, schedule, masking, fading and the target; losses of the method."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hkd_det.distill.batch import DistillationBatch
from hkd_det.distill.cdd.compactor import (
    apply_proximal_step,
    compute_group_lasso,
    compute_group_lasso_gradient,
    reset_gradient,
)
from hkd_det.distill.cdd.importance import ChannelCostModel
from hkd_det.distill.cdd.losses import CDDConfig, CDDLoss
from hkd_det.distill.cdd.pruner import ChannelPruner, PruningSchedule, prepare_pruning
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, Targets
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.criterion import DetectionCriterion
from hkd_det.models.feature_layers import FeatureHooks
from hkd_det.models.surgery import PrunableLayer
from hkd_det.ops.losses import clamp_min_one
from hkd_det.ops.roi_pool import BoxAveragePool

HW = (64, 96)
IMAGES = torch.randint(0, 255, (2, 3, *HW), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
TARGETS = Targets(
    torch.tensor([[[10.0, 10.0, 40.0, 60.0]], [[50.0, 5.0, 70.0, 60.0]]]),
    torch.ones(2, 1, dtype=torch.bool),
    torch.zeros(2, 1, dtype=torch.bool),
)


def test_lasso_gradient_matches_finite_differences() -> None:
    torch.manual_seed(0)
    rows = torch.randn(4, 5, dtype=torch.float64)
    step = 1e-6
    for i in range(4):
        for j in range(5):
            offset = torch.zeros_like(rows)
            offset[i, j] = step
            numeric = (compute_group_lasso(rows + offset) - compute_group_lasso(rows - offset)) / (2 * step)
            torch.testing.assert_close(compute_group_lasso_gradient(rows)[i, j], numeric, atol=1e-6, rtol=1e-6)


def test_zero_row_has_zero_gradient() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    torch.testing.assert_close(compute_group_lasso_gradient(rows), torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    assert torch.equal(apply_proximal_step(rows, 0.1)[0], torch.zeros(2))


def test_masked_rows_get_only_the_lasso_gradient() -> None:
    rows, gradient = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[7.0, -7.0], [1.0, 1.0]])
    reset = reset_gradient(gradient, rows, torch.tensor([True, False]), 0.1)
    torch.testing.assert_close(reset, torch.tensor([[0.06, 0.08], [1.0, 1.1]]))


def test_proximal_step_minimizes_its_objective() -> None:
    """No point of a fine grid has a lower value of 1/2 |x - w|^2 + threshold |x|."""
    row, threshold = torch.tensor([[0.3, 0.4]]), 0.2
    grid = torch.cartesian_prod(torch.linspace(-0.5, 0.5, 201), torch.linspace(-0.5, 0.5, 201))
    best = grid[(0.5 * (grid - row).square().sum(1) + threshold * grid.norm(dim=1)).argmin()]
    torch.testing.assert_close(apply_proximal_step(row, threshold)[0], best, atol=6e-3, rtol=0)
    assert torch.equal(apply_proximal_step(row, 0.6), torch.zeros(1, 2)) and torch.equal(
        apply_proximal_step(row, float("inf")), torch.zeros(1, 2)
    )


def test_schedule_falls_from_warmup_to_its_end() -> None:
    schedule = PruningSchedule.from_config(CDDConfig(warmup_ratio=0.2, mask_end=0.5, fade_ratio=0.1), 100, 0.8)
    assert (schedule.start, schedule.end) == (0.2, 0.4) and schedule.fade_end == pytest.approx(0.5)
    assert [schedule.remaining_excess(progress) for progress in (0.1, 0.2, 0.4, 1.0)] == [1, 1, 0, 0]
    assert schedule.remaining_excess(0.35) == pytest.approx(0.25)
    with pytest.raises(UsageError, match="too short"):
        PruningSchedule.from_config(CDDConfig(), 100, 0.2)


def test_comparison_interval_shrinks_in_short_runs() -> None:
    config = CDDConfig(warmup_ratio=0.25, mask_end=0.75, compare_interval=16)
    assert [
        PruningSchedule.from_config(config, steps, 1.0).compare_interval for steps in (10, 100, 256, 1000, 10000)
    ] == [1, 1, 4, 15, 16]
    schedule = PruningSchedule.from_config(config, 256, 1.0)
    assert [step for step in range(256) if schedule.is_comparison_step(step)] == [*range(0, 191, 4), *range(191, 256)]
    assert PruningSchedule.from_config(replace(config, compare_interval=1), 10000, 1.0).compare_interval == 1


@pytest.mark.slow
def test_steps_without_comparison_mask_nothing(native_detector: BaseDetector) -> None:
    trainer = Trainer(native_detector, build_from_spec(native_detector.spec), CDDConfig(keep_flops=0.8), 12)
    trainer.pruner.schedule = replace(trainer.pruner.schedule, compare_interval=4)
    compared, masked = [], []
    for step in range(12):
        trainer.train_step(step)
        compared.append(bool(trainer.method.pooled_features))
        masked.append(sum(int(compactor.masked.sum()) for compactor in trainer.pruner.compactors))
    # Masking starts after step 1 and ends in step 7, when the target is met and no comparison is needed.
    assert [step for step in range(12) if compared[step]] == [0, 4, 7]
    assert masked[:4] == [0] * 4 and 0 < masked[4] == masked[6] < masked[7] == masked[-1]
    assert trainer.pruner.target_reached


@pytest.mark.parametrize(("key", "unit"), [("keep_flops", "FLOPs"), ("keep_parameters", "parameters")])
def test_unreachable_target_raises_usage_error(native_detector: BaseDetector, key: str, unit: str) -> None:
    config = CDDConfig(**{"keep_flops": 1.0, "keep_parameters": 1.0, key: 0.05})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=rf"{key}=0\.05: .*keeps at least 0\.\d+ of its {unit}\. Set a larger value"):
        prepare_pruning(native_detector, config, HW, "native")


def make_batch(method: CDDLoss, student: BaseDetector, teacher: BaseDetector) -> DistillationBatch:
    """Run both networks and record the layers that the method reads."""
    hooks = FeatureHooks(student, method.layers.student), FeatureHooks(teacher, method.layers.teacher, clone=True)
    student_outputs = student(IMAGES)
    with torch.no_grad():
        teacher_outputs = teacher(IMAGES)
    names = (method.layers.student, method.layers.teacher)
    student_features, teacher_features = (dict(zip(n, h.pop(), strict=True)) for n, h in zip(names, hooks, strict=True))
    for hook in hooks:
        hook.close()
    return DistillationBatch(
        IMAGES, TARGETS, student, teacher, student_outputs, teacher_outputs, student_features, teacher_features,
        clamp_min_one,
    )  # fmt: skip


class Trainer:
    """Runs distilled training steps of a student on one batch."""

    def __init__(self, student: BaseDetector, teacher: BaseDetector, config: CDDConfig, steps: int) -> None:
        self.student, self.teacher = student.train(), teacher.eval().requires_grad_(False)
        self.cost_model: ChannelCostModel = prepare_pruning(student, config, HW, "student")
        self.method = CDDLoss(student, teacher, config)
        schedule = PruningSchedule.from_config(config, steps, 1.0)
        self.pruner = ChannelPruner(self.method, self.cost_model, config, schedule, lambda vectors: [vectors])
        self.optimizer = torch.optim.AdamW([*student.parameters(), *self.method.parameters()], lr=1e-2)

    def train_step(self, step: int) -> None:
        self.pruner.before_step(step)
        batch = make_batch(self.method, self.student, self.teacher)
        losses = [*DetectionCriterion()(batch.student_outputs, TARGETS).values(), *self.method(batch).values()]
        loss = torch.stack(losses).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.pruner.after_backward(step)
        self.optimizer.step()
        self.pruner.after_step()

    @property
    def rows(self) -> list[torch.Tensor]:
        return [compactor.rows.detach().clone() for compactor in self.pruner.compactors]


@pytest.mark.slow
def test_masked_channels_fade_and_the_target_is_met(native_detector: BaseDetector) -> None:
    config = CDDConfig(keep_flops=0.8, keep_parameters=0.6, fade_ratio=0.25, min_channels=3)
    trainer = Trainer(native_detector, build_from_spec(native_detector.spec), config, 12)
    norms: list[list[torch.Tensor]] = []
    for step in range(12):
        masked = [compactor.masked.clone() for compactor in trainer.pruner.compactors]
        trainer.train_step(step)
        norms.append([rows.norm(dim=1) for rows in trainer.rows])
        if step < 2:
            assert not any(mask.any() for mask in masked)
        for layer, compactor in enumerate(trainer.pruner.compactors):
            assert not (masked[layer] & ~compactor.masked).any()  # masking is permanent
            if step:
                is_smaller = norms[-1][layer] < norms[-2][layer]
                assert (is_smaller | (norms[-1][layer] == 0))[compactor.masked].all()
    assert trainer.pruner.target_reached
    final, initial = trainer.pruner.complexity, trainer.cost_model.initial_complexity
    assert final.flops <= 0.8 * initial.flops and final.num_params <= 0.6 * initial.num_params
    widths = [int((~compactor.masked).sum()) for compactor in trainer.pruner.compactors]
    assert min(widths) >= 3
    # No more channels are masked than needed: with one more channel, one of the two targets is missed.
    wider = [
        trainer.cost_model.compute_complexity([w + (i == layer) for i, w in enumerate(widths)])
        for layer in range(len(widths))
    ]
    assert any(c.flops > 0.8 * initial.flops or c.num_params > 0.6 * initial.num_params for c in wider)
    trainer.student.eval()
    fused = trainer.pruner.deployable_model(trainer.student)
    with torch.no_grad():
        torch.testing.assert_close(
            fused(IMAGES).one2many.logits, trainer.student(IMAGES).one2many.logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(("ratio", "width"), [(0.0, 2), (0.5, 4)])
def test_every_layer_keeps_a_ratio_of_its_channels(native_detector: BaseDetector, ratio: float, width: int) -> None:
    """With the least important layer of 8 channels, the target of this network is met at 2 channels."""
    config = CDDConfig(keep_flops=0.9, min_channels=1, min_width_ratio=ratio)
    trainer = Trainer(native_detector, build_from_spec(native_detector.spec), config, 10)
    for layer, importance in enumerate(trainer.method.importance):
        importance.response.fill_(float(layer > 0))  # type: ignore[operator,union-attr]
    trainer.pruner._mask_channels([torch.zeros_like(c.masked) for c in trainer.pruner.compactors], 0.0)
    masked = trainer.pruner.compactors[0].masked
    assert int((~masked).sum()) == width


def test_unimportant_channels_are_ranked_first(native_detector: BaseDetector) -> None:
    trainer = Trainer(native_detector, build_from_spec(native_detector.spec), CDDConfig(keep_flops=0.9), 10)
    importance = trainer.method.importance
    unimportant = [torch.zeros_like(compactor.masked) for compactor in trainer.pruner.compactors]
    for layer, compactor in enumerate(trainer.pruner.compactors):
        importance[layer].response.copy_(torch.linspace(1, 2, len(compactor.masked)))  # type: ignore[operator,union-attr]
    unimportant[3][-1] = True
    order = trainer.pruner._rank_channels(unimportant)
    assert order[0] == (3, len(unimportant[3]) - 1)
    assert order[1][1] == 0 and len(set(order)) == len(order) == sum(len(mask) for mask in unimportant)


class TwoLayers(nn.Module):
    """Two prunable convolutions, the first at 1024 positions of an image of 32x32, the second at 16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.middle = nn.Conv2d(2, 1, 1, bias=False)
        self.second, self.second_norm = nn.Conv2d(1, 8, 1, 8, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 1, 1, bias=False)

    def predict(self, images: torch.Tensor, max_det: int = 300) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002
        features = self.middle(self.first_norm(self.first(images)))
        return features, self.last(self.second_norm(self.second(features)))

    def prunable_layers(self) -> list[PrunableLayer]:
        return [
            PrunableLayer("first", ("first_norm",), ("middle",)),
            PrunableLayer("second", ("second_norm",), ("last",)),
        ]


# What a channel costs. first: 3 + 1 weights, 2 of the normalization; 2 FLOPs per weight at 1024 positions.
# second: 1 + 1 weights, 2 of the normalization; 2 FLOPs per weight at 16 positions.
TWO_LAYERS_SAVINGS = [(6, 8192), (4, 64)]
TWO_LAYERS_FLOPS, TWO_LAYERS_PARAMETERS = 2 * 1024 * (6 + 2) + 2 * 16 * (8 + 8), 6 + 4 + 2 + 8 + 16 + 8


def make_two_layer_pruner(config: CDDConfig) -> ChannelPruner:
    detector: Any = TwoLayers().eval()
    cost_model = prepare_pruning(detector, config, (32, 32), "two")
    method = CDDLoss(detector, TwoLayers(), config)
    # Shares of the responses: 0.3, 0.7 in the first layer; 0.1 and 7 times 0.9 / 7 in the second one.
    for importance, response in zip(method.importance, ([0.6, 1.4], [1.0, *[9.0 / 7] * 7]), strict=True):
        importance.response.copy_(torch.tensor(response))  # type: ignore[operator,union-attr]
    schedule = PruningSchedule.from_config(config, 10, 1.0)
    return ChannelPruner(method, cost_model, config, schedule, lambda vectors: [vectors])


def test_savings_of_a_channel_match_a_count_by_hand() -> None:
    cost_model = make_two_layer_pruner(CDDConfig(keep_flops=0.9, min_channels=1)).cost_model
    initial = cost_model.initial_complexity
    assert (initial.flops, initial.num_params) == (TWO_LAYERS_FLOPS, TWO_LAYERS_PARAMETERS)
    assert cost_model.compute_savings([2, 8]) == TWO_LAYERS_SAVINGS


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        # 0.6 and 1.4 times the mean in the first layer; 0.8, then 1.03 times in the second one.
        ({"ranking": "response", "keep_flops": 0.9}, [0, *[1] * 8, 0]),
        # 0.3 / 8192 FLOPs = 3.7e-5, then 8.5e-5 in the first layer; 0.1 / 64 = 1.6e-3, then 2e-3 in the second one.
        ({"keep_flops": 0.9}, [0, 0, *[1] * 8]),
        # 0.3 / 6 parameters = 0.05, then 0.12 in the first layer; 0.1 / 4 = 0.025, then 0.032 in the second one.
        ({"keep_flops": 1.0, "keep_parameters": 0.9}, [*[1] * 8, 0, 0]),
        # Both, as fractions of the network: 0.3 / (6/44 + 8192/16896) = 0.48, then 1.13 in the first layer;
        # 0.1 / (4/44 + 64/16896) = 1.06, then 1.36 in the second one.
        ({"keep_flops": 0.9, "keep_parameters": 0.9}, [0, 1, 0, *[1] * 7]),
    ],
)
def test_ranking_between_layers_matches_hand_computation(changes: dict[str, Any], layers: list[int]) -> None:
    pruner = make_two_layer_pruner(CDDConfig(min_channels=1, min_width_ratio=0, **changes))
    order = pruner._rank_channels([torch.zeros_like(compactor.masked) for compactor in pruner.compactors])
    assert [layer for layer, _ in order] == layers
    assert [channel for layer, channel in order if layer == 1] == list(range(8))


def test_met_target_does_not_count_as_cost() -> None:
    """With the parameters within their target, only FLOPs count; the shares are those of the remaining channels."""
    pruner = make_two_layer_pruner(CDDConfig(keep_flops=0.6, keep_parameters=0.95, min_channels=1, min_width_ratio=0))
    pruner.compactors[1].masked[0] = True  # 40 of 44 parameters remain
    # The relative responses of the second layer are 1: 7 channels of 64 FLOPs each.
    expected = [2 * 8192 / TWO_LAYERS_FLOPS, 7 * 64 / TWO_LAYERS_FLOPS]
    assert pruner._compute_divisors() == pytest.approx(expected)


def test_vectors_of_all_processes_enter_the_queue(native_detector: BaseDetector) -> None:
    single, distributed = (
        Trainer(deepcopy(native_detector), build_from_spec(native_detector.spec), CDDConfig(keep_flops=0.9), 10)
        for _ in range(2)
    )
    distributed.pruner._all_gather = lambda vectors: [vectors, [], vectors]
    sizes = []
    for trainer in (single, distributed):
        torch.manual_seed(0)
        trainer.train_step(0)
        sizes.append([len(layer.queue.vectors) for layer in trainer.method.importance])  # type: ignore[union-attr,arg-type]
    assert sizes[1] == [2 * size for size in sizes[0]] and min(sizes[0]) >= 2


@pytest.mark.slow
def test_wider_student_uses_linear_adapters(native_detector: BaseDetector) -> None:
    wide = build_from_spec(replace(native_detector.spec, channels=20))
    trainer = Trainer(wide, native_detector, CDDConfig(keep_flops=0.8), 6)
    assert any(isinstance(adapter, nn.Linear) for adapter in trainer.method.adapters)
    for step in range(6):
        trainer.train_step(step)
    assert trainer.pruner.target_reached and trainer.pruner.deployable_model(wide).changes.widths


def test_losses_match_their_formulas(native_detector: BaseDetector) -> None:
    """Compare with torch's Bernoulli KL divergence at a temperature, and with distances of recorded features."""
    torch.manual_seed(0)
    teacher = build_from_spec(native_detector.spec).eval()
    config = CDDConfig(keep_flops=0.9, cls=3.0, temperature=4.0, feature=0.2)
    prepare_pruning(native_detector, config, HW, "native")
    method = CDDLoss(native_detector.train(), teacher, config)
    recorded: dict[str, torch.Tensor] = {}
    for name in [name for site in method.sites for name in site.layer.norms]:
        for model, module in (
            ("student", native_detector.get_submodule(f"{name}.norm")),
            ("teacher", teacher.get_submodule(name)),
        ):
            module.register_forward_hook(
                lambda _module, _inputs, output, key=f"{model} {name}": recorded.update({key: output.clone()})
            )
    with torch.no_grad():
        batch = make_batch(method, native_detector, teacher)
        losses = method(batch)
    cls_loss = torch.zeros(())
    for branch in ("one2many", "one2one"):
        student, target = (
            getattr(outputs, branch).logits for outputs in (batch.student_outputs, batch.teacher_outputs)
        )
        s, t = (torch.distributions.Bernoulli(logits=logits / 4) for logits in (student, target))
        divergence = (t.probs - s.probs).abs() * torch.distributions.kl_divergence(t, s)
        cls_loss = cls_loss + 4**2 * divergence.sum() / target.sigmoid().sum().clamp(min=1)
    torch.testing.assert_close(losses["cdd_cls"], 3 * cls_loss, rtol=1e-4, atol=1e-6)
    rois = torch.cat([torch.tensor([[0.0], [1.0]]), TARGETS.boxes_xyxy[:, 0]], 1)
    distance = torch.zeros(())
    for site in method.sites:
        s, t = (
            BoxAveragePool(rois, HW)([recorded[f"{model} {name}"] for name in site.layer.norms])
            for model in ("student", "teacher")
        )
        distance = distance + (t - s).norm(dim=1).mean()
    torch.testing.assert_close(losses["cdd_feature"], 0.2 * distance, rtol=1e-4, atol=1e-6)


def test_optimizer_momentum_does_not_move_masked_rows(native_detector: BaseDetector) -> None:
    trainer = Trainer(
        native_detector, build_from_spec(native_detector.spec), CDDConfig(keep_flops=0.9, fade_ratio=0.5), 20
    )
    compactor = trainer.pruner.compactors[0]
    compactor.masked[:2] = True
    trainer.pruner.after_backward(0)
    weight = torch.randn_like(compactor.weight)
    with torch.no_grad():
        compactor.weight.copy_(weight)
    before = torch.eye(len(compactor.masked))
    trainer.pruner.after_step()
    torch.testing.assert_close(compactor.rows[:2], 0.9 * before[:2])  # fading takes 10 steps: 0.1 per step
    assert torch.equal(compactor.rows[2:], weight.flatten(1)[2:])


@pytest.mark.slow
def test_losses_are_zero_for_equal_student_and_teacher(native_detector: BaseDetector) -> None:
    teacher = build_from_spec(native_detector.spec)
    teacher.load_state_dict(native_detector.state_dict())
    prepare_pruning(native_detector, CDDConfig(keep_flops=0.9), HW, "native")
    method = CDDLoss(native_detector.eval(), teacher.eval(), CDDConfig())
    losses = method(make_batch(method, native_detector, teacher))
    for loss in losses.values():
        torch.testing.assert_close(loss, torch.zeros(()), atol=1e-4, rtol=0)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in native_detector.parameters())


def test_teacher_with_other_layers_raises_usage_error(native_detector: BaseDetector) -> None:
    prepare_pruning(native_detector, CDDConfig(keep_flops=0.9), HW, "native")
    with pytest.raises(UsageError, match=r"no layer head\.cls_tower\.convs\.1"):
        CDDLoss(native_detector, build_from_spec(replace(native_detector.spec, head_depth=1)), CDDConfig())
