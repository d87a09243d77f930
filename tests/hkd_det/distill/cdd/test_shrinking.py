"""How channels fade, when, and that the target is met."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from hkd_det.distill.base import DistillationBatch
from hkd_det.distill.cdd.compactor import group_lasso, group_lasso_gradient, proximal_step, reset_gradient
from hkd_det.distill.cdd.config import CDDConfig
from hkd_det.distill.cdd.cost_model import ChannelCostModel
from hkd_det.distill.cdd.method import CDD
from hkd_det.distill.cdd.pruner import ChannelPruner, PruningSchedule, prepare_student
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, Targets
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.criterion import DetectionCriterion
from hkd_det.ops.losses import clamp_min_one
from hkd_det.ops.roi_pool import BoxAveragePool

HW = (64, 96)
PICTURE = torch.randint(0, 255, (2, 3, *HW), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
PEOPLE = Targets(
    torch.tensor([[[10.0, 10.0, 40.0, 60.0]], [[50.0, 5.0, 70.0, 60.0]]]),
    torch.ones(2, 1, dtype=torch.bool),
    torch.zeros(2, 1, dtype=torch.bool),
)


def test_the_lassos_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    rows = torch.randn(4, 5, dtype=torch.float64)
    step = 1e-6
    for i in range(4):
        for j in range(5):
            nudge = torch.zeros_like(rows)
            nudge[i, j] = step
            numeric = (group_lasso(rows + nudge) - group_lasso(rows - nudge)) / (2 * step)
            torch.testing.assert_close(group_lasso_gradient(rows)[i, j], numeric, atol=1e-6, rtol=1e-6)


def test_a_row_of_zeros_stays_finite_and_zero() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    torch.testing.assert_close(group_lasso_gradient(rows), torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    assert torch.equal(proximal_step(rows, 0.1)[0], torch.zeros(2))


def test_masked_rows_hear_the_lasso_alone() -> None:
    rows, gradient = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[7.0, -7.0], [1.0, 1.0]])
    reset = reset_gradient(gradient, rows, torch.tensor([True, False]), 0.1)
    torch.testing.assert_close(reset, torch.tensor([[0.06, 0.08], [1.0, 1.1]]))


def test_fading_is_the_lassos_proximal_step() -> None:
    """It minimises 1/2 |x - w|^2 + force |x|: no point on a fine grid is better."""
    row, force = torch.tensor([[0.3, 0.4]]), 0.2
    grid = torch.cartesian_prod(torch.linspace(-0.5, 0.5, 201), torch.linspace(-0.5, 0.5, 201))
    best = grid[(0.5 * (grid - row).square().sum(1) + force * grid.norm(dim=1)).argmin()]
    torch.testing.assert_close(proximal_step(row, force)[0], best, atol=6e-3, rtol=0)
    assert torch.equal(proximal_step(row, 0.6), torch.zeros(1, 2)) and torch.equal(
        proximal_step(row, float("inf")), torch.zeros(1, 2)
    )


def test_the_course_sheds_between_warmup_and_its_end() -> None:
    course = PruningSchedule.from_config(CDDConfig(warmup_ratio=0.2, mask_end=0.5, fade_ratio=0.1), 100, 0.8)
    assert (course.start, course.end) == (0.2, 0.4) and course.fade_end == pytest.approx(0.5)
    assert [course.remaining_excess(at) for at in (0.1, 0.2, 0.4, 1.0)] == [1, 1, 0, 0]
    assert course.remaining_excess(0.35) == pytest.approx(0.25)
    with pytest.raises(UsageError, match="too short"):
        PruningSchedule.from_config(CDDConfig(), 100, 0.2)


def test_people_are_compared_now_and_then_in_short_runs_often_and_at_the_courses_end() -> None:
    settings = CDDConfig(warmup_ratio=0.25, mask_end=0.75, compare_interval=16)
    assert [
        PruningSchedule.from_config(settings, steps, 1.0).compare_interval for steps in (10, 100, 256, 1000, 10000)
    ] == [1, 1, 4, 15, 16]
    course = PruningSchedule.from_config(settings, 256, 1.0)
    assert [step for step in range(256) if course.is_comparison_step(step)] == [*range(0, 191, 4), *range(191, 256)]
    assert PruningSchedule.from_config(replace(settings, compare_interval=1), 10000, 1.0).compare_interval == 1


def test_a_step_without_comparison_shows_nothing_and_masks_nothing(ours: BaseDetector) -> None:
    school = School(ours, build_from_spec(ours.spec), CDDConfig(keep_flops=0.8), 12)
    school.shrinking.schedule = replace(school.shrinking.schedule, compare_interval=4)
    shown, masked = [], []
    for number in range(12):
        school.step(number)
        shown.append(bool(school.terms.pooled_features))
        masked.append(sum(int(compactor.masked.sum()) for compactor in school.shrinking.compactors))
    # Choosing begins after step 1 and ends with step 7, by which all is masked and nothing is left to compare.
    assert [number for number in range(12) if shown[number]] == [0, 4, 7]
    assert masked[:4] == [0] * 4 and 0 < masked[4] == masked[6] < masked[7] == masked[-1]
    assert school.shrinking.target_reached


@pytest.mark.parametrize("what", ["flops", "parameters"])
def test_a_target_that_cannot_be_met_is_refused_at_once(ours: BaseDetector, what: str) -> None:
    settings = CDDConfig(**{"keep_flops": 1.0, "keep_parameters": 1.0, f"keep_{what}": 0.05})
    with pytest.raises(UsageError, match=rf"keep_{what}=0\.05.*at least 0\.\d+ of its {what} stay"):
        prepare_student(ours, settings, HW, "ours")


class School:
    """A student, its teacher, and steps between them as a run takes them."""

    def __init__(self, student: BaseDetector, teacher: BaseDetector, settings: CDDConfig, steps: int) -> None:
        self.student, self.teacher = student.train(), teacher.eval().requires_grad_(False)
        self.ledger: ChannelCostModel = prepare_student(student, settings, HW, "student")
        self.terms = CDD(student, teacher, settings)
        course = PruningSchedule.from_config(settings, steps, 1.0)
        self.shrinking = ChannelPruner(self.terms, self.ledger, settings, course, lambda mine: [mine])
        self.optimizer = torch.optim.AdamW([*student.parameters(), *self.terms.parameters()], lr=1e-2)

    def step(self, number: int) -> None:
        self.shrinking.before_step(number)
        mine = self.student(PICTURE)
        with torch.no_grad():
            other = self.teacher(PICTURE)
        lesson = DistillationBatch(PICTURE, PEOPLE, self.student, self.teacher, mine, other, [], [], clamp_min_one)
        loss = torch.stack([*DetectionCriterion()(mine, PEOPLE).values(), *self.terms(lesson).values()]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.shrinking.after_backward(number)
        self.optimizer.step()
        self.shrinking.after_step()

    @property
    def rows(self) -> list[torch.Tensor]:
        return [compactor.rows.detach().clone() for compactor in self.shrinking.compactors]


def test_channels_fade_monotonously_stay_gone_and_the_target_is_met(ours: BaseDetector) -> None:
    settings = CDDConfig(keep_flops=0.8, keep_parameters=0.6, fade_ratio=0.25, min_channels=3)
    school = School(ours, build_from_spec(ours.spec), settings, 12)
    norms: list[list[torch.Tensor]] = []
    for number in range(12):
        masked = [compactor.masked.clone() for compactor in school.shrinking.compactors]
        school.step(number)
        norms.append([rows.norm(dim=1) for rows in school.rows])
        if number < 2:
            assert not any(mask.any() for mask in masked)
        for layer, compactor in enumerate(school.shrinking.compactors):
            assert not (masked[layer] & ~compactor.masked).any()  # for good
            if number:
                fell = norms[-1][layer] < norms[-2][layer]
                assert (fell | (norms[-1][layer] == 0))[compactor.masked].all()
    assert school.shrinking.target_reached
    cost, start = school.shrinking.complexity, school.ledger.initial_complexity
    assert cost.flops <= 0.8 * start.flops and cost.num_params <= 0.6 * start.num_params
    widths = [int((~compactor.masked).sum()) for compactor in school.shrinking.compactors]
    assert min(widths) >= 3
    # Not further than needed: with the last channel back, one of the two would be missed.
    more = [
        school.ledger.compute_complexity([w + (i == layer) for i, w in enumerate(widths)])
        for layer in range(len(widths))
    ]
    assert any(c.flops > 0.8 * start.flops or c.num_params > 0.6 * start.num_params for c in more)
    school.student.eval()
    plain = school.shrinking.deployable_model(school.student)
    with torch.no_grad():
        torch.testing.assert_close(
            plain(PICTURE).one2many.logits, school.student(PICTURE).one2many.logits, atol=1e-5, rtol=1e-5
        )


def test_the_first_to_go_are_those_on_which_all_agree(ours: BaseDetector) -> None:
    school = School(ours, build_from_spec(ours.spec), CDDConfig(keep_flops=0.9), 10)
    evidence = school.terms.importance
    unanimous = [torch.zeros_like(compactor.masked) for compactor in school.shrinking.compactors]
    for layer, compactor in enumerate(school.shrinking.compactors):
        evidence[layer].response.copy_(torch.linspace(1, 2, len(compactor.masked)))  # type: ignore[operator,union-attr]
    unanimous[3][-1] = True
    order = school.shrinking._rank_channels(unanimous)
    assert order[0] == (3, len(unanimous[3]) - 1)
    assert order[1][1] == 0 and len(set(order)) == len(order) == sum(len(mask) for mask in unanimous)


def test_each_process_looks_at_everybodys_people(ours: BaseDetector) -> None:
    alone, both = (School(deepcopy(ours), build_from_spec(ours.spec), CDDConfig(keep_flops=0.9), 10) for _ in range(2))
    both.shrinking._all_gather = lambda mine: [mine, [], mine]
    sizes = []
    for school in (alone, both):
        torch.manual_seed(0)
        school.step(0)
        sizes.append([len(evidence.queue.vectors) for evidence in school.terms.importance])  # type: ignore[union-attr,arg-type]
    assert sizes[1] == [2 * size for size in sizes[0]] and min(sizes[0]) >= 2


def test_terms_of_a_wider_student_teach_through_adapters(ours: BaseDetector) -> None:
    wide = build_from_spec(replace(ours.spec, channels=20))
    school = School(wide, ours, CDDConfig(keep_flops=0.8), 6)
    assert any(isinstance(adapter, nn.Linear) for adapter in school.terms.adapters)
    for number in range(6):
        school.step(number)
    assert school.shrinking.target_reached and school.shrinking.deployable_model(wide).changes.widths


def test_the_terms_are_those_of_the_formulas(ours: BaseDetector) -> None:
    """Bernoulli divergences at a temperature, by torch's own; distances of people's vectors as hooks see them."""
    torch.manual_seed(0)
    teacher = build_from_spec(ours.spec).eval()
    settings = CDDConfig(keep_flops=0.9, cls=3.0, temperature=4.0, feature=0.2)
    prepare_student(ours, settings, HW, "ours")
    terms = CDD(ours.train(), teacher, settings)
    seen: dict[str, torch.Tensor] = {}
    for name in [name for site in terms.sites for name in site.layer.norms]:
        for who, module in (("mine", ours.get_submodule(f"{name}.norm")), ("other", teacher.get_submodule(name))):
            module.register_forward_hook(
                lambda _module, _inputs, output, key=f"{who} {name}": seen.update({key: output.clone()})
            )
    with torch.no_grad():
        mine, other = ours(PICTURE), teacher(PICTURE)
        told = terms(DistillationBatch(PICTURE, PEOPLE, ours, teacher, mine, other, [], [], clamp_min_one))
    score = torch.zeros(())
    for student, taught in ((mine.one2many.logits, other.one2many.logits), (mine.one2one.logits, other.one2one.logits)):
        s, t = (torch.distributions.Bernoulli(logits=logits / 4) for logits in (student, taught))
        divergence = (t.probs - s.probs).abs() * torch.distributions.kl_divergence(t, s)
        score = score + 4**2 * divergence.sum() / taught.sigmoid().sum().clamp(min=1)
    torch.testing.assert_close(told["cdd_cls"], 3 * score, rtol=1e-4, atol=1e-6)
    rois = torch.cat([torch.tensor([[0.0], [1.0]]), PEOPLE.boxes_xyxy[:, 0]], 1)
    distance = torch.zeros(())
    for site in terms.sites:
        s, t = (
            BoxAveragePool(rois, HW)([seen[f"{who} {name}"] for name in site.layer.norms]) for who in ("mine", "other")
        )
        distance = distance + (t - s).norm(dim=1).mean()
    torch.testing.assert_close(told["cdd_feature"], 0.2 * distance, rtol=1e-4, atol=1e-6)


def test_masked_rows_do_not_hear_what_the_optimizer_remembers(ours: BaseDetector) -> None:
    school = School(ours, build_from_spec(ours.spec), CDDConfig(keep_flops=0.9, fade_ratio=0.5), 20)
    compactor = school.shrinking.compactors[0]
    compactor.masked[:2] = True
    school.shrinking.after_backward(0)
    moved = torch.randn_like(compactor.weight)
    with torch.no_grad():
        compactor.weight.copy_(moved)
    before = torch.eye(len(compactor.masked))
    school.shrinking.after_step()
    torch.testing.assert_close(compactor.rows[:2], 0.9 * before[:2])  # a tenth of 1 a step: fade is 10 steps long
    assert torch.equal(compactor.rows[2:], moved.flatten(1)[2:])


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(ours: BaseDetector) -> None:
    twin = build_from_spec(ours.spec)
    twin.load_state_dict(ours.state_dict())
    prepare_student(ours, CDDConfig(keep_flops=0.9), HW, "ours")
    terms = CDD(ours.eval(), twin.eval(), CDDConfig())
    mine, other = ours(PICTURE), twin(PICTURE)
    told = terms(DistillationBatch(PICTURE, PEOPLE, ours, twin, mine, other, [], [], clamp_min_one))
    for term in told.values():
        torch.testing.assert_close(term, torch.zeros(()), atol=1e-4, rtol=0)
    sum(told.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in ours.parameters())


def test_a_teacher_of_other_layers_is_refused(ours: BaseDetector) -> None:
    prepare_student(ours, CDDConfig(keep_flops=0.9), HW, "ours")
    with pytest.raises(UsageError, match=r"no layer head\.cls_tower\.convs\.1"):
        CDD(ours, build_from_spec(replace(ours.spec, head_depth=1)), CDDConfig())
